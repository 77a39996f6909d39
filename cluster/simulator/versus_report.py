"""The comparison as tables for people and rows for programs, and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.simulator.scenario import Source
from cluster.simulator.versus import (
    ABLATION,
    ANONYMOUS,
    INFINITE,
    LOW,
    MEAN,
    ORACLE,
    P95,
    TARGETS,
    Outcomes,
    Ratio,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = {
    "completion_mean_s": MEAN,
    "completion_p95_s": P95,
    "goodput": "goodput_calls_per_s",
    "good_calls_share": "goodput_calls_share",
    "completion_with_pauses_mean_s": "completion_s_mean",
    "completion_with_pauses_p95_s": "completion_s_p95",
    "ttft_mean_s": "ttft_s_mean",
    "ttft_p95_s": "ttft_s_p95",
    "itl_mean_s": "itl_s_mean",
    "prompt_tokens": "prompt_tokens",
    "computed_tokens": "computed_tokens",
    "recomputed_tokens": "recomputed_tokens",
    "preemptions": "preemptions",
    "runs_served_share": "runs_served_share",
}
"""Of a row, and the figure of a replay that it is the mean of."""
SHOWN = (
    ("completion\nmean, s", "completion_mean_s", 1.0),
    ("completion\nP95, s", "completion_p95_s", 1.0),
    ("goodput\ncalls/s", "goodput", 1.0),
    ("good\n%", "good_calls_share", 100.0),
    ("TTFT\nmean, s", "ttft_mean_s", 1.0),
    ("ITL\nmean, ms", "itl_mean_s", 1e3),
    ("computed\nMtok", "computed_tokens", 1e-6),
    ("recomputed\nMtok", "recomputed_tokens", 1e-6),
)
ABLATED = "ablation."
WIDTH_IN = 11.0
DPI = 110


def rows_of(
    found: Outcomes, workloads: Sequence[Source], systems: Sequence[str]
) -> list[dict[str, Any]]:
    """One for each workload, variant of it and system; what was not measured is left out."""
    rows = []
    for source in workloads:
        for variant in ("", LOW, ANONYMOUS):
            place = f"{source.name}, {variant}" if variant else source.name
            for name in systems:
                seeds = found.seeds(place, name)
                if not seeds:
                    continue
                row: dict[str, Any] = {"workload": source.name, "system": name}
                row |= {"variant": variant, "seeds": len(seeds)}
                values = {each: found.mean(place, name, of) for each, of in COLUMNS.items()}
                row |= {each: value for each, value in values.items() if math.isfinite(value)}
                rows.append(row)
    return rows


def show(
    console: Console,
    rows: Sequence[Mapping[str, Any]],
    ratios: Mapping[str, Mapping[str, Ratio]],
    whole: Mapping[str, float],
    capacities: Mapping[str, tuple[str, float]],
) -> None:
    """All tables. ``whole``: figures of all workloads together; ``capacities``: who can take most
    of a workload, and how busy it is here."""
    for workload in ratios:
        strongest, share = capacities[workload]
        console.print(
            f"\n{workload}, {strongest} at {share:.0%} of its capacity",
            style="bold",
            highlight=False,
        )
        of_it = [row for row in rows if row["workload"] == workload and not row["variant"]]
        console.print(_systems(of_it))
    console.print(_figures(ratios, whole))
    console.print(
        "times of the other divided by Pythia's, above 1: Pythia is faster; recomputed: Pythia's "
        "tokens divided by the other's. ± half a 95 % interval over seeds. Last column: geometric "
        "mean over workloads, and what it should be",
        style="dim",
        highlight=False,
    )
    if any(name.startswith(ABLATED) for name in whole):
        console.print(_ablations(ratios, whole))


def _systems(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("system", no_wrap=True)
    for label, _, _ in SHOWN:
        table.add_column(label, justify="right", no_wrap=True)
    for row in rows:
        if row["system"].startswith(ABLATION):
            continue
        bound = row["system"] in (ORACLE, INFINITE)
        name = Text(row["system"], "italic dim" if bound else "")
        if row.get("runs_served_share", 0.0) < 1.0:
            name.append(" !", "red")
        table.add_row(name, *(_number(row.get(key), factor) for _, key, factor in SHOWN))
    return table


def _figures(ratios: Mapping[str, Mapping[str, Ratio]], whole: Mapping[str, float]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title="\nfigures", title_justify="left")
    table.add_column("figure", no_wrap=True)
    for workload in ratios:
        table.add_column(workload, justify="right")
    table.add_column("all", justify="right", no_wrap=True)
    table.add_column("target", justify="right", no_wrap=True)
    for name, target in TARGETS.items():
        cells = [_judged(of_it.get(name), name) for of_it in ratios.values()]
        value = whole.get(name)
        cells.append(_judged(Ratio(value) if value is not None else None, name))
        table.add_row(name, *cells, f"{'≥' if target.at_least else '≤'} {target.value:g}")
    return table


def _judged(ratio: Ratio | None, name: str) -> Text:
    if ratio is None:
        return Text("-", "dim")
    text = Text(f"{ratio.value:.2f}", "green" if TARGETS[name].met(ratio.value) else "red")
    if math.isfinite(ratio.half):
        text.append(f" ±{ratio.half:.2f}", "dim")
    return text


def _ablations(ratios: Mapping[str, Mapping[str, Ratio]], whole: Mapping[str, float]) -> Table:
    """How many times as long runs take without each mechanism."""
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        title="\nwithout one mechanism: how many times as long runs take",
        title_justify="left",
    )
    table.add_column("configuration", no_wrap=True)
    for workload in ratios:
        table.add_column(workload, justify="right")
    table.add_column("all", justify="right", no_wrap=True)
    names = sorted(
        (name for name in whole if name.startswith(ABLATED)), key=lambda name: -whole[name]
    )
    for name in names:
        cells = [_plain(of_it.get(name)) for of_it in ratios.values()]
        table.add_row(name.removeprefix(ABLATED), *cells, f"{whole[name]:.3f}")
    return table


def _plain(ratio: Ratio | None) -> Text:
    if ratio is None:
        return Text("-", "dim")
    text = Text(f"{ratio.value:.3f}")
    if math.isfinite(ratio.half):
        text.append(f" ±{ratio.half:.3f}", "dim")
    return text


def _number(value: float | None, factor: float) -> str:
    if value is None:
        return "-"
    shown = value * factor
    if abs(shown) >= 100:
        return f"{shown:,.0f}"
    return f"{shown:.1f}" if abs(shown) >= 10 else f"{shown:.2f}"


def write_plot(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Mean and P95 completion of every system, workload by workload; the file."""
    from matplotlib.figure import Figure

    plain = [row for row in rows if not row["variant"] and not row["system"].startswith(ABLATION)]
    workloads = list(dict.fromkeys(row["workload"] for row in plain))
    systems = list(dict.fromkeys(row["system"] for row in plain))
    height_in = 1.2 + 0.32 * len(systems)
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, len(workloads), squeeze=False, sharey=True)[0])
    for ax, workload in zip(axes, workloads, strict=True):
        of_it = {row["system"]: row for row in plain if row["workload"] == workload}
        for at, system in enumerate(systems):
            row = of_it.get(system, {})
            ax.barh(at, row.get("completion_mean_s", 0.0), color=_colour(system), height=0.7)
            ax.plot(row.get("completion_p95_s", 0.0), at, "|", color="black", markersize=9)
        ax.set_title(workload)
        ax.set_xlabel("s, mean; P95 as a mark")
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(systems)), systems)
    axes[0].invert_yaxis()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "compare.png"
    figure.savefig(path, dpi=DPI)
    return path


def _colour(system: str) -> str:
    if system in (ORACLE, INFINITE):
        return "#999999"
    return "#1f77b4" if system.startswith("pythia") else "#e08214"

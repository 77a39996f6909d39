"""Outcomes of several configurations and seeds as tables for people and figures for programs.

Every cell is a mean over seeds and half its 95 % confidence interval (Student's t); with one
seed there are no intervals. ``against`` is the difference to the reference on the same seeds,
which is far better known than either mean, as seeds that are hard are hard for all. Marked is
what is best, and with it all that can't be told from it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.simulator.estimates import Estimate, difference, estimate
from cluster.simulator.measures import (
    CACHES,
    COMPLETION,
    ENGINES,
    GAP,
    ITL,
    SERVICE,
    SERVING,
    TTFT,
    Measure,
)
from cluster.simulator.outcome import Outcome

COMPARED = (
    "completion_s_mean",
    "serving_s_mean",
    "ttft_s_mean",
    "itl_s_mean",
    "goodput_calls_share",
    "goodput_calls_per_s",
    "tokens_per_s_per_gpu",
)
"""Figures whose difference to the reference is shown and written."""
SHOWN = ("wasted_warmups",)
"""Figures that have their column even if there is nothing in it."""
BEST = "*"
PARTLY = "!"

Values = dict[int, float]
"""A figure by seed."""


class Panel(NamedTuple):
    """Figures that stand side by side; ``compared`` of them is set against the reference."""

    title: str
    measures: tuple[Measure, ...]
    compared: str = ""


PANELS = (
    Panel("completion time of runs, s", COMPLETION, "completion_s_mean"),
    Panel("the same without the runs' own pauses, s", SERVING, "serving_s_mean"),
    Panel("time to first token, s", TTFT, "ttft_s_mean"),
    Panel("time between tokens, ms: means of calls", ITL, "itl_s_mean"),
    Panel("time between tokens, ms: every single one", GAP),
    Panel("service", SERVICE, "goodput_calls_share"),
    Panel("caches and transfers", CACHES),
    Panel("engines and core", ENGINES),
)


class Comparison:
    """The outcomes of one workload. ``bounds``: configurations that no cluster could be."""

    def __init__(
        self, outcomes: Sequence[Outcome], reference: str, bounds: Collection[str] = ()
    ) -> None:
        assert outcomes
        assert len({outcome.workload for outcome in outcomes}) == 1
        self.workload = outcomes[0].workload
        self.configurations = list(dict.fromkeys(outcome.configuration for outcome in outcomes))
        self.reference = reference
        self.bounds = bounds
        self.seeds = len({outcome.seed for outcome in outcomes})
        self._values: dict[tuple[str, str], Values] = {}
        for outcome in outcomes:
            for name, value in outcome.figures.items():
                of_seed = self._values.setdefault((outcome.configuration, name), {})
                of_seed[outcome.seed] = value

    def values(self, configuration: str, figure: str) -> Values:
        """By seed; empty where it could not be measured."""
        return self._values.get((configuration, figure), {})

    def mean(self, configuration: str, figure: str) -> Estimate | None:
        """Over seeds."""
        values = self.values(configuration, figure)
        return estimate(values.values()) if values else None

    def against(self, configuration: str, figure: str) -> Estimate | None:
        """Relative difference to the reference; None for the reference itself."""
        if configuration == self.reference:
            return None
        return difference(self.values(configuration, figure), self.values(self.reference, figure))

    def serves_all(self, configuration: str) -> bool:
        """Every run of every seed was served: its latencies are those of all of them."""
        shares = self.values(configuration, "runs_served_share").values()
        return bool(shares) and min(shares) == 1.0

    def best(self, measure: Measure) -> set[str]:
        """Whose mean is best, and whose difference to it may be chance.

        Only among those that could exist and served all runs. Nobody if that is one, if all
        are the same or if there is one seed, of which chance can't be told.
        """
        fair = [
            name
            for name in self.configurations
            if name not in self.bounds and self.serves_all(name) and self.values(name, measure.name)
        ]
        if not measure.better or len(fair) < 2 or self.seeds < 2:
            return set()
        sign = 1.0 if measure.better == "lower" else -1.0
        means = {name: sign * self._mean(name, measure.name) for name in fair}
        first = min(fair, key=lambda name: (means[name], name))
        if means[first] == max(means.values()):
            return set()
        return {first} | {name for name in fair if not self._differs(name, first, measure.name)}

    def _mean(self, configuration: str, figure: str) -> float:
        return estimate(self.values(configuration, figure).values()).mean

    def _differs(self, one: str, other: str, figure: str) -> bool:
        mine, theirs = self.values(one, figure), self.values(other, figure)
        seeds = mine.keys() & theirs.keys()
        return len(seeds) > 1 and estimate(mine[seed] - theirs[seed] for seed in seeds).settled


def comparisons(
    outcomes: Sequence[Outcome], reference: str, bounds: Collection[str] = ()
) -> list[Comparison]:
    """By workload, in the order in which they come."""
    names = dict.fromkeys(outcome.workload for outcome in outcomes)
    return [
        Comparison([each for each in outcomes if each.workload == name], reference, bounds)
        for name in names
    ]


# --- for programs ---------------------------------------------------------------


def figures_of(found: Sequence[Comparison]) -> dict[str, float]:
    """``WORKLOAD.CONFIGURATION.FIGURE`` (mean), with ``.ci95`` its interval's half width and, of
    ``COMPARED``, ``.against`` the relative difference to the reference and ``.against_ci95``."""
    figures: dict[str, float] = {}
    for comparison in found:
        for (configuration, name), values in sorted(comparison._values.items()):
            key = f"{comparison.workload}.{configuration}.{name}"
            _add(figures, key, "ci95", estimate(values.values()))
            if name in COMPARED and (against := comparison.against(configuration, name)):
                figures[f"{key}.against"] = against.mean
                if math.isfinite(against.half):
                    figures[f"{key}.against_ci95"] = against.half
    return figures


def _add(figures: dict[str, float], key: str, suffix: str, found: Estimate) -> None:
    figures[key] = found.mean
    if math.isfinite(found.half):
        figures[f"{key}.{suffix}"] = found.half


def rows_of(outcomes: Sequence[Outcome]) -> list[dict[str, float | str]]:
    """One per replay."""
    return [
        {
            "workload": outcome.workload,
            "configuration": outcome.configuration,
            "seed": outcome.seed,
            "real_s": outcome.real_s,
            **outcome.figures,
        }
        for outcome in outcomes
    ]


# --- for people -----------------------------------------------------------------


def show(console: Console, comparison: Comparison) -> None:
    """All panels of one workload."""
    console.print(_title(comparison), style="bold", highlight=False)
    for panel in PANELS:
        table = _table(comparison, panel)
        if table is not None:
            console.print(table)
    for line in _legend(comparison):
        console.print(line, style="dim", highlight=False)


def show_summary(console: Console, found: Sequence[Comparison]) -> None:
    """All workloads side by side: how long runs took, and against the reference."""
    table = Table(
        title="\nall workloads: mean completion time of runs without their pauses, s",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
    )
    table.add_column("configuration", no_wrap=True)
    measure = SERVING[0]
    for comparison in found:
        table.add_column(comparison.workload, justify="right", no_wrap=True)
        table.add_column("against\nreference", justify="right", no_wrap=True)
    best = [comparison.best(measure) for comparison in found]
    for name in found[0].configurations:
        cells = [Text(name)]
        for comparison, of_workload in zip(found, best, strict=True):
            mean = comparison.mean(name, measure.name)
            cells.append(_cell(mean, measure, name in of_workload))
            cells.append(_against_cell(comparison, name, measure))
        table.add_row(*cells)
    console.print(table)


def _title(comparison: Comparison) -> str:
    numbers = {
        name: comparison._mean(comparison.configurations[0], name)
        for name in ("runs", "calls", "gpus")
    }
    seeds = "1 seed" if comparison.seeds == 1 else f"{comparison.seeds} seeds"
    return (
        f"\n{comparison.workload}: {numbers['runs']:,.0f} runs, {numbers['calls']:,.0f} calls, "
        f"{numbers['gpus']:.0f} GPUs, {seeds}"
    )


def _table(comparison: Comparison, panel: Panel) -> Table | None:
    """None if nothing of it was measured, or says anything."""
    measures = [measure for measure in panel.measures if _tells(comparison, measure)]
    if not measures or (panel.measures is SERVING and not _pauses(comparison)):
        return None
    table = Table(
        title=f"\n{panel.title}",
        title_justify="left",
        title_style="italic",
        box=box.SIMPLE_HEAD,
        show_edge=False,
    )
    names = comparison.configurations
    table.add_column("configuration", no_wrap=True, min_width=max(len(name) for name in names) + 2)
    against = panel.compared if len(names) > 1 else ""
    for measure in measures:
        table.add_column(_heading(measure), justify="right", no_wrap=True)
        if measure.name == against:
            table.add_column("against\nreference", justify="right", no_wrap=True)
    best = {measure.name: comparison.best(measure) for measure in measures}
    for name in names:
        cells = [_label(comparison, name)]
        for measure in measures:
            cells.append(
                _cell(comparison.mean(name, measure.name), measure, name in best[measure.name])
            )
            if measure.name == against:
                cells.append(_against_cell(comparison, name, measure))
        table.add_row(*cells)
    return table


def _tells(comparison: Comparison, measure: Measure) -> bool:
    """Measured, and not nothing everywhere where nothing is the usual. What nobody did is shown
    as such."""
    if measure.name in SHOWN:
        return True
    values = [
        value
        for name in comparison.configurations
        for value in comparison.values(name, measure.name).values()
    ]
    return bool(values) and (any(values) or not _may_be_hidden(measure))


def _may_be_hidden(measure: Measure) -> bool:
    return measure.name.startswith(("moved_bytes", "probe_bytes", "flips", "failed", "unfinished"))


def _pauses(comparison: Comparison) -> bool:
    return any(
        comparison.values(name, "serving_s_mean") != comparison.values(name, "completion_s_mean")
        for name in comparison.configurations
    )


def _heading(measure: Measure) -> str:
    return (
        f"{measure.label}\n{measure.unit}" if measure.unit not in ("", "s", "ms") else measure.label
    )


def _label(comparison: Comparison, name: str) -> Text:
    text = Text(name)
    if name in comparison.bounds:
        text.stylize("italic dim")
    if not comparison.serves_all(name):
        text.append(f" {PARTLY}", "red")
    return text


def _cell(found: Estimate | None, measure: Measure, best: bool) -> Text:
    if found is None:
        return Text("-", "dim")
    mean, half = found.mean * measure.factor, found.half * measure.factor
    text = Text(_number(mean, mean), "bold" if best else "")
    if math.isfinite(half) and any(digit in "123456789" for digit in _number(half, mean)):
        text.append(f" ±{_number(half, mean)}", "not bold dim")
    text.append(BEST if best else " ")
    return text


def _against_cell(comparison: Comparison, name: str, measure: Measure) -> Text:
    if name == comparison.reference:
        return Text("reference", "dim")
    found = comparison.against(name, measure.name)
    return Text("-", "dim") if found is None else _against(found, measure)


def _against(found: Estimate, measure: Measure) -> Text:
    """Green where it is better beyond chance, red where it is worse."""
    text = Text(f"{found.mean:+.1%}")
    if math.isfinite(found.half):
        text.append(f" ±{found.half:.1%}", "dim")
        if found.settled:
            gained = (found.mean < 0) == (measure.better == "lower")
            text.stylize("green" if gained else "red", 0, len(f"{found.mean:+.1%}"))
    return text


def _number(value: float, scale: float) -> str:
    """With three digits that mean something at ``scale``, and no more."""
    size = abs(scale)
    if size >= 100 or size == 0:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.3f}"


def _legend(comparison: Comparison) -> list[str]:
    lines = []
    if comparison.seeds == 1:
        lines.append("one seed: no intervals, and differences may be chance")
    else:
        lines.append(
            f"± is half a 95 % confidence interval over {comparison.seeds} seeds; {BEST} marks the "
            "best and what can't be told from it"
        )
    if len(comparison.configurations) > 1 and comparison.reference in comparison.configurations:
        lines.append(f"reference, compared with on the same seeds: {comparison.reference}")
    bounds = [name for name in comparison.configurations if name in comparison.bounds]
    if bounds:
        lines.append(f"bounds, not systems: {', '.join(bounds)}")
    if not all(comparison.serves_all(name) for name in comparison.configurations):
        lines.append(f"{PARTLY} did not serve all runs: its times are of those that it served")
    return lines

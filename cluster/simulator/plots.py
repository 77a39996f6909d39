"""What the outcomes of a simulation look like: curves of completion times, load over time, and
one run as a sequence of bars.

Draws into PNG files through Matplotlib's file-only canvas: no window, no global state.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from cluster.simulator.gantt import draw_run
from cluster.simulator.outcome import Outcome, Picture

WIDTH_IN = 11.0
DPI = 110
COLOURS = (
    *("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf"),
    *("#8c564b", "#e377c2", "#bcbd22", "#3b3b98", "#006d5b", "#a0522d"),
)
BOUND_COLOUR = "#888888"
ROLE_COLOURS = {"prefill": "#e08214", "decode": "#2b7a3d", "mixed": "#3b6fb6"}
BOUND_STYLES = (":", "--", "-.")


def write_plots(
    folder: Path, outcomes: Sequence[Outcome], reference: str, bounds: Collection[str] = ()
) -> list[Path]:
    """Draws everything there is into ``folder``, which is made, and returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for workload in dict.fromkeys(outcome.workload for outcome in outcomes):
        found = [outcome for outcome in outcomes if outcome.workload == workload]
        figures = {f"completion-{workload}": completion_curves(found, reference, bounds)}
        for outcome in found:
            if outcome.picture is None:
                continue
            title = f"{outcome.configuration} on {workload}, seed {outcome.seed}"
            name = f"{workload}-{outcome.configuration}"
            if outcome.picture.at_s:
                figures[f"load-{name}"] = load_over_time(outcome.picture, title)
            if outcome.picture.story:
                figures[f"run-{name}"] = run_bars(outcome.picture, title)
        for name, figure in figures.items():
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=DPI)
    return written


def completion_curves(
    outcomes: Sequence[Outcome], reference: str, bounds: Collection[str]
) -> Figure:
    """Which share of runs, of all seeds together, took at most so long; one curve each.

    With and without the runs' own pauses, where there are any.
    """
    paused = any(outcome.completions_s != outcome.servings_s for outcome in outcomes)
    figure = Figure(figsize=(WIDTH_IN, 5.2), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, 2 if paused else 1, squeeze=False, sharey=True)[0])
    names = list(dict.fromkeys(outcome.configuration for outcome in outcomes))
    styles = _styles(names, reference, bounds)
    for ax, without_pauses in zip(axes, (False, True), strict=False):
        for name in names:
            _curve(ax, [each for each in outcomes if each.configuration == name], without_pauses)
            ax.lines[-1].set(label=name, **styles[name])
        ax.set_title("without the runs' own pauses" if without_pauses else "completion time")
        ax.set_xlabel("seconds")
        if _is_wide(ax):
            ax.set_xscale("log")
        else:
            ax.set_xlim(left=0)
        ax.set_ylim(0, 1)
        ax.grid(alpha=0.3, which="both", linewidth=0.6)
    axes[0].set_ylabel("share of runs completed within")
    axes[0].yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    count = len({outcome.seed for outcome in outcomes})
    figure.suptitle(f"{outcomes[0].workload}, {count} seed{'s' if count > 1 else ''}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=9
    )
    return figure


def _styles(
    names: Sequence[str], reference: str, bounds: Collection[str]
) -> dict[str, dict[str, object]]:
    """The reference is black, bounds are grey, others have colours of their own."""
    styles: dict[str, dict[str, object]] = {}
    plain = [name for name in names if name != reference and name not in bounds]
    for number, name in enumerate(plain):
        turn = number // len(COLOURS)
        styles[name] = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": ("-", "--", ":")[turn % 3],
        }
    for number, name in enumerate(name for name in names if name in bounds):
        styles[name] = {
            "color": BOUND_COLOUR,
            "linestyle": BOUND_STYLES[number % len(BOUND_STYLES)],
        }
    styles[reference] = {"color": "black", "linewidth": 2.2}
    return styles


def _curve(ax: Axes, outcomes: Sequence[Outcome], without_pauses: bool) -> None:
    """One configuration's. Seeds count the same; runs that were not served never arrive."""
    points = []
    for outcome in outcomes:
        times_s = outcome.servings_s if without_pauses else outcome.completions_s
        share = outcome.figures.get("runs_served_share", 0.0) / len(outcomes)
        points += [(time_s, share / len(times_s)) for time_s in times_s]
    points.sort()
    xs, ys, share = [], [], 0.0
    for time_s, weight in points:
        share += weight
        xs.append(time_s)
        ys.append(min(1.0, share))
    ax.step(xs, ys, where="post", linewidth=1.6)


def _is_wide(ax: Axes) -> bool:
    """The slowest run takes so much longer than most that these could not be told apart."""
    every = sorted(time_s for line in ax.lines for time_s in line.get_xdata() if time_s > 0)
    return bool(every) and every[-1] > 10 * every[len(every) // 2]


def load_over_time(picture: Picture, title: str) -> Figure:
    """Requests that run and wait, KV in use, and how many workers have which role."""
    figure = Figure(figsize=(WIDTH_IN, 8.0), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True, height_ratios=(3, 2, 2, 1.4))
    roles = list(picture.roles)
    colours = [ROLE_COLOURS[role] for role in roles]
    loads = [picture.roles[role] for role in roles]
    xs = picture.at_s
    running, waiting, used, workers = axes
    running.stackplot(xs, [load.running for load in loads], colors=colours, alpha=0.8)
    running.set_ylabel("running\nrequests")
    waiting.stackplot(xs, [load.waiting for load in loads], colors=colours, alpha=0.8)
    waiting.set_ylabel("waiting\nin engines")
    for role, load in zip(roles, loads, strict=True):
        used.plot(xs, load.kv_used, color=ROLE_COLOURS[role], linewidth=1.4)
    highest = max((value for load in loads for value in load.kv_used), default=0.0)
    used.set_ylim(0, min(1.0, max(0.1, 1.1 * highest)))
    used.set_ylabel("KV in use,\nmean of workers")
    used.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    workers.stackplot(xs, [load.workers for load in loads], colors=colours, alpha=0.8, step="mid")
    workers.set_ylabel("workers\nby role")
    for ax in (running, waiting, workers):
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.set_ylim(bottom=0)
    for ax in axes:
        ax.grid(alpha=0.3, linewidth=0.6)
        ax.margins(x=0)
    figure.align_ylabels(axes)
    axes[-1].set_xlabel("seconds since the start")
    figure.suptitle(title)
    figure.legend(
        handles=[Patch(color=ROLE_COLOURS[role], label=role) for role in roles],
        loc="outside lower center",
        ncols=len(roles),
        fontsize=9,
    )
    return figure


def run_bars(picture: Picture, title: str) -> Figure:
    """One run: a bar for each of its calls, from when it was sent to its last token."""
    assert picture.run is not None
    rows = len(picture.story)
    figure = Figure(figsize=(WIDTH_IN, 1.9 + 0.22 * rows), layout="constrained")
    ax = figure.subplots()
    handles = draw_run(ax, picture.story)
    shown = "" if rows == picture.run.calls else f" (the first {rows} of {picture.run.calls} calls)"
    figure.suptitle(f"{picture.run.id}{shown}: {title}")
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    return figure

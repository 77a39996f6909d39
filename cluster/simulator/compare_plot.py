"""Real against simulated as curves, and call by call: what the table's few numbers hide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from cluster.simulator.measures import SERVED
from cluster.simulator.records import Result

WIDTH_IN, HEIGHT_IN, DPI = 13.0, 8.0, 110
REAL_COLOUR, SIMULATED_COLOUR = "#2b7a3d", "#d62728"
BAND = 0.2
"""What is within this share of the real value lies in the band."""
MS = 1e3

Values = dict[tuple[int, int], float]
"""By run and call; -1 for a whole run."""


class Panel(NamedTuple):
    """One thing that is compared, above as distributions, below one by one."""

    title: str
    unit: str
    of: Callable[[Result], Values]


def _ttfts(result: Result) -> Values:
    return {
        (call.run, call.call): MS * call.ttft_s for call in result.calls if call.outcome in SERVED
    }


def _itls(result: Result) -> Values:
    return {
        (call.run, call.call): MS * call.itl_s
        for call in result.calls
        if call.outcome in SERVED and call.output_tokens > 1
    }


def _completions(result: Result) -> Values:
    return {(run.run, -1): run.completion_s for run in result.runs if run.finished}


PANELS = (
    Panel("time to first token", "ms", _ttfts),
    Panel("mean time between tokens of a call", "ms", _itls),
    Panel("completion time of a run", "s", _completions),
)


def draw(path: Path, real: Sequence[Result], simulated: Sequence[Result], title: str) -> None:
    """A picture of all of it in a file. OSError if it can't be written."""
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    axes = figure.subplots(2, len(PANELS))
    for column, panel in enumerate(PANELS):
        real_values = [panel.of(result) for result in real]
        simulated_values = [panel.of(result) for result in simulated]
        _curves(axes[0][column], panel, real_values, simulated_values)
        _points(axes[1][column], panel, real_values, simulated_values)
    axes[0][0].set_ylabel("share not above")
    figure.suptitle(title)
    figure.savefig(path, dpi=DPI)


def _curves(ax: Axes, panel: Panel, real: Sequence[Values], simulated: Sequence[Values]) -> None:
    sides = [(real, REAL_COLOUR, "real"), (simulated, SIMULATED_COLOUR, "simulated")]
    for replays, colour, label in sides:
        for number, values in enumerate(replays):
            x = np.sort(list(values.values()))
            y = np.arange(1, len(x) + 1) / len(x)
            # Replays of a side are drawn one by one, and named once.
            ax.step(x, y, color=colour, alpha=0.7, label="" if number else label, where="post")
    ax.set_title(panel.title)
    ax.set_xlabel(panel.unit)
    if _is_wide(real):
        ax.set_xscale("log")
        _plain_ticks(ax.xaxis)
    ax.set_ylim(0, 1)
    ax.grid(alpha=0.3, which="both", linewidth=0.6)
    ax.legend(loc="lower right")


def _points(ax: Axes, panel: Panel, real: Sequence[Values], simulated: Sequence[Values]) -> None:
    """Each call's or run's means over the replays of a side, where both have it."""
    keys = sorted(set.intersection(*(set(values) for values in (*real, *simulated))))
    x = np.array([np.mean([values[key] for values in real]) for key in keys])
    y = np.array([np.mean([values[key] for values in simulated]) for key in keys])
    least = min(x.min(initial=np.inf), y.min(initial=np.inf)) * 0.9
    most = max(x.max(initial=0.0), y.max(initial=0.0)) * 1.1
    line = np.array([least, most])
    ax.fill_between(line, line * (1 - BAND), line * (1 + BAND), color="#888888", alpha=0.2)
    ax.plot(line, line, color="#888888", linewidth=0.8)
    low: list[float] = [np.min([values[key] for values in real]) for key in keys]
    high: list[float] = [np.max([values[key] for values in real]) for key in keys]
    ax.hlines(y, low, high, color=REAL_COLOUR, alpha=0.35, linewidth=1.0)
    ax.plot(x, y, ".", color=SIMULATED_COLOUR, markersize=5)
    if _is_wide(real):
        ax.set_xscale("log")
        ax.set_yscale("log")
        _plain_ticks(ax.xaxis)
        _plain_ticks(ax.yaxis)
    ax.set_xlabel(f"real, {panel.unit} (line: all replays)")
    ax.set_ylabel(f"simulated, {panel.unit}")
    ax.set_title(f"one by one; band: {BAND:.0%}", fontsize="small")
    ax.grid(alpha=0.3, which="both", linewidth=0.6)


def _plain_ticks(axis: Axis) -> None:
    """1, 2, 5, 10, ... as they are: powers of ten are few and far between here."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _is_wide(replays: Sequence[Values]) -> bool:
    """Whether values differ so much that only a logarithmic scale shows them."""
    values = [value for replay in replays for value in replay.values()]
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)

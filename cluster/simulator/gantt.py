"""One run as bars over time, a row per call, with long pauses cut out of the axis.

Agents pause for minutes between calls of seconds; on a true axis nothing could be seen. So
whenever no call of the run is open for long, the axis is folded there, and the fold says
how long the pause was.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from cluster.simulator.records import CallRecord

PHASES = {
    "waits for a plan": "#b8b8b8",
    "prefill": "#e08214",
    "transfer": "#7b5aa6",
    "decode": "#2b7a3d",
    "not served": "#c0392b",
}
FOLD_COLOUR = "#eeeeee"
FOLD_SHARE = 0.04
"""A fold's width, as a share of all busy time."""
FOLD_GAIN = 3.0
"""Pauses are folded from this many times that on."""
BAR_HEIGHT = 0.68


class Fold(NamedTuple):
    """A pause that takes ``width_s`` on the axis instead of ``end_s - begin_s``."""

    begin_s: float
    end_s: float
    width_s: float


class Axis:
    """Seconds since the run's start as places on the folded axis."""

    def __init__(self, start_s: float, folds: Sequence[Fold]) -> None:
        self.start_s = start_s
        self.folds = folds
        self._begins = [fold.begin_s for fold in folds]

    def place(self, at_s: float) -> float:
        """Where a moment is."""
        cut_s = 0.0
        for fold in self.folds[: bisect_right(self._begins, at_s)]:
            inside_s = min(at_s, fold.end_s) - fold.begin_s
            cut_s += inside_s - fold.width_s * inside_s / (fold.end_s - fold.begin_s)
        return at_s - self.start_s - cut_s


def folded(calls: Sequence[CallRecord]) -> Axis:
    """The axis of a run with these calls."""
    spans = sorted((call.due_s, max(call.due_s, call.ended_s)) for call in calls)
    busy_s, pauses, end_s = 0.0, [], spans[0][0]
    for begin_s, until_s in spans:
        if begin_s > end_s:
            pauses.append((end_s, begin_s))
        busy_s += max(0.0, until_s - max(begin_s, end_s))
        end_s = max(end_s, until_s)
    width_s = FOLD_SHARE * busy_s
    return Axis(
        spans[0][0],
        [
            Fold(begin_s, until_s, width_s)
            for begin_s, until_s in pauses
            if until_s - begin_s > FOLD_GAIN * width_s
        ],
    )


def phases(call: CallRecord) -> list[tuple[str, float, float]]:
    """What happened to a call, one after the other: name, begin and end.

    Where a prefill worker is used, its client has the first token before the KV moves. A call
    that was not served is shown as such from its last known moment on.
    """
    first_s = call.first_token_s
    served = call.outcome in ("stop", "length")
    last = "decode" if first_s else "not served"
    marks = [
        ("waits for a plan", call.planned_s),
        ("prefill", first_s),
        ("transfer", call.loaded_s),
        (last, call.ended_s),
    ]
    found, begin_s = [], call.due_s
    for name, end_s in marks:
        if end_s > begin_s:
            found.append((name if served or name != "decode" else "not served", begin_s, end_s))
            begin_s = end_s
    return found


def draw_run(ax: Axes, calls: Sequence[CallRecord]) -> list[Patch]:
    """Draws the calls, which must be some, and returns what the legend has to explain."""
    axis = folded(calls)
    names: set[str] = set()
    for row, call in enumerate(calls):
        for name, begin_s, end_s in phases(call):
            place = axis.place(begin_s)
            ax.barh(
                row, axis.place(end_s) - place, left=place, height=BAR_HEIGHT, color=PHASES[name]
            )
            names.add(name)
    _draw_folds(ax, axis)
    ax.set_yticks(range(len(calls)), [_label(call) for call in calls], fontsize=8)
    ax.set_ylim(len(calls) - 0.4, -0.6)
    ax.set_xlim(left=0)
    ax.margins(x=0.01)
    ax.grid(axis="x", alpha=0.3, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_xlabel("seconds of the run" + (", pauses folded" if axis.folds else ""))
    handles = [Patch(color=colour, label=name) for name, colour in PHASES.items() if name in names]
    if axis.folds:
        handles.append(Patch(color=FOLD_COLOUR, label="pause (seconds above)"))
    return handles


def _draw_folds(ax: Axes, axis: Axis) -> None:
    for fold in axis.folds:
        left = axis.place(fold.begin_s)
        ax.axvspan(left, left + fold.width_s, color=FOLD_COLOUR, zorder=0)
        ax.annotate(
            f"{fold.end_s - fold.begin_s:.0f}",
            (left + fold.width_s / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color="#555555",
        )


def _label(call: CallRecord) -> str:
    return f"{call.agent} {call.call}" if call.agent else f"call {call.call}"

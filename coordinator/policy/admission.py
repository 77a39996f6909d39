"""How many runs may be under way, so that those that are find room for their KV.

Too many runs at once make each other's calls wait for room, and their contexts push each other
out of caches, to be computed again. When that is seen, fewer may be under way from then on
(multiplicative decrease); while runs wait to begin and it is not seen, one more now and then
(additive increase; Chiu and Jain, 1989). A decrease counts from what is under way then,
and the next one waits until it has had its effect. Without such signs there is no bound.

Pure: told of what happens, asked whether one more may begin.
"""

from __future__ import annotations

from math import inf

KEPT_SHARE = 0.85
"""What a decrease leaves."""
GROWTH = 0.5
"""How many runs more for as many ends of calls as there are runs under way."""
HOLD_S = 5.0
"""Least time between two decreases."""
FORGET_S = 60.0
"""Nobody waits and nothing is wrong for so long: there is no bound any more."""
WASTE_WINDOW_S = 20.0
WASTE_SHARE = 0.05
"""Of the workers' time, spent on computing again what was forgotten, from which on it is too
much."""


class Gate:
    """The bound of one cluster."""

    def __init__(self) -> None:
        self.bound = inf
        """Runs that may be under way."""
        self.cuts = 0
        self._cut_s = -inf
        self._sign_s = -inf
        """When something was wrong, or somebody waited, for the last time."""
        self._waste_s = 0.0
        self._waste_from_s = -inf

    def opens(self, active: int, now_s: float) -> bool:
        """Whether one more run may begin beside so many; somebody waits to."""
        if self.bound == inf:
            return True
        if now_s - self._sign_s >= FORGET_S:
            self.bound = inf
            return True
        self._sign_s = now_s
        return active < self.bound

    def served(self, active: int) -> None:
        """A call has ended while runs wait to begin."""
        if self.bound - 1.0 <= active:
            self.bound += GROWTH / self.bound

    def crowded(self, active: int, least: int, now_s: float) -> None:
        """A call of a run that is under way waits for room, or one was preempted. ``least``: so
        many may be under way in any case."""
        self._sign_s = now_s
        if now_s - self._cut_s < HOLD_S or active > self.bound:
            return
        self.bound = max(float(least), KEPT_SHARE * active)
        self.cuts += 1
        self._cut_s = now_s

    def wasted(self, seconds: float, workers: int, active: int, least: int, now_s: float) -> None:
        """So many seconds of a worker went into computing what caches had forgotten."""
        if now_s - self._waste_from_s > WASTE_WINDOW_S:
            self._waste_s, self._waste_from_s = 0.0, now_s
        self._waste_s += seconds
        if self._waste_s > WASTE_SHARE * WASTE_WINDOW_S * workers:
            self._waste_s, self._waste_from_s = 0.0, now_s
            self.crowded(active, least, now_s)

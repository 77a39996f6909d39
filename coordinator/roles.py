"""Roles of workers while they are registered: who turns is decided by ``policy.ratio``.

A turn changes where new calls go and nothing else: what a worker has begun it ends. It is
soft state: a worker that registers anew has the role that it was started with, and a
``Ready`` that is only sent again changes nothing.
"""

from __future__ import annotations

from coordinator.limits import Ratio
from coordinator.pairs import Pairs
from coordinator.policy.ratio import Trend, look
from coordinator.standing import Standing
from coordinator.state import State

DEADLINE = ("roles",)


class Roles:
    """Looks at the load at an interval, as long as there are workers."""

    def __init__(self, state: State, pairs: Pairs, standing: Standing, ratio: Ratio) -> None:
        self._state = state
        self._pairs = pairs
        self._standing = standing
        self._ratio = ratio
        self._trend = Trend()

    def watch(self, now_s: float) -> None:
        """A worker registered or is gone."""
        if self._ratio.mode == "static":
            return
        if not self._state.workers:
            self._state.deadlines.drop(DEADLINE)
            self._trend = Trend()
        elif self._state.deadlines.get(DEADLINE) is None:
            self._state.deadlines.set(DEADLINE, now_s + self._ratio.interval_s)

    def due(self, now_s: float) -> None:
        """Look, and let a worker turn."""
        state = self._state
        state.deadlines.set(DEADLINE, now_s + self._ratio.interval_s)
        self._trend, turn = look(state.workers.values(), self._trend, self._ratio, now_s)
        if turn is None:
            return
        worker = state.workers[turn.worker]
        worker.turn(turn.role, now_s, turn.reason)
        self._standing.add(worker)
        state.counters["role_flips"] += 1
        state.room_changed = True
        self._pairs.turned(worker, now_s)

    def check(self) -> None:
        """Assert that somebody will look again iff there is something to see."""
        watching = self._ratio.mode == "reactive" and bool(self._state.workers)
        assert (self._state.deadlines.get(DEADLINE) is not None) == watching
        if self._ratio.mode == "static":
            assert all(
                worker.role == worker.ready.role or worker.turned_s > float("-inf")
                for worker in self._state.workers.values()
            )

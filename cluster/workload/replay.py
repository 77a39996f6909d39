"""When calls become due: the one driver of simulators and of live load generators.

Closed-loop within a run: a call is due ``think_s`` after the last of its parents ended, and
only the first calls of a run wait for the clock. Pure: knows no time but what it is told.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

from cluster.workload.form import Workload, call_count


class Due(NamedTuple):
    """A call, by its run's position in the workload and its index, and when to send it."""

    at_s: float
    run: int
    call: int


class Replay:
    """One replay of a workload.

    Whoever drives it sends what ``due`` returns and says ``ended`` for each of them. What
    ``ended`` returns will also come out of ``due``: it is there for those that keep a queue
    of events of their own and never ask ``due`` after the start.
    """

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._queue: list[Due] = []
        self._missing: dict[tuple[int, int], int] = {}
        self._children: dict[tuple[int, int], list[int]] = {}
        self._open_calls: dict[int, int] = {}
        self._next_run = 0
        self.began_s: dict[int, float] = {}
        """When runs began, by position: at their arrival, or in a closed loop when the one that
        they follow had ended."""
        self.calls_left = call_count(workload)
        arrive = workload.concurrency or len(workload.runs)
        while self._next_run < min(arrive, len(workload.runs)):
            run = workload.runs[self._next_run]
            self._begin_next(0.0 if workload.concurrency else run.arrival_s)

    @property
    def next_s(self) -> float | None:
        """When the next call is due; None if none is before another one has ended."""
        return self._queue[0].at_s if self._queue else None

    def due(self, now_s: float) -> list[Due]:
        """The calls to send now, the earliest first. Each is returned once."""
        found: list[Due] = []
        while self._queue and self._queue[0].at_s <= now_s:
            found.append(heapq.heappop(self._queue))
        return found

    def ended(self, run: int, call: int, now_s: float) -> list[Due]:
        """A call has ended: which calls are scheduled by that, and for when."""
        if run not in self._open_calls:
            return []
        self.calls_left -= 1
        self._open_calls[run] -= 1
        scheduled: list[Due] = []
        for child in self._children.pop((run, call), ()):
            self._missing[run, child] -= 1
            if not self._missing[run, child]:
                del self._missing[run, child]
                scheduled.append(self._schedule(run, child, now_s))
        if not self._open_calls[run]:
            scheduled += self._close(run, now_s)
        return scheduled

    def abandoned(self, run: int, now_s: float) -> list[Due]:
        """Give a run up, as a client does after an error: none of its other calls comes.

        Returns what is scheduled by that: in a closed loop another run's first calls.
        """
        if run not in self._open_calls:
            return []
        self.calls_left -= self._open_calls[run]
        for call in self._workload.runs[run].calls:
            self._missing.pop((run, call.index), None)
            self._children.pop((run, call.index), None)
        self._queue = [due for due in self._queue if due.run != run]
        heapq.heapify(self._queue)
        return self._close(run, now_s)

    def _close(self, run: int, now_s: float) -> list[Due]:
        del self._open_calls[run]
        if not self._workload.concurrency or self._next_run == len(self._workload.runs):
            return []
        return self._begin_next(now_s)

    def _begin_next(self, arrival_s: float) -> list[Due]:
        run, self._next_run = self._next_run, self._next_run + 1
        calls = self._workload.runs[run].calls
        self.began_s[run] = arrival_s
        self._open_calls[run] = len(calls)
        scheduled: list[Due] = []
        for call in calls:
            if not call.parents:
                scheduled.append(self._schedule(run, call.index, arrival_s))
                continue
            self._missing[run, call.index] = len(call.parents)
            for parent in call.parents:
                self._children.setdefault((run, parent), []).append(call.index)
        return scheduled

    def _schedule(self, run: int, call: int, after_s: float) -> Due:
        due = Due(after_s + self._workload.runs[run].calls[call].think_s, run, call)
        heapq.heappush(self._queue, due)
        return due

"""Virtual time: what happens when, in one heap.

Equal times come out in the order in which they were put in, so that a simulation is the same
whenever its seed is. Time stands still while something happens and never goes back.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

Event = list[Any]
"""``[at_s, sequence, action, arguments]``; to those outside an opaque thing to cancel. A list,
because the heap compares nothing faster that can be changed. A cancelled one has no action."""

SWEEP_EVENTS_MIN = 4096


class Events:
    """The clock and everything that is still to happen. Times in seconds."""

    __slots__ = ("_cancelled", "_heap", "_sequence", "_stopped", "happened", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self.happened = 0
        """Events so far."""
        self._heap: list[Event] = []
        self._sequence = 0
        self._cancelled = 0
        self._stopped = False

    def __len__(self) -> int:
        return len(self._heap) - self._cancelled

    def at(self, at_s: float, action: Callable[..., object], *arguments: object) -> Event:
        """Call ``action`` at a time; one that has passed is now."""
        self._sequence += 1
        event = [at_s if at_s > self.now_s else self.now_s, self._sequence, action, arguments]
        heapq.heappush(self._heap, event)
        return event

    def after(self, delay_s: float, action: Callable[..., object], *arguments: object) -> Event:
        """Call ``action`` so much later."""
        return self.at(self.now_s + delay_s, action, *arguments)

    def cancel(self, event: Event | None) -> None:
        """It shall not happen; nothing is changed if it has happened, or is None."""
        if event is None or event[2] is None:
            return
        event[2] = None
        event[3] = ()
        self._cancelled += 1
        if self._cancelled > SWEEP_EVENTS_MIN and 2 * self._cancelled > len(self._heap):
            # In place: ``run`` holds the same list.
            self._heap[:] = [live for live in self._heap if live[2] is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def run(self, until_s: float = float("inf")) -> bool:
        """Let everything happen up to a time, or until ``stop``. False if it was stopped.

        The clock stands at ``until_s`` afterwards if there was nothing left to stop at.
        """
        heap, pop = self._heap, heapq.heappop
        self._stopped = False
        while heap and heap[0][0] <= until_s:
            event = pop(heap)
            action = event[2]
            if action is None:
                self._cancelled -= 1
                continue
            self.now_s = event[0]
            event[2] = None
            self.happened += 1
            action(*event[3])
            if self._stopped:
                return False
        if until_s != float("inf"):
            self.now_s = max(self.now_s, until_s)
        return True

    def stop(self) -> None:
        """Make ``run`` return when what happens now is over."""
        self._stopped = True

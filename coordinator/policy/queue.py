"""Which call is served next, and when to tell a client to come back.

Order: calls that already had a plan and lost it, then by priority, then by arrival.
The order is strict: whoever cannot be placed holds up those behind it, so that a long
prompt is not starved by short ones. The bound is kept by whoever admits.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator

from coordinator.protocol import Finished
from coordinator.state import Call

COMPLETIONS_REMEMBERED = 64
RETRY_AFTER_MIN_S = 1.0
RETRY_AFTER_MAX_S = 60.0

Rank = tuple[bool, int, int]


def rank(call: Call) -> Rank:
    """Sort key of a waiting call; lower is earlier."""
    return call.plans == 0, call.submit.priority, call.arrival


class CallQueue:
    """Waiting calls in order. ``rank``: the sort key, unique and constant while a call waits."""

    def __init__(self, queue_s: float, rank: Callable[[Call], Rank] = rank) -> None:
        self.rank = rank
        self._queue_s = queue_s
        self._ranks: list[Rank] = []
        self._calls: dict[Rank, Call] = {}

    def __len__(self) -> int:
        return len(self._ranks)

    def __iter__(self) -> Iterator[Call]:
        return (self._calls[key] for key in self._ranks)

    def first(self, now_s: float) -> Call | None:
        """Who is next, None if nobody waits."""
        return self._calls[self._ranks[0]] if self._ranks else None

    def push(self, call: Call, now_s: float) -> None:
        """Let a call wait; it must not be waiting already."""
        key = self.rank(call)
        assert key not in self._calls, call.key
        insort(self._ranks, key)
        self._calls[key] = call

    def longest_s(self, call: Call) -> float:
        """How long a call that begins to wait may wait."""
        return self._queue_s

    def remove(self, call: Call) -> None:
        """Take a waiting call out."""
        key = self.rank(call)
        del self._calls[key]
        del self._ranks[bisect_left(self._ranks, key)]

    def at_door(self, call: Call) -> bool:
        """There is no door."""
        return False

    def blocked(self, call: Call, now_s: float) -> None:
        """Who is next finds no room: nothing follows from that."""

    def planned(self, call: Call, now_s: float) -> None:
        """A call has a plan: nothing follows from that, and nothing is known of its order."""

    def ended(self, call: Call, finished: Finished | None, now_s: float) -> None:
        """A call is over: nothing follows from that."""

    def wasted(self, call: Call, finished: Finished, now_s: float) -> None:
        """Some of a prompt was computed again: nothing follows from that."""

    def preempted(self, now_s: float) -> None:
        """An engine took room back: nothing follows from that."""

    def tick(self, now_s: float) -> None:
        """Time passed: nothing follows from that."""

    def check(self) -> None:
        """Assert that calls are in order; for tests."""
        assert self._ranks == sorted(self._calls)


class CompletionRate:
    """How fast calls have been ending, from the last few ends."""

    def __init__(self) -> None:
        self._ended_s: deque[float] = deque(maxlen=COMPLETIONS_REMEMBERED)

    def note(self, now_s: float) -> None:
        """A call ended that had been planned."""
        self._ended_s.append(now_s)

    def retry_after_s(self, waiting: int, now_s: float) -> float:
        """Seconds until ``waiting`` calls will have been served, within bounds.

        Without any completion to go by it is the upper bound.
        """
        if not self._ended_s:
            return RETRY_AFTER_MAX_S
        window_s = now_s - self._ended_s[0]
        estimate_s = waiting * window_s / len(self._ended_s)
        return min(RETRY_AFTER_MAX_S, max(RETRY_AFTER_MIN_S, estimate_s))

"""Waiting calls of several tenants: who has been served least goes first.

What a tenant was served, in predicted seconds of a worker over its weight, is counted up; a
tenant that comes back is lifted to where the one stands that was served last, so that nobody
saves up. That is start-time fair queueing (Goyal, Vin and Cheng 1996), with the counters of the
Virtual Token Counter (Sheng et al., OSDI 2024): of two tenants that both wait all the time, what
they have been served differs at most by one call of each. Within a tenant calls go by their rank.

Calls that ``wait at the door`` are in a line of their own, behind the tenant's others, and may be
left out. Everything is kept in order: a call costs the logarithm of those that wait, and moving
pointers. Tenants without waiting calls are kept only as far as they are ahead of the others, and
only so many.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator, Mapping

from coordinator.policy.order import Rank
from coordinator.state import Call

AHEAD_MOST = 4096
"""Tenants without waiting calls whose counters are kept."""

Head = tuple[bool, int, float, Rank, str]
"""A tenant's first call: had no plan, priority, what the tenant was served, rank, tenant."""


class _Line:
    """One tenant's calls of one kind, in order, and what stands for them among the others."""

    __slots__ = ("calls", "head", "ranks")

    def __init__(self) -> None:
        self.ranks: list[Rank] = []
        self.calls: dict[Rank, Call] = {}
        self.head: Head | None = None


class FairQueue:
    """All waiting calls. ``weights``: of tenants; 1 for all others."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._lines: tuple[dict[str, _Line], dict[str, _Line]] = ({}, {})
        self._heads: tuple[list[Head], list[Head]] = ([], [])
        """In order, one for each line: of calls that may go, and of those at the door."""
        self._served_s: OrderedDict[str, float] = OrderedDict()
        self._least_s = 0.0
        """Where the tenant stood that was served last."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Call]:
        """All calls as they would go if nothing was served meanwhile and the door was open."""
        for head in sorted(self._heads[0] + self._heads[1]):
            for lines in self._lines:
                line = lines.get(head[4])
                if line is not None and line.head == head:
                    yield from (line.calls[rank] for rank in line.ranks)

    @property
    def at_door(self) -> bool:
        """Whether anybody waits at the door."""
        return bool(self._heads[1])

    def push(self, tenant: str, rank: Rank, call: Call, door: bool) -> None:
        """A call waits; ranks are unique."""
        line = self._lines[door].get(tenant)
        if line is None:
            if tenant not in self._lines[not door]:
                self._lift(tenant)
            line = self._lines[door][tenant] = _Line()
        insort(line.ranks, rank)
        line.calls[rank] = call
        self._count += 1
        self._set_head(tenant, line, door)

    def remove(self, tenant: str, rank: Rank, door: bool) -> None:
        """A call does not wait any more."""
        line = self._lines[door][tenant]
        del line.calls[rank]
        del line.ranks[bisect_left(line.ranks, rank)]
        self._count -= 1
        self._set_head(tenant, line, door)
        if not line.ranks:
            del self._lines[door][tenant]

    def first(self, door: bool) -> Call | None:
        """Who is next, None if nobody is. ``door``: those at the door may go, too."""
        open_heads, door_heads = self._heads
        if not door or not door_heads:
            if not open_heads:
                return None
            head = open_heads[0]
            return self._lines[False][head[4]].calls[head[3]]
        heads = [(*self._heads[at][0], at) for at in (0, 1) if self._heads[at]]
        # Of one tenant those at the door come last.
        *_, rank, tenant, at = min(heads, key=lambda each: (*each[:3], each[5], each[3]))
        return self._lines[at][tenant].calls[rank]

    def serve(self, tenant: str, seconds: float) -> None:
        """A tenant is served so much more than was counted, or less."""
        served_s = self._served_s.get(tenant, self._least_s)
        if seconds > 0.0:
            self._least_s = max(self._least_s, min(served_s, self._floor_s(served_s)))
        self._served_s[tenant] = served_s + seconds / self._weights.get(tenant, 1.0)
        self._served_s.move_to_end(tenant)
        for door in (False, True):
            line = self._lines[door].get(tenant)
            if line is not None:
                self._set_head(tenant, line, door)
        self._forget()

    def served_s(self, tenant: str) -> float:
        """What a tenant was served, as far as it counts."""
        return max(self._least_s, self._served_s.get(tenant, 0.0))

    def _floor_s(self, own_s: float) -> float:
        """The least that any waiting tenant was served: nobody who comes back is below it."""
        waiting = [head[2] for heads in self._heads for head in heads[:1]]
        return min([own_s, *waiting])

    def _lift(self, tenant: str) -> None:
        self._served_s[tenant] = max(self._least_s, self._served_s.get(tenant, 0.0))

    def _forget(self) -> None:
        while len(self._served_s) > AHEAD_MOST:
            for tenant in self._served_s:
                if not any(tenant in lines for lines in self._lines):
                    del self._served_s[tenant]
                    break
            else:
                return

    def _set_head(self, tenant: str, line: _Line, door: bool) -> None:
        heads = self._heads[door]
        if line.head is not None:
            del heads[bisect_left(heads, line.head)]
            line.head = None
        if line.ranks:
            rank = line.ranks[0]
            line.head = (rank[0], rank[1], self._served_s[tenant], rank, tenant)
            insort(heads, line.head)

    def check(self) -> None:
        """Assert that all is in order; for tests."""
        count = 0
        for lines, heads in zip(self._lines, self._heads, strict=True):
            assert heads == sorted(heads)
            assert {head[4] for head in heads} == lines.keys()
            for tenant, line in lines.items():
                assert line.ranks, tenant
                assert line.ranks == sorted(line.calls)
                assert line.head is not None
                assert line.head[2:4] == (self._served_s[tenant], line.ranks[0])
                count += len(line.ranks)
        assert count == self._count

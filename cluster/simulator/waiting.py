"""The sequences that wait for a seat in a simulated engine: vLLM's request queues."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from cluster.simulator.sequence import Sequence

Key = tuple[int, int]


class Waiting:
    """By priority, then by arrival; without priorities that is first come, first served."""

    def __init__(self) -> None:
        self._heap: list[tuple[Key, Sequence]] = []
        self._members: dict[str, Sequence] = {}
        self._put_back = 0

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, sequence: Sequence) -> bool:
        return self._members.get(sequence.id) is sequence

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._members.values())

    @property
    def first(self) -> Sequence:
        """The next to be admitted; they are not none."""
        while True:
            _, sequence = self._heap[0]
            if self._members.get(sequence.id) is sequence:
                return sequence
            heappop(self._heap)

    def add(self, sequence: Sequence) -> None:
        """A request that has just come."""
        self._members[sequence.id] = sequence
        heappush(self._heap, (sequence.key, sequence))

    def put_back(self, sequence: Sequence, in_front: bool) -> None:
        """A sequence that was preempted: before all others, or where its key says."""
        if not in_front:
            self.add(sequence)
            return
        self._put_back += 1
        self._members[sequence.id] = sequence
        heappush(self._heap, ((sequence.priority, -self._put_back), sequence))

    def sort(self) -> None:
        """Give those that were put in front the places that their keys say."""
        self._heap = [(sequence.key, sequence) for sequence in self]
        heapify(self._heap)

    def remove(self, sequence: Sequence) -> None:
        """Admitted or aborted."""
        del self._members[sequence.id]
        if self._heap[0][1] is sequence:
            heappop(self._heap)

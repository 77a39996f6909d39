"""When something is due next: one deadline per key, in a heap.

A key whose deadline moves leaves its old heap entry behind; such entries are skipped when
they surface and swept out when they outnumber the live ones, so that the heap stays
within twice the number of keys. Knows no clock: the time comes in as an argument.
"""

from __future__ import annotations

import heapq

Key = tuple[str, ...]
"""What is due: a kind, then names. Ties in time are broken by it."""

SWEEP_ENTRIES_MIN = 256


class Deadlines:
    """One deadline in seconds per key."""

    def __init__(self) -> None:
        self._due_s: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []

    def __len__(self) -> int:
        return len(self._due_s)

    def entries(self) -> int:
        """Heap entries, those left behind included."""
        return len(self._heap)

    def set(self, key: Key, due_s: float) -> None:
        """Give ``key`` this deadline in place of the one that it had."""
        if self._due_s.get(key) == due_s:
            return
        self._due_s[key] = due_s
        heapq.heappush(self._heap, (due_s, key))
        if len(self._heap) > SWEEP_ENTRIES_MIN + 2 * len(self._due_s):
            self._heap = [(at_s, live) for live, at_s in self._due_s.items()]
            heapq.heapify(self._heap)

    def drop(self, key: Key) -> None:
        """Forget ``key``; nothing happens if it has no deadline."""
        self._due_s.pop(key, None)

    def get(self, key: Key) -> float | None:
        """The deadline of ``key``, None if it has none."""
        return self._due_s.get(key)

    def next_s(self) -> float | None:
        """The earliest deadline, None if there is none."""
        while self._heap:
            due_s, key = self._heap[0]
            if self._due_s.get(key) == due_s:
                return due_s
            heapq.heappop(self._heap)
        return None

    def pop(self, now_s: float) -> Key | None:
        """Take out the earliest key that is due at ``now_s``, None if none is."""
        due_s = self.next_s()
        if due_s is None or due_s > now_s:
            return None
        _, key = heapq.heappop(self._heap)
        del self._due_s[key]
        return key

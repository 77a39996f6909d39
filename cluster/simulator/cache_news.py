"""What a simulated worker says of its engine's prefix cache, as ``cluster.kv_listener`` does.

Sequences are told of when they have ended, with what they generated, one look later than
that: as long as a live worker takes to see that a chain does not grow any more. What is
evicted is not told; the core's index forgets what has not been used for longest, which is
about the same.
"""

from __future__ import annotations

from collections import deque

from coordinator.protocol import KV_CHAINS_MAX, KvChanges

CHAINS_REMEMBERED = 256
"""For a core that has lost count."""


class CacheNews:
    """Of one incarnation of a worker."""

    def __init__(self, worker: str, incarnation: str) -> None:
        self._worker, self._incarnation = worker, incarnation
        self._sequence = 0
        self._settling: list[bytes] = []
        """They ended since the last look."""
        self._known: deque[bytes] = deque(maxlen=CHAINS_REMEMBERED)
        self._told = False

    def begin(self) -> None:
        """A core has taken the worker in, or has lost count: it is told all that is known."""
        self._told = False

    def look(self, ended: list[bytes]) -> list[KvChanges]:
        """What is to be said now. ``ended``: what has been cached since the last look."""
        ready, self._settling = self._settling, ended
        reset, self._told = not self._told, True
        stored = [*self._known, *ready] if reset else ready
        self._known.extend(ready)
        if not stored and not reset:
            return []
        parts = [stored[at : at + KV_CHAINS_MAX] for at in range(0, len(stored), KV_CHAINS_MAX)]
        changes: list[KvChanges] = []
        for part in parts or [[]]:
            sequence, self._sequence = self._sequence, self._sequence + 1
            first = reset and not changes
            changes.append(KvChanges(self._worker, self._incarnation, sequence, part, reset=first))
        return changes

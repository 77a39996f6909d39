"""What a simulated worker says of its engine's prefix cache, as ``cluster.kv_listener`` does.

Sequences are told of when they have ended, with what they generated, one look later than
that: as long as a live worker takes to see that a chain does not grow any more. What was
evicted is told at the next look.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from coordinator.protocol import BLOCK_HASH_BYTES, KV_CHAINS_MAX, KvChanges, KvRemoved

CHAINS_REMEMBERED = 256
"""For a core that has lost count."""

CachedOf = Callable[[bytes], int]


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

    def look(
        self,
        ended: list[bytes],
        evicted: list[bytes],
        cached_of: CachedOf,
        host_evicted: Sequence[bytes] = (),
        hosted_of: CachedOf = lambda chain: 0,
    ) -> list[KvChanges]:
        """What is to be said now. ``ended``: what has been cached since the last look;
        ``evicted``: chains of which something was lost; ``cached_of``: how many of a chain's
        blocks are cached now. The last two: the same of the host."""
        ready, self._settling = self._settling, ended
        reset, self._told = not self._told, True
        self._known.extend(ready)
        ready = list(self._known) if reset else ready
        stored, removed = _told(ready, () if reset else evicted, cached_of)
        host_stored, host_removed = _told(ready, () if reset else host_evicted, hosted_of)
        most = max(len(stored), len(removed), len(host_stored), len(host_removed))
        parts = max(-(-most // KV_CHAINS_MAX), int(reset))
        changes: list[KvChanges] = []
        for part in range(parts):
            some = slice(part * KV_CHAINS_MAX, (part + 1) * KV_CHAINS_MAX)
            sequence, self._sequence = self._sequence, self._sequence + 1
            said = self._worker, self._incarnation, sequence, stored[some], removed[some]
            hosted = host_stored[some], host_removed[some]
            changes.append(KvChanges(*said, reset and not part, *hosted))
        return changes


def _told(
    ready: Sequence[bytes], evicted: Sequence[bytes], cached_of: CachedOf
) -> tuple[list[bytes], list[KvRemoved]]:
    """What is there of the first, and is not of the second."""
    stored: list[bytes] = []
    for chain in ready:
        if kept := cached_of(chain):
            stored.append(chain[: kept * BLOCK_HASH_BYTES])
    removed: list[KvRemoved] = []
    for chain in evicted:
        if (kept := cached_of(chain)) * BLOCK_HASH_BYTES < len(chain):
            removed.append(KvRemoved(chain, kept))
    return stored, removed

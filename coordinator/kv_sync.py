"""The index of blocks kept true by what engines say of their prefix caches (``KvChanges``).

What calls leave behind is known at once, and approximately; what engines say comes later, and is
exact: what they have evicted, and what they have generated. A worker's messages are numbered. When
one is missing it is asked to say all anew, and until it does the index stays as it is.

What engines keep in their hosts' memory has an index of its own, which only they feed.
"""

from __future__ import annotations

from coordinator.kv_index import KvIndex
from coordinator.protocol import BLOCK_HASH_BYTES, KvChanges, KvResync
from coordinator.state import State, Worker


class KvSync:
    """What has been heard of every worker's cache."""

    def __init__(self, state: State, index: KvIndex, hosts: KvIndex) -> None:
        self._state = state
        self._index = index
        self._hosts = hosts
        self._expected: dict[str, int] = {}
        """The number of the next message; not there before the first reset."""
        self._asked_s: dict[str, float] = {}

    def add(self, worker: Worker) -> None:
        """A worker is there, and nothing is known of its cache."""
        self._index.add(worker.name, worker.facts.kv_blocks)
        if worker.facts.kv_host_blocks > 0:
            self._hosts.add(worker.name, worker.facts.kv_host_blocks)

    def forget(self, worker: Worker) -> None:
        """A worker is gone."""
        self._clear(worker)
        self._expected.pop(worker.name, None)
        self._asked_s.pop(worker.name, None)

    def changed(self, worker: Worker, message: KvChanges, now_s: float) -> None:
        """What a worker says of its cache. Nonsense counts as not heard."""
        name = worker.name
        if message.reset and _well_formed(message):
            self._clear(worker)
            self.add(worker)
            self._expected[name] = message.sequence
        if message.sequence != self._expected.get(name) or not _well_formed(message):
            self._ask(worker, now_s)
            return
        self._expected[name] = message.sequence + 1
        for chain in message.stored:
            self._index.stored(name, chain)
        for gone in message.removed:
            self._index.removed(name, gone.chain, gone.kept_blocks)
        for chain in message.host_stored:
            self._hosts.stored(name, chain)
        worker.host_full |= bool(message.host_removed)
        for gone in message.host_removed:
            self._hosts.removed(name, gone.chain, gone.kept_blocks)
        self._state.counters["kv_changes"] += 1

    def check(self) -> None:
        """Assert that only workers that are registered are known."""
        assert self._expected.keys() | self._asked_s.keys() <= self._state.workers.keys()

    def _clear(self, worker: Worker) -> None:
        self._index.forget(worker.name)
        self._hosts.forget(worker.name)

    def _ask(self, worker: Worker, now_s: float) -> None:
        """Once a beat: the answer takes a while, and may be lost."""
        asked_s = self._asked_s.get(worker.name, float("-inf"))
        if now_s - asked_s >= self._state.limits.beat_s:
            self._asked_s[worker.name] = now_s
            self._state.counters["kv_resyncs"] += 1
            self._state.send(worker.peer, KvResync(worker.incarnation))


def _well_formed(message: KvChanges) -> bool:
    """Chains are of whole hashes, and no more is kept of one than there is."""
    stored = (*message.stored, *message.host_stored)
    if any(len(chain) % BLOCK_HASH_BYTES for chain in stored):
        return False
    return all(
        len(gone.chain) % BLOCK_HASH_BYTES == 0 and gone.kept_blocks >= 0
        for gone in (*message.removed, *message.host_removed)
    )

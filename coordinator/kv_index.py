"""Which worker holds which prompt blocks, as far as the core knows.

Blocks are named by 8-byte chained hashes, many of them in one ``bytes`` object: equal
hashes mean equal content and equal history. Every block maps to a bitmask of workers, so
that one pass over a prompt finds the longest prefix on all workers at once.

The index is approximate. It is fed by what calls leave behind and forgets the least
recently used blocks of a worker beyond its capacity; an exact feed may call the same
``stored`` and ``removed``. It decides nothing and is never trusted for correctness: an
engine that lacks a block computes it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from coordinator.protocol import BLOCK_HASH_BYTES

assert BLOCK_HASH_BYTES == 8, "hashes are read as 64-bit integers"


def _read(hashes: bytes) -> Sequence[int]:
    """The hashes as integers; ValueError if the length is not a multiple of 8."""
    if len(hashes) % BLOCK_HASH_BYTES:
        raise ValueError(f"{len(hashes)} bytes are no sequence of block hashes")
    return memoryview(hashes).cast("Q").tolist() if hashes else ()


class KvIndex:
    """Blocks per worker, bounded per worker, least recently used out first."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._blocks: dict[str, OrderedDict[int, None]] = {}
        self._capacity_blocks: dict[str, int] = {}
        self._bit: dict[str, int] = {}
        self._worker: list[str] = []
        self._free_bits: list[int] = []

    def add(self, worker: str, capacity_blocks: int) -> None:
        """Make ``worker`` known; at most ``capacity_blocks`` blocks are kept for it."""
        assert worker not in self._bit, worker
        if self._free_bits:
            position = self._free_bits.pop()
            self._worker[position] = worker
        else:
            position = len(self._worker)
            self._worker.append(worker)
        self._bit[worker] = 1 << position
        self._blocks[worker] = OrderedDict()
        self._capacity_blocks[worker] = capacity_blocks

    def stored(self, worker: str, hashes: bytes) -> None:
        """``worker`` holds these blocks now; unknown workers are ignored.

        The blocks are a chain and its end is marked as older than its beginning, as
        engines evict: without the beginning the end is of no use.
        """
        bit = self._bit.get(worker)
        if bit is None:
            return
        held, holders = self._blocks[worker], self._holders
        for block in reversed(_read(hashes)):
            if block in held:
                held.move_to_end(block)
            else:
                held[block] = None
                holders[block] = holders.get(block, 0) | bit
        excess = len(held) - self._capacity_blocks[worker]
        for _ in range(excess):
            block, _none = held.popitem(last=False)
            self._clear(block, bit)

    def removed(self, worker: str, hashes: bytes) -> None:
        """``worker`` does not hold these blocks; unknown ones are ignored."""
        bit = self._bit.get(worker)
        if bit is None:
            return
        held = self._blocks[worker]
        for block in _read(hashes):
            if block in held:
                del held[block]
                self._clear(block, bit)

    def forget(self, worker: str) -> None:
        """``worker`` is gone with everything that it held; unknown ones are ignored."""
        bit = self._bit.pop(worker, None)
        if bit is None:
            return
        for block in self._blocks.pop(worker):
            self._clear(block, bit)
        del self._capacity_blocks[worker]
        self._free_bits.append(bit.bit_length() - 1)

    def longest_prefix(self, hashes: bytes) -> dict[str, int]:
        """How many leading blocks each worker holds; workers with none are left out."""
        found: dict[str, int] = {}
        holders_of = self._holders.get
        alive = last = -1
        count = 0
        for block in _read(hashes):
            holders = holders_of(block, 0)
            if holders != last:
                last = holders
                if count:
                    self._note(found, alive & ~holders, count)
                alive &= holders
                if not alive:
                    return found
            count += 1
        if count:
            self._note(found, alive, count)
        return found

    def blocks(self, worker: str) -> int:
        """How many blocks the index believes ``worker`` to hold."""
        return len(self._blocks.get(worker, ()))

    def check(self) -> None:
        """Assert that both directions of the index agree and its bounds hold."""
        expected: dict[int, int] = {}
        for worker, held in self._blocks.items():
            assert len(held) <= self._capacity_blocks[worker], worker
            for block in held:
                expected[block] = expected.get(block, 0) | self._bit[worker]
        assert expected == self._holders, "block holders and worker blocks disagree"
        assert len(self._bit) + len(self._free_bits) == len(self._worker)

    def _note(self, found: dict[str, int], mask: int, count: int) -> None:
        while mask:
            lowest = mask & -mask
            found[self._worker[lowest.bit_length() - 1]] = count
            mask ^= lowest

    def _clear(self, block: int, bit: int) -> None:
        left = self._holders[block] & ~bit
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]

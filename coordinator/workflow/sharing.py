"""Which earlier prompt a prompt begins with, found from a few of its block hashes.

Block hashes are chained: equal hashes at a place mean equal prompts up to there. So it is
enough to remember hashes at some places, dense at both ends, and to search for the last one
that is equal. A long prompt is remembered in a few hundred bytes; what is found is exact if
all of the earlier prompt or its beginning up to such a place is shared, and low by less than
half of what lies behind otherwise.
"""

from __future__ import annotations

from array import array
from functools import lru_cache
from operator import itemgetter

from coordinator.protocol import BLOCK_HASH_BYTES


class Sketch:
    """Some block hashes of one prompt."""

    __slots__ = ("_hashes", "blocks")

    def __init__(self, prompt: memoryview) -> None:
        """``prompt``: its block hashes as ``hashes_of`` gives them."""
        self.blocks = len(prompt)
        self._hashes = array("Q", _picker(self.blocks)(prompt)) if self.blocks > 1 else array("Q")
        if self.blocks == 1:
            self._hashes.append(prompt[0])

    def shared_blocks(self, prompt: memoryview) -> int:
        """How many leading blocks of this prompt another one has as well, at least."""
        places = _places(self.blocks)
        low, high = 0, len(places)
        available = len(prompt)
        # The last place first: most prompts extend an earlier one.
        middle = high - 1
        while low < high:
            place = places[middle]
            if place < available and prompt[place] == self._hashes[middle]:
                low = middle + 1
            else:
                high = middle
            middle = (low + high) // 2
        return places[low - 1] + 1 if low else 0


def hashes_of(block_hashes: bytes) -> memoryview:
    """Block hashes as numbers. What is no whole hash at the end is ignored."""
    whole = len(block_hashes) - len(block_hashes) % BLOCK_HASH_BYTES
    return memoryview(block_hashes)[:whole].cast("Q")


@lru_cache(maxsize=1 << 12)
def _picker(blocks: int) -> itemgetter[tuple[int, ...]]:
    return itemgetter(*_places(blocks))


@lru_cache(maxsize=1 << 12)
def _places(blocks: int) -> tuple[int, ...]:
    """The blocks whose hashes are kept of a prompt of so many, from 0; two if it has two."""
    kept = {0, blocks - 1} if blocks else set()
    step = 1
    while step < blocks:
        kept.add(step - 1)
        kept.add(min(blocks, step + step // 2) - 1)
        kept.add(blocks - 1 - step)
        step *= 2
    return tuple(sorted(kept))

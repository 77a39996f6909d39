"""Which finished calls' KV is kept from eviction, and for how long.

An engine keeps what calls leave behind until it needs the room, what was used longest ago first.
A *pin* keeps a call's blocks beyond that. It is worth

    probability of another use * seconds to compute it again
    --------------------------------------------------------
       blocks that it holds * seconds until it is used

so that a worker's share of blocks for pins goes to what saves most for each block and second
(the density rule of knapsacks; GreedyDual-Size-Frequency, Cherkasova 1998, ranks web caches
alike). What a queued call needs comes before everything else. A pin lasts as long as nine in ten
further uses take to come, ``HOLD_MOST_S`` at most, and is renewed while it is worth it: so what a
core leaves behind that dies ends soon.

Pure: views and the time in, what is to be pinned out.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from coordinator.workflow.reuse import Reuse

PROBABLE_LEAST = 0.1
"""Below this a use is too improbable to keep anything for."""
SOON_S = 1.0
"""Nothing is worth more for being used sooner than this."""
STICKINESS = 1.25
"""By so much more what is pinned already counts, so that pins do not change places for nothing."""
HOLD_LEAST_S = 2.0
HOLD_MOST_S = 60.0
WANTED = float("inf")
"""What a queued call needs is worth."""


class Leftover(NamedTuple):
    """What an ended call has left on a worker. ``blocks``: of KV; ``recompute_s``: to have them
    again; ``wanted``: a call that is queued or computed begins with it; ``pinned``: already;
    ``age_s``: since it was used last."""

    name: str
    blocks: int
    recompute_s: float
    reuse: Reuse
    wanted: bool
    pinned: bool
    age_s: float


class Keep(NamedTuple):
    """A pin that is to be there. ``worth``: the least is given up first under pressure."""

    name: str
    hold_s: float
    worth: float


def kept(leftovers: Collection[Leftover], room_blocks: int) -> list[Keep]:
    """What is pinned of a worker's finished calls, the most valuable first, in so many blocks."""
    ranked = sorted(
        ((_worth(each), each) for each in leftovers), key=lambda pair: (-pair[0], pair[1].name)
    )
    chosen: list[Keep] = []
    for worth, each in ranked:
        if worth <= 0.0:
            break
        if each.blocks <= room_blocks:
            room_blocks -= each.blocks
            chosen.append(Keep(each.name, hold_s(each), worth))
    return chosen


def hold_s(leftover: Leftover) -> float:
    """How long a pin lasts, in seconds from now."""
    if leftover.wanted:
        return HOLD_MOST_S
    return min(HOLD_MOST_S, max(HOLD_LEAST_S, leftover.reuse.late_s))


def _worth(leftover: Leftover) -> float:
    if leftover.wanted:
        return WANTED
    reuse = leftover.reuse
    if reuse.probability < PROBABLE_LEAST or leftover.blocks <= 0:
        return 0.0
    seconds = max(SOON_S, reuse.expected_s)
    worth = reuse.probability * leftover.recompute_s / (leftover.blocks * seconds)
    return worth * STICKINESS if leftover.pinned else worth

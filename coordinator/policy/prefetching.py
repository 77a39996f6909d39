"""Whether a run's next call is known well enough, and with what of the run's it will begin.

Pure: predictions in, choices out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from coordinator.workflow.prediction import NextCall, Origin, Prediction

PROBABLE = 0.5
"""From which probability on what a next call needs is moved ahead of it."""
COPIES_MOST = 3
"""Calls of one fan-out that are looked at."""
WHOLE = 0.5
"""From which probability on all of the earlier prompt is moved, instead of its usual share."""


class Beginning(NamedTuple):
    """The earlier call with whose first ``blocks`` blocks a prompt is likely to begin."""

    origin: Origin
    blocks: int


def likely(prediction: Prediction) -> NextCall | None:
    """The next call if it is worth acting on."""
    if not prediction.known or not prediction.next:
        return None
    best = prediction.next[0]
    return best if best.probability >= PROBABLE else None


def copies(call: NextCall) -> int:
    """How many of it come at once."""
    return max(1, min(COPIES_MOST, round(call.calls)))


def beginning(call: NextCall, blocks_of: Mapping[Origin, int]) -> Beginning | None:
    """Of the earlier calls, of which ``blocks_of`` says how long they were, the one of which most
    blocks are expected to be kept; None if none are."""
    best, most = None, 0.0
    for kept in call.kept:
        blocks = blocks_of.get(kept.origin, 0)
        expected = kept.probability * kept.share * blocks
        if expected > most:
            share = 1.0 if kept.whole >= WHOLE else kept.share
            best, most = Beginning(kept.origin, int(share * blocks)), expected
    return best if best is not None and best.blocks > 0 else None

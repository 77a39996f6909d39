"""Which of the workers with room computes a prompt for another worker: one function per
``Placement.prefill_policy``.

``least_tokens``
    the fewest uncached tokens to compute, this prompt included: a queue's length and a cached
    prefix in one unit; among equals whoever holds more, for whom it is less work. What Dynamo's
    prefill router comes to as well, whose cost on a worker that decodes nothing is in
    proportion to these tokens.
``least_loaded``
    the fewest tokens to compute before this prompt came, whatever is cached.
``round_robin``
    one after the other by name.

Ties go to the smallest name. Pure functions of views; nothing is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from coordinator.policy.ask import Ask
from coordinator.view import WorkerView

PrefillChoice = Callable[[Ask, Sequence[WorkerView], Mapping[str, int], int], WorkerView]
"""Ask, workers (at least one), cached blocks by worker, block size."""


def least_tokens(
    ask: Ask, roomy: Sequence[WorkerView], held: Mapping[str, int], block_size: int
) -> WorkerView:
    """The shortest queue behind which this prompt's own part is done soonest."""
    useful_blocks = (ask.prompt_tokens - 1) // block_size
    best, best_rank = roomy[0], (float("inf"), 0, "")
    for worker in roomy:
        name = worker.name
        tokens = min(held[name], useful_blocks) * block_size if name in held else 0
        rank = worker.prefill_tokens - tokens, -tokens, name
        if rank < best_rank:
            best, best_rank = worker, rank
    return best


def least_loaded(
    ask: Ask, roomy: Sequence[WorkerView], held: Mapping[str, int], block_size: int
) -> WorkerView:
    """The shortest queue."""
    return min(roomy, key=lambda worker: (worker.prefill_tokens, worker.name))


def round_robin(
    ask: Ask, roomy: Sequence[WorkerView], held: Mapping[str, int], block_size: int
) -> WorkerView:
    """The next one in turn."""
    return sorted(roomy, key=lambda worker: worker.name)[ask.turn % len(roomy)]


PREFILL_CHOICES: Mapping[str, PrefillChoice] = {
    "least_tokens": least_tokens,
    "least_loaded": least_loaded,
    "round_robin": round_robin,
}

"""What a call asks of the cluster, as placement sees it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from coordinator.view import WorkerView


class Ask(msgspec.Struct, frozen=True, gc=False):
    """What a call needs. Sizes in tokens; ``avoid``: (worker, incarnation)."""

    prompt_tokens: int
    output_tokens: int
    aggregated: bool
    avoid: Collection[tuple[str, str]]
    sibling: str
    """Worker that a call of the same group went to, empty if there is none."""
    turn: int = 0
    """Number of the call, plus the plans it has had: consecutive for consecutive calls."""
    last: str = ""
    """Worker that decoded the session's call before this one; empty if unknown."""
    expected_tokens: float = 0.0
    """What it is expected to generate; 0 for ``output_tokens``."""


def cached_blocks_of(ask: Ask, held: Mapping[str, int], worker: WorkerView, block_size: int) -> int:
    """Blocks of the prompt that are of use on a worker: an engine computes at least the last
    token itself."""
    return min(held.get(worker.name, 0), (ask.prompt_tokens - 1) // block_size)

"""From whose cache the beginning of a prompt may be read.

Of all workers only the few that hold the most of it, and of those that hold as much the least
busy: what more of them could add is small, and each is looked at for every worker that may decode.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from coordinator.view import WorkerView

SOURCES_TRIED = 2
MESSAGES_S = 2e-3
"""To ask a peer for what it holds and to hear from it."""
STEPS_WAITED = 1.5
"""Half of the step that is under way, and the one that names what is cached."""


class Source(NamedTuple):
    """A peer that has ``blocks`` of a prompt cached. ``ready_s``: until it has named them;
    ``others_s``: what those pay that it decodes; ``rest_s``: to compute what it has not."""

    blocks: int
    name: str
    ready_s: float
    others_s: float
    rest_s: float


def most_cached(
    peers: Collection[WorkerView], held: Mapping[str, int], useful_blocks: int, now_s: float
) -> list[tuple[int, WorkerView]]:
    """The best few that hold anything that can be read now, the most first, ties by what they have
    to do and name."""
    found = []
    for worker in peers:
        blocks = held.get(worker.name, 0)
        if blocks and worker.up and worker.partial_reads and worker.readable_from_s <= now_s:
            blocks = -min(blocks, useful_blocks)
            found.append((blocks, worker.gauge.backlog_s, worker.name, worker))
    # Names differ: workers are never compared.
    found.sort()
    return [(-blocks, worker) for blocks, _, _, worker in found[:SOURCES_TRIED]]

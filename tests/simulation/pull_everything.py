"""Placement that pulls whatever anybody has cached, so that pulls are there to go wrong."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import msgspec

from coordinator.core import Core
from coordinator.limits import Limits, Placement
from coordinator.policy.ask import cached_blocks_of
from coordinator.policy.placement import Ask, Choice, Decision, place
from coordinator.policy.queue import Rank, rank
from coordinator.state import Call, Worker


class PullEverything:
    """Where Pythia would place a call, every other one with a prefill worker if there is any, and
    from anyone in turn who holds anything of its prompt, even less than whoever computes it. As a
    core takes it in place of its policy."""

    def __init__(self, limits: Limits, placement: Placement) -> None:
        always = msgspec.structs.replace(placement, disaggregated="always")
        self._limits, self._placements = limits, (placement, always)

    def place(
        self,
        call: Call,
        ask: Ask,
        workers: Collection[Worker],
        cached: Callable[[], Mapping[str, int]],
        now_s: float,
    ) -> Decision:
        """As ``placement.place``."""
        block_size = next((worker.facts.block_size for worker in workers), 1)
        placement, limits = self._placements[ask.turn % 2], self._limits
        decision = place(ask, workers, cached, limits, placement, block_size)
        if not isinstance(decision, Choice):
            return decision
        held = cached()
        by_name = {worker.name: worker for worker in workers}
        computes = by_name[decision.prefill or decision.decode]
        peers = sorted(
            name
            for name in computes.warm_sources
            if by_name[name].up and cached_blocks_of(ask, held, by_name[name], block_size)
        )
        if not peers:
            return msgspec.structs.replace(decision, pull="", pull_tokens=0, pulled_blocks=0)
        peer = by_name[peers[ask.turn % len(peers)]]
        blocks = cached_blocks_of(ask, held, peer, block_size)
        own_blocks = cached_blocks_of(ask, held, computes, block_size)
        return msgspec.structs.replace(
            decision,
            uncached_tokens=ask.prompt_tokens - max(own_blocks, blocks) * block_size,
            pull=peer.name,
            pull_tokens=blocks * block_size,
            pulled_blocks=max(0, blocks - own_blocks),
        )

    def rank(self, call: Call) -> Rank:
        """As ``queue.rank``."""
        return rank(call)


def pulling_core(limits: Limits, placement: Placement, core_id: str) -> Core:
    """A core that places calls so."""
    return Core(limits, placement, core_id, placer=PullEverything(limits, placement))

"""What a simulated engine keeps in its host's memory: vLLM's offloading, kept as runs of blocks.

What is computed, or read from elsewhere, is copied to the host beside the computing, which costs
nothing here; what was used longest ago goes first, a text's end before its beginning. What a
prompt needs and the cache lacks is loaded before the prompt is admitted, one load after the
other at the link's rate. (vLLM 0.32, ``kv_connector/v1/offloading`` and ``v1/kv_offload/cpu``.)

What differs from vLLM: a text is copied when its prompt is done and when it ends, not step by
step; and if any of it was loaded all of it counts as used, not only what was loaded or computed.
"""

from __future__ import annotations

from cluster.simulator.kv_cache import BlockPool, Holding


class HostMemory:
    """Of one engine: ``blocks`` blocks, each loaded in ``block_s``."""

    def __init__(self, blocks: int, block_s: float) -> None:
        self.pool = BlockPool(blocks)
        self.loaded_blocks = 0
        self._block_s = block_s
        self._free_s = 0.0
        """When the last load ends that has been asked for."""

    def store(self, chain: bytes) -> None:
        """A text's blocks are there, as many as there is room for, and are the newest."""
        holding = Holding(chain)
        blocks = min(holding.chain_blocks, self.pool.blocks)
        hits = self.pool.lookup(holding, blocks)
        self.pool.adopt(holding, hits)
        missing = blocks - hits.blocks
        self.pool.take(missing)
        holding.plain += missing
        self.pool.fill(holding, blocks)
        self.pool.release(holding)

    def held(self, holding: Holding, limit: int) -> int:
        """How many blocks of a text are there, of the first ``limit`` ones."""
        return self.pool.lookup(holding, limit).blocks

    def loaded_s(self, blocks: int, now_s: float) -> float:
        """When so many blocks, asked for now, will have come."""
        self.loaded_blocks += blocks
        self._free_s = max(self._free_s, now_s) + blocks * self._block_s
        return self._free_s

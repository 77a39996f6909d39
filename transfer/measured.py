"""What the engine measures of its reads, and from whom: vLLM's statistics with one list more.

vLLM notes time and size of every read that NIXL has finished, but not where it came from.
The lists travel with the scheduler's statistics to the process around the engine, which
rebuilds them by class for its log and metrics; the list that is added here is in step with
the others and no reader of them minds it.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

from transfer.pins import PINNED_BLOCKS
from transfer.sources import SOURCE_ENGINE


class ReadStats(NixlKVConnectorStats):  # type: ignore[misc]
    """``source``: the engine whose reads are recorded next."""

    source = ""

    def reset(self) -> None:
        """Begin anew."""
        super().reset()
        self.data[SOURCE_ENGINE] = []
        self.data[PINNED_BLOCKS] = []

    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return super().is_empty() and not self.data[PINNED_BLOCKS]

    def record_transfer(self, res: Any) -> None:
        """A read from ``source`` has finished; ``res`` is NIXL's account of it, if any."""
        super().record_transfer(res)
        if res is not None:
            self.data[SOURCE_ENGINE].append(self.source)

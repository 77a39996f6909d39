"""Who decides where calls go, if not the configured policy.

For whoever knows what no policy may see, as a simulation that replays a known workload does.
The live cluster has none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from coordinator.policy.placement import Ask, Decision
from coordinator.policy.queue import Rank
from coordinator.state import Call, Worker


class Placer(Protocol):
    """Decides in place of ``placement.place`` and of ``queue.rank``. It changes nothing that it
    is shown."""

    def place(
        self,
        call: Call,
        ask: Ask,
        workers: Collection[Worker],
        cached: Callable[[], Mapping[str, int]],
        now_s: float,
    ) -> Decision:
        """As ``placement.place``; for the call that is first in the queue."""

    def rank(self, call: Call) -> Rank:
        """As ``queue.rank``: unique, and the same while the call waits."""

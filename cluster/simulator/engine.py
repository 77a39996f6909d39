"""An engine that behaves like vLLM's, in virtual time.

Driven from outside: ``submit`` and the like, then ``advance`` whenever ``next_s`` has come.
"""

from __future__ import annotations

from cluster.simulator.engine_types import EngineRequest, Output
from cluster.simulator.records import Gaps
from cluster.simulator.setup import EngineOptions
from coordinator.cost import StepCost
from coordinator.protocol import Load


class Engine:
    """One engine with ``kv_blocks`` blocks. ``slow``: factor on its step times, 1 is as it is.

    ``gaps`` gets every time between two tokens of a sequence.
    """

    def __init__(self, cost: StepCost, options: EngineOptions, kv_blocks: int, gaps: Gaps) -> None:
        raise NotImplementedError

    slow: float
    preemptions: int

    @property
    def next_s(self) -> float | None:
        """When ``advance`` has something to do; None until something is submitted or pulled."""
        raise NotImplementedError

    def submit(self, request: EngineRequest, now_s: float) -> None:
        """Take a request in; it is looked at when the step under way is over."""

    def abort(self, request_id: str, now_s: float) -> None:
        """Forget a request, wherever it is; unknown ones are ignored."""

    def pulled(self, request_id: str, ok: bool, now_s: float) -> None:
        """KV that was asked for has arrived, or could not be read: then it is computed here."""

    def release(self, request_id: str, now_s: float) -> None:
        """Held blocks have been read, or nobody will read them; unknown ones are ignored."""

    def holds(self, request_id: str, now_s: float) -> bool:
        """Whether the blocks are still held under their lease."""
        raise NotImplementedError

    def advance(self, now_s: float) -> list[Output]:
        """Everything that is due by ``now_s``, in order of time."""
        raise NotImplementedError

    def generated(self, request_id: str, now_s: float) -> int:
        """Tokens that a request has by now; 0 for unknown ones."""
        raise NotImplementedError

    def load(self, now_s: float) -> Load:
        """What its beat would say."""
        raise NotImplementedError

    def check(self) -> None:
        """Assert that every block is free, held or used by whom the tables say."""

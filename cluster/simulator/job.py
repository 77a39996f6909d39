"""A request that a simulated worker's engine has, and who waits for it."""

from __future__ import annotations

from typing import Literal

from cluster.simulator.engine import Engine
from cluster.simulator.network import Connection
from coordinator.protocol import Placed

Kind = Literal["prefill", "decode", "probe", "probe_read"]


class Job:
    """Also the stream of its tokens to its API process (``frames.Stream``)."""

    __slots__ = (
        "cached_only",
        "cached_tokens",
        "chain",
        "connection",
        "engine",
        "engine_id",
        "frozen_s",
        "frozen_tokens",
        "kind",
        "moved_tokens",
        "output_tokens",
        "pending_tokens",
        "probe",
        "prompt_tokens",
        "source",
        "started_s",
    )

    def __init__(
        self,
        engine: Engine,
        kind: Kind,
        engine_id: str,
        prompt_tokens: int,
        now_s: float,
        connection: Connection | None = None,
        probe: int = 0,
    ) -> None:
        self.engine = engine
        self.kind: Kind = kind
        self.engine_id = engine_id
        self.prompt_tokens = self.pending_tokens = prompt_tokens
        self.output_tokens = 1
        self.chain = b""
        self.connection = connection
        self.probe = probe
        self.source: Placed | None = None
        self.started_s = now_s
        self.cached_tokens = self.moved_tokens = 0
        self.cached_only = False
        self.frozen_tokens: int | None = None
        """Tokens that could be sent, where no more can be."""
        self.frozen_s = 0.0

    def tokens(self, now_s: float) -> int:
        """How many tokens have been sent by now."""
        if self.frozen_tokens is not None:
            return self.frozen_tokens
        return self.engine.generated(self.engine_id, now_s)

    def until_s(self, now_s: float) -> float:
        """Since when no more can be sent."""
        return now_s if self.frozen_tokens is None else self.frozen_s

    def freeze(self, now_s: float) -> None:
        """No more can be sent, for now or for good."""
        if self.frozen_tokens is None:
            self.frozen_tokens, self.frozen_s = self.tokens(now_s), now_s

"""A request inside a simulated engine."""

from __future__ import annotations

from cluster.simulator.engine_types import EngineRequest
from cluster.simulator.kv_cache import Holding


class Sequence:
    """A request and how far it is. Mutable; ``Schedule`` and ``Engine`` change it.

    ``computed_tokens``: whose KV is there, of the prompt and of the output. While it decodes,
    both it and ``generated`` are told by ``Decodes`` instead, which counts steps.
    """

    __slots__ = (
        "cached",
        "cached_only",
        "computed_before_first",
        "computed_in_all",
        "computed_tokens",
        "generated",
        "hold",
        "holding",
        "id",
        "key",
        "last_token_s",
        "loading",
        "local_cached_tokens",
        "moved_tokens",
        "origin",
        "output_tokens",
        "place",
        "preemptions",
        "priority",
        "prompt_tokens",
        "pull_ok",
        "pull_tokens",
    )

    def __init__(self, request: EngineRequest, output_tokens: int, arrival: int) -> None:
        self.id = request.id
        self.prompt_tokens = request.prompt_tokens
        self.output_tokens = output_tokens
        self.priority = request.priority
        self.hold = request.hold
        self.cached = request.cached
        self.cached_only = request.cached_only
        self.pull_tokens = min(request.pull_tokens, request.prompt_tokens)
        """Still to be asked for: vLLM's connectors read a request's KV once."""
        self.loading = False
        """What it waits for comes from the host."""
        self.pull_ok: bool | None = None
        """Whether the KV has come that it waits for; None while it is on its way."""
        self.key = (request.priority, arrival)
        """The smallest comes first by priority."""
        self.holding = Holding(request.chain if request.cached else b"")
        self.computed_tokens = 0
        self.generated = 0
        self.origin = 0
        self.place = 0
        """Its place among those that run: the smallest first."""
        self.preemptions = 0
        self.last_token_s: float | None = None
        """When it had its latest token, if that was not at the end of the step before."""
        self.local_cached_tokens = 0
        self.moved_tokens = 0
        self.computed_in_all = 0
        """Tokens of its prefills, the ones after preemptions included."""
        self.computed_before_first = 0

    @property
    def known_tokens(self) -> int:
        """Prompt and output so far: what a prefill has to compute. Not while it decodes."""
        return self.prompt_tokens + self.generated

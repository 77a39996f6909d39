"""A call as a simulated API process has it."""

from __future__ import annotations

from typing import Literal

from cluster.simulator.events import Event
from cluster.simulator.frames import Stream
from cluster.simulator.records import CallRecord
from coordinator.protocol import Failed, Plan, PrefillDone, Submit

Phase = Literal["waiting", "pulling", "prefilling", "loading", "decoding"]

MOVES: dict[Phase, frozenset[Phase]] = {
    "waiting": frozenset({"pulling", "prefilling", "loading"}),
    "pulling": frozenset({"prefilling", "loading", "waiting"}),
    "prefilling": frozenset({"loading", "waiting"}),
    "loading": frozenset({"decoding", "waiting"}),
    "decoding": frozenset({"waiting"}),
}


RETRIES_MAX = 3
"""How often a client sends a call again that was refused."""


def request_id(run: int, call: int, retry: int) -> str:
    """What a call is named towards the cluster: positions in the workload, and which try."""
    return f"{run}.{call}.{retry}"


class Call:
    """One call from its client's request to its end.

    ``chain``: hashes of all full blocks of prompt and output; ``output_tokens``: what the
    model will say, which nobody but engines may know before it has been said; ``outcome``: how
    it ends when all is said.
    """

    __slots__ = (
        "attempt",
        "base_tokens",
        "chain",
        "failed",
        "last_token_s",
        "move_number",
        "moves",
        "outcome",
        "output_tokens",
        "overdue",
        "phase",
        "plan",
        "planned_by",
        "prefill_sent_s",
        "pull_bound",
        "pull_done",
        "pull_sent_s",
        "record",
        "repeat",
        "stream",
        "submit",
        "submitted_s",
        "submitted_tokens",
        "tokens",
        "waiting_s",
    )

    def __init__(
        self,
        submit: Submit,
        chain: bytes,
        output_tokens: int,
        outcome: str,
        record: CallRecord,
        now_s: float,
    ) -> None:
        self.submit = submit
        self.chain = chain
        self.output_tokens = output_tokens
        self.outcome = outcome
        self.record = record
        self.submitted_s = self.waiting_s = now_s
        self.phase: Phase = "waiting"
        self.attempt = 1
        self.plan: Plan | None = None
        self.planned_by = ""
        """The core that made ``plan``; another one does not know the attempt."""
        self.tokens = 0
        """What the client is known to have got; more may have come from ``stream``."""
        self.last_token_s = 0.0
        self.base_tokens = 0
        """What it had got when ``stream`` began."""
        self.submitted_tokens = 0
        self.stream: Stream | None = None
        self.prefill_sent_s = self.pull_sent_s = 0.0
        self.pull_done: PrefillDone | None = None
        self.pull_bound: Event | None = None
        """When a peer's answer is not waited for any more."""
        self.moves = self.move_number = 0
        """How often it was to be moved, and the number of the core's last order."""
        self.failed: Failed | None = None
        self.repeat: Event | None = None
        """When it asks again for the plan that it waits for."""
        self.overdue: Event | None = None
        """When it is given up, whatever the core says."""

    @property
    def request(self) -> str:
        """Unique within its API process."""
        return self.submit.request

    @property
    def prompt_tokens(self) -> int:
        """What there must be KV of before the next token: what the client has got included."""
        return self.submit.prompt_tokens + self.tokens

    def said(self, now_s: float) -> int:
        """What the client has got by now, of its stream too; the last token comes with the end."""
        if self.stream is None:
            return self.tokens
        return min(self.base_tokens + self.stream.tokens(now_s), self.output_tokens - 1)

    def move(self, phase: Phase) -> None:
        """The only writer of ``phase``."""
        assert phase in MOVES[self.phase], f"{self.request}: {self.phase} -> {phase}"
        self.phase = phase

"""One HTTP request and the calls made for it.

Found by the calls through a context variable, so that vLLM's serving code in between
needs to know nothing: the front fills in who speaks, the calls fill in what happened.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus

from coordinator.protocol import CallContext


@dataclass(slots=True)
class Failure:
    """Why the request was not served, as the client is to be told."""

    status: int
    message: str
    retry_after_s: float = 0.0

    @property
    def kind(self) -> str:
        """The ``type`` of OpenAI's error object."""
        return HTTPStatus(self.status).phrase


@dataclass(frozen=True, slots=True)
class Continuation:
    """A call went on on another worker behind the tokens that its client already had.

    ``sampling_restarted``: what is drawn from there on is not what the lost worker would
    have drawn, since the state of its random numbers is lost with it.
    """

    worker: str
    after_tokens: int
    sampling_restarted: bool

    def text(self, separator: str) -> str:
        """As clients read it."""
        restarted = f"{separator}sampling restarted" if self.sampling_restarted else ""
        return f"{self.worker} after {self.after_tokens} tokens{restarted}"


@dataclass(slots=True)
class CallRecord:
    """What is known of one call by now. ``continuations``: the list of its whole exchange."""

    request: str
    planned: bool = False
    prefill: str = ""
    decode: str = ""
    prompt_tokens: int = 0
    prefill_cached_tokens: int = 0
    local_cached_tokens: int = 0
    moved_tokens: int = 0
    moved: bool = False
    """``moved_tokens`` is known: the KV is where the answer is generated."""
    started: bool = False
    continuations: list[Continuation] = field(default_factory=list)
    pull: str = ""
    """From whose cache ``pulled_tokens`` came to whoever computed the rest of the prompt."""
    pulled_tokens: int = 0


@dataclass(slots=True)
class Exchange:
    """One HTTP request."""

    context: CallContext = field(default_factory=CallContext)
    request_id: str = ""
    calls: list[CallRecord] = field(default_factory=list)
    failure: Failure | None = None
    continuations: list[Continuation] = field(default_factory=list)
    """Of all its calls, as they came."""

    @property
    def decided(self) -> bool:
        """Whether it is known who serves every call, or that none will."""
        if self.failure is not None:
            return True
        return bool(self.calls) and all(call.started for call in self.calls)

    @property
    def moved_tokens(self) -> int:
        """Tokens whose KV was moved for its calls by now."""
        return sum(call.moved_tokens for call in self.calls)

    def headers(self) -> dict[str, str]:
        """Response headers that tell where the calls ran and what they found there."""
        if not any(call.decode for call in self.calls):
            return {}
        headers = {
            "X-Pythia-Prefill": ",".join(call.prefill or call.decode for call in self.calls),
            "X-Pythia-Decode": ",".join(call.decode for call in self.calls),
        }
        if all(call.started for call in self.calls):
            cached = sum(call.prefill_cached_tokens for call in self.calls)
            headers["X-Pythia-Cached-Tokens"] = str(cached)
        if all(call.moved for call in self.calls):
            headers["X-Pythia-Moved-Tokens"] = str(self.moved_tokens)
        if any(call.pulled_tokens for call in self.calls):
            headers["X-Pythia-Pulled-From"] = ",".join(call.pull for call in self.calls)
            pulled = sum(call.pulled_tokens for call in self.calls)
            headers["X-Pythia-Pulled-Tokens"] = str(pulled)
        if self.continuations:
            texts = [continuation.text("; ") for continuation in self.continuations]
            headers["X-Pythia-Continued"] = ", ".join(texts)
        return headers


current_exchange: ContextVar[Exchange | None] = ContextVar("current_exchange", default=None)

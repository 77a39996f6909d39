"""What travels between simulated processes beside the real protocol's structs.

On Pythia's wire the frames behind ``Prefill``, ``Decode`` and ``Deltas`` are vLLM's own; here
they are what a simulated engine needs to know and says. A handle is opaque to all but workers,
as there, and names its maker and whose KV it is.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from cluster.simulator.engine_types import FirstToken
from coordinator.protocol import (
    ApiToWorker,
    Decode,
    Deltas,
    Placed,
    Prefill,
    WorkerToApi,
    engine_request_id,
)


class Handle(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """KV of the first ``tokens`` tokens of a prompt, held until ``expires_s``."""

    worker: str
    incarnation: str
    request: str
    attempt: int
    tokens: int
    expires_s: float

    @property
    def engine_id(self) -> str:
        """What the holder's engine knows the KV by."""
        return engine_request_id(self.request, self.attempt)

    @property
    def holder(self) -> Placed:
        """Who holds it."""
        return Placed(self.worker, self.incarnation)


encode_handle = msgspec.msgpack.Encoder().encode
decode_handle = msgspec.msgpack.Decoder(Handle).decode


class Body(msgspec.Struct, frozen=True, gc=False):
    """The request behind ``Prefill`` and ``Decode``.

    ``chain``: hashes of all full blocks that prompt and output fill; ``prompt_tokens``: what
    has KV before the next token can be made, tokens that the client has got included;
    ``output_tokens``: what is still to be generated, which only the engine may look at.
    """

    chain: bytes
    prompt_tokens: int
    output_tokens: int
    priority: int = 0


class Work(msgspec.Struct, frozen=True, gc=False):
    """``Prefill`` or ``Decode`` and the frames behind it."""

    message: Prefill | Decode
    body: Body


class Stream(Protocol):
    """The tokens of an attempt, as they flow from its worker to its API process."""

    def tokens(self, now_s: float) -> int:
        """How many have come by now."""
        ...

    def until_s(self, now_s: float) -> float:
        """Since when no more can come; now if they still can."""
        ...


class Tokens(msgspec.Struct, frozen=True, gc=False):
    """``Deltas`` and the frames behind it: an attempt's first token, or its end.

    The tokens in between are had from ``stream`` when somebody needs to know their number.
    """

    message: Deltas
    engine_id: str
    stream: Stream
    first: FirstToken | None = None
    ended: bool = False


ToWorker = Work | ApiToWorker
ToApi = Tokens | WorkerToApi

"""A ``Wire`` that writes down what passes, and makers of the messages around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.metrics.stats import PrefillStats

from coordinator import protocol
from coordinator.api.exchange import Failure
from coordinator.protocol import Placed, engine_request_id

PREFILLER = Placed("prefill-0", "p0")
DECODER = Placed("decode-0", "d0")
OTHER_DECODER = Placed("decode-1", "d1")


class RecordingWire:
    """Keeps everything that is sent; ``reachable`` says which workers are connected.

    As the real one: a request that fails takes its siblings with it (``on_fail``).
    """

    def __init__(self) -> None:
        self.core: list[protocol.Message] = []
        self.workers: list[tuple[Placed, protocol.Message, Sequence[Any]]] = []
        self.delivered: list[EngineCoreOutput] = []
        self.failures: dict[str, Failure] = {}
        self.reachable: Callable[[Placed], bool] = lambda worker: True
        self.core_reachable = True
        self.on_fail: Callable[[str], None] = lambda request: None

    def to_core(self, message: protocol.Message) -> bool:
        if self.core_reachable:
            self.core.append(message)
        return self.core_reachable

    def to_worker(self, worker: Placed, message: protocol.Message, frames: Sequence[Any]) -> bool:
        if not self.reachable(worker):
            return False
        self.workers.append((worker, message, frames))
        return True

    def deliver(self, outputs: list[EngineCoreOutput], timestamp_s: float) -> None:
        self.delivered.extend(outputs)

    def fail(self, request: str, failure: Failure) -> None:
        assert request not in self.failures, f"{request} failed twice"
        self.failures[request] = failure
        self.on_fail(request)

    def encode(self, request: EngineCoreRequest) -> Sequence[Any]:
        return (request,)

    def take_core(self) -> list[protocol.Message]:
        """What was sent to the core since the last call."""
        taken, self.core = self.core, []
        return taken

    def take_workers(self) -> list[tuple[Placed, protocol.Message, Sequence[Any]]]:
        """What was sent to workers since the last call."""
        taken, self.workers = self.workers, []
        return taken

    def tokens(self, request: str) -> list[int]:
        """What the client of ``request`` has got."""
        outputs = [output for output in self.delivered if output.request_id == request]
        return [token for output in outputs for token in output.new_token_ids]


def engine_request(
    request: str = "r", prompt: Sequence[int] = (1, 2, 3, 4), **params: Any
) -> EngineCoreRequest:
    """A generation request as vLLM's input processor makes them."""
    return EngineCoreRequest(
        request_id=request,
        prompt_token_ids=list(prompt),
        mm_features=None,
        sampling_params=SamplingParams(**{"max_tokens": 10, **params}),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def output(
    request: str,
    attempt: int,
    tokens: Sequence[int],
    finish: FinishReason | None = None,
    stats: PrefillStats | None = None,
) -> EngineCoreOutput:
    """What a worker's engine says of an attempt after a step."""
    return EngineCoreOutput(
        request_id=engine_request_id(request, attempt),
        new_token_ids=list(tokens),
        finish_reason=finish,
        prefill_stats=stats,
    )


def plan(
    request: str = "r",
    attempt: int = 1,
    decode: Placed = DECODER,
    prefill: Placed | None = PREFILLER,
) -> protocol.Plan:
    """What the core decides."""
    return protocol.Plan(request, attempt, decode, prefill)


def prefill_done(
    request: str = "r",
    attempt: int = 1,
    worker: Placed = PREFILLER,
    lease_s: float = 30.0,
    held_at_unix_s: float = 1000.0,
    margin_s: float = 3.0,
    handle: bytes | None = None,
) -> protocol.PrefillDone:
    """A handle that names what it is for."""
    return protocol.PrefillDone(
        request,
        attempt,
        worker.incarnation,
        handle=f"{request}/{attempt}".encode() if handle is None else handle,
        prompt_tokens=4,
        cached_tokens=2,
        lease_s=lease_s,
        held_at_unix_s=held_at_unix_s,
        margin_s=margin_s,
    )

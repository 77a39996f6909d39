"""Errands of the core, carried out here: requests for calls that have not come yet.

The static prompt of a declared agent is sent to a worker as a request for one token that nobody
reads; its engine keeps the prompt's KV in its prefix cache. All I/O goes through ``Wire``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from coordinator import protocol
from coordinator.api.calls import Wire
from coordinator.protocol import Abort, Decode, ErrandDone, Placed, engine_request_id

LAST_PRIORITY = sys.maxsize >> 1
"""Behind every call's, where engines go by priority."""
OPEN_MOST = 64


class Prompts(Protocol):
    """What is known of static prompts."""

    @property
    def known(self) -> Mapping[tuple[str, str], Sequence[int]]:
        """Tokens by digest of the graph and agent."""


class Running(msgspec.Struct):
    """An errand that a worker has."""

    errand: int
    worker: Placed
    due_s: float
    tokens: int
    began_s: float
    cached_tokens: int = 0


class Errands:
    """Of one API process. ``prompts`` is set when they are known."""

    def __init__(self, api: str, wire: Wire) -> None:
        self.prompts: Prompts | None = None
        self._api = api
        self._wire = wire
        self._running: dict[str, Running] = {}
        """By the engine's name for the request."""

    def __len__(self) -> int:
        return len(self._running)

    def on_message(self, message: protocol.Errand | protocol.DropErrand, now_s: float) -> None:
        """What the core wants."""
        if isinstance(message, protocol.Errand):
            self._begin(message, now_s)
        else:
            self._drop(message)

    def _begin(self, message: protocol.Errand, now_s: float) -> None:
        """Begin one, or say that it can't be."""
        known = self.prompts.known if self.prompts is not None else {}
        tokens = known.get((message.graph_digest, message.agent))
        name = self._name(message.errand)
        engine_id = engine_request_id(name, 1)
        if not tokens or len(self._running) >= OPEN_MOST or engine_id in self._running:
            self._say(message.errand, "unknown")
            return
        request = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=list(tokens),
            mm_features=None,
            sampling_params=SamplingParams(
                max_tokens=1,
                temperature=0.0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            priority=LAST_PRIORITY,
        )
        header = Decode(name, 1, message.target.incarnation)
        if self._wire.to_worker(message.target, header, self._wire.encode(request)):
            due_s = now_s + message.budget_s
            running = Running(message.errand, message.target, due_s, len(tokens), now_s)
            self._running[engine_id] = running
        else:
            self._say(message.errand, "failed")

    def _drop(self, message: protocol.DropErrand) -> None:
        """The core wants it no more: a call needs the worker."""
        engine_id = engine_request_id(self._name(message.errand), 1)
        running = self._running.pop(engine_id, None)
        if running is not None:
            self._abort(running)

    def take(
        self, outputs: list[EngineCoreOutput], worker: Placed, now_s: float
    ) -> list[EngineCoreOutput]:
        """Outputs that are of no errand; the others end here."""
        if not self._running:
            return outputs
        others: list[EngineCoreOutput] = []
        for output in outputs:
            running = self._running.get(output.request_id)
            if running is None or running.worker != worker:
                others.append(output)
                continue
            if (stats := output.prefill_stats) is not None:
                running.cached_tokens = stats.num_cached_tokens
            if output.finish_reason is not None:
                del self._running[output.request_id]
                good = output.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
                computed = running.tokens - running.cached_tokens
                elapsed_s = now_s - running.began_s
                self._say(running.errand, "done" if good else "failed", computed, elapsed_s)
        return others

    def on_call_failed(self, failed: protocol.CallFailed) -> bool:
        """Whether it is an errand that a worker could not carry out."""
        engine_id = engine_request_id(failed.request, failed.attempt)
        running = self._running.pop(engine_id, None)
        if running is not None:
            self._say(running.errand, "failed")
        return running is not None

    def on_worker_gone(self, lost: Placed) -> None:
        """A worker, or the connection to it, is lost, and its errands with it."""
        for engine_id, running in list(self._running.items()):
            if running.worker == lost:
                del self._running[engine_id]
                self._say(running.errand, "failed")

    def tick(self, now_s: float) -> None:
        """End what takes too long; the core may be away."""
        for engine_id, running in list(self._running.items()):
            if now_s >= running.due_s:
                del self._running[engine_id]
                self._abort(running)
                self._say(running.errand, "failed")

    def _name(self, errand: int) -> str:
        return f"errand-{self._api}-{errand}"

    def _abort(self, running: Running) -> None:
        self._wire.to_worker(running.worker, Abort([(self._name(running.errand), 1)]), ())

    def _say(
        self, errand: int, outcome: protocol.ErrandOutcome, computed: int = 0, elapsed_s: float = 0
    ) -> None:
        self._wire.to_core(ErrandDone(self._api, errand, outcome, computed, elapsed_s))

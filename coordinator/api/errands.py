"""Errands of the core, carried out here: requests for calls that have not come yet.

The static prompt of a declared agent is sent to a worker as a request for one token that nobody
reads; its engine keeps the prompt's KV in its prefix cache. So is the beginning of a call's prompt
that one worker has cached and another one is to have, with a handle for what the first one holds::

    asking --PrefillDone--> running --one token--> (gone)

All I/O goes through ``Wire``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from coordinator import protocol
from coordinator.api.calls import Calls, Wire
from coordinator.api.pulling import pull_request, tokens_held
from coordinator.protocol import (
    Abort,
    Decode,
    Discard,
    ErrandDone,
    Placed,
    Prefill,
    PrefillDone,
    engine_request_id,
    pull_attempt,
)

LAST_PRIORITY = sys.maxsize >> 1
"""Behind every call's, where engines go by priority."""
OPEN_MOST = 64


class Prompts(Protocol):
    """What is known of static prompts."""

    @property
    def known(self) -> Mapping[tuple[str, str], Sequence[int]]:
        """Tokens by digest of the graph and agent."""


class Running(msgspec.Struct):
    """An errand that ``worker`` has. ``source``: who is to name first what it has cached of
    ``request``."""

    errand: int
    worker: Placed
    due_s: float
    tokens: int
    began_s: float
    cached_tokens: int = 0
    moved_tokens: int = 0
    source: Placed | None = None
    request: EngineCoreRequest | None = None


class Errands:
    """Of one API process, whose calls are ``calls``. ``prompts`` is set when they are known."""

    def __init__(self, api: str, wire: Wire, calls: Calls) -> None:
        self.prompts: Prompts | None = None
        self._api = api
        self._wire = wire
        self._calls = calls
        self._running: dict[str, Running] = {}
        """By the engine's name for the request."""

    def __len__(self) -> int:
        return len(self._running)

    def on_message(self, message: protocol.Errand | protocol.DropErrand, now_s: float) -> None:
        """What the core wants."""
        if isinstance(message, protocol.DropErrand):
            self._drop(message)
        elif message.kind == "prefetch":
            self._prefetch(message, now_s)
        else:
            self._warm(message, now_s)

    def _prefetch(self, message: protocol.Errand, now_s: float) -> None:
        """Ask who has it to hold it, or say that it can't be."""
        calls, name, source = self._calls, self._name(message.errand), message.source
        asked = calls.contexts.of(message.call)
        if asked is not None:
            asked = pull_request(asked, message.tokens, calls.block_size)
        if asked is None or source is None or not self._is_new(name):
            self._say(message.errand, "unknown")
            return
        request = msgspec.structs.replace(asked, request_id=name, priority=LAST_PRIORITY)
        header = Prefill(name, pull_attempt(1), source.incarnation, cached_only=True)
        if self._wire.to_worker(source, header, self._wire.encode(request)):
            self._running[engine_request_id(name, 1)] = Running(
                message.errand,
                message.target,
                now_s + message.budget_s,
                len(request.prompt_token_ids or ()),
                now_s,
                source=source,
                request=request,
            )
        else:
            self._say(message.errand, "failed")

    def on_prefill_done(self, done: PrefillDone, worker: Placed) -> bool:
        """Whether it is of an errand: what its source holds goes on to its target."""
        if not done.request.startswith(self._name("")):
            return False
        engine_id = engine_request_id(done.request, 1)
        running = self._running.get(engine_id)
        if running is None or running.source != worker or running.request is None:
            self._discard(done, worker)
            return True
        tokens = tokens_held(done, self._calls.block_size)
        request = pull_request(running.request, tokens, self._calls.block_size)
        running.source = None
        if request is None:
            self._fail(engine_id, running, done, worker)
            return True
        running.request, running.tokens = None, tokens + 1
        request = msgspec.structs.replace(request, sampling_params=_one_token())
        header = Decode(done.request, 1, running.worker.incarnation, done.handle)
        if not self._wire.to_worker(running.worker, header, self._wire.encode(request)):
            self._fail(engine_id, running, done, worker)
        return True

    def _fail(self, engine_id: str, running: Running, done: PrefillDone, holder: Placed) -> None:
        """Nothing of use is held, or it can't be read."""
        del self._running[engine_id]
        self._discard(done, holder)
        self._say(running.errand, "failed")

    def _discard(self, done: PrefillDone, holder: Placed) -> None:
        """Nobody will read it."""
        if done.handle:
            message = Discard(done.request, done.attempt, holder.incarnation, done.handle)
            self._wire.to_worker(holder, message, ())

    def _is_new(self, name: str) -> bool:
        return len(self._running) < OPEN_MOST and engine_request_id(name, 1) not in self._running

    def _warm(self, message: protocol.Errand, now_s: float) -> None:
        """Begin one, or say that it can't be."""
        known = self.prompts.known if self.prompts is not None else {}
        tokens = known.get((message.graph_digest, message.agent))
        name = self._name(message.errand)
        engine_id = engine_request_id(name, 1)
        if not tokens or not self._is_new(name):
            self._say(message.errand, "unknown")
            return
        request = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=list(tokens),
            mm_features=None,
            sampling_params=_one_token(),
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
                running.moved_tokens = stats.num_external_cached_tokens
            if output.finish_reason is not None:
                del self._running[output.request_id]
                good = output.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
                computed = running.tokens - running.cached_tokens
                elapsed_s = now_s - running.began_s
                outcome: protocol.ErrandOutcome = "done" if good else "failed"
                self._say(running.errand, outcome, computed, elapsed_s, running.moved_tokens)
        return others

    def on_call_failed(self, failed: protocol.CallFailed) -> bool:
        """Whether it is an errand that a worker could not carry out."""
        engine_id = engine_request_id(failed.request, abs(failed.attempt))
        running = self._running.pop(engine_id, None)
        if running is not None:
            self._say(running.errand, "failed")
        return running is not None

    def on_worker_gone(self, lost: Placed) -> None:
        """A worker, or the connection to it, is lost, and its errands with it."""
        for engine_id, running in list(self._running.items()):
            if lost in (running.worker, running.source):
                del self._running[engine_id]
                self._say(running.errand, "failed")

    def tick(self, now_s: float) -> None:
        """End what takes too long; the core may be away."""
        self._calls.contexts.expire(now_s)
        for engine_id, running in list(self._running.items()):
            if now_s >= running.due_s:
                del self._running[engine_id]
                self._abort(running)
                self._say(running.errand, "failed")

    def _name(self, errand: int | str) -> str:
        return f"errand-{self._api}-{errand}"

    def _abort(self, running: Running) -> None:
        name, worker, attempt = self._name(running.errand), running.worker, 1
        if running.source is not None:
            # Its answer may be on its way here: it is discarded then.
            worker, attempt = running.source, pull_attempt(1)
        self._wire.to_worker(worker, Abort([(name, attempt)]), ())

    def _say(
        self,
        errand: int,
        outcome: protocol.ErrandOutcome,
        computed: int = 0,
        elapsed_s: float = 0,
        moved: int = 0,
    ) -> None:
        self._wire.to_core(ErrandDone(self._api, errand, outcome, computed, elapsed_s, moved))


def _one_token() -> SamplingParams:
    """That nobody reads."""
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

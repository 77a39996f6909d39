"""The calls of an API process, from the request to the last token.

    waiting --Plan--> prefilling --PrefillDone--> loading --first token--> decoding --> (gone)
       |  |                ^                         ^                        |
       |  `--Plan with a peer to pull from--> pulling                         |
       |  `---------------Plan without a prefill worker--^                    |
       ^                                                                      |
       +------------- Failed: a worker was lost or could not -----------------+

``pulling`` ends with the handle for what the peer has cached, with less, with none, or after a
bound: the call goes on in any case, and whatever did not come is computed.

A call that is decoding may be moved meanwhile (``moving``); the next attempt's plan ends that.

Where it may, the prefill worker samples the first token; the client has it while its KV is
still on the way. The decode worker goes on behind it, as it would behind a lost worker's.

Carries plans out and tells the core what happened; it chooses nothing. All I/O goes
through ``Wire``, so that it runs the same over sockets and in tests. A call that was
given up leaves a tombstone for a while: the handle that may still arrive for it must
be handed back to its owner.

The core keeps the deadlines; those here are later and hold when there is no core.
"""

from __future__ import annotations

import logging
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec
from vllm.sampling_params import SamplingType
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from coordinator import protocol
from coordinator.api.contexts import Contexts
from coordinator.api.continuing import may_begin_elsewhere, needs_one_worker, resume_request
from coordinator.api.exchange import CallRecord, Continuation, Failure
from coordinator.api.moving import Moves, Moving
from coordinator.api.pulling import pull_request, tokens_held
from coordinator.blocks import hash_blocks, salt_of
from coordinator.limits import Limits
from coordinator.protocol import CallContext, Placed, pull_attempt, split_engine_request_id

logger = logging.getLogger("pythia.api")

RESUBMIT_S = 1.0
TOMBSTONES_MAX = 4096
TOMBSTONE_S = 300.0
CORE_AWAY_S = 30.0
"""How much longer than the core's own limits a call waits for the core's word."""
CLOCK_SKEW_S = 1.0
"""How far the wall clocks of two machines of a cluster may differ."""

Phase = Literal["waiting", "pulling", "prefilling", "loading", "decoding"]
MOVES: dict[Phase, frozenset[Phase]] = {
    "waiting": frozenset({"pulling", "prefilling", "loading"}),
    "pulling": frozenset({"prefilling", "loading", "waiting"}),
    "prefilling": frozenset({"loading", "waiting"}),
    "loading": frozenset({"decoding", "waiting"}),
    "decoding": frozenset({"waiting"}),
}


class Wire(Protocol):
    """What a call needs from the world."""

    def to_core(self, message: protocol.Message) -> bool:
        """Send to the core; False if that is impossible now."""
        ...

    def to_worker(self, worker: Placed, message: protocol.Message, frames: Sequence[Any]) -> bool:
        """Send to that incarnation of a worker; False if it is not connected."""
        ...

    def deliver(self, outputs: list[EngineCoreOutput], timestamp_s: float) -> None:
        """Give outputs, under the request's own id, to the waiting client."""
        ...

    def fail(self, request: str, failure: Failure) -> None:
        """End a request with an error."""
        ...

    def encode(self, request: EngineCoreRequest) -> Sequence[Any]:
        """The request as frames."""
        ...


@dataclass(slots=True)
class Call:
    """One engine-level request on its way."""

    engine_request: EngineCoreRequest
    frames: Sequence[Any]
    record: CallRecord
    submit: protocol.Submit
    submitted_s: float
    asked_s: float
    waiting_s: float
    """Since when it waits for a plan."""
    phase: Phase = "waiting"
    attempt: int = 1
    plan: protocol.Plan | None = None
    planned_by: str = ""
    """The core that made ``plan``; another one does not know the attempt."""
    tokens: array[int] = field(default_factory=lambda: array("I"))
    resumed_tokens: int = 0
    submitted_tokens: int = 0
    started_s: float = 0.0
    prefill_sent_s: float = 0.0
    prefill_done: protocol.PrefillDone | None = None
    pull_sent_s: float = 0.0
    pull_done: protocol.PrefillDone | None = None
    """What the peer holds for this attempt, as long as its handle was not refused."""
    begun_elsewhere: bool = False
    """The first token of this attempt came from its prefill worker."""
    failed: protocol.Failed | None = None
    moving: Moving = field(default_factory=Moving)

    def move(self, phase: Phase) -> None:
        """The only writer of ``phase``."""
        assert phase in MOVES[self.phase], f"{self.record.request}: {self.phase} -> {phase}"
        self.phase = phase


class Calls:
    """All calls of this API process. ``limits`` are the core's."""

    def __init__(self, api: str, wire: Wire, limits: Limits) -> None:
        self.api = api
        self.wire = wire
        self.limits = limits
        self.core = ""
        self.block_size = 0
        self.calls: dict[str, Call] = {}
        self.tombstones: OrderedDict[tuple[str, int], float] = OrderedDict()
        self.stale = 0
        self.moves = Moves(api, wire, limits, self.tombstones, self._discard, _held_s)
        self.contexts = Contexts()

    # --- from the client ---------------------------------------------------------

    def submit(
        self,
        request: EngineCoreRequest,
        record: CallRecord,
        context: CallContext,
        group: str,
        now_s: float,
    ) -> None:
        """Ask the core for a plan. The outcome arrives through the wire.

        Raises what encoding the request raises; then nothing was begun.
        """
        params = request.sampling_params
        tokens = request.prompt_token_ids or []
        assert params is not None
        record.prompt_tokens = len(tokens)
        submit = protocol.Submit(
            api=self.api,
            request=request.request_id,
            attempt=1,
            prompt_tokens=len(tokens),
            max_output_tokens=params.max_tokens or 1,
            block_hashes=self._hashes(request),
            aggregated=bool(group) or needs_one_worker(request),
            group=group,
            priority=request.priority,
            context=context,
        )
        frames = self.wire.encode(request)
        self.calls[request.request_id] = Call(
            request, frames, record, submit, now_s, asked_s=now_s, waiting_s=now_s
        )
        self.contexts.add(request, context, now_s)
        self.wire.to_core(submit)

    def end(self, requests: Iterable[str], outcome: str, now_s: float) -> None:
        """The client is gone, or its stop string came: end these calls everywhere."""
        for request in requests:
            call = self.calls.pop(request, None)
            if call is not None:
                self._abandon(call, now_s)
                self._finished(call, outcome, now_s)

    def tick(self, now_s: float) -> None:
        """Ask again for plans that have not come, end what waits in vain, forget tombstones."""
        for call in self._live():
            overdue = self._overdue(call, now_s)
            if overdue is not None:
                self._fail(call.submit.request, *overdue, 0.0, now_s)
            elif call.phase == "waiting" and now_s - call.asked_s >= RESUBMIT_S:
                call.asked_s = now_s
                self._ask(call)
            elif call.phase == "pulling" and now_s - call.pull_sent_s >= self.limits.pull_s:
                self._leave_pull(call, now_s)
        self.moves.tick(now_s)
        while self.tombstones:
            key, made_s = next(iter(self.tombstones.items()))
            if now_s - made_s < TOMBSTONE_S and len(self.tombstones) <= TOMBSTONES_MAX:
                break
            del self.tombstones[key]

    def _live(self) -> Iterator[Call]:
        """The calls one by one; whatever happens to one may end others."""
        for request in list(self.calls):
            if (call := self.calls.get(request)) is not None:
                yield call

    def _overdue(self, call: Call, now_s: float) -> tuple[int, str] | None:
        """Status and reason if the core should have ended the call long ago."""
        if now_s - call.submitted_s >= self.limits.call_s + CORE_AWAY_S:
            return 504, "the call is over its deadline"
        if call.phase == "waiting" and now_s - call.waiting_s >= self.limits.wait_s + CORE_AWAY_S:
            return 503, "the coordinator's core does not answer"
        return None

    # --- from the core -------------------------------------------------------------

    def on_welcome(self, core: str, block_size: int) -> None:
        """Taken in. A core that was restarted is asked anew for what is still waiting."""
        self.block_size = block_size or self.block_size
        restarted = bool(self.core) and core != self.core
        self.core = core
        if not restarted:
            return
        for call in self.calls.values():
            call.moving.restarted()
            if call.phase == "waiting" and call.failed is not None:
                call.attempt += 1
                call.failed = None

    def on_move(self, order: protocol.Move, now_s: float) -> None:
        """A running call is to go on elsewhere."""
        call = self.calls.get(order.request)
        if call is None:
            self.stale += 1
        else:
            self.moves.on_move(call, order, self.block_size, now_s)

    def on_plan(self, plan: protocol.Plan, now_s: float) -> None:
        """Carry out a plan; a second copy of one is ignored."""
        call = self.calls.get(plan.request)
        if call is None or plan.attempt < call.attempt + (call.failed is not None):
            self.stale += 1
            return
        if call.phase != "waiting":
            if plan.attempt == call.attempt:
                return
            # The core knows better than this call how its worker is.
            self._abandon(call, now_s)
            call.move("waiting")
            if call.tokens and not self._resume(call, now_s):
                return
        call.attempt = plan.attempt
        call.plan = plan
        call.planned_by = self.core
        call.prefill_done = None
        call.pull_done = None
        call.begun_elsewhere = False
        call.failed = None
        call.record.planned = True
        call.record.prefill = plan.prefill.worker if plan.prefill else ""
        call.record.decode = plan.decode.worker
        call.record.pull, call.record.pulled_tokens = "", 0
        if plan.pull_worker is None:
            self._compute(call, b"", now_s)
        else:
            self._pull(call, plan.pull_worker, plan.pull_tokens, now_s)

    def on_rejected(self, message: protocol.Rejected, now_s: float) -> None:
        """The core has no plan and will have none."""
        call = self.calls.get(message.request)
        if call is None or message.attempt < call.attempt or call.phase != "waiting":
            self.stale += 1
            return
        self._fail(message.request, message.status, message.reason, message.retry_after_s, now_s)

    def on_stop(self, message: protocol.Stop, now_s: float) -> None:
        """The core gave the call up."""
        call = self.calls.get(message.request)
        if call is None or message.attempt < call.attempt:
            self.stale += 1
            return
        if message.status == 503 and message.attempt > call.attempt and call.phase == "decoding":
            # The core had no room for another attempt at what it took for stuck. It is not.
            self.stale += 1
            return
        self._fail(message.request, message.status, message.reason, 0.0, now_s)

    def on_check(self, message: protocol.Check) -> None:
        """Tell the core where a call stands."""
        call = self.calls.get(message.request)
        phase: protocol.CheckedPhase = "gone"
        attempt = message.attempt
        if call is not None:
            attempt = call.attempt
            if call.phase == "waiting":
                self._ask(call)
                return
            phase = call.phase
        self.wire.to_core(protocol.Checked(self.api, message.request, attempt, phase))

    def on_worker_gone(self, lost: Placed, reason: str, now_s: float) -> None:
        """A worker is lost, or the connection to it: its calls are asked for again."""
        for call in self._live():
            plan = call.plan
            if plan is None or call.phase == "waiting":
                continue
            before = call.phase in ("pulling", "prefilling")
            busy = plan.prefill if before else plan.decode
            if lost in (busy, plan.decode):
                self._retry(call, lost.worker, f"{lost.worker} is lost: {reason}", now_s)
            elif call.phase == "pulling" and lost == plan.pull_worker:
                self._pulled(call, None, now_s, late=True)
            else:
                self.moves.on_worker_gone(call, lost, now_s)

    # --- from the workers ------------------------------------------------------------

    def on_prefill_done(
        self,
        done: protocol.PrefillDone,
        first: EngineCoreOutput | None,
        worker: Placed,
        now_s: float,
        unix_s: float,
    ) -> None:
        """Send the handle on to the decode worker at once, or hand it back.

        ``first``: the first token, if the prefill worker sampled it.
        """
        call = self.calls.get(done.request)
        if done.attempt < 0:
            if not self.moves.on_done(call, done, worker, now_s, unix_s):
                self._pull_done(call, done, worker, now_s, unix_s)
            return
        if call is None or call.attempt != done.attempt or call.phase != "prefilling":
            self._hand_back(done, worker)
            return
        plan = call.plan
        assert plan is not None
        if plan.prefill != worker:
            self.stale += 1
            return
        held_s = _held_s(done, call.prefill_sent_s, now_s, unix_s)
        if held_s > done.lease_s - done.margin_s:
            self._retry(call, worker.worker, f"the handle came after {held_s:.1f} s", now_s)
            self._hand_back(done, worker)
            return
        call.prefill_done = done
        call.record.prefill_cached_tokens = done.cached_tokens
        call.record.pulled_tokens = done.moved_tokens
        if first is not None and self._is_over_with(call, first, now_s):
            if done.handle:
                self._discard(done, worker)
            return
        if self._decode(call, done.handle, now_s):
            self.wire.to_core(protocol.Prefilled(self.api, done.request, call.attempt))
        else:
            self._discard(done, worker)

    def on_outputs(
        self, outputs: list[EngineCoreOutput], worker: Placed, timestamp_s: float, now_s: float
    ) -> None:
        """Tokens of one engine step: give each to its client under the client's own id."""
        accepted = []
        news: list[protocol.Message] = []
        for output in outputs:
            call = self._decoding(output.request_id, worker)
            if call is None:
                self.stale += 1
                continue
            output.request_id = call.submit.request
            if self._on_output(call, output, news, now_s):
                accepted.append(output)
        if accepted:
            self.wire.deliver(accepted, timestamp_s)
        # The client waits for its tokens, the core does not wait for the news.
        for message in news:
            self.wire.to_core(message)

    def on_call_failed(self, failed: protocol.CallFailed, worker: Placed, now_s: float) -> None:
        """A worker could not: ask for another plan, or tell the client if none can help."""
        call = self.calls.get(failed.request)
        if call is not None and self._waits_for_pull(call, failed.attempt, worker):
            logger.warning("%s: not pulled: %s", failed.request, failed.reason)
            self._pulled(call, None, now_s, late=True)
        elif self.moves.on_failed(call, failed, worker):
            pass
        elif call is None or call.attempt != failed.attempt or call.phase == "waiting":
            self.stale += 1
        elif failed.handle_refused and self._without_pull(call, worker, now_s):
            logger.warning("%s: %s, computed instead", failed.request, failed.reason)
        elif failed.retryable:
            self._retry(call, worker.worker, failed.reason, now_s)
        else:
            self._fail(failed.request, 500, failed.reason, 0.0, now_s)

    # --- steps -------------------------------------------------------------------------

    def _pull(self, call: Call, peer: Placed, tokens: int, now_s: float) -> None:
        """Ask a peer to hold what it has cached of the prompt."""
        call.move("pulling")
        call.pull_sent_s = now_s
        request = pull_request(call.engine_request, tokens, self.block_size)
        message = protocol.Prefill(
            call.submit.request,
            pull_attempt(call.attempt),
            peer.incarnation,
            cached_only=True,
        )
        if request is None or not self.wire.to_worker(peer, message, self.wire.encode(request)):
            self._pulled(call, None, now_s)

    def _waits_for_pull(self, call: Call, attempt: int, worker: Placed) -> bool:
        plan = call.plan
        current = call.phase == "pulling" and attempt == pull_attempt(call.attempt)
        return current and plan is not None and plan.pull_worker == worker

    def _pull_done(
        self,
        call: Call | None,
        done: protocol.PrefillDone,
        worker: Placed,
        now_s: float,
        unix_s: float,
    ) -> None:
        """A peer holds what it has cached."""
        if call is None or not self._waits_for_pull(call, done.attempt, worker):
            self._hand_back(done, worker)
            return
        late = _held_s(done, call.pull_sent_s, now_s, unix_s) > done.lease_s - done.margin_s
        if late or not tokens_held(done, self.block_size):
            self._discard(done, worker)
            self._pulled(call, None, now_s, missing=not late, late=late)
        else:
            self._pulled(call, done, now_s)

    def _leave_pull(self, call: Call, now_s: float) -> None:
        """The peer takes too long."""
        self._abort_pull(call, now_s)
        self._pulled(call, None, now_s, late=True)

    def _abort_pull(self, call: Call, now_s: float) -> None:
        assert call.plan is not None
        assert call.plan.pull_worker is not None
        side = call.submit.request, pull_attempt(call.attempt)
        self.wire.to_worker(call.plan.pull_worker, protocol.Abort([side]), ())
        self.tombstones[side] = now_s

    def _pulled(
        self,
        call: Call,
        done: protocol.PrefillDone | None,
        now_s: float,
        missing: bool = False,
        late: bool = False,
    ) -> None:
        """Go on, with what a peer holds or without."""
        plan = call.plan
        assert plan is not None
        assert plan.pull_worker is not None
        tokens = tokens_held(done, self.block_size) if done is not None else 0
        request, attempt = call.submit.request, call.attempt
        call.pull_done = done
        if done is not None:
            missing = tokens < done.prompt_tokens - 1
            call.record.pull = plan.pull_worker.worker
        sent = self._compute(call, done.handle if done is not None else b"", now_s)
        if sent:
            self.wire.to_core(protocol.Pulled(self.api, request, attempt, tokens, missing, late))
        elif done is not None:
            self._discard(done, plan.pull_worker)

    def _without_pull(self, call: Call, worker: Placed, now_s: float) -> bool:
        """Send once more what ``worker`` refused for the peer's handle, without it. False if
        that was another handle, or its answer to something else."""
        plan, done = call.plan, call.pull_done
        if plan is None or plan.pull_worker is None or done is None:
            return False
        asked = plan.prefill if call.phase == "prefilling" else plan.decode
        other = plan.prefill is not None and call.phase == "loading"
        if other or worker != asked or call.phase == "decoding":
            return False
        call.pull_done, call.record.pull = None, ""
        self._discard(done, plan.pull_worker)
        self._send(call, worker, b"", now_s)
        return True

    def _compute(self, call: Call, handle: bytes, now_s: float) -> bool:
        """Have the prompt computed where the plan says. False if it could not be asked for."""
        assert call.plan is not None
        if call.plan.prefill is None:
            return self._decode(call, handle, now_s)
        call.move("prefilling")
        call.prefill_sent_s = now_s
        return self._send(call, call.plan.prefill, handle, now_s)

    def _send(self, call: Call, worker: Placed, handle: bytes, now_s: float) -> bool:
        """Give a call to the worker that has it in its phase."""
        request, attempt = call.submit.request, call.attempt
        message: protocol.Message
        if call.phase == "prefilling":
            first_token = may_begin_elsewhere(call.engine_request)
            message = protocol.Prefill(request, attempt, worker.incarnation, first_token, handle)
        else:
            message = protocol.Decode(request, attempt, worker.incarnation, handle)
        if self.wire.to_worker(worker, message, call.frames):
            return True
        self._retry(call, worker.worker, f"{worker.worker} can't be reached", now_s)
        return False

    def _is_over_with(self, call: Call, output: EngineCoreOutput, now_s: float) -> bool:
        """Give the client the token that the prefill worker sampled. True if it is the last."""
        record = call.record
        stats = output.prefill_stats
        if stats is not None:
            stats.num_cached_tokens = min(record.prefill_cached_tokens, record.prompt_tokens)
        self._first_token(call, output, now_s)
        call.tokens.extend(output.new_token_ids)
        output.request_id = call.submit.request
        over = output.finish_reason is not None
        if over:
            assert call.plan is not None
            assert call.plan.prefill is not None
            record.decode, record.moved = call.plan.prefill.worker, True
            del self.calls[call.submit.request]
        self.wire.deliver([output], now_s)
        if over:
            self.wire.to_core(self._summary(call, str(output.finish_reason), now_s, undecoded=True))
            return True
        call.begun_elsewhere = True
        resumed = self._resume(call, now_s)
        assert resumed, f"{call.submit.request} began where it can't go on"
        return False

    def _first_token(self, call: Call, output: EngineCoreOutput, now_s: float) -> None:
        """Of an attempt; the client may have tokens of earlier ones."""
        record = call.record
        if not record.started:
            call.started_s = now_s
        else:
            if call.tokens:
                record.continuations.append(_continuation(call))
            output.prefill_stats = None
        record.started = True

    def _decode(self, call: Call, handle: bytes, now_s: float) -> bool:
        assert call.plan is not None
        call.move("loading")
        return self._send(call, call.plan.decode, handle, now_s)

    def _decoding(self, engine_id: str, worker: Placed) -> Call | None:
        """The call whose current attempt ``worker`` knows as ``engine_id``, if it decodes it."""
        try:
            request, attempt = split_engine_request_id(engine_id)
        except ValueError:
            return None
        call = self.calls.get(request)
        if call is None or call.plan is None or call.attempt != attempt:
            return None
        current = call.plan.decode == worker and call.phase in ("loading", "decoding")
        return call if current else None

    def _on_output(
        self,
        call: Call,
        output: EngineCoreOutput,
        news: list[protocol.Message],
        now_s: float,
    ) -> bool:
        """False if the client must not see this output: the call goes on elsewhere.

        ``news`` gets what the core is to be told.
        """
        reason = output.finish_reason
        if reason in (FinishReason.ABORT, FinishReason.ERROR):
            # Not by this client: its worker is stopping, or could not load or compute it.
            worker = call.plan.decode.worker if call.plan else ""
            self._retry(call, worker, f"{worker} ended it with {reason}", now_s)
            return False
        if call.phase == "loading":
            self._started(call, output, now_s)
            news.append(protocol.Started(self.api, call.submit.request, call.attempt))
        call.tokens.extend(output.new_token_ids)
        if reason is not None:
            self.moves.forget(call, now_s)
            del self.calls[call.submit.request]
            news.append(self._summary(call, str(reason), now_s))
        return True

    def _started(self, call: Call, output: EngineCoreOutput, now_s: float) -> None:
        call.move("decoding")
        record = call.record
        record.moved = True
        if (stats := output.prefill_stats) is not None:
            record.moved_tokens = stats.num_external_cached_tokens
            record.local_cached_tokens = stats.num_local_cached_tokens
            if call.pull_done is not None and call.prefill_done is None:
                record.pulled_tokens = stats.num_external_cached_tokens
            if call.prefill_done is None:
                record.prefill_cached_tokens = stats.num_cached_tokens
            # What the client reads as cached is what no engine computed for this call.
            output.prefill_stats.num_cached_tokens = min(
                record.prefill_cached_tokens, record.prompt_tokens
            )
        if call.begun_elsewhere:
            output.prefill_stats = None
        else:
            self._first_token(call, output, now_s)

    def _retry(self, call: Call, worker: str, reason: str, now_s: float) -> None:
        """Give this attempt up and ask for another plan."""
        logger.warning("%s attempt %d: %s", call.submit.request, call.attempt, reason)
        self._abandon(call, now_s)
        call.move("waiting")
        call.asked_s = call.waiting_s = now_s
        if call.tokens and not self._resume(call, now_s):
            return
        if call.planned_by == self.core:
            # Counted from what the core was told the prompt is.
            generated = len(call.tokens) - call.submitted_tokens
            call.failed = protocol.Failed(
                self.api, call.submit.request, call.attempt, worker, reason, generated
            )
        else:
            call.attempt += 1
        self._ask(call)

    def _ask(self, call: Call) -> None:
        """Ask the core, once more, for the plan that this call waits for."""
        if call.failed is not None:
            self.wire.to_core(call.failed)
            return
        call.submitted_tokens = len(call.tokens)
        self.wire.to_core(
            msgspec.structs.replace(
                call.submit,
                attempt=call.attempt,
                prompt_tokens=call.submit.prompt_tokens + len(call.tokens),
            )
        )

    def _resume(self, call: Call, now_s: float) -> bool:
        """Make the request go on behind the tokens the client has already got."""
        resumed = resume_request(call.engine_request, call.tokens[call.resumed_tokens :])
        if resumed is None:
            reason = "the worker was lost and this request can't be continued on another"
            self._fail(call.submit.request, 503, reason, 0.0, now_s)
            return False
        call.engine_request = resumed
        call.resumed_tokens = len(call.tokens)
        call.frames = self.wire.encode(resumed)
        return True

    def _abandon(self, call: Call, now_s: float) -> None:
        """Stop an attempt on its workers, whatever it is doing there."""
        plan = call.plan
        if plan is None or call.phase == "waiting":
            return
        if call.phase == "pulling":
            self._abort_pull(call, now_s)
            return
        self.moves.forget(call, now_s)
        abort = protocol.Abort([(call.submit.request, call.attempt)])
        if call.phase == "prefilling" and plan.prefill is not None:
            self.wire.to_worker(plan.prefill, abort, ())
            # The prefill may be done already, its handle on the way here.
            self.tombstones[(call.submit.request, call.attempt)] = now_s
        else:
            self.wire.to_worker(plan.decode, abort, ())

    def _hand_back(self, done: protocol.PrefillDone, holder: Placed) -> None:
        """A handle that came too late. One without a tombstone has been sent on before, and
        where all was said with the first token there is none."""
        self.stale += 1
        abandoned = self.tombstones.pop((done.request, done.attempt), None) is not None
        if abandoned and done.handle:
            self._discard(done, holder)

    def _discard(self, done: protocol.PrefillDone, holder: Placed) -> None:
        """Nobody will read this KV: its holder may free the blocks."""
        message = protocol.Discard(done.request, done.attempt, holder.incarnation, done.handle)
        if not self.wire.to_worker(holder, message, ()):
            logger.info("%s keeps %s until its lease ends", holder.worker, done.request)

    def _fail(
        self, request: str, status: int, reason: str, retry_after_s: float, now_s: float
    ) -> None:
        call = self.calls.pop(request, None)
        if call is None:
            self.stale += 1
            return
        self._abandon(call, now_s)
        self._finished(call, "error", now_s)
        self.wire.fail(request, Failure(status, reason, retry_after_s))

    def _finished(self, call: Call, outcome: str, now_s: float) -> None:
        self.wire.to_core(self._summary(call, outcome, now_s))

    def _summary(
        self, call: Call, outcome: str, now_s: float, undecoded: bool = False
    ) -> protocol.Finished:
        record = call.record
        self.contexts.ended(call.submit.request, call.submit.context)
        return protocol.Finished(
            self.api,
            call.submit.request,
            call.attempt,
            outcome,
            output_tokens=len(call.tokens),
            prefill_cached_tokens=record.prefill_cached_tokens,
            local_cached_tokens=record.local_cached_tokens,
            moved_tokens=record.moved_tokens,
            ttft_s=call.started_s - call.submitted_s if record.started else 0.0,
            elapsed_s=now_s - call.submitted_s,
            undecoded=undecoded,
            pulled_tokens=record.pulled_tokens,
        )

    def _hashes(self, request: EngineCoreRequest) -> bytes:
        if not self.block_size or not request.prompt_token_ids:
            return b""
        if request.sampling_params and request.sampling_params.skip_reading_prefix_cache:
            # Its engine will find nothing, whatever is cached.
            return b""
        lora = request.lora_request.lora_name if request.lora_request else ""
        images = "".join(feature.identifier for feature in request.mm_features or ())
        salt = salt_of(request.cache_salt or "", lora, images)
        return hash_blocks(request.prompt_token_ids, self.block_size, salt)


def _held_s(done: protocol.PrefillDone, sent_s: float, now_s: float, unix_s: float) -> float:
    """How long the blocks have been held at most: two clocks bound it, the smaller bound counts."""
    return min(now_s - sent_s, unix_s - done.held_at_unix_s + CLOCK_SKEW_S)


def _continuation(call: Call) -> Continuation:
    """What the client is told of a call whose first token on another worker is there."""
    assert call.resumed_tokens == len(call.tokens), call.submit.request
    assert call.engine_request.sampling_params is not None
    # A seed too begins anew: an engine draws from its own generator per request, whose state
    # nobody can ask for or set.
    restarted = call.engine_request.sampling_params.sampling_type != SamplingType.GREEDY
    return Continuation(call.record.decode, call.resumed_tokens, restarted)

"""A simulated API process: what ``coordinator.api`` does, in virtual time.

``coordinator.api.calls`` is built on vLLM's own requests and outputs; here is the same conduct
without them. It carries plans out and tells the core what happened, and chooses nothing.
The first token of a call whose prompt is computed elsewhere is that worker's: the client gets
it before any KV is moved, and the decode worker generates what follows it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Protocol

import msgspec

from cluster.simulator.call import Call
from cluster.simulator.control import Control
from cluster.simulator.errands import Errands
from cluster.simulator.events import Events
from cluster.simulator.frames import Body, ToApi, Tokens, Work
from cluster.simulator.moving import Moves
from cluster.simulator.network import Connection, Network
from cluster.simulator.oracle import Oracle
from cluster.simulator.records import CallRecord
from coordinator.limits import Limits
from coordinator.protocol import (
    Abort,
    ApiBeat,
    CallContext,
    CallFailed,
    Check,
    Checked,
    CheckedPhase,
    Decode,
    Discard,
    DropErrand,
    Errand,
    Failed,
    Finished,
    Hello,
    Message,
    Move,
    Placed,
    Plan,
    Prefill,
    PrefillDone,
    Prefilled,
    Pulled,
    Rejected,
    Started,
    Stop,
    Submit,
    Welcome,
    WorkerGone,
    WorkerUp,
    pull_attempt,
    split_engine_request_id,
)

RESUBMIT_S = 1.0
TOMBSTONES_MAX = 4096
TOMBSTONE_S = 300.0
CORE_AWAY_S = 30.0
CLOCK_SKEW_S = 1.0
"""These five are ``coordinator.api.calls``'s."""
NO_ANSWER = 0
"""``CallRecord.status`` of a call whose API process is gone."""


class Client(Protocol):
    """Whoever sent the calls."""

    def resumed(self, gap_s: float) -> None:
        """Some call's tokens go on, from another worker, ``gap_s`` after the last one."""
        ...

    def ended(self, record: CallRecord, retry_after_s: float) -> None:
        """A call ended as its record says."""
        ...


class Api:
    """One API process. ``limits`` are the core's."""

    def __init__(
        self,
        name: str,
        events: Events,
        network: Network,
        limits: Limits,
        client: Client,
        oracle: Oracle,
        reliable: bool = False,
    ) -> None:
        """``reliable``: no message is ever lost. Asking again would change nothing then, and
        in a long queue be most of all that is said: it is not done."""
        self.name = name
        self.calls: dict[str, Call] = {}
        self.tombstones: OrderedDict[tuple[str, int], float] = OrderedDict()
        self.core = ""
        self.stale = 0
        self.welcomed_s = 0.0
        """When a core, another or the same, last took it in."""
        self.overdue = 0
        """Calls that it gave up by itself, the core having said nothing."""
        self._events = events
        self._network = network
        self._limits = limits
        self._client = client
        self._oracle = oracle
        self._repeat_s = limits.wait_s + CORE_AWAY_S if reliable else RESUBMIT_S
        self._connections: dict[Placed, Connection] = {}
        self._control = Control(
            events,
            network,
            name,
            hello=lambda: Hello(name),
            beat=lambda: ApiBeat(name, len(self.calls)),
            on_message=self._on_core,
        )
        self._block_size = 0
        self._moves = Moves(
            name,
            events,
            limits,
            self._repeat_s,
            self._send,
            self._control.send,
            self._bury,
            self._discard,
            self._held_s,
        )
        self._errands = Errands(name, self._control.send, self._send)

    def crash(self) -> None:
        """It is gone, and with it its calls: their clients' connections break, and workers learn
        of it from theirs."""
        self._network.detach(self.name)
        self._network.deafen(self.name)
        self._control.stop()
        self._network.close_all(self.name)
        for call in list(self.calls.values()):
            self._catch_up(call)
            call.record.status = NO_ANSWER
            self._forget(call, "error")
            self._client.ended(call.record, 0.0)

    def start(self, after_s: float) -> None:
        """Ask the core to be taken in."""
        self._network.attach(self.name, self._control.receive)
        self._network.listen(self.name, self._on_worker, self._on_broken)
        self._control.start(after_s)

    # --- from the client ---------------------------------------------------------------

    def open(
        self,
        request: str,
        record: CallRecord,
        chain: bytes,
        block_hashes: bytes,
        max_output_tokens: int,
        outcome: str,
        context: CallContext,
        group: str = "",
    ) -> None:
        """Ask the core for a plan. ``max_output_tokens``: the client's limit; ``outcome``: how
        the call ends when its record's output has been said; ``group``: of the calls that are
        one request with several answers."""
        now_s = self._events.now_s
        submit = Submit(
            api=self.name,
            request=request,
            attempt=1,
            prompt_tokens=record.prompt_tokens,
            max_output_tokens=max_output_tokens,
            block_hashes=block_hashes,
            aggregated=bool(group),
            group=group,
            context=context,
        )
        call = Call(submit, chain, record.output_tokens, outcome, record, now_s)
        self.calls[request] = call
        self._oracle.opened(request)
        call.overdue = self._events.after(
            self._limits.call_s + CORE_AWAY_S, self._overdue, call, 504, now_s
        )
        self._wait(call)
        self._errands.opened(submit, block_hashes)
        self._control.send(submit)

    def end(self, request: str, outcome: str) -> None:
        """The client is gone: end its call everywhere."""
        call = self.calls.get(request)
        if call is not None:
            self._abandon(call)
            self._finish(call, outcome)

    # --- time ----------------------------------------------------------------------------

    def _wait(self, call: Call) -> None:
        """It waits for a plan, and will ask for it again."""
        self._events.cancel(call.repeat)
        call.repeat = self._events.after(self._repeat_s, self._repeat, call)

    def _repeat(self, call: Call) -> None:
        if call.phase != "waiting" or call.request not in self.calls:
            return
        waited_s = self._events.now_s - call.waiting_s
        if waited_s >= self._limits.wait_s + CORE_AWAY_S:
            self._overdue(call, 503, call.waiting_s)
            return
        self._ask(call)
        call.repeat = self._events.after(self._repeat_s, self._repeat, call)

    def _overdue(self, call: Call, status: int, since_s: float) -> None:
        """The core should have ended it long ago, counted from ``since_s``."""
        if self.calls.get(call.request) is call:
            self.overdue += 1
            self._oracle.overdue(call, since_s, self.welcomed_s)
            self._fail(call, status, 0.0)

    # --- from the core -------------------------------------------------------------------

    def _on_core(self, message: Message) -> None:
        match message:
            case Plan():
                self._on_plan(message)
            case Check() | Move():
                self._on_running(message)
            case Rejected():
                self._on_rejected(message)
            case Stop():
                self._on_stop(message)
            case WorkerUp():
                self._block_size = message.facts.block_size
                self._errands.block_size = message.facts.block_size
                self._worker_up(Placed(message.worker, message.incarnation))
            case WorkerGone():
                self._lose(Placed(message.worker, message.incarnation))
            case Welcome():
                self._errands.on = message.contexts
                self._welcomed(message.core)
            case Errand() | DropErrand():
                self._errands.on_message(message)
            case _:
                pass

    def _welcomed(self, core: str) -> None:
        """Taken in. Another core is asked anew for what is still waiting."""
        restarted = bool(self.core) and core != self.core
        self.core, self.welcomed_s = core, self._events.now_s
        if restarted:
            for call in self.calls.values():
                self._moves.restarted(call)
                if call.phase == "waiting" and call.failed is not None:
                    call.attempt += 1
                    call.failed = None

    def _worker_up(self, placed: Placed) -> None:
        if placed in self._connections:
            return
        for former in [each for each in self._connections if each.worker == placed.worker]:
            self._lose(former)
        self._connections[placed] = self._network.connect(self.name, placed)

    def _lose(self, placed: Placed) -> None:
        connection = self._connections.pop(placed, None)
        if connection is not None:
            self._network.disconnect(connection)
        self._worker_gone(placed)

    def _on_broken(self, connection: Connection) -> None:
        """A connection broke, and comes back."""
        placed = connection.placed
        if self._connections.get(placed) is connection:
            self._connections[placed] = self._network.connect(self.name, placed)
            self._worker_gone(placed)

    def _worker_gone(self, lost: Placed) -> None:
        """A worker is lost, or the connection to it: its calls are asked for again."""
        self._errands.on_worker_gone(lost)
        for call in self._live():
            plan = call.plan
            if plan is None or call.phase == "waiting":
                continue
            before = call.phase in ("pulling", "prefilling")
            busy = plan.prefill if before else plan.decode
            if lost in (busy, plan.decode):
                self._retry(call, lost.worker, f"{lost.worker} is lost")
            elif call.phase == "pulling" and lost == plan.pull_worker:
                self._pulled(call, None, late=True)
            else:
                self._moves.on_worker_gone(call, lost)

    def _live(self) -> Iterator[Call]:
        """The calls one by one; whatever happens to one may end others."""
        for request in list(self.calls):
            if (call := self.calls.get(request)) is not None:
                yield call

    def _on_plan(self, plan: Plan) -> None:
        """Carry out a plan; a second copy of one is ignored."""
        call = self.calls.get(plan.request)
        if call is None or plan.attempt < call.attempt + (call.failed is not None):
            self.stale += 1
            return
        if call.phase != "waiting":
            if plan.attempt == call.attempt:
                return
            # The core knows better than this call how its worker is.
            self._abandon(call)
            call.move("waiting")
        record = call.record
        if not record.planned_s:
            record.planned_s = self._events.now_s
        record.attempts = record.attempts + 1 if record.decode else 1
        record.prefill = plan.prefill.worker if plan.prefill else ""
        record.decode = plan.decode.worker
        record.loaded_s, record.pulled_tokens = 0.0, 0
        self._events.cancel(call.repeat)
        call.attempt, call.plan, call.failed = plan.attempt, plan, None
        call.planned_by, call.pull_done = self.core, None
        if plan.pull_worker is None:
            self._compute(call, b"")
        else:
            self._pull(call, plan.pull_worker, plan.pull_tokens)

    def _on_rejected(self, message: Rejected) -> None:
        call = self.calls.get(message.request)
        if call is None or message.attempt < call.attempt or call.phase != "waiting":
            self.stale += 1
            return
        self._fail(call, message.status, message.retry_after_s)

    def _on_stop(self, message: Stop) -> None:
        call = self.calls.get(message.request)
        if call is None or message.attempt < call.attempt:
            self.stale += 1
            return
        if message.status == 503 and message.attempt > call.attempt and call.phase == "decoding":
            self.stale += 1
            return
        self._fail(call, message.status, 0.0)

    def _on_running(self, message: Check | Move) -> None:
        if isinstance(message, Check):
            self._on_check(message)
        elif (call := self.calls.get(message.request)) is not None:
            self._moves.on_move(call, message, self._block_size)
        else:
            self.stale += 1

    def _on_check(self, message: Check) -> None:
        """Tell the core where a call stands."""
        call = self.calls.get(message.request)
        phase: CheckedPhase = "gone"
        attempt = message.attempt
        if call is not None:
            attempt = call.attempt
            if call.phase == "waiting":
                self._ask(call)
                return
            phase = call.phase
        self._control.send(Checked(self.name, message.request, attempt, phase))

    # --- from the workers ----------------------------------------------------------------

    def _on_worker(self, connection: Connection, message: Any) -> None:
        placed = connection.placed
        if self._connections.get(placed) is not connection:
            return
        said: ToApi = message
        if self._errands.on_worker(said, placed):
            return
        match said:
            case Tokens():
                self._on_tokens(said, placed)
            case PrefillDone():
                self._on_prefill_done(said, placed)
            case CallFailed():
                self._on_call_failed(said, placed)
            case _:
                pass

    def _on_prefill_done(self, done: PrefillDone, worker: Placed) -> None:
        """Give the client its token and send the handle on at once, or hand it back."""
        call = self.calls.get(done.request)
        if done.attempt < 0:
            if not self._moves.on_done(call, done, worker):
                self._pull_done(call, done, worker)
            return
        if call is None or call.attempt != done.attempt or call.phase != "prefilling":
            self._hand_back(done, worker)
            return
        plan = call.plan
        assert plan is not None
        if plan.prefill != worker:
            self.stale += 1
            return
        held_s = self._held_s(done, call.prefill_sent_s)
        if held_s > done.lease_s - done.margin_s:
            self._retry(call, worker.worker, f"the handle came after {held_s:.1f} s")
            # Abandoning a prefill leaves a tombstone for its handle.
            self._hand_back(done, worker)
            return
        call.record.prefill_cached_tokens = done.cached_tokens
        call.record.pulled_tokens = done.moved_tokens
        self._deliver(call, 1)
        if call.tokens == call.output_tokens:
            self._discard(done, worker)
            self._finish(call, call.outcome, undecoded=True)
        elif self._decode(call, done.handle):
            self._control.send(Prefilled(self.name, done.request, call.attempt))
        else:
            self._discard(done, worker)

    def _on_tokens(self, tokens: Tokens, worker: Placed) -> None:
        """The first token of an attempt, or its end."""
        request, attempt = split_engine_request_id(tokens.engine_id)
        call = self.calls.get(request)
        if call is None or call.plan is None or call.attempt != attempt:
            self.stale += 1
            return
        if call.plan.decode != worker or call.phase not in ("loading", "decoding"):
            self.stale += 1
            return
        if call.phase == "loading":
            assert tokens.first is not None, request
            self._started(call, tokens)
        if tokens.ended:
            self._moves.forget(call)
            came = call.base_tokens + tokens.stream.tokens(self._events.now_s)
            self._deliver(call, came - call.tokens)
            self._finish(call, call.outcome)

    def _started(self, call: Call, tokens: Tokens) -> None:
        record, first = call.record, tokens.first
        assert first is not None
        call.move("decoding")
        record.moved_tokens = first.moved_tokens
        record.local_cached_tokens = first.local_cached_tokens
        if record.prefill:
            record.loaded_s = self._events.now_s
        else:
            record.prefill_cached_tokens = first.local_cached_tokens + first.moved_tokens
            record.pulled_tokens = first.moved_tokens
        if call.tokens:
            self._client.resumed(self._events.now_s - call.last_token_s)
        call.base_tokens, call.stream = call.tokens, tokens.stream
        if call.tokens + 1 < call.output_tokens:
            self._deliver(call, 1)
        # Otherwise it is the last one too, and comes with the end.
        self._control.send(Started(self.name, call.request, call.attempt))

    def _on_call_failed(self, failed: CallFailed, worker: Placed) -> None:
        """A worker could not: ask for another plan, or tell the client if none can help."""
        call = self.calls.get(failed.request)
        if call is not None and self._waits_for_pull(call, failed.attempt, worker):
            self._pulled(call, None, late=True)
        elif self._moves.on_failed(call, failed, worker):
            pass
        elif call is None or call.attempt != failed.attempt or call.phase == "waiting":
            self.stale += 1
        elif failed.handle_refused and self._without_pull(call, worker):
            pass
        elif failed.retryable:
            self._retry(call, worker.worker, failed.reason)
        else:
            self._fail(call, 500, 0.0)

    # --- steps ---------------------------------------------------------------------------

    def _deliver(self, call: Call, count: int) -> None:
        """The client gets tokens."""
        self._oracle.delivered(call.request, call.tokens, count)
        if not call.tokens and count:
            call.record.first_token_s = self._events.now_s
        call.tokens += count
        call.last_token_s = self._events.now_s

    def _catch_up(self, call: Call) -> None:
        """Count what has come from the decode worker by now.

        Its last token is not among them: with that, the end would have come.
        """
        if call.stream is None:
            return
        came = call.base_tokens + call.stream.tokens(self._events.now_s)
        came = min(came, call.output_tokens - 1)
        self._deliver(call, max(0, came - call.tokens))
        call.last_token_s = call.stream.until_s(self._events.now_s)
        call.stream = None

    def _send(self, placed: Placed, message: object) -> bool:
        connection = self._connections.get(placed)
        if connection is None:
            return False
        self._network.to_worker(connection, message)
        return True

    def _body(self, call: Call) -> Body:
        left = call.output_tokens - call.tokens
        return Body(call.chain, call.prompt_tokens, left, call.submit.priority)

    def _pull(self, call: Call, peer: Placed, tokens: int) -> None:
        """Ask a peer to hold what it has cached of the prompt."""
        call.move("pulling")
        call.pull_sent_s = self._events.now_s
        call.pull_bound = self._events.after(self._limits.pull_s, self._leave_pull, call)
        side = pull_attempt(call.attempt)
        message = Prefill(call.request, side, peer.incarnation, cached_only=True)
        body = msgspec.structs.replace(self._body(call), prompt_tokens=tokens + 1)
        if not self._send(peer, Work(message, body)):
            self._pulled(call, None)

    def _waits_for_pull(self, call: Call, attempt: int, worker: Placed) -> bool:
        plan = call.plan
        current = call.phase == "pulling" and attempt == pull_attempt(call.attempt)
        return current and plan is not None and plan.pull_worker == worker

    def _pull_done(self, call: Call | None, done: PrefillDone, worker: Placed) -> None:
        """A peer holds what it has cached."""
        if call is None or not self._waits_for_pull(call, done.attempt, worker):
            self._hand_back(done, worker)
            return
        late = self._held_s(done, call.pull_sent_s) > done.lease_s - done.margin_s
        if late or not done.cached_tokens:
            self._discard(done, worker)
            self._pulled(call, None, missing=not late, late=late)
        else:
            self._pulled(call, done)

    def _leave_pull(self, call: Call) -> None:
        """The peer takes too long."""
        self._abort_pull(call)
        self._pulled(call, None, late=True)

    def _abort_pull(self, call: Call) -> None:
        assert call.plan is not None
        assert call.plan.pull_worker is not None
        side = pull_attempt(call.attempt)
        self._events.cancel(call.pull_bound)
        self._send(call.plan.pull_worker, Abort([(call.request, side)]))
        self._bury(call.request, side)

    def _pulled(
        self,
        call: Call,
        done: PrefillDone | None,
        missing: bool = False,
        late: bool = False,
    ) -> None:
        """Go on, with what a peer holds or without."""
        plan = call.plan
        assert plan is not None
        assert plan.pull_worker is not None
        self._events.cancel(call.pull_bound)
        tokens = done.cached_tokens if done is not None else 0
        attempt, call.pull_done = call.attempt, done
        if done is not None:
            missing = tokens < done.prompt_tokens - 1
        sent = self._compute(call, done.handle if done is not None else b"")
        if sent:
            self._control.send(Pulled(self.name, call.request, attempt, tokens, missing, late))
        elif done is not None:
            self._discard(done, plan.pull_worker)

    def _without_pull(self, call: Call, worker: Placed) -> bool:
        """Send once more what was refused for the peer's handle, without it."""
        plan, done = call.plan, call.pull_done
        if plan is None or plan.pull_worker is None or done is None:
            return False
        asked = plan.prefill if call.phase == "prefilling" else plan.decode
        other = plan.prefill is not None and call.phase == "loading"
        if other or worker != asked or call.phase == "decoding":
            return False
        call.pull_done = None
        self._discard(done, plan.pull_worker)
        self._give(call, worker, b"")
        return True

    def _compute(self, call: Call, handle: bytes) -> bool:
        """Have the prompt computed where the plan says. False if it could not be asked for."""
        assert call.plan is not None
        if call.plan.prefill is None:
            return self._decode(call, handle)
        call.move("prefilling")
        call.prefill_sent_s = self._events.now_s
        return self._give(call, call.plan.prefill, handle)

    def _decode(self, call: Call, handle: bytes) -> bool:
        assert call.plan is not None
        call.move("loading")
        return self._give(call, call.plan.decode, handle)

    def _give(self, call: Call, worker: Placed, handle: bytes) -> bool:
        """Give a call to the worker that has it in its phase."""
        message: Prefill | Decode
        if call.phase == "prefilling":
            message = Prefill(call.request, call.attempt, worker.incarnation, handle=handle)
        else:
            message = Decode(call.request, call.attempt, worker.incarnation, handle)
        if self._send(worker, Work(message, self._body(call))):
            return True
        self._retry(call, worker.worker, f"{worker.worker} can't be reached")
        return False

    def _held_s(self, done: PrefillDone, sent_s: float) -> float:
        """Two clocks bound how long the blocks have been held; the smaller bound counts."""
        now_s = self._events.now_s
        return min(now_s - sent_s, now_s - done.held_at_unix_s + CLOCK_SKEW_S)

    def _retry(self, call: Call, worker: str, reason: str) -> None:
        """Give this attempt up and ask for another plan."""
        self._abandon(call)
        call.move("waiting")
        call.waiting_s = self._events.now_s
        if call.planned_by == self.core:
            # Counted from what the core was told the prompt is.
            generated = call.tokens - call.submitted_tokens
            call.failed = Failed(self.name, call.request, call.attempt, worker, reason, generated)
        else:
            call.attempt += 1
        self._ask(call)
        self._wait(call)

    def _ask(self, call: Call) -> None:
        """Ask the core, once more, for the plan that this call waits for."""
        if call.failed is not None:
            self._oracle.failed(self.name, call.failed)
            self._control.send(call.failed)
            return
        call.submitted_tokens = call.tokens
        self._control.send(
            msgspec.structs.replace(
                call.submit, attempt=call.attempt, prompt_tokens=call.prompt_tokens
            )
        )

    def _abandon(self, call: Call) -> None:
        """Stop an attempt on its workers, whatever it is doing there."""
        plan = call.plan
        if plan is None or call.phase == "waiting":
            return
        self._catch_up(call)
        if call.phase == "pulling":
            self._abort_pull(call)
            return
        self._moves.forget(call)
        abort = Abort([(call.request, call.attempt)])
        if call.phase == "prefilling" and plan.prefill is not None:
            self._send(plan.prefill, abort)
            # The prefill may be done already, its handle on the way here.
            self._bury(call.request, call.attempt)
        else:
            self._send(plan.decode, abort)

    def _bury(self, request: str, attempt: int) -> None:
        now_s = self._events.now_s
        self.tombstones[request, attempt] = now_s
        while self.tombstones:
            key, made_s = next(iter(self.tombstones.items()))
            if now_s - made_s < TOMBSTONE_S and len(self.tombstones) <= TOMBSTONES_MAX:
                break
            del self.tombstones[key]

    def _hand_back(self, done: PrefillDone, holder: Placed) -> None:
        """A handle that came too late. One without a tombstone has been sent on before."""
        self.stale += 1
        if self.tombstones.pop((done.request, done.attempt), None) is not None:
            self._discard(done, holder)

    def _discard(self, done: PrefillDone, holder: Placed) -> None:
        """Nobody will read this KV: its holder may free the blocks."""
        self._send(holder, Discard(done.request, done.attempt, holder.incarnation, done.handle))

    def _fail(self, call: Call, status: int, retry_after_s: float) -> None:
        rejected = call.phase == "waiting" and not call.record.decode
        call.record.status = status
        self._abandon(call)
        self._finish(call, "error", "rejected" if rejected else "error", retry_after_s)

    def _finish(
        self,
        call: Call,
        outcome: str,
        recorded: str = "",
        retry_after_s: float = 0.0,
        undecoded: bool = False,
    ) -> None:
        """The one way out for a call. ``recorded``: the record's outcome if not the core's."""
        record, now_s = call.record, self._events.now_s
        self._forget(call, recorded or outcome)
        started = record.first_token_s
        self._control.send(
            Finished(
                self.name,
                call.request,
                call.attempt,
                outcome,
                output_tokens=call.tokens,
                prefill_cached_tokens=record.prefill_cached_tokens,
                local_cached_tokens=record.local_cached_tokens,
                moved_tokens=record.moved_tokens,
                ttft_s=started - call.submitted_s if started else 0.0,
                elapsed_s=now_s - call.submitted_s,
                undecoded=undecoded,
                pulled_tokens=record.pulled_tokens,
            )
        )
        self._client.ended(record, retry_after_s)

    def _forget(self, call: Call, outcome: str) -> None:
        """Nothing more comes of a call."""
        record = call.record
        self._moves.drop(call)
        del self.calls[call.request]
        self._events.cancel(call.repeat)
        self._events.cancel(call.overdue)
        self._events.cancel(call.pull_bound)
        record.outcome = outcome
        record.ended_s = self._events.now_s
        record.output_tokens = call.tokens
        self._oracle.ended(call.request, record.outcome, call.output_tokens)

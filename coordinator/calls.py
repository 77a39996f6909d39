"""The life of calls: from ``Submit`` through plans, failures and silences to one end.

::

             +----------------------- replan (attempt + 1) ---------------------+
             v                                                                  |
    Submit QUEUED --Plan--> PREFILLING --Prefilled--> LOADING --Started--> DECODING
             |                ^ (remote)                 ^                   |   ^
             |                |                          |     worker lost   v   | never
             +-----Plan----> PULLING --Pulled (local)----+              RESUMING-+
             |              (from a peer's cache)        |
             +-------------------Plan (local)------------+
                                                         ^
                 a running call that is moved: DECODING -+ (attempt + 1, see ``moves``)

    any of them --> FINISHED, CANCELLED, FAILED (by the API process), STOPPED (by us),
                    GONE (the API process is lost or does not know it); QUEUED --> REJECTED

Every phase has a deadline, so that a lost message costs time, never a stuck call or a
leaked reservation. A message with an older attempt changes nothing; where it shows that
the API process has not seen the current plan, the plan is sent again. KV room is
reserved with the plan and given back when the call ends, is replanned or, for the room
on a prefill worker, has its first token.

It knows nothing of connections: who may speak for a call is settled before it is asked.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from coordinator.errands import Errands
from coordinator.explaining import Explanations
from coordinator.following import Following
from coordinator.kv_index import KvIndex
from coordinator.limits import Placement
from coordinator.moves import Incarnation, Moves, begin_some
from coordinator.ordering import Ordering
from coordinator.pace import Pace
from coordinator.placing import Placing
from coordinator.policy.placement import Ask, Choice, Decision, Impossible, Wait
from coordinator.policy.placer import Placer
from coordinator.policy.queue import CallQueue, CompletionRate
from coordinator.prefetching import Prefetches
from coordinator.protocol import (
    BLOCK_HASH_BYTES,
    CallContext,
    CallStatus,
    Check,
    Checked,
    Failed,
    Finished,
    MoveDeclined,
    MoveReady,
    Placed,
    Plan,
    Prefilled,
    Pulled,
    Rejected,
    Started,
    Stop,
    Submit,
    WorkerGone,
    WorkerUp,
)
from coordinator.pulls import Pulls
from coordinator.retention import Retention
from coordinator.rooms import Rooms
from coordinator.standing import Standing
from coordinator.state import Api, Call, CallKey, CallPhase, State, Worker
from coordinator.view import call_status
from coordinator.workflow.tracker import Tracker

OUTCOME_PHASES = {
    "abort": CallPhase.CANCELLED,
    "error": CallPhase.FAILED,
    "gone": CallPhase.GONE,
}
"""Every other outcome is FINISHED."""

REGISTRATION_GRACE_BEATS = 2
"""How long after its registration an API process is not told that a call is unknown."""

CHECKS_MAX = 3
"""How often the API process is asked within ``check_s`` before a call is given up."""

PHASE_ORDER = {
    CallPhase.PULLING: -1,
    CallPhase.PREFILLING: 0,
    CallPhase.LOADING: 1,
    CallPhase.DECODING: 2,
}
CHECKED_PHASES = {
    "pulling": CallPhase.PULLING,
    "prefilling": CallPhase.PREFILLING,
    "loading": CallPhase.LOADING,
    "decoding": CallPhase.DECODING,
}


Session = tuple[str, str, str]
"""Workflow, run and agent."""


class Ended(msgspec.Struct, frozen=True, gc=False):
    """An ended call: the row to show, and what to say to an API process that missed its end."""

    row: CallStatus
    attempt: int
    answer: Rejected | Stop | None


class Group(msgspec.Struct, gc=False):
    """Live calls of one group, and the worker that the first of them went to."""

    calls: int = 0
    worker: str = ""


class Calls:
    """All live calls, the queue and the recently ended ones."""

    def __init__(
        self,
        state: State,
        index: KvIndex,
        standing: Standing,
        placement: Placement,
        tracker: Tracker,
        pace: Pace,
        placer: Placer | None = None,
        *,
        retention: Retention,
        errands: Errands,
        prefetches: Prefetches,
        hosts: KvIndex,
    ) -> None:
        self._prefetches = prefetches
        self._retention = retention
        self._errands = errands
        self._state = state
        self._index = index
        self._standing = standing
        self._pace = pace
        self._rooms = Rooms(state, standing)
        self._placing = Placing(state, index, standing, placement, placer, pace, hosts, self._rooms)
        self._pulls = Pulls(state, index, standing, pace, hosts)
        self._moves = Moves(state, standing, self._place_again)
        self.placement = placement
        self._tracker = tracker
        self._placer = placer
        self._arrivals = 0
        self._rate = CompletionRate()
        self.groups: dict[tuple[str, str], Group] = {}
        self.sessions: OrderedDict[Session, str] = OrderedDict()
        """Where the last call of each went, if placement is sticky."""
        self.explanations = Explanations(state.limits.explained_calls)
        self.queue: CallQueue | Ordering
        if placer is not None:
            self.queue = CallQueue(state.limits.queue_s, placer.rank)
        else:
            self.queue = Ordering(state, placement, tracker.learner, pace)
        follows = placement.single_flight and placement.policy == "pythia"
        ordering = self.queue if follows and isinstance(self.queue, Ordering) else None
        self._following = Following(state, self._rooms, pace, ordering)
        self.recent: OrderedDict[CallKey, Ended] = OrderedDict()

    # --- what API processes say ---------------------------------------------------

    def submit(self, api: Api, message: Submit, now_s: float) -> None:
        """A call asks for a plan; asked again, it gets the same answer."""
        call = api.calls.get(message.request)
        if call is not None:
            if message.attempt > call.attempt or not call.plan_unseen:
                self._stale(call, message.attempt, now_s)
            else:
                self._resend_plan(call, now_s)
            return
        ended = self.recent.get((api.name, message.request))
        if ended is not None and message.attempt <= ended.attempt:
            self._answer_again(api, ended, message.attempt)
            return
        refusal = self._refusal(message, now_s)
        if refusal is not None:
            self._state.counters["calls_rejected"] += 1
            self._state.send(api.peer, refusal)
            return
        self._enqueue_new(api, message, now_s)

    def pulled(self, api: Api, message: Pulled, now_s: float) -> None:
        """A peer has named what it has cached, or will not."""
        call = self._current(api, message, now_s)
        if call is not None:
            if call.phase is CallPhase.PULLING:
                self._pulls.answered(call, message, now_s)
                self._past_pull(call, now_s, "pulled" if message.tokens > 0 else "nothing pulled")
            else:
                self._state.counters["messages_stale"] += 1

    def prefilled(self, api: Api, message: Prefilled, now_s: float) -> None:
        """The prompt is computed; the decode worker has it from now on."""
        call = self._current(api, message, now_s)
        if call is not None:
            if call.phase is CallPhase.PULLING and call.prefill is not None:
                self._past_pull(call, now_s, "prefilled")
            if call.phase is CallPhase.PREFILLING:
                self._to_loading(call, now_s, "prefilled")
            else:
                self._state.counters["messages_stale"] += 1

    def started(self, api: Api, message: Started, now_s: float) -> None:
        """The first token came."""
        call = self._current(api, message, now_s)
        if call is not None:
            if call.planned:
                self._to_decoding(call, now_s, "started")
            else:
                self._state.counters["messages_stale"] += 1

    def finished(self, api: Api, message: Finished, now_s: float) -> None:
        """The API process is done with a call.

        With an older attempt it changes nothing, but shows that the API process may not
        know the current attempt at all: it is asked.
        """
        call = self._current(api, message, now_s)
        phase = OUTCOME_PHASES.get(message.outcome, CallPhase.FINISHED)
        if call is None:
            doubtful = api.calls.get(message.request)
            if doubtful is None or message.attempt >= doubtful.attempt:
                return
            if doubtful.phase is CallPhase.LOADING and message.attempt == doubtful.moved_attempt:
                # It was over where it was before it could go on elsewhere.
                self._learn(doubtful, message)
                self._end(doubtful, phase, now_s, message.outcome, finished=message)
            else:
                self._ask(doubtful)
            return
        if phase is CallPhase.FINISHED:
            if call.planned:
                if call.phase is CallPhase.PULLING:
                    self._past_pull(call, now_s, "finished")
                if message.undecoded and call.phase is CallPhase.PREFILLING:
                    self._to_loading(call, now_s, "prefilled")
                elif not message.undecoded:
                    self._to_decoding(call, now_s, "finished")
            self._learn(call, message)
            self.queue.wasted(call, message, now_s)
        self._end(call, phase, now_s, message.outcome, finished=message)

    def failed(self, api: Api, message: Failed, now_s: float) -> None:
        """An attempt failed through no fault of the client: another plan, or the end."""
        call = api.calls.get(message.request)
        if call is None:
            self._failed_unknown(api, message, now_s)
            return
        if message.attempt > call.attempt:
            self._state.counters["messages_stale"] += 1
            return
        # Also of an older attempt: what the client has got, it has got.
        grown = max(call.generated_tokens, message.generated_tokens)
        grown = min(grown, max(0, call.submit.max_output_tokens))
        if message.attempt < call.attempt or call.phase is CallPhase.QUEUED:
            call.generated_tokens = grown
            self._stale(call, message.attempt, now_s)
            return
        blamed = self._blame(call, message.worker)
        if blamed is not None and self._state.workers.get(blamed.name) is blamed:
            # It may have failed because the API process never heard of the worker.
            self._state.send(api.peer, worker_up(blamed))
        call.generated_tokens = grown
        self._replan(call, now_s, message.reason)

    def checked(self, api: Api, message: Checked, now_s: float) -> None:
        """Where the API process says that a call stands."""
        call = self._current(api, message, now_s)
        if call is None:
            return
        if message.phase == "gone":
            self._end(call, CallPhase.GONE, now_s, "the API process does not know it")
        elif call.phase is CallPhase.RESUMING:
            if call.overdue:
                call.overdue = 0
                self._set_due(call, now_s + self._state.limits.check_s)
        elif call.phase is not CallPhase.QUEUED:
            self._catch_up(call, CHECKED_PHASES[message.phase], now_s)

    def move_answered(self, api: Api, message: MoveReady | MoveDeclined, now_s: float) -> None:
        """A running call's KV is where it is to go on, or it stays where it is."""
        call = self._current(api, message, now_s)
        if call is None:
            return
        if not self._moves.is_current(call, message.number):
            self._state.counters["messages_stale"] += 1
        elif isinstance(message, MoveDeclined):
            self._moves.declined(call, message, now_s)
        elif (choice := self._moves.arrived(call, message, now_s)) is not None:
            self._moved(call, choice, now_s)

    def _moved(self, call: Call, choice: Choice, now_s: float) -> None:
        """It is planned where its KV is."""
        self._release(call, now_s)
        call.moved_attempt = call.attempt
        call.attempt += 1
        # It is no other try: nothing went wrong.
        call.plans -= 1
        self._plan(call, choice, now_s)

    # --- what else happens ----------------------------------------------------------

    def move_away(
        self, worker: Worker, now_s: float, reason: str, request: str = "", target: str = ""
    ) -> tuple[int, int]:
        """Have running calls of a worker, or one of them, go on elsewhere: as many as can now.

        How many are being moved, and how many are not. To be asked again for those: calls that
        have no token yet, that can't go on elsewhere or find no room, and more than
        ``moves_per_worker``.
        """
        calls = [call for call in worker.decodes.values() if request in ("", call.request)]
        return begin_some(self._moves, calls, now_s, reason, target)

    def move_due(self, key: CallKey, now_s: float) -> None:
        """A move has taken too long."""
        self._moves.due(key, now_s)

    def worker_lost(self, worker: Worker, now_s: float) -> None:
        """A worker is not registered any more: its calls go elsewhere."""
        for call in list(worker.decodes.values()):
            if call.phase is CallPhase.DECODING:
                self._release(call, now_s)
                call.move(CallPhase.RESUMING, now_s, f"decode worker {worker.name} lost")
                call.overdue = 0
                self._set_due(call, now_s + self._state.limits.check_s)
            else:
                self._replan(call, now_s, f"decode worker {worker.name} lost")
        for call in list(worker.prefills.values()):
            if call.phase is CallPhase.PREFILLING or call.phase is CallPhase.PULLING:
                self._replan(call, now_s, f"prefill worker {worker.name} lost")
            else:
                self._release_prefill(call)
        for call in list(worker.pulls.values()):
            self._pulls.peer_lost(call, now_s)
        self._moves.target_lost(worker)

    def api_lost(self, api: Api, now_s: float) -> None:
        """An API process is lost: nobody waits for its calls."""
        for call in list(api.calls.values()):
            self._end(call, CallPhase.GONE, now_s, "the API process is lost", answered=0)

    def due(self, key: CallKey, now_s: float) -> None:
        """A call's deadline has come."""
        call = self._state.calls[key]
        if now_s >= call.deadline_s:
            self._refuse(call, 504, "the call is over its deadline", now_s)
        elif call.follows is not None:
            self._following.recall(call, now_s)
        elif call.phase is CallPhase.QUEUED:
            self._refuse(call, 503, "no room within the longest wait", now_s)
        elif call.overdue < CHECKS_MAX:
            call.overdue += 1
            self._ask(call)
            self._set_due(call, now_s + self._state.limits.check_s / CHECKS_MAX)
        else:
            why = "the API process does not answer"
            self._state.send(call.api.peer, Stop(call.request, call.attempt, 503, why))
            self._end(call, CallPhase.GONE, now_s, why)

    def stop(self, key: CallKey, status: int, reason: str, now_s: float) -> None:
        """End a live call with an error, wherever it is; nothing happens if it is over."""
        call = self._state.calls.get(key)
        if call is not None:
            self._refuse(call, status, reason, now_s)

    def dispatch(self, now_s: float) -> None:
        """Plan waiting calls in order until one has to wait on."""
        while self._state.room_changed:
            call = self.queue.first(now_s)
            if call is None:
                break
            decision = self._place(call, now_s)
            if isinstance(decision, Choice):
                if self._following.waits(call, decision, now_s):
                    continue
                self.queue.remove(call)
                self._plan(call, decision, now_s)
            elif isinstance(decision, Impossible):
                self._refuse(call, 503, decision.reason, now_s)
            else:
                assert isinstance(decision, Wait)
                self.queue.blocked(call, now_s)
                break
        self._state.room_changed = False

    # --- asking, answering ------------------------------------------------------------

    def _current(
        self,
        api: Api,
        message: Pulled | Prefilled | Started | Finished | Checked | MoveReady | MoveDeclined,
        now_s: float,
    ) -> Call | None:
        """The live call that a message is about, if it is about the current attempt."""
        call = api.calls.get(message.request)
        if call is None:
            self._state.counters["messages_unknown_call"] += 1
        elif message.attempt != call.attempt:
            self._stale(call, message.attempt, now_s)
            call = None
        return call

    def _stale(self, call: Call, attempt: int, now_s: float) -> None:
        """A message about another attempt; an older one means that our plan was not seen."""
        self._state.counters["messages_stale"] += 1
        if attempt < call.attempt and call.plan_unseen:
            self._resend_plan(call, now_s)

    def _resend_plan(self, call: Call, now_s: float) -> None:
        assert call.plan is not None
        self._state.send(call.api.peer, call.plan)
        if call.overdue:
            # It is alive but had no plan: the phase begins only now.
            call.overdue = 0
            self._set_due(call, now_s + self._phase_s(call))

    def _ask(self, call: Call) -> None:
        self._state.counters["checks_sent"] += 1
        if call.phase is CallPhase.RESUMING:
            # The news of the loss may itself have been lost.
            assert call.plan is not None
            lost = call.plan.decode
            gone = WorkerGone(lost.worker, lost.incarnation, "lost")
            self._state.send(call.api.peer, gone)
        self._state.send(call.api.peer, Check(call.request, call.attempt))

    def _answer_again(self, api: Api, ended: Ended, attempt: int) -> None:
        """The API process missed the end of a call, or its message is late."""
        self._state.counters["messages_stale"] += 1
        if ended.answer is not None:
            answer = msgspec.structs.replace(ended.answer, attempt=attempt)
            self._state.send(api.peer, answer)

    def _failed_unknown(self, api: Api, message: Failed, now_s: float) -> None:
        """Nobody would ever answer the API process otherwise: its call must end.

        Unless it has only just registered, with a core that restarted: then it is about
        to submit the call anew, and repeats itself otherwise.
        """
        ended = self.recent.get((api.name, message.request))
        if ended is not None and message.attempt <= ended.attempt:
            self._answer_again(api, ended, message.attempt)
            return
        self._state.counters["messages_unknown_call"] += 1
        if now_s - api.registered_s < REGISTRATION_GRACE_BEATS * self._state.limits.beat_s:
            return
        reason = "the core does not know this call"
        self._state.send(api.peer, Stop(message.request, message.attempt, 503, reason))

    def _refusal(self, message: Submit, now_s: float) -> Rejected | None:
        """Why a new call is not taken in, None if it is."""
        wrong = self._malformed(message)
        status, reason, retry_after_s = 400, wrong, 0.0
        unwanted = None if wrong else self._tracker.refusal(message)
        if unwanted is not None:
            status, reason = unwanted
        elif not wrong:
            tokens = message.prompt_tokens
            if len(self.queue) >= self._state.limits.queue_calls:
                status, reason = 429, "the queue is full"
                retry_after_s = self._rate.retry_after_s(len(self.queue), now_s)
            elif self._state.workers and self._standing.largest_tokens <= tokens:
                status, reason = 503, f"no worker can hold {tokens} prompt tokens"
            else:
                return None
        return Rejected(message.request, message.attempt, status, reason, retry_after_s)

    def _malformed(self, message: Submit) -> str:
        """What is wrong with a ``Submit``, empty if nothing."""
        limits, block_size = self._state.limits, self._state.block_size
        blocks, odd_bytes = divmod(len(message.block_hashes), BLOCK_HASH_BYTES)
        if not 0 < len(message.request.encode()) <= limits.request_id_bytes:
            return f"a request id has 1 to {limits.request_id_bytes} bytes"
        if odd_bytes or (block_size and blocks > message.prompt_tokens // block_size):
            return "the block hashes are malformed"
        if message.prompt_tokens < 1 or message.max_output_tokens < 1 or message.attempt < 1:
            return "tokens and attempts are counted from 1"
        if not 0.0 <= message.deadline_s < float("inf"):
            return "the deadline is no time"
        return ""

    # --- moving -------------------------------------------------------------------------

    def _enqueue_new(self, api: Api, message: Submit, now_s: float) -> None:
        state = self._state
        message = self._tracker.with_terms(message, now_s)
        life_s = min(message.deadline_s or state.limits.call_s, state.limits.call_s)
        hashes_bytes_max = state.limits.prompt_blocks * BLOCK_HASH_BYTES
        if len(message.block_hashes) > hashes_bytes_max:
            kept = message.block_hashes[:hashes_bytes_max]
            message = msgspec.structs.replace(message, block_hashes=kept)
        call = Call(
            api=api,
            submit=message,
            arrival=self._arrivals,
            submitted_s=now_s,
            deadline_s=now_s + life_s,
            attempt=message.attempt,
            story=state.story(),
        )
        self._arrivals += 1
        api.calls[message.request] = call
        state.calls[call.key] = call
        self.recent.pop(call.key, None)
        if message.group:
            self.groups.setdefault((api.name, message.group), Group()).calls += 1
        state.counters["calls_submitted"] += 1
        self._tracker.opened(call, now_s)
        self._retention.opened(call, now_s)
        self._wait(call, now_s)

    def _wait(self, call: Call, now_s: float) -> None:
        """Into the queue; whoever is first there may be placed at once."""
        self.queue.push(call, now_s)
        self._set_due(call, now_s + self.queue.longest_s(call))
        if self.queue.first(now_s) is call:
            self._state.room_changed = True

    def _place(self, call: Call, now_s: float) -> Decision:
        submit, placement = call.submit, self.placement
        group = None
        if submit.group and placement.siblings_together:
            group = self.groups.get((call.api.name, submit.group))
        ask = Ask(
            prompt_tokens=call.prompt_tokens,
            output_tokens=call.output_tokens,
            aggregated=submit.aggregated,
            avoid=call.avoid,
            sibling=group.worker if group else "",
            turn=call.arrival + call.plans,
            last=self._last(submit.context) if placement.sticky else "",
            expected_tokens=self._pace.expected_tokens(call),
        )
        return self._placing.decide(call, ask, now_s)

    def _place_again(self, call: Call, now_s: float, avoid: set[Incarnation]) -> Decision:
        """Where a running call could go on."""
        ask = Ask(
            prompt_tokens=call.prompt_tokens,
            output_tokens=call.output_tokens,
            aggregated=True,
            avoid=avoid,
            sibling="",
            turn=call.arrival + call.attempt,
            expected_tokens=self._pace.expected_tokens(call),
        )
        return self._placing.decide(call, ask, now_s)

    def _plan(self, call: Call, choice: Choice, now_s: float) -> None:
        """Reserve, move, tell. The call is out of the queue."""
        state = self._state
        decode = state.workers[choice.decode]
        prefill = state.workers[choice.prefill] if choice.prefill else None
        for worker in (decode, prefill):
            if worker is not None and self._errands.open:
                self._errands.planned(worker)
        # What is moved has not waited, nor does anything begin.
        moved = call.moved_attempt == call.attempt - 1
        computes = not (choice.pull or choice.loaded_blocks or moved)
        self._rooms.decode(
            call, decode, choice.decode_blocks, computes=computes and prefill is None
        )
        if prefill is not None:
            self._rooms.prefill(call, prefill, choice.prefill_blocks, computes=computes)
            prefill.prefilling += 1
        if choice.pull:
            self._pulls.planned(call, choice)
        call.computing = prefill or decode
        call.computing.prefill_tokens += choice.uncached_tokens
        call.uncached_tokens = choice.uncached_tokens
        call.cached_blocks = choice.cached_blocks
        call.loaded_blocks = choice.loaded_blocks
        call.held_blocks = choice.held_blocks
        if self.placement.single_flight and computes:
            self._promise(call)
        self._pace.planned(call, now_s)
        self._prefetches.planned(call)
        call.plans += 1
        call.plan = Plan(
            request=call.request,
            attempt=call.attempt,
            decode=Placed(decode.name, decode.incarnation),
            prefill=Placed(prefill.name, prefill.incarnation) if prefill else None,
            reason=choice.reason,
            pull_worker=Placed(call.pull.name, call.pull.incarnation) if call.pull else None,
            pull_tokens=call.pull_tokens,
        )
        call.overdue = 0
        entry = None if moved else self.queue.planned(call, now_s)
        self.explanations.planned(call, choice, entry, len(self.queue), now_s)
        if call.submit.group:
            group = self.groups[call.api.name, call.submit.group]
            group.worker = group.worker or decode.name
        if self.placement.sticky and call.submit.context.run:
            self._remember(call, decode)
        phase = CallPhase.LOADING if prefill is None else CallPhase.PREFILLING
        state.counters["plans_local" if prefill is None else "plans_remote"] += 1
        call.move(phase if call.pull is None else CallPhase.PULLING, now_s, choice.reason)
        self._set_due(call, now_s + self._phase_s(call))
        state.send(call.api.peer, call.plan)

    def _last(self, context: CallContext) -> str:
        """Where the session's last call went. Who follows another agent begins a session."""
        if context.parent != context.agent:
            return ""
        return self.sessions.get((context.workflow, context.run, context.agent), "")

    def _remember(self, call: Call, decode: Worker) -> None:
        """The session's next call may want to go there too."""
        context = call.submit.context
        session = context.workflow, context.run, context.agent
        self.sessions[session] = decode.name
        self.sessions.move_to_end(session)
        if len(self.sessions) > self._state.limits.sessions:
            self.sessions.popitem(last=False)

    def _past_pull(self, call: Call, now_s: float, why: str) -> None:
        """Whoever computes the prompt has the peer's handle, or does without."""
        phase = CallPhase.LOADING if call.prefill is None else CallPhase.PREFILLING
        call.move(phase, now_s, why)
        call.overdue = 0
        self._set_due(call, now_s + self._phase_s(call))

    def _to_loading(self, call: Call, now_s: float, why: str) -> None:
        assert call.prefill is not None
        self._computed(call, now_s)
        self._pulls.release(call)
        self._index.stored(call.prefill.name, call.submit.block_hashes)
        call.move(CallPhase.LOADING, now_s, why)
        call.overdue = 0
        self._set_due(call, now_s + self._phase_s(call))
        self._state.room_changed = True

    def _to_decoding(self, call: Call, now_s: float, why: str) -> None:
        assert call.decode is not None
        if call.phase is CallPhase.PULLING:
            self._past_pull(call, now_s, why)
        if call.phase is CallPhase.PREFILLING:
            self._to_loading(call, now_s, why)
        self._computed(call, now_s)
        self._release_prefill(call)
        self._pulls.release(call)
        self._rooms.decodes(call)
        self._following.lead_no_more(call, now_s)
        self._pace.started(call, now_s)
        self._index.stored(call.decode.name, call.submit.block_hashes)
        self._retention.decoding(call, now_s)
        self._prefetches.decoding(call, now_s)
        call.move(CallPhase.DECODING, now_s, why)
        call.overdue = 0
        self._set_due(call, now_s + self._phase_s(call))

    def _catch_up(self, call: Call, phase: CallPhase, now_s: float) -> None:
        """The API process knows better where a call stands, or agrees that it is stuck."""
        if call.phase is CallPhase.PULLING and phase is not CallPhase.PULLING:
            self._past_pull(call, now_s, "says the API process")
            if PHASE_ORDER[phase] <= PHASE_ORDER[call.phase]:
                return
        if PHASE_ORDER[phase] > PHASE_ORDER[call.phase]:
            step = self._to_loading if phase is CallPhase.LOADING else self._to_decoding
            step(call, now_s, "says the API process")
        elif not call.overdue:
            self._state.counters["messages_stale"] += 1
        elif call.phase is CallPhase.DECODING:
            call.overdue = 0
            self._set_due(call, now_s + self._phase_s(call))
        else:
            self._stuck(call, now_s)

    def _stuck(self, call: Call, now_s: float) -> None:
        """Another plan for a call that gets nowhere, if there is one: else it stays a while.

        Its worker may just be slow, and its client be served at any moment. Were it to wait in
        the queue instead, its first token would be a former attempt's, of which nobody takes
        notice, and what is being said to the client be stopped for want of room.
        """
        limits = self._state.limits
        worker = call.prefill if call.phase is CallPhase.PREFILLING else call.decode
        if call.phase is CallPhase.PULLING:
            worker = call.pull or worker
        assert worker is not None
        call.avoid.add((worker.name, worker.incarnation))
        why = f"stuck {call.phase.value} on {worker.name}"
        if call.stuck_s is None or call.stuck_s[:2] != (call.attempt, call.phase):
            call.stuck_s = call.attempt, call.phase, now_s
        if call.plans >= limits.attempts or now_s - call.stuck_s[2] >= limits.queue_s:
            self._replan(call, now_s, why)
            return
        decision = self._place(call, now_s)
        if isinstance(decision, Choice):
            self._next_attempt(call, now_s, why)
            self._plan(call, decision, now_s)
        else:
            call.overdue = 0
            self._set_due(call, now_s + limits.check_s)

    def _blame(self, call: Call, name: str) -> Worker | None:
        """The worker of the call's plan that has this name; it is avoided from now on."""
        for worker in (call.decode, call.prefill):
            if worker is not None and worker.name == name:
                call.avoid.add((worker.name, worker.incarnation))
                return worker
        return None

    def _replan(self, call: Call, now_s: float, why: str) -> None:
        """Another attempt, ahead of those that never had one; or none is left."""
        if call.plans >= self._state.limits.attempts:
            self._refuse(call, 503, f"given up after {call.plans} attempts: {why}", now_s)
            return
        self._next_attempt(call, now_s, why)
        self._wait(call, now_s)

    def _next_attempt(self, call: Call, now_s: float, why: str) -> None:
        """The current one is over for us."""
        self._release(call, now_s)
        call.move(CallPhase.QUEUED, now_s, why)
        call.attempt += 1
        call.overdue = 0
        self._state.counters["replans"] += 1

    def _refuse(self, call: Call, status: int, reason: str, now_s: float) -> None:
        """End a call with an error: ``Rejected`` if it never had a plan, else ``Stop``."""
        answer: Rejected | Stop
        if call.plans == 0:
            waiting = len(self.queue)
            retry_after_s = self._rate.retry_after_s(waiting, now_s) if status == 503 else 0.0
            answer = Rejected(call.request, call.attempt, status, reason, retry_after_s)
            phase = CallPhase.REJECTED
        else:
            answer = Stop(call.request, call.attempt, status, reason)
            phase = CallPhase.STOPPED
        self._state.send(call.api.peer, answer)
        self._end(call, phase, now_s, reason, answer=answer)

    def _end(
        self,
        call: Call,
        phase: CallPhase,
        now_s: float,
        why: str,
        *,
        finished: Finished | None = None,
        answer: Rejected | Stop | None = None,
        answered: int | None = None,
    ) -> None:
        """The one way out for a call: nothing of it is left but a row to look at.

        ``answered``: the last attempt that is over, if not the current one; a process
        that was taken for lost may come back and ask anew.
        """
        state = self._state
        if call.phase is CallPhase.QUEUED:
            self._following.recall(call, now_s)
            self.queue.remove(call)
            state.room_changed = True
        left_on = call.prefill if finished is not None and finished.undecoded else call.decode
        began = call.phase is CallPhase.DECODING
        if finished is not None:
            began = finished.output_tokens > 0
        self._release(call, now_s)
        call.move(phase, now_s, why)
        del call.api.calls[call.request]
        del state.calls[call.key]
        state.deadlines.drop(call.deadline_key)
        if call.submit.group:
            self._leave_group(call)
        self._tracker.closed(call, finished, now_s)
        done = finished if phase is CallPhase.FINISHED else None
        self._retention.ended(call, left_on if began else None, done, now_s)
        self._prefetches.ended(call, left_on, done, now_s)
        self.queue.ended(call, finished, now_s)
        if finished is not None and phase is CallPhase.FINISHED:
            self._pace.finished(call, finished)
        if call.plans:
            self._rate.note(now_s)
        state.counters[f"calls_{phase.value}"] += 1
        if phase is CallPhase.GONE and finished is None:
            # Should it be alive after all and still wait for a plan, it must not wait for ever.
            answer = Stop(call.request, call.attempt, 503, why)
        row = call_status(call, now_s, finished, "" if finished else why)
        self.explanations.ended(call, row)
        over = call.attempt if answered is None else answered
        self.recent[call.key] = Ended(row, over, answer)
        while len(self.recent) > state.limits.recent_calls:
            self.recent.popitem(last=False)

    def _leave_group(self, call: Call) -> None:
        key = call.api.name, call.submit.group
        group = self.groups[key]
        group.calls -= 1
        if group.calls == 0:
            del self.groups[key]

    # --- accounts -----------------------------------------------------------------------

    def _phase_s(self, call: Call) -> float:
        """How long a planned call may stay in its phase."""
        limits = self._state.limits
        if call.phase is CallPhase.PULLING:
            # The API process keeps the bound; this is for one that says nothing.
            return limits.pull_s + limits.check_s
        if call.phase is CallPhase.PREFILLING:
            return limits.prefill_s
        if call.phase is CallPhase.LOADING:
            return limits.first_token_s
        return limits.decode_check_s

    def _set_due(self, call: Call, due_s: float) -> None:
        self._state.deadlines.set(call.deadline_key, min(due_s, call.deadline_s))

    def _promise(self, call: Call) -> None:
        """Its prompt counts as held where it is being computed. What an engine has begun with it
        finds for the next request, too."""
        assert call.computing is not None
        prompt_blocks = call.prompt_tokens // self._state.block_size
        uncached_blocks = -(-call.uncached_tokens // self._state.block_size)
        call.promised_from = max(0, prompt_blocks - uncached_blocks)
        self._index.stored(call.computing.name, call.submit.block_hashes)

    def _break_promise(self, call: Call) -> None:
        """It will not be computed there after all, or not be found by others."""
        if call.computing is not None and call.promised_from is not None:
            hashes = call.submit.block_hashes
            self._index.removed(call.computing.name, hashes, call.promised_from)
        call.promised_from = None

    def _computed(self, call: Call, now_s: float | None) -> None:
        """Nobody has the prompt to compute any more: it was computed ``now_s``, or is given up."""
        if call.computing is None:
            return
        if now_s is None:
            self._pace.not_computed(call)
        else:
            self._pace.computed(call, now_s)
        call.computing.prefill_tokens -= call.uncached_tokens
        if call.computing is call.prefill:
            call.prefill.prefilling -= 1
        self._standing.touch(call.computing)
        call.computing = None
        call.promised_from = None
        if self._placer is not None:
            # It may be waiting for just that; the configured policies are not.
            self._state.room_changed = True

    def _release_prefill(self, call: Call) -> None:
        """Give back the room on the prefill worker."""
        self._computed(call, None)
        self._rooms.leave_prefill(call)

    def _release(self, call: Call, now_s: float) -> None:
        """Give back all room; nothing happens if there is none."""
        self._break_promise(call)
        self._following.lead_no_more(call, now_s)
        self._release_prefill(call)
        self._pulls.forgotten(call)
        self._moves.forgotten(call)
        decode = call.decode
        self._rooms.leave_decode(call)
        if decode is not None:
            self._pace.released(call, decode, now_s)

    def _learn(self, call: Call, message: Finished) -> None:
        """Count what happened, and correct the index where it believed too much.

        An engine that lacked what it should have had (its cache is off or under
        pressure) is not trusted to keep it now that it has computed it again.
        """
        counters = self._state.counters
        counters["tokens_prompt"] += call.submit.prompt_tokens
        counters["tokens_output"] += max(0, message.output_tokens)
        counters["tokens_moved"] += max(0, message.moved_tokens)
        counters["tokens_pulled"] += max(0, message.pulled_tokens)
        counters["tokens_cached_local"] += max(0, message.local_cached_tokens)
        counters["tokens_cached_prefill"] += max(0, message.prefill_cached_tokens)
        block_size = self._state.block_size
        if call.decode is not None and block_size and not message.undecoded:
            had_blocks = max(0, message.local_cached_tokens) // block_size
            if had_blocks < call.cached_blocks:
                self._index.removed(call.decode.name, call.submit.block_hashes, had_blocks)


def worker_up(worker: Worker) -> WorkerUp:
    """The message that makes a worker known to an API process."""
    return WorkerUp(
        worker=worker.name,
        incarnation=worker.incarnation,
        role=worker.role,
        data_address=worker.ready.data_address,
        facts=worker.facts,
    )

"""The calls that wait for a plan: who is next, what runs have left to do, which may begin.

Keeps what ``policy.order``, ``policy.fair_queue`` and ``policy.admission`` reckon with, and
changes it as calls come, are planned and end. What an event costs does not grow with the queue,
but for a run's own calls, of which at most ``SIBLINGS_MOST`` are moved.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from itertools import chain

import msgspec

from coordinator.limits import Placement
from coordinator.pace import KEEP, Pace
from coordinator.policy.admission import Gate
from coordinator.policy.fair_queue import FairQueue
from coordinator.policy.order import Effort, Rank, after_s, key_s, own_s
from coordinator.protocol import Finished
from coordinator.state import Call, CallKey, State
from coordinator.workflow.ahead import Remaining
from coordinator.workflow.learner import Learner
from coordinator.workflow.roster import Run

SIBLINGS_MOST = 16
"""Waiting calls of a run whose keys follow what becomes of the others."""
LINGER_S = 30.0
"""How long a run without open calls counts as under way."""
PATIENCE_S = 0.5
"""How long a call of a run that is under way waits for room before there are too many."""
REFRESH_S = 1.0
LOOKS = 8
"""Runs under way that are looked at when somebody asks how many there are."""


class Entry(msgspec.Struct, gc=False):
    """A live call. ``rank``: while it waits, and the last one after that; ``door``: its run
    waits to begin."""

    tenant: str
    run: Run | None
    effort: Effort
    rank: Rank
    since_s: float
    door: bool = False
    wants_room_s: float = 0.0
    """Since when it has waited for room, or for its turn."""
    longest_s: float = 0.0
    """How long it may wait."""
    waits: bool = False
    waited_s: float = 0.0
    served_s: float = 0.0
    """What its tenant had been served when it was planned."""
    waited_for: str = "nothing"
    """Or ``room``, ``others``, ``runs``, ``prefix``."""
    aside: bool = False
    """It waits for what another call brings, not for room."""


class Ordering:
    """All live calls of a core, and which of them wait. ``reckons``: by runs, not by arrival."""

    def __init__(self, state: State, placement: Placement, learner: Learner, pace: Pace) -> None:
        self._state = state
        self._placement = placement
        self._profiles = learner.profiles
        self._pace = pace
        self._remaining = Remaining(learner.profiles)
        self._queue = FairQueue(placement.tenant_weights)
        self.gate = Gate()
        self._reckons = placement.order == "runs" and placement.reserve
        self._gated = placement.admission and placement.reserve
        self._entries: dict[CallKey, Entry] = {}
        self._of_run: dict[Run, dict[CallKey, Call]] = {}
        """Waiting calls of each run."""
        self._left_s: dict[Run, float] = {}
        """What the live calls of each run have left to do, and what these lead to."""
        self._live: dict[Run, int] = {}
        """How many live calls each run has; of one that was cancelled, too."""
        self._active: OrderedDict[Run, None] = OrderedDict()
        """Runs under way, about the longest silent first."""
        self._aside: dict[CallKey, Call] = {}
        self._door: deque[tuple[float, CallKey]] = deque()
        """Calls at the door as they came, gone ones among them."""
        self._typical_s = 0.0
        """What calls that came lately had left; ``_typical_after_s``: after themselves, where that
        was known. ``_opened_calls``, ``_known_calls``: of how many."""
        self._typical_after_s = 0.0
        self._opened_calls = self._known_calls = 0
        self._refreshed_s = float("-inf")

    def __len__(self) -> int:
        return len(self._queue) + len(self._aside)

    def __iter__(self) -> Iterator[Call]:
        return chain(self._queue, self._aside.values())

    def rank(self, call: Call) -> Rank:
        """Of a live call."""
        return self._entries[call.key].rank

    def entry(self, call: Call) -> Entry:
        """Of a live call, for explanations."""
        return self._entries[call.key]

    # --- the queue ------------------------------------------------------------------------

    def push(self, call: Call, now_s: float) -> None:
        """A call waits for a plan, for the first time or again."""
        entry = self._entries.get(call.key)
        if entry is None:
            entry = self._opened(call, now_s)
        entry.since_s, entry.wants_room_s, entry.waited_for = now_s, now_s, "nothing"
        run = entry.run
        entry.door = self._gated and run is not None and not run.begun and call.plans == 0
        entry.longest_s = self._state.limits.queue_s
        if entry.door:
            entry.longest_s += self._state.limits.admission_s
            self._door.append((now_s, call.key))
        if run is not None:
            self._of_run.setdefault(run, {})[call.key] = call
        self._place(call, entry)

    def longest_s(self, call: Call) -> float:
        """How long a call that begins to wait may wait."""
        return self._entries[call.key].longest_s

    def at_door(self, call: Call) -> bool:
        """A waiting call's run has not begun."""
        return self._entries[call.key].door

    def set_aside(self, call: Call) -> None:
        """Who is next waits for what another call brings, and lets others go before it."""
        entry = self._entries[call.key]
        self._queue.remove(entry.tenant, entry.rank, entry.door)
        entry.aside, entry.waited_for = True, "prefix"
        self._aside[call.key] = call

    def recalled(self, call: Call, now_s: float) -> float:
        """It waits where it did before. Until when it may."""
        entry = self._entries[call.key]
        del self._aside[call.key]
        entry.aside, entry.wants_room_s = False, now_s
        self._queue.push(entry.tenant, entry.rank, call, entry.door)
        return entry.since_s + entry.longest_s

    def remove(self, call: Call) -> None:
        """A waiting call is planned, or over; it is not set aside."""
        entry = self._entries[call.key]
        self._queue.remove(entry.tenant, entry.rank, entry.door)
        entry.waits = False
        run = entry.run
        if run is not None:
            waiting = self._of_run[run]
            del waiting[call.key]
            if not waiting:
                del self._of_run[run]

    def first(self, now_s: float) -> Call | None:
        """Who is to be planned next, None if nobody may be now."""
        if not len(self._queue):
            return None
        self._let_in_overdue(now_s)
        call = self._queue.first(door=False)
        if not self._gated or not self._door:
            return call
        if self.gate.opens(self._under_way(now_s), now_s) or self._idle():
            return self._queue.first(door=True)
        return call

    def _idle(self) -> bool:
        """Fewer calls are planned than there are workers: runs that are under way but pause must
        not keep others from workers that have nothing to do."""
        planned = len(self._state.calls) - len(self)
        return planned < len(self._state.workers)

    def blocked(self, call: Call, now_s: float) -> None:
        """Who is next finds no room."""
        entry = self._entries[call.key]
        aside_s = entry.wants_room_s - entry.since_s
        followed = entry.waited_for == "prefix" and now_s - entry.wants_room_s < aside_s
        if entry.waited_for != "runs" and not followed:
            entry.waited_for = "room"
        late = now_s - entry.wants_room_s >= PATIENCE_S
        if self._gated and entry.run is not None and entry.run.begun and late:
            self.gate.crowded(self._under_way(now_s), len(self._state.workers), now_s)

    def preempted(self, now_s: float) -> None:
        """An engine had to take back room from a call."""
        if self._gated:
            self.gate.crowded(self._under_way(now_s), len(self._state.workers), now_s)

    # --- what becomes of calls ------------------------------------------------------------

    def planned(self, call: Call, now_s: float) -> Entry:
        """A call has a plan; it does not wait any more. What was known of it."""
        entry = self._entries[call.key]
        entry.waited_s = now_s - entry.since_s
        if entry.waited_s > 0.0 and entry.waited_for == "nothing":
            entry.waited_for = "runs" if entry.door else "others"
        entry.served_s = self._queue.served_s(entry.tenant)
        if call.plans == 1:
            self._queue.serve(entry.tenant, entry.effort.own_s)
        run = entry.run
        if run is not None and not run.begun:
            run.begun = True
            self._active[run] = None
            for other in list(self._of_run.get(run, {}).values()):
                self._let_in(other)
        return entry

    def ended(self, call: Call, finished: Finished | None, now_s: float) -> None:
        """A call is over, by whatever way; it does not wait any more."""
        entry = self._entries.pop(call.key)
        if finished is not None and call.plans:
            self._queue.serve(entry.tenant, self._took_s(call, finished) - entry.effort.own_s)
        run = entry.run
        if run is None:
            return
        if self._queue.at_door:
            self.gate.served(len(self._active))
        entry_s = entry.effort.own_s + entry.effort.after_s
        if run in self._active:
            self._active.move_to_end(run)
        self._live[run] -= 1
        if self._live[run]:
            self._left_s[run] = max(0.0, self._left_s[run] - entry_s)
            self._move_siblings(run)
        else:
            del self._live[run], self._left_s[run]

    def wasted(self, call: Call, finished: Finished, now_s: float) -> None:
        """What of a call's prompt was computed though its run had it before, and no cache any more:
        to compute what one still has may be the faster way."""
        new_tokens = self._profiles.new_tokens_of("\0".join(call.key))
        if not self._gated or new_tokens is None:
            return
        found = max(finished.prefill_cached_tokens, finished.local_cached_tokens)
        held = max(found, call.held_blocks * self._state.block_size)
        again = call.submit.prompt_tokens - held - new_tokens
        if again > 0:
            seconds = self._pace.speeds.prefill_s(again, held)
            workers = len(self._state.workers)
            self.gate.wasted(seconds, workers, self._under_way(now_s), workers, now_s)

    def tick(self, now_s: float) -> None:
        """Time passed: what is known of workflows is renewed, some milliseconds at a time."""
        if self._reckons and now_s - self._refreshed_s >= REFRESH_S:
            self._refreshed_s = now_s
            self._remaining.refresh()

    def check(self) -> None:
        """Assert that everything agrees with the calls; for tests."""
        self._queue.check()
        calls = self._state.calls
        assert self._entries.keys() == calls.keys()
        waiting = {key for key, entry in self._entries.items() if entry.waits}
        assert waiting == {call.key for call in self}
        assert self._aside.keys() == {key for key in waiting if self._entries[key].aside}
        of_run = {key for runs in self._of_run.values() for key in runs}
        assert of_run == {key for key in waiting if self._entries[key].run is not None}
        live = Counter(entry.run for entry in self._entries.values() if entry.run is not None)
        assert self._live == live
        assert self._left_s.keys() == live.keys()
        assert all(entry.run is calls[key].run for key, entry in self._entries.items())
        doors = {key for _, key in self._door}
        assert {key for key, entry in self._entries.items() if entry.waits and entry.door} <= doors

    # --- reckoning ------------------------------------------------------------------------

    def _opened(self, call: Call, now_s: float) -> Entry:
        run = call.run
        effort = self._effort(call)
        tenant = call.submit.context.tenant if self._placement.fairness else ""
        entry = Entry(tenant, run, effort, (True, 0, 0.0, call.arrival), now_s)
        self._entries[call.key] = entry
        if run is not None:
            self._live[run] = self._live.get(run, 0) + 1
            self._left_s[run] = self._left_s.get(run, 0.0) + effort.own_s + effort.after_s
            if run.begun:
                self._active[run] = None
        return entry

    def _effort(self, call: Call) -> Effort:
        submit, pace, run = call.submit, self._pace, call.run
        prompt_tokens = float(call.prompt_tokens)
        new_tokens = prompt_tokens * (1.0 - pace.reuse)
        own = own_s(pace.speeds, new_tokens, prompt_tokens, pace.expected_tokens(call))
        context = submit.context
        ahead = None
        if run is not None and self._reckons:
            ahead = self._remaining.after(
                context.tenant, context.workflow, context.agent, run.calls
            )
        if context.final:
            after = 0.0
        elif ahead is None:
            after = self._typical_after_s
        else:
            after = after_s(pace.speeds, ahead)
            self._known_calls += 1
            share = max(1.0 - KEEP, 1.0 / self._known_calls)
            self._typical_after_s += share * (after - self._typical_after_s)
        beside = self._left_s.get(run, 0.0) if run is not None else 0.0
        self._opened_calls += 1
        share = max(1.0 - KEEP, 1.0 / self._opened_calls)
        self._typical_s += share * (own + after + beside - self._typical_s)
        return Effort(own, after, beside, ahead is not None)

    def _took_s(self, call: Call, finished: Finished) -> float:
        """What a call took of a worker's time after all."""
        prompt_tokens = call.submit.prompt_tokens
        found = max(finished.prefill_cached_tokens, finished.local_cached_tokens)
        new_tokens = min(max(0, prompt_tokens - found), prompt_tokens)
        output_tokens = max(0, finished.output_tokens)
        return own_s(self._pace.speeds, new_tokens, prompt_tokens, output_tokens)

    def _place(self, call: Call, entry: Entry) -> None:
        placement, submit = self._placement, call.submit
        key = float(call.submitted_s)
        if self._reckons:
            deadline_s = call.deadline_s if submit.deadline_s else None
            key = key_s(key, entry.effort.left_s, self._typical_s, placement.aging_s, deadline_s)
        entry.rank = (call.plans == 0, submit.priority, key, call.arrival)
        entry.waits = True
        self._queue.push(entry.tenant, entry.rank, call, entry.door)

    def _move_siblings(self, run: Run) -> None:
        """One of a run's calls is over: the others are nearer to its end."""
        waiting = self._of_run.get(run)
        if not self._reckons or not waiting or len(waiting) > SIBLINGS_MOST:
            return
        for call in waiting.values():
            entry = self._entries[call.key]
            if entry.aside:
                continue
            own, after, _, known = entry.effort
            beside = max(0.0, self._left_s[run] - own - after)
            entry.effort = Effort(own, after, beside, known)
            self._queue.remove(entry.tenant, entry.rank, entry.door)
            self._place(call, entry)

    # --- the door -------------------------------------------------------------------------

    def _under_way(self, now_s: float) -> int:
        """Runs that have begun, and have calls open or had some lately. One that has not any
        more may be counted for a while."""
        for _ in range(min(LOOKS, len(self._active))):
            run = next(iter(self._active))
            live = run in self._live
            if not live and (run.final or now_s - run.heard_s >= LINGER_S):
                del self._active[run]
            elif live:
                self._active.move_to_end(run)
            else:
                break
        return len(self._active)

    def _let_in(self, call: Call) -> None:
        """A call that waits at the door goes with the others from now on."""
        entry = self._entries[call.key]
        if entry.door:
            self._queue.remove(entry.tenant, entry.rank, door=True)
            entry.door = False
            self._queue.push(entry.tenant, entry.rank, call, door=False)

    def _let_in_overdue(self, now_s: float) -> None:
        longest_s = self._state.limits.admission_s
        while self._door:
            since_s, key = self._door[0]
            entry = self._entries.get(key)
            waits = entry is not None and entry.waits and entry.door
            if waits and now_s - since_s < longest_s:
                return
            self._door.popleft()
            if waits:
                self._let_in(self._state.calls[key])

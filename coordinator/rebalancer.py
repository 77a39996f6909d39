"""Looks at demand and capacity at an interval, and lets workers turn; answers questions about it.

What is decided is said by ``policy.rebalance``, how a worker turns by ``turns``. Here is what both
rest on: what was asked for lately and what is expected, and what workers have been seen to do.

Demand that was seen are means that fade within some seconds. That which is expected counts where
forecasts have been right lately, otherwise what was seen; and so it does where a forecast is no
number that can be. ``future`` stands in for forecasts where the future is known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import exp
from typing import Protocol

import msgspec

from coordinator.limits import Placement, Rebalance
from coordinator.pace import Pace
from coordinator.policy.rebalance import (
    Candidate,
    Capacity,
    Need,
    Situation,
    Verdict,
    decide,
    decode_limits,
    desired,
    sane,
    seen,
    trusted,
)
from coordinator.protocol import (
    AboutRoles,
    DrainWorker,
    SetRebalance,
    ShowRebalance,
    TurnWorker,
    WorkflowAnswer,
)
from coordinator.state import Peer, State, Turn, TurnPhase, Worker
from coordinator.turns import Refusal, Turns
from coordinator.workflow.blend import Interval
from coordinator.workflow.forecast import NAMES
from coordinator.workflow.foresight import Foresight

DEADLINE = ("rebalance",)
SEEN_FADING_S = 10.0
"""How long what was asked for counts as what is asked for."""
CAPACITY_FADING_S = 120.0
PROMPT_GUESS = 4096
CONTEXT_GUESS = 4096.0
BYTES_PER_S = 10e9
"""At which KV is taken to move, to reckon what a turn loses."""


class Future(Protocol):
    """Demand that is known."""

    def need(self, horizon_s: float, now_s: float) -> Need:
        """From now to ``horizon_s`` ahead."""


class Decision(msgspec.Struct, frozen=True):
    """One that was made, or what came of one. ``by``: ``policy`` or ``operator``; ``turns``:
    workers and their new roles."""

    at_s: float
    by: str
    what: str
    reason: str
    prefill: int
    decode: int
    turns: dict[str, str] = {}


class Role(msgspec.Struct, frozen=True):
    """One worker."""

    worker: str
    role: str
    started_role: str
    state: str
    turning: str
    fixed: bool
    since_s: float | None
    """How long it has its role; None since it registered."""


class Shown(msgspec.Struct, frozen=True):
    """All that is known of roles. ``desired``: workers that each role needs, for an autoscaler."""

    settings: Rebalance
    workers: list[Role]
    need: Need
    capacity: Capacity
    verdict: Verdict
    desired: dict[str, int]
    decisions: list[Decision]
    role_flips: int
    turns_undone: int


class Rebalancer:
    """Of one core."""

    def __init__(
        self,
        state: State,
        turns: Turns,
        placement: Placement,
        pace: Pace,
        foresight: Foresight,
        queued: Callable[[], int],
        room: Callable[[str], int],
        future: Future | None = None,
    ) -> None:
        """``queued``: how many calls wait for a plan; ``room``: blocks that a worker's cache takes
        before it forgets any."""
        self._state = state
        self._turns = turns
        self._pace = pace
        self._foresight = foresight
        self._queued = queued
        self._room = room
        self._future = future
        self._by_load = placement.ratio.mode == "reactive"
        self.settings = placement.rebalance
        self._turns.settings = self.settings
        self.decisions: deque[Decision] = deque(maxlen=self.settings.decisions)
        self._looked_s: float | None = None
        self._totals: dict[str, tuple[int, int]] = {}
        """By incarnation: prompt tokens that it was given, tokens that it has generated."""
        self._prefill_per_s = 0.0
        self._decode_per_s = 0.0
        self._prefill_capacity = 0.0
        self._context_tokens = 0.0

    # --- at an interval -----------------------------------------------------------------------

    def watch(self, now_s: float) -> None:
        """A worker registered or is gone, or the settings have changed."""
        wanted = self.settings.mode != "off" and bool(self._state.workers)
        if not wanted:
            self._state.deadlines.drop(DEADLINE)
            self._looked_s = None
        elif self._state.deadlines.get(DEADLINE) is None:
            self._state.deadlines.set(DEADLINE, now_s + self.settings.interval_s)

    def due(self, now_s: float) -> None:
        """Look, decide, let workers turn."""
        self._state.deadlines.set(DEADLINE, now_s + self.settings.interval_s)
        self._foresight.tick(now_s)
        self._observe(now_s)
        verdict = decide(self._situation(now_s), self.settings)
        if not verdict.turns:
            return
        if self.settings.mode == "advisory":
            self._note(now_s, "policy", "advice", verdict.reason, self._roles_of(verdict))
            return
        begun: dict[str, str] = {}
        for name, role in self._roles_of(verdict).items():
            try:
                self._turns.turn(name, role, "policy", verdict.reason, now_s)
            except Refusal as refusal:
                self._note(now_s, "policy", "refused", str(refusal), {name: role})
            else:
                begun[name] = role
        if begun:
            self._note(now_s, "policy", "turn", verdict.reason, begun)

    def ended(self, turn: Turn, now_s: float) -> None:
        """A turn is over."""
        took_s = now_s - turn.began_s
        what = turn.phase.value
        reason = turn.story.lines[-1][2] if turn.story.lines else ""
        if turn.phase is TurnPhase.DONE:
            reason = f"after {took_s:.1f} s: {reason}"
        self._note(now_s, turn.by, what, reason, {turn.worker.name: turn.role or "drained"})

    def _roles_of(self, verdict: Verdict) -> dict[str, str]:
        role = "prefill" if verdict.wanted > verdict.prefill else "decode"
        return dict.fromkeys(verdict.turns, role)

    def _note(self, now_s: float, by: str, what: str, reason: str, turns: dict[str, str]) -> None:
        roles = [worker.role for worker in self._state.workers.values()]
        last = self.decisions[-1] if self.decisions else None
        if last is not None and (last.what, last.turns) == ("advice", turns) and what == "advice":
            # The same advice as before is no news.
            self.decisions.pop()
        self.decisions.append(
            Decision(now_s, by, what, reason, roles.count("prefill"), roles.count("decode"), turns)
        )

    # --- what is seen -------------------------------------------------------------------------

    def _observe(self, now_s: float) -> None:
        """How much was asked for and done since the last look."""
        totals = {
            worker.incarnation: (
                worker.gauge.queued_tokens_total,
                max(0, worker.load.decode_tokens_total),
            )
            for worker in self._state.workers.values()
        }
        last_s, before, self._totals = self._looked_s, self._totals, totals
        self._looked_s = now_s
        if last_s is None or now_s <= last_s:
            return
        passed_s = now_s - last_s
        given = generated = 0
        for incarnation, (prompt_tokens, tokens) in totals.items():
            first = before.get(incarnation)
            if first is not None:
                given += max(0, prompt_tokens - first[0])
                generated += max(0, tokens - first[1])
        weight = 1.0 - exp(-passed_s / SEEN_FADING_S)
        self._prefill_per_s += weight * (given / passed_s - self._prefill_per_s)
        self._decode_per_s += weight * (generated / passed_s - self._decode_per_s)
        self._learn_capacity(passed_s)

    def _learn_capacity(self, passed_s: float) -> None:
        """From what those that prefill for others did, or all if none of them did anything."""
        weight = 1.0 - exp(-passed_s / CAPACITY_FADING_S)
        workers = list(self._state.workers.values())
        own = [worker for worker in workers if worker.role == "prefill"]
        for side in (own, workers):
            rates = [rate for worker in side if (rate := worker.gauge.tokens_per_busy_s)]
            if rates:
                mean = sum(rates) / len(rates)
                change = mean - self._prefill_capacity
                self._prefill_capacity += (weight if self._prefill_capacity else 1.0) * change
                break
        calls = sum(len(worker.decodes) for worker in workers)
        if calls:
            mean = sum(worker.gauge.context_tokens for worker in workers) / calls
            change = mean - self._context_tokens
            self._context_tokens += (weight if self._context_tokens else 1.0) * change

    def capacity(self) -> Capacity:
        """What a worker gives in each role."""
        speeds, block_size = self._pace.speeds, self._state.block_size
        workers = self._state.workers.values()
        prefill = self._prefill_capacity or PROMPT_GUESS / speeds.prefill_s(PROMPT_GUESS, 0)
        blocks = sum(worker.usable_blocks for worker in workers) / max(1, len(workers))
        context_tokens = self._context_tokens or CONTEXT_GUESS
        slots = max((worker.batch_slots for worker in workers), default=1)
        kv_tokens = min(blocks * block_size, slots * context_tokens)
        decode = decode_limits(speeds.step, context_tokens, self.settings.itl_s, kv_tokens)
        return Capacity(prefill, decode, max(1.0, blocks * block_size))

    def need(self, now_s: float) -> Need:
        """What will be asked for over the horizon, as far as anybody knows."""
        horizon_s = self.settings.horizon_s
        if self._future is not None:
            return self._future.need(horizon_s, now_s)
        resident = sum(worker.gauge.context_tokens for worker in self._state.workers.values())
        lately = (self._prefill_per_s, self._decode_per_s, resident)
        forecast, scores = self._foresight.demand(horizon_s, now_s)
        expected = (
            forecast.prefill_tokens_per_s,
            forecast.decode_tokens_per_s,
            forecast.resident_kv_tokens,
        )
        intervals: list[Interval] = []
        sources: list[str] = []
        for name, value, interval in zip(NAMES, lately, expected, strict=True):
            believed = sane(interval) and trusted(scores, name, horizon_s)
            intervals.append(interval if believed else seen(value))
            sources.append("forecast" if believed else "seen")
        prefill, decode, held = intervals
        return Need(prefill, decode, held, sources)

    def _situation(self, now_s: float) -> Situation:
        workers = [worker for worker in self._state.workers.values() if worker.phase.value == "up"]
        movable = [
            self._candidate(worker, now_s) for worker in workers if not self._is_drained(worker)
        ]
        waiting = float(sum(worker.prefill_tokens for worker in workers))
        waiting += self._queued() * self._tokens_per_prompt(workers)
        mixed = sum(worker.role == "mixed" and worker.up for worker in workers)
        return Situation(
            [one for one in movable if one is not None],
            mixed,
            waiting,
            self.need(now_s),
            self.capacity(),
        )

    def _is_drained(self, worker: Worker) -> bool:
        turn = self._turns.live.get(worker.name)
        return turn is not None and turn.role is None

    def _tokens_per_prompt(self, workers: list[Worker]) -> float:
        known = [tokens for worker in workers if (tokens := worker.gauge.tokens_per_prompt)]
        return sum(known) / len(known) if known else 0.0

    def _candidate(self, worker: Worker, now_s: float) -> Candidate | None:
        gauge, speeds = worker.gauge, self._pace.speeds
        if worker.role == "mixed":
            return None
        batch = len(worker.decodes)
        left_s = lost_s = 0.0
        if worker.role == "decode" and batch:
            # The longest of what is left is about what the mean call takes as a whole.
            step_s = speeds.step_s(batch, gauge.context_tokens)
            left_s = gauge.left_tokens / batch * step_s
            # What lives on it is asked for again, and decoded elsewhere then.
            blocks = max(0, worker.facts.kv_blocks - self._room(worker.name))
            size_bytes = blocks * worker.kv_bytes_per_block
            lost_s = self._pace.reuse * size_bytes / BYTES_PER_S
        elif worker.role == "prefill":
            left_s = gauge.reading(now_s)[0]
        settled = now_s - worker.turned_s >= self.settings.dwell_s
        turnable = settled and worker.up and worker.turning is None and not worker.ready.fixed
        return Candidate(worker.name, worker.role, turnable, left_s, lost_s, worker.tokens_max)

    # --- questions ------------------------------------------------------------------------------

    def asked(self, peer: Peer, message: AboutRoles, now_s: float) -> None:
        """Somebody asks; asked again nothing is done twice."""
        try:
            answer = self._answer(message, now_s)
        except Refusal as refusal:
            said = WorkflowAnswer(message.token, refusal.status, problems=[str(refusal)])
        else:
            said = WorkflowAnswer(message.token, 200, msgspec.json.encode(answer))
        self._state.send(peer, said)

    def _answer(self, message: AboutRoles, now_s: float) -> object:
        match message:
            case ShowRebalance():
                return self.shown(now_s)
            case SetRebalance(_, settings):
                self._set(settings, now_s)
                return self.shown(now_s)
            case TurnWorker(_, name, role):
                live = self._turns.live.get(name)
                if live is None or live.role != role:
                    self._turns.turn(name, role, "operator", "asked for", now_s)
                    self._turns.look(now_s)
                return self._one(name, now_s)
            case DrainWorker(_, name, undo):
                if undo:
                    self._turns.undrain(name, now_s)
                else:
                    self._turns.drain(name, "operator", "asked for", now_s)
                    self._turns.look(now_s)
                return self._one(name, now_s)

    def _set(self, changes: bytes, now_s: float) -> None:
        """Take over settings. Refusal if they make no sense, with nothing changed."""
        try:
            given = msgspec.json.decode(changes, type=dict[str, object])
            known = msgspec.structs.asdict(self.settings)
            settings = msgspec.convert(known | given, Rebalance)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Refusal(422, str(error)) from error
        if settings.mode == "auto" and self._by_load:
            reason = "placement.ratio turns workers already (reactive): one of them can"
            raise Refusal(409, reason)
        if settings != self.settings:
            self.settings = self._turns.settings = settings
            self.decisions = deque(self.decisions, maxlen=settings.decisions)
            self._note(now_s, "operator", "settings", f"mode {settings.mode}", {})
            self.watch(now_s)
            for worker in self._state.workers.values():
                if worker.turning is None:
                    self._turns.registered(worker)

    def shown(self, now_s: float) -> Shown:
        """All that is known of roles."""
        situation = self._situation(now_s)
        workers = sorted(self._state.workers)
        return Shown(
            settings=self.settings,
            workers=[self._one(name, now_s) for name in workers],
            need=situation.need,
            capacity=situation.capacity,
            verdict=decide(situation, self.settings),
            desired=desired(situation.need, situation.capacity),
            decisions=list(self.decisions),
            role_flips=self._state.counters["role_flips"],
            turns_undone=self._state.counters["turns_undone"],
        )

    def _one(self, name: str, now_s: float) -> Role:
        worker = self._state.workers[name]
        since_s = now_s - worker.turned_s
        return Role(
            worker=name,
            role=worker.role,
            started_role=worker.started_role,
            state=worker.phase.value,
            turning=worker.turning.value if worker.turning is not None else "",
            fixed=worker.ready.fixed or worker.role == "mixed",
            since_s=since_s if since_s < float("inf") else None,
        )

    def check(self) -> None:
        """Assert that somebody will look again iff somebody is to."""
        watching = self.settings.mode != "off" and bool(self._state.workers)
        assert (self._state.deadlines.get(DEADLINE) is not None) == watching
        assert len(self.decisions) <= self.settings.decisions
        assert len(self._totals) <= len(self._state.workers) + self._state.limits.workers

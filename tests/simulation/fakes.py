"""Workers, API processes and a network, faithful enough to try the core against.

They speak the real protocol to the real core and one word of their own to each other
(``Token``), in virtual time. A ``World`` holds them together with every letter that is
under way, and an ``Oracle`` that knows the truth from outside of the core: who made which
handle, what API processes really said, and which workers they were told are gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from coordinator.core import Core, Send
from coordinator.limits import Limits, Placement
from coordinator.protocol import (
    Abort,
    Alive,
    ApiBeat,
    Beat,
    CallContext,
    Check,
    Checked,
    CheckedPhase,
    Decode,
    Draining,
    EngineFacts,
    Errand,
    ErrandDone,
    Failed,
    Finished,
    Hello,
    Leaving,
    Load,
    Move,
    MoveDeclined,
    MoveReady,
    Placed,
    Plan,
    Prefill,
    PrefillDone,
    Prefilled,
    Probe,
    Probed,
    ProbeFinished,
    ProbeRead,
    Pulled,
    Ready,
    Refused,
    Rejected,
    Role,
    RoleSet,
    SetRole,
    Started,
    Stop,
    Submit,
    Unknown,
    Welcome,
    WorkerGone,
    WorkerUp,
    pull_attempt,
)

CORE = "core"
BLOCK_SIZE = 4
FACTS = EngineFacts("0.32", "model", "fingerprint", BLOCK_SIZE, 64, 200, 8, 64)
PREFILL_TIME_S = 0.6
LOAD_TIME_S = 0.3
TOKEN_TIME_S = 0.3
REPEAT_S = 1.0
HISTORY_LETTERS = 32
PULL_TIME_S = 1.0
MOVE_TIME_S = 0.5
MOVE_BOUND_S = 3.0
FOUND = (0, 4, 40)
"""How many tokens a peer has of what it is asked for, by the length of the request's id."""
NOBODY = CallContext()
MakeCore = Callable[[Limits, Placement, str], Core]

ABOUT_ATTEMPTS = (
    Pulled,
    Prefilled,
    Started,
    Finished,
    Failed,
    Checked,
    MoveReady,
    MoveDeclined,
)
Attempt = tuple[str, int]
"""Request and attempt."""


@dataclass(frozen=True)
class Token:
    """A worker made token number ``index`` (from 0, over all attempts)."""

    request: str
    attempt: int
    index: int
    last: bool


@dataclass(frozen=True)
class Letter:
    """A message under way between two addresses."""

    source: str
    target: str
    message: Any


@dataclass(frozen=True)
class DecodeWithPrompt:
    """``Decode`` and what the frames behind it hold: a prompt that ends in ``generated`` tokens
    of the answer."""

    decode: Decode
    generated: int

    @property
    def incarnation(self) -> str:
        """Of the worker it is meant for."""
        return self.decode.incarnation


Out = list[tuple[str, object]]
"""What somebody sends: targets and messages."""


def address(placed: Placed) -> str:
    """Where a worker's incarnation gets its letters."""
    return f"{placed.worker}#{placed.incarnation}"


def make_handle(maker: str, incarnation: str, request: str, attempt: int) -> bytes:
    """A handle that names its maker and whose KV it is."""
    return "|".join((maker, incarnation, request, str(attempt))).encode()


def output_tokens(request: str) -> int:
    """How many tokens a call generates; its request id says it."""
    return int(request.rpartition("-")[2])


@dataclass
class Job:
    """An attempt that a worker decodes."""

    api: str
    next_index: int
    due_s: float


class FakeWorker:
    """One incarnation of a worker."""

    def __init__(self, name: str, incarnation: str, role: Role, beat_s: float) -> None:
        self.name, self.incarnation, self.role = name, incarnation, role
        self.address = f"{name}#{incarnation}"
        self.beat_s = beat_s
        self.welcome = False
        self.refused = ""
        self.said_s = float("-inf")
        self.prefills: dict[Attempt, tuple[str, float]] = {}
        self.jobs: dict[Attempt, Job] = {}
        self.handles_read: list[tuple[bytes, Attempt]] = []
        self.probes_read: list[ProbeRead] = []
        self.roles_set: list[SetRole] = []
        self.stubborn = False
        """Its engine does not take another role."""

    def leave(self) -> Out:
        """Say goodbye."""
        return [(CORE, Leaving(self.name, self.incarnation))]

    def drain(self) -> Out:
        """Say that it will leave."""
        return [(CORE, Draining(self.name, self.incarnation))]

    def tick(self, now_s: float) -> Out:
        """What it has to say as time passes."""
        out: Out = []
        if not self.refused and now_s >= self.said_s + self.beat_s:
            self.said_s = now_s
            load = Load(running=len(self.jobs))
            beat = Beat(self.name, self.incarnation, load)
            out.append((CORE, beat if self.welcome else self._ready()))
        for (request, attempt), (api, due_s) in list(self.prefills.items()):
            if now_s >= due_s:
                del self.prefills[request, attempt]
                handle = make_handle(self.name, self.incarnation, request, attempt)
                cached = FOUND[len(request) % len(FOUND)] if attempt < 0 else 0
                done = PrefillDone(request, attempt, self.incarnation, handle, 1, cached, 30.0)
                out.append((api, done))
        for (request, attempt), job in list(self.jobs.items()):
            if now_s >= job.due_s:
                last = job.next_index + 1 >= output_tokens(request)
                out.append((job.api, Token(request, attempt, job.next_index, last)))
                job.next_index += 1
                job.due_s = now_s + TOKEN_TIME_S
                if last:
                    del self.jobs[request, attempt]
        return out

    def receive(self, source: str, message: object, now_s: float) -> Out:
        """React to a letter; what is meant for another incarnation is not for it."""
        if getattr(message, "incarnation", self.incarnation) != self.incarnation:
            return []
        match message:
            case Welcome():
                self.welcome = True
            case Refused():
                self.refused = message.reason
            case Unknown():
                self.welcome, self.said_s = False, now_s
                return [(CORE, self._ready())]
            case Probe():
                handle = make_handle(self.name, self.incarnation, "probe", message.probe)
                return [(CORE, Probed(self.name, self.incarnation, message.probe, handle))]
            case ProbeRead():
                self.probes_read.append(message)
                return [(CORE, ProbeFinished(self.name, self.incarnation, message.probe, 0.1, 8))]
            case SetRole():
                self.roles_set.append(message)
                error = "it can't" if self.stubborn else ""
                return [(CORE, RoleSet(self.name, self.incarnation, message.turn, error))]
            case _:
                self._work(source, message, now_s)
        return []

    def _work(self, source: str, message: object, now_s: float) -> None:
        match message:
            case Prefill():
                if message.handle:
                    self.handles_read.append((message.handle, (message.request, message.attempt)))
                self.prefills[message.request, message.attempt] = source, now_s + PREFILL_TIME_S
            case DecodeWithPrompt(decode, generated):
                key = decode.request, decode.attempt
                if decode.handle:
                    self.handles_read.append((decode.handle, key))
                self.jobs[key] = Job(source, generated, now_s + LOAD_TIME_S)
            case Abort():
                for request, attempt in message.calls:
                    self.prefills.pop((request, attempt), None)
                    self.jobs.pop((request, attempt), None)
            case _:
                pass

    def _ready(self) -> Ready:
        return Ready(self.name, self.incarnation, self.role, f"tcp://{self.name}", FACTS)


@dataclass
class FakeCall:
    """A call as its API process sees it; while ``waiting`` it repeats what it asks."""

    submit: Submit
    opened_s: float
    asked_s: float
    state: str = "waiting"
    attempt: int = 1
    plan: Plan | None = None
    generated: int = 0
    failed: Failed | None = None
    pull_due_s: float = 0.0
    move: Move | None = None
    move_due_s: float = 0.0
    move_end_s: float = 0.0
    move_number: int = 0

    @property
    def asking(self) -> Submit | Failed:
        """What it says until a plan comes."""
        if self.failed is not None:
            return self.failed
        return msgspec.structs.replace(self.submit, attempt=self.attempt)


class FakeApi:
    """One API process. It gives a call up by itself only long after the core should have."""

    def __init__(self, name: str, beat_s: float, call_s: float) -> None:
        self.name = self.address = name
        self.beat_s = beat_s
        self.patience_s = 1.2 * call_s
        self.welcome = False
        self.core = ""
        self.said_s = self.heard_s = float("-inf")
        self.workers: dict[str, str] = {}
        self.calls: dict[str, FakeCall] = {}
        self.ends: dict[str, list[str]] = {}

    def open(self, submit: Submit, now_s: float) -> Out:
        """A client asks for something."""
        self.calls[submit.request] = FakeCall(submit, now_s, now_s)
        self.ends[submit.request] = []
        return [(CORE, submit)]

    def abort(self, request: str) -> Out:
        """The client goes away."""
        return self._end(self.calls[request], "abort", "aborted")

    def give_up(self, request: str, now_s: float) -> Out:
        """A worker could not; nothing happens to a call that has no plan to fail."""
        call = self.calls[request]
        if call.plan is None or call.state == "waiting":
            return []
        return self._fail(call, call.plan.decode.worker, now_s)

    def tick(self, now_s: float) -> Out:
        """What it has to say as time passes."""
        out: Out = []
        if now_s >= self.said_s + self.beat_s:
            self.said_s = now_s
            beat = ApiBeat(self.name, len(self.calls))
            out.append((CORE, beat if self.welcome else Hello(self.name)))
        for call in self.calls.values():
            if call.state == "waiting" and now_s >= call.asked_s + REPEAT_S:
                call.asked_s = now_s
                out.append((CORE, call.asking))
        for call in self.calls.values():
            if call.move is not None and now_s >= call.move_due_s:
                out.append((CORE, self._move_over(call, call.move, now_s)))
        for call in list(self.calls.values()):
            if call.state == "pulling" and now_s >= call.pull_due_s:
                out += [*self._abort_attempt(call), *self._pulled(call, b"", 0)]
            if now_s >= call.opened_s + self.patience_s:
                out += self._end(call, "error", "timeout")
        return out

    def receive(self, source: str, message: object, now_s: float) -> Out:
        """React to a letter."""
        out: Out = []
        match message:
            case Welcome():
                self._welcomed(message.core)
            case Alive():
                self.heard_s = now_s
            case Unknown():
                self.welcome, self.said_s = False, now_s
                out = [(CORE, Hello(self.name))]
            case WorkerUp():
                self.workers[message.worker] = message.incarnation
            case WorkerGone():
                out = self._worker_gone(message, now_s)
            case Plan():
                out = self._planned(message, now_s)
            case Rejected() | Stop():
                call = self.calls.get(message.request)
                if call is not None:
                    out = self._end(call, "error", f"{type(message).__name__} {message.status}")
            case Check():
                out = self._where(message)
            case _:
                out = self._worked(message, now_s)
        return out

    def _move(self, order: Move, now_s: float) -> Out:
        """Begin to bring a running call's KV elsewhere; one call in three can't be moved."""
        call = self.calls.get(order.request)
        if call is None or order.attempt != call.attempt or order.number <= call.move_number:
            return []
        call.move_number, call.move = order.number, None
        if call.state != "decoding" or len(order.request) % 3 == 0:
            return [(CORE, self._declined(order, for_good=call.state == "decoding"))]
        call.move = order
        call.move_due_s, call.move_end_s = now_s + MOVE_TIME_S, now_s + MOVE_BOUND_S
        return []

    def _declined(self, order: Move, for_good: bool = False) -> MoveDeclined:
        request, attempt, number = order.request, order.attempt, order.number
        return MoveDeclined(self.name, request, attempt, number, "no", for_good)

    def _move_over(self, call: FakeCall, order: Move, now_s: float) -> MoveReady | MoveDeclined:
        """Its KV is there: the plan may come; some time later it is not waited for any more."""
        if now_s >= call.move_end_s:
            call.move = None
            return self._declined(order)
        call.move_due_s = now_s + REPEAT_S
        tokens = call.submit.prompt_tokens + call.generated
        request, attempt, number = order.request, order.attempt, order.number
        return MoveReady(self.name, request, attempt, number, tokens, call.generated)

    def _worked(self, message: object, now_s: float) -> Out:
        match message:
            case Move():
                return self._move(message, now_s)
            case PrefillDone():
                return self._prefill_done(message)
            case Token():
                return self._token(message)
            case Errand():
                done = ErrandDone(self.name, message.errand, "done", 1, 0.1, message.tokens)
                return [(CORE, done)]
            case _:
                return []

    def _welcomed(self, core: str) -> None:
        """Another core knows nothing of failures: it is asked for the next attempt anew."""
        restarted = bool(self.core) and core != self.core
        self.welcome, self.core = True, core
        for call in self.calls.values():
            if restarted:
                call.move, call.move_number = None, 0
            if restarted and call.failed is not None:
                call.attempt += 1
                call.failed = None

    def _worker_gone(self, message: WorkerGone, now_s: float) -> Out:
        out: Out = []
        gone = Placed(message.worker, message.incarnation)
        for call in self.calls.values():
            if call.state == "pulling" and call.plan and call.plan.pull_worker == gone:
                out += self._pulled(call, b"", 0)
        if self.workers.get(gone.worker) == gone.incarnation:
            del self.workers[gone.worker]
        for call in self.calls.values():
            if call.move is not None and call.move.target == gone:
                out.append((CORE, self._declined(call.move)))
                call.move = None
        for call in self.calls.values():
            if call.plan is None or call.state == "waiting":
                continue
            before = call.state in ("pulling", "prefilling")
            prefilling = before and call.plan.prefill == gone
            if prefilling or call.plan.decode == gone:
                out += self._fail(call, gone.worker, now_s)
        return out

    def _planned(self, plan: Plan, now_s: float) -> Out:
        call = self.calls.get(plan.request)
        if call is None or plan.attempt < call.attempt + (call.failed is not None):
            return []
        if call.state != "waiting" and plan.attempt == call.attempt:
            return []
        out = self._abort_attempt(call)
        call.plan, call.attempt, call.failed = plan, plan.attempt, None
        for placed in (plan.decode, plan.prefill):
            if placed is not None and self.workers.get(placed.worker) != placed.incarnation:
                return out + self._fail(call, placed.worker, now_s)
        if plan.pull_worker is not None:
            call.state, call.pull_due_s = "pulling", now_s + PULL_TIME_S
            side = pull_attempt(plan.attempt)
            peer = plan.pull_worker
            ask = Prefill(plan.request, side, peer.incarnation, cached_only=True)
            out.append((address(peer), ask))
        else:
            out.append(self._compute(call, plan, b""))
        return out

    def _compute(self, call: FakeCall, plan: Plan, handle: bytes) -> tuple[str, object]:
        if plan.prefill is None:
            return self._decode(call, plan, handle)
        call.state = "prefilling"
        incarnation = plan.prefill.incarnation
        prefill = Prefill(plan.request, plan.attempt, incarnation, handle=handle)
        return address(plan.prefill), prefill

    def _pulled(self, call: FakeCall, handle: bytes, tokens: int, missing: bool = False) -> Out:
        assert call.plan is not None
        pulled = Pulled(self.name, call.submit.request, call.attempt, tokens, missing)
        return [self._compute(call, call.plan, handle), (CORE, pulled)]

    def _decode(self, call: FakeCall, plan: Plan, handle: bytes) -> tuple[str, object]:
        call.state = "loading"
        incarnation = plan.decode.incarnation
        decode = Decode(plan.request, call.attempt, incarnation, handle)
        return address(plan.decode), DecodeWithPrompt(decode, call.generated)

    def _prefill_done(self, message: PrefillDone) -> Out:
        call = self.calls.get(message.request)
        if call is not None and message.attempt == pull_attempt(call.attempt):
            if call.state != "pulling":
                return []
            tokens = message.cached_tokens
            handle = message.handle if tokens else b""
            return self._pulled(call, handle, tokens, missing=tokens < max(FOUND))
        if call is None or call.attempt != message.attempt or call.state != "prefilling":
            return []
        assert call.plan is not None
        prefilled = Prefilled(self.name, message.request, message.attempt)
        return [(CORE, prefilled), self._decode(call, call.plan, message.handle)]

    def _token(self, token: Token) -> Out:
        call = self.calls.get(token.request)
        if call is None or call.attempt != token.attempt:
            return []
        out: Out = []
        if call.state == "loading":
            call.state = "decoding"
            out.append((CORE, Started(self.name, token.request, token.attempt)))
        if call.state == "decoding":
            call.generated = max(call.generated, token.index + 1)
            if token.last:
                out += self._end(call, "length", "finished")
        return out

    def _fail(self, call: FakeCall, worker: str, now_s: float) -> Out:
        out = self._abort_attempt(call)
        call.state, call.asked_s = "waiting", now_s
        request = call.submit.request
        call.failed = Failed(self.name, request, call.attempt, worker, "gone", call.generated)
        return [*out, (CORE, call.failed)]

    def _abort_attempt(self, call: FakeCall) -> Out:
        call.move = None
        if call.plan is None or call.state == "waiting":
            return []
        abort = Abort([(call.submit.request, call.attempt)])
        if call.state == "pulling" and call.plan.pull_worker is not None:
            side = call.submit.request, pull_attempt(call.attempt)
            return [(address(call.plan.pull_worker), Abort([side]))]
        placed = call.plan.decode
        if call.state == "prefilling" and call.plan.prefill is not None:
            placed = call.plan.prefill
        return [(address(placed), abort)]

    def _where(self, check: Check) -> Out:
        call = self.calls.get(check.request)
        if call is None:
            return [(CORE, Checked(self.name, check.request, check.attempt, "gone"))]
        if call.state == "waiting":
            return [(CORE, call.asking)]
        phases: dict[str, CheckedPhase] = {
            "pulling": "pulling",
            "prefilling": "prefilling",
            "loading": "loading",
            "decoding": "decoding",
        }
        return [(CORE, Checked(self.name, check.request, call.attempt, phases[call.state]))]

    def _end(self, call: FakeCall, outcome: str, how: str) -> Out:
        request = call.submit.request
        out = self._abort_attempt(call)
        del self.calls[request]
        self.ends[request].append(how)
        finished = Finished(self.name, request, call.attempt, outcome, call.generated)
        return [*out, (CORE, finished)]


@dataclass
class Oracle:
    """What is true, from outside of the core."""

    pulled: set[Attempt] = field(default_factory=set)
    prefilled: set[Attempt] = field(default_factory=set)
    started: set[Attempt] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    asked: set[tuple[str, int, str]] = field(default_factory=set)
    """(worker's address, probe, ``Probe`` or ``ProbeRead``): what the core asked whom."""
    moves: int = 0
    """Running calls that the core wanted elsewhere."""
    gone: set[tuple[str, str, str]] = field(default_factory=set)
    """(API process, worker, incarnation): the core told the one that the other is gone."""

    def said(self, message: object) -> None:
        """An API process itself sent this; impostors do not count."""
        match message:
            case Pulled() | Checked(phase="prefilling"):
                self.pulled.add((message.request, message.attempt))
            case Prefilled():
                self.prefilled.add((message.request, message.attempt))
            case Started():
                self.started.add((message.request, message.attempt))
            case Checked(phase="loading"):
                self.prefilled.add((message.request, message.attempt))
            case Checked(phase="decoding"):
                self.started.add((message.request, message.attempt))
            case Finished():
                self.ended.add(message.request)
            case _:
                pass

    def told(self, peer: str, message: object) -> None:
        """The core sent this."""
        match message:
            case Probe() | ProbeRead():
                self.asked.add((peer, message.probe, type(message).__name__))
            case WorkerGone():
                self.gone.add((peer, message.worker, message.incarnation))
            case WorkerUp():
                self.gone.discard((peer, message.worker, message.incarnation))
            case Move():
                lost = (peer, message.target.worker, message.target.incarnation) in self.gone
                assert not lost, f"{message} names a worker that is gone"
                self.moves += 1
            case Plan():
                for placed in (message.decode, message.prefill, message.pull_worker):
                    if placed is not None:
                        lost = (peer, placed.worker, placed.incarnation) in self.gone
                        assert not lost, f"{message} names a worker that is gone"
            case _:
                pass

    def check(self, world: World) -> None:
        """The core believes nothing that was not said, and nobody holds what is not theirs."""
        snapshot = world.core.snapshot(0, world.now_s)
        for status in snapshot.workers:
            worker = world.workers.get(f"{status.worker}#{status.incarnation}")
            if worker is not None:
                sources = {probe.source for probe in worker.probes_read}
                assert status.warm_peers <= len(sources), f"{status} has read only from {sources}"
        for row in snapshot.calls:
            attempt = row.request, row.attempt
            if row.phase == "decoding":
                assert attempt in self.started, f"{attempt} never started"
            elif row.pull and row.phase in ("prefilling", "loading"):
                said = self.pulled | self.prefilled | self.started
                assert attempt in said, f"{attempt} is past its pull"
            elif row.phase == "loading" and row.prefill:
                assert attempt in self.prefilled | self.started, f"{attempt} was never prefilled"
            elif row.phase in ("finished", "cancelled", "failed"):
                assert row.request in self.ended, f"{row.request} never ended"
        for worker in world.workers.values():
            self._check_handles(worker)

    def _check_handles(self, worker: FakeWorker) -> None:
        met = {tuple(probe.handle.decode().split("|")[:2]) for probe in worker.probes_read}
        for handle, (request, number) in worker.handles_read:
            *maker, holder_request, holder_number = handle.decode().split("|")
            owner = holder_request, holder_number
            assert owner in (
                (request, str(number)),
                (request, str(pull_attempt(number))),
            ), f"{request} holds {handle!r}"
            assert tuple(maker) in met, f"{worker.address} would refuse {handle!r}"
        for probe in worker.probes_read:
            maker, _, what, number_text = probe.handle.decode().split("|")
            expected = (probe.source, "probe", str(probe.probe))
            assert (maker, what, number_text) == expected, f"{probe} holds another's handle"


class World:
    """The core, everybody around it, and the letters under way."""

    alike_every = 4

    def __init__(self, limits: Limits, placement: Placement, make_core: MakeCore = Core) -> None:
        self.limits, self.placement, self.make_core = limits, placement, make_core
        self.now_s = 0.0
        self.cores = 0
        self.restart_core()
        self.workers: dict[str, FakeWorker] = {}
        self.apis: dict[str, FakeApi] = {}
        self.letters: list[Letter] = []
        self.history: deque[Letter] = deque(maxlen=HISTORY_LETTERS)
        self.oracle = Oracle()
        self.requests = 0
        self.incarnations = 0

    def restart_core(self) -> None:
        """The core dies and another takes its address; all that it knew is lost."""
        self.cores += 1
        self.core = self.make_core(self.limits, self.placement, f"core-{self.cores}")

    def start_worker(self, name: str, role: Role) -> FakeWorker:
        """A new incarnation of a worker; the one before it, if any, has crashed."""
        self.crash_worker(name)
        self.incarnations += 1
        worker = FakeWorker(name, str(self.incarnations), role, self.limits.beat_s)
        self.workers[worker.address] = worker
        self.emit(worker.address, worker.tick(self.now_s))
        return worker

    def crash_worker(self, name: str) -> None:
        """It is gone without a word; what it sent before is still under way."""
        for worker in list(self.workers.values()):
            if worker.name == name:
                del self.workers[worker.address]

    def start_api(self) -> FakeApi:
        """A new API process."""
        self.incarnations += 1
        api = FakeApi(f"api-{self.incarnations}", self.limits.beat_s, self.limits.call_s)
        self.apis[api.address] = api
        self.emit(api.address, api.tick(self.now_s))
        return api

    def submit(
        self,
        api: FakeApi,
        prompt_tokens: int,
        output_tokens: int,
        group: str = "",
        context: CallContext = NOBODY,
    ) -> str:
        """A client of an API process asks for something; the request's id.

        The prompts of one call in ``alike_every`` begin alike. All calls belong to one of three
        runs.
        """
        self.requests += 1
        family = self.requests % self.alike_every and self.requests
        submit = Submit(
            api=api.name,
            request=f"call-{self.requests}-{output_tokens}",
            attempt=1,
            prompt_tokens=prompt_tokens,
            max_output_tokens=output_tokens,
            block_hashes=b"".join(
                (family * 1000 + block).to_bytes(8, "little")
                for block in range(prompt_tokens // BLOCK_SIZE)
            ),
            aggregated=bool(group),
            group=group,
            context=context
            if context is not NOBODY
            else CallContext("workflow", f"run-{self.requests % 3}"),
        )
        self.emit(api.address, api.open(submit, self.now_s))
        return submit.request

    def emit(self, source: str, out: Out) -> None:
        """Letters on their way, from somebody who speaks for himself."""
        for target, message in out:
            letter = Letter(source, target, message)
            if source in self.apis:
                self.oracle.said(message)
                if isinstance(message, ABOUT_ATTEMPTS):
                    self.history.append(letter)
            self.letters.append(letter)

    def deliver(self, letter: Letter) -> None:
        """A letter arrives; nobody is there for those to the dead."""
        if letter.target == CORE:
            peer = letter.source.encode()
            self._sent(self.core.handle(peer, letter.message, self.now_s))
            return
        receiver = self.workers.get(letter.target) or self.apis.get(letter.target)
        if receiver is not None:
            out = receiver.receive(letter.source, letter.message, self.now_s)
            self.emit(letter.target, out)

    def deliver_all(self) -> None:
        """Everything that is under way arrives, in order; answers stay under way."""
        letters, self.letters = self.letters, []
        for letter in letters:
            self.deliver(letter)

    def advance(self, elapsed_s: float) -> None:
        """Time passes for everybody."""
        self.now_s += elapsed_s
        everybody: list[FakeWorker | FakeApi] = [*self.workers.values(), *self.apis.values()]
        for someone in everybody:
            self.emit(someone.address, someone.tick(self.now_s))
        due_s = self.core.next_deadline_s()
        if due_s is not None and due_s <= self.now_s:
            self._sent(self.core.tick(self.now_s))

    def check(self) -> None:
        """The core's own invariants, and the oracle's."""
        self.core.check()
        self.oracle.check(self)

    def settle(self) -> None:
        """No more faults: everything is delivered until nothing of any call is left."""
        give_up_s = self.now_s + 2 * self.limits.call_s
        while self._busy() and self.now_s < give_up_s:
            self.deliver_all()
            self.advance(0.25)
        self.check()

    def assert_quiet(self) -> None:
        """Every call had one end that its API process saw, and nothing is left of any."""
        snapshot = self.core.snapshot(0, self.now_s)
        assert (snapshot.queued, snapshot.active) == (0, 0), snapshot.calls
        for row in snapshot.workers:
            assert (row.calls, row.handles, row.kv_blocks_reserved) == (0, 0, 0), row
        for api in self.apis.values():
            assert not api.calls, f"never ended: {api.calls}"
            for request, ends in api.ends.items():
                assert len(ends) == 1, f"{request} ended {ends}"

    def ends(self) -> Iterable[str]:
        """How calls ended, of the API processes that live."""
        return (end for api in self.apis.values() for ends in api.ends.values() for end in ends)

    def _busy(self) -> bool:
        snapshot = self.core.snapshot(0, self.now_s)
        open_calls = any(api.calls for api in self.apis.values())
        return bool(open_calls or snapshot.queued or snapshot.active)

    def _sent(self, sends: list[Send]) -> None:
        for send in sends:
            peer = send.peer.decode()
            self.oracle.told(peer, send.message)
            self.letters.append(Letter(CORE, peer, send.message))

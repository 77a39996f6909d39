"""The coordinator's brain: messages and time in, messages out.

``handle`` takes what a peer said, ``tick`` the passing of time; both return what the
shell is to send, and nothing else comes of them. No I/O, no clock, no randomness, no
logging: the live server, the simulator and the tests drive the same object, and equal
inputs give equal outputs.

Here is membership: who the workers and API processes are, which of them still live, and
who may speak for whom. The calls themselves are in ``calls``, the warm-up of worker
pairs in ``pairs``, what is known of workflows in ``workflow``, choices in ``policy``. A
shell handles the messages that have already arrived before it ticks, or a pause of its own
would look like the silence of all others.

Soft state only: after a restart peers are told ``Unknown`` and introduce themselves again.
Except for workflows: what is declared of them is answered when the shell has written it down.
"""

from __future__ import annotations

import itertools
import zlib
from collections import OrderedDict
from collections.abc import Callable

import msgspec

from coordinator.calls import Calls, worker_up
from coordinator.errands import Errands
from coordinator.invariants import check_all
from coordinator.kv_index import KvIndex
from coordinator.kv_sync import KvSync
from coordinator.limits import Limits, Placement
from coordinator.pace import Pace
from coordinator.pairs import Pairs
from coordinator.policy.placer import Placer
from coordinator.prefetching import Prefetches
from coordinator.protocol import (
    PROTOCOL_VERSION,
    Alive,
    ApiBeat,
    ApiToCore,
    Beat,
    CancelRun,
    Checked,
    DeclareWorkflow,
    Draining,
    DrainWorker,
    DropWorkflow,
    EndRun,
    ErrandDone,
    Failed,
    Finished,
    Hello,
    ImportWorkflow,
    Inspect,
    KvChanges,
    Leaving,
    ListWorkflows,
    MoveCalls,
    MoveDeclined,
    MoveReady,
    Prefilled,
    Probed,
    ProbeFinished,
    Pulled,
    Ready,
    Refused,
    Role,
    RoleSet,
    SetRebalance,
    ShowCall,
    ShowFigures,
    ShowForecast,
    ShowRebalance,
    ShowWorkflow,
    Snapshot,
    Started,
    StartRun,
    StaticPrefixes,
    Submit,
    ToCore,
    TurnWorker,
    Unknown,
    Welcome,
    WorkerGone,
    WorkerToCore,
    WorkflowAnswer,
)
from coordinator.rebalancer import Future, Rebalancer
from coordinator.retention import Retention
from coordinator.roles import Roles
from coordinator.speeds import Speeds
from coordinator.standing import Standing
from coordinator.state import Api, Peer, Send, State, Turn, Worker, WorkerPhase
from coordinator.turns import Turns
from coordinator.view import call_status, link_status, run_status, worker_status
from coordinator.workflow.desk import Desk
from coordinator.workflow.foresight import Foresight
from coordinator.workflow.graph import Graph, GraphError
from coordinator.workflow.keeping import Kept, Save
from coordinator.workflow.learner import Learner
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.prediction import RunKey
from coordinator.workflow.profiles import Profiles
from coordinator.workflow.registry import Registry
from coordinator.workflow.roster import RunEnd
from coordinator.workflow.tracker import REFUSALS, Tracker

__all__ = ["Core", "Peer", "Send"]

SUSPECT_BEATS = 2
"""Beats a worker may miss before it gets no new calls."""

LIVE_CALLS_SHOWN = 256
LINKS_SHOWN = 1024
RUNS_SHOWN = 64

PROBE_BITS = 20
"""Room for the probes of one core between those of two cores."""


class Core:
    """One cluster's coordinator."""

    def __init__(
        self,
        limits: Limits,
        placement: Placement,
        core_id: str,
        model: str = "",
        model_fingerprint: str = "",
        vllm_version: str = "",
        placer: Placer | None = None,
        workflow_limits: WorkflowLimits | None = None,
        keeps: bool = False,
        epoch_s: float = 0.0,
        profiles: Profiles | None = None,
        future: Future | None = None,
    ) -> None:
        """``model*`` and ``vllm_version``: what workers must have; if empty the first sets it.

        ``placer`` decides in place of the policy that ``placement`` names; ``future`` is asked for
        demand in place of forecasts. ``keeps``: the shell
        writes down what it can take, and says so; ``epoch_s``: what to add to its times for
        them to go on from those of an earlier core. ``profiles``: who predicts, if not the usual.
        """
        self.core_id = core_id
        self.model = model
        self._model_fingerprint = model_fingerprint
        self._vllm_version = vllm_version
        self._limits = limits
        self._headroom_fraction = placement.kv_headroom_fraction
        self._started_s: float | None = None
        self._state = State(limits)
        self._index = KvIndex()
        self._hosts = KvIndex()
        self._kv_sync = KvSync(self._state, self._index, self._hosts)
        first_probe = zlib.crc32(core_id.encode()) << PROBE_BITS
        self._pairs = Pairs(self._state, first_probe)
        self._standing = Standing(limits, placement)
        self._roles = Roles(self._state, self._pairs, self._standing, placement.ratio)
        # Canaries' numbers are beside those of the pairs' probes.
        self._turns = Turns(
            self._state,
            self._pairs,
            self._standing,
            first_probe + (1 << (PROBE_BITS - 1)),
            self._turn_ended,
            lambda worker, now_s, why: self._calls.move_away(worker, now_s, why),
        )
        workflow_limits = workflow_limits or WorkflowLimits()
        self._learner = Learner(workflow_limits, keeps, epoch_s, profiles)
        self._registry = Registry(workflow_limits, self._learner, keeps)
        self._tracker = Tracker(self._state, workflow_limits, self._registry, self._learner)
        self._pace = Pace(self._learner)
        self._retention = Retention(
            self._state, self._index, placement, self._tracker.runs, self._pace
        )
        self._errands = Errands(
            self._state, self._index, placement, self._registry, self._tracker.runs
        )
        self._prefetches = Prefetches(
            self._state, self._index, placement, self._tracker, self._pace, self._errands
        )
        self._calls = Calls(
            self._state,
            self._index,
            self._standing,
            placement,
            self._tracker,
            self._pace,
            placer,
            retention=self._retention,
            errands=self._errands,
            prefetches=self._prefetches,
            hosts=self._hosts,
        )
        self._foresight = Foresight(self._learner, workflow_limits)
        self._rebalancer = Rebalancer(
            self._state,
            self._turns,
            placement,
            self._pace,
            self._foresight,
            lambda: len(self._calls.queue),
            self._index.room,
            future,
        )
        self._desk = Desk(
            self._state,
            workflow_limits,
            self._registry,
            self._tracker,
            self._learner,
            self._foresight,
            self._calls.stop,
        )
        self._looks: dict[str, Callable[[float], None]] = {
            "roles": self._roles.due,
            "retention": self._retention.look,
            "errands": self._errands.look,
            "prefetches": self._prefetches.look,
            "rebalance": self._rebalancer.due,
        }
        """What is due without a name."""
        self._latest: OrderedDict[str, str] = OrderedDict()
        """The last registered incarnation per worker name."""
        self._retired: OrderedDict[tuple[str, str], str] = OrderedDict()
        """Incarnations that may not register again, and why."""

    @property
    def counters(self) -> dict[str, int]:
        """What happened so far, by name; the set of names is fixed."""
        return self._state.counters

    @property
    def speeds(self) -> Speeds:
        """How fast engines are, as far as that has been learned."""
        return self._pace.speeds

    def role(self, worker: str) -> Role | None:
        """The role that a worker has by now; None if it is not registered."""
        found = self._state.workers.get(worker)
        return found.role if found is not None else None

    def handle(self, peer: Peer, message: ToCore, now_s: float) -> list[Send]:
        """Something that ``peer`` said. Never raises for anything a peer can say."""
        if self._started_s is None:
            self._started_s = now_s
        match message:
            case (
                Ready()
                | Beat()
                | KvChanges()
                | Leaving()
                | Probed()
                | ProbeFinished()
                | Draining()
                | RoleSet()
            ):
                self._from_worker(peer, message, now_s)
            case Inspect():
                self._state.send(peer, self.snapshot(message.token, now_s))
            case MoveCalls():
                self._state.send(peer, self._move_calls(message, now_s))
            case ShowCall():
                self._explain(peer, message)
            case (
                DeclareWorkflow()
                | StaticPrefixes()
                | DropWorkflow()
                | ListWorkflows()
                | ShowWorkflow()
                | ShowForecast()
                | ShowFigures()
                | ImportWorkflow()
                | StartRun()
                | CancelRun()
                | EndRun()
            ):
                self._desk.asked(peer, message, now_s)
                self._errands.wake(now_s)
            case ShowRebalance() | SetRebalance() | TurnWorker() | DrainWorker():
                self._learner.learn()
                self._rebalancer.asked(peer, message, now_s)
            case _:
                self._from_api(peer, message, now_s)
        self._turns.look(now_s)
        self._calls.dispatch(now_s)
        return self._state.take_outbox()

    def _explain(self, peer: Peer, message: ShowCall) -> None:
        found = self._calls.explanations.of(message.request, message.tenant, self._state.block_size)
        if found is None:
            problem = f"no call {message.request[:64]!r} is known, or not any more"
            answer = WorkflowAnswer(message.token, 404, problems=[problem])
        else:
            answer = WorkflowAnswer(message.token, 200, msgspec.json.encode(found))
        self._state.send(peer, answer)

    def tick(self, now_s: float) -> list[Send]:
        """Time passed: everything due by ``now_s`` happens."""
        if self._started_s is None:
            self._started_s = now_s
        self._learner.expire(now_s)
        while (key := self._state.deadlines.pop(now_s)) is not None:
            self._due(*key, now_s=now_s)
        self._turns.look(now_s)
        self._calls.queue.tick(now_s)
        self._calls.dispatch(now_s)
        return self._state.take_outbox()

    def _due(self, kind: str, *names: str, now_s: float) -> None:
        match kind:
            case "call" | "move":
                due = self._calls.due if kind == "call" else self._calls.move_due
                due((names[0], names[1]), now_s)
            case "worker":
                self._worker_due(self._state.workers[names[0]], now_s)
            case "api":
                self._api_due(self._state.apis[names[0]], now_s)
            case "turn":
                self._turns.due(names[0], now_s)
            case "run":
                self._run_due(RunKey(*names), now_s)
            case "pair":
                self._pairs.due((names[0], names[1]), now_s)
            case _:
                self._looks[kind](now_s)

    def fix_workflow(self, name: str, graph: Graph) -> None:
        """A workflow of the cluster's file. GraphError if it makes no sense."""
        self._registry.fix(name, graph)

    def restore(self, kept: Kept, now_s: float) -> list[str]:
        """What an earlier core has had written down, before anything else is handled. Says what
        of it is of no use any more."""
        problems = []
        for graph in kept.graphs:
            try:
                self._registry.restore(graph)
            except GraphError as error:
                problems.append(f"workflow {graph.name!r}: {error}")
        problems += self._learner.restore(kept, now_s)
        self._tracker.restore(kept.runs, now_s)
        return problems

    def learn(self) -> None:
        """Learn from the calls that were handled. A shell does that when nobody waits for it;
        ``tick`` does it, too."""
        self._learner.learn()

    def foresee(self, now_s: float) -> None:
        """Go on with the forecast of demand, which takes up to some milliseconds now and then: a
        shell does that when nobody waits for it, about once a second or more often."""
        self._learner.learn()
        self._foresight.tick(now_s)

    def take_saves(self) -> list[Save]:
        """What the shell is to write down now, in order, all or nothing."""
        return self._registry.take()

    def take_learned(self, everything: bool = False) -> list[Save]:
        """What was learned since the last time, to be written down within a second; nobody waits
        for it. ``everything``: at the end, so that the next core has nothing to do over."""
        return self._learner.take_all() if everything else self._learner.take()

    def learned_lost(self) -> None:
        """What ``take_learned`` gave last could not be written down."""
        self._learner.lost()

    def saved(self, count: int, error: str, now_s: float) -> list[Send]:
        """The ``count`` oldest records that were taken are on disk; or are not: why."""
        self._registry.written(count, error)
        self._calls.dispatch(now_s)
        return self._state.take_outbox()

    def next_deadline_s(self) -> float | None:
        """When ``tick`` has something to do next, None for never."""
        return self._state.deadlines.next_s()

    def snapshot(self, token: int, now_s: float) -> Snapshot:
        """The cluster as the core sees it. Ended calls first, then the newest live ones.

        Of links and live calls only so many are shown.
        """
        state = self._state
        workers = [
            worker_status(worker, len(state.workers) - 1, now_s)
            for _, worker in sorted(state.workers.items())
        ]
        newest = itertools.islice(reversed(state.calls.values()), LIVE_CALLS_SHOWN)
        live = [call_status(call, now_s) for call in newest]
        pairs = list(itertools.islice(self._pairs.in_order(), LINKS_SHOWN))
        said = {
            name: {link.source: link for link in state.workers[name].links}
            for name in sorted({pair.target.name for pair in pairs})
        }
        runs = itertools.islice(self._tracker.runs.newest(), RUNS_SHOWN)
        return Snapshot(
            token=token,
            core=self.core_id,
            model=self.model,
            uptime_s=now_s - self._started_s if self._started_s is not None else 0.0,
            workers=workers,
            apis=len(state.apis),
            queued=len(self._calls.queue),
            queue_limit=self._limits.queue_calls,
            active=len(state.calls) - len(self._calls.queue),
            calls=[ended.row for ended in self._calls.recent.values()] + live[::-1],
            counters=state.counters | self._tracker.counters(),
            links=[link_status(pair, said[pair.target.name]) for pair in pairs],
            runs=[run_status(run, now_s) for run in runs],
            runs_live=len(self._tracker.runs),
        )

    def check(self) -> None:
        """Assert every invariant; for tests and for chasing bugs."""
        check_all(self._state, self._calls, self._pairs, self._roles, self._index)
        self._standing.check(self._state.workers.values())
        self._hosts.check()
        self._kv_sync.check()
        self._turns.check()
        self._rebalancer.check()
        self._tracker.check()
        self._retention.check()
        self._errands.check()
        self._prefetches.check()
        self._registry.check()
        assert len(self._latest) <= 4 * self._limits.workers
        assert len(self._retired) <= 4 * self._limits.workers

    # --- workers ------------------------------------------------------------------------

    def _move_calls(self, message: MoveCalls, now_s: float) -> WorkflowAnswer:
        worker = self._state.workers.get(message.worker)
        if worker is None:
            problem = f"no worker {message.worker[:64]!r} is known"
            return WorkflowAnswer(message.token, 404, problems=[problem])
        moving, staying = self._calls.move_away(
            worker, now_s, "asked for", message.request, message.target
        )
        body = msgspec.json.encode({"moving": moving, "staying": staying})
        return WorkflowAnswer(message.token, 200, body)

    def _from_worker(self, peer: Peer, message: WorkerToCore, now_s: float) -> None:
        if isinstance(message, Ready):
            self._ready(peer, message, now_s)
            return
        worker = self._state.workers.get(message.worker)
        known = worker is not None and worker.incarnation == message.incarnation
        if worker is None or not known or worker.peer != peer:
            self._state.counters["messages_unknown_sender"] += 1
            if isinstance(message, Beat):
                self._state.send(peer, Unknown(self.core_id))
            return
        match message:
            case Beat():
                self._beat(worker, message, now_s)
            case KvChanges():
                self._kv_sync.changed(worker, message, now_s)
            case Leaving():
                reason = message.reason or "left"
                self._retire(worker.name, worker.incarnation, "it said that it was leaving")
                self._lose(worker, WorkerPhase.LEFT, reason, now_s)
            case Draining():
                self._drain(worker, now_s)
                self._calls.move_away(worker, now_s, "it will leave")
            case Probed() | ProbeFinished() | RoleSet():
                asked = not isinstance(message, RoleSet) and self._pairs.answered(
                    worker, message, now_s
                )
                if not asked and not self._turns.answered(worker, message, now_s):
                    self._state.counters["messages_stale"] += 1

    def _ready(self, peer: Peer, message: Ready, now_s: float) -> None:
        state = self._state
        reason = self._refusal(message)
        if reason:
            state.counters["peers_refused"] += 1
            state.send(peer, Refused(reason))
            return
        worker = state.workers.get(message.worker)
        if worker is not None and worker.ready == message:
            worker.peer = peer
            self._heard(worker, now_s)
        else:
            if worker is not None:
                self._lose(worker, WorkerPhase.LOST, "replaced by a new incarnation", now_s)
            self._register(peer, message, now_s)
        state.send(peer, Welcome(self._limits.beat_s, self.core_id, state.block_size))

    def _register(self, peer: Peer, message: Ready, now_s: float) -> None:
        state, facts, name = self._state, message.facts, message.worker
        former = self._latest.pop(name, message.incarnation)
        if former != message.incarnation:
            self._retire(name, former, "a newer incarnation has taken its place")
        self._latest[name] = message.incarnation
        while len(self._latest) > 4 * self._limits.workers:
            self._latest.popitem(last=False)
        self.model = self.model or facts.model
        self._model_fingerprint = self._model_fingerprint or facts.model_fingerprint
        self._vllm_version = self._vllm_version or facts.vllm_version
        state.block_size = self._learner.profiles.block_tokens = facts.block_size
        worker = Worker(
            ready=message,
            peer=peer,
            last_heard_s=now_s,
            usable_blocks=max(1, int(facts.kv_blocks * (1.0 - self._headroom_fraction))),
            story=state.story(),
        )
        state.workers[name] = worker
        state.counters["workers_registered"] += 1
        state.deadlines.set(("worker", name), self._suspect_s(worker))
        state.room_changed = True
        self._kv_sync.add(worker)
        self._standing.add(worker)
        for _, api in sorted(state.apis.items()):
            state.send(api.peer, worker_up(worker))
        self._pairs.add(worker)
        self._pairs.start(now_s)
        self._roles.watch(now_s)
        self._rebalancer.watch(now_s)
        self._turns.registered(worker)

    def _refusal(self, message: Ready) -> str:
        """Why a worker is not taken in, empty if it is."""
        if message.protocol_version != PROTOCOL_VERSION:
            return _differs("protocol version", PROTOCOL_VERSION, message.protocol_version)
        retired = self._retired.get((message.worker, message.incarnation))
        if retired is not None:
            return f"this incarnation of {message.worker} is retired: {retired}"
        if message.worker not in self._state.workers:
            if len(self._state.workers) >= self._limits.workers:
                return f"the cluster has {self._limits.workers} workers already"
            if not 0 < len(message.worker.encode()) <= self._limits.request_id_bytes:
                return f"a worker's name has 1 to {self._limits.request_id_bytes} bytes"
        return self._unlike_cluster(message)

    def _unlike_cluster(self, message: Ready) -> str:
        """What of a worker's engine does not fit the cluster, empty if all does."""
        facts = message.facts
        for what, ours, theirs in (
            ("vLLM version", self._vllm_version, facts.vllm_version),
            ("model fingerprint", self._model_fingerprint, facts.model_fingerprint),
            ("block size", self._state.block_size, facts.block_size),
        ):
            if ours and ours != theirs:
                return _differs(what, ours, theirs)
        sizes = (facts.block_size, facts.kv_blocks, facts.max_model_len, facts.max_num_seqs)
        if min(sizes) < 1:
            return "block_size, kv_blocks, max_model_len and max_num_seqs must be positive"
        return ""

    def _beat(self, worker: Worker, message: Beat, now_s: float) -> None:
        if message.load.preemptions_total > worker.load.preemptions_total:
            self._calls.queue.preempted(now_s)
        worker.beat(message.load, message.links)
        self._standing.touch(worker)
        self._state.room_changed = True
        self._heard(worker, now_s)

    def _heard(self, worker: Worker, now_s: float) -> None:
        worker.last_heard_s = now_s
        if worker.phase is WorkerPhase.SUSPECT:
            worker.move(WorkerPhase.UP, now_s, "beats again")
            self._standing.touch(worker)
            self._state.deadlines.set(("worker", worker.name), self._suspect_s(worker))
            self._state.room_changed = True
            self._pairs.woke(worker, now_s)

    def _drain(self, worker: Worker, now_s: float) -> None:
        if worker.phase is WorkerPhase.DRAINING:
            return
        worker.move(WorkerPhase.DRAINING, now_s, "it said so")
        self._standing.touch(worker)
        self._pairs.dozed(worker)

    def _worker_due(self, worker: Worker, now_s: float) -> None:
        lost_s = worker.last_heard_s + self._silence_s(self._limits.beats_missed)
        suspect_s = self._suspect_s(worker)
        if now_s >= lost_s:
            reason = f"missed {self._limits.beats_missed} beats"
            self._lose(worker, WorkerPhase.LOST, reason, now_s)
        elif now_s >= suspect_s:
            if worker.phase is WorkerPhase.UP:
                worker.move(WorkerPhase.SUSPECT, now_s, f"missed {SUSPECT_BEATS} beats")
                self._standing.touch(worker)
                self._pairs.dozed(worker)
            self._state.deadlines.set(("worker", worker.name), lost_s)
        else:
            self._state.deadlines.set(("worker", worker.name), suspect_s)

    def _lose(self, worker: Worker, phase: WorkerPhase, reason: str, now_s: float) -> None:
        """A worker is out, with everything that depended on it."""
        state = self._state
        worker.move(phase, now_s, reason)
        del state.workers[worker.name]
        state.deadlines.drop(("worker", worker.name))
        state.counters[f"workers_{phase.value}"] += 1
        self._kv_sync.forget(worker)
        self._standing.remove(worker)
        for _, api in sorted(state.apis.items()):
            state.send(api.peer, WorkerGone(worker.name, worker.incarnation, reason))
        self._pairs.remove(worker, now_s)
        self._roles.watch(now_s)
        self._retention.worker_lost(worker)
        self._errands.worker_lost(worker)
        self._rebalancer.watch(now_s)
        self._turns.lost(worker, now_s)
        self._prefetches.worker_lost(worker)
        self._calls.worker_lost(worker, now_s)

    def _turn_ended(self, turn: Turn, now_s: float) -> None:
        self._rebalancer.ended(turn, now_s)

    def _retire(self, name: str, incarnation: str, why: str) -> None:
        self._retired[name, incarnation] = why
        while len(self._retired) > 4 * self._limits.workers:
            self._retired.popitem(last=False)

    def _silence_s(self, beats: int) -> float:
        """How long a peer is silent that has missed so many beats."""
        return (beats + 0.5) * self._limits.beat_s

    def _suspect_s(self, worker: Worker) -> float:
        beats = min(SUSPECT_BEATS, self._limits.beats_missed)
        return worker.last_heard_s + self._silence_s(beats)

    # --- API processes -------------------------------------------------------------------

    def _from_api(self, peer: Peer, message: ApiToCore, now_s: float) -> None:
        if isinstance(message, Hello):
            self._hello(peer, message, now_s)
            return
        api = self._state.apis.get(message.api)
        if api is None or api.peer != peer:
            self._state.counters["messages_unknown_sender"] += 1
            if isinstance(message, ApiBeat | Submit | Failed):
                self._state.send(peer, Unknown(self.core_id))
            return
        api.last_heard_s = now_s
        self._about_call(api, message, now_s)

    def _about_call(
        self,
        api: Api,
        message: ApiBeat
        | Submit
        | Pulled
        | Prefilled
        | Started
        | Finished
        | Failed
        | Checked
        | ErrandDone
        | MoveReady
        | MoveDeclined,
        now_s: float,
    ) -> None:
        match message:
            case Submit():
                self._calls.submit(api, message, now_s)
            case Pulled():
                self._calls.pulled(api, message, now_s)
            case Prefilled():
                self._calls.prefilled(api, message, now_s)
            case Started():
                self._calls.started(api, message, now_s)
            case Finished():
                self._calls.finished(api, message, now_s)
            case Failed():
                self._calls.failed(api, message, now_s)
            case Checked():
                self._calls.checked(api, message, now_s)
            case MoveReady() | MoveDeclined() | ErrandDone():
                self._done_beside(api, message, now_s)
            case ApiBeat():
                self._state.send(api.peer, Alive(self.core_id))

    def _done_beside(
        self, api: Api, message: MoveReady | MoveDeclined | ErrandDone, now_s: float
    ) -> None:
        """What was asked of an API process beside its calls' ways."""
        if isinstance(message, ErrandDone):
            self._errands.done(api, message, now_s)
        else:
            self._calls.move_answered(api, message, now_s)

    def _hello(self, peer: Peer, message: Hello, now_s: float) -> None:
        """An API process registers, or comes back over another connection."""
        state, name = self._state, message.api
        reason = ""
        if message.protocol_version != PROTOCOL_VERSION:
            reason = _differs("protocol version", PROTOCOL_VERSION, message.protocol_version)
        elif name not in state.apis and len(state.apis) >= self._limits.apis:
            reason = f"the cluster has {self._limits.apis} API processes already"
        elif not 0 < len(name.encode()) <= self._limits.request_id_bytes:
            reason = f"an API process's name has 1 to {self._limits.request_id_bytes} bytes"
        if reason:
            state.counters["peers_refused"] += 1
            state.send(peer, Refused(reason))
            return
        api = state.apis.get(name)
        if api is None:
            api = state.apis[name] = Api(name, peer, now_s, now_s)
            state.counters["apis_registered"] += 1
            state.deadlines.set(("api", name), self._api_lost_s(api))
        api.peer, api.last_heard_s = peer, now_s
        contexts = self._prefetches.on
        state.send(peer, Welcome(self._limits.beat_s, self.core_id, state.block_size, contexts))
        for _, worker in sorted(state.workers.items()):
            state.send(peer, worker_up(worker))

    def _api_due(self, api: Api, now_s: float) -> None:
        lost_s = self._api_lost_s(api)
        if now_s < lost_s:
            self._state.deadlines.set(("api", api.name), lost_s)
            return
        self._calls.api_lost(api, now_s)
        self._errands.api_lost(api)
        del self._state.apis[api.name]
        self._state.counters["apis_lost"] += 1

    def _run_due(self, key: RunKey, now_s: float) -> None:
        status, reason = REFUSALS[RunEnd.DEADLINE]
        for call in self._tracker.due(key, now_s):
            self._calls.stop(call, status, reason, now_s)

    def _api_lost_s(self, api: Api) -> float:
        return api.last_heard_s + self._silence_s(self._limits.beats_missed)


def _differs(what: str, ours: object, theirs: object) -> str:
    return f"the cluster's {what} is {ours}, not {theirs}"

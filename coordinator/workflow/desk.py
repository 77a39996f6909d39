"""Questions about workflows, and their answers: declare, look at, start, cancel.

Whoever asks may ask the same again when no answer came: nothing is done twice by that. What has
to be kept is answered when it is on disk (see ``registry``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Literal

import msgspec

from coordinator.protocol import (
    AboutWorkflows,
    CancelRun,
    DeclareWorkflow,
    DropWorkflow,
    EndRun,
    ImportWorkflow,
    ListWorkflows,
    RunStatus,
    ShowFigures,
    ShowForecast,
    ShowWorkflow,
    StartRun,
    StaticPrefixes,
    WorkflowAnswer,
)
from coordinator.state import MOVED_COUNTERS, CallKey, Peer, State
from coordinator.view import run_status
from coordinator.workflow.foresight import Foresight, WorkflowForecast
from coordinator.workflow.graph import Graph, GraphError, name_problem
from coordinator.workflow.learner import Learner
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.prediction import RunKey, WorkflowView
from coordinator.workflow.record import ProfileRecord
from coordinator.workflow.registry import BAD_JSON, Busy, Declared, Registry, Then
from coordinator.workflow.tracker import CANCELLED_STATUS, Tracker

RUNS_SHOWN = 100
CALL_PRIORITY_MAX = 1 << 31

StopCall = Callable[[CallKey, int, str, float], None]
"""Ends a call: key, HTTP status, reason, now."""


class WorkflowRow(msgspec.Struct, frozen=True):
    """One line of the list of workflows. ``fixed``: declared by the cluster's file; ``agents``:
    declared ones; ``learned``: whether anything is."""

    name: str
    declared: bool
    fixed: bool
    agents: int
    learned: bool
    runs_live: int


class Shown(msgspec.Struct, frozen=True):
    """What is known of a workflow: declared, learned, expected, and its live runs.
    ``static_tokens``: of the declared static prompts, by agent, as far as they have been
    templated."""

    name: str
    declared: Graph | None
    fixed: bool
    learned: WorkflowView | None
    runs_live: int
    runs: list[RunStatus]
    forecast: list[WorkflowForecast]
    static_tokens: dict[str, int] = {}


class Exported(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A workflow as it can be taken to another cluster."""

    name: str
    declared: Graph | None = None
    learned: ProfileRecord | None = None
    format: Literal[1] = 1


_decode_exported = msgspec.json.Decoder(Exported).decode


class Desk:
    """Answers questions; ``stop_call`` ends calls of cancelled runs."""

    def __init__(
        self,
        state: State,
        limits: WorkflowLimits,
        registry: Registry,
        tracker: Tracker,
        learner: Learner,
        foresight: Foresight,
        stop_call: StopCall,
    ) -> None:
        self._state = state
        self._foresight = foresight
        self._learner = learner
        self._limits = limits
        self._registry = registry
        self._tracker = tracker
        self._stop_call = stop_call

    def asked(self, peer: Peer, message: AboutWorkflows, now_s: float) -> None:
        """Somebody asks; the answer goes to whom it came from, now or when it is written."""
        self._learner.learn()
        try:
            self._asked(peer, message, now_s)
        except GraphError as error:
            self._refuse(peer, message.token, 422, error.problems)
        except Busy:
            self._refuse(peer, message.token, 503, ["too much waits to be written"])

    def _asked(self, peer: Peer, message: AboutWorkflows, now_s: float) -> None:
        match message:
            case DeclareWorkflow(token, name, graph):
                self._declare(peer, token, name, self._registry.read(name, graph))
            case StaticPrefixes():
                self._know_static(peer, message)
            case DropWorkflow():
                self._drop(peer, message)
            case ImportWorkflow():
                self._import(peer, message)
            case ListWorkflows() | ShowWorkflow() | ShowForecast() | ShowFigures():
                self._look(peer, message, now_s)
            case StartRun():
                self._start(peer, message, now_s)
            case CancelRun():
                self._cancel(peer, message, now_s)
            case EndRun():
                self._end(peer, message, now_s)

    # --- declaring ------------------------------------------------------------------------

    def _declare(self, peer: Peer, token: int, name: str, graph: Graph) -> None:
        known = self._registry.will_be(name)
        if known is not None and known.fixed:
            self._refuse(peer, token, 409, [_fixed(name)])
            return
        if known is None and len(self._registry.declared) >= self._limits.declared:
            problem = f"{self._limits.declared} workflows are declared already"
            self._refuse(peer, token, 422, [problem])
            return
        status = 201 if known is None else 200
        self._registry.declare(name, graph, self._then(peer, token, status, {"name": name}))

    def _know_static(self, peer: Peer, message: StaticPrefixes) -> None:
        declared = self._registry.declared.get(message.name)
        if declared is None:
            self._refuse(peer, message.token, 404, [_unknown(message.name)])
        elif declared.digest != message.graph_digest:
            problem = f"{message.name[:64]!r} is declared otherwise by now"
            self._refuse(peer, message.token, 409, [problem])
        else:
            self._registry.know_static(message.name, message.prefixes)
            self._answer(peer, message.token, 200, {"name": message.name})

    def _drop(self, peer: Peer, message: DropWorkflow) -> None:
        token, name = message.token, message.name
        known = self._registry.will_be(name)
        learned = self._learner.profiles.knows(message.tenant, name)
        if known is None and not learned:
            self._refuse(peer, token, 404, [_unknown(name)])
            return
        if known is not None and known.fixed:
            self._refuse(peer, token, 409, [_fixed(name)])
            return
        if known is not None:
            self._registry.drop(name, _nothing)
        forgotten = self._learner.replaced((message.tenant, name), None)
        self._registry.keep(
            forgotten, self._then(peer, token, 200, {"name": name, "deleted": True})
        )

    # --- looking --------------------------------------------------------------------------

    def _look(
        self,
        peer: Peer,
        message: ListWorkflows | ShowWorkflow | ShowForecast | ShowFigures,
        now_s: float,
    ) -> None:
        match message:
            case ListWorkflows(token, tenant):
                self._answer(peer, token, 200, self._rows(tenant))
            case ShowWorkflow():
                self._show(peer, message, now_s)
            case ShowForecast(token, tenant):
                self._answer(peer, token, 200, self._foresight.shown(tenant, now_s))
            case ShowFigures(token):
                counters = self._state.counters
                moved = {name: counters[name] for name in MOVED_COUNTERS}
                figures = self._foresight.figures(now_s)
                figures = msgspec.structs.replace(figures, moved=moved)
                self._answer(peer, token, 200, figures)

    def _rows(self, tenant: str) -> list[WorkflowRow]:
        live = self._tracker.runs.workflows_of(tenant)
        declared = self._registry.declared
        learned = set(self._learner.profiles.workflows(tenant))
        return [
            _row(name, declared.get(name), name in learned, live.get(name, 0))
            for name in sorted(declared.keys() | live.keys() | learned)
            if name
        ]

    def _show(self, peer: Peer, message: ShowWorkflow, now_s: float) -> None:
        if message.learned:
            self._export(peer, message)
            return
        declared = self._registry.declared.get(message.name)
        learned = self._learner.profiles.view(message.tenant, message.name)
        runs = self._tracker.runs.of_workflow(message.tenant, message.name)
        if declared is None and learned is None and not runs:
            self._refuse(peer, message.token, 404, [_unknown(message.name)])
            return
        shown = Shown(
            name=message.name,
            declared=declared.graph if declared else None,
            fixed=declared.fixed if declared else False,
            learned=learned,
            runs_live=len(runs),
            runs=[run_status(run, now_s) for run in islice(reversed(runs.values()), RUNS_SHOWN)],
            static_tokens={
                agent: prefix.tokens
                for agent, prefix in self._registry.static.get(message.name, {}).items()
            },
            forecast=self._foresight.of_workflow(message.tenant, message.name, now_s),
        )
        self._answer(peer, message.token, 200, shown)

    def _export(self, peer: Peer, message: ShowWorkflow) -> None:
        declared = self._registry.declared.get(message.name)
        learned = self._learner.profiles.exported(message.tenant, message.name)
        if declared is None and learned is None:
            self._refuse(peer, message.token, 404, [_unknown(message.name)])
            return
        exported = Exported(message.name, declared.graph if declared else None, learned)
        self._answer(peer, message.token, 200, exported)

    def _import(self, peer: Peer, message: ImportWorkflow) -> None:
        """Take over what was exported; what is not in it stays as it is."""
        token, name = message.token, message.name
        if len(message.record) > self._limits.record_bytes:
            problem = f"it is longer than {self._limits.record_bytes} bytes"
            self._refuse(peer, token, 422, [problem])
            return
        try:
            exported = _decode_exported(message.record)
        except BAD_JSON as error:
            self._refuse(peer, token, 422, [f"it is no exported workflow: {error}"])
            return
        graph = exported.declared
        if graph is not None:
            graph = self._registry.checked(name, graph)
        elif exported.learned is None or name_problem(name, self._limits):
            self._refuse(peer, token, 422, ["nothing is declared or learned, or there is no name"])
            return
        if exported.learned is not None:
            try:
                learned = self._learner.replaced((message.tenant, name), exported.learned)
            except ValueError as error:
                self._refuse(peer, token, 422, [f"learned: {error}"])
                return
            last = graph is None
            then = self._then(peer, token, 200, {"name": name}) if last else _nothing
            self._registry.keep(learned, then)
        if graph is not None:
            self._declare(peer, token, name, graph)

    # --- runs -----------------------------------------------------------------------------

    def _start(self, peer: Peer, message: StartRun, now_s: float) -> None:
        problems = [
            *_text_problems("workflow", message.workflow, self._limits.name_bytes),
            *_text_problems("run", message.run, self._limits.name_bytes),
        ]
        if not (math.isfinite(message.deadline_s) and message.deadline_s >= 0):
            problems.append("deadline_s: must be a time from now in seconds")
        if abs(message.priority) >= CALL_PRIORITY_MAX:
            problems.append(f"priority: must be within {CALL_PRIORITY_MAX}")
        if problems:
            self._refuse(peer, message.token, 422, problems)
            return
        key = RunKey(message.tenant, message.workflow, message.run)
        run = self._tracker.start(key, message.deadline_s, message.priority, now_s)
        if run is None:
            problem = "no more runs can be followed, all of them have calls open"
            self._refuse(peer, message.token, 429, [problem])
            return
        then = self._then(peer, message.token, 201, run_status(run, now_s))
        self._registry.keep(self._tracker.kept(run), then)

    def _cancel(self, peer: Peer, message: CancelRun, now_s: float) -> None:
        runs = self._tracker.runs
        key = runs.resolve(RunKey(message.tenant, message.workflow, message.run))
        run = runs.live.get(key)
        answer: dict[str, object] = {"workflow": message.workflow, "run": message.run}
        if run is None:
            if key not in runs.ended:
                self._refuse(peer, message.token, 404, [f"no run {message.run!r} is known"])
                return
            how, _ = runs.ended[key]
            self._answer(peer, message.token, 200, answer | {"ended": how.value, "stopped": 0})
            return
        calls = self._tracker.cancel(run, now_s)
        for call in calls:
            self._stop_call(call, CANCELLED_STATUS, "the run was cancelled", now_s)
        self._answer(
            peer, message.token, 200, answer | {"ended": "cancelled", "stopped": len(calls)}
        )

    def _end(self, peer: Peer, message: EndRun, now_s: float) -> None:
        runs = self._tracker.runs
        key = runs.resolve(RunKey(message.tenant, message.workflow, message.run))
        run = runs.live.get(key)
        if run is None and key not in runs.ended:
            self._refuse(peer, message.token, 404, [f"no run {message.run!r} is known"])
            return
        if run is not None:
            self._tracker.finish(run, message.completed, now_s)
        how = runs.ended[key][0].value if key in runs.ended and key not in runs.live else ""
        open_calls = len(run.open) if run is not None else 0
        answer = {"workflow": message.workflow, "run": message.run, "ended": how}
        self._answer(peer, message.token, 200, answer | {"open_calls": open_calls})

    # --- answering ------------------------------------------------------------------------

    def _then(self, peer: Peer, token: int, status: int, body: object) -> Then:
        """What to answer when something is written, or can't be."""

        def then(error: str) -> None:
            if error:
                self._refuse(peer, token, 503, [error])
            else:
                self._answer(peer, token, status, body)

        return then

    def _answer(self, peer: Peer, token: int, status: int, body: object) -> None:
        self._state.send(peer, WorkflowAnswer(token, status, msgspec.json.encode(body)))

    def _refuse(self, peer: Peer, token: int, status: int, problems: list[str]) -> None:
        self._state.send(peer, WorkflowAnswer(token, status, problems=problems))


def _nothing(error: str) -> None:
    """Another record, written later, is answered."""


def _row(name: str, declared: Declared | None, learned: bool, runs_live: int) -> WorkflowRow:
    agents = len(declared.graph.agents) if declared else 0
    fixed = declared is not None and declared.fixed
    return WorkflowRow(name, declared is not None, fixed, agents, learned, runs_live)


def _text_problems(what: str, text: str, longest: int) -> list[str]:
    return [] if 0 < len(text) <= longest else [f"{what}: has 1 to {longest} characters"]


def _fixed(name: str) -> str:
    return f"{name[:64]!r} is declared by the cluster's file and can only be changed there"


def _unknown(name: str) -> str:
    return f"no workflow {name[:64]!r} is known"

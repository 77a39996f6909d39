"""Live runs of workflows: which calls are open, when a run is over, which are remembered.

A run begins with its first call, or is started explicitly, with a deadline and a priority. It
ends with its final call, at the end of its workflow's graph, after a silence, at its deadline,
or when it is cancelled. Whoever is over a limit is not tracked, or the run that has been silent
for longest is forgotten: identity is a hint, a call is never refused for want of room here.

A run that was cancelled or is over its deadline is remembered for a while: its calls are refused
until somebody starts it anew. Knows neither messages nor a clock.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.prediction import RunKey

CallKey = tuple[str, str]
"""API process and request."""


class RunEnd(enum.Enum):
    """Why a run is over."""

    FINAL = "final"
    GRAPH = "graph"
    IDLE = "idle"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    FORGOTTEN = "forgotten"


REFUSING = frozenset({RunEnd.DEADLINE, RunEnd.CANCELLED})
"""Runs that ended so get no more calls."""


@dataclass(slots=True, eq=False)
class Run:
    """One live run. ``deadline_s``: when it has to be over, None for whenever."""

    key: RunKey
    started_s: float
    heard_s: float
    """When a call of it last began or ended."""
    explicit: bool = False
    deadline_s: float | None = None
    priority: int = 0
    open: set[CallKey] = field(default_factory=set)
    calls: int = 0
    """Begun so far."""
    final: bool = False
    """A call said that it is the last, or somebody else that none follows."""
    completed: bool = True
    """Not ended early, as far as anybody said."""
    agents: dict[str, str] = field(default_factory=dict)
    """The agent of each thread; bounded."""
    begun: bool = False
    """A call of it has been planned."""


@dataclass(slots=True, eq=False)
class Tenant:
    """The runs of one tenant; ``idle`` without open calls, the longest silent first."""

    busy: dict[RunKey, Run] = field(default_factory=dict)
    idle: OrderedDict[RunKey, Run] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self.busy) + len(self.idle)


class Runs:
    """All live runs, and the recently ended ones. Counts why runs ended in ``ends``."""

    def __init__(self, limits: WorkflowLimits) -> None:
        self._limits = limits
        self.live: OrderedDict[RunKey, Run] = OrderedDict()
        self.ended: OrderedDict[RunKey, tuple[RunEnd, float]] = OrderedDict()
        self.ends: dict[RunEnd, int] = dict.fromkeys(RunEnd, 0)
        self.begun = 0
        self.untracked = 0
        """Calls whose run there was no room for."""
        self.tenants: OrderedDict[str, Tenant] = OrderedDict()
        self._of_workflow: dict[tuple[str, str], dict[RunKey, Run]] = {}
        self._threads: dict[RunKey, RunKey] = {}
        """The run that a thread is part of, for clients that name only the thread above."""

    def __len__(self) -> int:
        return len(self.live)

    def resolve(self, key: RunKey) -> RunKey:
        """The run that is meant: a client may name the thread above in place of the run."""
        if key in self.live:
            return key
        return self._threads.get(key, key)

    def refusal(self, key: RunKey) -> RunEnd | None:
        """Why calls of this run are refused; None if they are not."""
        ended = self.ended.get(key)
        return ended[0] if ended is not None and ended[0] in REFUSING else None

    def start(
        self, key: RunKey, deadline_s: float | None, priority: int, now_s: float
    ) -> Run | None:
        """Start a run explicitly, or give one that lives these terms. None if there is no room."""
        run = self.live.get(key) or self._begin(key, now_s)
        if run is not None:
            run.explicit, run.deadline_s, run.priority = True, deadline_s, priority
            run.final, run.completed = False, True
            self._heard(run, now_s)
        return run

    def opened(
        self, key: RunKey, call: CallKey, thread: str, agent: str, now_s: float
    ) -> Run | None:
        """A call of a run begins. None if the run can't be tracked."""
        run = self.live.get(key) or self._begin(key, now_s)
        if run is None:
            self.untracked += 1
            return None
        run.open.add(call)
        run.calls += 1
        if thread and (thread in run.agents or len(run.agents) < self._limits.calls_per_run):
            run.agents[thread] = agent
            self._threads.setdefault(key._replace(run=thread), key)
        self._heard(run, now_s)
        return run

    def closed(self, run: Run, call: CallKey, final: bool, at_end: bool, now_s: float) -> bool:
        """A call ended. ``at_end``: nothing follows in its workflow's graph. True if the run is
        over with it: the last open call decides, so that a final mark does not cut siblings off.
        """
        if self.live.get(run.key) is not run:
            return False
        run.open.discard(call)
        run.final = run.final or final
        self._heard(run, now_s)
        if run.open or not (run.final or at_end):
            return False
        self.end(run, RunEnd.FINAL if run.final else RunEnd.GRAPH, now_s)
        return True

    def end(self, run: Run, why: RunEnd, now_s: float) -> None:
        """A run is over, whatever it is doing."""
        key = run.key
        del self.live[key]
        siblings = self._of_workflow[key[:2]]
        del siblings[key]
        if not siblings:
            del self._of_workflow[key[:2]]
        tenant = self.tenants[key.tenant]
        tenant.busy.pop(key, None)
        tenant.idle.pop(key, None)
        if not tenant:
            del self.tenants[key.tenant]
        for thread in run.agents:
            above = key._replace(run=thread)
            if self._threads.get(above) == key:
                del self._threads[above]
        self.ends[why] += 1
        self.ended.pop(key, None)
        self.ended[key] = why, now_s
        while len(self.ended) > self._limits.ended_runs:
            self.ended.popitem(last=False)

    def due_s(self, run: Run, idle_s: float) -> float | None:
        """When something happens to a run if it stays silent; ``idle_s`` is how long it may."""
        silent_s = None if run.open else run.heard_s + idle_s
        if silent_s is None or run.deadline_s is None:
            return run.deadline_s if silent_s is None else silent_s
        return min(silent_s, run.deadline_s)

    def workflows_of(self, tenant: str) -> dict[str, int]:
        """A tenant's workflows with live runs, and how many."""
        of_tenant = (
            (name, runs) for (who, name), runs in self._of_workflow.items() if who == tenant
        )
        return {name: len(runs) for name, runs in of_tenant}

    def of_workflow(self, tenant: str, workflow: str) -> dict[RunKey, Run]:
        """The live runs of one workflow, the oldest first."""
        return self._of_workflow.get((tenant, workflow), {})

    def newest(self) -> Iterator[Run]:
        """Live runs, the youngest first."""
        return reversed(self.live.values())

    def _begin(self, key: RunKey, now_s: float) -> Run | None:
        if not self._has_room(key.tenant, now_s):
            return None
        self.begun += 1
        self.ended.pop(key, None)
        run = self.live[key] = Run(key, now_s, now_s)
        self._of_workflow.setdefault(key[:2], {})[key] = run
        self.tenants.setdefault(key.tenant, Tenant()).idle[key] = run
        return run

    def _heard(self, run: Run, now_s: float) -> None:
        run.heard_s = now_s
        tenant = self.tenants[run.key.tenant]
        self.tenants.move_to_end(run.key.tenant)
        if run.open:
            tenant.idle.pop(run.key, None)
            tenant.busy[run.key] = run
        else:
            tenant.busy.pop(run.key, None)
            tenant.idle[run.key] = run
            tenant.idle.move_to_end(run.key)

    def _has_room(self, name: str, now_s: float) -> bool:
        """Make room for one more run of a tenant, at the cost of what is silent for longest."""
        limits = self._limits
        tenant = self.tenants.get(name)
        if tenant is not None and len(tenant) >= limits.runs_per_tenant:
            return self._forget(tenant, now_s)
        if tenant is None and len(self.tenants) >= limits.tenants:
            oldest = next(iter(self.tenants.values()))
            if oldest.busy:
                return False
            while oldest.idle:
                self._forget(oldest, now_s)
        if len(self.live) >= limits.runs:
            return self._forget(tenant or next(iter(self.tenants.values())), now_s)
        return True

    def _forget(self, tenant: Tenant, now_s: float) -> bool:
        if not tenant.idle:
            return False
        self.end(next(iter(tenant.idle.values())), RunEnd.FORGOTTEN, now_s)
        return True

    def check(self) -> None:
        """Assert that all accounts agree; for tests."""
        limits = self._limits
        assert len(self.live) <= limits.runs
        assert len(self.tenants) <= limits.tenants
        assert len(self.ended) <= limits.ended_runs
        assert not self.live.keys() & self.ended.keys()
        grouped = [key for runs in self._of_workflow.values() for key in runs]
        assert sorted(grouped) == sorted(self.live)
        assert all(self._of_workflow.values())
        assert sum(len(tenant) for tenant in self.tenants.values()) == len(self.live)
        for name, tenant in self.tenants.items():
            assert 0 < len(tenant) <= limits.runs_per_tenant
            for runs, busy in ((tenant.busy, True), (tenant.idle, False)):
                for key, run in runs.items():
                    assert self.live[key] is run
                    assert key == run.key
                    assert key.tenant == name
                    assert bool(run.open) is busy
                    assert len(run.agents) <= limits.calls_per_run
        for above, key in self._threads.items():
            assert above.run in self.live[key].agents
        assert self.begun == len(self.live) + sum(self.ends.values())

"""All that is known of all workflows: live runs, and what was learned of those that ended.

Told when calls start and end; says what a run does next, and how long answers get. Pure: time
is an argument, and what happens out of order, twice, or never ends is bounded and ignored.
A clock that goes backwards stands still here.

Tenants learn apart: nobody sees another's workflows, not even in a prediction.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from hashlib import blake2b

from coordinator.protocol import BLOCK_HASH_BYTES
from coordinator.workflow.graph import Graph
from coordinator.workflow.learned import AgentCounts
from coordinator.workflow.learning import learn_end, learn_start, shared_with
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.prediction import (
    UNKNOWN,
    Prediction,
    RunKey,
    Spread,
    WorkflowView,
)
from coordinator.workflow.profile import OTHER, Profile
from coordinator.workflow.record import ProfileRecord, recorded, restored
from coordinator.workflow.runs import NOBODY, LiveCall, LiveRun, path_after
from coordinator.workflow.scores import FADING, Scores
from coordinator.workflow.sharing import Sketch, hashes_of
from coordinator.workflow.units import IDLE, LAST, RUNNING, Units
from coordinator.workflow.view import predicted, workflow_view

FEW = 5.0
"""Answers from which on an agent's own mean counts."""


class _Tenant:
    """One tenant's workflows and live runs, the least recently used first."""

    __slots__ = ("name", "profiles", "runs")

    def __init__(self, name: str) -> None:
        self.name = name
        self.profiles: OrderedDict[str, Profile] = OrderedDict()
        self.runs: OrderedDict[tuple[str, str], LiveRun] = OrderedDict()


class Demand:
    """What happened since the beginning, in tokens; forecasts are judged by it."""

    __slots__ = ("arrivals", "decode_tokens", "prefill_tokens")

    def __init__(self) -> None:
        self.prefill_tokens = 0.0
        self.decode_tokens = 0.0
        self.arrivals: dict[int, int] = {}
        """Runs that began, by workflow's number, since somebody took them out."""


class Profiles:
    """Everything about workflows that the coordinator knows."""

    def __init__(
        self, limits: WorkflowLimits, block_tokens: int = 16, score_fading: float = FADING
    ) -> None:
        """``block_tokens``: what one block hash stands for; may be set again at any time.

        ``score_fading``: what scores keep of their weight at the next value, see ``Scores``.
        """
        self._score_fading = score_fading
        self.block_tokens = block_tokens
        self.units = Units()
        self.demand = Demand()
        self.by_number: dict[int, Profile] = {}
        self._limits = limits
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        self._calls: dict[str, tuple[LiveRun, LiveCall]] = {}
        self._run_count = 0
        self._edge_count = 0
        self._deadlines: list[tuple[float, RunKey]] = []
        self._free_numbers: list[int] = []
        self._now_s = 0.0

    # --- what happened ----------------------------------------------------------------------

    def observe_start(
        self,
        key: RunKey,
        call: str,
        agent: str,
        prompt_tokens: int,
        block_hashes: bytes,
        now_s: float,
        parent: str = "",
        final: bool = False,
        uncached_tokens: int | None = None,
    ) -> None:
        """A call was submitted. ``call`` is its id, unique among those that run.

        ``uncached_tokens``: what of its prompt has to be computed, if that is known better
        than from the run's earlier prompts. ``final``: nothing comes after it. A call that
        runs already is ignored.
        """
        if call in self._calls:
            return
        now_s = self._clock(now_s)
        run = self._run(key, call, now_s)
        profile = run.profile
        edges = profile.edges
        symbol = profile.symbol(agent)
        prompt = hashes_of(block_hashes)
        named = profile.known_symbol(parent) if parent else NOBODY
        before = run.followed_by(symbol, prompt, named, prompt_tokens)
        live = LiveCall(symbol, path_after(before[0], symbol), now_s)
        live.prompt_tokens = prompt_tokens = max(0, prompt_tokens)
        live.sketch = Sketch(prompt)
        shared = shared_with(run, before[0], live, prompt, self.block_tokens)
        new_tokens = live.prompt_tokens - shared.tokens
        if uncached_tokens is not None:
            new_tokens = uncached_tokens
        live.new_tokens = new_tokens = max(0, new_tokens)
        learn_start(profile, before, live, shared, new_tokens)
        for earlier in before:
            self._release(earlier)
        self._edge_count += profile.edges - edges
        self.demand.prefill_tokens += new_tokens
        counts = profile.agent(symbol)
        live.before = run.visits.get(symbol, 0)
        live.bound_tokens = counts.bound_tokens(live.before, profile.everything)
        run.add(call, live)
        run.final = run.final or final
        run.last_s = now_s
        self._calls[call] = (run, live)
        live.unit = self.units.take()
        calls = LAST if run.final else run.calls
        self.units.set(live.unit, profile.number, symbol, RUNNING, now_s, prompt_tokens, calls)
        for shed in run.shed(self._limits.calls_per_run):
            self._release(shed)

    def observe_end(
        self, call: str, output_tokens: int, now_s: float, completed: bool = True
    ) -> None:
        """A call ended; unknown ones are ignored.

        ``completed``: its answer came to its end, so that its length is worth learning.
        """
        found = self._calls.pop(call, None)
        if found is None:
            return
        now_s = self._clock(now_s)
        run, _ = found
        live = run.end(call, now_s)
        live.output_tokens = max(0, output_tokens)
        profile = run.profile
        profile.events += 1
        self.demand.decode_tokens += live.output_tokens
        if completed:
            learn_end(profile, live)
        tokens = live.prompt_tokens + live.output_tokens
        if live.unit != NOBODY:
            calls = LAST if run.final else run.calls
            self.units.set(live.unit, profile.number, live.agent, IDLE, now_s, tokens, calls)
        run.last_s = now_s
        if run.final and not run.running:
            self._end(run, learn=True)

    def end_run(self, key: RunKey, now_s: float, completed: bool = True) -> None:
        """A run is over. ``completed``: it came to its own end, it was not cancelled."""
        self._clock(now_s)
        tenant = self._tenants.get(self._short(key.tenant))
        if tenant is not None:
            run = tenant.runs.get((self._short(key.workflow), self._short(key.run)))
            if run is not None:
                self._end(run, learn=completed)

    def expire(self, now_s: float) -> int:
        """End the runs that were silent for longer than their workflow's are; how many."""
        now_s = self._clock(now_s)
        ended = 0
        while self._deadlines and self._deadlines[0][0] <= now_s:
            deadline_s, key = heapq.heappop(self._deadlines)
            tenant = self._tenants.get(key.tenant)
            run = tenant.runs.get((key.workflow, key.run)) if tenant is not None else None
            if run is None or run.deadline_s != deadline_s:
                continue
            due_s = run.last_s + self._silence_s(run)
            if due_s <= now_s:
                self._end(run, learn=not run.running)
                ended += 1
            else:
                self._set_deadline(run, due_s)
        return ended

    # --- what is known -----------------------------------------------------------------------

    def predict(self, key: RunKey, now_s: float) -> Prediction:
        """What a run does next; ``UNKNOWN`` if nobody has seen it."""
        self._clock(now_s)
        tenant = self._tenants.get(self._short(key.tenant))
        if tenant is None:
            return UNKNOWN
        run = tenant.runs.get((self._short(key.workflow), self._short(key.run)))
        return predicted(run) if run is not None else UNKNOWN

    def output_tokens(self, key: RunKey, agent: str) -> Spread:
        """How long the next answer of an agent in a run gets."""
        profile = self._known(key.tenant, key.workflow)
        if profile is None:
            return AgentCounts().output_tokens.spread()
        symbol = profile.known_symbol(agent)
        tenant = self._tenants[self._short(key.tenant)]
        run = tenant.runs.get((self._short(key.workflow), self._short(key.run)))
        before = run.visits.get(symbol, 0) if run is not None else 0
        return profile.agent(symbol).answer_tokens(before, profile.everything)

    def mean_output_tokens(self, tenant: str, workflow: str, agent: str) -> float:
        """How long answers of an agent are in the mean, or of its workflow as long as it has
        answered little; 0 if nothing is known."""
        profile = self._known(tenant, workflow)
        if profile is None:
            return 0.0
        own = profile.agent(profile.known_symbol(agent)).output_tokens
        return own.mean() if own.values.samples >= FEW else profile.everything.output_tokens.mean()

    def workflows(self, tenant: str) -> list[str]:
        """The names of a tenant's workflows, in order."""
        found = self._tenants.get(self._short(tenant))
        return sorted(found.profiles) if found is not None else []

    def knows(self, tenant: str, workflow: str) -> bool:
        """Whether anything is known of a workflow."""
        return self._known(tenant, workflow) is not None

    def idle_s(self, tenant: str, workflow: str) -> float:
        """How long a run has to be silent to have ended."""
        profile = self._known(tenant, workflow)
        return profile.idle_s() if profile is not None else self._limits.idle_most_s

    def view(self, tenant: str, workflow: str) -> WorkflowView | None:
        """All that is known of a workflow, for people; None if nobody has seen it."""
        profile = self._known(tenant, workflow)
        return workflow_view(workflow, profile) if profile is not None else None

    def declare(self, tenant: str, workflow: str, graph: Graph | None) -> None:
        """Take a checked graph as a workflow's prior; None gives it up, what was learned stays."""
        if graph is None:
            profile = self._known(tenant, workflow)
            if profile is not None:
                profile.declare(None)
            return
        profile = self._profile(self._tenant(self._short(tenant)), self._short(workflow))
        edges = profile.edges
        profile.declare(graph)
        self._edge_count += profile.edges - edges

    def know_static(self, tenant: str, workflow: str, agent: str, block_hashes: bytes) -> None:
        """With what all prompts of a declared agent begin; what calls have shown stays."""
        profile = self._known(tenant, workflow)
        if profile is None or len(block_hashes) < BLOCK_HASH_BYTES:
            return
        counts = profile.agent(profile.known_symbol(agent))
        if counts.static is None and counts is not profile.agents[OTHER]:
            counts.static = Sketch(hashes_of(block_hashes))

    def forget(self, tenant: str, workflow: str) -> None:
        """Drop a workflow, all that was learned of it, and its live runs."""
        found = self._tenants.get(self._short(tenant))
        if found is not None and self._short(workflow) in found.profiles:
            self._drop_profile(found, self._short(workflow))

    def exported(self, tenant: str, workflow: str) -> ProfileRecord | None:
        """All that was learned of a workflow, to be kept somewhere; None if nothing was."""
        profile = self._known(tenant, workflow)
        return recorded(profile) if profile is not None else None

    def restore(self, tenant: str, workflow: str, record: ProfileRecord) -> None:
        """Take over what ``exported`` gave, in place of what was learned since.

        ValueError for a record of an unknown version or one that contradicts itself. Live runs
        of the workflow are forgotten; a declared graph stays.
        """
        name, found = self._short(workflow), self._tenant(self._short(tenant))
        profile = restored(record, self._new_profile(found, name))
        graph = None
        if name in found.profiles:
            graph = found.profiles[name].graph
            self._drop_profile(found, name)
            profile.number = self._free_numbers[-1]
        if graph is not None:
            profile.declare(graph)
        self._add_profile(found, name, profile)

    @property
    def live_runs(self) -> int:
        """How many runs are alive."""
        return self._run_count

    @property
    def live_calls(self) -> int:
        """How many calls run."""
        return len(self._calls)

    def reset_scores(self) -> None:
        """Forget how good predictions were, as at the beginning of an examination."""
        for profile in self.by_number.values():
            profile.scores = Scores(fading=self._score_fading)

    # --- runs --------------------------------------------------------------------------------

    def _run(self, key: RunKey, call: str, now_s: float) -> LiveRun:
        """The live run that a call belongs to, new or not."""
        tenant_name, workflow = self._short(key.tenant), self._short(key.workflow)
        name = self._short(key.run) if key.run else f"\0{self._short(call)}"
        tenant = self._tenant(tenant_name)
        run = tenant.runs.get((workflow, name))
        if run is not None:
            tenant.runs.move_to_end((workflow, name))
            tenant.profiles.move_to_end(workflow)
            return run
        while len(tenant.runs) >= self._limits.runs_per_tenant:
            self._end(next(iter(tenant.runs.values())), learn=False)
        if self._run_count >= self._limits.runs:
            self._end(self._oldest_run(tenant), learn=False)
        profile = self._profile(tenant, workflow)
        run = LiveRun(RunKey(tenant_name, workflow, name), profile, now_s)
        run.final = not key.run
        tenant.runs[workflow, name] = run
        self._run_count += 1
        profile.runs_started += 1
        arrivals = self.demand.arrivals
        arrivals[profile.number] = arrivals.get(profile.number, 0) + 1
        self._set_deadline(run, now_s + self._silence_s(run))
        return run

    def _oldest_run(self, tenant: _Tenant) -> LiveRun:
        """The run to give up when there are too many: this tenant's oldest, if it has any."""
        if not tenant.runs:
            tenant = next(other for other in self._tenants.values() if other.runs)
        return next(iter(tenant.runs.values()))

    def _silence_s(self, run: LiveRun) -> float:
        return self._limits.idle_most_s if run.running else run.profile.idle_s()

    def _set_deadline(self, run: LiveRun, deadline_s: float) -> None:
        run.deadline_s = deadline_s
        heapq.heappush(self._deadlines, (deadline_s, run.key))
        if len(self._deadlines) > 2 * self._run_count + 64:
            # Runs that ended leave their deadlines behind.
            runs = [run for tenant in self._tenants.values() for run in tenant.runs.values()]
            self._deadlines = [(run.deadline_s, run.key) for run in runs]
            heapq.heapify(self._deadlines)

    def _end(self, run: LiveRun, learn: bool) -> None:
        """A run is over. ``learn``: it came to its own end."""
        tenant = self._tenants[run.key.tenant]
        del tenant.runs[run.key.workflow, run.key.run]
        self._run_count -= 1
        profile = run.profile
        for call in run.open_ends():
            if learn:
                profile.ended_run(call.path, run.final)
            self._release(call)
        for call_id, call in run.running.items():
            del self._calls[call_id]
            self._release(call)
        if learn:
            profile.runs_ended += 1
            profile.run_calls.add(run.calls)
            for agent, visits in run.visits.items():
                profile.agent(agent).visits.add(visits)

    def _release(self, call: LiveCall) -> None:
        if call.unit != NOBODY:
            self.units.give_back(call.unit)
            call.unit = NOBODY

    # --- tenants and workflows -----------------------------------------------------------------

    def _tenant(self, name: str) -> _Tenant:
        found = self._tenants.get(name)
        if found is not None:
            self._tenants.move_to_end(name)
            return found
        found = self._tenants[name] = _Tenant(name)
        if len(self._tenants) > self._limits.tenants:
            self._drop_tenant(next(iter(self._tenants)))
        return found

    def _known(self, tenant: str, workflow: str) -> Profile | None:
        found = self._tenants.get(self._short(tenant))
        return found.profiles.get(self._short(workflow)) if found is not None else None

    def known(self, tenant: str, workflow: str) -> Profile | None:
        """What was learned of a workflow, if anything."""
        return self._known(tenant, workflow)

    def new_tokens_of(self, call: str) -> int | None:
        """What of a running call's prompt was in no earlier prompt or answer of its run, or of
        its agent; None if the call is not known."""
        found = self._calls.get(call)
        return found[1].new_tokens if found is not None else None

    def _profile(self, tenant: _Tenant, workflow: str) -> Profile:
        found = tenant.profiles.get(workflow)
        if found is None:
            found = self._new_profile(tenant, workflow)
            self._add_profile(tenant, workflow, found)
        tenant.profiles.move_to_end(workflow)
        return found

    def _new_profile(self, tenant: _Tenant, workflow: str) -> Profile:
        """An empty profile with the smallest number that nobody has."""
        number = self._free_numbers[-1] if self._free_numbers else len(self.by_number)
        return Profile(number, tenant.name, workflow, self._limits, self._score_fading)

    def _add_profile(self, tenant: _Tenant, workflow: str, profile: Profile) -> None:
        if profile.number in self._free_numbers[-1:]:
            self._free_numbers.pop()
        tenant.profiles[workflow] = profile
        self.by_number[profile.number] = profile
        self._edge_count += profile.edges
        while self._edge_count > self._limits.edges:
            owner = next(other for other in self._tenants.values() if other.profiles)
            if owner is tenant and len(tenant.profiles) == 1:
                break
            self._drop_profile(owner, self._least_used(owner, workflow))
        if len(tenant.profiles) > self._limits.workflows_per_tenant:
            self._drop_profile(tenant, self._least_used(tenant, workflow))

    def _least_used(self, tenant: _Tenant, but: str) -> str:
        """The workflow to forget: one that was not declared and has not been used for longest."""
        others = [name for name in tenant.profiles if name != but]
        learned = (name for name in others if tenant.profiles[name].graph is None)
        return next(learned, others[0] if others else but)

    def _drop_profile(self, tenant: _Tenant, workflow: str) -> None:
        for run in [run for run in tenant.runs.values() if run.key.workflow == workflow]:
            self._end(run, learn=False)
        profile = tenant.profiles.pop(workflow)
        self._edge_count -= profile.edges
        del self.by_number[profile.number]
        self._free_numbers.append(profile.number)

    def _drop_tenant(self, name: str) -> None:
        tenant = self._tenants[name]
        for workflow in list(tenant.profiles):
            self._drop_profile(tenant, workflow)
        del self._tenants[name]

    # --- bounds ----------------------------------------------------------------------------------

    def _clock(self, now_s: float) -> float:
        self._now_s = max(self._now_s, now_s)
        return self._now_s

    def _short(self, name: str) -> str:
        """A name of bounded length; long ones become their hash."""
        if len(name) <= self._limits.name_bytes // 4:
            return name
        encoded = name.encode("utf-8", "surrogatepass")
        if len(encoded) <= self._limits.name_bytes:
            return name
        return f"\0{blake2b(encoded, digest_size=16).hexdigest()}"

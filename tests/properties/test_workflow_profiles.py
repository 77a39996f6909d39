"""Whatever is told to the profiles in whatever order, they stay whole and within their bounds."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from coordinator.workflow.forecast import Forecaster
from coordinator.workflow.graph import Agent, Graph, Next
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.prediction import Prediction, RunKey
from coordinator.workflow.profiles import Profiles
from coordinator.workflow.record import ProfileRecord, recorded

LIMITS = WorkflowLimits(
    tenants=2,
    workflows_per_tenant=3,
    agents_per_workflow=4,
    runs_per_tenant=4,
    runs=6,
    calls_per_run=4,
    contexts_per_workflow=12,
    edges_per_workflow=8,
    edges=20,
    name_bytes=12,
    idle_least_s=5.0,
    idle_most_s=50.0,
)
NAMES = st.one_of(
    st.sampled_from(["", "a", "b", "c", "(end)", "\0", "\ud800", "x" * 40]),
    st.text(max_size=14),
)
KEYS = st.builds(RunKey, st.sampled_from(["", "t", "u"]), NAMES, NAMES)
CALLS = st.sampled_from([f"call-{number}" for number in range(12)])
TIMES = st.floats(min_value=-100.0, max_value=1000.0, allow_nan=False)
TOKENS = st.integers(min_value=-5, max_value=1 << 40)


class Anything(RuleBasedStateMachine):
    """Any event, at any time, by anybody."""

    def __init__(self) -> None:
        super().__init__()
        self.profiles = Profiles(LIMITS, 16)
        self.forecaster = Forecaster(self.profiles, LIMITS)
        self.records: OrderedDict[int, ProfileRecord] = OrderedDict()
        self.started: dict[str, int] = {}

    @rule(
        key=KEYS, call=CALLS, agent=NAMES, tokens=TOKENS, hashes=st.binary(max_size=50), at_s=TIMES,
        parent=NAMES, final=st.booleans(), uncached=st.none() | TOKENS,
    )  # fmt: skip
    def start(
        self, key: RunKey, call: str, agent: str, tokens: int, hashes: bytes, at_s: float,
        parent: str, final: bool, uncached: int | None,
    ) -> None:  # fmt: skip
        self.profiles.observe_start(key, call, agent, tokens, hashes, at_s, parent, final, uncached)

    @rule(call=CALLS, tokens=TOKENS, at_s=TIMES, completed=st.booleans())
    def end(self, call: str, tokens: int, at_s: float, completed: bool) -> None:
        self.profiles.observe_end(call, tokens, at_s, completed)

    @rule(key=KEYS, at_s=TIMES, completed=st.booleans())
    def end_run(self, key: RunKey, at_s: float, completed: bool) -> None:
        self.profiles.end_run(key, at_s, completed)

    @rule(at_s=TIMES)
    def expire(self, at_s: float) -> None:
        self.profiles.expire(at_s)

    @rule(at_s=TIMES, horizon_s=st.floats(min_value=-1, max_value=1e6))
    def forecast(self, at_s: float, horizon_s: float) -> None:
        self.forecaster.tick(at_s)
        found = self.forecaster.forecast(horizon_s, at_s)
        for interval in (
            found.prefill_tokens_per_s, found.decode_tokens_per_s, found.resident_kv_tokens
        ):  # fmt: skip
            assert 0 <= interval.low <= interval.likely * (1 + 1e-9)
            assert interval.likely <= interval.high * (1 + 1e-9) < float("inf")
            assert interval.expected >= -1e-6

    @rule(key=KEYS, declared=st.booleans())
    def declare(self, key: RunKey, declared: bool) -> None:
        graph = Graph({"a": Agent(), "b": Agent()}, [Next("a", "b")]) if declared else None
        self.profiles.declare(key.tenant, key.workflow, graph)

    @rule(key=KEYS)
    def forget(self, key: RunKey) -> None:
        self.profiles.forget(key.tenant, key.workflow)

    @rule(key=KEYS)
    def move(self, key: RunKey) -> None:
        """What was learned of one workflow becomes that of another."""
        for profile in list(self.profiles.by_number.values())[:1]:
            self.profiles.restore(key.tenant, key.workflow, recorded(profile))

    @rule(key=KEYS, agent=NAMES, at_s=TIMES)
    def ask(self, key: RunKey, agent: str, at_s: float) -> None:
        spread = self.profiles.output_tokens(key, agent)
        assert 0 <= spread.p05 <= spread.p50 <= spread.p95
        self.check_prediction(self.profiles.predict(key, at_s))
        view = self.profiles.view(key.tenant, key.workflow)
        assert view is None or all(0 <= edge.probability <= 1 for edge in view.edges)

    def check_prediction(self, found: Prediction) -> None:
        assert 0 <= found.end_probability <= 1 + 1e-9
        assert sum(one.probability for one in found.next) <= 1 + 1e-9
        assert all(one.probability >= 0.05 for one in found.next)
        assert 0 <= found.calls_left < float("inf")
        assert 0 <= found.trust <= 1

    @invariant()
    def bounded_and_whole(self) -> None:
        profiles = self.profiles
        tenants = profiles._tenants
        runs = [run for tenant in tenants.values() for run in tenant.runs.values()]
        assert len(runs) == profiles.live_runs <= LIMITS.runs
        assert len(tenants) <= LIMITS.tenants
        assert all(len(tenant.runs) <= LIMITS.runs_per_tenant for tenant in tenants.values())
        learned = [profile for tenant in tenants.values() for profile in tenant.profiles.values()]
        assert {id(one) for one in learned} == {id(one) for one in profiles.by_number.values()}
        assert all(number == one.number for number, one in profiles.by_number.items())
        assert sum(one.edges for one in learned) == profiles._edge_count
        for one in learned:
            assert len(one.automaton) <= LIMITS.contexts_per_workflow
            assert one.edges <= LIMITS.edges_per_workflow
            assert len(list(one.named_agents())) <= LIMITS.agents_per_workflow
            assert sum(len(agent.followers) for agent in one.agents.values()) == one.edges
        live = [call for run in runs for call in run.running.values()]
        assert len(live) == profiles.live_calls
        idle = [call for run in runs for call in run.open_ends()]
        assert sorted(call.unit for call in [*live, *idle] if call.unit >= 0) == [
            row for row in range(profiles.units.rows) if profiles.units.workflow[row] >= 0
        ]
        assert len(profiles._deadlines) <= 2 * len(runs) + 64


def test_any_order_of_events() -> None:
    run_state_machine_as_test(
        Anything,
        settings=settings(
            max_examples=150,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )

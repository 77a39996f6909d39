"""The table of live runs: whatever happens, it stays within bounds and its accounts agree."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.prediction import RunKey
from coordinator.workflow.roster import REFUSING, Run, RunEnd, Runs

LIMITS = WorkflowLimits(runs=6, runs_per_tenant=3, tenants=3, ended_runs=4, calls_per_run=2)
keys = st.builds(
    RunKey,
    st.sampled_from(["", "t", "u", "v"]),
    st.sampled_from(["w", "x"]),
    st.sampled_from(["r", "s", "thread"]),
)
calls = st.integers(0, 9).map(lambda number: ("api", str(number)))


class Table(RuleBasedStateMachine):
    """Calls and runs that come, go, repeat and are forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = Runs(LIMITS)
        self.now_s = 0.0
        self.open: dict[tuple[str, str], Run] = {}

    @rule(key=keys, call=calls, thread=st.sampled_from(["", "thread", "a", "b"]))
    def begin(self, key: RunKey, call: tuple[str, str], thread: str) -> None:
        if call in self.open:
            return
        key = self.runs.resolve(key)
        run = self.runs.opened(key, call, thread, "agent", self.now_s)
        if run is None:
            tenant = self.runs.tenants.get(key.tenant)
            full = tenant is not None and len(tenant.busy) == LIMITS.runs_per_tenant
            assert full or any(other.busy for other in self.runs.tenants.values())
            return
        assert self.runs.live[key] is run
        assert self.runs.refusal(key) is None
        self.open[call] = run

    @rule(call=calls, final=st.booleans(), at_end=st.booleans())
    def finish(self, call: tuple[str, str], final: bool, at_end: bool) -> None:
        run = self.open.pop(call, None)
        if run is None:
            return
        alive = self.runs.live.get(run.key) is run
        over = self.runs.closed(run, call, final, at_end, self.now_s)
        assert over == (alive and self.runs.live.get(run.key) is not run)
        if over:
            assert run not in self.open.values(), "siblings are not cut off"
            assert self.runs.ended[run.key][0] in (RunEnd.FINAL, RunEnd.GRAPH)

    @rule(key=keys, deadline_s=st.none() | st.floats(0, 9))
    def start(self, key: RunKey, deadline_s: float | None) -> None:
        run = self.runs.start(key, deadline_s, 1, self.now_s)
        if run is not None:
            assert self.runs.refusal(key) is None
            assert (run.explicit, run.deadline_s, run.priority) == (True, deadline_s, 1)

    @rule(key=keys, why=st.sampled_from([RunEnd.CANCELLED, RunEnd.DEADLINE, RunEnd.IDLE]))
    def end(self, key: RunKey, why: RunEnd) -> None:
        run = self.runs.live.get(key)
        if run is not None:
            self.runs.end(run, why, self.now_s)
            assert self.runs.refusal(key) == (why if why in REFUSING else None)

    @rule(elapsed_s=st.sampled_from([0.0, 1.0, 100.0]))
    def wait(self, elapsed_s: float) -> None:
        self.now_s += elapsed_s

    @invariant()
    def check(self) -> None:
        self.runs.check()
        for call, run in self.open.items():
            if self.runs.live.get(run.key) is run:
                assert call in run.open


def test_the_table_of_runs_keeps_its_bounds_and_accounts() -> None:
    run_state_machine_as_test(
        Table, settings=settings(max_examples=300, stateful_step_count=60, deadline=None)
    )

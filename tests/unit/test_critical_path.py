"""The critical path against sums by hand, and what nobody can beat."""

from __future__ import annotations

import pytest

from cluster.hardware import hardware
from cluster.simulator.critical_path import critical_path, decode_s, longest_think_s
from cluster.simulator.foresight import foresee
from cluster.simulator.records import CallRecord
from cluster.simulator.setup import ClusterSetup, EngineOptions, WorkerSetup
from cluster.workload.form import Call, Run, Workload
from cluster.workload.source import open_workload
from cluster.workload.spans import Spans
from coordinator.cost import ModelShape
from tests.unit.test_cost import SHAPES

SHAPE: ModelShape = next(shape for shape in SHAPES.values() if not shape.window)
SETUP = ClusterSetup(
    SHAPE, hardware("h200"), (WorkerSetup("w", "mixed"),), options=EngineOptions(block_size=16)
)
COST = SETUP.cost()


def call(
    index: int,
    parents: tuple[int, ...] = (),
    think_s: float = 0.0,
    prompt_tokens: int = 640,
    output_tokens: int = 10,
    blocks: Spans = (),
    continued: Spans = (),
) -> Call:
    return Call(index, parents, think_s, prompt_tokens, output_tokens, blocks, continued=continued)


def workload(*runs: tuple[Call, ...], concurrency: int = 0, arrival_s: float = 0.0) -> Workload:
    made = tuple(
        Run(f"r{number}", "flow", arrival_s, "scope", calls) for number, calls in enumerate(runs)
    )
    return Workload("w", "tests", "none", 64, made, concurrency=concurrency)


def alone_s(record: CallRecord) -> float:
    """What such a call takes by the step times themselves, one step after the other."""
    prefill_s = COST.step_s(((record.computed_tokens, record.local_cached_tokens),))
    steps = range(record.output_tokens - 1)
    return prefill_s + sum(COST.step_s((), 1, record.prompt_tokens + step) for step in steps)


def test_decoding_is_the_sum_of_all_steps() -> None:
    steps_s = [COST.decode_step_s(1, 1000 + step) for step in range(499)]
    assert decode_s(COST, 1000, 500) == pytest.approx(sum(steps_s))
    assert decode_s(COST, 1000, 1) == 0.0
    assert decode_s(COST, 1000, 2) == COST.decode_step_s(1, 1000)


def test_a_chain_is_the_sum_of_its_calls_and_pauses() -> None:
    chain = (call(0), call(1, (0,), 5.0, 1280), call(2, (1,), 2.0, 2560))
    result = critical_path(workload(chain, arrival_s=3.0), SETUP, seed=7)
    (run,) = result.runs
    assert [record.computed_tokens for record in result.calls] == [640, 1280, 2560]
    busy_s = sum(alone_s(record) for record in result.calls)
    assert run.completion_s == pytest.approx(busy_s + 7.0)
    assert (run.think_s, run.arrival_s, run.calls, run.finished) == (7.0, 3.0, 3, True)
    assert (result.configuration, result.seed, result.samples) == ("infinite", 7, [])
    assert result.calls[1].due_s == pytest.approx(result.calls[0].ended_s + 5.0)


def test_of_a_fan_out_only_the_longest_path_counts() -> None:
    short, long = call(1, (0,), 1.0), call(2, (0,), 0.5, output_tokens=4000)
    result = critical_path(workload((call(0), short, long, call(3, (1, 2), 2.0))), SETUP)
    by_index = {record.call: record for record in result.calls}
    on_path_s = sum(alone_s(by_index[index]) for index in (0, 2, 3))
    assert result.runs[0].completion_s == pytest.approx(on_path_s + 0.5 + 2.0)
    assert result.runs[0].think_s == 3.0
    assert longest_think_s(Run("r", "", 0.0, "", (call(0, (), 4.0),))) == 4.0


def test_nothing_that_was_computed_is_computed_again() -> None:
    # Four blocks of 64; the next prompt has them, the output's block, and one of its own.
    first = call(0, (), 0.0, 256, 65, ((0, 4),), ((4, 1),))
    second = call(1, (0,), 0.0, 384, 8, ((0, 6),))
    other = call(0, (), 0.0, 256, 8, ((0, 4),))
    result = critical_path(workload((first, second), (other,)), SETUP)
    by_name = {(record.run, record.call): record for record in result.calls}
    assert by_name[0, 1].computed_tokens == 64
    # The whole prompt is there, but its last token is computed all the same.
    assert by_name[1, 0].computed_tokens == 16
    assert by_name[1, 0].local_cached_tokens == 240


def test_with_infinite_resources_runs_do_not_feel_each_other() -> None:
    chain = (call(0), call(1, (0,), 5.0, 1280))
    alone = critical_path(workload(chain), SETUP).runs[0].completion_s
    many = critical_path(workload(*[chain] * 50), SETUP)
    assert [run.completion_s for run in many.runs] == pytest.approx([alone] * 50)


def test_in_a_closed_loop_a_run_begins_when_another_ends() -> None:
    result = critical_path(workload((call(0),), (call(0, think_s=2.0),), concurrency=1), SETUP)
    assert result.runs[1].arrival_s == pytest.approx(result.runs[0].ended_s)
    assert result.runs[1].completion_s > 2.0


def test_foresight_adds_up_to_the_critical_path() -> None:
    made = open_workload("generator:review?runs=5&seed=3")
    result = critical_path(made, SETUP)
    foreseen = foresee(made, SETUP)
    busy_s = [0.0] * len(made.runs)
    for record in result.calls:
        busy_s[record.run] += record.ended_s - record.due_s
    for number, run in enumerate(made.runs):
        roots = [foreseen[number, each.index] for each in run.calls if not each.parents]
        assert max(root.remaining_s for root in roots) == pytest.approx(busy_s[number])
        assert max(root.path_s for root in roots) == pytest.approx(
            result.runs[number].completion_s - min(c.think_s for c in run.calls if not c.parents)
        )
        last = foreseen[number, len(run.calls) - 1]
        largest = max(each.prompt_tokens + each.output_tokens for each in run.calls)
        assert roots[0].largest_tokens == largest
        assert last.after_decode_s <= roots[0].after_decode_s
        assert 0.0 < last.active <= 1.0


def test_calls_before_a_call_are_no_work_that_is_left() -> None:
    calls = (call(0), call(1, (0,)), call(2, (0,)), call(3, (1, 2)))
    foreseen = foresee(workload(calls), SETUP)
    left_s = [foreseen[0, index].remaining_s for index in range(4)]
    own_s = left_s[3]
    assert left_s == pytest.approx([4 * own_s, 3 * own_s, 3 * own_s, own_s], rel=0.05)
    assert [foreseen[0, index].path_s for index in range(4)] == pytest.approx(
        [3 * own_s, 2 * own_s, 2 * own_s, own_s], rel=0.05
    )


def test_nothing_to_do_takes_no_time() -> None:
    result = critical_path(workload(), SETUP)
    assert (result.calls, result.runs, result.totals.duration_s) == ([], [], 0.0)

"""A workload replayed on a cluster of real processes with fake engines."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from cluster.launch import LocalCluster
from cluster.model_tiny import VOCABULARY
from cluster.process import free_port
from cluster.simulator.live import LiveError, LiveReplay, Target
from cluster.simulator.records import CallRecord
from cluster.workload.form import Call, Run, Workload
from cluster.workload.spans import Spans
from coordinator.limits import Placement
from tests.unit.fake_cluster import MODEL, STEP_S, WAIT_S, running

BLOCK = 16


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    log_dir = tmp_path_factory.mktemp("fake-cluster")
    # By memory alone: which way calls go does not depend on how fast this machine is.
    placement = Placement(policy="least_kv")
    with running(log_dir, ("prefill", "decode"), 1, placement) as cluster:
        yield cluster


@pytest.fixture
def target(cluster: LocalCluster) -> Target:
    return Target(cluster.base_url, MODEL, VOCABULARY // 4, VOCABULARY // 2, call_s=WAIT_S)


def call(
    index: int,
    prompt_tokens: int,
    output_tokens: int,
    blocks: Spans,
    parents: tuple[int, ...] = (),
    think_s: float = 0.0,
    continued: Spans = (),
) -> Call:
    return Call(
        index, parents, think_s, prompt_tokens, output_tokens, blocks, "a", "agent",
        continued=continued,
    )  # fmt: skip


def workload_of(*runs: tuple[Call, ...], concurrency: int = 0) -> Workload:
    made = tuple(
        Run(f"run-{at}", "flow", 0.1 * at, f"scope-{at}", calls) for at, calls in enumerate(runs)
    )
    return Workload("w", "tests", "none", BLOCK, made, concurrency=concurrency)


FORK = (
    call(0, 40, 10, ((0, 2),), continued=((2, 2),)),
    call(1, 70, 5, ((0, 4),), parents=(0,), think_s=0.3),
    call(2, 30, 20, ((100, 1),), parents=(0,), think_s=0.1),
    call(3, 20, 1, ((200, 1),), parents=(1, 2)),
)


def by_call(calls: list[CallRecord], run: int) -> dict[int, CallRecord]:
    return {record.call: record for record in calls if record.run == run}


async def test_every_call_is_served_after_its_parents_and_its_pause(target: Target) -> None:
    ended: list[int] = []
    replay = LiveReplay(target, workload_of(FORK, FORK), progress=ended.append)
    result = await replay.run()
    assert ended == list(range(1, 9))
    assert (result.where, result.workload) == ("live", "w")
    assert [(record.run, record.call) for record in result.calls] == [
        (run, index) for run in range(2) for index in range(4)
    ]
    for run in range(2):
        found = by_call(result.calls, run)
        for one in FORK:
            record = found[one.index]
            assert (record.outcome, record.status, record.attempts) == ("length", 0, 1)
            assert record.prompt_tokens == one.prompt_tokens
            assert record.output_tokens == one.output_tokens
            assert record.agent == "agent"
            # The fake engines have no caches, and the prompts are too short to be moved.
            assert (record.prefill, record.decode, record.moved_tokens) == ("", "decode-1", 0)
            assert record.computed_tokens == one.prompt_tokens
            assert record.due_s < record.first_token_s <= record.ended_s
            ready_s = max((found[parent].ended_s for parent in one.parents), default=0.1 * run)
            assert 0.0 <= record.due_s - (ready_s + one.think_s) < 0.5
            # A step takes STEP_S, but waiting for one is not exact.
            steps_s = STEP_S * (one.output_tokens - 1)
            assert record.ended_s - record.first_token_s >= 0.9 * steps_s - STEP_S
    assert sum(result.gaps.counts.values()) == 2 * sum(one.output_tokens - 1 for one in FORK)
    assert replay.unknown_outputs == 0
    assert result.totals.counters["calls_finished"] == 8
    assert result.totals.gpus == 2


async def test_what_is_prefilled_elsewhere_is_told(target: Target) -> None:
    tokens = 600
    (record,) = (await LiveReplay(target, workload_of((call(0, tokens, 3, ()),))).run()).calls
    assert (record.prefill, record.decode) == ("prefill-0", "decode-1")
    assert (record.prefill_cached_tokens, record.local_cached_tokens) == (0, 0)
    # The decode worker computes what it lacks beside what it has read.
    assert 0 < record.moved_tokens <= tokens
    assert record.computed_tokens == 2 * tokens - record.moved_tokens


async def test_runs_are_measured_from_their_arrival_to_their_last_answer(target: Target) -> None:
    result = await LiveReplay(target, workload_of(FORK, FORK)).run()
    for position, run in enumerate(result.runs):
        found = by_call(result.calls, position)
        assert (run.run, run.id, run.workflow, run.calls) == (
            position,
            f"run-{position}",
            "flow",
            4,
        )
        assert run.arrival_s == pytest.approx(0.1 * position)
        assert run.ended_s == found[3].ended_s
        assert run.think_s == pytest.approx(0.3)
        assert run.finished
    assert result.totals.duration_s == max(run.ended_s for run in result.runs)


async def test_in_a_closed_loop_a_run_begins_when_another_has_ended(target: Target) -> None:
    one = (call(0, 20, 5, ()),)
    result = await LiveReplay(target, workload_of(one, one, one, concurrency=1)).run()
    first, second, third = result.runs
    assert 0.0 <= first.arrival_s < 0.5
    assert second.arrival_s >= first.ended_s
    assert third.arrival_s >= second.ended_s


async def test_more_calls_than_the_core_remembers_are_all_accounted_for(target: Target) -> None:
    runs = [(call(0, 20, 1, ()),) for _ in range(300)]
    result = await LiveReplay(target, workload_of(*runs, concurrency=16)).run()
    assert len(result.calls) == 300
    assert {record.outcome for record in result.calls} == {"length"}
    assert all(record.decode for record in result.calls)


async def test_a_run_whose_call_is_refused_is_given_up(target: Target) -> None:
    too_long = (call(0, 20, 5, ()), call(1, 20_000, 5, (), parents=(0,)), call(2, 20, 5, (), (1,)))
    result = await LiveReplay(target, workload_of(too_long, FORK)).run()
    refused = by_call(result.calls, 0)
    assert (refused[0].outcome, refused[1].outcome) == ("length", "rejected")
    assert (refused[1].status, refused[1].output_tokens, refused[1].decode) == (400, 0, "")
    assert 2 not in refused
    assert [run.finished for run in result.runs] == [False, True]
    assert len(by_call(result.calls, 1)) == 4


async def test_a_call_that_takes_too_long_is_an_error_of_that_call(target: Target) -> None:
    hasty = msgspec.structs.replace(target, call_s=20 * STEP_S)
    long_and_short = ((call(0, 20, 1000, ()),), (call(0, 20, 1, ()),))
    result = await LiveReplay(hasty, workload_of(*long_and_short)).run()
    assert [record.outcome for record in result.calls] == ["error", "length"]
    assert [run.finished for run in result.runs] == [False, True]
    # The core counts what was given up as its client's choice.
    assert 0 < result.calls[0].output_tokens < 1000


async def test_a_server_that_is_not_there_is_an_error_at_once() -> None:
    target = Target(f"http://127.0.0.1:{free_port('127.0.0.1')}", MODEL, 1, 2)
    with pytest.raises(LiveError, match="/v1/cluster"):
        await LiveReplay(target, workload_of(FORK)).run()

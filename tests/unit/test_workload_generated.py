"""Generated workloads look like the traces they were measured from, and like workflows."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.workload.__main__ import main
from cluster.workload.common import read_common
from cluster.workload.fit import habits_of, role
from cluster.workload.form import Workload, leaves
from cluster.workload.generators import GENERATORS, Options, generated
from cluster.workload.habits import load_habits
from cluster.workload.measure import Figures, figures
from cluster.workload.spans import shared, total

DATA = Path(__file__).parents[1] / "data" / "workload"
HABITS = load_habits()


def made(name: str, seed: int = 1, **options: int) -> Workload:
    return generated(name, HABITS, Options(**options), random.Random(seed))


@pytest.fixture(scope="module")
def sessions() -> dict[str, Figures]:
    """The generators that imitate one trace each, measured."""
    return {
        "weka_single": figures(made("coding", runs=250)),
        "weka_subagents": figures(made("subagents", runs=25)),
        "taubench_airline": figures(made("assistant", runs=200)),
    }


@pytest.mark.parametrize("trace", ["weka_single", "weka_subagents", "taubench_airline"])
def test_sessions_have_the_cache_hits_of_real_ones(
    sessions: dict[str, Figures], trace: str
) -> None:
    made_so, real = sessions[trace], HABITS.references[trace]
    assert 0.92 <= made_so.cached_share <= 0.975
    assert made_so.cached_share == pytest.approx(real.cached_share, abs=0.02)
    assert made_so.uncached_tokens_p50 == pytest.approx(real.uncached_tokens_p50, rel=0.35)
    assert made_so.uncached_tokens_p95 == pytest.approx(real.uncached_tokens_p95, rel=0.35)
    # Few calls carry most of what is to be prefilled.
    assert made_so.uncached_top_share == pytest.approx(real.uncached_top_share, abs=0.1)


@pytest.mark.parametrize("trace", ["weka_single", "weka_subagents", "taubench_airline"])
def test_sessions_have_the_lengths_and_pauses_of_real_ones(
    sessions: dict[str, Figures], trace: str
) -> None:
    made_so, real = sessions[trace], HABITS.references[trace]
    assert made_so.prompt_tokens_p50 == pytest.approx(real.prompt_tokens_p50, rel=0.4)
    assert made_so.output_tokens_p50 == pytest.approx(real.output_tokens_p50, rel=0.1)
    if real.gap_s_p50:
        assert made_so.gap_s_p50 == pytest.approx(real.gap_s_p50, rel=0.15)
        assert made_so.gap_s_p90 == pytest.approx(real.gap_s_p90, rel=0.3)


@pytest.mark.parametrize("name", GENERATORS)
def test_runs_are_sound(name: str) -> None:
    workload = made(name, runs=6)
    assert workload == made(name, runs=6)
    assert workload != made(name, seed=2, runs=6)
    assert len({run.id for run in workload.runs}) == 6
    for run in workload.runs:
        assert [call.index for call in run.calls] == list(range(len(run.calls)))
        for call in run.calls:
            assert all(parent < call.index for parent in call.parents)
            assert total(call.blocks) == call.prompt_tokens // workload.block_tokens
            assert call.output_tokens >= 1
        assert leaves(run.calls) == [run.calls[-1].index]
        assert run.calls[-1].final


@pytest.mark.parametrize("name", GENERATORS)
def test_agents_of_a_kind_begin_alike_in_all_runs(name: str) -> None:
    one, two = made(name, runs=2, stages=3).runs
    kinds = {call.kind for call in one.calls} & {call.kind for call in two.calls}
    assert kinds
    for kind in kinds:
        first, other = (next(call for call in run.calls if call.kind == kind) for run in (one, two))
        habit = HABITS.agents.get({"mapper": "explorer"}.get(kind, kind))
        measured = habit.static_tokens if habit else 0
        assert shared(first.blocks, other.blocks) == (measured or 1344) // 64


def test_the_review_workflow_fans_out_joins_and_loops() -> None:
    run = made("review", runs=1, width=3, rounds=2).runs[0]
    plan = run.calls[0]
    explorers = [call for call in run.calls if call.parents == (plan.index,)]
    assert [call.kind for call in explorers] == ["explorer"] * 3
    # Explorers of a run share the plan behind their instructions.
    assert shared(explorers[0].blocks, explorers[1].blocks) * 64 >= 8991 // 64 * 64
    join = next(call for call in run.calls if len(call.parents) == 3)
    assert join.kind == "engineer"
    reviews = [call for call in run.calls if call.kind == "reviewer"]
    assert len(reviews) == 2
    assert shared(reviews[0].blocks, reviews[1].blocks) == total(reviews[0].blocks)
    assert run.calls[-1].kind == "planner"
    assert shared(run.calls[-1].blocks, plan.blocks) == total(plan.blocks)


def test_map_reduce_has_a_tree_of_reducers() -> None:
    run = made("mapreduce", runs=1, width=10).runs[0]
    mappers = [call for call in run.calls if call.kind == "mapper"]
    reducers = [call for call in run.calls if call.kind == "reducer"]
    assert [len(call.parents) for call in mappers] == [0] * 10
    assert [len(call.parents) for call in reducers] == [4, 4, 2, 3]


def test_a_chain_tells_each_agent_what_was_said() -> None:
    calls = made("chain", runs=1, stages=4).runs[0].calls
    assert [call.parents for call in calls] == [(), (0,), (1,), (2,)]
    grown = [call.prompt_tokens - before.prompt_tokens for before, call in pairwise(calls)]
    assert grown == [call.output_tokens for call in calls[:-1]]


def test_sub_agents_work_while_the_lead_waits() -> None:
    workload = made("subagents", runs=10)
    forks = 0
    for run in workload.runs:
        for call in run.calls:
            others = {run.calls[parent].agent for parent in call.parents} - {call.agent}
            if call.kind == "lead" and others:
                forks += 1
                # The lead goes on from its own call, and has read what the others found.
                (own,) = [parent for parent in call.parents if run.calls[parent].kind == "lead"]
                read = sum(run.calls[parent].output_tokens for parent in call.parents)
                assert call.prompt_tokens == run.calls[own].prompt_tokens + read
    assert forks / sum(
        call.kind == "lead" for run in workload.runs for call in run.calls
    ) == pytest.approx(HABITS.shape.fork_share, rel=0.5)


def test_habits_are_measured_from_calls() -> None:
    workload = read_common(DATA / "weka_subagents.jsonl.gz")
    explorer = habits_of(workload, {"Explore"})
    assert explorer.calls.values[0] == 10
    assert explorer.first_tokens.values[0] == 9526
    assert explorer.context_tokens == 34028
    grown = explorer.new_tokens.values
    assert (grown[0], grown[-1]) == (34028 - 33145 - 363, 15876 - 11116 - 267)
    assert explorer.compacted_share == 0
    assert [role(kind) for kind in ("Orchestrator", "Validation_Expert", "WebSurfer")] == [
        "planner",
        "reviewer",
        "expert",
    ]


def test_the_command_shows_and_writes_workloads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["describe", "coding?runs=5&rate=1"]) == 0
    shown = capsys.readouterr().out
    assert "weka_single" in shown
    assert "cached share" in shown
    target = tmp_path / "chain.jsonl.gz"
    assert main(["write", "chain?runs=4&seed=3", str(target)]) == 0
    assert read_common(target) == made("chain", seed=3, runs=4)
    assert main(["describe", "chian"]) == 2
    assert "chian" in capsys.readouterr().err

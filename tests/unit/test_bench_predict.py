"""``pythia bench predict`` on generated traces: what it judges, and that it judges rightly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.bench import prediction_cost
from cluster.bench.command import run_bench
from cluster.bench.prediction_load import by_application, mean_duration_s, once, repeated
from cluster.bench.prediction_pass import Bound, judge_forecasts
from cluster.bench.timeline import Event, timeline
from cluster.schema import ConfigError
from cluster.workload.form import Call, Run, Workload
from cluster.workload.source import open_workload

FIGURES = {
    "next_agent_top1",
    "next_agent_top1_bound",
    "length95_coverage",
    "length95_width_ratio",
    "gap_calibration_error",
    "forecast30s_mae_ratio_prefill",
    "forecast30s_mae_ratio_decode",
    "update_us_p50",
    "forecast_ms_10k_runs",
    "bytes_per_finished_run",
}


def generated(line: str = "review?runs=24&seed=1") -> Workload:
    return open_workload(f"generator:{line}")


def test_the_command_prints_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_cost, "LIVE_RUNS", 200)
    path = tmp_path / "figures.json"
    words = ["generator:review?runs=24&seed=1", "generator:chain?runs=24&seed=1"]
    options = [*words, "--library", "false", "--concurrency", "6"]
    assert run_bench("predict", path, None, options) == 0
    report = json.loads(path.read_text())
    assert report["figures"].keys() >= FIGURES
    assert {row["trace"] for row in report["rows"]} >= {"review", "chain", "merged"}
    # Every expert of a chain is followed by the next one.
    assert report["figures"]["chain.next_agent_top1"] > 0.9
    assert report["figures"]["review.next_agent_top1_bound"] <= 1.0
    assert report["figures"]["review.forecast30s_mae_ratio_decode"] < 1.1


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "which traces"), (["nowhere.jsonl"], "nowhere"), (["generator:nothing"], "nothing")],
)
def test_traces_that_are_none_are_said_to_be(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_bench("predict", None, None, words)


def test_other_benchmarks_take_no_words() -> None:
    with pytest.raises(ConfigError, match="no option 'word'"):
        run_bench("core", None, None, ["word"])


def test_a_timeline_is_in_order_and_whole() -> None:
    workload = generated()
    load = once(workload, 4, 0)
    events = list(timeline(load.workload))
    assert [event.at_s for event in events] == sorted(event.at_s for event in events)
    started = [event.call_id for event in events if not event.ends]
    ended = [event.call_id for event in events if event.ends]
    assert len(set(started)) == len(started) == len(ended)
    assert set(started) == set(ended)
    ends_s = {event.call_id: event.at_s for event in events if event.ends}
    for event in events:
        for parent in event.call.parents if not event.ends else ():
            assert ends_s[f"{event.run.id}#{parent}"] <= event.at_s


def test_halves_share_no_runs_and_keep_the_concurrency() -> None:
    load = repeated(generated("review?runs=40&seed=1"), 12.0, 0)
    halves: tuple[set[str], set[str]] = (set(), set())
    for run in load.workload.runs:
        halves[run.arrival_s >= load.half_s].add(run.id.split("~")[0])
    assert not halves[0] & halves[1]
    assert len({run.id for run in load.workload.runs}) == len(load.workload.runs)
    duration_s = mean_duration_s(load.workload)
    alive = len(load.workload.runs) * duration_s / load.end_s
    assert alive == pytest.approx(12, rel=0.25)


def test_runs_of_one_file_are_told_apart_by_their_ids_only_if_all_are_numbered() -> None:
    def named(*ids: str) -> set[str]:
        call = Call(0, (), 0.0, 10, 1, ())
        runs = tuple(Run(name, "file", 0.0, "file", (call,)) for name in ids)
        return {run.workflow for run in by_application(Workload("file", "", "", 64, runs)).runs}

    assert named("Hand-1", "Algo-22") == {"file/Hand", "file/Algo"}
    assert named("airline-0-0", "airline-1-0") == {"file/airline"}
    assert named("ai-twin", "Hand-1") == {"file"}


def test_the_bound_by_hand() -> None:
    bound = Bound()
    for number, agents in enumerate(["aab", "aab", "aac"]):
        calls = tuple(
            Call(at, (at - 1,) if at else (), 0.0, 10, 1, (), kind=agent)
            for at, agent in enumerate(agents)
        )
        run = Run(str(number), "flow", 0.0, "flow", calls)
        for call in calls:
            bound.see(Event(0.0, False, run, call, 10), judged=True)
    # After a: a three times. After a, a: b twice and c once.
    assert bound.best() == 5 / 6
    # For the third run b was always next; for the others b or c, of which the name decides.
    assert bound.fair() == pytest.approx((3 + 0) / 6)


def test_demand_is_what_the_calls_need() -> None:
    load = repeated(generated(), 6.0, 0)
    series, _, _ = judge_forecasts(load, finals=True)
    events = [event for event in timeline(load.workload) if event.at_s < load.end_s]
    prompts = sum(event.uncached_tokens for event in events if not event.ends)
    answers = sum(event.call.output_tokens for event in events if event.ends)
    prefilled, decoded = (series.demand.sum(axis=0) * 5.0).tolist()
    assert prefilled == pytest.approx(prompts, rel=0.01)
    assert decoded == pytest.approx(answers, rel=0.02)
    assert (series.known <= series.came + 1e-6).all()
    assert (series.known >= -1e-6).all()
    judged = series.judged
    assert np.isfinite(series.said).all()
    assert judged.sum() > 100

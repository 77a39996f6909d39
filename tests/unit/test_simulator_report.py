"""The tables, figures, files and plots of a comparison, from results that were made up."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from cluster.schema import ConfigError
from cluster.simulator.gantt import Axis, Fold, folded, phases
from cluster.simulator.measures import TTFT, Measure
from cluster.simulator.outcome import Outcome, outcome_of
from cluster.simulator.plots import write_plots
from cluster.simulator.records import CallRecord
from cluster.simulator.report import (
    Comparison,
    comparisons,
    figures_of,
    rows_of,
    show,
    show_summary,
)
from cluster.simulator.results import Results
from cluster.simulator.scenario import Scenario, Source
from cluster.simulator.setup import ClusterSetup, Slo, WorkerSetup
from coordinator.cost import Hardware, ModelShape
from tests.unit.made_results import made_result

SLOWER = {"sticky": 1.0, "round-robin": 1.3, "pythia": 0.8, "oracle": 0.5}


def outcomes(seeds: int = 3, pictured: bool = False) -> list[Outcome]:
    return [
        outcome_of(made_result(name, seed, slower, runs=20), Slo(), 1.5, pictured and seed == 0)
        for seed in range(seeds)
        for name, slower in SLOWER.items()
    ]


def figures_only(configuration: str, seed: int, **figures: float) -> Outcome:
    return Outcome(
        workload="w",
        configuration=configuration,
        seed=seed,
        figures={"runs_served_share": 1.0, "runs": 9, "calls": 99, "gpus": 2, **figures},
        completions_s=[],
        servings_s=[],
    )


def printed(comparison: Comparison) -> str:
    console = Console(width=140)
    with console.capture() as capture:
        show(console, comparison)
    return capture.get()


# --- tables ---------------------------------------------------------------------------


def test_what_nobody_warmed_up_is_not_shown_as_nothing_wasted() -> None:
    found = [figures_only(name, 0, preemptions=2.0) for name in ("sticky", "quick")]
    found[1].figures["wasted_warmups"] = 3.0
    panel = printed(Comparison(found, "sticky")).partition("engines and core")[2]
    (sticky,) = (line for line in panel.splitlines() if line.startswith(" sticky"))
    (quick,) = (line for line in panel.splitlines() if line.startswith(" quick"))
    assert sticky.split()[-1] == "-"
    assert quick.split()[-1] == "3.00"
    del found[1].figures["wasted_warmups"]
    panel = printed(Comparison(found, "sticky")).partition("engines and core")[2]
    assert "warm-ups" in panel


def test_a_panel_as_people_see_it() -> None:
    found = [
        figures_only(name, seed, ttft_s_mean=mean, ttft_s_p50=1.0)
        for seed in range(3)
        for name, mean in (("sticky", 2.0 + seed), ("quick", 1.0 + seed / 2), ("ideal", 0.012))
    ]
    found[4].figures["runs_served_share"] = 0.9  # quick, seed 1
    text = printed(Comparison(found, "sticky", ["ideal"]))
    panel = text.partition("time to first token")[2].partition("service")[0]
    assert [line.rstrip() for line in panel.splitlines() if line.strip()] == [
        ", s",
        "                                     against",
        " configuration          mean       reference     P50",
        "─" * 53,
        " sticky           3.00 ±2.48       reference    1.00",
        " quick !          1.50 ±1.24   -50.0% ±41.4%    1.00",
        " ideal                 0.012   -99.6% ±82.8%    1.00",
    ]


def test_a_table_says_all_that_was_asked_for() -> None:
    text = printed(comparisons(outcomes(), "sticky", ["oracle"])[0])
    for words in (
        "completion time of runs, s",
        "without the runs' own pauses",
        "time to first token, s",
        "time between tokens, ms",
        "good calls",
        "tokens/GPU",
        "prefix hits",
        "recomputed",
        "nvlink",
        "decode KV",
        "preemptions",
        "core, us",
        "over 3 seeds",
        "bounds, not systems: oracle",
        "reference, compared with on the same seeds: sticky",
    ):
        assert words in text
    assert "pcie" not in text  # nothing moved over it
    assert max(len(line) for line in text.splitlines()) <= 140
    assert "…" not in text


def test_one_seed_has_no_intervals_and_no_best() -> None:
    text = printed(comparisons(outcomes(seeds=1), "sticky")[0])
    assert "±" not in text
    assert "*" not in text
    assert "one seed: no intervals" in text


def test_the_summary_has_every_workload() -> None:
    found = outcomes() + [
        msgspec.structs.replace(outcome, workload="others") for outcome in outcomes()
    ]
    console = Console(width=140)
    with console.capture() as capture:
        show_summary(console, comparisons(found, "sticky", ["oracle"]))
    lines = capture.get().splitlines()
    assert any("sessions" in line and "others" in line for line in lines)
    assert sum(line.strip().startswith(tuple(SLOWER)) for line in lines) == len(SLOWER)


MEAN = TTFT[0]


def best(values: dict[str, list[float]], measure: Measure = MEAN, **fields: object) -> set[str]:
    found = [
        figures_only(name, seed, **{measure.name: value})
        for name, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]
    return Comparison(found, "a", **fields).best(measure)  # type: ignore[arg-type]


def test_best_is_what_is_better_on_the_same_seeds() -> None:
    # The seeds differ more than the configurations, and still there is no doubt.
    assert best({"a": [1.0, 5.0, 9.0], "b": [1.1, 5.1, 9.1]}) == {"a"}
    higher = Measure("goodput_calls_per_s", "", "", "higher")
    assert best({"a": [1.0, 5.0, 9.0], "b": [1.1, 5.1, 9.1]}, higher) == {"b"}


def test_what_can_not_be_told_from_the_best_is_marked_too() -> None:
    assert best({"a": [1.0, 2.0, 3.0], "b": [1.2, 1.9, 3.1], "c": [9.0, 9.1, 9.2]}) == {"a", "b"}


def test_bounds_and_those_who_do_not_serve_are_not_best() -> None:
    values = {"a": [2.0, 2.1], "b": [3.0, 3.1], "ideal": [0.1, 0.1]}
    assert best(values, bounds=["ideal"]) == {"a"}
    drops = [figures_only("ideal", seed, ttft_s_mean=0.1) for seed in range(2)]
    drops[1].figures["runs_served_share"] = 0.99
    others = [
        figures_only(name, seed, ttft_s_mean=value + seed)
        for name, value in (("a", 2.0), ("b", 3.0))
        for seed in range(2)
    ]
    assert Comparison(drops + others, "a").best(MEAN) == {"a"}


def test_nobody_is_best_alone_or_of_equals() -> None:
    assert best({"a": [1.0, 2.0]}) == set()
    assert best({"a": [1.0, 2.0], "b": [1.0, 2.0]}) == set()


# --- figures --------------------------------------------------------------------------


def test_figures_are_finite_and_named() -> None:
    found = outcomes()
    figures = figures_of(comparisons(found, "sticky"))
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["sessions.pythia.ttft_s_mean.against"] == pytest.approx(-0.2, abs=0.01)
    assert figures["sessions.pythia.ttft_s_mean.against_ci95"] < 0.05
    assert "sessions.sticky.ttft_s_mean.against" not in figures
    mean = sum(o.figures["ttft_s_mean"] for o in found if o.configuration == "pythia") / 3
    assert figures["sessions.pythia.ttft_s_mean"] == pytest.approx(mean)
    assert figures["sessions.pythia.ttft_s_mean.ci95"] > 0


def test_rows_are_single_replays() -> None:
    rows = rows_of(outcomes())
    assert len(rows) == 3 * len(SLOWER)
    assert {"workload", "configuration", "seed", "ttft_s_p99"} <= rows[0].keys()


# --- files of results -----------------------------------------------------------------


def scenario(**changes: object) -> Scenario:
    shape = ModelShape(layers=2, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn=128, vocab=1000)
    hardware = Hardware(
        name="h", flops_per_s={"bf16": 1e12}, memory_bytes_per_s=1e12, memory_bytes=1e9
    )
    made = Scenario(
        name="made",
        model="m",
        setup=ClusterSetup(shape, hardware, (WorkerSetup("w", "mixed"),)),
        workloads=(Source("sessions", "generator:chain"),),
        seeds=3,
        compare=("pythia",),
        reference="pythia",
    )
    return msgspec.structs.replace(made, **changes)


def test_results_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    first = Results(path, scenario(), resume=False)
    found = outcomes(1, pictured=True)
    for outcome in found[:2]:
        first.append(outcome)
    first.close()
    again = Results(path, scenario(seeds=9, compare=("x", "y")), resume=True)
    assert again.found == found[:2]
    again.append(found[2])
    again.close()
    assert Results(path, scenario(), resume=True).found == found[:3]


def test_a_line_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first = Results(path, scenario(), resume=False)
    found = outcomes(1)
    for outcome in found[:2]:
        first.append(outcome)
    first.close()
    path.write_bytes(path.read_bytes()[:-7])
    again = Results(path, scenario(), resume=True)
    assert again.found == found[:1]
    again.append(found[1])
    again.close()
    assert Results(path, scenario(), resume=True).found == found[:2]


def test_results_of_another_scenario_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Results(path, scenario(), resume=False).close()
    with pytest.raises(ConfigError, match="another scenario"):
        Results(path, scenario(workloads=()), resume=True)
    with pytest.raises(ConfigError, match="exists; --resume"):
        Results(path, scenario(), resume=False)
    path.write_bytes(path.read_bytes() + b"{]\n")
    with pytest.raises(ConfigError, match=r"results\.jsonl:2: "):
        Results(path, scenario(), resume=True)


# --- plots ----------------------------------------------------------------------------


def test_plots_are_files_with_content(tmp_path: Path) -> None:
    files = write_plots(tmp_path / "plots", outcomes(pictured=True), "sticky", ["oracle"])
    names = {file.name for file in files}
    assert "completion-sessions.png" in names
    assert {f"load-sessions-{name}.png" for name in SLOWER} <= names
    assert {f"run-sessions-{name}.png" for name in SLOWER} <= names
    for file in files:
        content = file.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000


def test_without_pictures_there_are_still_curves(tmp_path: Path) -> None:
    assert [file.name for file in write_plots(tmp_path, outcomes(1), "sticky")] == [
        "completion-sessions.png"
    ]


def test_phases_follow_each_other() -> None:
    call = CallRecord(
        run=0,
        call=0,
        due_s=1.0,
        planned_s=2.0,
        first_token_s=3.0,
        loaded_s=3.5,
        ended_s=9.0,
        outcome="stop",
    )
    assert phases(call) == [
        ("waits for a plan", 1.0, 2.0),
        ("prefill", 2.0, 3.0),
        ("transfer", 3.0, 3.5),
        ("decode", 3.5, 9.0),
    ]
    call.loaded_s = 0.0
    assert [name for name, _, _ in phases(call)] == ["waits for a plan", "prefill", "decode"]


def test_calls_that_were_not_served_are_shown_as_such() -> None:
    rejected = CallRecord(run=0, call=0, due_s=1.0, ended_s=5.0, outcome="rejected")
    assert phases(rejected) == [("not served", 1.0, 5.0)]
    lost = CallRecord(
        run=0, call=0, due_s=1.0, planned_s=2.0, first_token_s=3.0, ended_s=5.0, outcome="error"
    )
    assert phases(lost)[-1] == ("not served", 3.0, 5.0)
    assert phases(CallRecord(run=0, call=0, due_s=1.0)) == []


def test_long_pauses_are_folded() -> None:
    calls = [
        CallRecord(run=0, call=0, due_s=100.0, ended_s=150.0),
        CallRecord(run=0, call=1, due_s=140.0, ended_s=200.0),
        CallRecord(run=0, call=2, due_s=1200.0, ended_s=1300.0),
        CallRecord(run=0, call=3, due_s=1301.0, ended_s=1302.0),
    ]
    axis = folded(calls)
    (fold,) = axis.folds
    assert (fold.begin_s, fold.end_s) == (200.0, 1200.0)
    assert axis.place(100.0) == 0.0
    assert axis.place(200.0) == 100.0
    assert axis.place(1200.0) == pytest.approx(100.0 + fold.width_s)
    assert axis.place(1300.0) == pytest.approx(200.0 + fold.width_s)
    middle = Axis(0.0, [Fold(10.0, 20.0, 1.0)])
    assert middle.place(15.0) == pytest.approx(10.5)

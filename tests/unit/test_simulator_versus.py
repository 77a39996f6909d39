"""Pythia against other systems: loads, what is replayed, figures, tables and the file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from cluster.schema import ConfigError
from cluster.simulator.baselines import BASELINES, applied
from cluster.simulator.capacity import (
    FACTOR_MOST,
    GOOD_SHARE,
    TOLERANCE,
    capacity,
    loaded,
    rewritten,
    strongest,
)
from cluster.simulator.outcome import Outcome
from cluster.simulator.scenario import Scenario, Source
from cluster.simulator.setup import ClusterSetup
from cluster.simulator.source import SourceError, open_source, with_load
from cluster.simulator.versus import (
    ANONYMOUS,
    LOW,
    SYSTEMS,
    TARGETS,
    Outcomes,
    Target,
    ablations,
    figures_of,
    overall,
    planned,
    ratios_of,
    varied,
)
from cluster.simulator.versus_report import rows_of, show, write_plot
from cluster.workload.form import context_of
from coordinator.protocol import CallContext
from tests.unit.test_baselines import setup_of

LINE = "generator:chain?runs=4&rate=0.5"


def scenario_of(*sources: Source, setup: ClusterSetup | None = None, seeds: int = 2) -> Scenario:
    return Scenario("s", "m", setup or setup_of(4), sources, seeds, ("pythia",), "pythia", 2)


# --- load -------------------------------------------------------------------------------------


def knee(at: float) -> Callable[[float], float]:
    """All is good up to some load, and less and less from there on."""
    return lambda factor: 1.0 if factor <= at else GOOD_SHARE * at / factor


@pytest.mark.parametrize("at", [0.03, 0.4, 1.0, 1.7, 9.0])
def test_the_capacity_is_where_less_than_nine_tenths_are_good(at: float) -> None:
    found = capacity(knee(at))
    assert at / TOLERANCE <= found <= at


@pytest.mark.parametrize("at", [1e-9, 1e9])
def test_a_capacity_out_of_reach_is_an_error(at: float) -> None:
    with pytest.raises(ValueError, match="the rate is served well"):
        capacity(knee(at))
    assert FACTOR_MOST < 1e9


def test_a_load_is_a_multiple_of_the_rate() -> None:
    assert with_load(LINE, 3.0) == "generator:chain?runs=4&rate=1.5"
    assert with_load("t?speed=2", 0.5) == "t?speed=1"
    both = Source("w", (LINE, "t?rate=4"))
    assert loaded(both, 0.5).source == ("generator:chain?runs=4&rate=0.25", "t?rate=2")
    assert loaded(Source("w", LINE), 2.0).source == "generator:chain?runs=4&rate=1"
    for wrong in ("t", "t?closed=4", "t?rate=x"):
        with pytest.raises(SourceError, match="it has to say rate="):
            with_load(wrong, 2.0)


def test_the_same_runs_come_at_another_load() -> None:
    slow = open_source(loaded(Source("w", LINE), 0.2).source, 1)
    quick = open_source(LINE, 1)
    assert [run.calls for run in slow.runs] == [run.calls for run in quick.runs]
    assert slow.runs[-1].arrival_s == pytest.approx(5 * quick.runs[-1].arrival_s)


def test_the_strongest_baseline_is_who_can_take_most() -> None:
    assert strongest(Source("w", LINE, capacity={"a": 1.1, "b": 1.2, "c": 0.3})) == "b"
    with pytest.raises(ConfigError, match="--find-load"):
        strongest(Source("w", LINE))


TEXT = """\
# a file
workloads:
  - name: one # the first
    source: generator:chain?runs=4&rate=0.5

  - name: two
    capacity: {old: 3}
    source:
      - generator:chain?runs=4&rate=2
      # kept
      - generator:chain?rate=1e1&runs=4
slo: {ttft_s: 2}
"""


def test_what_was_found_is_written_into_the_file() -> None:
    text = rewritten(TEXT, "two", 0.25, {"a": 1.17647, "b": 1.0})
    assert text == TEXT.replace("{old: 3}", "{a: 1.18, b: 1}").replace(
        "&rate=2", "&rate=0.5"
    ).replace("rate=1e1", "rate=2.5")
    text = rewritten(TEXT, "one", 2.0, {"a": 1.0})
    source = "    source: generator:chain?runs=4&rate=1\n"
    assert "  - name: one # the first\n    capacity: {a: 1}\n" + source in text
    assert text.partition("  - name: two")[2] == TEXT.partition("  - name: two")[2]
    with pytest.raises(ConfigError, match="no line '- name: three'"):
        rewritten(TEXT, "three", 2.0, {})


# --- what is replayed -------------------------------------------------------------------------


def test_anonymous_clients_say_nothing_and_ask_the_same() -> None:
    known = open_source(LINE, 0)
    unknown = open_source(varied(Source("w", LINE), ANONYMOUS).source, 0)
    assert [run.calls for run in known.runs] == [run.calls for run in unknown.runs]
    assert [run.arrival_s for run in known.runs] == [run.arrival_s for run in unknown.runs]
    for one, other in zip(known.runs, unknown.runs, strict=True):
        assert context_of(one, one.calls[-1]).run
        assert context_of(other, other.calls[-1]) == CallContext()


def test_every_replay_that_a_figure_needs_is_planned() -> None:
    whole, tasks = planned(scenario_of(Source("w", LINE)), without=True)
    keys = {task.key for task in tasks}
    assert len(keys) == len(tasks)
    assert {source.name for source in whole.workloads} == {"w", f"w, {LOW}", f"w, {ANONYMOUS}"}
    for seed in range(2):
        assert {("w", name, seed) for name in (*SYSTEMS, "pythia-random", *ablations())} <= keys
        for variant in (LOW, ANONYMOUS):
            of_it = {name for place, name, of in keys if (place, of) == (f"w, {variant}", seed)}
            assert of_it == {"pythia", "aggregated-sticky"}
    _, fewer = planned(scenario_of(Source("w", LINE)), without=False)
    assert not {task.configuration for task in fewer} & set(ablations())
    for name in {task.configuration for task in tasks}:
        applied(BASELINES[name], setup_of(4), 2)


# --- figures ----------------------------------------------------------------------------------


def outcome(workload: str, name: str, seed: int, mean_s: float, **more: float) -> Outcome:
    figures = {
        "serving_s_mean": mean_s,
        "serving_s_p95": 2.0 * mean_s,
        "completion_s_mean": mean_s + 10.0,
        "goodput_calls_per_s": 1.0 / mean_s,
        "runs_served_share": 1.0,
        **more,
    }
    return Outcome(
        workload=workload,
        configuration=name,
        seed=seed,
        figures=figures,
        completions_s=[],
        servings_s=[],
    )


def made(ours_s: float = 10.0, workload: str = "w") -> list[Outcome]:
    times_s = {
        "pythia": ours_s,
        "pythia-random": ours_s * 2,
        "aggregated-sticky": 15.0,
        "pd-round-robin": 40.0,
        "aggregated-cost": 20.0,
        "pd-cost": 18.0,
        "clairvoyant": 8.0,
        "infinite": 5.0,
        "pythia-no-pulls": ours_s * 1.1,
    }
    tokens = {
        "pythia": {"prompt_tokens": 100.0, "computed_tokens": 24.0, "recomputed_tokens": 0.0},
        "aggregated-sticky": {"recomputed_tokens": 8.0},
        "infinite": {"prompt_tokens": 100.0, "computed_tokens": 20.0},
    }
    found = []
    for seed, harder in enumerate((1.0, 3.0)):
        for name, mean_s in times_s.items():
            found.append(outcome(workload, name, seed, mean_s * harder, **tokens.get(name, {})))
        for variant, slower in ((LOW, 1.01), (ANONYMOUS, 0.5)):
            place = f"{workload}, {variant}"
            found.append(outcome(place, "pythia", seed, harder * slower))
            found.append(outcome(place, "aggregated-sticky", seed, harder))
    return found


def test_figures_are_others_times_over_ours() -> None:
    found = {name: ratio.value for name, ratio in ratios_of(Outcomes(made()), "w").items()}
    assert found == pytest.approx(
        {
            "mean_vs_static_pd": 4.0,
            "mean_vs_aggregated_sticky": 1.5,
            "mean_vs_cost_router": 1.8,
            "mean_vs_oracle": 0.8,
            "p95_vs_static_pd": 4.0,
            "p95_vs_aggregated_sticky": 1.5,
            "p95_vs_cost_router": 1.8,
            "p95_vs_oracle": 0.8,
            "recomputed_tokens_vs_sticky": 0.0,
            "hit_ratio_of_infinite_cache": 0.95,
            "low_load_vs_sticky": 1 / 1.01,
            "anonymous_vs_sticky": 2.0,
            "random_predictions_vs_sticky": 0.75,
            "ablation.pythia-no-pulls": 1.1,
        }
    )
    assert set(TARGETS) <= set(found)
    # Ratios are of pairs: that one seed is three times as hard for all says nothing of chance.
    assert ratios_of(Outcomes(made()), "w")["mean_vs_static_pd"].half == pytest.approx(0.0)


def test_figures_of_all_workloads_are_geometric_means() -> None:
    ratios = {
        "a": ratios_of(Outcomes(made(10.0, "a")), "a"),
        "b": ratios_of(Outcomes(made(40.0, "b")), "b"),
    }
    figures = figures_of(ratios)
    assert figures["mean_vs_aggregated_sticky"] == pytest.approx(math.sqrt(1.5 * 0.375))
    assert figures["a.mean_vs_aggregated_sticky"] == pytest.approx(1.5)
    assert figures["b.mean_vs_aggregated_sticky.ci95"] == pytest.approx(0.0)
    assert figures["recomputed_tokens_vs_sticky"] == 0.0
    assert all(math.isfinite(value) for value in figures.values())


def test_what_was_not_replayed_has_no_figure() -> None:
    some = [each for each in made() if each.configuration in ("pythia", "infinite")]
    assert set(ratios_of(Outcomes(some), "w")) == {"hit_ratio_of_infinite_cache"}


def test_targets() -> None:
    assert Target(1.3).met(1.3)
    assert not Target(1.3).met(1.29)
    assert Target(0.5, at_least=False).met(0.0)
    assert not Target(0.5, at_least=False).met(0.51)


def test_tables_rows_and_plot(tmp_path: Path) -> None:
    found, sources = Outcomes(made()), [Source("w", LINE)]
    systems = list(dict.fromkeys(each.configuration for each in made()))
    rows = rows_of(found, sources, systems)
    assert len(rows) == 9 + 2 * 2
    first = rows[0]
    assert (first["workload"], first["system"], first["variant"]) == ("w", "pythia", "")
    assert first["completion_mean_s"] == pytest.approx(20.0)
    assert first["completion_p95_s"] == pytest.approx(40.0)
    assert first["completion_with_pauses_mean_s"] == pytest.approx(30.0)
    assert first["goodput"] == pytest.approx((1 / 10 + 1 / 30) / 2)
    ratios = {"w": ratios_of(found, "w")}
    console = Console(width=160)
    with console.capture() as capture:
        show(console, rows, ratios, overall([ratios["w"]]), {"w": ("aggregated-sticky", 0.85)})
    text = capture.get()
    for words in ("w, aggregated-sticky at 85% of its capacity", "mean_vs_static_pd", "≥ 2"):
        assert words in text
    systems_shown = text.partition("figures")[0]
    assert "pythia-no-pulls" not in systems_shown
    assert "pythia-no-pulls" in text
    assert write_plot(tmp_path / "plots", rows).stat().st_size > 1000

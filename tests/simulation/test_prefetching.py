"""Prefetches in virtual time: simulated workers and links, a real core."""

from __future__ import annotations

from pathlib import Path

from cluster.simulator.baselines import BASELINES, applied, core_factory
from cluster.simulator.records import Result
from cluster.simulator.scenario import load
from cluster.simulator.source import open_source
from cluster.simulator.world import simulate

SCENARIO = """\
model: llama-3.1-8b-h200-tp1
workers: {count: 4, ratio: [1, 1]}
workloads:
  - {name: reviews, source: "generator:review?runs=25&rate=0.25&prompt_max=60000&pause_max=20"}
compare: [pythia, pythia-prefetch]
seeds: 1
"""


def simulated(name: str, path: Path) -> Result:
    path.write_text(SCENARIO)
    scenario = load(path)
    baseline = BASELINES[name]
    setup = applied(baseline, scenario.setup, scenario.prefill_workers)
    workload = open_source(scenario.workloads[0].source, seed=0)
    factory = core_factory(baseline, setup, workload)
    return simulate(setup, workload, 0, core_factory=factory)


def test_contexts_are_moved_ahead_and_used(tmp_path: Path) -> None:
    without = simulated("pythia", tmp_path / "small.yaml")
    ahead = simulated("pythia-prefetch", tmp_path / "small.yaml")
    assert without.totals.counters["prefetches"] == 0
    counters = ahead.totals.counters
    assert counters["prefetches_used"] > 0
    assert counters["tokens_prefetched"] > 0
    over = counters["prefetches_used"] + counters["prefetches_wasted"]
    assert over == counters["prefetches_done"] <= counters["prefetches"]
    assert [run.finished for run in ahead.runs] == [run.finished for run in without.runs]
    assert all(run.finished for run in ahead.runs)

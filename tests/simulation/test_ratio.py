"""Reactive ratio control on a mix that swings between long prompts and long answers."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest

from cluster.simulator.baselines import BASELINES, applied
from cluster.simulator.measures import figures
from cluster.simulator.setup import ClusterSetup, Slo, WorkerSetup
from cluster.simulator.subject import find_subject
from cluster.simulator.world import simulate
from cluster.workload.form import Call, Run, Workload

WORKERS = 4
PERIOD_S = 60.0
PHASES = ((5.5, 8000, 60), (12.0, 500, 1500))
"""Calls per second, median tokens of prompts and of answers: two workers are nearly busy with
the prompts of the first, the answers of the second fill more than one worker's batches."""
SLO = Slo(ttft_s=2.0, itl_s=0.03)


@cache
def swinging() -> Workload:
    """Each phase twice."""
    rng, runs, ends_s = random.Random(1), [], 0.0
    for rate, prompt_tokens, output_tokens in PHASES * 2:
        at_s, ends_s = ends_s, ends_s + PERIOD_S
        while (at_s := at_s + rng.expovariate(rate)) < ends_s:
            prompt = max(64, int(rng.lognormvariate(0.0, 0.5) * prompt_tokens))
            output = max(2, int(rng.lognormvariate(0.0, 0.5) * output_tokens))
            name = f"run-{len(runs)}"
            one = Call(0, (), 0.0, prompt, output, ((0, prompt // 64),), final=True)
            runs.append(Run(name, "swing", at_s, name, (one,)))
    return Workload("swing", "tests", "", 64, tuple(runs), arrivals_known=True)


@cache
def replayed(configuration: str, prefill_count: int) -> dict[str, float]:
    """Figures of a configuration that begins with so many of four workers to prefill."""
    subject = find_subject("llama-3.1-8b-h200-tp1", None, None, None, Path())
    setup = ClusterSetup(
        subject.shape,
        subject.hardware,
        tuple(WorkerSetup(f"w{number}", "mixed") for number in range(WORKERS)),
        subject.efficiency,
        subject.tp,
    )
    made = applied(BASELINES[configuration], setup, prefill_count)
    return figures(simulate(made, swinging(), configuration=configuration), SLO)


def test_where_the_static_ratio_is_right_reactive_is_as_good() -> None:
    static, reactive = replayed("pd-sticky", 2), replayed("pd-reactive", 2)
    assert static["goodput_calls_share"] > 0.99
    assert reactive["completion_s_mean"] < 1.05 * static["completion_s_mean"]
    assert reactive["goodput_calls_share"] > 0.98


@pytest.mark.parametrize("prefill_count", [1, 3])
def test_where_the_static_ratio_is_wrong_reactive_is_better(prefill_count: int) -> None:
    static, reactive = (replayed(name, prefill_count) for name in ("pd-sticky", "pd-reactive"))
    assert static["goodput_calls_share"] < 0.9
    assert reactive["completion_s_mean"] < 0.9 * static["completion_s_mean"]
    assert reactive["goodput_calls_share"] > 0.93
    assert reactive["flips"] >= 2


def test_after_a_swing_decode_gets_its_workers_back() -> None:
    """Too few of them would be slow long before their memory is full."""
    reactive = replayed("pd-reactive", 1)
    assert reactive["itl_s_p95"] < 1.1 * replayed("pd-sticky", 1)["itl_s_p95"]

"""What is compared by default, and how it is shown."""

from __future__ import annotations

from pathlib import Path

from cluster.simulator.compare import Compared
from cluster.simulator.validate import Options, config_of, shown, workload_of
from cluster.workload.form import call_count
from cluster.workload.spans import total


def test_the_default_workload_is_small_enough_for_a_real_cluster_and_always_the_same() -> None:
    workload = workload_of(Options())
    calls = [call for run in workload.runs for call in run.calls]
    assert 60 <= call_count(workload) <= 150
    # The default cluster's context is 4,096 tokens.
    assert max(call.prompt_tokens + call.output_tokens for call in calls) <= 3000
    assert {run.workflow for run in workload.runs} == {"review", "fanout", "chain"}
    # It has what it is meant to compare: prompts to move, and prompts that extend others.
    assert sum(call.prompt_tokens >= 512 for call in calls) >= 20
    assert sum(total(call.continued) > 0 for call in calls) >= 20
    assert workload_of(Options()) == workload


def test_runs_arrive_at_the_rate_that_is_asked_for() -> None:
    slow, fast = (workload_of(Options(runs_per_s=rate)).runs[-1].arrival_s for rate in (0.1, 0.4))
    assert slow > 2 * fast > 0


def test_workloads_that_are_named_are_the_only_ones(tmp_path: Path) -> None:
    options = Options(workloads=["generator:chain?runs=2&seed=3&scale=4"], traces=tmp_path)
    assert len(workload_of(options).runs) == 2


def test_there_is_a_worker_for_every_role() -> None:
    config = config_of(Options(roles=["prefill", "decode", "decode"]))
    assert [worker.name for worker in config.workers] == ["prefill-0", "decode-1", "decode-2"]


def test_an_error_that_can_not_be_told_is_shown_as_none() -> None:
    row = Compared(
        name="hit_tokens", unit="tokens", real=0.0, spread=0.0, simulated=5.0, error=None
    )
    assert shown(row)["error %"] == "-"
    assert shown(Compared(
        name="ttft_mean", unit="ms", real=50.0, spread=0.1, simulated=45.0, error=-0.1
    )) == {
        "figure": "ttft_mean",
        "unit": "ms",
        "real": 50.0,
        "spread %": 10.0,
        "simulated": 45.0,
        "error %": -10.0,
    }  # fmt: skip

"""The core learns how fast engines are from nothing but what it is told of calls."""

from __future__ import annotations

import pytest

from cluster.bench.simulator import cluster_of, workload_of
from cluster.simulator.baselines import BASELINES, applied
from cluster.simulator.world import simulate
from coordinator.core import Core
from coordinator.limits import Limits, Placement

WORKERS = 4


@pytest.mark.parametrize("configuration", ["pythia", "pythia-mixed", "aggregated-sticky"])
def test_speeds_become_those_of_the_simulated_engines(configuration: str) -> None:
    setup = applied(BASELINES[configuration], cluster_of(WORKERS), WORKERS // 2)
    cores: list[Core] = []

    def core(limits: Limits, placement: Placement, core_id: str) -> Core:
        cores.append(Core(limits, placement, core_id))
        return cores[-1]

    simulate(setup, workload_of(800, WORKERS, seed=1), 1, core_factory=core)
    speeds, cost = cores[0].speeds, setup.cost()
    chunk = setup.options.max_num_batched_tokens
    for new, cached in ((500, 0), (4000, 0), (16_000, 0), (2000, 30_000)):
        true_s = cost.prefill_s(new, cached, chunk)
        assert speeds.prefill_s(new, cached) == pytest.approx(true_s, rel=0.4)
    for batch, context in ((1, 10_000), (4, 60_000), (16, 300_000)):
        true_s = cost.decode_step_s(batch, context)
        assert speeds.step_s(batch, context) == pytest.approx(true_s, rel=0.3)

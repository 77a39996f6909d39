"""What can be compared, by name, and one replay of it on a scenario's cluster."""

from __future__ import annotations

import random

from cluster.simulator.baselines import BASELINES, applied, core_factory
from cluster.simulator.records import Result
from cluster.simulator.scenario import Scenario
from cluster.simulator.setup import ClusterSetup, Faults
from cluster.simulator.trouble import Trouble
from cluster.simulator.world import World, settle, simulate
from cluster.workload.form import Workload


def names() -> list[str]:
    """All of them: ours, other systems, bounds, ours with one mechanism less."""
    return list(BASELINES)


def description(name: str) -> str:
    """In a line."""
    return BASELINES[name].description


def bounds() -> list[str]:
    """Those that no cluster could be: they know the future, or have no limits."""
    return [name for name, each in BASELINES.items() if each.bound or each.placers or each.future]


def cluster_of(name: str, scenario: Scenario) -> ClusterSetup:
    """The scenario's cluster as the configuration has it. BaselineError if it cannot be."""
    return applied(BASELINES[name], scenario.setup, scenario.prefill_workers)


def replay(name: str, scenario: Scenario, workload: Workload, seed: int) -> Result:
    """One configuration on one workload. OracleError if anything happens that must not."""
    baseline = BASELINES[name]
    setup = cluster_of(name, scenario)
    if baseline.bound is not None:
        return baseline.bound(workload, setup, seed)
    future = baseline.future(workload, setup) if baseline.future is not None else None
    make = core_factory(baseline, setup, workload, seed, future)
    if scenario.faults == Faults():
        return simulate(
            setup,
            workload,
            seed,
            configuration=name,
            core_factory=make,
            measured=True,
            began=future.begin if future is not None else None,
        )
    world = World(setup, workload, scenario.faults, seed, core_factory=make, measured=True)
    trouble = Trouble(world, random.Random(f"{seed}/trouble"))
    # No warm-up: until when things go wrong is counted from the start of everything.
    world.start()
    trouble.start()
    world.run()
    # Where messages are lost, some things are given back only when a lease ends.
    limits, lease_s = setup.limits, setup.options.kv_lease_s
    settle(world, limits.call_s + limits.wait_s + 2 * lease_s)
    return world.result(name)

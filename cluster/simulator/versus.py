"""Pythia against other systems at the load where these are busy: what is replayed, and the figures.

Every ratio of times says how many times as long the other one takes: the other's time divided by
Pythia's, so that more than 1 is better, for the oracle and at low load, too. Times are of runs
without the longest path of their own pauses, which no server can shorten. A ratio is taken seed by
seed and averaged geometrically, as are workloads for figures of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec

from cluster.simulator import configurations
from cluster.simulator.capacity import loaded
from cluster.simulator.estimates import estimate
from cluster.simulator.outcome import Outcome
from cluster.simulator.scenario import Scenario, Source
from cluster.simulator.source import with_options
from cluster.simulator.sweep import Task

OURS = "pythia"
RANDOM = "pythia-random"
STICKY = "aggregated-sticky"
STATIC = "pd-round-robin"
COST = ("aggregated-cost", "pd-cost")
"""The cost-function router with and without separate prefill workers: the better one counts."""
ORACLE = "clairvoyant"
INFINITE = "infinite"
SYSTEMS = (OURS, STICKY, STATIC, *COST, ORACLE, INFINITE)
"""Those without which figures are missing."""
ABLATION = "pythia-no-"
RECOMPUTED = "recomputed_tokens_vs_sticky"

LOW = "low load"
ANONYMOUS = "anonymous"
LOW_SHARE = 0.2
"""Of the load at which systems are compared."""

MEAN = "serving_s_mean"
P95 = "serving_s_p95"


class Target(NamedTuple):
    """What a figure should be: at least or at most so much."""

    value: float
    at_least: bool = True

    def met(self, value: float) -> bool:
        """Whether a figure is as it should be."""
        return value >= self.value if self.at_least else value <= self.value


TARGETS = {
    "mean_vs_static_pd": Target(2.0),
    "mean_vs_aggregated_sticky": Target(1.3),
    "mean_vs_cost_router": Target(1.3),
    "mean_vs_oracle": Target(0.8),
    "p95_vs_static_pd": Target(2.0),
    "p95_vs_aggregated_sticky": Target(1.3),
    "p95_vs_cost_router": Target(1.3),
    "p95_vs_oracle": Target(0.8),
    RECOMPUTED: Target(0.5, at_least=False),
    "hit_ratio_of_infinite_cache": Target(0.95),
    "low_load_vs_sticky": Target(0.98),
    "anonymous_vs_sticky": Target(0.98),
    "random_predictions_vs_sticky": Target(0.95),
}


# --- what is replayed -------------------------------------------------------------------------


def ablations() -> list[str]:
    """Pythia with one mechanism less, whichever there are."""
    return [name for name in configurations.names() if name.startswith(ABLATION)]


def varied(source: Source, variant: str) -> Source:
    """A workload as a ``variant`` of the comparison has it; the empty one is as it is."""
    if not variant:
        return source
    if variant == LOW:
        source = loaded(source, LOW_SHARE)
    else:
        lines = (source.source,) if isinstance(source.source, str) else source.source
        found = tuple(with_options(line, {"anonymous": "true"}) for line in lines)
        line = found[0] if isinstance(source.source, str) else found
        source = msgspec.structs.replace(source, source=line)
    return msgspec.structs.replace(source, name=f"{source.name}, {variant}")


def planned(scenario: Scenario, without: bool) -> tuple[Scenario, list[Task]]:
    """The scenario with its workloads' variants, and all replays, seed by seed. ``without``:
    Pythia with one mechanism less, too."""
    systems = [name for name in [*SYSTEMS, *scenario.compare] if not name.startswith(ABLATION)]
    plain = [*systems, RANDOM, *(ablations() if without else ())]
    tasks = [
        Task(varied(source, variant).name, name, seed, False)
        for seed in range(scenario.seeds)
        for source in scenario.workloads
        for variant, names in (("", plain), (LOW, (OURS, STICKY)), (ANONYMOUS, (OURS, STICKY)))
        for name in dict.fromkeys(names)
    ]
    sources = [
        varied(source, variant) for source in scenario.workloads for variant in ("", LOW, ANONYMOUS)
    ]
    return msgspec.structs.replace(scenario, workloads=tuple(sources)), tasks


# --- figures ----------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """A ratio, and half its 95 % confidence interval over seeds: infinite if there is one."""

    value: float
    half: float = math.inf


class Outcomes:
    """The figures of all replays, by workload, configuration and seed."""

    def __init__(self, outcomes: Iterable[Outcome]) -> None:
        self._figures = {outcome.key: outcome.figures for outcome in outcomes}

    def seeds(self, workload: str, *names: str) -> list[int]:
        """Those that all of some configurations have."""
        found = [
            {seed for place, each, seed in self._figures if (place, each) == (workload, name)}
            for name in names
        ]
        return sorted(set[int].intersection(*found)) if found else []

    def of(self, workload: str, name: str, seed: int, figure: str) -> float:
        """One figure of one replay."""
        return self._figures[workload, name, seed][figure]

    def mean(self, workload: str, name: str, figure: str) -> float:
        """Over seeds; not a number where nobody measured it."""
        values = [
            self._figures[workload, name, seed][figure]
            for seed in self.seeds(workload, name)
            if figure in self._figures[workload, name, seed]
        ]
        return math.fsum(values) / len(values) if values else math.nan

    def ratio(
        self,
        one: tuple[str, str],
        other: tuple[str, str],
        value: Callable[[dict[str, float]], float],
    ) -> Ratio | None:
        """``one`` (workload and configuration) divided by ``other`` seed by seed; None without a
        seed in which both are above 0."""
        logs = []
        for seed in sorted({*self.seeds(*one)} & {*self.seeds(*other)}):
            above = value(self._figures[*one, seed])
            below = value(self._figures[*other, seed])
            if above > 0.0 and below > 0.0:
                logs.append(math.log(above / below))
        if not logs:
            return None
        found = estimate(logs)
        middle = math.exp(found.mean)
        return Ratio(middle, middle * math.expm1(found.half) if found.seeds > 1 else math.inf)

    def share(self, one: tuple[str, str], other: tuple[str, str], name: str) -> Ratio | None:
        """Of all seeds together ``one`` divided by ``other``, for what may be 0 in a seed; None
        where the other has nothing."""
        seeds = sorted({*self.seeds(*one)} & {*self.seeds(*other)})
        below = math.fsum(self.of(*other, seed, name) for seed in seeds)
        if below <= 0.0:
            return None
        return Ratio(math.fsum(self.of(*one, seed, name) for seed in seeds) / below)


def figure(name: str) -> Callable[[dict[str, float]], float]:
    """A figure of a replay, by name; 0 where it was not measured."""
    return lambda figures: figures.get(name, 0.0)


def hit_tokens(figures: dict[str, float]) -> float:
    """Prompt tokens that nobody computed for the call, found in a cache or moved from one."""
    return max(0.0, figures.get("prompt_tokens", 0.0) - figures.get("computed_tokens", 0.0))


def ratios_of(found: Outcomes, workload: str) -> dict[str, Ratio]:
    """The figures of one workload, those that can be had."""
    ours = (workload, OURS)
    low, anonymous = f"{workload}, {LOW}", f"{workload}, {ANONYMOUS}"
    ratios: dict[str, Ratio | None] = {}
    for label, measured in (("mean", MEAN), ("p95", P95)):
        of = figure(measured)
        routers = [name for name in COST if found.seeds(workload, name)]
        ratios[f"{label}_vs_static_pd"] = found.ratio((workload, STATIC), ours, of)
        ratios[f"{label}_vs_aggregated_sticky"] = found.ratio((workload, STICKY), ours, of)
        if routers:
            # The better one is that with the lower mean, not the one that suits us.
            _, name = min((found.mean(workload, name, MEAN), name) for name in routers)
            ratios[f"{label}_vs_cost_router"] = found.ratio((workload, name), ours, of)
        ratios[f"{label}_vs_oracle"] = found.ratio((workload, ORACLE), ours, of)
    ratios[RECOMPUTED] = found.share(ours, (workload, STICKY), "recomputed_tokens")
    ratios["hit_ratio_of_infinite_cache"] = found.ratio(ours, (workload, INFINITE), hit_tokens)
    of = figure(MEAN)
    ratios["low_load_vs_sticky"] = found.ratio((low, STICKY), (low, OURS), of)
    ratios["anonymous_vs_sticky"] = found.ratio((anonymous, STICKY), (anonymous, OURS), of)
    ratios["random_predictions_vs_sticky"] = found.ratio((workload, STICKY), (workload, RANDOM), of)
    for name in ablations():
        ratios[f"ablation.{name}"] = found.ratio((workload, name), ours, of)
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}


def figures_of(ratios: dict[str, dict[str, Ratio]]) -> dict[str, float]:
    """``WORKLOAD.NAME`` and its ``.ci95``, and ``NAME``, the geometric mean over all workloads."""
    figures: dict[str, float] = {}
    for name, value in overall(list(ratios.values())).items():
        figures[name] = value
    for workload, of_workload in ratios.items():
        for name, ratio in of_workload.items():
            figures[f"{workload}.{name}"] = ratio.value
            if math.isfinite(ratio.half):
                figures[f"{workload}.{name}.ci95"] = ratio.half
    return figures


def overall(ratios: Sequence[dict[str, Ratio]]) -> dict[str, float]:
    """The geometric mean of each figure over the workloads that have it; the arithmetic one of
    what may be 0."""
    names = list(dict.fromkeys(name for each in ratios for name in each))
    found: dict[str, float] = {}
    for name in names:
        values = [each[name].value for each in ratios if name in each]
        if min(values) > 0.0:
            found[name] = math.exp(math.fsum(map(math.log, values)) / len(values))
        else:
            found[name] = math.fsum(values) / len(values)
    return found

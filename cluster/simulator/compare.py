"""The same workload on a real cluster and in the simulator: how far apart they are.

Of calls that were served; completion is a run's. Errors are of the simulated figure against the
mean of the real replays, whose own spread stands beside them: nothing can be predicted
better than it repeats itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from cluster.simulator.measures import SERVED, hit_tokens
from cluster.simulator.records import CallRecord, Result

P95 = 0.95


class Measure(NamedTuple):
    """A figure of a replay; shown ``factor`` times as large, in ``unit``."""

    of: Callable[[Result], float]
    unit: str
    factor: float = 1.0


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """One figure, real and simulated. ``spread``: of the real replays, largest less smallest
    over their mean. ``error`` is signed and relative to the real mean; None where that is 0
    and the simulated one is not."""

    name: str
    unit: str
    real: float
    spread: float
    simulated: float
    error: float | None


def served(result: Result) -> list[CallRecord]:
    """The calls that got all their tokens."""
    return [call for call in result.calls if call.outcome in SERVED]


def ttfts_s(result: Result) -> list[float]:
    """Times to the first token, of all calls."""
    return [call.ttft_s for call in served(result)]


def itls_s(result: Result) -> list[float]:
    """Mean times between tokens, of all calls that have two and more."""
    return [call.itl_s for call in served(result) if call.output_tokens > 1]


def completions_s(result: Result) -> list[float]:
    """From the arrival of each run to its end, of those that were served."""
    return [run.completion_s for run in result.runs if run.finished]


def _mean(values: Callable[[Result], list[float]]) -> Callable[[Result], float]:
    return lambda result: statistics.fmean(values(result))


def _p95(values: Callable[[Result], list[float]]) -> Callable[[Result], float]:
    return lambda result: float(np.quantile(values(result), P95))


MEASURES = {
    "ttft_mean": Measure(_mean(ttfts_s), "ms", 1e3),
    "ttft_p95": Measure(_p95(ttfts_s), "ms", 1e3),
    "itl_mean": Measure(_mean(itls_s), "ms", 1e3),
    "itl_p95": Measure(_p95(itls_s), "ms", 1e3),
    "completion_mean": Measure(_mean(completions_s), "s"),
    "completion_p95": Measure(_p95(completions_s), "s"),
    "hit_tokens": Measure(lambda result: sum(map(hit_tokens, served(result))), "tokens"),
    "moved_tokens": Measure(
        lambda result: sum(call.moved_tokens for call in served(result)), "tokens"
    ),
}


def compared(real: Sequence[Result], simulated: Sequence[Result]) -> list[Compared]:
    """All figures of replays of one workload; several of a side are averaged."""
    return [
        _compared(
            name,
            measure,
            [measure.of(result) for result in real],
            statistics.fmean(measure.of(result) for result in simulated),
        )
        for name, measure in MEASURES.items()
    ]


def _compared(name: str, measure: Measure, real: Sequence[float], simulated: float) -> Compared:
    mean = statistics.fmean(real)
    error = simulated / mean - 1.0 if mean else (None if simulated else 0.0)
    return Compared(
        name=name,
        unit=measure.unit,
        real=mean * measure.factor,
        spread=(max(real) - min(real)) / mean if mean else 0.0,
        simulated=simulated * measure.factor,
        error=error,
    )


def figures(rows: Sequence[Compared], prefix: str = "real_vs_sim_error") -> dict[str, float]:
    """``real_vs_sim_error_*``: the errors without their signs."""
    return {f"{prefix}_{row.name}": abs(row.error) for row in rows if row.error is not None}

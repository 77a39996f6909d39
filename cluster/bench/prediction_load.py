"""Traces as predictions are judged by: in two halves of time, with enough runs at once.

The runs' order is drawn (files are sorted by name, not by time), the first half of them arrives
in the first half of the time. Where a trace has no arrivals they are random, at the rate that
keeps so many runs alive on average; where it has too few runs for that, each half's runs are
repeated in that half only, so that nothing in the second half was seen in the first.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from cluster.bench.timeline import call_s
from cluster.workload.form import Run, Workload
from cluster.workload.lineage import linked
from cluster.workload.measure import cached

LIFETIMES = 10.0
"""How many mean durations of a run a half lasts at least, if runs are repeated."""


class Judged(msgspec.Struct, frozen=True):
    """A workload, and when its second half begins and ends, in seconds."""

    workload: Workload
    half_s: float
    end_s: float


def judged(workload: Workload, concurrency: int, seed: int) -> Judged:
    """The workload in two halves. ``concurrency``: runs alive at a time, if that is drawn."""
    if workload.arrivals_known:
        arrivals = [run.arrival_s for run in workload.runs]
        half_s = (min(arrivals) + max(arrivals)) / 2
        return Judged(workload, half_s, max(arrivals))
    rng = random.Random(f"{seed} halves")
    runs = list(workload.runs)
    rng.shuffle(runs)
    middle = (len(runs) + 1) // 2
    duration_s = _mean_duration_s(workload)
    rate = concurrency / duration_s
    least = round(LIFETIMES * duration_s * rate)
    arriving: list[Run] = []
    now_s = half_s = 0.0
    for half in (runs[:middle], runs[middle:] or runs[:middle]):
        half_s = now_s
        for number in range(max(len(half), least)):
            now_s += rng.expovariate(rate)
            run = _again(half[number % len(half)], number // len(half), len(arriving) >= least)
            arriving.append(replace(run, arrival_s=now_s))
    made = replace(
        workload,
        runs=linked(arriving, workload.block_tokens),
        arrivals_known=True,
        concurrency=0,
    )
    return Judged(made, half_s, now_s)


def merged(parts: Sequence[Judged], name: str) -> Judged:
    """Several workloads at once, each at the pace that makes their halves coincide."""
    span_s = min(part.end_s for part in parts)
    runs: list[Run] = []
    for part in parts:
        label = part.workload.name
        runs += [
            replace(run, id=f"{label}/{run.id}", scope=f"{label}:{run.scope}")
            for run in part.workload.runs
            if run.arrival_s <= span_s
        ]
    runs.sort(key=lambda run: run.arrival_s)
    first = parts[0].workload
    workload = replace(first, name=name, runs=tuple(runs), arrivals_known=True)
    return Judged(workload, span_s / 2, span_s)


def _again(run: Run, times: int, second: bool) -> Run:
    if not times and not second:
        return run
    label = f"{'b' if second else 'a'}{times}"
    return replace(run, id=f"{run.id}~{label}", scope=f"{run.scope}~{label}")


def _mean_duration_s(workload: Workload) -> float:
    """How long a run takes, waiting included."""
    total_s = 0.0
    ends_s: dict[tuple[str, int], float] = {}
    for entry in cached(workload):
        run, call = entry.run, entry.call
        begins_s = max((ends_s[run.id, parent] for parent in call.parents), default=0.0)
        end_s = begins_s + call.think_s + call_s(call, entry.uncached_tokens)
        ends_s[run.id, call.index] = end_s
        if call.index == len(run.calls) - 1:
            total_s += max(ends_s[run.id, other.index] for other in run.calls)
    return total_s / max(1, len(workload.runs))

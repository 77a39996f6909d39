"""Traces as predictions are judged by: in two halves of time.

The runs' order is drawn (files are sorted by name, not by time); the first half of them arrives
in the first half of the time. Where a trace has no arrivals they are random, at the rate that
keeps a number of runs alive on average. To judge forecasts that must go on for long enough, so
each half's runs are repeated in that half only: what is in the second half was not in the first.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from cluster.bench.timeline import call_s
from cluster.workload.form import Run, Workload
from cluster.workload.lineage import linked
from cluster.workload.measure import cached

LIFETIMES = 10.0
HALF_LEAST_S, HALF_MOST_S = 1800.0, 40_000.0
"""A half of repeated runs lasts so many mean durations of a run, but within these bounds."""
NUMBERED = re.compile(r"([A-Za-z]+)-\d+(-\d+)*")


class Judged(msgspec.Struct, frozen=True):
    """A workload, and when its second half begins and ends, in seconds."""

    workload: Workload
    half_s: float
    end_s: float


def by_application(workload: Workload) -> Workload:
    """Runs of one file are of several workflows if all their ids say so: ``Hand-1``, ``Algo-2``."""
    found = [NUMBERED.fullmatch(run.id) for run in workload.runs]
    if not all(found):
        return workload
    runs = tuple(
        replace(run, workflow=f"{run.workflow}/{match[1]}")
        for run, match in zip(workload.runs, found, strict=True)
        if match is not None
    )
    return replace(workload, runs=runs)


def has_runs(workload: Workload) -> bool:
    """Whether its calls belong to runs; some traces are of calls alone."""
    return any(len(run.calls) > 1 for run in workload.runs)


def once(workload: Workload, concurrency: int, seed: int) -> Judged:
    """Every run once. ``concurrency``: runs alive at a time, if there are enough for that."""
    if workload.arrivals_known:
        return _recorded(workload)
    alive = max(1.0, min(float(concurrency), len(workload.runs) / 8))
    rng = random.Random(f"{seed} once")
    runs = list(workload.runs)
    rng.shuffle(runs)
    rate = alive / mean_duration_s(workload)
    arriving: list[Run] = []
    now_s = 0.0
    for run in runs:
        now_s += rng.expovariate(rate)
        arriving.append(replace(run, arrival_s=now_s))
    half_s = arriving[len(arriving) // 2].arrival_s
    return Judged(_arriving(workload, arriving), half_s, float("inf"))


def repeated(
    workload: Workload, concurrency: float, seed: int, half_s: float | None = None
) -> Judged:
    """As many runs as it takes to last for two times ``half_s``, by default for long enough.

    A trace whose arrivals are recorded is left as it is.
    """
    if workload.arrivals_known:
        return _recorded(workload)
    rng = random.Random(f"{seed} repeated")
    runs = list(workload.runs)
    rng.shuffle(runs)
    middle = (len(runs) + 1) // 2
    duration_s = mean_duration_s(workload)
    half_s = half_s or min(HALF_MOST_S, max(HALF_LEAST_S, LIFETIMES * duration_s))
    rate = concurrency / duration_s
    arriving: list[Run] = []
    now_s = rng.expovariate(rate)
    for number, half in enumerate((runs[:middle], runs[middle:] or runs[:middle]), start=1):
        taken = 0
        while now_s < number * half_s:
            run, label = half[taken % len(half)], f"{number}.{taken // len(half)}"
            arriving.append(
                replace(run, id=f"{run.id}~{label}", scope=_scope(run, label), arrival_s=now_s)
            )
            taken += 1
            now_s += rng.expovariate(rate)
    return Judged(_arriving(workload, arriving), half_s, 2 * half_s)


def merged(parts: Sequence[Judged], name: str) -> Judged:
    """Several workloads at once. Their halves must be the same."""
    runs = [
        replace(run, id=f"{part.workload.name}/{run.id}", scope=f"{part.workload.name}:{run.scope}")
        for part in parts
        for run in part.workload.runs
    ]
    runs.sort(key=lambda run: run.arrival_s)
    workload = replace(parts[0].workload, name=name, runs=tuple(runs))
    return Judged(workload, parts[0].half_s, parts[0].end_s)


def mean_duration_s(workload: Workload) -> float:
    """How long a run takes on average, pauses included."""
    last_s: dict[str, float] = {}
    ends_s: dict[tuple[str, int], float] = {}
    for entry in cached(workload):
        run, call = entry.run, entry.call
        begins_s = max((ends_s[run.id, parent] for parent in call.parents), default=0.0)
        end_s = begins_s + call.think_s + call_s(call, entry.uncached_tokens)
        ends_s[run.id, call.index] = end_s
        last_s[run.id] = max(last_s.get(run.id, 0.0), end_s)
    return sum(last_s.values()) / max(1, len(last_s))


def _recorded(workload: Workload) -> Judged:
    arrivals = [run.arrival_s for run in workload.runs]
    return Judged(workload, (min(arrivals) + max(arrivals)) / 2, max(arrivals))


def _arriving(workload: Workload, runs: list[Run]) -> Workload:
    linked_runs = linked(runs, workload.block_tokens)
    return replace(workload, runs=linked_runs, arrivals_known=True, concurrency=0)


def _scope(run: Run, label: str) -> str:
    """Repeated runs share what all runs do only with the repetition they belong to."""
    return f"{run.scope}~{label}"

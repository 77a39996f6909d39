"""What is kept of one replay when its records are gone: figures, and what is drawn.

Small enough to be a line of a results file whatever the replay's size: distributions are
thinned, loads are averaged over slices of time, and of all runs one is kept whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import msgspec
import numpy as np

from cluster.simulator.measures import figures, serving_s
from cluster.simulator.records import CallRecord, Result, RunRecord, Sample
from cluster.simulator.setup import Slo
from coordinator.protocol import Role

POINTS_MAX = 512
"""Of a distribution."""
SLICES_MAX = 240
"""Of time."""
STORY_CALLS = 24
"""How long a run is looked for to show."""
STORY_CALLS_MAX = 48


class RoleLoad(msgspec.Struct):
    """Workers of one role together, per slice: how many, their requests, mean share of KV."""

    workers: list[float]
    running: list[float]
    waiting: list[float]
    kv_used: list[float]


class Picture(msgspec.Struct):
    """``at_s``: middles of slices of time. ``story``: one run and its first calls."""

    at_s: list[float]
    roles: dict[Role, RoleLoad]
    run: RunRecord | None
    story: list[CallRecord]


class Outcome(msgspec.Struct, tag="outcome", kw_only=True):
    """One replay. ``completions_s`` and ``servings_s`` (without pauses) of runs, sorted;
    ``real_s``: how long simulating took."""

    workload: str
    configuration: str
    seed: int
    figures: dict[str, float]
    completions_s: list[float]
    servings_s: list[float]
    real_s: float = 0.0
    picture: Picture | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        """Which replay this is."""
        return self.workload, self.configuration, self.seed


def outcome_of(result: Result, slo: Slo, real_s: float, pictured: bool) -> Outcome:
    """What to keep of ``result``; with what is drawn of a single replay if ``pictured``."""
    finished = [run for run in result.runs if run.finished]
    return Outcome(
        workload=result.workload,
        configuration=result.configuration,
        seed=result.seed,
        figures=figures(result, slo),
        completions_s=thinned([run.completion_s for run in finished]),
        servings_s=thinned([serving_s(run) for run in finished]),
        real_s=real_s,
        picture=picture_of(result) if pictured else None,
    )


def thinned(values: Sequence[float]) -> list[float]:
    """Sorted, and of many as many quantiles as are worth drawing."""
    if len(values) <= POINTS_MAX:
        return sorted(values)
    shares = (np.arange(POINTS_MAX) + 0.5) / POINTS_MAX
    return [float(value) for value in np.asarray(np.quantile(values, shares))]


def picture_of(result: Result) -> Picture:
    """Load over time, and the run that says most in a few lines.

    That is the one with about ``STORY_CALLS`` calls, whatever the configuration, so that
    those of several can be compared; of equals the middle one, when the cluster is busy.
    """
    at_s, roles = _loads(result.samples)
    if not result.runs:
        return Picture(at_s, roles, None, [])
    middle = len(result.runs) // 2
    run = min(
        result.runs,
        key=lambda run: (abs(run.calls - STORY_CALLS), abs(run.run - middle), run.run),
    )
    calls = sorted(
        (call for call in result.calls if call.run == run.run), key=lambda call: call.call
    )
    return Picture(at_s, roles, run, calls[:STORY_CALLS_MAX])


def _loads(samples: Sequence[Sample]) -> tuple[list[float], dict[Role, RoleLoad]]:
    if not samples:
        return [], {}
    times_s = sorted({sample.at_s for sample in samples})
    first_s, last_s = times_s[0], times_s[-1]
    count = min(SLICES_MAX, len(times_s))
    width_s = (last_s - first_s) / count or 1.0
    slices: list[dict[tuple[Role, str], list[Sample]]] = [defaultdict(list) for _ in range(count)]
    for sample in samples:
        at = min(count - 1, int((sample.at_s - first_s) / width_s))
        slices[at][sample.role, sample.worker].append(sample)
    filled = [index for index in range(count) if slices[index]]
    at_s = [first_s + (index + 0.5) * width_s for index in filled]
    roles = sorted({sample.role for sample in samples})
    return at_s, {role: _role_load(role, [slices[index] for index in filled]) for role in roles}


def _role_load(role: Role, slices: Sequence[dict[tuple[Role, str], list[Sample]]]) -> RoleLoad:
    load = RoleLoad([], [], [], [])
    for by_worker in slices:
        of_all: dict[str, int] = defaultdict(int)
        for (_, worker), found in by_worker.items():
            of_all[worker] += len(found)
        workers = running = waiting = used = 0.0
        for (role_then, worker), found in by_worker.items():
            if role_then != role:
                continue
            # A worker that changed its role meanwhile counts for its share of the time.
            share = len(found) / of_all[worker]
            workers += share
            running += share * sum(sample.running for sample in found) / len(found)
            waiting += share * sum(sample.waiting for sample in found) / len(found)
            used += share * sum(sample.kv_used for sample in found) / len(found)
        load.workers.append(workers)
        load.running.append(running)
        load.waiting.append(waiting)
        load.kv_used.append(used / workers if workers else 0.0)
    return load

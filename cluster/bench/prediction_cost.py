"""What predicting costs: time per forecast with many runs alive, memory per run that ended."""

from __future__ import annotations

import gc
import time
import tracemalloc
from itertools import count
from statistics import median

from msgspec.structs import replace

from cluster.bench.prediction_pass import HORIZON_S, Pass
from cluster.bench.timeline import Event
from cluster.workload.form import Run, Workload
from coordinator.workflow.forecast import TICK_S, Forecaster
from coordinator.workflow.prediction import RunKey

LIVE_RUNS = 10_000
FORECASTS = 40
FINISHED_RUNS = 300
CALLS_MOST = 8
"""Calls of a run that are told to measure memory; more of them would say the same."""


def forecast_ms(one: Pass, forecaster: Forecaster, now_s: float) -> float:
    """The median time of a forecast with ``LIVE_RUNS`` runs alive, in milliseconds.

    Runs of the workload are begun anew, each with some of its calls, until there are so many.
    """
    runs = one.load.workload.runs
    for number in count():
        if one.profiles.live_runs >= LIVE_RUNS:
            break
        run = runs[number % len(runs)]
        calls = 1 + number // len(runs) % len(run.calls)
        _tell(one, run, f"alive-{number}", calls, now_s, running=number % 2 == 0)
    for _ in range(20):
        now_s += TICK_S
        forecaster.tick(now_s)
    times_s: list[float] = []
    for _ in range(FORECASTS):
        now_s += 0.1
        began_s = time.perf_counter()
        forecaster.forecast(HORIZON_S, now_s)
        times_s.append(time.perf_counter() - began_s)
    return 1e3 * median(times_s)


def bytes_per_finished_run(one: Pass, workload: Workload, now_s: float) -> float:
    """By how much memory grows with each run that begins and ends, beyond what is known already.

    The first runs are not counted, so that what there is of each agent exists.
    """
    sizes: list[int] = []
    # From the beginning, or what only takes the place of something else would count as growth.
    tracemalloc.start()
    for _ in range(2):
        for number in range(FINISHED_RUNS):
            run = workload.runs[number % len(workload.runs)]
            calls = min(CALLS_MOST, len(run.calls))
            now_s += 1.0
            _tell(one, run, f"ended-{number}", calls, now_s, running=False)
            one.profiles.end_run(_key(run, f"ended-{number}"), now_s)
            one.forget(f"ended-{number}")
        one.updates_s.clear()
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    return max(0.0, (sizes[1] - sizes[0]) / FINISHED_RUNS)


def _key(run: Run, name: str) -> RunKey:
    return RunKey("", run.workflow, name)


def _tell(one: Pass, run: Run, name: str, calls: int, now_s: float, running: bool) -> None:
    """A run's first calls, one after the other; ``running``: the last of them does not end."""
    # Calls without a run end with themselves; these are to live.
    renamed = replace(
        run, id=name, calls=run.calls[:calls] if len(run.calls) > 1 else run.calls * 2
    )
    for call in renamed.calls[:calls]:
        one.tell(Event(now_s, False, renamed, call, min(call.prompt_tokens, 512)))
        if not running or call is not renamed.calls[calls - 1]:
            one.tell(Event(now_s, True, renamed, call, 0))

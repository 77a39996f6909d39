"""How well what agents do next is predicted, on traces.

``pythia bench predict TRACE...``: each trace is a line of text as ``cluster.workload.source``
takes it. A trace is told in order of time, as a coordinator would be; the second half is
judged. Agents, lengths and gaps are judged on every run once, forecasts with many runs at
once (``--concurrency``), and on all traces with runs merged if there are several.

Named by trace, as in ``whowhen.next_agent_top1``, and without a name the mean over traces:

* ``next_agent_top1``: share of next agents that were the likeliest; ``next_agent_top1_bound``:
  what an automaton of the same order would reach that knew the judged half in advance, and
  ``next_agent_top1_bound_fair`` that knew all of it but the run in question;
* ``length95_coverage``, ``length95_width_ratio``: answers within their upper bound, and mean
  bound over mean longest answer so far;
* ``gap_calibration_error``: mean distance of the shares below the tenths of predicted gaps;
* ``forecast30s_mae_ratio_prefill``, ``_decode``: mean absolute error over that of the last
  value, for tokens per second over the next 30 s; ``forecast30s_floor_*``: the same ratio if all
  that runs already begun will do was known exactly, which nobody can;
* ``forecast30s_mae_ratio_best_library``: our error over that of the library's best model;
* ``update_us_p50``, ``forecast_ms_10k_runs``, ``bytes_per_finished_run``.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from cluster.bench.prediction_cost import bytes_per_finished_run, forecast_ms
from cluster.bench.prediction_library import available, library_forecasts, spread_moments
from cluster.bench.prediction_load import Judged, by_application, has_runs, merged, once, repeated
from cluster.bench.prediction_pass import TICKS, Series, judge_behaviour, judge_forecasts
from cluster.bench.report import table, write
from cluster.schema import ConfigError
from cluster.workload.common import read_common
from cluster.workload.form import Workload, WorkloadError
from cluster.workload.source import open_workload

QUANTITIES = ("prefill", "decode")
MERGED = "merged"
MERGED_HALF_S = 1800.0
WORKFLOW_PREDICTIONS_LEAST = 20.0
"""Next agents that a workflow must have had to get a row of its own."""

ASSUMED_PROMPT_TOKENS = 1000
"""Of traces that do not record it; then nothing that depends on it is judged."""

Row = dict[str, Any]


def behaviour_row(workload: Workload, concurrency: int, seed: int, finals: bool) -> list[Row]:
    """Figures of agents, lengths, gaps and costs of updates; then the same by workflow."""
    summary, one, bound, by_workflow = judge_behaviour(once(workload, concurrency, seed), finals)
    figures: Row = {
        name: getattr(summary, name)
        for name in summary.__struct_fields__
        if getattr(summary, name) is not None
    }
    updates_s = sorted(one.updates_s)
    figures["update_us_p50"] = 1e6 * updates_s[len(updates_s) // 2]
    figures["update_us_p99"] = 1e6 * updates_s[len(updates_s) * 99 // 100]
    ends_s = max(run.arrival_s for run in one.load.workload.runs) + 1e6
    figures["bytes_per_finished_run"] = bytes_per_finished_run(one, workload, ends_s)
    rows: list[Row] = [{"trace": workload.name, **figures}]
    for name, scores in sorted(by_workflow.items()):
        if len(by_workflow) > 1 and scores.next_count >= WORKFLOW_PREDICTIONS_LEAST:
            rows.append(
                {
                    "trace": name,
                    "next_agent_top1": scores.top1,
                    "next_agent_top1_bound": bound.best(name),
                    "next_agent_top1_bound_fair": bound.fair(name),
                    "next_agent_log_loss": scores.log_loss,
                    "length95_coverage": scores.length_coverage,
                    "length95_width_ratio": scores.length_width_ratio,
                }
            )
    return rows


def forecast_row(load: Judged, finals: bool, library: bool) -> Row:
    """Figures of forecasts."""
    series, one, forecaster = judge_forecasts(load, finals)
    row: Row = {"trace": load.workload.name, "runs_alive": series.runs_alive}
    for column, quantity in enumerate(QUANTITIES):
        row |= _errors(series, column, quantity)
    if library and available():
        row |= _against_library(series)
    ticked_s = len(series.said) * 5.0 + 1.0
    row["forecast_ms_10k_runs"] = forecast_ms(one, forecaster, ticked_s)
    return row


def _errors(series: Series, column: int, quantity: str) -> Row:
    judged = series.judged
    came = series.came[judged, column]

    def mean_error(said: NDArray[np.float64]) -> float:
        return float(np.abs(came - said).mean())

    last_error = mean_error(series.last[judged, column])
    known = series.known[judged, column]
    # Of what is not known yet the median is the best guess of all.
    floor = mean_error(known + np.median(came - known))
    return {
        f"forecast30s_mae_ratio_{quantity}": mean_error(series.said[judged, column]) / last_error,
        f"forecast30s_floor_{quantity}": floor / last_error,
        f"forecast30s_coverage90_{quantity}": float(series.within[judged, column].mean()),
    }


def _against_library(series: Series) -> Row:
    """Ours over the best model's, at the same moments; for both quantities together."""
    ticks = len(series.demand) // TICKS * TICKS
    values = series.demand[:ticks].reshape(-1, TICKS, 2).mean(axis=1)
    first = int(np.flatnonzero(series.judged)[0]) // TICKS + 1
    moments = spread_moments(first, len(values))
    # A moment is the first value not seen yet; the last tick before it is where ours is from.
    ours = series.said[moments * TICKS - 1]
    row: Row = {}
    ratios: list[float] = []
    for column, quantity in enumerate(QUANTITIES):
        came = values[moments, column]
        errors = {
            name: float(np.abs(came - said).mean())
            for name, said in library_forecasts(values[:, column], moments).items()
        }
        best = min(errors, key=errors.__getitem__)
        ratios.append(float(np.abs(came - ours[:, column]).mean()) / errors[best])
        row[f"library_best_{quantity}"] = best
        row[f"forecast30s_mae_ratio_best_library_{quantity}"] = ratios[-1]
    row["forecast30s_mae_ratio_best_library"] = fmean(ratios)
    return row


def main(
    json_path: Path | None = None,
    words: list[str] | None = None,
    concurrency: int = 32,
    seed: int = 0,
    finals: bool = True,
    library: bool = True,
) -> int:
    """The command. ``finals``: clients say which call of a run is its last."""
    console = Console()
    workloads, unmeasured = _workloads(words or [])
    rows: list[Row] = []
    with console.status("predicting") as status:
        for workload in workloads:
            status.update(f"{workload.name}: agents, lengths, gaps")
            behaviour = behaviour_row(workload, concurrency, seed, finals)
            rows += behaviour
            if workload.name in unmeasured:
                continue
            status.update(f"{workload.name}: forecasts")
            load = repeated(workload, concurrency, seed)
            behaviour[0] |= forecast_row(load, finals, library)
        agents = [one for one in workloads if one.name not in unmeasured and has_runs(one)]
        if len(agents) > 1:
            status.update("all traces with runs merged: forecasts")
            each = max(1.0, concurrency / len(agents))
            parts = [repeated(one, each, seed, MERGED_HALF_S) for one in agents]
            rows.append(forecast_row(merged(parts, MERGED), finals, library))
    names = [workload.name for workload in workloads]
    figures = _figures(rows, names)
    write(json_path, "pythia bench predict", figures, rows)
    for row in rows:
        shown = [{"figure": name, "value": value} for name, value in row.items() if name != "trace"]
        table(console, str(row["trace"]), shown)
    if library and not available():
        console.print("statsforecast is not installed: no library to compare with")
    return 0


def _workloads(specs: list[str]) -> tuple[list[Workload], set[str]]:
    """The traces, and the names of those whose prompts' lengths are not known."""
    if not specs:
        raise ConfigError(["bench predict: which traces? Give at least one file"])
    workloads: list[Workload] = []
    unmeasured: set[str] = set()
    for spec in specs:
        try:
            workload = open_workload(spec)
        except WorkloadError as error:
            if "prompt lengths are not recorded" not in str(error):
                raise ConfigError([f"bench predict: {error}"]) from error
            workload = read_common(Path(spec.partition("?")[0]), ASSUMED_PROMPT_TOKENS)
            unmeasured.add(workload.name)
        workloads.append(by_application(workload))
    return workloads, unmeasured


def _figures(rows: list[Row], names: list[str]) -> dict[str, float]:
    """By trace, and over traces the mean; numbers only."""
    figures: dict[str, float] = {}
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["trace"] not in (*names, MERGED):
            continue
        for name, value in row.items():
            if isinstance(value, float):
                figures[f"{row['trace']}.{name}"] = value
                values.setdefault(name, []).append(value)
    return {name: fmean(found) for name, found in values.items()} | figures

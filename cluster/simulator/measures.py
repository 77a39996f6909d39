"""What a replay's records say in figures.

Latencies are of calls and runs that were served to their end; how many were not stands beside
them (``unfinished_calls``, ``rejected_calls``, ``failed_calls``, ``runs_served_share``), as a
configuration that drops what is slow would otherwise look fast. A figure of which there is
nothing to measure is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from cluster.simulator.records import CallRecord, Result, RunRecord
from cluster.simulator.setup import Slo
from coordinator.cost import Tier

SERVED = ("stop", "length")
"""Outcomes of calls that got all their tokens."""
WINDOW_SHARE = 0.9
"""Rates and loads are of the time until so many of all calls have ended. What comes behind is
the long pauses of the last runs, and would say more about these than about the cluster."""
QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}

Better = Literal["lower", "higher", ""]


class Measure(NamedTuple):
    """How a figure is shown: ``factor`` makes its value what ``unit`` says."""

    name: str
    label: str
    unit: str = ""
    better: Better = ""
    factor: float = 1.0


def _quantiles(name: str, unit: str, factor: float = 1.0) -> tuple[Measure, ...]:
    kinds = ("mean", *(kind for kind in QUANTILES))
    return tuple(
        Measure(f"{name}_{kind}", kind if kind == "mean" else kind.upper(), unit, "lower", factor)
        for kind in kinds
    )


COMPLETION = _quantiles("completion_s", "s")
SERVING = _quantiles("serving_s", "s")
TTFT = _quantiles("ttft_s", "s")
ITL = _quantiles("itl_s", "ms", 1e3)
GAP = _quantiles("gap_s", "ms", 1e3)
SERVICE = (
    Measure("goodput_calls_share", "good calls", "%", "higher", 100),
    Measure("goodput_calls_per_s", "good calls", "1/s", "higher"),
    Measure("goodput_runs_share", "good runs", "%", "higher", 100),
    Measure("tokens_per_s_per_gpu", "tokens/GPU", "1/s", "higher"),
    Measure("runs_served_share", "runs served", "%", "higher", 100),
    Measure("rejected_calls", "rejected", "calls", "lower"),
    Measure("failed_calls", "failed", "calls", "lower"),
    Measure("unfinished_calls", "unfinished", "calls", "lower"),
)
CACHES = (
    Measure("prefix_hit_share", "prefix hits", "%", "higher", 100),
    Measure("prefix_hit_tokens", "prefix hits", "Mtok", "higher", 1e-6),
    Measure("recomputed_tokens", "recomputed", "Mtok", "lower", 1e-6),
    *(Measure(f"moved_bytes_{tier}", tier, "GB moved", "", 1e-9) for tier in get_args(Tier)),
    Measure("probe_bytes", "probes", "GB moved", "", 1e-9),
)
ENGINES = (
    Measure("decode_kv_mean", "decode KV", "% mean", "", 100),
    Measure("decode_kv_p95", "decode KV", "% P95", "", 100),
    Measure("preemptions", "preemptions", "", "lower"),
    Measure("flips", "flips"),
    Measure("wasted_warmups", "warm-ups", "wasted", "lower"),
    Measure("core_us_per_message", "core, us", "a message", "lower"),
)


def figures(result: Result, slo: Slo) -> dict[str, float]:
    """Everything that can be said of one replay in numbers; all of them are finite.

    * ``completion_s_*`` of runs that were served; ``serving_s_*`` is the same without the
      longest path of pauses, which no server can shorten; ``ttft_s_*``; ``itl_s_*`` of calls'
      mean times between tokens, ``gap_s_*`` of all single times between tokens.
    * ``goodput_*``: a call is good if it was served within ``slo``, a run if all its calls were.
      Rates are of calls that ended within ``window_s``, see ``WINDOW_SHARE``.
    * ``prefix_hit_tokens``: prompt tokens that nobody had to compute; their share is of the
      prompts of served calls. ``moved_bytes_*``: KV moved for calls, by tier; ``probe_bytes``:
      that which the core had moved to see whether two workers can, by any.
    * ``decode_kv_*``: share of KV blocks in use on workers that decode, in that time.
    * ``wasted_warmups``: left out if nothing was warmed up.
    * ``core_us_per_message``: real time in the core per message that it handled (or deadline
      that came), if it was measured. Most messages need no decision.
    """
    served = [call for call in result.calls if call.outcome in SERVED]
    finished = [run for run in result.runs if run.finished]
    found: dict[str, float] = {}
    found |= _distribution("completion_s", [run.completion_s for run in finished])
    found |= _distribution("serving_s", [serving_s(run) for run in finished])
    found |= _distribution("ttft_s", [call.ttft_s for call in served])
    found |= _distribution("itl_s", [call.itl_s for call in served if call.output_tokens > 1])
    if result.gaps.count:
        found["gap_s_mean"] = result.gaps.mean_s
        found |= {f"gap_s_{kind}": result.gaps.quantile(at) for kind, at in QUANTILES.items()}
    window_s = window(result.calls)
    found |= _service(result, served, slo)
    found |= _rates(result, served, slo, window_s)
    found |= _work(result, served)
    return found | _engines(result, window_s)


def serving_s(run: RunRecord) -> float:
    """A run's completion time without the pauses that it would take on any cluster."""
    return max(0.0, run.completion_s - run.think_s)


def is_good(call: CallRecord, slo: Slo) -> bool:
    """Served, and within both limits."""
    if call.outcome not in SERVED or call.ttft_s > slo.ttft_s:
        return False
    return call.output_tokens < 2 or call.itl_s <= slo.itl_s


def window(calls: Sequence[CallRecord]) -> float:
    """Seconds until ``WINDOW_SHARE`` of all calls had ended, 0 without any."""
    ends_s = sorted(call.ended_s for call in calls if call.outcome)
    return ends_s[math.ceil(WINDOW_SHARE * len(ends_s)) - 1] if ends_s else 0.0


def hit_tokens(call: CallRecord) -> int:
    """Tokens of the prompt that whoever prefilled found in its cache, or read from a peer's."""
    if call.prefill:
        return call.prefill_cached_tokens
    return call.local_cached_tokens + call.pulled_tokens


def _distribution(name: str, values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    points = np.asarray(np.quantile(values, list(QUANTILES.values())))
    found = {f"{name}_mean": float(np.mean(values))}
    return found | {
        f"{name}_{kind}": float(point) for kind, point in zip(QUANTILES, points, strict=True)
    }


def _service(result: Result, served: Sequence[CallRecord], slo: Slo) -> dict[str, float]:
    calls, runs, totals = result.calls, result.runs, result.totals
    good = sum(is_good(call, slo) for call in served)
    bad_runs = {call.run for call in calls if not is_good(call, slo)}
    good_runs = sum(run.finished and run.run not in bad_runs for run in runs)
    rejected = sum(call.outcome == "rejected" for call in calls)
    unfinished = sum(not call.outcome for call in calls)
    found: dict[str, float] = {
        "calls": len(calls),
        "runs": len(runs),
        "duration_s": totals.duration_s,
        "gpus": totals.gpus,
        "served_calls": len(served),
        "rejected_calls": rejected,
        "unfinished_calls": unfinished,
        "failed_calls": len(calls) - len(served) - rejected - unfinished,
        "output_tokens": sum(call.output_tokens for call in served),
        "prompt_tokens": sum(call.prompt_tokens for call in served),
    }
    if calls:
        found["goodput_calls_share"] = good / len(calls)
    if runs:
        found["goodput_runs_share"] = good_runs / len(runs)
        found["runs_served_share"] = sum(run.finished for run in runs) / len(runs)
    return found


def _rates(
    result: Result, served: Sequence[CallRecord], slo: Slo, window_s: float
) -> dict[str, float]:
    if window_s <= 0:
        return {}
    inside = [call for call in served if call.ended_s <= window_s]
    tokens = sum(call.output_tokens for call in inside)
    found = {
        "window_s": window_s,
        "goodput_calls_per_s": sum(is_good(call, slo) for call in inside) / window_s,
    }
    if result.totals.gpus:
        found["tokens_per_s_per_gpu"] = tokens / window_s / result.totals.gpus
    return found


def _work(result: Result, served: Sequence[CallRecord]) -> dict[str, float]:
    totals = result.totals
    hits = sum(hit_tokens(call) for call in served)
    found: dict[str, float] = {
        "prefix_hit_tokens": hits,
        "recomputed_tokens": totals.recomputed_tokens,
        "computed_tokens": sum(call.computed_tokens for call in result.calls),
        "moved_tokens": sum(call.moved_tokens for call in served),
        "pulled_tokens": sum(call.pulled_tokens for call in served),
    }
    found |= {f"moved_bytes_{tier}": totals.moved_bytes.get(tier, 0) for tier in get_args(Tier)}
    found["probe_bytes"] = sum(totals.probe_bytes.values())
    prompts = sum(call.prompt_tokens for call in served)
    if prompts:
        found["prefix_hit_share"] = hits / prompts
    return found


def _engines(result: Result, window_s: float) -> dict[str, float]:
    totals = result.totals
    found: dict[str, float] = {
        "preemptions": totals.preemptions,
        "flips": totals.flips,
    }
    if totals.warmups:
        found["wasted_warmups"] = totals.wasted_warmups
    used = [
        sample.kv_used
        for sample in result.samples
        if sample.role != "prefill" and sample.at_s <= window_s
    ]
    if used:
        found["decode_kv_mean"] = float(np.mean(used))
        found["decode_kv_p95"] = float(np.quantile(used, 0.95))
    if totals.core_messages and totals.core_s:
        found["core_us_per_message"] = 1e6 * totals.core_s / totals.core_messages
    return found

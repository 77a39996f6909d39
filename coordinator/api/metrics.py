"""``/metrics``: vLLM's own, and behind them how good predictions are and what is forecast.

The core is asked for its figures when somebody looks, so all API processes show the same and
nothing is shown that is old. While it is away ``pythia_core_up`` is 0 and its figures are missing.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from vllm.v1.metrics.prometheus import get_prometheus_registry

from coordinator.api.workflows import cluster_of
from coordinator.protocol import ShowFigures, ShowRebalance
from coordinator.rebalancer import Shown
from coordinator.workflow.blend import Interval
from coordinator.workflow.foresight import METRICS_HORIZON_S, Figures

PATH = "/metrics"
ANSWER_S = 2.0
"""Shorter than what those who collect metrics wait."""

WORKFLOW = ("workflow", "tenant")
SCORES = {
    "next_agent_top1": "Share of next agents that were the likeliest, lately",
    "next_agent_log_loss": "Mean of minus the log of the next agent's probability, in nats",
    "length95_coverage": "Share of answers within their upper bound, meant to be 0.95",
    "length95_width_ratio": "Mean upper bound over mean longest answer so far",
    "gap_calibration_error": "Mean distance of the shares below the tenths of predicted gaps",
    "predictions": "Next agents that were predicted, fading",
    "trusted": "Whether predictions of the next agent are acted on",
}
DEMAND = {
    "prefill_tokens_per_s": ("prefill_tokens_per_second", "Prompt tokens to compute per second"),
    "decode_tokens_per_s": ("decode_tokens_per_second", "Output tokens per second"),
    "resident_kv_tokens": ("resident_kv_tokens", "Tokens held by running calls"),
}

MOVED = {
    "plans_pull": ("pulls", "Plans to read from a peer's cache"),
    "pulls_missing": ("pulls_missing", "Of them, the peer had lost some of what was to be read"),
    "pulls_unread": ("pulls_unread", "Of them, nothing came of it and all was computed"),
    "tokens_pulled": ("pulled_tokens", "Prompt tokens that were read from a peer's cache"),
    "prefetches": ("prefetches", "Contexts that were to be moved before a call asked"),
    "prefetches_used": ("prefetches_used", "Of them, a call began with what was moved"),
    "prefetches_wasted": ("prefetches_wasted", "Of them, nobody asked for what was moved"),
    "prefetches_dropped": ("prefetches_dropped", "Of them, given up before all was there"),
    "tokens_prefetched": ("prefetched_tokens", "Prompt tokens that were moved before a call asked"),
    "tokens_moved": ("moved_tokens", "Prompt tokens that were read by decode workers"),
    "moves_begun": ("moves", "Running calls that were to go on on another worker"),
    "moves_made": ("moves_made", "Of them, those that did"),
    "moves_undone": ("moves_undone", "Of them, those that stayed where they were"),
    "move_tokens": ("move_tokens", "Tokens whose KV was brought there"),
}

_decode = msgspec.json.Decoder(Figures).decode
_decode_roles = msgspec.json.Decoder(Shown).decode


def include_metrics(app: FastAPI) -> None:
    """Answer ``/metrics`` in place of vLLM, with all that it says and more."""
    app.router.routes.insert(0, APIRoute(PATH, _metrics, include_in_schema=False))


async def _metrics(request: Request) -> Response:
    vllm = await run_in_threadpool(generate_latest, get_prometheus_registry())
    try:
        questions = cluster_of(request).questions
        answer = await questions.ask(ShowFigures, ANSWER_S)
        roles = await questions.ask(ShowRebalance, ANSWER_S)
    except TimeoutError:
        figures = shown = None
    else:
        figures, shown = _decode(answer.body), _decode_roles(roles.body)
    return Response(vllm + page(figures, shown), media_type=CONTENT_TYPE_LATEST)


def page(figures: Figures | None, roles: Shown | None = None) -> bytes:
    """The core's metrics in Prometheus' text format; None if it did not answer."""
    registry = CollectorRegistry()
    registry.register(_Collector(figures, roles))
    found: bytes = generate_latest(registry)
    return found


class _Collector:
    """One look at the core."""

    def __init__(self, figures: Figures | None, roles: Shown | None) -> None:
        self._figures = figures
        self._roles = roles

    def collect(self) -> Iterator[Metric]:
        """The families of metrics."""
        up = 0 if self._figures is None else 1
        yield GaugeMetricFamily("pythia_core_up", "Whether the core answers", value=up)
        if self._figures is not None:
            yield from _of_workflows(self._figures)
            yield from _of_forecasts(self._figures)
            yield from _of_errors(self._figures)
            yield from _of_moved(self._figures.moved)
        if self._roles is not None:
            yield from _of_roles(self._roles)


def _of_workflows(figures: Figures) -> Iterator[Metric]:
    for name, what in SCORES.items():
        family = GaugeMetricFamily(f"pythia_workflow_{name}", what, labels=WORKFLOW)
        for one in figures.workflows:
            family.add_metric((one.workflow, one.tenant), float(getattr(one.scores, name)))
        yield family
    for field, (name, what) in DEMAND.items():
        text = f"{what}, expected in {METRICS_HORIZON_S:.0f} s, of one workflow"
        family = GaugeMetricFamily(f"pythia_workflow_forecast_{name}", text, labels=WORKFLOW)
        for one in figures.workflows:
            family.add_metric((one.workflow, one.tenant), getattr(one, field))
        yield family


def _of_forecasts(figures: Figures) -> Iterator[Metric]:
    for field, (name, what) in DEMAND.items():
        labels = ("horizon_seconds", "bound")
        text = f"{what}, forecast: likely, and nine times of ten between low and high"
        family = GaugeMetricFamily(f"pythia_forecast_{name}", text, labels=labels)
        for one in figures.forecasts:
            interval: Interval = getattr(one, field)
            for bound in ("low", "likely", "high"):
                family.add_metric((f"{one.horizon_s:g}", bound), getattr(interval, bound))
        yield family


def _of_moved(counters: dict[str, int]) -> Iterator[Metric]:
    for name, (metric, what) in MOVED.items():
        if name in counters:
            yield CounterMetricFamily(f"pythia_{metric}", what, value=counters[name])


def _of_errors(figures: Figures) -> Iterator[Metric]:
    labels = ("quantity", "horizon_seconds")
    error = GaugeMetricFamily(
        "pythia_forecast_mean_error", "Mean absolute error of forecasts, lately", labels=labels
    )
    ratio = GaugeMetricFamily(
        "pythia_forecast_error_ratio", "The same over that of the last value", labels=labels
    )
    coverage = GaugeMetricFamily(
        "pythia_forecast_coverage",
        "Share of what came that was within its interval, meant to be 0.9",
        labels=labels,
    )
    for one in figures.scores:
        which = (one.quantity, f"{one.horizon_s:g}")
        error.add_metric(which, one.judgement.mean_error)
        ratio.add_metric(which, one.ratio_to_last_value)
        coverage.add_metric(which, one.judgement.coverage)
    yield from (error, ratio, coverage)


def _of_roles(shown: Shown) -> Iterator[Metric]:
    wanted = GaugeMetricFamily(
        "pythia_desired_workers",
        "Workers that the expected demand needs without queues, for an autoscaler",
        labels=("role",),
    )
    present = GaugeMetricFamily("pythia_workers", "Workers by their role now", labels=("role",))
    roles = [one.role for one in shown.workers]
    for role, count in shown.desired.items():
        wanted.add_metric((role,), count)
    for role in ("prefill", "decode", "mixed"):
        present.add_metric((role,), roles.count(role))
    pressure = GaugeMetricFamily(
        "pythia_role_pressure", "Expected demand over capacity", labels=("side",)
    )
    for side in ("prefill", "decode", "memory"):
        pressure.add_metric((side,), getattr(shown.verdict.pressure, side))
    flips = CounterMetricFamily("pythia_role_flips", "Turns of workers that came to their end")
    flips.add_metric((), shown.role_flips)
    undone = CounterMetricFamily("pythia_role_flips_undone", "Turns of workers that were undone")
    undone.add_metric((), shown.turns_undone)
    yield from (wanted, present, pressure, flips, undone)

"""The forecast of demand as the core keeps it, and as it is shown to people and to metrics.

The totals are the whole cluster's. Whose they are is told each tenant of its own workflows only,
what all others add is one sum; metrics, which are for who runs the cluster, name the busiest
workflows of all tenants.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import msgspec

from coordinator.workflow.forecast import Forecast, Forecaster, ForecastScore, Share
from coordinator.workflow.learner import Learner
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.profile import Profile
from coordinator.workflow.scores import ScoreView, score_view

HORIZONS_S = (1.0, 10.0, 30.0, 60.0, 300.0)
SHARES_SHOWN = 1000
WORKFLOWS_IN_METRICS = 64
METRICS_HORIZON_S = 30.0
"""Ahead of now, of what metrics say of single workflows."""
OTHERS = "(others)"


class ForecastShown(msgspec.Struct, frozen=True, gc=False):
    """What is expected at each of ``HORIZONS_S``, and how good forecasts have been."""

    forecasts: list[Forecast]
    scores: list[ForecastScore]


class WorkflowForecast(msgspec.Struct, frozen=True, gc=False):
    """What one workflow is expected to ask for until ``horizon_s`` from now: means, which
    ``agents`` add up to."""

    horizon_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    resident_kv_tokens: float
    agents: list[Share]


class WorkflowFigures(msgspec.Struct, frozen=True, gc=False):
    """One workflow in metrics."""

    tenant: str
    workflow: str
    scores: ScoreView
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    resident_kv_tokens: float


class Figures(msgspec.Struct, frozen=True, gc=False):
    """All that metrics say of predictions. ``forecasts`` are without shares. ``moved``: counters
    of KV that was moved, by name."""

    workflows: list[WorkflowFigures]
    forecasts: list[Forecast]
    scores: list[ForecastScore]
    moved: dict[str, int] = {}


class Foresight:
    """The forecaster of what a ``Learner`` knows, in the core's time."""

    def __init__(self, learner: Learner, limits: WorkflowLimits) -> None:
        self._learner = learner
        self._forecaster = Forecaster(learner.profiles, limits)

    def tick(self, now_s: float) -> None:
        """Time passed. Takes up to some milliseconds about once a second."""
        self._forecaster.tick(self._learner.at_s(now_s))

    def shown(self, tenant: str, now_s: float) -> ForecastShown:
        """All demand, and which of it is a tenant's."""
        at_s = self._learner.at_s(now_s)
        found = [self._forecaster.forecast(horizon_s, at_s) for horizon_s in HORIZONS_S]
        return ForecastShown([_for(tenant, one) for one in found], self._forecaster.scores())

    def demand(self, horizon_s: float, now_s: float) -> tuple[Forecast, list[ForecastScore]]:
        """All demand until ``horizon_s`` from now, and how good forecasts have been."""
        at_s = self._learner.at_s(now_s)
        return self._forecaster.forecast(horizon_s, at_s), self._forecaster.scores()

    def of_workflow(self, tenant: str, workflow: str, now_s: float) -> list[WorkflowForecast]:
        """What a tenant's workflow is expected to ask for; nothing if none is known of it."""
        if not self._learner.profiles.knows(tenant, workflow):
            return []
        at_s = self._learner.at_s(now_s)
        found: list[WorkflowForecast] = []
        for horizon_s in HORIZONS_S:
            shares = self._forecaster.forecast(horizon_s, at_s).shares
            agents = [one for one in shares if (one.tenant, one.workflow) == (tenant, workflow)]
            total = summed(agents)
            found.append(
                WorkflowForecast(
                    horizon_s,
                    total.prefill_tokens_per_s,
                    total.decode_tokens_per_s,
                    total.resident_kv_tokens,
                    agents,
                )
            )
        return found

    def figures(self, now_s: float) -> Figures:
        """For metrics: the workflows with most predictions, and all demand."""
        at_s = self._learner.at_s(now_s)
        profiles = self._learner.profiles.by_number.values()
        busiest = sorted(profiles, key=lambda one: (-one.scores.next_count, one.number))
        by_workflow: dict[tuple[str, str], list[Share]] = {}
        for share in self._forecaster.forecast(METRICS_HORIZON_S, at_s).shares:
            by_workflow.setdefault((share.tenant, share.workflow), []).append(share)
        return Figures(
            [_figures(one, by_workflow) for one in islice(busiest, WORKFLOWS_IN_METRICS)],
            [
                msgspec.structs.replace(self._forecaster.forecast(one, at_s), shares=[])
                for one in HORIZONS_S
            ],
            self._forecaster.scores(),
        )


def summed(shares: Iterable[Share], tenant: str = "", workflow: str = "") -> Share:
    """Several shares as one."""
    prefill = decode = resident = 0.0
    for one in shares:
        prefill += one.prefill_tokens_per_s
        decode += one.decode_tokens_per_s
        resident += one.resident_kv_tokens
    return Share(tenant, workflow, "", prefill, decode, resident)


def _for(tenant: str, forecast: Forecast) -> Forecast:
    """What a tenant may see of a forecast: its own largest shares, and the sum of all others."""
    own = [one for one in forecast.shares if one.tenant == tenant]
    shown = own[:SHARES_SHOWN]
    rest = [one for one in forecast.shares if one.tenant != tenant] + own[SHARES_SHOWN:]
    if rest:
        shown = [*shown, summed(rest, "", OTHERS)]
    return msgspec.structs.replace(forecast, shares=shown)


def _figures(profile: Profile, by_workflow: dict[tuple[str, str], list[Share]]) -> WorkflowFigures:
    total = summed(by_workflow.get((profile.tenant, profile.workflow), []))
    return WorkflowFigures(
        profile.tenant,
        profile.workflow,
        score_view(profile.scores),
        total.prefill_tokens_per_s,
        total.decode_tokens_per_s,
        total.resident_kv_tokens,
    )

"""The stage mix to come: how many tokens will be prefilled, decoded and held, and by whom.

Three things go in: what is alive (``Outlook``), the rates at which runs of each workflow begin,
and how good forecasts have been so far (``Blend``). Rates are means that fade: on the traces
at hand no model of the arrival process does better at these horizons, see ``pythia bench
predict``.

Whoever owns it ticks it every second or so. Everything is in arrays and counts, so neither a
tick nor a forecast gets longer with what happened in between.
"""

from __future__ import annotations

from collections import deque
from math import sqrt

import msgspec
import numpy as np

from coordinator.workflow.blend import EARLIER, Blend, Interval, Judgement, Said
from coordinator.workflow.demand import DECODE, PREFILL, QUANTITIES, RESIDENT, Look, Outlook
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.profiles import Profiles

TICK_S = 5.0
"""How often forecasts are made to be judged."""
JUDGED_S = (5.0, 30.0, 120.0)
HORIZON_LEAST_S, HORIZON_MOST_S = 1.0, 300.0
RATE_FADING_S = 300.0
REFRESH_S = 1.0
"""How often one workflow's projection may be made anew: that takes milliseconds."""
GAP_MOST_S = 60.0
"""If ticks are further apart, nothing is learned from what lies between them."""
NAMES = ("prefill_tokens_per_s", "decode_tokens_per_s", "resident_kv_tokens")


class Share(msgspec.Struct, frozen=True, gc=False):
    """What one agent of one workflow is expected to add to a forecast's means."""

    tenant: str
    workflow: str
    agent: str
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    resident_kv_tokens: float


class Forecast(msgspec.Struct, frozen=True, gc=False):
    """Demand from now to ``horizon_s`` ahead.

    ``prefill_tokens_per_s``: prompt tokens that are in no cache; ``decode_tokens_per_s``: output
    tokens; ``resident_kv_tokens``: held by calls that run at the horizon. ``shares``: whose they
    are, the largest first; they add up to the means of the model.
    """

    horizon_s: float
    prefill_tokens_per_s: Interval
    decode_tokens_per_s: Interval
    resident_kv_tokens: Interval
    shares: list[Share]


class ForecastScore(msgspec.Struct, frozen=True, gc=False):
    """How good forecasts of one quantity at one horizon have been."""

    quantity: str
    horizon_s: float
    judgement: Judgement
    ratio_to_last_value: float


class _Waiting(msgspec.Struct, frozen=True, gc=False):
    """Forecasts made at a tick, until their horizon has passed."""

    due_s: float
    made_s: float
    totals: tuple[float, float]
    said: tuple[Said, ...]


class Forecaster:
    """Forecasts of all demand."""

    def __init__(self, profiles: Profiles, limits: WorkflowLimits) -> None:
        self._profiles = profiles
        self._outlook = Outlook(profiles, limits)
        self._blends = {horizon_s: [Blend() for _ in range(QUANTITIES)] for horizon_s in JUDGED_S}
        self._waiting: dict[float, deque[_Waiting]] = {at: deque() for at in JUDGED_S}
        self._past: deque[tuple[float, float, float]] = deque()
        """Time, prefilled and decoded tokens of the last ticks, as far as horizons reach."""
        self._runs: dict[int, float] = {}
        """Runs that began, by workflow, fading; divided by ``_weight_s`` a rate."""
        self._weight_s = 0.0
        self._resident = 0.0
        self._ticked_s: float | None = None
        self._refreshed_s: float | None = None

    def tick(self, now_s: float) -> None:
        """Time passed. Does something every ``TICK_S``; may be called as often as one likes."""
        last_s = self._ticked_s
        if self._refreshed_s is None or now_s >= self._refreshed_s + REFRESH_S:
            self._refreshed_s = now_s
            self._outlook.refresh(1)
        if last_s is not None and now_s < last_s + TICK_S:
            return
        self._ticked_s = now_s
        answered, self._resident = self._outlook.answering(now_s)
        demand = self._profiles.demand
        totals = (demand.prefill_tokens, demand.decode_tokens + answered)
        if last_s is None or now_s - last_s > GAP_MOST_S:
            self._restart(now_s, totals)
            return
        self._count_runs(now_s - last_s)
        self._learn(now_s, totals)
        self._past.append((now_s, *totals))
        while self._past[0][0] < now_s - (1 + EARLIER) * HORIZON_MOST_S - GAP_MOST_S:
            self._past.popleft()
        for horizon_s in JUDGED_S:
            said = self._say(horizon_s, now_s, self._outlook.look(horizon_s, now_s, self.rates()))
            self._waiting[horizon_s].append(_Waiting(now_s + horizon_s, now_s, totals, tuple(said)))

    def forecast(self, horizon_s: float, now_s: float) -> Forecast:
        """The demand until ``horizon_s`` from now, which is brought between 1 s and 5 min."""
        horizon_s = min(HORIZON_MOST_S, max(HORIZON_LEAST_S, horizon_s))
        look = self._outlook.look(horizon_s, now_s, self.rates())
        prefill, decode, resident = (said.interval for said in self._say(horizon_s, now_s, look))
        return Forecast(horizon_s, prefill, decode, resident, self._shares(look, horizon_s))

    def rates(self) -> dict[int, float]:
        """New runs per second, by workflow's number."""
        if not self._weight_s:
            return {}
        return {number: runs / self._weight_s for number, runs in self._runs.items()}

    def scores(self) -> list[ForecastScore]:
        """How good forecasts have been, by quantity and horizon."""
        found: list[ForecastScore] = []
        for horizon_s, blends in self._blends.items():
            for name, blend in zip(NAMES, blends, strict=True):
                judgement = blend.judgement()
                found.append(ForecastScore(name, horizon_s, judgement, judgement.ratio))
        return found

    def _say(self, horizon_s: float, now_s: float, look: Look) -> list[Said]:
        nearest_s = min(JUDGED_S, key=lambda judged_s: abs(judged_s - horizon_s))
        blends = self._blends[nearest_s]
        lately = self._last_rates(horizon_s)
        said: list[Said] = []
        for quantity in (PREFILL, DECODE):
            spread = sqrt(max(0.0, float(look.squares[quantity]))) / horizon_s
            model = float(look.expected[quantity]) / horizon_s
            last, *earlier = (rates[quantity] for rates in lately)
            said.append(blends[quantity].say(model, last, spread, tuple(earlier)))
        resident = float(look.expected[RESIDENT])
        said.append(blends[RESIDENT].say(resident, self._resident, resident))
        return said

    def _last_rates(self, horizon_s: float) -> list[tuple[float, float]]:
        """What was prefilled and decoded per second over the last ``horizon_s``, about, and over
        the ones before it; as the one after it where nothing is known any more."""
        found: list[tuple[float, float]] = []
        window = max(1, round(max(horizon_s, TICK_S) / TICK_S))
        last = len(self._past) - 1
        for end in range(last, last - window * (1 + EARLIER), -window):
            began = max(0, end - window)
            if end <= 0:
                found.append(found[-1] if found else (0.0, 0.0))
                continue
            (from_s, *before), (to_s, *after) = self._past[began], self._past[end]
            elapsed_s = to_s - from_s
            prefilled, decoded = (
                max(0.0, total - known) / elapsed_s
                for total, known in zip(after, before, strict=True)
            )
            found.append((prefilled, decoded))
        return found

    def _learn(self, now_s: float, totals: tuple[float, float]) -> None:
        passed_s = now_s - self._past[-1][0]
        passed = [
            max(0.0, total - before) / passed_s
            for total, before in zip(totals, self._past[-1][1:], strict=True)
        ]
        for blends in self._blends.values():
            for blend, value in zip(blends, (*passed, self._resident), strict=True):
                blend.passed(value, passed_s)
        for horizon_s, waiting in self._waiting.items():
            while waiting and waiting[0].due_s <= now_s:
                one = waiting.popleft()
                elapsed_s = now_s - one.made_s
                if elapsed_s > horizon_s + 2 * TICK_S:
                    continue
                came = [
                    max(0.0, total - before) / elapsed_s
                    for total, before in zip(totals, one.totals, strict=True)
                ]
                for blend, said, value in zip(
                    self._blends[horizon_s], one.said, (*came, self._resident), strict=True
                ):
                    blend.judge(said, value)

    def _restart(self, now_s: float, totals: tuple[float, float]) -> None:
        """Ticks begin, or begin again after a pause: nothing to compare with."""
        self._profiles.demand.arrivals.clear()
        self._past.clear()
        self._past.append((now_s, *totals))
        for waiting in self._waiting.values():
            waiting.clear()

    def _count_runs(self, elapsed_s: float) -> None:
        keep = RATE_FADING_S / (RATE_FADING_S + elapsed_s)
        known = self._profiles.by_number
        self._runs = {
            number: runs * keep
            for number, runs in self._runs.items()
            if runs > 1e-6 and number in known
        }
        self._weight_s = self._weight_s * keep + elapsed_s
        for number, runs in self._profiles.demand.arrivals.items():
            self._runs[number] = self._runs.get(number, 0.0) + runs
        self._profiles.demand.arrivals.clear()

    def _shares(self, look: Look, horizon_s: float) -> list[Share]:
        scale = np.array([1 / horizon_s, 1 / horizon_s, 1.0])
        found: list[Share] = []
        for (number, agent), tokens in look.parts.items():
            profile = self._profiles.by_number.get(number)
            if profile is not None and tokens.any():
                prefill, decode, resident = (tokens * scale).tolist()
                name = profile.name(agent)
                found.append(
                    Share(profile.tenant, profile.workflow, name, prefill, decode, resident)
                )
        found.sort(key=lambda one: -one.decode_tokens_per_s - one.prefill_tokens_per_s)
        return found

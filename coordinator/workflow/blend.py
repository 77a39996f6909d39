"""Several forecasts of one number, weighed by how good each has been.

Polynomially weighted averages with a learning rate per forecaster and none to choose (ML-Poly:
Gaillard, Stoltz and van Erven, *A Second-order Bound with Excess Losses*, COLT 2014), on
absolute errors with their gradient. The result is about as good as the best fixed mixture, so a
model that turns out wrong loses its say, and the last value is always among those asked.

How far off the result was gives the interval, as quantiles of the ratio of what came to what was
said, with levels that follow how often it was missed (adaptive conformal inference, see
``lengths``). All of it fades.

One of those asked is a mixture of all others, and of what came in the windows before the last,
fitted by least squares (``regression``): the weighing alone takes only shares of what it is told.
"""

from __future__ import annotations

import msgspec

from coordinator.workflow.histogram import Histogram
from coordinator.workflow.regression import Regression

KEEP = 0.999
"""What regrets keep of their weight at each judgement."""
HALF_LIFE = 360.0
"""Judgements after which one weighs half."""
SAMPLES_LEAST = 12.0
"""Judgements from which on the interval rests on them alone."""
RATIO_UNIT = 1e-3
"""Ratios are told apart from here on."""
RATIO_MOST = 1e6
EXCEEDED = 0.05
STEP = 0.02
LEVEL_LEAST, LEVEL_MOST = 0.001, 0.2
MODEL, CALIBRATED, TYPICAL, RECENT, STEADY, LONG, LAST, FITTED = range(8)
"""Who is asked: the model of all runs; the same times what it was too low by lately; the median
of what came lately; means that fade within a minute, five and thirty; the last value; and what
fits best of all these and ``EARLIER`` values before the last."""
ASKED = 8
EARLIER = 3
_REACTIVE = tuple(float(who == LAST) for who in range(ASKED))
"""The weights before anything is known, and where nothing is better than the last value."""
FADING_S = {RECENT: 60.0, STEADY: 300.0, LONG: 1800.0}


class Interval(msgspec.Struct, frozen=True, gc=False):
    """A number that is not known. ``expected`` is the mean, ``likely`` what errs least, and 90 %
    should be between ``low`` and ``high``."""

    low: float
    likely: float
    expected: float
    high: float


class Said(msgspec.Struct, frozen=True, gc=False):
    """A forecast that waits to be judged."""

    asked: tuple[float, ...]
    interval: Interval
    inputs: tuple[float, ...]


class Judgement(msgspec.Struct, frozen=True, gc=False):
    """How good forecasts of one number have been: mean absolute errors, theirs and that of the
    last value, the share of what came within the interval, and after how many judgements."""

    mean_error: float
    last_value_error: float
    coverage: float
    samples: float

    @property
    def ratio(self) -> float:
        """The error over that of the last value; 1 if there is none."""
        return self.mean_error / self.last_value_error if self.last_value_error else 1.0


class Blend:
    """Forecasts of one number at one horizon."""

    def __init__(self) -> None:
        self._regrets = [0.0] * ASKED
        self._variation = [1e-12] * ASKED
        self.weights = list(_REACTIVE)
        self._model_ratios = Histogram(HALF_LIFE)
        self._ratios = Histogram(HALF_LIFE)
        self._values = Histogram(HALF_LIFE)
        self._means: dict[int, float] = {}
        self._fitted = Regression(FITTED + EARLIER)
        self._low_level = self._high_level = EXCEEDED
        self._low, self._high = 0.0, 1.0
        self._correction, self._typical = 1.0, 0.0
        self._error = self._last_error = self._within = self._count = 0.0

    def say(
        self,
        model: float,
        last: float,
        spread: float,
        earlier: tuple[float, ...] = (0.0,) * EARLIER,
    ) -> Said:
        """A forecast. ``spread``: the model's standard deviation, for lack of experience;
        ``earlier``: the values before the last, the latest first."""
        found = [0.0] * ASKED
        found[MODEL] = model
        found[CALIBRATED] = model * self._correction
        found[TYPICAL] = self._typical if self._count else model
        for who in FADING_S:
            found[who] = self._means.get(who, last)
        found[LAST] = last
        inputs = (*found[:FITTED], *earlier)
        found[FITTED] = self._fitted.say(inputs)
        likely = sum(weight * value for weight, value in zip(self.weights, found, strict=True))
        low, high = likely * self._low, likely * self._high
        if self._ratios.samples < SAMPLES_LEAST:
            low = min(low, likely - 2 * spread)
            high = max(high, likely + 2 * spread)
        interval = Interval(max(0.0, low), likely, model, max(high, likely))
        return Said(tuple(found), interval, inputs)

    def passed(self, value: float, elapsed_s: float) -> None:
        """This was the number over the last ``elapsed_s``: the fading means follow."""
        for who, fading_s in FADING_S.items():
            part = elapsed_s / (elapsed_s + fading_s)
            known = self._means.get(who, value)
            self._means[who] = known + part * (value - known)

    def judge(self, said: Said, came: float) -> None:
        """What a forecast was about has come."""
        likely, interval = said.interval.likely, said.interval
        sign = 1.0 if likely > came else -1.0 if likely < came else 0.0
        for who, value in enumerate(said.asked):
            regret = sign * (likely - value)
            self._regrets[who] = KEEP * self._regrets[who] + regret
            self._variation[who] = KEEP**2 * self._variation[who] + regret**2
        shares = [
            max(0.0, regret) / variation
            for regret, variation in zip(self._regrets, self._variation, strict=True)
        ]
        total = sum(shares)
        self.weights = [share / total for share in shares] if total else list(_REACTIVE)
        self._fitted.learn(said.inputs, came)
        self._values.add(came)
        self._typical = self._values.quantile(0.5)
        if said.asked[MODEL] > 0:
            self._model_ratios.add(min(came / said.asked[MODEL], RATIO_MOST) / RATIO_UNIT)
            self._correction = self._model_ratios.quantile(0.5) * RATIO_UNIT
        if likely > 0:
            self._learn_interval(interval, came)
        self._error = KEEP * self._error + abs(likely - came)
        self._last_error = KEEP * self._last_error + abs(said.asked[LAST] - came)
        inside = interval.low <= came <= interval.high
        self._within = KEEP * self._within + (1.0 if inside else 0.0)
        self._count = KEEP * self._count + 1.0

    def judgement(self) -> Judgement:
        """How good the forecasts have been."""
        count = max(1.0, self._count)
        return Judgement(
            self._error / count, self._last_error / count, self._within / count, self._count
        )

    def _learn_interval(self, interval: Interval, came: float) -> None:
        self._ratios.add(min(came / interval.likely, RATIO_MOST) / RATIO_UNIT)
        self._low_level = _moved(self._low_level, came < interval.low)
        self._high_level = _moved(self._high_level, came > interval.high)
        low, high = self._ratios.quantiles((self._low_level, 1.0 - self._high_level))
        self._low, self._high = low * RATIO_UNIT, high * RATIO_UNIT


def _moved(level: float, missed: bool) -> float:
    moved = level + STEP * (EXCEEDED - (1.0 if missed else 0.0))
    return min(LEVEL_MOST, max(LEVEL_LEAST, moved))

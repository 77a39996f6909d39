"""Lengths and times of one kind: their distribution, and a bound that is rarely exceeded.

The bound is a quantile whose level follows how often it was exceeded: adaptive conformal
inference (Gibbs & Candes, *Adaptive Conformal Inference Under Distribution Shift*, NeurIPS
2021). Over time it is exceeded as often as it should be, whatever the distribution does.

What was seen rarely leans on what is known of all agents of the workflow.
"""

from __future__ import annotations

from coordinator.workflow.histogram import Histogram, bin_of, quantile_of, quantiles_of
from coordinator.workflow.prediction import Spread

HALF_LIFE = 300.0
"""Values after which one weighs half."""
EXCEEDED = 0.05
"""How often the upper bound is meant to be exceeded."""
STEP = 0.005
"""How far one value moves the bound's level."""
LEVEL_LEAST = 0.0005
LEVEL_MOST = 0.2
LEANING_SAMPLES = 20.0
"""Values from which on others of the workflow are not asked."""
LEANING_WEIGHT = 5.0
"""How many values of its own the others count as."""
_SHARES = (0.05, 0.5, 0.95)
GUESS = Spread(p05=1.0, p50=256.0, p95=4096.0, mean=800.0, upper=8192.0, samples=0.0)
"""Of a length in tokens nobody has seen any of."""
GUESS_S = Spread(p05=0.0, p50=5.0, p95=600.0, mean=60.0, upper=1800.0, samples=0.0)
"""Of a pause in seconds nobody has seen any of."""


class Lengths:
    """A distribution with its bound. ``scale``: what is counted as 1."""

    __slots__ = ("exceeded", "scale", "values")

    def __init__(self, scale: float = 1.0) -> None:
        self.values = Histogram(HALF_LIFE)
        self.exceeded = EXCEEDED
        self.scale = scale

    def upper(self, others: Lengths | None = None) -> float:
        """What one value in twenty is meant to exceed; 0 if nothing is known."""
        if others is None or self.values.samples >= LEANING_SAMPLES:
            return self.values.quantile(1.0 - self.exceeded) * self.scale
        bins, total = self._leaning(others)
        level = self.exceeded if self.values.samples else others.exceeded
        return quantile_of(bins, total, 1.0 - level) * self.scale

    def add(self, value: float, bound: float | None = None) -> None:
        """Count a value, and whether it exceeded the bound that was given for it, if any."""
        if bound is not None:
            self.exceeded = _moved(self.exceeded, value > bound)
        self.values.add(value / self.scale)

    def spread(self, others: Lengths | None = None, guess: Spread = GUESS) -> Spread:
        """The distribution in a few numbers."""
        bins, total = self._leaning(others)
        if not total:
            return guess
        level = self.exceeded if self.values.samples else (others or self).exceeded
        shares = (*_SHARES, 1.0 - level) if level <= EXCEEDED else (0.05, 0.5, 1.0 - level, 0.95)
        low, middle, *high = quantiles_of(bins, total, shares)
        p95, upper = high if level <= EXCEEDED else (high[1], high[0])
        mean = self.values.mean() if self.values.samples or others is None else others.values.mean()
        scale = self.scale
        return Spread(
            low * scale, middle * scale, p95 * scale, mean * scale, upper * scale,
            self.values.samples,
        )  # fmt: skip

    def mean(self) -> float:
        """The mean, 0 if nothing is known."""
        return self.values.mean() * self.scale

    def mean_square(self) -> float:
        """The mean of the squares, 0 if nothing is known."""
        return self.values.mean_square() * self.scale**2

    def quantile(self, share: float) -> float:
        """The value that this share of all is below; 0 if nothing is known."""
        return self.values.quantile(share) * self.scale

    def shares_around(self, value: float) -> tuple[float, float]:
        """The shares of all that are below what is counted as equal to a value, and up to it."""
        return self.values.shares_around(value / self.scale)

    def _leaning(self, others: Lengths | None) -> tuple[dict[int, float], float]:
        own, total = self.values.weights()
        if others is None or others is self or total >= LEANING_SAMPLES:
            return own, total
        theirs, their_total = others.values.weights()
        if not their_total:
            return own, total
        weight = min(LEANING_WEIGHT, their_total) / their_total
        merged = {at: value * weight for at, value in theirs.items()}
        for at, value in own.items():
            merged[at] = merged.get(at, 0.0) + value
        return merged, total + weight * their_total


def add_to_both(one: Lengths, other: Lengths, value: float, bound: float | None = None) -> None:
    """As ``add`` to two of the same scale, in less time."""
    place = bin_of(value / one.scale)
    if bound is not None:
        missed = value > bound
        one.exceeded = _moved(one.exceeded, missed)
        other.exceeded = _moved(other.exceeded, missed)
    one.values.add_to(place)
    other.values.add_to(place)


def _moved(level: float, missed: bool) -> float:
    moved = level + STEP * (EXCEEDED - (1.0 if missed else 0.0))
    return min(LEVEL_MOST, max(LEVEL_LEAST, moved))

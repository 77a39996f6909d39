"""Distributions as tables of quantiles: measured from samples, drawn from by inverse transform."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable
from math import expm1, log1p

import msgspec

PROBABILITIES = (
    *(0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    *(0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0),
)
"""Where the tables have their entries: dense at the top, where agents' tokens are."""


class Quantiles(msgspec.Struct, frozen=True, gc=False):
    """The values at ``PROBABILITIES``, none negative; at least one sample stood behind them."""

    values: tuple[float, ...]

    def at(self, probability: float) -> float:
        """The quantile; between entries on a logarithmic scale, as the tails are long."""
        high = min(bisect_right(PROBABILITIES, probability), len(PROBABILITIES) - 1)
        low = high - 1
        share = (probability - PROBABILITIES[low]) / (PROBABILITIES[high] - PROBABILITIES[low])
        below, above = log1p(self.values[low]), log1p(self.values[high])
        return expm1(below + (above - below) * share)

    def draw(self, rng: random.Random) -> float:
        """A value of this distribution."""
        return self.at(rng.random())

    def count(self, rng: random.Random, least: int = 0) -> int:
        """A whole number of this distribution, at least ``least``."""
        return max(least, round(self.draw(rng)))


def fitted(samples: Iterable[float]) -> Quantiles:
    """The table of some samples. There must be one, and none below 0."""
    ordered = sorted(samples)
    assert ordered, "nothing was measured"
    assert ordered[0] >= 0, ordered[0]
    return Quantiles(tuple(round(quantile(ordered, point), 3) for point in PROBABILITIES))


def quantile(ordered: list[float] | list[int], probability: float) -> float:
    """The quantile of samples in order, linear between neighbours; 0 for none."""
    if not ordered:
        return 0.0
    place = probability * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

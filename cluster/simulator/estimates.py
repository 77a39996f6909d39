"""What the same figure of several seeds says: a mean, and how far chance can have moved it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean over seeds, and half the width of its 95 % confidence interval.

    The half width is infinite for a single seed: nothing is known of chance then.
    """

    mean: float
    half: float
    seeds: int

    @property
    def settled(self) -> bool:
        """The interval does not contain 0."""
        return abs(self.mean) > self.half


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and interval by Student's t; ValueError without any value."""
    found = list(values)
    if not found:
        raise ValueError("no values")
    mean = math.fsum(found) / len(found)
    if len(found) == 1:
        return Estimate(mean, math.inf, 1)
    variance = math.fsum((value - mean) ** 2 for value in found) / (len(found) - 1)
    half = student_t(len(found) - 1) * math.sqrt(variance / len(found))
    return Estimate(mean, half, len(found))


def difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate | None:
    """By how much ``values`` are above ``reference``, by seeds that both have.

    Relative to the reference's mean, as seeds make both larger or smaller together; None
    without a common seed or where the reference is 0.
    """
    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        return None
    base = math.fsum(reference[seed] for seed in seeds) / len(seeds)
    if base == 0:
        return None
    found = estimate(values[seed] - reference[seed] for seed in seeds)
    return Estimate(found.mean / abs(base), found.half / abs(base), found.seeds)


_T_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


def student_t(freedom: int) -> float:
    """97.5 % of Student's t with ``freedom`` degrees are below this.

    From the usual table to 30 degrees, then by the first terms of the expansion 26.7.5 of
    Abramowitz and Stegun, which is right to 4 digits there.
    """
    if freedom <= len(_T_975):
        return _T_975[freedom - 1]
    x = 1.959964
    first = (x**3 + x) / 4
    second = (5 * x**5 + 16 * x**3 + 3 * x) / 96
    return x + first / freedom + second / freedom**2

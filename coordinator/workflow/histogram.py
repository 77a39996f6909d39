"""A distribution of positive numbers, learned one by one, in which old ones fade.

Values are counted in bins that grow by a constant factor, so a quantile is right to a few
percent whatever the scale and the memory is bounded by the scale's logarithm. Fading is
forward decay (Cormode et al., *Forward Decay: A Practical Time Decay Model for Streaming
Systems*, ICDE 2009): a new value weighs a little more than the one before it, which is cheaper
than making all others lighter.
"""

from __future__ import annotations

from math import floor, log2

BINS_PER_OCTAVE = 8
"""Bins are 9 % wide."""

LARGEST = 2.0**40
WEIGHT_MOST = 2.0**64
NEGLIGIBLE = 2.0**-10
"""Bins that weigh less than this, where a new value weighs 1, are forgotten."""


class Histogram:
    """Weights of bins. ``half_life`` is the number of values after which one weighs half."""

    __slots__ = ("_bins", "_growth", "_order", "_total", "_weight")

    def __init__(self, half_life: float) -> None:
        self._growth = 2.0 ** (1.0 / half_life)
        self._bins: dict[int, float] = {}
        self._order: list[int] | None = None
        """The bins in ascending order; None after one was added or taken away."""
        self._weight = 1.0
        self._total = 0.0

    @property
    def samples(self) -> float:
        """How many values there are, each counted by what has not faded of it."""
        return self._total / self._weight

    def add(self, value: float) -> None:
        """Count a value. Negative ones are 0."""
        self.add_to(bin_of(value))

    def add_to(self, place: int) -> None:
        """Count a value of this bin."""
        weight = self._weight = self._weight * self._growth
        bins = self._bins
        if place in bins:
            bins[place] += weight
        else:
            bins[place] = weight
            self._order = None
        self._total += weight
        if weight > WEIGHT_MOST:
            self._rescale()

    def correct(self, value: float, other: float) -> None:
        """A value counted lately turned out to be another one."""
        place = bin_of(value)
        moved = min(self._weight, self._bins.get(place, 0.0))
        if moved:
            self._bins[place] -= moved
            if not self._bins[place]:
                del self._bins[place]
            self._bins[bin_of(other)] = self._bins.get(bin_of(other), 0.0) + moved
            self._order = None

    def quantile(self, share: float) -> float:
        """The value that this share of all is below; 0 if there are none."""
        if share > 0.5:
            return _from_above(self._bins, self._in_order(), self._total, share)
        return quantiles_of(self._bins, self._total, (share,))[0]

    def quantiles(self, shares: tuple[float, ...]) -> list[float]:
        """Several of them, for ascending shares, in one pass."""
        return quantiles_of(self._bins, self._total, shares)

    def shares_around(self, value: float) -> tuple[float, float]:
        """The shares of all that are below a value's bin, and below its end; 0 to 1 if none."""
        if not self._total:
            return 0.0, 1.0
        place = bin_of(value)
        below = 0.0
        for at, weight in self._bins.items():
            if at < place:
                below += weight
        below /= self._total
        return below, below + self._bins.get(place, 0.0) / self._total

    def mean(self) -> float:
        """The mean, 0 if there are none; each value counted as the middle of its bin."""
        if not self._total:
            return 0.0
        return sum(weight * middle_of(at) for at, weight in self._bins.items()) / self._total

    def mean_square(self) -> float:
        """The mean of the squares, in the same way."""
        if not self._total:
            return 0.0
        squares = (weight * middle_of(at) ** 2 for at, weight in self._bins.items())
        return sum(squares) / self._total

    def weights(self) -> tuple[dict[int, float], float]:
        """The bins and their sum, both in units of a new value's weight."""
        scale = 1.0 / self._weight
        return {at: weight * scale for at, weight in self._bins.items()}, self._total * scale

    def restore(self, bins: dict[int, float]) -> None:
        """Take over weights as ``weights`` gives them, in place of what was there."""
        self._bins = {at: weight for at, weight in bins.items() if weight > 0}
        self._order = None
        self._total = sum(self._bins.values())
        self._weight = 1.0

    def _in_order(self) -> list[int]:
        if self._order is None:
            self._order = sorted(self._bins)
        return self._order

    def _rescale(self) -> None:
        bins, _ = self.weights()
        self.restore({at: weight for at, weight in bins.items() if weight > NEGLIGIBLE})


def bin_of(value: float) -> int:
    """The bin a value is counted in; all from 0 to below 1 are in bin 0."""
    if value < 1.0:
        return 0
    return 1 + floor(BINS_PER_OCTAVE * log2(min(value, LARGEST)))


def edges_of(place: int) -> tuple[float, float]:
    """Where a bin begins and ends."""
    if place <= 0:
        return 0.0, 1.0
    return 2.0 ** ((place - 1) / BINS_PER_OCTAVE), 2.0 ** (place / BINS_PER_OCTAVE)


def middle_of(place: int) -> float:
    """The middle of a bin."""
    least, most = edges_of(place)
    return 0.5 * (least + most)


def quantile_of(bins: dict[int, float], total: float, share: float) -> float:
    """The value that a share of all weights is below; 0 if there are none."""
    if share > 0.5:
        return _from_above(bins, sorted(bins), total, share)
    return quantiles_of(bins, total, (share,))[0]


def quantiles_of(bins: dict[int, float], total: float, shares: tuple[float, ...]) -> list[float]:
    """The values that ascending shares of all weights are below; zeros if there are none."""
    if not bins:
        return [0.0] * len(shares)
    found: list[float] = []
    places = sorted(bins)
    at, below, weight = 0, 0.0, bins[places[0]]
    for share in shares:
        wanted = min(1.0, max(0.0, share)) * total
        while below + weight < wanted and at + 1 < len(places):
            below += weight
            at += 1
            weight = bins[places[at]]
        least, most = edges_of(places[at])
        found.append(least + (most - least) * min(1.0, max(0.0, (wanted - below) / weight)))
    return found


def _from_above(bins: dict[int, float], order: list[int], total: float, share: float) -> float:
    """The same for a large share: what is above it is in few bins. ``order``: the bins', rising."""
    wanted = (1.0 - min(1.0, share)) * total
    above = 0.0
    for place in reversed(order):
        weight = bins[place]
        if above + weight >= wanted:
            least, most = edges_of(place)
            return most - (most - least) * min(1.0, max(0.0, (wanted - above) / weight))
        above += weight
    return edges_of(order[0])[0] if order else 0.0

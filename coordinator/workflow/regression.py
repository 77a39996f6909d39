"""A number as a fixed mixture of others, fitted as one goes: fading least squares.

What a mean that fades can't say: that much now means little next (a group of runs has begun
together, and its prompts are through), or that the model is right but late. Sums of products
fade, a small ridge keeps the solution finite where inputs move together, and is all there is
before anything is known.
"""

from __future__ import annotations

import numpy as np

from coordinator.workflow.chain import Floats

KEEP = 0.9985
"""What sums keep of their weight at each step: 460 steps halve it."""
RIDGE = 0.3
"""In steps: so many would have to say that all weights are 0."""
MOST = 100.0
"""Times the mean of what came: more counts as so much. Squares of larger ones would leave nothing
of the ridge."""


class Regression:
    """Of one number on ``inputs`` others and a constant; none of them is below 0."""

    def __init__(self, inputs: int) -> None:
        self._products: Floats = np.zeros((inputs + 1, inputs + 1))
        self._sums: Floats = np.zeros(inputs + 1)
        self._scale = self._count = 0.0
        self._weights: Floats = np.zeros(inputs + 1)

    def say(self, inputs: tuple[float, ...]) -> float:
        """What is expected with such inputs; not below 0."""
        if not self._count:
            return 0.0
        return max(0.0, float(self._row(inputs) @ self._weights) * self._unit)

    def learn(self, inputs: tuple[float, ...], came: float) -> None:
        """It came to so much."""
        self._scale = KEEP * self._scale + abs(came)
        self._count = KEEP * self._count + 1.0
        row = self._row(inputs)
        self._products = KEEP * self._products + np.outer(row, row)
        self._sums = KEEP * self._sums + row * min(MOST, came / self._unit)
        ridge = RIDGE * np.eye(len(row))
        self._weights = np.linalg.solve(self._products + ridge, self._sums)

    @property
    def _unit(self) -> float:
        """What came on average: the ridge is to mean the same for all numbers."""
        return self._scale / self._count or 1.0

    def _row(self, inputs: tuple[float, ...]) -> Floats:
        return np.clip(np.array((self._unit, *inputs)) / self._unit, 0.0, MOST)

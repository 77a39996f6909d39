"""How fast the cluster's engines are, learned from what calls have taken.

Two laws, both linear, whose coefficients nobody has to know beforehand:

    prefill_s = start + token * new + pair * new * (cached + new / 2)
    step_s    = start + sequence * batch + context * tokens of the batch

Each is fitted to what was seen lately by non-negative least squares, in relative errors, with
old values fading. Directions in which nothing was seen yet lean on a guess, scaled as a whole to
what was seen: one prompt tells a GPU from a CPU. What a value says is bounded by what was
expected, so that a hang or a warm-up moves a law little.

Pure: no clock, no I/O. Constant memory. Coefficients are always finite and positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, isfinite, log

KEEP = 0.99
"""What is left of a value's weight at the next one: some hundred values count."""
LEANING = 0.5
"""How many values the guess counts as."""
SURPRISE = 4.0
"""A value counts as at most so many times what was expected, and at least its inverse."""
TRUSTED_AFTER = 4
"""Values after which surprises are bounded: the guess itself can be wrong by any factor."""
PASSES = 3
LEAST_SHARE = 1e-3
"""A coefficient never falls below this share of its scaled guess."""

PREFILL_GUESS = (5e-3, 5e-5, 1.5e-9)
"""Seconds per prompt, per new token, per pair of new and earlier token: a GPU, an 8B model."""
STEP_GUESS = (6e-3, 5e-5, 4e-8)
"""Seconds per step, per sequence, per token of context."""


class Law:
    """seconds = coefficients * parts, learned. ``guess``: coefficients before anything is known,
    all positive; only their ratios matter after the first value."""

    __slots__ = ("_moments", "_scale_sum", "_scale_weight", "_targets", "coefficients", "guess")

    def __init__(self, guess: Sequence[float]) -> None:
        assert all(each > 0.0 for each in guess)
        self.guess = tuple(guess)
        self.coefficients = list(guess)
        size = len(self.guess)
        self._moments = [[0.0] * size for _ in range(size)]
        self._targets = [0.0] * size
        self._scale_sum = self._scale_weight = 0.0

    @property
    def samples(self) -> float:
        """How many values it rests on, each counted by what has not faded of it."""
        return self._scale_weight

    def seconds(self, parts: Sequence[float]) -> float:
        """What these parts take."""
        return sum(map(_times, self.coefficients, parts))

    def learn(self, parts: Sequence[float], seconds: float) -> None:
        """These parts took so long. What cannot be true is ignored."""
        if not (seconds > 0.0 and isfinite(seconds)):
            return
        if not all(part >= 0.0 and isfinite(part) for part in parts):
            return
        guessed = sum(map(_times, self.guess, parts))
        if guessed <= 0.0:
            return
        if self._scale_weight >= TRUSTED_AFTER:
            expected = self.seconds(parts)
            seconds = min(SURPRISE * expected, max(expected / SURPRISE, seconds))
        self._scale_sum = KEEP * self._scale_sum + log(seconds / guessed)
        self._scale_weight = KEEP * self._scale_weight + 1.0
        scale = exp(self._scale_sum / self._scale_weight)
        weight = 1.0 / (scale * guessed) ** 2
        for row, mine in enumerate(parts):
            moments = self._moments[row]
            for column, other in enumerate(parts):
                moments[column] = KEEP * moments[column] + weight * mine * other
            self._targets[row] = KEEP * self._targets[row] + weight * mine * seconds
        self._solve(scale)

    def _solve(self, scale: float) -> None:
        """Some rounds of coordinate descent from where it stood."""
        found = self.coefficients
        for _ in range(PASSES):
            for at, guess in enumerate(self.guess):
                centre = scale * guess
                lean = LEANING / centre**2
                moments = self._moments[at]
                rest = sum(map(_times, moments, found)) - moments[at] * found[at]
                best = (self._targets[at] + lean * centre - rest) / (moments[at] + lean)
                found[at] = max(LEAST_SHARE * centre, best)


def _times(one: float, other: float) -> float:
    return one * other


class Speeds:
    """Both laws of a cluster of equal engines."""

    __slots__ = ("prefill", "step")

    def __init__(
        self,
        prefill_guess: Sequence[float] = PREFILL_GUESS,
        step_guess: Sequence[float] = STEP_GUESS,
    ) -> None:
        self.prefill = Law(prefill_guess)
        self.step = Law(step_guess)

    def prefill_s(self, new_tokens: float, cached_tokens: float = 0.0) -> float:
        """To compute so many tokens of a prompt behind so many that are there."""
        start, token, pair = self.prefill.coefficients
        return start + new_tokens * (token + pair * (cached_tokens + 0.5 * new_tokens))

    def step_s(self, batch: float, context_tokens: float) -> float:
        """A token for each of ``batch`` sequences that hold ``context_tokens`` together."""
        start, sequence, token = self.step.coefficients
        return start + sequence * batch + token * context_tokens

    def prefilled(self, prompts: int, new_tokens: float, pairs: float, seconds: float) -> None:
        """Prompts that were computed together, or one after the other, took so long."""
        self.prefill.learn((float(min(1, prompts)), new_tokens, pairs), seconds)

    def stepped(self, batch: float, context_tokens: float, seconds: float) -> None:
        """A step took so long, in the mean of some with this mean batch."""
        self.step.learn((1.0, batch, context_tokens), seconds)

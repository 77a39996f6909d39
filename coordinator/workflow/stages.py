"""How far runs have got, in a few stages, and how much sooner they end in each.

In a Markov chain a run that loops is as likely to end after its second round as after its
twelfth. Real loops are not: some make about the same number of calls in every run, some that
have gone on for long go on for longer. So a run goes through stages, in each of which it ends as
often as runs did that had made so many calls: a phase-type distribution (Neuts, *Matrix-Geometric
Solutions in Stochastic Models*, ch. 2). In which stage it is now is known.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from coordinator.workflow.histogram import Histogram, middle_of

STAGES_MOST = 4
SAMPLES_LEAST = 12.0
"""Runs that must have ended before their numbers of calls are believed."""
CALLS_LEAST = 2.0
"""Calls of a run that a stage has on average, at least."""
PROBABLE_LEAST = 1e-4
POINTS = 1024


class Stage(NamedTuple):
    """Runs from ``calls`` calls on. ``odds``: by what the odds that a call is the last are
    multiplied; ``onward``: the share of the others after which the next stage begins."""

    calls: float
    odds: float
    onward: float


ONLY = [Stage(0.0, 1.0, 0.0)]


def stages_of(run_calls: Histogram, most: int) -> list[Stage]:
    """At most so many stages, of which each sees as many calls as any other.

    ``run_calls``: how many calls runs made.
    """
    bins, total = run_calls.weights()
    if total < SAMPLES_LEAST:
        return ONLY
    places = sorted(bins)
    numbers = np.array([max(1.0, float(round(middle_of(place)))) for place in places])
    below = np.concatenate([[0.0], np.cumsum([bins[place] for place in places])]) / total
    # A call is in the middle of its own place: the first between none and one call.
    step = numbers[-1] / POINTS
    at = (np.arange(POINTS) + 0.5) * step
    alive = 1.0 - below[np.searchsorted(numbers, at, side="right")]
    passed = np.cumsum(alive) * step
    mean = float(passed[-1])
    count = min(most, int(mean / CALLS_LEAST))
    if count < 2:
        return ONLY
    begins = [0, *(int(np.searchsorted(passed, mean * at / count)) for at in range(1, count))]
    begin_alive = [*alive[begins].tolist(), 0.0]
    calls = mean / count
    found: list[Stage] = []
    for number, first in enumerate(begins):
        ended = begin_alive[number] - begin_alive[number + 1]
        last = min(max(ended / calls, PROBABLE_LEAST), 1.0 - PROBABLE_LEAST)
        odds = last / (1.0 - last) * (mean - 1.0)
        onward = min(1.0, begin_alive[number + 1] / max(calls - ended, PROBABLE_LEAST))
        found.append(Stage(float(at[first]) + 0.5 if number else 0.0, odds, onward))
    return found

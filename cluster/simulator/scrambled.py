"""Predictions that are wrong at random, to see what they cost whoever acts on them.

What is learned is learned as always. What is said of it is not true: numbers are up to
``FACTOR`` times too large or too small, the next agents are others of the same workflow, in any
order and as probable as chance has it. All is drawn from the seed and from what is asked, so
that one question has one answer for a while, as true predictions have.
"""

from __future__ import annotations

import random

from msgspec.structs import replace

from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.prediction import Kept, NextCall, Prediction, RunKey, Spread
from coordinator.workflow.profiles import Profiles

FACTOR = 10.0
LASTS_S = 30.0
"""How long a wrong prediction of a run stays the same."""


class Scrambled(Profiles):
    """Profiles that say what is not so."""

    def __init__(self, limits: WorkflowLimits, seed: int) -> None:
        super().__init__(limits)
        self._seed = seed

    def predict(self, key: RunKey, now_s: float) -> Prediction:
        """As if it knew what the run does next."""
        found = super().predict(key, now_s)
        view = self.view(key.tenant, key.workflow) if found.next else None
        if view is None:
            return found
        rng = self._rng("predict", *key, found.after, int(now_s / LASTS_S))
        agents = [agent.name for agent in view.agents]
        following = [_next(rng, each, rng.choice(agents)) for each in found.next]
        rng.shuffle(following)
        return replace(
            found,
            known=True,
            next=following,
            end_probability=rng.random(),
            calls_left=found.calls_left * _factor(rng),
            output_tokens_left=found.output_tokens_left * _factor(rng),
        )

    def output_tokens(self, key: RunKey, agent: str) -> Spread:
        """Wrong by the same factor throughout."""
        rng = self._rng("output", *key, agent)
        return _times(super().output_tokens(key, agent), _factor(rng))

    def mean_output_tokens(self, tenant: str, workflow: str, agent: str) -> float:
        """Another wrong one for each value that the true one takes."""
        tokens = super().mean_output_tokens(tenant, workflow, agent)
        return tokens * _factor(self._rng("mean", tenant, workflow, agent, int(tokens)))

    def _rng(self, *asked: object) -> random.Random:
        return random.Random("/".join(map(str, (self._seed, *asked))))


def _factor(rng: random.Random) -> float:
    return float(FACTOR ** rng.uniform(-1.0, 1.0))


def _times(spread: Spread, factor: float) -> Spread:
    return Spread(
        p05=spread.p05 * factor,
        p50=spread.p50 * factor,
        p95=spread.p95 * factor,
        mean=spread.mean * factor,
        upper=spread.upper * factor,
        samples=spread.samples,
    )


def _next(rng: random.Random, true: NextCall, agent: str) -> NextCall:
    return NextCall(
        agent=agent,
        probability=rng.random(),
        calls=true.calls,
        gap_s=_times(true.gap_s, _factor(rng)),
        prompt_tokens=_times(true.prompt_tokens, _factor(rng)),
        new_tokens=_times(true.new_tokens, _factor(rng)),
        output_tokens=_times(true.output_tokens, _factor(rng)),
        kept=[Kept(each.origin, rng.random(), rng.random(), rng.random()) for each in true.kept],
    )

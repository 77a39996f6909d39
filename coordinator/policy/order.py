"""In which order waiting calls are served, as sort keys.

What a run has still to do is what makes its calls wait: shortest remaining first keeps the mean
time of runs least (Schrage 1968), and what is predicted of runs stands for what nobody knows. A
key is a time: when the call came, and up to ``aging_s`` more the longer its run still is, so that
it never changes while the call waits, nobody waits for what came ``aging_s`` after it, and no
sweep is needed to let calls age. A deadline is the same with the other sign: a key is never
later than the last moment to begin in time.

Before all that: calls that had a plan and lost it, then explicit priority, then what is fair to
tenants (``fair_queue``). Pure functions.
"""

from __future__ import annotations

from typing import NamedTuple

from coordinator.speeds import Speeds
from coordinator.workflow.ahead import Ahead

Rank = tuple[bool, int, float, int]
"""Lower is earlier: had no plan yet, explicit priority, key in seconds, arrival."""


class Effort(NamedTuple):
    """What is left to do, in seconds of one worker. ``own_s``: for a call; ``after_s``: of what
    it leads to; ``beside_s``: of what else of its run is under way. ``known``: whether its run
    says what follows, or it is taken as any."""

    own_s: float
    after_s: float
    beside_s: float
    known: bool

    @property
    def left_s(self) -> float:
        """Until the run is over."""
        return self.own_s + self.after_s + self.beside_s


def own_s(speeds: Speeds, new_tokens: float, prompt_tokens: float, output_tokens: float) -> float:
    """What a call takes of a worker's time: its prompt, and by how much it makes steps longer."""
    cached_tokens = max(0.0, prompt_tokens - new_tokens)
    _, sequence_s, context_s = speeds.step.coefficients
    context_tokens = prompt_tokens + 0.5 * output_tokens
    step_s = sequence_s + context_s * context_tokens
    return speeds.prefill_s(new_tokens, cached_tokens) + output_tokens * step_s


def after_s(speeds: Speeds, ahead: Ahead) -> float:
    """The same of all calls that follow."""
    _, token_s, pair_s = speeds.prefill.coefficients
    _, sequence_s, context_s = speeds.step.coefficients
    prefill_s = ahead.prefill_tokens * token_s + ahead.pairs * pair_s
    return prefill_s + ahead.output_tokens * sequence_s + ahead.contexts * context_s


def key_s(
    at_s: float, left_s: float, typical_s: float, aging_s: float, deadline_s: float | None
) -> float:
    """When a call that came ``at_s`` is due, as others see it.

    ``left_s``: of its run, at ``typical_s`` it is half of ``aging_s`` later than it came;
    ``deadline_s``: when the call has to be over, if that was said.
    """
    due_s = at_s + aging_s * left_s / (left_s + typical_s) if left_s > 0.0 else at_s
    return due_s if deadline_s is None else min(due_s, deadline_s - left_s)

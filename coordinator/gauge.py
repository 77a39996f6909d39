"""What a worker has to do, in seconds and tokens, and how much of it is done.

Kept for every worker by whoever plans calls. Prompts are taken to be computed one after the
other, as they come; sums over time say what batch a call was decoded in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp
from typing import NamedTuple

FADING_S = 30.0
"""How long what a worker has computed counts for what it will."""
BUSY_LEAST_S = 0.1
"""Of work lately, from which on it says how fast a worker is."""
TOGETHER_S = 2e-3
"""Prompts that end within this time were computed in one step."""


class Prompt(NamedTuple):
    """One that a worker has yet to compute."""

    seconds: float
    planned_s: float
    new_tokens: int
    cached_tokens: int
    pulled: bool = False
    """Some of it comes from elsewhere first, which takes its own time."""


class Computed(NamedTuple):
    """Prompts that ended together, and what they took."""

    prompts: int
    new_tokens: float
    pairs: float
    seconds: float


NOTHING = Computed(0, 0.0, 0.0, 0.0)


class Decoded(NamedTuple):
    """How long a call was decoded; in the mean with how many, itself included, that had so many
    tokens together; and for how long prompts were computed meanwhile."""

    seconds: float
    batch: float
    context_tokens: float
    prefilling_s: float


class Mark(NamedTuple):
    """How the sums over time stood when a call began to decode."""

    at_s: float
    batch: float
    context: float
    prefilled_s: float
    context_tokens: float


@dataclass(slots=True, eq=False)
class Gauge:
    """One worker's. Tokens of a call: its prompt and half of what it is expected to generate."""

    backlog_s: float = 0.0
    """What its prompts take, those under way as a whole."""
    context_tokens: float = 0.0
    """Of all calls that are planned onto it to be decoded."""
    left_tokens: float = 0.0
    """What these are expected to generate."""
    decoding: int = 0
    """How many of them have a token."""
    decoding_tokens: float = 0.0
    """Of those that have one."""
    prompts: dict[object, Prompt] = field(default_factory=dict)
    """What it has yet to compute, in the order of planning."""
    _since_s: float = float("-inf")
    """When the last of its prompts ended."""
    _clock_s: float = 0.0
    _batch: float = 0.0
    _context: float = 0.0
    _prefilled_s: float = 0.0
    _together: Computed = NOTHING
    _busy_s: float = 0.0
    """Of prompts computed lately, fading, what they took; ``_came``: how many."""
    _came: float = 0.0
    _busy_at_s: float = 0.0
    _tokens: float = 0.0
    """Of the same prompts, those that were computed."""
    queued_tokens_total: int = 0
    """Prompt tokens that it was given to compute, ever."""

    @property
    def tokens_per_busy_s(self) -> float:
        """Prompt tokens that it lately computed in a second of doing so; 0 if it did not."""
        return self._tokens / self._busy_s if self._busy_s > BUSY_LEAST_S else 0.0

    @property
    def tokens_per_prompt(self) -> float:
        """Of those prompts; 0 if there were none."""
        return self._tokens / self._came if self._busy_s > BUSY_LEAST_S else 0.0

    def reading(self, now_s: float) -> tuple[float, float, float]:
        """How long until what it has to compute by now is computed; which share of its time it
        has spent on prompts lately; how many of them a second."""
        self._fade(now_s)
        waiting_s = 0.0
        if self.prompts:
            first = next(iter(self.prompts.values()))
            began_s = max(self._since_s, first.planned_s)
            waiting_s = self.backlog_s - min(first.seconds, max(0.0, now_s - began_s))
        return waiting_s, self._busy_s / FADING_S, self._came / FADING_S

    # --- prompts --------------------------------------------------------------------------

    def queue(self, key: object, prompt: Prompt) -> None:
        """It has a prompt more to compute."""
        self.prompts[key] = prompt
        self.queued_tokens_total += prompt.new_tokens
        self.backlog_s += prompt.seconds

    def drop(self, key: object) -> Prompt | None:
        """It has not to compute this one any more."""
        prompt = self.prompts.pop(key, None)
        if prompt is not None:
            # Sums of floats drift: without prompts there is nothing.
            self.backlog_s = max(0.0, self.backlog_s - prompt.seconds) if self.prompts else 0.0
        return prompt

    def computed(self, key: object, now_s: float) -> Computed | None:
        """It has computed this one. What earlier ones took is known now, if this ends a group."""
        prompt = self.drop(key)
        if prompt is None:
            return None
        took_s = now_s - max(self._since_s, prompt.planned_s)
        self._since_s = now_s
        self._prefilled_s += prompt.seconds
        self._fade(now_s)
        self._busy_s += prompt.seconds
        self._came += 1.0
        self._tokens += prompt.new_tokens
        pairs = prompt.new_tokens * (prompt.cached_tokens + 0.5 * prompt.new_tokens)
        before = self._together
        if prompt.pulled:
            # What that took says nothing of computing.
            self._together = NOTHING
            return before if before.prompts else None
        if took_s <= TOGETHER_S and before.prompts:
            self._together = Computed(
                before.prompts + 1,
                before.new_tokens + prompt.new_tokens,
                before.pairs + pairs,
                before.seconds + took_s,
            )
            return None
        self._together = Computed(1, prompt.new_tokens, pairs, took_s)
        return before if before.prompts else None

    # --- decoding -------------------------------------------------------------------------

    def plan(self, context_tokens: float, output_tokens: float) -> None:
        """It is to decode a call more."""
        self.context_tokens += context_tokens
        self.left_tokens += output_tokens

    def unplan(self, context_tokens: float, output_tokens: float, last: bool) -> None:
        """It does not decode a call any more; ``last``: nor any other."""
        self.context_tokens = 0.0 if last else max(0.0, self.context_tokens - context_tokens)
        self.left_tokens = 0.0 if last else max(0.0, self.left_tokens - output_tokens)

    def begin(self, context_tokens: float, now_s: float) -> Mark:
        """A call has its first token."""
        self._advance(now_s)
        self.decoding += 1
        self.decoding_tokens += context_tokens
        return Mark(now_s, self._batch, self._context, self._prefilled_s, context_tokens)

    def end(self, mark: Mark, now_s: float) -> Decoded:
        """A call has its last token, or is decoded here no more."""
        self._advance(now_s)
        self.decoding -= 1
        left = self.decoding_tokens - mark.context_tokens
        self.decoding_tokens = max(0.0, left) if self.decoding else 0.0
        took_s = now_s - mark.at_s
        if took_s <= 0.0:
            return Decoded(0.0, 1.0, mark.context_tokens, 0.0)
        return Decoded(
            took_s,
            (self._batch - mark.batch) / took_s,
            (self._context - mark.context) / took_s,
            self._prefilled_s - mark.prefilled_s,
        )

    def _advance(self, now_s: float) -> None:
        passed_s = max(0.0, now_s - self._clock_s)
        self._clock_s = max(now_s, self._clock_s)
        self._batch += self.decoding * passed_s
        self._context += self.decoding_tokens * passed_s

    def _fade(self, now_s: float) -> None:
        if now_s > self._busy_at_s:
            keep = exp((self._busy_at_s - now_s) / FADING_S)
            self._busy_s *= keep
            self._came *= keep
            self._tokens *= keep
            self._busy_at_s = now_s

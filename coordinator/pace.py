"""What calls take, told to gauges and speeds; and how long answers are expected to get.

Whoever moves calls on says so here. Nothing is decided.
"""

from __future__ import annotations

from coordinator.gauge import Prompt
from coordinator.protocol import Finished
from coordinator.speeds import Speeds
from coordinator.state import Call, Worker
from coordinator.workflow.learner import Learner

KEEP = 0.98
"""What is left of a call's weight at the next one, for what is typical."""
OUTPUT_GUESS = 256.0
REUSE_GUESS = 0.3
DECODED_LEAST = 8
"""Tokens from which on a call says how long a step takes."""
SLOWED_MOST = 8.0
"""A decode is taken to have been slowed by prompts at most so many times."""
DECODES_SHARE_MOST = 0.75
"""Of a step with a prompt, what is taken to have been the decodes' at most."""


class Pace:
    """Of all calls of a core."""

    def __init__(self, learner: Learner, speeds: Speeds | None = None) -> None:
        self.speeds = speeds or Speeds()
        self.output_tokens = OUTPUT_GUESS
        """Of a typical answer."""
        self.reuse = REUSE_GUESS
        """Which share of prompts has been found in caches lately."""
        self._learner = learner

    def expected_tokens(self, call: Call) -> float:
        """How many tokens a call is expected to generate, its limit at most."""
        context = call.submit.context
        tokens = 0.0
        if context.workflow or context.run or context.agent:
            tokens = self._learner.profiles.mean_output_tokens(
                context.tenant, context.workflow, context.agent
            )
        return min(float(call.output_tokens), max(1.0, tokens or self.output_tokens))

    # --- what happens to a call, in this order ------------------------------------------

    def planned(self, call: Call, now_s: float) -> None:
        """It has a plan: somebody has its prompt to compute, somebody will decode it."""
        assert call.decode is not None
        assert call.computing is not None
        call.decoded = None
        call.expected_tokens = self.expected_tokens(call)
        call.context_tokens = call.prompt_tokens + 0.5 * call.expected_tokens
        call.decode.gauge.plan(call.context_tokens, call.expected_tokens)
        cached_tokens = call.prompt_tokens - call.uncached_tokens
        seconds = self.speeds.prefill_s(call.uncached_tokens, cached_tokens)
        pulled = call.pull_tokens > 0 or call.loaded_blocks > 0
        prompt = Prompt(seconds, now_s, call.uncached_tokens, cached_tokens, pulled)
        call.computing.gauge.queue(call.key, prompt)

    def grown(self, call: Call, now_s: float) -> None:
        """More of its prompt has to be computed than was planned."""
        assert call.computing is not None
        cached_tokens = call.prompt_tokens - call.uncached_tokens
        seconds = self.speeds.prefill_s(call.uncached_tokens, cached_tokens)
        prompt = Prompt(seconds, now_s, call.uncached_tokens, cached_tokens, pulled=True)
        call.computing.gauge.drop(call.key)
        call.computing.gauge.queue(call.key, prompt)

    def computed(self, call: Call, now_s: float) -> None:
        """Its prompt is computed."""
        assert call.computing is not None
        gauge = call.computing.gauge
        batch, tokens = gauge.decoding, gauge.decoding_tokens
        found = gauge.computed(call.key, now_s)
        if found is not None:
            # What decodes in the same steps took is not the prompt's.
            others_s = self.speeds.step_s(batch, tokens) if batch else 0.0
            least_s = (1.0 - DECODES_SHARE_MOST) * found.seconds
            seconds = max(least_s, found.seconds - others_s)
            self.speeds.prefilled(found.prompts, found.new_tokens, found.pairs, seconds)

    def not_computed(self, call: Call) -> None:
        """Nobody has to compute its prompt any more, though nobody has."""
        assert call.computing is not None
        call.computing.gauge.drop(call.key)

    def started(self, call: Call, now_s: float) -> None:
        """It has its first token."""
        if call.decode is not None and call.mark is None:
            call.mark = call.decode.gauge.begin(call.context_tokens, now_s)

    def released(self, call: Call, worker: Worker, now_s: float) -> None:
        """``worker`` does not decode it any more."""
        gauge = worker.gauge
        last = not worker.decodes
        gauge.unplan(call.context_tokens, call.expected_tokens, last)
        if call.mark is not None:
            call.decoded = gauge.end(call.mark, now_s)
            call.mark = None

    def finished(self, call: Call, message: Finished) -> None:
        """It is over and what it took is known; its worker has been released."""
        self.output_tokens += (1.0 - KEEP) * (max(0, message.output_tokens) - self.output_tokens)
        found_tokens = max(message.local_cached_tokens, message.prefill_cached_tokens)
        share = min(1.0, max(0.0, found_tokens / call.submit.prompt_tokens))
        self.reuse += (1.0 - KEEP) * (share - self.reuse)
        if call.decoded is None:
            return
        took_s, batch, context_tokens, prefilling_s = call.decoded
        steps = message.output_tokens - call.generated_tokens - 1
        if steps >= DECODED_LEAST:
            step_s = max(took_s / SLOWED_MOST, took_s - prefilling_s) / steps
            self.speeds.stepped(batch, context_tokens, step_s)

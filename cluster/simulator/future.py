"""Demand of a replay as it will be: what an oracle of the mix knows.

Every call's sizes, pauses and arrival are known. When each comes depends on how fast those before
it are served; that is reckoned with one rate for prompts and one for answers, as a cluster that
keeps its promises would serve them. So the oracle knows the future of a cluster that is well: one
that falls behind lags what it says.

It decides as ``policy.rebalance`` does, only with this in place of forecasts.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

from cluster.simulator.setup import ClusterSetup
from cluster.workload.chains import Chains
from cluster.workload.form import Run, Workload
from coordinator.policy.rebalance import Need
from coordinator.protocol import BLOCK_HASH_BYTES
from coordinator.workflow.blend import Interval

WAITS_S = 0.3
"""Until a prompt's turn comes."""
GRID_S = 1.0
STEP_SHARE = 0.7
"""Of the promised time between tokens, what is taken on a cluster that keeps it."""


class KnownFuture:
    """The demand of one replay; ``begin`` says when that begins, in the core's time."""

    def __init__(self, workload: Workload, setup: ClusterSetup) -> None:
        self._began_s = 0.0
        cost, chunk = setup.cost(), setup.options.max_num_batched_tokens
        self._token_s = cost.prefill_s(chunk, 0, chunk) / chunk
        self._step_s = STEP_SHARE * setup.placement.rebalance.itl_s
        self._prefills: list[tuple[float, int]] = []
        self._decodes: list[tuple[float, float, int, int]] = []
        """From, to, tokens, context at the end."""
        chains = Chains(workload.block_tokens, setup.options.block_size)
        seen: dict[str, set[bytes]] = {}
        for run in workload.runs:
            self._follow(run, chains, seen.setdefault(run.scope, set()), setup.options.block_size)
            chains.forget(run.id)
        self._sum()

    def begin(self, now_s: float) -> None:
        """The replay begins."""
        self._began_s = now_s

    def need(self, horizon_s: float, now_s: float) -> Need:
        """From now to ``horizon_s`` ahead."""
        from_s = now_s - self._began_s
        to_s = from_s + horizon_s
        first, last = bisect_left(self._times, from_s), bisect_left(self._times, to_s)
        prefill = (self._prefilled[last] - self._prefilled[first]) / horizon_s
        low, high = (min(max(0, int(at / GRID_S)), len(self._rates) - 1) for at in (from_s, to_s))
        span = slice(low, max(low + 1, high))
        rates = self._rates[span]
        return Need(
            _known(prefill),
            _known(sum(rates) / len(rates)),
            _known(max(self._held[span])),
            ["known"] * 3,
        )

    def _follow(self, run: Run, chains: Chains, seen: set[bytes], block_size: int) -> None:
        """When a run's calls come and go."""
        ends_s: list[float] = []
        for call in run.calls:
            due_s = max((ends_s[parent] for parent in call.parents), default=run.arrival_s)
            due_s += call.think_s
            hashes = chains.computed(run, call)
            prompt = call.prompt_tokens // block_size * BLOCK_HASH_BYTES
            found = 0
            for at in range(0, prompt, BLOCK_HASH_BYTES):
                if hashes[at : at + BLOCK_HASH_BYTES] not in seen:
                    break
                found += 1
            seen.update(
                hashes[at : at + BLOCK_HASH_BYTES] for at in range(0, len(hashes), BLOCK_HASH_BYTES)
            )
            new_tokens = call.prompt_tokens - min(found * block_size, call.prompt_tokens - 1)
            self._prefills.append((due_s, new_tokens))
            first_s = due_s + WAITS_S + new_tokens * self._token_s
            end_s = first_s + call.output_tokens * self._step_s
            context = call.prompt_tokens + call.output_tokens
            self._decodes.append((first_s, end_s, call.output_tokens, context))
            ends_s.append(end_s)

    def _sum(self) -> None:
        self._prefills.sort()
        self._times = [at_s for at_s, _ in self._prefills]
        self._prefilled = [0, *accumulate(tokens for _, tokens in self._prefills)]
        steps = int(max((end_s for _, end_s, _, _ in self._decodes), default=0.0) / GRID_S) + 2
        rates, held = [0.0] * (steps + 1), [0.0] * (steps + 1)
        for first_s, end_s, tokens, context in self._decodes:
            low, high = int(first_s / GRID_S), int(end_s / GRID_S) + 1
            rate = tokens / (GRID_S * (high - low))
            rates[low] += rate
            rates[high] -= rate
            held[low] += context
            held[high] -= context
        self._rates, self._held = list(accumulate(rates)), list(accumulate(held))


def _known(value: float) -> Interval:
    value = max(0.0, value)
    return Interval(value, value, value, value)

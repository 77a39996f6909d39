"""Where a call is decoded and how its prompt's KV gets there, chosen together by what it costs.

For each worker that may decode the call, and each way to have the prompt's KV there,

    locally     behind the prompts that wait there, on top of what it holds of this one
    remotely    on another worker, behind those that wait there, then what the decode worker
                lacks is moved over the link between them

this is reckoned, in seconds:

    own         until the first token, then decoding in the batch that will be there
    others      whom the prompt's computation delays, on the worker that does it; the longer
                steps of the calls that are decoded beside this one, as long as both are
    forgotten   computing again what caches give up for the new KV, as far as it will be asked
                for; more KV than there will be room for

The least sum is taken. Among nearly equal ones a hash of the call's turn chooses, so that
decisions on the same stale reports do not all fall alike. Affinity to caches, balance, and
whether disaggregation pays all come of the sums: there are no thresholds.

That the decode worker comes first and prefill is an addition is Splitwise's and DistServe's
separation seen from KV memory; one sum of queueing, prefill and transfer is Mooncake's
(FAST 2025, "Conductor"), costs to others are Preble's (ICLR 2025, "E2").

Pure functions of views; nothing is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

from coordinator.limits import Placement
from coordinator.policy.ask import Ask, cached_blocks_of
from coordinator.speeds import Speeds
from coordinator.view import WorkerView

PREFILLERS_TRIED = 3
"""Of the workers that can compute a prompt soonest, for each that could decode."""
LINK_BYTES_PER_S = 10e9
LINK_FIXED_S = 5e-3
"""Of a link nobody has used yet."""
BUSY_MOST = 0.9
LATER = 3.0
FORGOTTEN = 1
INTERFERENCE = 1.0
SOFT_ROLES = 1
OVERFLOW_WEIGHT = 2.0
"""What is preempted is computed again, and others wait meanwhile."""


class Outlook(NamedTuple):
    """What is known beyond the workers. ``room``: blocks that a worker's cache takes before it
    forgets any; ``reuse``: share of prompts that is found in caches."""

    speeds: Speeds
    now_s: float
    room: Callable[[str], int]
    reuse: float


class Way(NamedTuple):
    """A worker that can compute the prompt. ``delayed_s``: what that costs others there."""

    ready_s: float
    delayed_s: float
    worker: WorkerView


class Found(NamedTuple):
    """Where to decode; ``prefill`` None: there."""

    decode: WorkerView
    prefill: WorkerView | None
    seconds: float


def cheapest(
    ask: Ask,
    roomy: Sequence[WorkerView],
    prefillers: Collection[WorkerView],
    held: Mapping[str, int],
    placement: Placement,
    block_size: int,
    outlook: Outlook,
) -> Found:
    """The cheapest worker and way; ``roomy``: those that may decode, at least one."""
    costs = _Costs(ask, held, block_size, outlook)
    if LATER:
        now_s = outlook.now_s
        pool = {worker.name: worker.gauge for worker in (*roomy, *prefillers)}.values()
        size = len(pool)
        waiting_s = sum(gauge.waiting_s(now_s) for gauge in pool) / size
        rate = sum(gauge.prompts_per_s(now_s) for gauge in pool) / size
        share = sum(gauge.prefilling_share(now_s) for gauge in pool) / size
        costs._later = LATER * rate * waiting_s / (1.0 - min(BUSY_MOST, share))
    ways = sorted((costs.way(worker) for worker in prefillers), key=_soonest)[:PREFILLERS_TRIED]
    found: list[tuple[float, str, str, WorkerView, WorkerView | None]] = []
    for decode in roomy:
        for seconds, prefill in costs.of(decode, ways):
            name = prefill.name if prefill is not None else ""
            found.append((seconds, decode.name, name, decode, prefill))
    found.sort(key=lambda each: each[:3])
    least = found[0][0]
    near = [each for each in found if each[0] <= least * (1.0 + placement.band)]
    at = _hashed(ask.turn) % len(near) if len(near) > 1 else 0
    seconds, _, _, decode, prefill = near[at]
    return Found(decode, prefill, seconds)


def _soonest(way: Way) -> tuple[float, str]:
    return way.ready_s + way.delayed_s, way.worker.name


def _hashed(turn: int) -> int:
    digest = blake2b(turn.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class _Costs:
    """Of one call."""

    def __init__(
        self, ask: Ask, held: Mapping[str, int], block_size: int, outlook: Outlook
    ) -> None:
        self._ask = ask
        self._held = held
        self._block_size = block_size
        self._outlook = outlook
        self._output_tokens = ask.expected_tokens or float(ask.output_tokens)
        self._context_tokens = ask.prompt_tokens + 0.5 * self._output_tokens
        _, token_s, pair_s = outlook.speeds.prefill.coefficients
        self._block_s = (token_s + pair_s * 0.5 * ask.prompt_tokens) * block_size
        """To compute a block again."""
        self._later = 0.0

    def way(self, worker: WorkerView) -> Way:
        """To compute the prompt on a worker for another one."""
        own_s = self._prefill_s(worker)
        waiting_s = worker.gauge.waiting_s(self._outlook.now_s)
        delayed_s = own_s * self._delayed(worker, waiting_s, own_s)
        delayed_s += self._forgotten_s(worker, self._ask.prompt_tokens)
        return Way(waiting_s + own_s, delayed_s, worker)

    def _delayed(self, worker: WorkerView, waiting_s: float, own_s: float) -> float:
        """How many others wait while a worker computes a prompt: those it decodes, and those
        that come before all it has to compute then is computed."""
        gauge, now_s = worker.gauge, self._outlook.now_s
        return gauge.decoding + self._later

    def of(
        self, decode: WorkerView, ways: Sequence[Way]
    ) -> list[tuple[float, WorkerView | None]]:
        """What each way costs in all if ``decode`` decodes."""
        here_s = self._decode_s(decode)
        gauge = decode.gauge
        waiting_s = gauge.waiting_s(self._outlook.now_s)
        own_s = self._prefill_s(decode)
        found: list[tuple[float, WorkerView | None]] = [
            (here_s + waiting_s + own_s + own_s * self._delayed(decode, waiting_s, own_s), None)
        ]
        warm = decode.warm_sources
        for way in ways:
            if way.worker is not decode and way.worker.name in warm:
                # What waits here to be computed slows decoding when that begins.
                ready_s = max(way.ready_s + self._moving_s(way.worker, decode), waiting_s)
                found.append((here_s + ready_s + way.delayed_s, way.worker))
        return found

    def _prefill_s(self, worker: WorkerView) -> float:
        blocks = cached_blocks_of(self._ask, self._held, worker, self._block_size)
        cached_tokens = blocks * self._block_size
        new_tokens = self._ask.prompt_tokens - cached_tokens
        return self._outlook.speeds.prefill_s(new_tokens, cached_tokens)

    def _moving_s(self, source: WorkerView, target: WorkerView) -> float:
        cached = cached_blocks_of(self._ask, self._held, target, self._block_size)
        blocks = -(-self._ask.prompt_tokens // self._block_size) - cached
        size_bytes = blocks * target.kv_bytes_per_block
        link = target.link(source.name)
        if link is None or link.bytes_per_s <= 0.0:
            return LINK_FIXED_S + size_bytes / LINK_BYTES_PER_S
        return link.fixed_s + (size_bytes + link.in_flight_bytes) / link.bytes_per_s

    def _decode_s(self, decode: WorkerView) -> float:
        """To decode the call beside those that are there, and what that costs them."""
        start_s, sequence_s, token_s = self._outlook.speeds.step.coefficients
        gauge, output_tokens = decode.gauge, self._output_tokens
        batch = len(decode.decodes)
        longer_s = sequence_s + token_s * self._context_tokens
        step_s = start_s + sequence_s * batch + token_s * gauge.context_tokens + longer_s
        together = min(gauge.left_tokens, output_tokens * batch)
        share = INTERFERENCE * min(BUSY_MOST, gauge.prefilling_share(self._outlook.now_s))
        seconds = output_tokens * step_s / (1.0 - share) + together * longer_s
        return seconds + self._forgotten_s(decode, self._ask.prompt_tokens + output_tokens)

    def _forgotten_s(self, worker: WorkerView, tokens: float) -> float:
        """To compute again what a worker's cache gives up for so many tokens of the call."""
        block_size = self._block_size
        new_blocks = tokens / block_size - self._held.get(worker.name, 0)
        lost_blocks = new_blocks - max(0, self._outlook.room(worker.name))
        seconds = self._outlook.reuse * self._block_s * lost_blocks if lost_blocks > 0.0 else 0.0
        gauge = worker.gauge
        over_blocks = (gauge.context_tokens + tokens) / block_size - worker.usable_blocks
        if FORGOTTEN:
            now_s = self._outlook.now_s
            seconds *= 1.0 + self._delayed(worker, gauge.waiting_s(now_s), 0.0)
        if over_blocks > 0.0:
            seconds += OVERFLOW_WEIGHT * over_blocks * self._block_s
        return seconds

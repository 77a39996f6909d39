"""Where a call is decoded and how its prompt's KV gets there, chosen together by what it costs.

For each worker that may decode the call, and each way to have the prompt's KV there,

    locally     behind the prompts that wait there, on top of what it holds of this one
    remotely    on another worker, behind those that wait there, then what the decode worker
                lacks is moved over the link between them

this is reckoned, in seconds of all calls together:

    own         until the first token, then decoding in the batch that will be there, slowed by
                prompts to come as it was by those of late
    others      the calls that a worker decodes while it computes the prompt; longer steps of
                those decoded beside this one, for as long as both are
    later       calls that come while prompts wait, and wait longer for this one. Where it is
                computed makes no difference to how much work there is, so that all workers
                have one price: what makes it dear is what nobody has cached
    forgotten   what caches give up for the new KV is computed again, as far as it will be asked
                for; KV beyond what a worker has is preempted

The least sum is taken. Among nearly equal ones a hash of the call's turn chooses, so that
decisions on the same stale reports do not all fall alike. Affinity to caches, balance, whether
disaggregation pays, and workers that rather prefill or rather decode all come of the sums:
there are no thresholds.

One estimate of queueing, prefill and transfer for each pair is Mooncake's ("Conductor", FAST
2025); costs to others, and of what is evicted, are Preble's ("E2", ICLR 2025).

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
OVERFLOW_WEIGHT = 2.0
"""What is preempted is computed again, and others wait meanwhile."""
BUSY_MOST = 0.9
"""A worker is taken to spend at most this share of its time on prompts."""


class Outlook(NamedTuple):
    """What is known beyond the workers. ``room``: blocks that a worker's cache takes before it
    forgets any; ``reuse``: share of prompts that is found in caches."""

    speeds: Speeds
    now_s: float
    room: Callable[[str], int]
    reuse: float


class Found(NamedTuple):
    """Where to decode, what it costs; ``prefill`` None: there."""

    decode: WorkerView
    prefill: WorkerView | None
    seconds: float


class _Way(NamedTuple):
    """A worker that can compute the prompt. ``others_s``: what that costs others."""

    ready_s: float
    others_s: float
    worker: WorkerView


def cheapest(
    ask: Ask,
    roomy: Sequence[WorkerView],
    prefillers: Collection[WorkerView],
    held: Mapping[str, int],
    placement: Placement,
    block_size: int,
    outlook: Outlook,
) -> Found:
    """The cheapest worker and way.

    ``roomy``: those that may decode, at least one; ``prefillers``: those that may compute the
    prompt for another one. With ``disaggregated`` = always nothing is computed locally that
    can be computed elsewhere.
    """
    costs = _Costs(ask, roomy, prefillers, held, placement, block_size, outlook)
    ways = sorted((costs.way(worker) for worker in prefillers), key=_soonest)
    ways = ways[:PREFILLERS_TRIED]
    found: list[tuple[float, str, str, WorkerView, WorkerView | None]] = []
    for decode in roomy:
        for seconds, prefill in costs.of(decode, ways):
            found.append((seconds, decode.name, prefill.name if prefill else "", decode, prefill))
    if placement.disaggregated == "always":
        found = [each for each in found if each[4] is not None] or found
    found.sort(key=lambda each: each[:3])
    most = found[0][0] * (1.0 + placement.band)
    count = 1
    while count < len(found) and found[count][0] <= most:
        count += 1
    # Exactly equal ones are ties, which go to the smallest name if nothing is to be drawn.
    chosen = found[_hashed(ask.turn) % count if placement.band and count > 1 else 0]
    return Found(chosen[3], chosen[4], chosen[0])


def _soonest(way: _Way) -> tuple[float, str]:
    return way.ready_s + way.others_s, way.worker.name


def _hashed(turn: int) -> int:
    digest = blake2b(turn.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class _Costs:
    """Of one call, wherever it goes."""

    def __init__(
        self,
        ask: Ask,
        roomy: Sequence[WorkerView],
        prefillers: Collection[WorkerView],
        held: Mapping[str, int],
        placement: Placement,
        block_size: int,
        outlook: Outlook,
    ) -> None:
        self._ask = ask
        self._held = held
        self._placement = placement
        self._block_size = block_size
        self._outlook = outlook
        self._output_tokens = ask.expected_tokens or float(ask.output_tokens)
        self._context_tokens = ask.prompt_tokens + 0.5 * self._output_tokens
        _, token_s, pair_s = outlook.speeds.prefill.coefficients
        self._block_s = (token_s + pair_s * 0.5 * ask.prompt_tokens) * block_size
        """To compute a block again."""
        self._later = self._price(roomy, prefillers) if placement.work_price else 0.0

    def _price(self, roomy: Sequence[WorkerView], prefillers: Collection[WorkerView]) -> float:
        """How many calls come, for each worker, before the prompts that wait by now are computed:
        so many seconds a second of work costs them. (Of an M/G/1 queue's busy period.)"""
        now_s = self._outlook.now_s
        gauges = {worker.name: worker.gauge for worker in (*roomy, *prefillers)}.values()
        waiting_s = sum(gauge.waiting_s(now_s) for gauge in gauges) / len(gauges)
        prompts_per_s = sum(gauge.prompts_per_s(now_s) for gauge in gauges) / len(gauges)
        share = sum(gauge.prefilling_share(now_s) for gauge in gauges) / len(gauges)
        calls = prompts_per_s * waiting_s / (1.0 - min(BUSY_MOST, share))
        return self._placement.work_price * calls

    def way(self, worker: WorkerView) -> _Way:
        """To compute the prompt on a worker for another one."""
        own_s = self._prefill_s(worker)
        others_s = own_s * (worker.gauge.decoding + self._later)
        others_s += self._forgotten_s(worker, self._ask.prompt_tokens)
        return _Way(worker.gauge.waiting_s(self._outlook.now_s) + own_s, others_s, worker)

    def of(self, decode: WorkerView, ways: Sequence[_Way]) -> list[tuple[float, WorkerView | None]]:
        """What each way costs in all if ``decode`` decodes; None: it computes the prompt, too."""
        here_s = self._decode_s(decode)
        waiting_s = decode.gauge.waiting_s(self._outlook.now_s)
        own_s = self._prefill_s(decode)
        local_s = waiting_s + own_s * (1.0 + decode.gauge.decoding + self._later)
        found: list[tuple[float, WorkerView | None]] = [(here_s + local_s, None)]
        for way in ways:
            if way.worker is not decode and way.worker.name in decode.warm_sources:
                # What waits here to be computed slows decoding when that begins.
                ready_s = max(way.ready_s + self._moving_s(way.worker, decode), waiting_s)
                found.append((here_s + ready_s + way.others_s, way.worker))
        return found

    def _prefill_s(self, worker: WorkerView) -> float:
        blocks = cached_blocks_of(self._ask, self._held, worker, self._block_size)
        cached_tokens = blocks * self._block_size
        new_tokens = self._ask.prompt_tokens - cached_tokens
        return self._outlook.speeds.prefill_s(new_tokens, cached_tokens)

    def _moving_s(self, source: WorkerView, target: WorkerView) -> float:
        """Until what ``target`` lacks of the prompt has come."""
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
        share = min(BUSY_MOST, gauge.prefilling_share(self._outlook.now_s))
        own_s = (
            output_tokens * step_s / (1.0 - min(BUSY_MOST, self._placement.interference * share))
        )
        others_s = min(gauge.left_tokens, output_tokens * batch) * longer_s
        return own_s + others_s + self._forgotten_s(decode, self._ask.prompt_tokens + output_tokens)

    def _forgotten_s(self, worker: WorkerView, tokens: float) -> float:
        """To compute again what a worker gives up for so many tokens of the call."""
        gauge, block_size = worker.gauge, self._block_size
        new_blocks = tokens / block_size - self._held.get(worker.name, 0)
        lost_blocks = new_blocks - max(0, self._outlook.room(worker.name))
        seconds = 0.0
        if lost_blocks > 0.0:
            again_s = self._outlook.reuse * self._block_s * lost_blocks
            seconds = self._placement.forgotten * again_s * (1.0 + gauge.decoding + self._later)
        over_blocks = (gauge.context_tokens + tokens) / block_size - worker.usable_blocks
        if over_blocks > 0.0:
            seconds += OVERFLOW_WEIGHT * over_blocks * self._block_s
        return seconds

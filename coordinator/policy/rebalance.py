"""How many workers prefill and how many decode, for the demand that is expected.

For every number of prefill workers three pressures are reckoned, demand over capacity,

    prefill    prompt tokens to compute, those that wait already included
    decode     tokens to generate, against what workers give while they keep their promise
               about the time between tokens
    memory     tokens that running calls hold, against the KV of the workers that decode

for what is likely and for both ends of the forecast's interval. What a side is missing beyond
what it can do without queues is its cost, smoothly; the cost of a number is that of both sides,
a mean over the three cases. The number with the least cost is taken if it is better than the
present one by a margin and by what turning costs: a worker that turns is of less use until its old
work is done, and what lived on it has to be moved or computed again.

Who turns: of the side that gives, the workers whose turn costs least. Each stays as it is for a
while after a turn, both roles keep as many workers as they must, and among those that decode there
is always one that can hold the longest prompts.

With capacities from token rates and a third constraint for memory this follows HeteroScale
(arXiv 2508.19559: utilisation and latencies are poor signals, token rates good ones) and DOPD
(arXiv 2511.20982); the mean over cases of what is missing is the newsvendor's. Demand comes from
``workflow.foresight``; ``trusted`` decides how much of it is believed.

Pure functions of views; nothing is remembered.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import exp, isfinite, log1p
from typing import Literal, NamedTuple

import msgspec

from coordinator.limits import Rebalance
from coordinator.speeds import Law
from coordinator.workflow.blend import Interval
from coordinator.workflow.forecast import ForecastScore

Side = Literal["prefill", "decode"]

CASES = ((0.25, "low"), (0.5, "likely"), (0.25, "high"))
"""Of an interval, and how much each counts."""
FULL = 0.8
"""Pressure from which on queues grow."""
SOFTNESS = 0.1
SAMPLES_LEAST = 6.0
RATIO_MOST = 1.1
"""A forecast is believed after so many judgements, if its error is at most so many times that of
the last value."""
SPREAD = 0.3
"""Of what was seen lately, how much of it the next seconds may differ."""
RATE_MOST = 1e12
"""Anything above is nonsense."""
BATCH_MOST = 4096


class Need(msgspec.Struct, frozen=True, gc=False):
    """Demand over the horizon: prompt tokens to compute and tokens to generate per second, tokens
    held by running calls. ``source``: of each, ``forecast`` or ``seen``."""

    prefill_tokens_per_s: Interval
    decode_tokens_per_s: Interval
    resident_tokens: Interval
    sources: list[str]


class Capacity(msgspec.Struct, frozen=True, gc=False):
    """What one worker gives in each role: tokens per second, and tokens of KV."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    resident_tokens: float


class Candidate(NamedTuple):
    """A worker that is up. ``turnable``: it may turn now; ``left_s``: until what it has begun in
    its role is done; ``lost_s``: to move or compute again what lives on it."""

    name: str
    role: Side
    turnable: bool
    left_s: float
    lost_s: float
    tokens_max: int


class Situation(NamedTuple):
    """All that a decision rests on. ``mixed``: workers that do both."""

    candidates: Sequence[Candidate]
    mixed: int
    waiting_tokens: float
    need: Need
    capacity: Capacity


class Pressure(msgspec.Struct, frozen=True, gc=False):
    """Likely demand over capacity."""

    prefill: float
    decode: float
    memory: float


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """``wanted`` prefill workers of ``prefill`` + ``decode`` that can have either role; ``turns``
    those that are to turn, in order. Costs as the module says."""

    prefill: int
    decode: int
    wanted: int
    cost: float
    wanted_cost: float
    turn_cost: float
    pressure: Pressure
    turns: list[str]
    reason: str


def decide(situation: Situation, settings: Rebalance) -> Verdict:
    """The best number of prefill workers, and who turns for it, if anybody should."""
    prefill = [one for one in situation.candidates if one.role == "prefill"]
    decode = [one for one in situation.candidates if one.role == "decode"]
    total, present = len(situation.candidates), len(prefill)
    costs = {
        count: cost(situation, count, total - count)
        for count in range(
            min(present, settings.prefill_workers_min),
            total - min(len(decode), settings.decode_workers_min) + 1,
        )
    }
    wanted = min(costs, key=lambda count: (costs[count], abs(count - present)), default=present)
    now = costs.get(present, 0.0)
    givers = decode if wanted > present else prefill
    turns = _givers(givers, abs(wanted - present), decode)
    # Some may have to stay: what can be had may not be worth it.
    reached = present + (len(turns) if wanted > present else -len(turns))
    turn_cost = _turn_cost(turns, total, settings)
    gain = now - costs.get(reached, now)
    worth = bool(turns) and gain > settings.margin + turn_cost
    return Verdict(
        prefill=present,
        decode=len(decode),
        wanted=wanted,
        cost=now,
        wanted_cost=costs.get(wanted, now),
        turn_cost=turn_cost,
        pressure=pressure(situation, present, len(decode)),
        turns=[one.name for one in turns] if worth else [],
        reason=_reason(situation, present, len(decode), wanted, turns, worth),
    )


def cost(situation: Situation, prefill: int, decode: int) -> float:
    """What is missing with so many workers of each role, as shares of a side's capacity."""
    total = 0.0
    for weight, case in CASES:
        found = pressure(situation, prefill, decode, case)
        total += weight * (_missing(found.prefill) + _missing(max(found.decode, found.memory)))
    return total


def pressure(
    situation: Situation, prefill: int, decode: int, case: str = "likely", horizon_s: float = 10.0
) -> Pressure:
    """Demand over capacity with so many workers of each role. What waits already is to be done
    within ``horizon_s``."""
    need, capacity = situation.need, situation.capacity
    both = 0.5 * situation.mixed
    prefill_rate = getattr(need.prefill_tokens_per_s, case) + situation.waiting_tokens / horizon_s
    decoding = decode + both
    return Pressure(
        prefill=_over(prefill_rate, (prefill + both) * capacity.prefill_tokens_per_s),
        decode=_over(
            getattr(need.decode_tokens_per_s, case), decoding * capacity.decode_tokens_per_s
        ),
        memory=_over(getattr(need.resident_tokens, case), decoding * capacity.resident_tokens),
    )


def desired(need: Need, capacity: Capacity) -> dict[str, int]:
    """Workers of each role that the upper end of the demand needs without queues, on a cluster of
    any size; at least one."""
    prefill = _over(need.prefill_tokens_per_s.high, FULL * capacity.prefill_tokens_per_s)
    decode = max(
        _over(need.decode_tokens_per_s.high, FULL * capacity.decode_tokens_per_s),
        _over(need.resident_tokens.high, FULL * capacity.resident_tokens),
    )
    return {"prefill": _whole(prefill), "decode": _whole(decode)}


def trusted(scores: Collection[ForecastScore], quantity: str, horizon_s: float) -> bool:
    """Whether forecasts of a quantity have been right lately: at the judged horizon that is
    nearest, not much worse than the last value."""
    own = [one for one in scores if one.quantity == quantity]
    if not own:
        return False
    nearest = min(own, key=lambda one: abs(one.horizon_s - horizon_s))
    judgement = nearest.judgement
    return judgement.samples >= SAMPLES_LEAST and judgement.ratio <= RATIO_MOST


def sane(interval: Interval) -> bool:
    """Finite, not negative, in order, and of a size that can be."""
    values = (interval.low, interval.likely, interval.high)
    return (
        all(isfinite(value) and 0.0 <= value <= RATE_MOST for value in values)
        and interval.low <= interval.likely <= interval.high
    )


def seen(value: float) -> Interval:
    """What was seen lately, as if it was a forecast."""
    return Interval((1 - SPREAD) * value, value, value, (1 + SPREAD) * value)


def decode_limits(step: Law, context_tokens: float, itl_s: float, kv_tokens: float) -> float:
    """Tokens per second that a worker decodes at most while a step takes no longer than ``itl_s``
    and its KV is enough, with calls of ``context_tokens``; at least what one call gets."""
    start_s, sequence_s, context_s = step.coefficients
    each_s = sequence_s + context_s * context_tokens
    batch = min((itl_s - start_s) / each_s, kv_tokens / max(1.0, context_tokens), BATCH_MOST)
    batch = max(1.0, batch)
    return batch / (start_s + each_s * batch)


def _missing(pressure: float) -> float:
    """Of a pressure, what is above ``FULL``, smoothly."""
    above = (pressure - FULL) / SOFTNESS
    # The second is the first where exp would overflow.
    return SOFTNESS * (log1p(exp(above)) if above < 30.0 else above)


def _over(demand: float, capacity: float) -> float:
    if demand <= 0.0:
        return 0.0
    return min(RATE_MOST, demand / capacity) if capacity > 0.0 else RATE_MOST


def _whole(workers: float) -> int:
    return max(1, int(-(-workers // 1)))


def _givers(
    givers: Sequence[Candidate], count: int, decode: Sequence[Candidate]
) -> list[Candidate]:
    """Up to ``count`` that may turn, the cheapest first, and not all that can hold the longest
    prompts."""
    able = sorted(
        (one for one in givers if one.turnable), key=lambda one: (one.left_s + one.lost_s, one.name)
    )
    longest = max((one.tokens_max for one in decode), default=0)
    large = sum(one.tokens_max == longest for one in decode)
    found: list[Candidate] = []
    for one in able:
        if len(found) == count:
            break
        if one.role == "decode" and one.tokens_max == longest:
            if large == 1:
                continue
            large -= 1
        found.append(one)
    return found


def _turn_cost(turns: Sequence[Candidate], total: int, settings: Rebalance) -> float:
    """Of those that turn, the share of the cluster's next ``dwell_s`` that is lost by it."""
    if not turns:
        return 0.0
    # While its old work runs on a worker is of half the use.
    lost_s = sum(min(settings.drain_s, 0.5 * one.left_s) + one.lost_s for one in turns)
    return lost_s / (settings.dwell_s * max(1, total))


def _reason(
    situation: Situation,
    prefill: int,
    decode: int,
    wanted: int,
    turns: Sequence[Candidate],
    worth: bool,
) -> str:
    now, then = (
        pressure(situation, count, prefill + decode - count) for count in (prefill, wanted)
    )
    sides = (
        f"prefill {now.prefill:.2f} to {then.prefill:.2f}, "
        f"decode {now.decode:.2f} to {then.decode:.2f}, "
        f"memory {now.memory:.2f} to {then.memory:.2f} of what they can do"
    )
    if wanted == prefill:
        return f"{prefill} prefill workers are best: {sides}"
    if not turns:
        return f"{wanted} prefill workers would be better, but nobody may turn yet: {sides}"
    if not worth:
        return f"{wanted} prefill workers would not be better by what turning costs: {sides}"
    return f"{wanted} prefill workers are better than {prefill}: {sides}"

"""Which worker turns from prefill to decode or back: ratio control from observed load.

Each look compares both sides with what counts as overloaded:

    prefill    prompt tokens yet to compute, per worker that prefills for others
    decode     the largest of three: share of the KV of all workers that decode that their
               engines use, mean time between their tokens, requests per place in their
               batches; each as a share of its own bound. What is only reserved for calls that
               wait for their prefill is no load on decode

When one side alone has been overloaded at ``looks`` looks in a row, the least busy worker of
the other one turns, if that would not nearly be overloaded with one less. When neither is,
workers that have turned go back one by one to the role that they were started with, under
the same condition: a burst must not leave the cluster with a ratio that is wrong for what
follows it. Floors, the time a worker keeps its role and the time before the direction may be
reversed keep it from swinging.

Memory alone says too little of decode: with a small model batches are far too large for any
promise about latency long before the KV is full. And a queue says too little of how many
prefill workers can be spared, as it is empty until it explodes: what counts besides is
which share of them has been at work lately.

This is the load-based planner of NVIDIA Dynamo, on a cluster of fixed size: at an interval of
5 s it changes one worker, up where the estimated time to first token (prefill) or between
tokens (decode, 50 ms) is above its bound, down where what is left would stay below 80 % of it
and the KV would fit, with each side's load times N / (N - 1) ("consolidation"); its simpler
modes compare queued prefill tokens and KV in use with thresholds (docs.nvidia.com/dynamo,
"Planner", and components/src/dynamo/planner/core/load_scaling.py of ai-dynamo/dynamo). There
a change is a process started or stopped, and the times come from a regression. Here times
between tokens are those that have been seen, and what they would be with one worker less
follows from the least that was: with least time a and time t, the share 1 - a/t of it grows
with the batch, the batch with the calls that are there at a time, and these with t
(Little's law), so a share s of the workers gives t' = a / (1 - (1 - a/t) / s). Growth by
N / (N - 1) alone would give away workers until decode breaks down. That a worker turns at once
while its old work runs on is Arrow's (arXiv 2505.11916).

Pure: what it remembers from look to look is passed in and returned.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import msgspec

from coordinator.limits import Ratio
from coordinator.view import WorkerView

Side = Literal["prefill", "decode"]


class Decoded(msgspec.Struct, frozen=True):
    """What an engine had said at a look: tokens it had decoded ever, requests it ran."""

    tokens: int
    running: int


class Trend(msgspec.Struct, frozen=True):
    """What is remembered between looks."""

    wanted: Side | None = None
    """Which side has wanted a worker lately."""
    looks: int = 0
    """At how many looks in a row."""
    turned_to: Side | None = None
    """The last turn."""
    turned_s: float = float("-inf")
    looked_s: float = float("-inf")
    busy_share: float = 0.0
    """Of the prefill workers, those that had something to compute: a mean over ``dwell_s``."""
    decoded: Mapping[str, Decoded] = {}
    """By incarnation of a worker that decodes."""
    itl_least_s: float = float("inf")
    """The least mean time between tokens that was seen: an engine's with next to nothing to do."""


class Turn(msgspec.Struct, frozen=True):
    """``worker`` is to have ``role`` from now on."""

    worker: str
    role: Side
    reason: str


class _Loads(msgspec.Struct, frozen=True):
    """Both sides as they are now. Workers with the role mixed are on both."""

    prefillers: Sequence[WorkerView]
    decoders: Sequence[WorkerView]
    prefill_tokens: int
    busy_share: float
    used_blocks: int
    usable_blocks: int
    requests: int
    batch_slots: int
    itl_s: float
    """Mean time between tokens since the last look, 0 where it is not known."""
    itl_least_s: float
    """The least of them ever."""


def look(
    workers: Collection[WorkerView], trend: Trend, ratio: Ratio, now_s: float
) -> tuple[Trend, Turn | None]:
    """One look at the load: what to remember, and which worker turns, if any."""
    loads = _loads(workers, trend, ratio, now_s)
    trend = msgspec.structs.replace(
        trend,
        looked_s=now_s,
        busy_share=loads.busy_share,
        itl_least_s=loads.itl_least_s,
        decoded={
            worker.incarnation: Decoded(worker.load.decode_tokens_total, worker.load.running)
            for worker in loads.decoders
        },
    )
    overloaded = _overloaded(loads, ratio)
    wanted = _missing(loads) if overloaded == "neither" else overloaded
    if wanted not in ("prefill", "decode"):
        return msgspec.structs.replace(trend, wanted=None, looks=0), None
    looks = trend.looks + 1 if trend.wanted == wanted else 1
    reversing = trend.turned_to not in (None, wanted)
    if looks >= ratio.looks and not (reversing and now_s - trend.turned_s < ratio.dwell_s):
        spared = _from_decode if wanted == "prefill" else _from_prefill
        giver, reason = spared(loads, ratio, now_s, home=overloaded == "neither")
        if giver is not None:
            trend = msgspec.structs.replace(
                trend, wanted=None, looks=0, turned_to=wanted, turned_s=now_s
            )
            return trend, Turn(giver.name, wanted, reason)
    return msgspec.structs.replace(trend, wanted=wanted, looks=looks), None


def _loads(workers: Collection[WorkerView], trend: Trend, ratio: Ratio, now_s: float) -> _Loads:
    up = [worker for worker in workers if worker.up]
    itl_s = _itl_s([worker for worker in up if worker.role != "prefill"], trend, now_s)
    prefillers = [worker for worker in up if worker.role != "decode"]
    decoders = [worker for worker in up if worker.role != "prefill"]
    return _Loads(
        prefillers=prefillers,
        decoders=decoders,
        prefill_tokens=sum(worker.prefill_tokens for worker in prefillers),
        busy_share=_busy_share(prefillers, trend, ratio, now_s),
        used_blocks=sum(worker.kv_blocks_used for worker in decoders),
        usable_blocks=sum(worker.usable_blocks for worker in decoders),
        requests=sum(worker.load.running + worker.waiting for worker in decoders),
        batch_slots=sum(worker.batch_slots for worker in decoders),
        itl_s=itl_s,
        itl_least_s=min(trend.itl_least_s, itl_s or trend.itl_least_s),
    )


def _busy_share(
    prefillers: Sequence[WorkerView], trend: Trend, ratio: Ratio, now_s: float
) -> float:
    """Which share of the prefill workers is at work, over a while: samples of it, decayed."""
    if not prefillers:
        return 0.0
    busy = sum(worker.prefill_tokens > 0 for worker in prefillers) / len(prefillers)
    weight = min(1.0, (now_s - trend.looked_s) / ratio.dwell_s)
    return trend.busy_share + weight * (busy - trend.busy_share)


def _itl_s(decoders: Sequence[WorkerView], trend: Trend, now_s: float) -> float:
    """Since the last look: the time that requests have been decoded, over their tokens."""
    spent_s, tokens = 0.0, 0
    for worker in decoders:
        before = trend.decoded.get(worker.incarnation)
        new = worker.load.decode_tokens_total - before.tokens if before is not None else 0
        if before is not None and new > 0:
            spent_s += (now_s - trend.looked_s) * (before.running + worker.load.running) / 2
            tokens += new
    return spent_s / tokens if tokens else 0.0


def _decode_load(loads: _Loads, ratio: Ratio, usable_blocks: int, share_left: float) -> float:
    """The largest of decode's loads, 1 for overloaded, if only ``usable_blocks`` and
    ``share_left`` of the workers were left."""
    if not usable_blocks or not loads.batch_slots or not share_left:
        return float("inf")
    growth = _growth(loads, share_left)
    return max(
        growth * loads.used_blocks / (ratio.decode_kv_high * usable_blocks),
        max(growth, 1 / share_left) * loads.itl_s / ratio.decode_itl_high_s,
        growth * loads.requests / loads.batch_slots / share_left,
    )


def _growth(loads: _Loads, share_left: float) -> float:
    """How many times as long calls would take, and so as many be there, with that share of the
    workers: as calls keep coming, batches grow with the time that a token takes, and that with
    the batches."""
    if not loads.itl_s:
        return 1.0
    work = 1.0 - loads.itl_least_s / loads.itl_s
    left = 1.0 - work / share_left
    return loads.itl_least_s / loads.itl_s / left if left > 0.0 else float("inf")


def _overloaded(loads: _Loads, ratio: Ratio) -> Literal["prefill", "decode", "both", "neither"]:
    prefill = bool(loads.prefillers) and (
        loads.prefill_tokens >= ratio.prefill_tokens_high * len(loads.prefillers)
    )
    decode = bool(loads.decoders) and (
        _decode_load(loads, ratio, loads.usable_blocks, share_left=1.0) >= 1.0
    )
    if prefill and decode:
        return "both"
    return "prefill" if prefill else "decode" if decode else "neither"


def _missing(loads: _Loads) -> Side | None:
    """The side that most of the turned workers have come from."""
    from_prefill = sum(_has_turned(worker, "decode") for worker in loads.decoders)
    from_decode = sum(_has_turned(worker, "prefill") for worker in loads.prefillers)
    if from_prefill == from_decode:
        return None
    return "prefill" if from_prefill > from_decode else "decode"


def _has_turned(worker: WorkerView, role: Side) -> bool:
    return worker.role == role and worker.started_role != role


def _from_decode(
    loads: _Loads, ratio: Ratio, now_s: float, home: bool
) -> tuple[WorkerView | None, str]:
    """The decode worker that can be spared, and why it turns.

    Not the only one that can hold the longest prompts. ``home``: one that has come from there.
    """
    named = [worker for worker in loads.decoders if worker.role == "decode"]
    if len(named) <= ratio.decode_workers_min:
        return None, ""
    left = len(loads.decoders) - 1
    able = [
        worker
        for worker in named
        if now_s - worker.turned_s >= ratio.dwell_s
        and (not home or _has_turned(worker, "decode"))
        and _decode_load(
            loads, ratio, loads.usable_blocks - worker.usable_blocks, left / (left + 1)
        )
        < ratio.spare
        and any(
            other.tokens_max >= worker.tokens_max for other in loads.decoders if other is not worker
        )
    ]
    giver = min(able, key=lambda worker: (worker.kv_blocks_used, worker.name), default=None)
    if home:
        return giver, "decode does not need it any more"
    return giver, f"{loads.prefill_tokens} tokens wait for {len(loads.prefillers)} prefill workers"


def _from_prefill(
    loads: _Loads, ratio: Ratio, now_s: float, home: bool
) -> tuple[WorkerView | None, str]:
    """The prefill worker that can be spared, and why it turns; ``home`` as above."""
    named = [worker for worker in loads.prefillers if worker.role == "prefill"]
    left = len(loads.prefillers) - 1
    if len(named) <= ratio.prefill_workers_min or not left:
        return None, ""
    if loads.prefill_tokens >= ratio.spare * ratio.prefill_tokens_high * left:
        return None, ""
    if loads.busy_share * (left + 1) >= ratio.spare * left:
        return None, ""
    able = [
        worker
        for worker in named
        if now_s - worker.turned_s >= ratio.dwell_s and (not home or _has_turned(worker, "prefill"))
    ]
    giver = min(able, key=lambda worker: (worker.prefill_tokens, worker.name), default=None)
    if home:
        return giver, "prefill does not need it any more"
    return giver, _why_decode(loads, ratio)


def _why_decode(loads: _Loads, ratio: Ratio) -> str:
    """What decode is short of."""
    workers = f"{len(loads.decoders)} decode workers"
    if loads.itl_s >= ratio.decode_itl_high_s:
        return f"{1e3 * loads.itl_s:.0f} ms between tokens on {workers}"
    if loads.requests >= loads.batch_slots:
        return f"{loads.requests} requests on {workers}"
    return f"{loads.used_blocks / loads.usable_blocks:.0%} of the KV of {workers} is in use"

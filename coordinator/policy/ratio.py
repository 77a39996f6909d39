"""Which worker turns from prefill to decode or back: ratio control from observed load.

Each look compares both sides with what counts as overloaded:

    prefill    prompt tokens yet to compute, per worker that prefills for others
    decode     share of the KV of all workers that decode that their engines use; what is only
               reserved for calls that wait for their prefill is no load on decode

When one side alone has been overloaded at ``looks`` looks in a row, the least busy worker of
the other one turns, if that would not nearly be overloaded with one less. Floors, the time
a worker keeps its role and the time before the direction may be reversed keep it from
swinging.

The signals and the one worker at a time are those of the load-based planner of NVIDIA
Dynamo, which compares the prefill queue and the KV utilisation of decode workers with
thresholds (0.9 for the latter) at an interval and changes one worker
(docs.nvidia.com/dynamo, "Planner", "Load-based Scaling Up/Down Prefill/Decode Workers");
there a change is a process started or stopped. That a worker turns at once while its old
work runs on is Arrow's (arXiv 2505.11916).

Pure: what it remembers from look to look is passed in and returned.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import msgspec

from coordinator.limits import Ratio
from coordinator.view import WorkerView

Side = Literal["prefill", "decode"]


class Trend(msgspec.Struct, frozen=True):
    """What is remembered between looks."""

    wanted: Side | None = None
    """Which side has wanted a worker lately."""
    looks: int = 0
    """At how many looks in a row."""
    turned_to: Side | None = None
    """The last turn."""
    turned_s: float = float("-inf")


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
    used_blocks: int
    usable_blocks: int


def look(
    workers: Collection[WorkerView], trend: Trend, ratio: Ratio, now_s: float
) -> tuple[Trend, Turn | None]:
    """One look at the load: what to remember, and which worker turns, if any."""
    loads = _loads(workers)
    wanted = _overloaded(loads, ratio)
    if wanted is None:
        return msgspec.structs.replace(trend, wanted=None, looks=0), None
    looks = trend.looks + 1 if trend.wanted == wanted else 1
    reversing = trend.turned_to not in (None, wanted)
    if looks >= ratio.looks and not (reversing and now_s - trend.turned_s < ratio.dwell_s):
        spared = _from_decode if wanted == "prefill" else _from_prefill
        giver, reason = spared(loads, ratio, now_s)
        if giver is not None:
            return Trend(turned_to=wanted, turned_s=now_s), Turn(giver.name, wanted, reason)
    return msgspec.structs.replace(trend, wanted=wanted, looks=looks), None


def _loads(workers: Collection[WorkerView]) -> _Loads:
    up = [worker for worker in workers if worker.up]
    prefillers = [worker for worker in up if worker.role != "decode"]
    decoders = [worker for worker in up if worker.role != "prefill"]
    return _Loads(
        prefillers=prefillers,
        decoders=decoders,
        prefill_tokens=sum(worker.prefill_tokens for worker in prefillers),
        used_blocks=sum(worker.kv_blocks_used for worker in decoders),
        usable_blocks=sum(worker.usable_blocks for worker in decoders),
    )


def _overloaded(loads: _Loads, ratio: Ratio) -> Side | None:
    """The side that is overloaded; None if it is both or none."""
    prefill = bool(loads.prefillers) and (
        loads.prefill_tokens >= ratio.prefill_tokens_high * len(loads.prefillers)
    )
    decode = bool(loads.decoders) and (
        loads.used_blocks >= ratio.decode_kv_high * loads.usable_blocks
    )
    if prefill == decode:
        return None
    return "prefill" if prefill else "decode"


def _from_decode(loads: _Loads, ratio: Ratio, now_s: float) -> tuple[WorkerView | None, str]:
    """The decode worker that can be spared, and why it is needed.

    Not the only one that can hold the longest prompts.
    """
    named = [worker for worker in loads.decoders if worker.role == "decode"]
    if len(named) <= ratio.decode_workers_min:
        return None, ""
    spare_share = ratio.spare * ratio.decode_kv_high
    able = [
        worker
        for worker in named
        if now_s - worker.turned_s >= ratio.dwell_s
        and loads.used_blocks < spare_share * (loads.usable_blocks - worker.usable_blocks)
        and any(
            other.tokens_max >= worker.tokens_max for other in loads.decoders if other is not worker
        )
    ]
    giver = min(able, key=lambda worker: (worker.kv_blocks_used, worker.name), default=None)
    return giver, f"{loads.prefill_tokens} tokens wait for {len(loads.prefillers)} prefill workers"


def _from_prefill(loads: _Loads, ratio: Ratio, now_s: float) -> tuple[WorkerView | None, str]:
    """The prefill worker that can be spared, and why it is needed."""
    named = [worker for worker in loads.prefillers if worker.role == "prefill"]
    left = len(loads.prefillers) - 1
    if len(named) <= ratio.prefill_workers_min:
        return None, ""
    if loads.prefill_tokens >= ratio.spare * ratio.prefill_tokens_high * left:
        return None, ""
    able = [worker for worker in named if now_s - worker.turned_s >= ratio.dwell_s]
    giver = min(able, key=lambda worker: (worker.prefill_tokens, worker.name), default=None)
    share = loads.used_blocks / loads.usable_blocks
    return giver, f"{share:.0%} of the KV of {len(loads.decoders)} decode workers is in use"

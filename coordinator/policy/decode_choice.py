"""Which of the workers with room decodes a call: one function per ``Placement.policy`` but
Pythia's own, which chooses more than that (``policy.joint``).

``least_kv``
    the least loaded, where load = (KV blocks taken + blocks this call needs) / usable KV
    blocks + waiting requests / batch slots - ``cached_weight`` * share of the prompt that
    it holds already. No estimates of time.
``round_robin``
    one after the other by name, whatever they have to do.
``least_loaded``
    the fewest open calls, then the fewest prompt tokens to compute, then the least KV taken:
    "least request" of HTTP load balancers, told what engines are short of.
``cache_aware``
    the longest cached prefix, if it is at least ``affinity_cached_min`` of the prompt; among
    equals, with ``sticky``, where the session's last call was; then the least loaded. Only
    among workers in reach: those whose open calls stay within
    ``affinity_load_max`` times the mean (or are few) and whose KV has room for what they lack.
    So affinity never costs balance, as in consistent hashing with bounded loads (Mirrokni,
    Thorup, Zadimoghaddam, arXiv 1608.01350) and in the ``cache_aware`` policies of the SGLang
    and vLLM routers. Their least share is taken over; their bounds on the imbalance (64 calls,
    factor 1.5) are far wider than any that 8 to 32 calls per worker reach.
``cost``
    NVIDIA Dynamo's KV router: ``overlap_weight`` * (prefill blocks the worker would then have
    to compute) + (blocks it would then decode); the cheapest, or one drawn by a softmax over
    the costs (docs.nvidia.com/dynamo, "KV Router", "Cost Function", and
    ``DefaultWorkerSelector`` in lib/llm/src/kv_router/scheduler.rs of ai-dynamo/dynamo).
    Dynamo leaves prefixes out of account where it chooses decode workers of a disaggregated
    cluster; here they count, since a decode worker pulls only what it lacks.

Ties go to the smallest name. Pure functions of views; nothing is remembered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b

from coordinator.limits import Placement
from coordinator.policy.ask import Ask, cached_blocks_of
from coordinator.view import WorkerView

DecodeChoice = Callable[
    [Ask, Sequence[WorkerView], int, Mapping[str, int], Placement, int], WorkerView
]
"""Ask, workers (at least one), blocks the call needs, cached blocks by worker, placement, block
size."""


def least_kv(
    ask: Ask,
    roomy: Sequence[WorkerView],
    blocks: int,
    held: Mapping[str, int],
    placement: Placement,
    block_size: int,
) -> WorkerView:
    """The least load on KV memory and batch, less what is cached."""
    weight = placement.cached_weight * block_size / ask.prompt_tokens
    best, best_load = roomy[0], float("inf")
    for worker in roomy:
        name = worker.name
        reserved, used = worker.kv_blocks_reserved, worker.kv_blocks_used
        taken = reserved if reserved > used else used
        load = (taken + blocks) / worker.usable_blocks + worker.waiting / worker.batch_slots
        if name in held:
            load -= weight * held[name]
        if load < best_load or (load == best_load and name < best.name):
            best, best_load = worker, load
    return best


def round_robin(
    ask: Ask,
    roomy: Sequence[WorkerView],
    blocks: int,
    held: Mapping[str, int],
    placement: Placement,
    block_size: int,
) -> WorkerView:
    """The next one in turn."""
    return sorted(roomy, key=_name)[ask.turn % len(roomy)]


def least_loaded(
    ask: Ask,
    roomy: Sequence[WorkerView],
    blocks: int,
    held: Mapping[str, int],
    placement: Placement,
    block_size: int,
) -> WorkerView:
    """The fewest open calls."""
    return min(roomy, key=_busy)


def cache_aware(
    ask: Ask,
    roomy: Sequence[WorkerView],
    blocks: int,
    held: Mapping[str, int],
    placement: Placement,
    block_size: int,
) -> WorkerView:
    """The most of the prompt, among those in reach; if nobody is, the least loaded."""
    mean_calls = sum(open_calls(worker) for worker in roomy) / len(roomy)
    calls_max = max(placement.affinity_calls_min, placement.affinity_load_max * mean_calls)
    near = [
        worker
        for worker in roomy
        if open_calls(worker) < calls_max
        and _taken(worker) + blocks - held.get(worker.name, 0) <= worker.usable_blocks
    ]

    blocks_min = placement.affinity_cached_min * ask.prompt_tokens / block_size

    def rank(worker: WorkerView) -> tuple[int, bool, tuple[int, int, float, str]]:
        cached_blocks = held.get(worker.name, 0)
        strange = not placement.sticky or worker.name != ask.last
        return -cached_blocks if cached_blocks >= blocks_min else 0, strange, _busy(worker)

    return min(near, key=rank) if near else min(roomy, key=_busy)


def cost(
    ask: Ask,
    roomy: Sequence[WorkerView],
    blocks: int,
    held: Mapping[str, int],
    placement: Placement,
    block_size: int,
) -> WorkerView:
    """The cheapest in blocks to prefill and blocks to decode."""
    costs: list[tuple[float, str, WorkerView]] = []
    for worker in roomy:
        cached = cached_blocks_of(ask, held, worker, block_size)
        prefill_tokens = worker.prefill_tokens + ask.prompt_tokens - cached * block_size
        decode_blocks = worker.kv_blocks_reserved + blocks
        blocks_cost = placement.overlap_weight * prefill_tokens / block_size + decode_blocks
        costs.append((blocks_cost, worker.name, worker))
    costs.sort(key=lambda each: each[:2])
    if not placement.temperature:
        return costs[0][2]
    return _drawn(costs, placement.temperature, ask.turn)


def _drawn(
    costs: Sequence[tuple[float, str, WorkerView]], temperature: float, turn: int
) -> WorkerView:
    """One by a softmax over costs that are scaled to 0 to 1, as Dynamo draws.

    The chance is a hash of the turn: the same call is always drawn the same way.
    """
    least, most = costs[0][0], costs[-1][0]
    scale = temperature * ((most - least) or 1.0)
    weights = [math.exp((least - each) / scale) for each, _, _ in costs]
    digest = blake2b(turn.to_bytes(8, "little"), digest_size=8).digest()
    left = int.from_bytes(digest, "little") / 2**64 * sum(weights)
    for weight, (_, _, worker) in zip(weights, costs, strict=True):
        left -= weight
        if left < 0.0:
            return worker
    return costs[-1][2]


def open_calls(worker: WorkerView) -> int:
    """Calls that are planned onto a worker and not over, and prompts it computes for others."""
    return len(worker.decodes) + worker.prefilling


def _taken(worker: WorkerView) -> int:
    return max(worker.kv_blocks_reserved, worker.kv_blocks_used)


def _busy(worker: WorkerView) -> tuple[int, int, float, str]:
    taken = _taken(worker) / worker.usable_blocks
    return open_calls(worker), worker.prefill_tokens, taken, worker.name


def _name(worker: WorkerView) -> str:
    return worker.name


DECODE_CHOICES: Mapping[str, DecodeChoice] = {
    "least_kv": least_kv,
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "cache_aware": cache_aware,
    "cost": cost,
}

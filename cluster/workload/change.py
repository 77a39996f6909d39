"""A workload made from another: smaller, shorter, with other arrivals, or several in one.

All are pure, keep what prompts share true, and take chance as an argument.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import gcd

import msgspec
from msgspec.structs import replace

from cluster.workload.form import Call, Run, Workload, WorkloadError
from cluster.workload.lineage import linked
from cluster.workload.spans import divided


class Poisson(msgspec.Struct, frozen=True):
    """Runs arrive independently of each other, ``rate_per_s`` on average."""

    rate_per_s: float


class Bursty(msgspec.Struct, frozen=True):
    """Gamma-distributed gaps: the same mean rate, in bursts.

    ``variation``: standard deviation of the gaps over their mean; 1 is Poisson.
    """

    rate_per_s: float
    variation: float = 3.0


class Recorded(msgspec.Struct, frozen=True):
    """Runs arrive when they did, ``speed`` times as fast."""

    speed: float = 1.0


class ClosedLoop(msgspec.Struct, frozen=True):
    """``runs`` runs are kept going: when one ends, the next begins."""

    runs: int


Arrivals = Poisson | Bursty | Recorded | ClosedLoop


def with_arrivals(workload: Workload, arrivals: Arrivals, rng: random.Random) -> Workload:
    """The same runs, in their order, arriving otherwise."""
    match arrivals:
        case Poisson(rate_per_s):
            _positive("rate", rate_per_s)
            gaps_s = [rng.expovariate(rate_per_s) for _ in workload.runs]
        case Bursty(rate_per_s, variation):
            _positive("rate", rate_per_s)
            _positive("variation", variation)
            shape = 1 / variation**2
            gaps_s = [rng.gammavariate(shape, 1 / (rate_per_s * shape)) for _ in workload.runs]
        case Recorded(speed):
            _positive("speed", speed)
            if not workload.arrivals_known:
                raise WorkloadError(f"{workload.name}: its runs have no recorded arrivals")
            return _at(workload, [run.arrival_s / speed for run in workload.runs])
        case ClosedLoop(runs):
            _positive("closed", runs)
            return replace(workload, concurrency=runs)
    times_s, now_s = [], 0.0
    for gap_s in gaps_s:
        now_s += gap_s
        times_s.append(now_s)
    return _at(workload, times_s)


def _at(workload: Workload, times_s: list[float]) -> Workload:
    runs = tuple(
        replace(run, arrival_s=at_s) for run, at_s in zip(workload.runs, times_s, strict=True)
    )
    return replace(workload, runs=runs, arrivals_known=True, concurrency=0)


def with_pace(workload: Workload, factor: float) -> Workload:
    """All pauses and arrivals ``factor`` times as fast, for clusters that need less patience."""
    _positive("pace", factor)
    runs = tuple(
        replace(
            run,
            arrival_s=run.arrival_s / factor,
            calls=tuple(replace(call, think_s=call.think_s / factor) for call in run.calls),
        )
        for run in workload.runs
    )
    return replace(workload, runs=runs)


def anonymous(workload: Workload) -> Workload:
    """The same calls of clients that say nothing of who they are."""
    runs = tuple(replace(run, workflow="") for run in workload.runs)
    return replace(workload, runs=runs)


def of_tenant(workload: Workload, tenant: str) -> Workload:
    """The same runs, all of one tenant."""
    return replace(workload, runs=tuple(replace(run, tenant=tenant) for run in workload.runs))


def with_samples(workload: Workload, samples: int, *, together: bool) -> Workload:
    """Every call wants several answers to its prompt, and what follows waits for all of them.
    ``together``: they are asked for in one request, else in one each."""
    _positive("samples", samples)

    def repeated(run: Run) -> Run:
        calls = [
            replace(
                call,
                index=call.index * samples + sample,
                parents=tuple(
                    parent * samples + other for parent in call.parents for other in range(samples)
                ),
                group=f"{run.id}/{call.index}" if together else "",
            )
            for call in run.calls
            for sample in range(samples)
        ]
        return replace(run, calls=tuple(calls))

    runs = map(repeated, workload.runs)
    return replace(workload, runs=linked(runs, workload.block_tokens))


def with_pauses_cut(workload: Workload, longest_s: float) -> Workload:
    """No pause between calls is longer than ``longest_s``: traces of people who went home have
    pauses of hours, in which a cluster has nothing to do for anybody."""
    _positive("pause_max", longest_s)
    runs = tuple(
        replace(
            run,
            calls=tuple(replace(call, think_s=min(call.think_s, longest_s)) for call in run.calls),
        )
        for run in workload.runs
    )
    return replace(workload, runs=runs)


def scaled(workload: Workload, factor: int) -> Workload:
    """All lengths divided by ``factor``, for models with a short context.

    The blocks are divided as well, so the same prompts share the same number of blocks, and
    the same part of their tokens. ``factor`` must divide the block size.
    """
    if factor < 1 or workload.block_tokens % factor:
        raise WorkloadError(
            f"scale: {factor} does not divide the block size of {workload.name}, "
            f"{workload.block_tokens} tokens"
        )

    def smaller(call: Call) -> Call:
        return replace(
            call,
            prompt_tokens=max(1, call.prompt_tokens // factor),
            output_tokens=max(1, call.output_tokens // factor),
        )

    runs = tuple(
        replace(run, calls=tuple(smaller(call) for call in run.calls)) for run in workload.runs
    )
    block_tokens = workload.block_tokens // factor
    return replace(workload, runs=linked(runs, block_tokens), block_tokens=block_tokens)


def limited(
    workload: Workload,
    runs: int | None = None,
    calls_per_run: int | None = None,
    prompt_tokens_max: int | None = None,
) -> Workload:
    """The first ``runs`` runs whose prompts all fit, each cut to its first calls.

    Runs with a prompt above ``prompt_tokens_max`` (after the cut) are left out whole, as
    half a conversation is none, and counted in ``dropped_runs``; so are those after the limit.
    """
    if calls_per_run is not None:
        _positive("calls per run", calls_per_run)
    kept: list[Run] = []
    for run in workload.runs:
        if runs is not None and len(kept) >= runs:
            break
        calls = run.calls[:calls_per_run]
        if prompt_tokens_max is not None and any(
            call.prompt_tokens > prompt_tokens_max for call in calls
        ):
            continue
        kept.append(replace(run, calls=calls))
    dropped = workload.dropped_runs + len(workload.runs) - len(kept)
    return replace(workload, runs=linked(kept, workload.block_tokens), dropped_runs=dropped)


def sampled(workload: Workload, runs: int, rng: random.Random) -> Workload:
    """``runs`` of its runs (all if there are fewer), in order of their arrivals if they have
    any and else in any order.

    For runs that stand for themselves: where calls of other runs bring the prefixes, as in
    traces without sessions, it would leave prompts without them.
    """
    drawn = rng.sample(workload.runs, min(runs, len(workload.runs)))
    if workload.arrivals_known:
        drawn.sort(key=lambda run: run.arrival_s)
    dropped = workload.dropped_runs + len(workload.runs) - len(drawn)
    return replace(workload, runs=linked(drawn, workload.block_tokens), dropped_runs=dropped)


def mixed(workloads: Sequence[Workload], name: str = "mix") -> Workload:
    """All runs of several workloads by arrival, in the largest block size that fits all.

    Runs of different workloads share no blocks. Their ids get the workload's name in front;
    a name that occurs twice gets a number.
    """
    if not workloads:
        raise WorkloadError("nothing to mix")
    block_tokens = gcd(*(workload.block_tokens for workload in workloads))
    runs: list[Run] = []
    for position, workload in enumerate(workloads):
        names = [other.name for other in workloads]
        label = workload.name
        if names.count(label) > 1:
            label += f"-{names[: position + 1].count(label)}"
        parts = workload.block_tokens // block_tokens
        runs += [_moved(run, label, parts) for run in workload.runs]
    runs.sort(key=lambda run: run.arrival_s)
    return Workload(
        name=name,
        source=_joined([workload.source for workload in workloads]),
        licence=_joined([workload.licence for workload in workloads]),
        block_tokens=block_tokens,
        runs=linked(runs, block_tokens),
        arrivals_known=all(workload.arrivals_known for workload in workloads),
        dropped_runs=sum(workload.dropped_runs for workload in workloads),
    )


def _moved(run: Run, label: str, parts: int) -> Run:
    calls = tuple(replace(call, blocks=divided(call.blocks, parts)) for call in run.calls)
    return replace(run, id=f"{label}/{run.id}", scope=f"{label}:{run.scope}", calls=calls)


def _joined(texts: list[str]) -> str:
    return ", ".join(dict.fromkeys(text for text in texts if text))


def _positive(what: str, value: float) -> None:
    if not value > 0:
        raise WorkloadError(f"{what}: must be above 0 (got {value})")

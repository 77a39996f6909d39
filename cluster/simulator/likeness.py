"""A simulated cluster made like a running one.

What it is comes from its file and from what its workers said when they registered. What its
engines take comes from a calibration: how it depends on sizes. The rest is measured on the
running cluster by small probes, each of which is then simulated; constants are changed until
that takes as long.

    alone     one short call after the other: how fast the machine decodes by now
              (``memory_slower``), what rendering, HTTP and messages take (``api_s``)
    cached    one call after the other with the same long prompt, of which little has to be
              computed: what each token of a prompt takes in any case (``api_token_s``)
    long      one long prompt after the other: how fast it prefills (``compute_slower``, from
              the difference of two lengths), what a transfer takes besides its bytes
              (``transfer_fixed_s``)
    together  both at the same time, on all workers: how engines of one node slow each other
              down (``contention``)

Probes are workloads like any other, and none of their prompts occurs in what is compared.
A machine's speed changes while one looks at it, and so do the replays that are compared: figures
are means over all rounds of probes, not the best or the usual ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from typing import Literal

import msgspec

from cluster.calibration import Calibration
from cluster.schema import ClusterConfig
from cluster.simulator.failure import SimulationError
from cluster.simulator.records import CallRecord, Result
from cluster.simulator.setup import ClusterSetup, EngineOptions, NetworkSetup, WorkerSetup
from cluster.simulator.world import simulate
from cluster.workload.form import Call, Run, Workload
from coordinator.cost import Efficiency, Link
from coordinator.protocol import EngineFacts

SHORT_TOKENS = 40
SHORT_OUTPUT = 24
SHORT_CALLS = 16
CACHED_BLOCKS = 60
CACHED_CALLS = 13
"""The first computes the prompt for the others."""
LONG_TOKENS = (640, 1920)
LONG_OUTPUT = 8
LONG_CALLS = 12
STREAM_OUTPUT = 40
STREAM_CALLS = 60
STREAMS = 3
"""Beside each other on every worker that decodes: tokens cost processes around it time, too."""
ROUNDS = 8
CLOSE = 0.002
"""Constants are changed until probes differ by less than this share, at most so often."""
PAUSE_S = 0.05
MESSAGE_S = 100e-6
"""A message between two processes of one machine. Only its sum with ``api_s`` is measured."""

BLOCK_TOKENS = 32

Kind = Literal["alone", "cached", "long", "together"]
KINDS: tuple[Kind, ...] = ("alone", "cached", "long", "together")


class LikenessError(SimulationError):
    """The running cluster did not do with a probe what it was meant to."""


class Constants(msgspec.Struct, frozen=True, kw_only=True):
    """What a cluster takes beside its engines' steps. Seconds; bytes per second.

    ``compute_slower``, ``memory_slower``: factors on what a step computes and on what it reads
    or takes in any case.
    """

    compute_slower: float = 1.0
    memory_slower: float = 1.0
    api_s: float = 0.0
    api_token_s: float = 0.0
    message_s: float = MESSAGE_S
    transfer_fixed_s: float = 0.0
    bytes_per_s: float = 1e9
    contention: tuple[float, ...] = ()


def probe(kind: Kind, config: ClusterConfig) -> Workload:
    """What is replayed on the cluster to measure it."""
    decoders = sum(entry.role != "prefill" for entry in config.workers)
    runs: Sequence[tuple[Call, ...]]
    match kind:
        case "alone":
            runs = [_turns(SHORT_CALLS, (SHORT_TOKENS,), SHORT_OUTPUT, PAUSE_S)]
        case "cached":
            runs = [_repeated(CACHED_CALLS, CACHED_BLOCKS, SHORT_OUTPUT, PAUSE_S)]
        case "long":
            runs = [_turns(LONG_CALLS, LONG_TOKENS, LONG_OUTPUT, PAUSE_S)]
        case "together":
            stream = _turns(STREAM_CALLS, (SHORT_TOKENS,), STREAM_OUTPUT, 0.0)
            prompts = _turns(LONG_CALLS, LONG_TOKENS, 1, 0.0)
            runs = [*(stream for _ in range(STREAMS * decoders)), prompts]
    return Workload(
        name=kind,
        source="probe",
        licence="",
        block_tokens=BLOCK_TOKENS,
        runs=tuple(
            Run(f"{kind}-{number}", kind, 0.0, f"{kind}-{number}", calls)
            for number, calls in enumerate(runs)
        ),
    )


def _turns(
    calls: int, prompts_tokens: Sequence[int], output_tokens: int, think_s: float
) -> tuple[Call, ...]:
    """One call after the other, that have nothing in common."""
    made = []
    for index in range(calls):
        prompt_tokens = prompts_tokens[index % len(prompts_tokens)]
        parents = (index - 1,) if index else ()
        made.append(Call(index, parents, think_s, prompt_tokens, output_tokens, ()))
    return tuple(made)


def _repeated(calls: int, blocks: int, output_tokens: int, think_s: float) -> tuple[Call, ...]:
    """One call after the other with the same prompt but for a last block and a bit."""
    made = []
    for index in range(calls):
        parents = (index - 1,) if index else ()
        prompt_tokens = (blocks + 1) * BLOCK_TOKENS + BLOCK_TOKENS // 4
        known = ((1, blocks), (2 * blocks + 2 * index, 1))
        made.append(Call(index, parents, think_s, prompt_tokens, output_tokens, known))
    return tuple(made)


def slowed(efficiency: Efficiency, compute: float, memory: float) -> Efficiency:
    """The same kernels on a slower machine; see ``Constants``."""
    return msgspec.structs.replace(
        efficiency,
        gemm=efficiency.gemm / compute,
        expert=efficiency.expert / compute,
        attention=efficiency.attention / compute,
        weights=efficiency.weights / memory,
        kv=efficiency.kv / memory,
        step_s=efficiency.step_s * memory,
        layer_s=efficiency.layer_s * memory,
        sequence_s=efficiency.sequence_s * memory,
    )


def setup_like(
    config: ClusterConfig,
    facts: EngineFacts,
    calibration: Calibration,
    constants: Constants,
) -> ClusterSetup:
    """The cluster of ``config``, whose engines said ``facts``, as the simulator takes it."""
    return ClusterSetup(
        shape=calibration.shape,
        hardware=calibration.hardware,
        efficiency=slowed(
            calibration.efficiency, constants.compute_slower, constants.memory_slower
        ),
        tp=calibration.tp,
        workers=tuple(
            WorkerSetup(name=entry.name, role=entry.role, node=entry.host)
            for entry in config.workers
        ),
        options=EngineOptions(
            block_size=facts.block_size,
            max_num_seqs=facts.max_num_seqs,
            max_num_batched_tokens=facts.max_num_batched_tokens,
            max_model_len=facts.max_model_len,
            kv_blocks=facts.kv_blocks,
            kv_lease_s=config.network.lease_s,
        ),
        network=NetworkSetup(
            message_s=constants.message_s,
            api_s=constants.api_s,
            api_token_s=constants.api_token_s,
            same_node="tcp",
            same_rack="tcp",
            across="tcp",
            links={"tcp": Link(0.0, constants.bytes_per_s)},
            transfer_fixed_s=constants.transfer_fixed_s,
        ),
        limits=config.limits,
        placement=config.placement,
        api_servers=config.api.servers,
        contention=constants.contention,
    )


Make = Callable[[Constants], ClusterSetup]


def constants_of(
    config: ClusterConfig, real: dict[Kind, list[Result]], bytes_per_s: float, make: Make
) -> Constants:
    """The constants with which the probes take as long in the simulator as they did.

    ``real``: of each kind one or more replays. ``make``: the cluster with given constants.
    LikenessError if a probe went another way than it should have.
    """
    alone, cached, long, together = (_calls(kind, real[kind]) for kind in KINDS)
    alone_s, cached_s = _ttft_s(alone), _ttft_s(_repeats(cached))

    def simulated(kind: Kind, constants: Constants) -> list[CallRecord]:
        return simulate(make(constants), probe(kind, config), limited=True).calls

    found = Constants(bytes_per_s=bytes_per_s or Constants().bytes_per_s)
    for _ in range(ROUNDS):
        model = {kind: simulated(kind, found) for kind in KINDS if kind != "together"}
        decodes = _itl_s(alone) / _itl_s(model["alone"])
        prefills = _longer_s(long) / _longer_s(model["long"])
        late_s = alone_s - _ttft_s(model["alone"])
        token_s = cached_s - _ttft_s(_repeats(model["cached"])) - late_s
        off = (decodes - 1, prefills - 1, late_s / alone_s, token_s / cached_s)
        if max(map(abs, off)) < CLOSE:
            break
        token_s /= CACHED_BLOCKS * BLOCK_TOKENS
        found = msgspec.structs.replace(
            found,
            memory_slower=found.memory_slower * decodes,
            compute_slower=found.compute_slower * prefills,
            api_s=max(0.0, found.api_s + late_s),
            api_token_s=max(0.0, found.api_token_s + token_s),
        )
    if not any(entry.role == "prefill" for entry in config.workers):
        return found
    if not all(call.moved_tokens for call in long):
        raise LikenessError("a long prompt that was to be prefilled elsewhere was not")
    fixed_s = _duration_s(long) - _duration_s(simulated("long", found))
    found = msgspec.structs.replace(found, transfer_fixed_s=max(0.0, fixed_s))
    engines, factor, real_s = len(config.workers), 1.0, _both_s(together)
    for _ in range(ROUNDS):
        contention = tuple(1.0 + (factor - 1.0) * at / (engines - 1) for at in range(engines))
        found = msgspec.structs.replace(found, contention=contention)
        slower = real_s / _both_s(simulated("together", found))
        if abs(slower - 1.0) < CLOSE:
            break
        factor = max(1.0, factor * slower)
    return found


def _calls(kind: Kind, results: Iterable[Result]) -> list[CallRecord]:
    calls = [call for result in results for call in result.calls]
    if wrong := [call.outcome for call in calls if call.outcome != "length"]:
        raise LikenessError(f"{len(wrong)} calls of the probe {kind!r} ended with {wrong[0]}")
    return calls


def _repeats(calls: Iterable[CallRecord]) -> list[CallRecord]:
    """Of the probe ``cached``: those that found their prompt there."""
    return [call for call in calls if call.call > 0]


def _longer_s(calls: Iterable[CallRecord]) -> float:
    """Of the probe ``long``: what the longer prompts' first tokens take longer."""
    shorter, longer = (
        _ttft_s([call for call in calls if call.prompt_tokens == tokens]) for tokens in LONG_TOKENS
    )
    return longer - shorter


def _both_s(calls: Sequence[CallRecord]) -> float:
    """Of the probe ``together``: how long decodes and prefills take beside each other, as one
    time; of decodes only those that are over when the last prefill is."""
    prompts = [call for call in calls if call.output_tokens == 1]
    # Replays of several rounds all begin at 0.
    until_s = statistics.median(call.ended_s for call in prompts if call.call == LONG_CALLS - 1)
    beside = [
        call for call in calls if call.output_tokens == STREAM_OUTPUT and call.ended_s <= until_s
    ]
    if not beside:
        raise LikenessError("no decode was over while others prefilled")
    return sqrt(_itl_s(beside) * statistics.fmean(call.ttft_s for call in prompts))


def _ttft_s(calls: Sequence[CallRecord]) -> float:
    return statistics.fmean(call.ttft_s for call in calls)


def _itl_s(calls: Sequence[CallRecord]) -> float:
    return statistics.fmean(call.itl_s for call in calls)


def _duration_s(calls: Sequence[CallRecord]) -> float:
    return statistics.fmean(call.ended_s - call.due_s for call in calls)

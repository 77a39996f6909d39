"""A simulated cluster made like a running one.

What it is comes from its file and from what its workers said when they registered. What its
engines take comes from a calibration. The rest is measured on the running cluster by small
probes, each of which is then simulated: what the real one took longer is what the simulator
does not know of otherwise.

    alone     one short call after the other: rendering, HTTP and messages (``api_s``), what a
              live engine's step takes besides (``step_overhead_s``)
    remote    one prompt after the other that is prefilled elsewhere: what a transfer takes
              besides its bytes (``transfer_fixed_s``)
    together  both at the same time, on all workers: how engines of one node slow each other
              down (``contention``)

Probes are workloads like any other, and none of their prompts occurs in what is compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Iterable, Sequence
from math import sqrt
from typing import Literal

import msgspec

from cluster.calibration import Calibration
from cluster.schema import ClusterConfig
from cluster.simulator.records import CallRecord, Result
from cluster.simulator.setup import ClusterSetup, EngineOptions, NetworkSetup, WorkerSetup
from cluster.simulator.world import simulate
from cluster.workload.form import Call, Run, Workload
from coordinator.cost import Link
from coordinator.protocol import EngineFacts

SHORT_TOKENS = 40
SHORT_OUTPUT = 24
LONG_TOKENS = 1500
LONG_OUTPUT = 8
ALONE_CALLS = 12
REMOTE_CALLS = 8
STREAM_OUTPUT = 120
STREAM_CALLS = 12
PAUSE_S = 0.05
MESSAGE_S = 100e-6
"""A message between two processes of one machine. Only its sum with ``api_s`` is measured."""

Kind = Literal["alone", "remote", "together"]
KINDS: tuple[Kind, ...] = ("alone", "remote", "together")
Replayed = Callable[[Workload], Awaitable[Result]]


class LikenessError(RuntimeError):
    """The running cluster did not do with a probe what it was meant to."""


class Constants(msgspec.Struct, frozen=True, kw_only=True):
    """What a cluster takes beside its engines' steps. Seconds; bytes per second."""

    api_s: float = 0.0
    message_s: float = MESSAGE_S
    step_overhead_s: float = 0.0
    transfer_fixed_s: float = 0.0
    bytes_per_s: float = 1e9
    contention: tuple[float, ...] = ()


def probe(kind: Kind, config: ClusterConfig) -> Workload:
    """What is replayed on the cluster to measure it."""
    remote = max(LONG_TOKENS, config.placement.remote_prefill_min_tokens)
    short = _turns(ALONE_CALLS, SHORT_TOKENS, SHORT_OUTPUT, PAUSE_S)
    long = _turns(REMOTE_CALLS, remote, LONG_OUTPUT, PAUSE_S)
    decoders = sum(entry.role != "prefill" for entry in config.workers)
    stream = _turns(STREAM_CALLS, SHORT_TOKENS, STREAM_OUTPUT, 0.0)
    runs: Sequence[tuple[Call, ...]]
    match kind:
        case "alone":
            runs = [short]
        case "remote":
            runs = [long]
        case "together":
            runs = [*(stream for _ in range(decoders)), _turns(REMOTE_CALLS, remote, 1, 0.0)]
    return Workload(
        name=kind,
        source="probe",
        licence="",
        block_tokens=32,
        runs=tuple(
            Run(f"{kind}-{number}", kind, 0.0, f"{kind}-{number}", calls)
            for number, calls in enumerate(runs)
        ),
    )


def _turns(calls: int, prompt_tokens: int, output_tokens: int, think_s: float) -> tuple[Call, ...]:
    """One call after the other, that have nothing in common."""
    return tuple(
        Call(index, (index - 1,) if index else (), think_s, prompt_tokens, output_tokens, ())
        for index in range(calls)
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
        efficiency=calibration.efficiency,
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
            step_overhead_s=constants.step_overhead_s,
        ),
        network=NetworkSetup(
            message_s=constants.message_s,
            api_s=constants.api_s,
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
    found = Constants(bytes_per_s=bytes_per_s)

    def simulated(kind: Kind) -> list[CallRecord]:
        return simulate(make(found), probe(kind, config)).calls

    alone, remote, together = (_calls(kind, real[kind]) for kind in KINDS)
    short = simulated("alone")
    overhead_s = _median_itl_s(alone) - _median_itl_s(short)
    found = msgspec.structs.replace(found, step_overhead_s=max(0.0, overhead_s))
    short = simulated("alone")
    api_s = _median_ttft_s(alone) - _median_ttft_s(short)
    found = msgspec.structs.replace(found, api_s=max(0.0, api_s))
    if not _has_remote(config):
        return found
    if not all(call.moved_tokens for call in remote):
        raise LikenessError("a long prompt that was to be prefilled elsewhere was not")
    fixed_s = _median_duration_s(remote) - _median_duration_s(simulated("remote"))
    found = msgspec.structs.replace(found, transfer_fixed_s=max(0.0, fixed_s))
    model = simulated("together")
    slower = [
        _median_itl_s(_streams(together)) / _median_itl_s(_streams(model)),
        _median_ttft_s(_prompts(together)) / _median_ttft_s(_prompts(model)),
    ]
    factor = max(1.0, sqrt(slower[0] * slower[1]))
    engines = len(config.workers)
    contention = tuple(1.0 + (factor - 1.0) * at / (engines - 1) for at in range(engines))
    return msgspec.structs.replace(found, contention=contention)


def _has_remote(config: ClusterConfig) -> bool:
    return any(entry.role == "prefill" for entry in config.workers)


def _calls(kind: Kind, results: Iterable[Result]) -> list[CallRecord]:
    calls = [call for result in results for call in result.calls]
    if wrong := [call.outcome for call in calls if call.outcome != "length"]:
        raise LikenessError(f"{len(wrong)} calls of the probe {kind!r} ended with {wrong[0]}")
    return calls


def _streams(calls: Iterable[CallRecord]) -> list[CallRecord]:
    """Those that decode while others prefill: the first of each run overlap with the prefills."""
    return [call for call in calls if call.output_tokens == STREAM_OUTPUT]


def _prompts(calls: Iterable[CallRecord]) -> list[CallRecord]:
    return [call for call in calls if call.output_tokens == 1]


def _median_ttft_s(calls: Sequence[CallRecord]) -> float:
    return statistics.median(call.ttft_s for call in calls)


def _median_itl_s(calls: Sequence[CallRecord]) -> float:
    return statistics.median(call.itl_s for call in calls)


def _median_duration_s(calls: Sequence[CallRecord]) -> float:
    return statistics.median(call.ended_s - call.due_s for call in calls)

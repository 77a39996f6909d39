"""Random small clusters in which much goes wrong, each from one number.

A seed decides everything: workers and their sizes, the workload, what goes wrong and when. For
60 virtual seconds it does; then nothing more, until all calls have ended and all is quiet, and
the oracle has the last word.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import msgspec

from cluster.hardware import HARDWARE
from cluster.simulator.network import CORE
from cluster.simulator.oracle import OracleError
from cluster.simulator.setup import (
    ClusterSetup,
    EngineOptions,
    Faults,
    NetworkSetup,
    WorkerSetup,
)
from cluster.simulator.trouble import Trouble
from cluster.simulator.world import World, engine_facts, settle
from cluster.workload.form import Run, Workload
from cluster.workload.generators import GENERATORS
from cluster.workload.source import open_workload
from coordinator.core import Core
from coordinator.limits import Limits, Placement, Policy, Rebalance
from coordinator.protocol import DrainWorker, Role, TurnWorker
from coordinator.shape import ModelShape

FAULTY_S = 60.0
GOOD_S = 90.0
"""From then on all that went wrong is over, and what followed from it."""
CHECK_S = 2.0
"""Between two looks of the oracle at everything."""
WATCH_S = 0.5
"""Between two looks of the oracle at what the core believes, and at what engines do."""
RUNS = 16
CALLS_MAX = 200
"""Runs beyond this number of calls are left out."""
ARRIVALS_S = 110.0
PROMPT_SHARE = 0.7
"""Longest prompt, of what an engine can hold."""
LETTERS = 20_000
CHUNK_SEEDS = 8
TURNING_SHARE = 0.5
OPERATE_S = 3.0
OPERATOR = "operator"
ROLES: tuple[Role, ...] = ("prefill", "decode", "mixed")
SHAPE = ModelShape(
    name="small", layers=16, hidden=2048, heads=32, kv_heads=8, head_dim=64, ffn=8192, vocab=128256
)


class FaultReport(msgspec.Struct, frozen=True):
    """How a seed went. ``error``: what the oracle found, empty if all is well."""

    seed: int
    calls: int = 0
    outcomes: dict[str, int] = {}
    happened: dict[str, int] = {}
    counters: dict[str, int] = {}
    virtual_s: float = 0.0
    real_s: float = 0.0
    error: str = ""


def random_setup(rng: random.Random) -> ClusterSetup:
    """A small cluster with little memory, small batches and short patience."""
    roles = rng.choice((ROLES, ("prefill", "decode")))
    workers = tuple(
        WorkerSetup(
            f"w{number}", rng.choice(roles), f"node-{rng.randrange(3)}", f"rack-{rng.randrange(2)}"
        )
        for number in range(rng.randint(2, 6))
    )
    blocks = rng.choice((64, 256, 1024))
    options = EngineOptions(
        max_num_seqs=rng.choice((2, 8, 32)),
        max_num_batched_tokens=rng.choice((64, 256, 4096)),
        max_model_len=rng.choice((1024, 8192)),
        kv_blocks=blocks,
        kv_lease_s=rng.choice((6.0, 12.0, 30.0)),
        startup_s=rng.choice((2.0, 8.0)),
        # Slow steps, so that what goes wrong finds something in progress.
        step_overhead_s=rng.choice((0.005, 0.03, 0.1)),
    )
    limits = Limits(
        queue_calls=rng.choice((8, 64)),
        calls_per_worker=rng.choice((4, 32)),
        prefills_per_worker=rng.choice((2, 8)),
        queue_s=rng.choice((5.0, 20.0)),
        prefill_s=rng.choice((5.0, 10.0)),
        first_token_s=rng.choice((5.0, 10.0)),
        decode_check_s=5.0,
        check_s=2.0,
        call_s=rng.choice((30.0, 60.0)),
        probe_s=3.0,
        pull_s=0.5,
        recent_calls=rng.choice((4, 256)),
    )
    network = NetworkSetup(
        message_s=rng.choice((200e-6, 5e-3)),
        message_jitter_s=rng.choice((0.0, 5e-3)),
        same_rack=rng.choice(("rdma", "tcp")),
        across="tcp",
        rack_bytes_per_s=rng.choice((0.0, 1e9)),
    )
    return ClusterSetup(
        shape=SHAPE,
        hardware=HARDWARE["h100"],
        workers=workers,
        options=options,
        network=network,
        limits=limits,
        placement=Placement(
            remote_prefill_min_tokens=rng.choice((1, 16, 256)),
            reserve_output_tokens=rng.choice((16, 256)),
            retention=True,
        ),
        api_servers=rng.randint(1, 2),
    )


def random_faults(rng: random.Random) -> Faults:
    """Some kinds of trouble, each a little or much of it."""
    return Faults(
        loss=rng.choice((0.0, 0.002, 0.01, 0.05)),
        duplication=rng.choice((0.0, 0.02, 0.1)),
        delay=rng.choice((0.0, 0.05, 0.3)),
        delay_s=rng.choice((0.1, 1.0, 5.0)),
        crash_every_s=rng.choice((0.0, 6.0, 30.0)),
        hang_every_s=rng.choice((0.0, 10.0, 30.0)),
        slow_every_s=rng.choice((0.0, 10.0, 30.0)),
        core_restart_every_s=rng.choice((0.0, 0.0, 10.0, 30.0)),
        partition_every_s=rng.choice((0.0, 0.0, 15.0, 30.0)),
        abort=rng.choice((0.0, 0.05, 0.2)),
        until_s=FAULTY_S,
    )


def random_workload(rng: random.Random, seed: int, tokens_max: int) -> Workload:
    """Small runs of some generated workflow that arrive while things go wrong, and after.

    Few of them are too long for an engine that can hold ``tokens_max`` tokens.
    """
    shape = f"seed={seed}&pace=32&runs={RUNS}&calls=8&prompt_max={int(PROMPT_SHARE * tokens_max)}"
    kind, scale = rng.choice(sorted(GENERATORS)), rng.choice((16, 32, 64))
    workload = open_workload(f"generator:{kind}?scale={scale}&{shape}")
    if len(workload.runs) < RUNS // 2:
        workload = open_workload(f"generator:assistant?scale=64&{shape}")
    longer = rng.choice((1, 4, 16))
    kept: list[Run] = []
    calls = 0
    arrivals_s = sorted(rng.random() * ARRIVALS_S for _ in workload.runs)
    for run, arrival_s in zip(workload.runs, arrivals_s, strict=True):
        calls += len(run.calls)
        if calls <= CALLS_MAX or not kept:
            talk = tuple(
                msgspec.structs.replace(call, output_tokens=call.output_tokens * longer)
                for call in run.calls
            )
            kept.append(msgspec.structs.replace(run, arrival_s=arrival_s, calls=talk))
    return msgspec.structs.replace(workload, runs=tuple(kept))


def random_turns(rng: random.Random, setup: ClusterSetup) -> ClusterSetup:
    """The same cluster, in half of the cases with workers that turn for next to nothing."""
    if rng.random() < TURNING_SHARE:
        rebalance = Rebalance(
            mode="auto",
            interval_s=rng.choice((0.5, 2.0)),
            dwell_s=rng.choice((1.0, 4.0)),
            margin=0.0,
            itl_s=rng.choice((0.02, 0.2)),
            drain_s=rng.choice((2.0, 20.0)),
            step_s=rng.choice((0.5, 3.0)),
            prefill_chunk_tokens=rng.choice((0, 64)),
            decode_chunk_tokens=rng.choice((0, 16, 64)),
        )
        placement = msgspec.structs.replace(
            setup.placement,
            rebalance=rebalance,
            token_gap_s=rng.choice((0.0, 0.1)),
            prefill_workers_decode=rng.choice((False, True)),
        )
        return msgspec.structs.replace(setup, placement=placement)
    return setup


def run_fault_seed(
    seed: int,
    policy: Policy = "pythia",
    api_crashes: bool = True,
    turns: bool = True,
    core_factory: Callable[[Limits, Placement, str], Core] = Core,
    moves: bool = True,
    hosts: bool = False,
) -> FaultReport:
    """Simulate what a seed says, with a placement policy. OracleError if anything happens that
    must not, or breaks.

    ``api_crashes``: API processes crash, too, if the seed says so; ``turns``: workers turn, and
    are asked to by operators at random moments; ``moves``: running calls are moved, likewise;
    ``hosts``: engines keep KV in their hosts' memory, too.
    ``core_factory``: makes the cores, from limits, placement and id.
    """
    began_s = time.perf_counter()
    rng = random.Random(f"{seed}/faults")
    setup, faults = random_setup(rng), random_faults(rng)
    placement = msgspec.structs.replace(setup.placement, policy=policy)
    setup = msgspec.structs.replace(setup, placement=placement)
    if api_crashes:
        # By chance of its own: all else is as it would be without.
        every_s = random.Random(f"{seed}/api crashes").choice((0.0, 0.0, 10.0, 30.0))
        faults = msgspec.structs.replace(faults, api_crash_every_s=every_s)
    if moves:
        every_s = random.Random(f"{seed}/moves").choice((0.0, 0.1, 0.5))
        faults = msgspec.structs.replace(faults, move_every_s=every_s)
    if hosts:
        chance = random.Random(f"{seed}/hosts")
        host_bytes = chance.choice((32, 128, 1280)) * setup.block_bytes()
        setup = msgspec.structs.replace(
            setup,
            # So little that there is something to load.
            options=msgspec.structs.replace(setup.options, kv_blocks=64),
            kv_host_gib=host_bytes / 2**30,
            host_bytes_per_s=chance.choice((1e8, 20e9)),
        )
    workload = random_workload(rng, seed, engine_facts(setup).max_model_len)
    turning = random.Random(f"{seed}/turns")
    if turns:
        setup = random_turns(turning, setup)
    world = World(setup, workload, faults, seed, core_factory=core_factory, letters=LETTERS)
    trouble = Trouble(world, rng)
    world.start()
    trouble.start()
    world.events.after(CHECK_S, _keep_checking, world)
    world.events.after(WATCH_S, _keep_watching, world)
    if setup.placement.rebalance.mode == "auto":
        world.events.after(OPERATE_S, _keep_operating, world, turning)
    limits, lease_s = setup.limits, setup.options.kv_lease_s
    try:
        world.run()
        settle(world, limits.call_s + limits.wait_s + 2 * lease_s)
        world.oracle.served_well(world.recorder.calls, GOOD_S)
    except OracleError:
        raise
    except Exception as error:
        # Whatever breaks down, it is this seed that does it.
        at_s = world.events.now_s
        raise OracleError(f"seed {seed} at {at_s:.6f} s: {error!r}") from error
    result = world.result("faults")
    return FaultReport(
        seed=seed,
        calls=len(result.calls),
        outcomes=dict(sorted(Counter(call.outcome for call in result.calls).items())),
        happened=dict(sorted(trouble.happened.items())),
        counters=result.totals.counters,
        virtual_s=world.events.now_s,
        real_s=time.perf_counter() - began_s,
    )


def _keep_checking(world: World) -> None:
    world.check()
    if world.events.now_s < FAULTY_S:
        world.events.after(CHECK_S, _keep_checking, world)


def _keep_watching(world: World) -> None:
    if world.brain.running:
        world.oracle.watch(world.brain.core, world.apis)
    world.oracle.watch_engines(world.workers(), world.apis)
    world.events.after(WATCH_S, _keep_watching, world)


def _keep_operating(world: World, rng: random.Random) -> None:
    """Somebody turns or drains workers, also such as turn already, and undoes it."""
    name = rng.choice(sorted(world.hosts))
    wish = rng.choice(
        (
            TurnWorker(1, name, "prefill"),
            TurnWorker(1, name, "decode"),
            DrainWorker(1, name),
            DrainWorker(1, name, undo=True),
        )
    )
    if world.events.now_s < FAULTY_S:
        world.network.send(OPERATOR, CORE, wish)
        world.events.after(OPERATE_S * (0.5 + rng.random()), _keep_operating, world, rng)
    else:
        for each in sorted(world.hosts):
            world.network.send(OPERATOR, CORE, DrainWorker(1, each, undo=True))
        world.events.after(OPERATE_S, _undo_again, world)


def _undo_again(world: World) -> None:
    """What was lost on its way, or came to a core that was away."""
    for each in sorted(world.hosts):
        world.network.send(OPERATOR, CORE, DrainWorker(1, each, undo=True))


def run_many(
    seeds: Iterable[int],
    processes: int = 1,
    progress: Callable[[FaultReport], None] | None = None,
) -> list[FaultReport]:
    """Simulate many seeds, in order of the seeds; a report with ``error`` for those that fail.

    ``progress`` is told of each as it is done.
    """
    seeds = list(seeds)
    reports: list[FaultReport] = []
    if processes <= 1:
        for seed in seeds:
            reports += _run_chunk([seed])
            if progress is not None:
                progress(reports[-1])
        return reports
    chunks = [seeds[at : at + CHUNK_SEEDS] for at in range(0, len(seeds), CHUNK_SEEDS)]
    # Fresh processes: forking one that may have threads is not safe.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_run_chunk, chunk) for chunk in chunks]):
            for report in future.result():
                reports.append(report)
                if progress is not None:
                    progress(report)
    return sorted(reports, key=lambda report: report.seed)


def _run_chunk(seeds: list[int]) -> list[FaultReport]:
    reports = []
    for seed in seeds:
        try:
            reports.append(run_fault_seed(seed))
        except OracleError as error:
            reports.append(FaultReport(seed=seed, error=str(error)))
    return reports

"""``pythia simulate --validate``: the same small workload on a real cluster and in the simulator.

Starts a cluster on this machine, replays the workload on it a few times, then simulates the
same with a cluster made like that one (``likeness``), and prints both beside each other.
What the simulator is told was measured by a calibration of the engine and by probes before and
after each replay; nothing of the replays themselves goes into it.

Times can only agree as well as the real ones repeat themselves: their spread is shown, and how
much of the processors other programs used meanwhile.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil
import uvloop
from rich.console import Console
from rich.progress import Progress

from cluster import calibrate
from cluster.bench.report import table, write
from cluster.bench.sides import cluster_config, cpu_s, process_cpu_s, progress_bar, scratch
from cluster.calibration import Calibration, load
from cluster.config import worker_config
from cluster.launch import LocalCluster
from cluster.model import resolve
from cluster.process import usable_cores
from cluster.progress import progress_for
from cluster.schema import ClusterConfig
from cluster.simulator.compare import Compared, compared, figures
from cluster.simulator.compare_plot import draw
from cluster.simulator.facts import worker_facts
from cluster.simulator.failure import SimulationError
from cluster.simulator.likeness import KINDS, Constants, Kind, constants_of, probe, setup_like
from cluster.simulator.live import LiveReplay, Target
from cluster.simulator.records import Result
from cluster.simulator.setup import ClusterSetup
from cluster.simulator.world import simulate
from cluster.workload.change import Poisson, mixed, with_arrivals
from cluster.workload.form import Workload, call_count
from cluster.workload.source import open_workload
from coordinator.limits import Placement
from coordinator.protocol import EngineFacts

COMMAND = "pythia simulate --validate"
SEEDS = 3
"""Simulations; all that chance does in them is when workers beat."""
ROLES = ("prefill", "decode")
GENERATED = (
    "generator:review?runs=6&seed=1&scale=16&prompt_max=2500&pace=8",
    "generator:fanout?runs=12&seed=1&scale=16&prompt_max=2500&pace=8",
    "generator:chain?runs=6&seed=1&scale=4&prompt_max=2500&pace=8",
)
TRACES = ("whowhen.jsonl.gz?runs=8&prompt_max=2500&pace=8",)
RUNS_PER_S = 0.4
DISTURBED = 0.1
"""From this share of the processors' time on, other programs are told of."""


class ValidationError(SimulationError):
    """The comparison would mean nothing, and why."""


class Live(msgspec.Struct, kw_only=True):
    """What was measured on the real cluster. ``others_share``: of all cores' time during each
    replay, what programs used that have nothing to do with it."""

    facts: EngineFacts
    calibration: Calibration
    results: list[Result] = []
    probes: dict[Kind, list[Result]] = {}
    bytes_per_s: float = 0.0
    others_share: list[float] = []


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What is compared. ``workloads``: lines as ``open_workload`` takes them, all at once;
    by default generated ones and, with a folder of ``traces``, some of those."""

    workloads: Sequence[str] = ()
    traces: Path | None = None
    runs_per_s: float = RUNS_PER_S
    model: str = "tiny-llama"
    roles: Sequence[str] = ROLES
    repeats: int = 4
    calibration: Path | None = None


def workload_of(options: Options) -> Workload:
    """All that is replayed, its runs arriving at random."""
    lines = list(options.workloads or GENERATED)
    if options.traces is not None and not options.workloads:
        lines += [str(options.traces / trace) for trace in TRACES]
    whole = mixed([open_workload(line) for line in lines], "validation")
    rng = random.Random(0)
    runs = list(whole.runs)
    rng.shuffle(runs)
    whole = msgspec.structs.replace(whole, runs=tuple(runs))
    return with_arrivals(whole, Poisson(options.runs_per_s), rng)


def config_of(options: Options) -> ClusterConfig:
    """The cluster: one worker per role on this machine.

    Its placement does not go by how fast engines turn out to be: calls that are slower here than
    in the simulator still go the same ways.
    """
    placement = Placement(policy="least_kv")
    return cluster_config("validate", options.model, options.roles, placement=placement)


def measure(options: Options, workload: Workload, console: Console) -> Live:
    """Calibrate, start the cluster, probe it and replay the workload, in turns."""
    config = config_of(options)
    if options.calibration is not None:
        calibration = load(options.calibration)
    else:
        worker = worker_config(config, config.workers[0].name, resolve(config.model))
        calibration = calibrate.run(worker, calibrate.Plan(), None, console)
    calls = call_count(workload)
    with (
        scratch() as folder,
        LocalCluster(config, folder, progress=progress_for(console)) as cluster,
        progress_bar(console, options.repeats * calls) as progress,
    ):
        facts = worker_facts(cluster.control_address, len(config.workers))
        live = Live(facts=facts[config.workers[-1].name], calibration=calibration)
        for repeat in range(options.repeats):
            _take_turn(cluster, workload, live, progress, repeat)
        _probe(cluster, live, progress, "at the end")
        speeds = [link.bytes_per_s for link in cluster.snapshot().links if link.bytes_per_s]
        live.bytes_per_s = statistics.median(speeds) if speeds else 0.0
    return live


def _take_turn(
    cluster: LocalCluster, workload: Workload, live: Live, progress: Progress, repeat: int
) -> None:
    _probe(cluster, live, progress, f"round {repeat + 1}")
    task = progress.task_ids[0]
    target = target_of(cluster, live.calibration.shape.vocab)
    progress.update(task, description=f"round {repeat + 1}: replay")
    before_s, began_s = _others_s(cluster), time.monotonic()
    replay = LiveReplay(target, workload, progress=lambda ended: progress.advance(task))
    result = uvloop.run(replay.run())
    others_s, elapsed_s = _others_s(cluster) - before_s, time.monotonic() - began_s
    if failed := sum(call.outcome != "length" for call in result.calls):
        raise ValidationError(f"{failed} calls were not served; the log says why")
    live.results.append(result)
    live.others_share.append(max(0.0, others_s) / (elapsed_s * usable_cores()))


def _probe(cluster: LocalCluster, live: Live, progress: Progress, when: str) -> None:
    target = target_of(cluster, live.calibration.shape.vocab)
    for kind in KINDS:
        progress.update(progress.task_ids[0], description=f"{when}: probe {kind}")
        result = uvloop.run(LiveReplay(target, probe(kind, cluster.config)).run(kind))
        live.probes.setdefault(kind, []).append(result)


def target_of(cluster: LocalCluster, vocabulary: int) -> Target:
    """Where to send calls. Control tokens are at one end of a vocabulary or the other."""
    config = cluster.config
    return Target(cluster.base_url, config.served_name, vocabulary // 4, vocabulary // 2)


def _others_s(cluster: LocalCluster) -> float:
    """Processor seconds that were used by anybody but the cluster and us."""
    ours_s = process_cpu_s(os.getpid())
    ours_s += sum(cpu_s(process) for process in cluster.processes.values())
    times = psutil.cpu_times()
    # What guests used is part of user's.
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice) - ours_s


def likened(options: Options, live: Live) -> tuple[ClusterSetup, Constants]:
    """The simulated cluster, and what was found for it by probes."""
    config = config_of(options)

    def make(constants: Constants) -> ClusterSetup:
        return setup_like(config, live.facts, live.calibration, constants)

    constants = constants_of(config, live.probes, live.bytes_per_s, make)
    return make(constants), constants


def simulated(setup: ClusterSetup, workload: Workload) -> list[Result]:
    """The same in virtual time, from several seeds."""
    return [
        simulate(setup, workload, seed, configuration="validation", limited=True)
        for seed in range(SEEDS)
    ]


def main(
    json_path: Path | None = None,
    plot_path: Path | None = None,
    options: Options | None = None,
    console: Console | None = None,
) -> int:
    """The command: a table, and files where paths are given. ValidationError, LikenessError,
    LiveError if there is nothing to compare; LaunchError if the cluster does not start."""
    console, options = console or Console(), options or Options()
    workload = workload_of(options)
    live = measure(options, workload, console)
    setup, constants = likened(options, live)
    results = simulated(setup, workload)
    rows = compared(live.results, results)
    found = figures(rows) | {"others_share": max(live.others_share)}
    write(json_path, COMMAND, found, [msgspec.to_builtins(row) for row in rows])
    title = f"{call_count(workload)} calls in {len(workload.runs)} runs, {options.repeats} rounds"
    table(console, title, [shown(row) for row in rows])
    console.print(constants, highlight=False)
    if max(live.others_share) > DISTURBED:
        shares = ", ".join(f"{share:.0%}" for share in live.others_share)
        console.print(f"[yellow]other programs used {shares} of the processors meanwhile")
    if plot_path is not None:
        plot_path.parent.mkdir(parents=True, exist_ok=True)
        draw(plot_path, live.results, results, f"{options.model}, {title}")
        console.print(f"drawn in {plot_path}", highlight=False, soft_wrap=True)
    return 0


def shown(row: Compared) -> dict[str, float | str]:
    """A row for people."""
    return {
        "figure": row.name,
        "unit": row.unit,
        "real": row.real,
        "spread %": 100 * row.spread,
        "simulated": row.simulated,
        "error %": "-" if row.error is None else 100 * row.error,
    }

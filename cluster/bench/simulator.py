"""How fast whole clusters are simulated, and how decisions of the core grow with the cluster.

One process replays generated workflows until about ``calls`` calls have been served by
``workers`` simulated workers, with nothing else beside it; its time and its largest memory
count, making the workload apart. Then the core alone decides (``bench core``) in clusters
of several sizes: that is what grows when clusters do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import msgspec
from matplotlib.figure import Figure

from cluster.bench import core
from cluster.bench.report import table, write
from cluster.calibration import SHIPPED, load
from cluster.simulator.baselines import BASELINES, applied, core_factory, prefill_workers
from cluster.simulator.setup import ClusterSetup, WorkerSetup
from cluster.simulator.world import simulate
from cluster.terminal import table_console
from cluster.workload.form import Workload, call_count
from cluster.workload.source import open_workload

COMMAND = "pythia bench simulator"
MODEL = "llama-3.1-8b-h200-tp1"
ENGINES_PER_NODE = 8
NODES_PER_RACK = 4
RATIO = (1, 1)
CALLS_PER_RUN = 35
"""About; the workload is cut to the number of calls that was asked for."""
RUNS_PER_S_AND_WORKER = 0.045
"""Keeps engines busy and no queue growing."""
NAMED_CALLS, NAMED_WORKERS = 100_000, 64
"""What the figure in seconds is of, whatever was simulated."""
DECISION_CALLS = 4000
PLAIN_COLUMNS = 120


class Simulated(msgspec.Struct):
    """One simulation: what was simulated, and what it took, by the clock and of one core."""

    calls: int
    workers: int
    served: int
    virtual_s: float
    workload_s: float
    real_s: float
    processor_s: float
    peak_rss_gib: float


def main(
    json_path: Path | None = None,
    calls: int = NAMED_CALLS,
    workers: int = NAMED_WORKERS,
    configuration: str = "pythia",
    sizes: str = "8,64,256,1024",
    repeats: int = 3,
    seed: int = 0,
    plot: str = "",
) -> int:
    """The command. ``sizes``: of clusters in which decisions are timed, the median of
    ``repeats`` each; ``plot``: a PNG file of these."""
    counts = [int(size) for size in sizes.split(",") if size]
    console = table_console(PLAIN_COLUMNS)
    with console.status(f"simulating {calls:,} calls on {workers} workers"):
        simulated = in_a_process(calls, workers, configuration, seed)
    rows: list[dict[str, float | str]] = [
        {"part": "simulation", **msgspec.structs.asdict(simulated)}
    ]
    decisions: list[dict[str, float]] = []
    with console.status("deciding") as status:
        for count in counts:
            status.update(f"deciding in a cluster of {count} workers")
            for number in range(1, repeats + 1):
                measured = core.run(count, DECISION_CALLS, seed=seed + number)
                decisions.append({"workers": count, "run": number, **measured})
    rows += [{"part": "decisions", **row} for row in decisions]
    figures = figures_of(simulated, decisions)
    write(json_path, COMMAND, figures, rows)
    table(console, "simulation", [msgspec.structs.asdict(simulated)])
    if decisions:
        table(console, "decisions of the core", decisions)
    table(console, "figures", [{"figure": name, "value": value} for name, value in figures.items()])
    if plot and decisions:
        draw(Path(plot), decisions)
        console.print(f"drawn in {plot}", highlight=False, soft_wrap=True)
    return 0


def figures_of(simulated: Simulated, decisions: Sequence[dict[str, float]]) -> dict[str, float]:
    """``seconds_100k_calls_64_workers`` only if that was simulated; medians of decisions."""
    figures = {
        "calls_per_s": simulated.calls / simulated.real_s,
        "peak_rss_gib": simulated.peak_rss_gib,
        "served_share": simulated.served / simulated.calls,
    }
    if (simulated.calls, simulated.workers) == (NAMED_CALLS, NAMED_WORKERS):
        figures["seconds_100k_calls_64_workers"] = simulated.real_s
    for count, values in _by_size(decisions).items():
        figures[f"decision_us_at_{count}_workers"] = median(values)
    return figures


def in_a_process(calls: int, workers: int, configuration: str, seed: int) -> Simulated:
    """One simulation in a process of its own, whose memory is nothing but its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        answer = pool.submit(_simulated, calls, workers, configuration, seed).result()
    return msgspec.json.decode(answer, type=Simulated)


def _simulated(calls: int, workers: int, configuration: str, seed: int) -> bytes:
    began_s = time.perf_counter()
    workload = workload_of(calls, workers, seed)
    made_s, used_s = time.perf_counter(), time.process_time()
    baseline = BASELINES[configuration]
    setup = applied(baseline, cluster_of(workers), prefill_workers(workers, *RATIO))
    result = simulate(
        setup,
        workload,
        seed,
        configuration=configuration,
        core_factory=core_factory(baseline, setup, workload),
    )
    ended_s, processor_s = time.perf_counter(), time.process_time() - used_s
    found = Simulated(
        calls=call_count(workload),
        workers=workers,
        served=sum(call.outcome in ("stop", "length") for call in result.calls),
        virtual_s=result.totals.duration_s,
        workload_s=made_s - began_s,
        real_s=ended_s - made_s,
        processor_s=processor_s,
        peak_rss_gib=peak_rss_bytes() / 2**30,
    )
    return msgspec.json.encode(found)


def workload_of(calls: int, workers: int, seed: int) -> Workload:
    """Teams of agents, as many calls as were asked for."""
    runs = 2 * math.ceil(calls / CALLS_PER_RUN) + 10
    rate = RUNS_PER_S_AND_WORKER * workers
    options = f"runs={runs}&rate={rate}&seed={seed}&prompt_max=100000&pause_max=30"
    workload = open_workload(f"generator:review?{options}")
    kept, left = [], calls
    for run in workload.runs:
        if left <= 0:
            break
        kept.append(msgspec.structs.replace(run, calls=run.calls[:left]))
        left -= len(kept[-1].calls)
    return msgspec.structs.replace(workload, runs=tuple(kept))


def cluster_of(workers: int) -> ClusterSetup:
    """Engines on nodes in racks, none with a role."""
    calibration = load(SHIPPED / f"{MODEL}.json")
    return ClusterSetup(
        shape=calibration.shape,
        hardware=calibration.hardware,
        efficiency=calibration.efficiency,
        tp=calibration.tp,
        workers=tuple(
            WorkerSetup(
                name=f"worker-{number:04}",
                role="mixed",
                node=f"node-{number // ENGINES_PER_NODE}",
                rack=f"rack-{number // (ENGINES_PER_NODE * NODES_PER_RACK)}",
            )
            for number in range(workers)
        ),
    )


def peak_rss_bytes() -> int:
    """The most memory that this process has had, without what its parent had before it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not say VmHWM")


def _by_size(decisions: Sequence[dict[str, float]]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for row in decisions:
        found.setdefault(int(row["workers"]), []).append(row["decision_us_p50"])
    return found


def draw(path: Path, decisions: Sequence[dict[str, float]]) -> None:
    """Time of a decision over the number of workers, and what logarithmic growth would be."""
    by_size = {count: median(values) for count, values in _by_size(decisions).items()}
    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    ax = figure.subplots()
    for row in decisions:
        ax.plot(row["workers"], row["decision_us_p50"], "o", color="#9ec3e6", markersize=5)
    ax.plot(list(by_size), list(by_size.values()), "o-", color="#1f77b4", label="median")
    first, first_us = next(iter(by_size.items()))
    if first > 1:
        growing = [first_us * math.log(count) / math.log(first) for count in by_size]
        ax.plot(list(by_size), growing, "--", color="#888888", label="logarithmic growth")
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(by_size), [str(count) for count in by_size])
    ax.set_ylim(bottom=0)
    ax.set_xlabel("workers")
    ax.set_ylabel("a decision, microseconds (P50)")
    ax.grid(alpha=0.3, linewidth=0.6)
    ax.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)

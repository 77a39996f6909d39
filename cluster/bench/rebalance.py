"""What it brings to turn workers as the mix of prefill and decode changes.

``pythia bench rebalance [--plot PNG] [--trace LINE]``: replays in the simulator, on eight engines
of a calibrated model, of

* ``swing``: agents that read, then write, in waves (``cluster.workload.swing``): uncached prompt
  tokens for each answer's token change by more than five times within a wave;
* ``steady``: the same tasks, evenly;
* with ``--trace`` a recorded workload, a line as ``cluster.workload.source`` takes it,

each with every static ratio, kept apart (``static-N``: N workers prefill) and with the routing of
other systems (``static-sticky-N``), without roles (``mixed``), with reactive control
(``pd-reactive``), with ours, with ours where prefill workers may decode, too
(``pythia-rebalance-shared``), and with an oracle that knows the mix to come (``rebalance-oracle``).
Goodput is calls that are served within ``--ttft-s`` and ``--itl-s``, out of the same calls for all.

* ``goodput_vs_best_static``, ``goodput_vs_reactive``, ``goodput_vs_oracle``: ours over the best
  static one of all kinds and numbers, mixed included, over reactive control and over the oracle, on
  ``swing``; the same of a trace begin with ``trace.``. ``goodput_vs_best_static_routed``: over the
  best one with the routing of other systems.
* ``flips_per_worker_per_hour`` on ``swing``, ``mix_swing``: the 95th over the 5th percentile of
  uncached prompt tokens for each answer's token in half minutes of it.
* ``steady_mix_loss``: what ours loses against the best static one on ``steady``, as a share;
  ``steady_flips_late``: turns there after the first two minutes.

With ``--real`` instead: workers of a live cluster on this machine turn under load, see
``rebalance_real``.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from cluster.bench.report import table, write
from cluster.simulator.baselines import BASELINES, Baseline, applied, core_factory
from cluster.simulator.measures import figures
from cluster.simulator.records import CallRecord, Result
from cluster.simulator.setup import ClusterSetup, EngineOptions, Slo, WorkerSetup
from cluster.simulator.subject import find_subject
from cluster.simulator.world import simulate
from cluster.workload.form import Workload
from cluster.workload.source import open_workload
from cluster.workload.swing import Swing, swinging
from coordinator.limits import Limits, Placement, Rebalance

MODEL = "llama-3.1-70b-h200-tp4"
WORKERS = 8
PREFILLS_PER_WORKER = 64
"""Prompts may wait on workers: a full one must not hold up calls that need no prompt computed."""
WINDOW_S = 30.0
LATE_S = 120.0
OURS, REACTIVE, ORACLE, MIXED = "pythia-rebalance", "pd-reactive", "rebalance-oracle", "mixed"
SHARED = "pythia-rebalance-shared"
STATIC, ROUTED = "static", "static-sticky"
KINDS = {STATIC: "pythia-no-shared-roles", ROUTED: "pd-sticky-conditional", MIXED: "pythia-mixed"}


class Replayed(NamedTuple):
    """One replay. ``good``: share of all calls that were served within the limits."""

    name: str
    good: float
    result: Result
    figures: dict[str, float]


class Bench(NamedTuple):
    """What all replays have in common."""

    setup: ClusterSetup
    slo: Slo
    tell: Callable[[str], None]

    def replay(self, name: str, workload: Workload) -> Replayed:
        """A configuration; ``static-3``: three of the workers prefill."""
        kind, _, number = name.rpartition("-")
        baseline = BASELINES[KINDS.get(name, "") or KINDS.get(kind, "") or name]
        count = int(number) if kind in KINDS else len(self.setup.workers) // 2
        began_s = time.monotonic()
        result = _simulated(baseline, applied(baseline, self.setup, count), workload, name)
        found = figures(result, self.slo)
        took_s = time.monotonic() - began_s
        self.tell(f"{workload.name}, {name}: {found['goodput_calls_share']:.1%}, {took_s:.0f} s")
        return Replayed(name, found["goodput_calls_share"], result, found)


def _simulated(baseline: Baseline, setup: ClusterSetup, workload: Workload, name: str) -> Result:
    future = baseline.future(workload, setup) if baseline.future is not None else None
    return simulate(
        setup,
        workload,
        configuration=name,
        core_factory=core_factory(baseline, setup, workload, future=future),
        began=future.begin if future is not None else None,
    )


def cluster(slo: Slo, model: str = MODEL, workers: int = WORKERS) -> ClusterSetup:
    """Engines of a calibrated model, two on each node, whose promises the core knows."""
    subject = find_subject(model, None, None, None, Path())
    per_node = max(1, 8 // subject.tp)
    return ClusterSetup(
        subject.shape,
        subject.hardware,
        tuple(
            WorkerSetup(f"w{number:02}", "mixed", f"node-{number // per_node}")
            for number in range(workers)
        ),
        subject.efficiency,
        subject.tp,
        options=EngineOptions(max_model_len=131072),
        limits=Limits(prefills_per_worker=PREFILLS_PER_WORKER),
        placement=Placement(token_gap_s=slo.itl_s, rebalance=Rebalance(itl_s=slo.itl_s)),
    )


def main(
    json_path: Path | None = None,
    plot: str = "",
    trace: str = "",
    waves: int = 3,
    tasks: int = 300,
    seed: int = 0,
    ttft_s: float = 2.0,
    itl_s: float = 0.03,
    trace_ttft_s: float = 5.0,
    counts: str = "1,2,3,4,5,6,7",
    real: bool = False,
    flips: int = 50,
    model: str = "",
) -> int:
    """The command. ``counts``: numbers of prefill workers that are tried."""
    console = Console()
    if real:
        from cluster.bench.rebalance_real import main as run_real

        return run_real(json_path, model or None, flips, console)
    slo, trace_slo = Slo(ttft_s, itl_s), Slo(trace_ttft_s, itl_s)
    numbers = [int(number) for number in counts.split(",") if number]
    found: dict[str, float] = {}
    rows: list[dict[str, object]] = []
    with console.status("simulating") as status:
        bench = Bench(cluster(slo, model or MODEL), slo, console.log)
        status.update("simulating, a line for each replay")
        swing = swinging(Swing(waves=waves, tasks=tasks), random.Random(seed))
        replays = _all(bench, swing, numbers, [STATIC, ROUTED])
        found |= _compared(replays) | _flips(replays[OURS], bench)
        found["mix_swing"] = mix_swing(replays[OURS].result)
        rows += _rows(swing.name, replays)
        steady = swinging(Swing(waves=waves, tasks=tasks, steady=True), random.Random(seed))
        calm = {
            name: bench.replay(name, steady) for name in [OURS, *_named([STATIC], numbers), MIXED]
        }
        found |= _steady(calm)
        rows += _rows(steady.name, calm)
        if trace:
            recorded = open_workload(trace)
            other = bench._replace(slo=trace_slo)
            traced = _all(other, recorded, numbers, [STATIC, ROUTED])
            found |= {f"trace.{name}": value for name, value in _compared(traced).items()}
            found["trace.mix_swing"] = mix_swing(traced[OURS].result)
            rows += _rows(recorded.name, traced)
    write(json_path, "pythia bench rebalance", found, rows)
    table(console, f"{WORKERS} workers, {model or MODEL}", rows)
    table(console, "figures", [{"figure": key, "value": value} for key, value in found.items()])
    if plot:
        from cluster.bench.rebalance_plot import draw

        draw(Path(plot), {name: replays[name].result for name in _shown(replays)}, slo)
        console.print(f"drawn into {plot}")
    return 0


def _named(kinds: list[str], numbers: list[int]) -> list[str]:
    return [f"{kind}-{number}" for kind in kinds for number in numbers]


def _all(
    bench: Bench, workload: Workload, numbers: list[int], kinds: list[str]
) -> dict[str, Replayed]:
    names = [OURS, SHARED, ORACLE, REACTIVE, MIXED, *_named(kinds, numbers)]
    return {name: bench.replay(name, workload) for name in names}


def best_static(replays: dict[str, Replayed], kind: str = "") -> Replayed:
    """The one with the most good calls, of all kinds or of one."""
    static = [
        one
        for name, one in replays.items()
        if (name == MIXED and not kind) or name.rpartition("-")[0] in ([kind] if kind else KINDS)
    ]
    return max(static, key=lambda one: one.good)


def _compared(replays: dict[str, Replayed]) -> dict[str, float]:
    ours = replays[OURS].good
    return {
        "goodput_vs_best_static": ours / best_static(replays).good,
        "goodput_vs_best_static_routed": ours / best_static(replays, ROUTED).good,
        "goodput_vs_reactive": ours / replays[REACTIVE].good,
        "goodput_vs_oracle": ours / replays[ORACLE].good,
        "goodput_share": ours,
        "goodput_share_shared_roles": replays[SHARED].good,
    }


def _flips(ours: Replayed, bench: Bench) -> dict[str, float]:
    hours = ours.result.totals.duration_s / 3600.0
    return {
        "flips_per_worker_per_hour": ours.result.totals.flips / len(bench.setup.workers) / hours,
        "flips_per_worker_per_hour_most": 3600.0 / bench.setup.placement.rebalance.dwell_s,
    }


def _steady(replays: dict[str, Replayed]) -> dict[str, float]:
    ours = replays[OURS]
    return {
        "steady_mix_loss": 1.0 - ours.good / best_static(replays).good,
        "steady_flips": float(ours.result.totals.flips),
        "steady_flips_late": float(late_turns(ours.result, LATE_S)),
    }


def late_turns(result: Result, after_s: float) -> int:
    """How many changes of workers' roles were seen after a moment of the replay."""
    roles: dict[str, str] = {}
    count = 0
    for sample in result.samples:
        before = roles.get(sample.worker)
        roles[sample.worker] = sample.role
        count += before is not None and before != sample.role and sample.at_s > after_s
    return count


def mix_swing(result: Result) -> float:
    """How much the mix of uncached prompt tokens and answers' tokens swings between windows."""
    prompt: dict[int, float] = {}
    answer: dict[int, float] = {}
    for call in result.calls:
        prompt[int(call.due_s / WINDOW_S)] = (
            prompt.get(int(call.due_s / WINDOW_S), 0.0) + call.computed_tokens
        )
        for window, tokens in answered(call, WINDOW_S).items():
            answer[window] = answer.get(window, 0.0) + tokens
    # The last windows are of what is left over, and say nothing of the load.
    last = max(prompt, default=0)
    ratios = sorted(
        (prompt.get(window, 0.0) + 1.0) / (answer.get(window, 0.0) + 1.0)
        for window in range(1, last)
    )
    if not ratios:
        return 1.0
    return ratios[int(0.95 * (len(ratios) - 1))] / ratios[int(0.05 * len(ratios))]


def answered(call: CallRecord, window_s: float) -> dict[int, float]:
    """A call's tokens by the window in which they came, evenly over its decoding."""
    if not call.first_token_s or call.ended_s <= call.first_token_s:
        return {}
    first, last = int(call.first_token_s / window_s), int(call.ended_s / window_s)
    return {
        window: call.output_tokens
        * max(
            0.0,
            min(call.ended_s, (window + 1) * window_s) - max(call.first_token_s, window * window_s),
        )
        / (call.ended_s - call.first_token_s)
        for window in range(first, last + 1)
    }


def _rows(workload: str, replays: dict[str, Replayed]) -> list[dict[str, object]]:
    return [
        {
            "workload": workload,
            "configuration": name,
            "good calls": one.good,
            "TTFT mean s": one.figures["ttft_s_mean"],
            "TTFT P95 s": one.figures["ttft_s_p95"],
            "ITL mean ms": 1e3 * one.figures["itl_s_mean"],
            "ITL P95 ms": 1e3 * one.figures["itl_s_p95"],
            "completion s": one.figures["completion_s_mean"],
            "turns": one.result.totals.flips,
        }
        for name, one in replays.items()
    ]


def _shown(replays: dict[str, Replayed]) -> list[str]:
    return [OURS, ORACLE, REACTIVE, best_static(replays).name]

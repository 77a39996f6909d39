"""``pythia plan``: how to split GPUs between prefill and decode for a workload, by simulation.

Of a model on so many GPUs every tensor parallel size that the devices allow and every number of
prefill workers is simulated with the workload, as well as workers without roles; best is what
serves most calls within the limits, among equals what takes least time. Then the best one with
roles that follow demand, kept apart and as mere preferences, to see what that would add.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from cluster.bench.report import table, write
from cluster.failure import CommandFailure
from cluster.simulator.baselines import BASELINES, applied, core_factory
from cluster.simulator.measures import figures
from cluster.simulator.setup import ClusterSetup, EngineOptions, Slo, WorkerSetup
from cluster.simulator.subject import Subject, SubjectError, find_subject, shipped
from cluster.simulator.world import simulate
from cluster.workload.form import Workload
from cluster.workload.source import open_workload
from coordinator.cost import DoesNotFit
from coordinator.limits import Limits, Placement, Rebalance

TENSOR_PARALLEL = (1, 2, 4, 8)
MIXED, STATIC, FOLLOWING = "pythia-mixed", "pythia-no-shared-roles", "pythia-rebalance"
PREFERRED = "pythia-rebalance-shared"
PREFILLS_PER_WORKER = 64
PLACES = re.compile(r"-tp[0-9]+$")


class Split(NamedTuple):
    """One way. ``prefill`` 0: no roles."""

    tp: int
    workers: int
    prefill: int
    kind: str


class Outcome(NamedTuple):
    """What came of one. ``good``: share of calls within the limits."""

    split: Split
    good: float
    completion_s: float
    ttft_s: float
    itl_s: float
    turns: int

    @property
    def rank(self) -> tuple[float, float]:
        """The best is the largest. A thousandth of the calls is no difference."""
        return round(self.good, 3), -self.completion_s


class Wanted(NamedTuple):
    """What the command is asked for."""

    model: str
    gpus: int
    workload: Workload
    slo: Slo
    hardware: str | None = None
    tp: int | None = None
    max_model_len: int = 131072


def splits(gpus: int, tp: int) -> list[Split]:
    """All ways with engines of ``tp`` devices."""
    workers = gpus // tp
    found = [Split(tp, workers, 0, MIXED)]
    return found + [Split(tp, workers, count, STATIC) for count in range(1, workers)]


def subjects(wanted: Wanted) -> dict[int, Subject]:
    """The model by tensor parallel size. CommandFailure if there is none."""
    found: dict[int, Subject] = {}
    reason = ""
    for tp in (wanted.tp,) if wanted.tp else TENSOR_PARALLEL:
        if tp > wanted.gpus:
            continue
        # A calibration is of one size; named without it all that there are of the model count.
        named = f"{PLACES.sub('', wanted.model)}-tp{tp}"
        model = named if named in shipped() else wanted.model
        try:
            subject = find_subject(model, wanted.hardware, tp, None, Path())
        except SubjectError as error:
            reason = str(error)
            continue
        if subject.tp == tp:
            found[tp] = subject
    if not found:
        raise CommandFailure(f"{wanted.model} on {wanted.gpus} GPUs: {reason or 'no size fits'}")
    return found


def setup_of(wanted: Wanted, subject: Subject, split: Split) -> ClusterSetup:
    """The cluster of a split. DoesNotFit if the model does not."""
    per_node = max(1, 8 // split.tp)
    setup = ClusterSetup(
        subject.shape,
        subject.hardware,
        tuple(
            WorkerSetup(f"w{number:03}", "mixed", f"node-{number // per_node}")
            for number in range(split.workers)
        ),
        subject.efficiency,
        subject.tp,
        options=EngineOptions(max_model_len=wanted.max_model_len),
        limits=Limits(prefills_per_worker=PREFILLS_PER_WORKER),
        placement=Placement(
            token_gap_s=wanted.slo.itl_s, rebalance=Rebalance(itl_s=wanted.slo.itl_s)
        ),
    )
    setup.kv_blocks()
    return applied(BASELINES[split.kind], setup, split.prefill)


def tried(wanted: Wanted, subject: Subject, split: Split) -> Outcome | None:
    """Simulate one; None if the model, or the longest call, does not fit."""
    try:
        setup = setup_of(wanted, subject, split)
    except DoesNotFit:
        return None
    make = core_factory(BASELINES[split.kind], setup, wanted.workload)
    result = simulate(setup, wanted.workload, configuration=split.kind, core_factory=make)
    found = figures(result, wanted.slo)
    return Outcome(
        split,
        found.get("goodput_calls_share", 0.0),
        found.get("completion_s_mean", float("inf")),
        found.get("ttft_s_mean", float("inf")),
        found.get("itl_s_mean", float("inf")),
        result.totals.flips,
    )


def planned(wanted: Wanted, tell: Callable[[str], None]) -> tuple[list[Outcome], Outcome | None]:
    """All static ways, and the best one with roles that follow demand, if there can be roles.

    CommandFailure if none fits.
    """
    known = subjects(wanted)
    outcomes: list[Outcome] = []
    for tp, subject in known.items():
        for split in splits(wanted.gpus, tp):
            tell(f"TP {tp}: {said(split)}")
            outcome = tried(wanted, subject, split)
            if outcome is not None:
                outcomes.append(outcome)
    if not outcomes:
        raise CommandFailure(f"{wanted.model} does not fit on these GPUs")
    best = max(outcomes, key=lambda one: one.rank).split
    if best.workers < 2:
        return outcomes, None
    count = best.prefill or max(1, best.workers // 2)
    following: list[Outcome] = []
    for kind in (FOLLOWING, PREFERRED):
        split = best._replace(prefill=count, kind=kind)
        tell(f"TP {best.tp}: {said(split)}")
        outcome = tried(wanted, known[best.tp], split)
        if outcome is not None:
            following.append(outcome)
    return outcomes, max(following, key=lambda one: one.rank, default=None)


def said(split: Split) -> str:
    """A split in words."""
    if split.kind == MIXED:
        return f"{split.workers} without roles"
    roles = f"{split.prefill} prefill, {split.workers - split.prefill} decode"
    if split.kind == PREFERRED:
        return f"{roles}, following demand, prefill workers decode, too"
    return f"{roles}, following demand" if split.kind == FOLLOWING else roles


def main(wanted: Wanted, json_path: Path | None, console: Console) -> int:
    """The command."""
    with console.status("simulating") as status:
        outcomes, following = planned(wanted, status.update)
    best = max(outcomes, key=lambda one: one.rank)
    shown = sorted(outcomes, key=lambda one: one.rank, reverse=True)
    rows = [_row(one) for one in ([following] if following is not None else []) + shown]
    found = {"tp": float(best.split.tp), "prefill": float(best.split.prefill)}
    found |= {"workers": float(best.split.workers), "good_calls": best.good}
    if following is not None:
        found |= {"good_calls_following": following.good}
        if best.good:
            found["gain_of_following"] = following.good / best.good - 1.0
    write(json_path, "pythia plan", found, rows)
    table(console, f"{wanted.model} on {wanted.gpus} GPUs, {wanted.workload.name}", rows)
    console.print(f"best static: TP {best.split.tp}, {said(best.split)}")
    if following is not None:
        gain = following.good - best.good
        apart = following.split.kind == FOLLOWING
        console.print(f"placement.prefill_workers_decode: {'false' if apart else 'true'}")
        console.print(
            f"roles that follow demand: {gain:+.1%} of all calls, {following.turns} turns"
        )
    return 0


def workload_of(line: str) -> Workload:
    """The workload of a command line; WorkloadError says what is wrong with it."""
    return open_workload(line)


def _row(one: Outcome) -> dict[str, object]:
    return {
        "TP": one.split.tp,
        "workers": said(one.split),
        "good calls": one.good,
        "completion s": one.completion_s,
        "TTFT s": one.ttft_s,
        "ITL ms": 1e3 * one.itl_s,
        "turns": one.turns,
    }

"""``pythia calibrate``: measure one real engine's steps and fit the estimates to them.

Starts the engine of a cluster's first worker as that worker would, without the rest of the
cluster. Every step is measured several times, in rounds over all steps so that a disturbed
while does not fall on one of them, and the median counts. A third of the points is held out
to see what the fit is worth on steps that it has not seen; the file's efficiency is then
fitted to all of them.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console
from rich.progress import Progress

from cluster.bench.child import Child
from cluster.bench.report import table, write
from cluster.calibration import Calibration, Point, errors, residuals, save
from cluster.config import WorkerConfig
from cluster.fit import fit, held_out_errors
from cluster.hardware import HARDWARE, cpu, hardware
from cluster.model_shape import model_shape
from cluster.schema import ConfigError
from coordinator.cost import Hardware, StepCost

COMMAND = "pythia calibrate"
START_S = 600.0
STEP_S = 600.0
NEW_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CACHED_TOKENS = (1024, 8192, 32768)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (128, 1024, 4096, 16384)
MIXED_NEW = (128, 512, 2048)
SPARE_TOKENS = 600
"""Of a sequence: what is generated while it is measured, and rounding to blocks."""


class Step(NamedTuple):
    """What is asked of the engine: a chunk behind cached tokens, beside a batch of decodes."""

    new: int
    cached: int
    batch: int
    context: int


class Plan(msgspec.Struct, frozen=True):
    """How much is measured: prompts up to ``longest`` tokens, batches up to ``most``."""

    repeats: int = 3
    longest: int = 2048
    most: int = 16


def run(worker: WorkerConfig, plan: Plan, hardware_name: str | None, console: Console) -> Any:
    """Measure and fit; a ``Calibration``. ChildError if the engine fails."""
    facts, points = asyncio.run(_measure(worker, plan, console))
    device = _hardware(hardware_name, facts["device"])
    shape = model_shape(facts["config"], worker.served_model_name, dtype=facts["dtype"])
    source = f"{COMMAND}, vLLM {facts['vllm_version']} on {facts['device']}"
    return Calibration(
        source=source,
        model=worker.served_model_name,
        tp=facts["tp"],
        shape=shape,
        hardware=device,
        efficiency=fit(points, shape, device, facts["tp"], source=source),
        points=points,
    )


def main(
    worker: WorkerConfig,
    plan: Plan,
    out: Path,
    json_path: Path | None = None,
    hardware_name: str | None = None,
    console: Console | None = None,
) -> int:
    """The command: measures, prints predicted against measured, writes the files."""
    console = console or Console()
    calibration = run(worker, plan, hardware_name, console)
    save(calibration, out)
    rows = residuals(calibration.cost(), calibration.points)
    figures = figures_of(calibration)
    write(json_path, COMMAND, figures, rows)
    table(console, f"{calibration.model}: {calibration.source}", rows)
    table(console, "relative errors", [{"figure": k, "value": v} for k, v in figures.items()])
    console.print(calibration.efficiency)
    console.print(f"written to {out}")
    return 0


def figures_of(calibration: Calibration) -> dict[str, float]:
    """How good the estimates are, over all points and over those held out."""
    shape, device, tp = calibration.shape, calibration.hardware, calibration.tp
    fitted = errors(calibration.cost(), calibration.points)
    held_out = held_out_errors(calibration.points, shape, device, tp)
    figures = {
        "points": float(fitted.points),
        "fitted_error_median": fitted.median,
        "fitted_error_p95": fitted.p95,
        "held_out_error_median": held_out.median,
        "held_out_error_p95": held_out.p95,
    }
    if device.name in HARDWARE:
        published = errors(StepCost(shape, device, tp=tp), calibration.points)
        figures |= {
            "published_error_median": published.median,
            "published_error_p95": published.p95,
        }
    return figures


def steps(plan: Plan, facts: Mapping[str, Any]) -> list[Step]:
    """What can be measured on an engine with such limits, small steps first."""
    longest = min(plan.longest, facts["max_num_batched_tokens"])
    most = min(plan.most, facts["max_num_seqs"] - 1)
    length = facts["max_model_len"] - SPARE_TOKENS
    room = facts["kv_blocks"] * facts["block_size"]
    news = [new for new in NEW_TOKENS if new <= longest]
    cached = [0, *(tokens for tokens in CACHED_TOKENS if tokens <= longest)]
    batches = [batch for batch in BATCHES if batch <= most]
    contexts = [tokens for tokens in CONTEXTS if tokens <= longest]
    wanted = [Step(new, behind, 0, 0) for behind in cached for new in news]
    wanted += [Step(0, 0, batch, context) for context in contexts for batch in batches]
    wanted += [
        Step(new, 0, batch, contexts[0])
        for new in MIXED_NEW
        for batch in batches[1::2]
        if new + batch <= longest and contexts
    ]
    return [
        step
        for step in wanted
        if max(step.new + step.cached, step.context) <= length
        and step.new + step.cached + step.batch * (step.context + SPARE_TOKENS) <= room
    ]


def point_of(found: list[dict[str, Any]]) -> Point:
    """One point of several measurements of the same step: the median of their seconds."""
    point = dict(found[0])
    kind = "mixed" if point["batch"] and point.get("new_tokens") else "prefill"
    point["kind"] = kind if point.get("new_tokens") else "decode"
    point["seconds"] = statistics.median(measured["seconds"] for measured in found)
    return msgspec.convert(point, Point)


async def _measure(
    worker: WorkerConfig, plan: Plan, console: Console
) -> tuple[dict[str, Any], list[Point]]:
    with tempfile.TemporaryDirectory(prefix="pythia-calibrate-") as folder:
        settings = {"engine": worker.engine_arguments(), "model": worker.served_model_name}
        child = await Child.start(
            "cluster.calibrate_engine",
            settings,
            worker.process_environment(),
            Path(folder) / "engine.log",
        )
        try:
            with Progress(console=console, transient=True) as progress:
                task = progress.add_task("starting an engine", total=None)
                facts = await child.answer(START_S)
                wanted = steps(plan, facts)
                await child.ask(wanted[0]._asdict(), STEP_S)  # the first is never like the rest
                progress.update(task, total=plan.repeats * len(wanted))
                found: list[list[dict[str, Any]]] = [[] for _ in wanted]
                for turn in range(plan.repeats):
                    progress.update(task, description=f"round {turn + 1} of {plan.repeats}")
                    for step, measured in zip(wanted, found, strict=True):
                        measured.append(await child.ask(step._asdict(), STEP_S))
                        progress.advance(task)
        finally:
            await child.stop()
    return facts, [point_of(measured) for measured in found]


def _hardware(name: str | None, device: str) -> Hardware:
    """The entry named, or the one whose name is part of the device's."""
    if name is not None:
        return hardware(name)
    if device == "cpu":
        return cpu(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for known in HARDWARE:
        if known.partition("-")[0] in device.lower():
            return hardware(known)
    raise ConfigError([f"{device} is not in the table of hardware: give --hardware NAME"])

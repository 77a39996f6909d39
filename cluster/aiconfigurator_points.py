"""Step times of models on GPUs that are not at hand, from NVIDIA's AIConfigurator.

Its core package (Apache-2.0) carries kernel times measured on real systems with vLLM and
sums them over a model's operations; it needs no GPU. Two things to know about its points:
they are kernels only, nothing that the host does between steps; and they come from a model
of its own, with gaps filled by interpolation.

    python -m cluster.aiconfigurator_points --system h200_sxm \\
        --model meta-llama/Meta-Llama-3.1-8B --out h200.json

Optional: ``pip install 'pythia-serve[aiconfigurator]'``, best in an environment of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.bench.report import table
from cluster.calibration import Calibration, CalibrationError, Point, errors, residuals, save
from cluster.fit import fit, held_out_errors
from cluster.hardware import hardware
from cluster.model_shape import model_shape
from cluster.terminal import table_console
from coordinator.cost import StepCost

BACKEND = "vllm"
LICENCE = "Apache-2.0 (AIConfigurator, Copyright NVIDIA CORPORATION & AFFILIATES)"
SYSTEMS = {"a100_sxm": "a100-80gb", "h100_sxm": "h100", "h200_sxm": "h200", "b200_sxm": "b200"}

NEW_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CACHED_TOKENS = (0, 4096, 32768)
BATCHES = (1, 4, 16, 32, 64, 128, 256)
CONTEXTS = (512, 2048, 8192, 32768)
MIXED_CHUNKS = (512, 2048, 8192)
MIXED_BATCHES = (8, 64)


def main(arguments: list[str] | None = None) -> int:
    """Writes a calibration and prints how well the estimates agree, before and after."""
    parser = argparse.ArgumentParser(prog="python -m cluster.aiconfigurator_points")
    parser.add_argument("--system", choices=sorted(SYSTEMS), required=True)
    parser.add_argument("--model", required=True, help="a model that AIConfigurator knows")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    options = parser.parse_args(arguments)
    try:
        calibration = calibrate(options.system, options.model, options.tp)
    except (CalibrationError, ValueError) as error:
        Console(stderr=True).print(f"[red]{error}")
        return 1
    save(calibration, options.out)
    show(calibration, table_console())
    return 0


def calibrate(system: str, model: str, tp: int) -> Calibration:
    """AIConfigurator's points for ``model``, and the efficiency that fits them."""
    package = _package()
    shape = model_shape(_model_config(package, model), model)
    device = hardware(SYSTEMS[system])
    points = _points(_engine(model, system, tp), StepCost(shape, device, tp=tp))
    version = importlib.metadata.version("aiconfigurator-core")
    data = package.perf_database.resolve_query_version(system, BACKEND, "current")
    source = f"aiconfigurator-core {version}, {system}, {BACKEND} {data}: sums of kernel times"
    return Calibration(
        source=source,
        licence=LICENCE,
        model=model,
        tp=tp,
        shape=shape,
        hardware=device,
        efficiency=fit(points, shape, device, tp, source=source),
        points=points,
    )


def show(calibration: Calibration, console: Console) -> None:
    """Predicted against given, with published and with fitted factors."""
    shape, device, tp = calibration.shape, calibration.hardware, calibration.tp
    points = calibration.points
    table(console, calibration.source, residuals(calibration.cost(), points))
    for label, found in (
        ("published", errors(StepCost(shape, device, tp=tp), points)),
        ("held out, fitted", held_out_errors(points, shape, device, tp)),
        ("fitted", errors(calibration.cost(), points)),
    ):
        console.print(
            f"{label} factors: median error {found.median:.1%}, P95 {found.p95:.1%} "
            f"of {found.points} points"
        )
    console.print(calibration.efficiency)


def _points(engine: Any, cost: StepCost) -> list[Point]:
    """Prefills, decodes and mixed steps, as far as their KV fits one engine's memory."""
    room = cost.kv_capacity_tokens()
    found = []
    for cached in CACHED_TOKENS:
        for new in NEW_TOKENS:
            if new + cached <= room:
                milliseconds = engine.predict_prefill_latency(1, new + cached, cached)
                found.append(
                    Point(
                        kind="prefill",
                        seconds=milliseconds / 1e3,
                        new_tokens=new,
                        context_tokens=cached,
                    )
                )
    for context in CONTEXTS:
        for batch in BATCHES:
            if batch * context <= room:
                milliseconds = engine.predict_decode_latency(batch, context, 2)
                found.append(
                    Point(
                        kind="decode",
                        seconds=milliseconds / 1e3,
                        batch=batch,
                        batch_context_tokens=batch * context,
                    )
                )
    return found + _mixed(engine, room)


def _mixed(engine: Any, room: int) -> list[Point]:
    """A whole prompt beside decodes of the same context, which is what it can be asked for."""
    return [
        Point(
            kind="mixed",
            seconds=engine.mixed_step_latency(chunk, batch, chunk, 2) / 1e3,
            new_tokens=chunk,
            batch=batch,
            batch_context_tokens=batch * chunk,
        )
        for chunk in MIXED_CHUNKS
        for batch in MIXED_BATCHES
        if (batch + 1) * chunk <= room
    ]


def _package() -> Any:
    """The package's SDK, or how to install it."""
    try:
        import aiconfigurator_core.sdk.engine
        import aiconfigurator_core.sdk.perf_database
    except ImportError as error:
        raise CalibrationError(
            f"{error}. AIConfigurator is optional: pip install 'pythia-serve[aiconfigurator]'"
        ) from error
    return aiconfigurator_core.sdk


def _engine(model: str, system: str, tp: int) -> Any:
    from aiconfigurator_core.sdk.engine import EngineHandle
    from aiconfigurator_core.sdk.utils import HuggingFaceDownloadError

    try:
        with _quiet():
            return EngineHandle.compile(model, system, BACKEND, tp_size=tp, moe_tp_size=tp)
    except HuggingFaceDownloadError as error:
        raise CalibrationError(f"AIConfigurator has no data of its own on {model}: {error}") from (
            error
        )


def _model_config(package: Any, model: str) -> dict[str, Any]:
    """The configuration that it ships. CalibrationError for others: nothing is downloaded."""
    folder = Path(package.__path__[0]).parent / "model_configs"
    path = folder / f"{model.replace('/', '--')}_config.json"
    if not path.is_file():
        names = sorted(path.name.removesuffix("_config.json") for path in folder.iterdir())
        known = ", ".join(name.replace("--", "/", 1) for name in names)
        raise CalibrationError(f"AIConfigurator does not know {model!r}; it knows: {known}")
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return config


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Its native part prints notes on fallback tables that a dense model does not use."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


if __name__ == "__main__":
    sys.exit(main())

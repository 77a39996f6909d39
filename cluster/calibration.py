"""A calibration: step times of one engine, from where, and the efficiency fitted to them.

The file (JSON or YAML by its name) carries the model's shape and the hardware, so that
whoever loads it can estimate without looking anything else up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from coordinator.cost import Efficiency, Hardware, ModelShape, StepCost

VERSION = 1
SHIPPED = Path(__file__).with_name("calibrations")
"""Calibrations that come with Pythia, each with source and licence inside."""


class CalibrationError(ValueError):
    """A calibration file that can't be read, and why; or points that can't be fitted."""


class Point(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One engine step and how long it took.

    A chunk of ``new_tokens`` behind ``context_tokens`` of KV (none if 0 new tokens), and a
    token for each of ``batch`` sequences with ``batch_context_tokens`` of KV together.
    """

    kind: Literal["prefill", "decode", "mixed"]
    seconds: float
    new_tokens: int = 0
    context_tokens: int = 0
    batch: int = 0
    batch_context_tokens: int = 0


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``source``: what measured the points, with versions; ``licence``: theirs, if not ours."""

    version: int = VERSION
    source: str
    licence: str = ""
    model: str
    tp: int = 1
    shape: ModelShape
    hardware: Hardware
    efficiency: Efficiency
    points: list[Point]

    def cost(self) -> StepCost:
        """The fitted estimates."""
        return StepCost(self.shape, self.hardware, self.efficiency, self.tp)


class Errors(NamedTuple):
    """Relative errors of estimates, without sign: the middle one and the 95th percentile."""

    points: int
    median: float
    p95: float


def predict_s(cost: StepCost, point: Point) -> float:
    """What ``cost`` says of the step that ``point`` is."""
    chunks = ((point.new_tokens, point.context_tokens),) if point.new_tokens else ()
    return cost.step_s(chunks, point.batch, point.batch_context_tokens)


def relative_error(cost: StepCost, point: Point) -> float:
    """Predicted against measured: 0.1 is a tenth too long."""
    return predict_s(cost, point) / point.seconds - 1.0


def errors(cost: StepCost, points: Sequence[Point]) -> Errors:
    """How far off ``cost`` is over ``points``, of which there must be one."""
    found = sorted(abs(relative_error(cost, point)) for point in points)
    last = len(found) - 1
    low, high = last // 2, -(-last // 2)
    return Errors(len(found), (found[low] + found[high]) / 2, found[math.ceil(0.95 * last)])


def residuals(cost: StepCost, points: Sequence[Point]) -> list[dict[str, float | str]]:
    """Per point: the step, predicted and measured milliseconds, error in per cent."""
    return [
        {
            "kind": point.kind,
            "new": point.new_tokens,
            "behind": point.context_tokens,
            "batch": point.batch,
            "context": point.batch_context_tokens // point.batch if point.batch else 0,
            "given_ms": point.seconds * 1e3,
            "predicted_ms": predict_s(cost, point) * 1e3,
            "error_percent": relative_error(cost, point) * 100,
        }
        for point in points
    ]


def load(path: Path) -> Calibration:
    """Reads a file. CalibrationError says what is wrong with it."""
    reader = msgspec.json if path.suffix == ".json" else msgspec.yaml
    try:
        found: Calibration = reader.decode(path.read_bytes(), type=Calibration)
    except (OSError, msgspec.DecodeError) as error:
        raise CalibrationError(f"{path}: {error}") from error
    if found.version != VERSION:
        raise CalibrationError(f"{path}: version {found.version}, this program reads {VERSION}")
    return found


def save(calibration: Calibration, path: Path) -> None:
    """Writes a file, one point to a line in JSON."""
    if path.suffix != ".json":
        path.write_bytes(msgspec.yaml.encode(calibration))
        return
    head = msgspec.structs.replace(calibration, points=[])
    text = msgspec.json.format(msgspec.json.encode(head), indent=2).decode()
    lines = ",\n".join(f"    {msgspec.json.encode(point).decode()}" for point in calibration.points)
    path.write_text(text.replace('"points": []', f'"points": [\n{lines}\n  ]') + "\n", "utf-8")

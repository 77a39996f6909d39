"""The model on its hardware that is simulated, by a name in a scenario's file.

``model`` is a shipped calibration (``llama-3.1-8b-h200-tp1``), a calibration's file, or a
folder with a ``config.json`` (or that file); the last needs ``hardware`` and is estimated with
published efficiencies.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from cluster.calibration import SHIPPED, CalibrationError
from cluster.calibration import load as load_calibration
from cluster.document import suggestion
from cluster.hardware import HARDWARE
from cluster.model_shape import model_shape
from coordinator.cost import PUBLISHED, Efficiency, Hardware, ModelShape


class SubjectError(ValueError):
    """There is no such model or hardware. ``key``: which key of the file is to blame."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key


class Subject(msgspec.Struct, frozen=True):
    """What each engine of a cluster is."""

    shape: ModelShape
    hardware: Hardware
    efficiency: Efficiency
    tp: int


def shipped() -> list[str]:
    """Names of the calibrations that come with Pythia."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def find_subject(
    model: str, hardware: str | None, tp: int | None, dtype: str | None, folder: Path
) -> Subject:
    """The model; relative paths are from ``folder``. SubjectError says what is missing.

    ``tp`` of None: the calibration's, else 1. ``dtype``: to run a ``config.json`` in.
    """
    if model in shipped():
        return _calibrated(SHIPPED / f"{model}.json", hardware, tp, dtype)
    path = folder / Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.name == "config.json" and path.is_file():
        return _estimated(path, hardware, tp or 1, dtype)
    if path.is_file():
        return _calibrated(path, hardware, tp, dtype)
    known = shipped()
    raise SubjectError(
        "model",
        "neither a calibration nor a file nor a folder with a config.json"
        f"{suggestion(model, known)} (got {model!r}; calibrations: {', '.join(known)})",
    )


def _calibrated(path: Path, hardware: str | None, tp: int | None, dtype: str | None) -> Subject:
    try:
        found = load_calibration(path)
    except CalibrationError as error:
        raise SubjectError("model", str(error)) from error
    if hardware is not None and hardware != found.hardware.name:
        raise SubjectError(
            "hardware",
            f"the calibration is of {found.hardware.name}; leave hardware out (got {hardware!r})",
        )
    if dtype is not None:
        raise SubjectError("dtype", "a calibration has its own; leave dtype out")
    return Subject(found.shape, found.hardware, found.efficiency, tp or found.tp)


def _estimated(path: Path, hardware: str | None, tp: int, dtype: str | None) -> Subject:
    if hardware is None:
        raise SubjectError(
            "model", f"a config.json needs 'hardware': {', '.join(sorted(HARDWARE))}"
        )
    if hardware not in HARDWARE:
        raise SubjectError(
            "hardware",
            f"unknown{suggestion(hardware, HARDWARE)} (got {hardware!r}; known: "
            f"{', '.join(sorted(HARDWARE))})",
        )
    try:
        config = json.loads(path.read_text("utf-8"))
        shape = model_shape(config, path.parent.resolve().name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise SubjectError("model", f"{path}: {error}") from error
    return Subject(shape, HARDWARE[hardware], PUBLISHED, tp)

"""Calibrations: the fit finds what made the points, files survive, shipped ones hold."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import aiconfigurator_points, calibrate
from cluster.calibration import (
    SHIPPED,
    Calibration,
    CalibrationError,
    Point,
    errors,
    load,
    predict_s,
    residuals,
    save,
)
from cluster.fit import OVERHEADS, SHARES, fit, held_out_errors, nonnegative_least_squares, terms
from cluster.hardware import cpu, hardware
from cluster.model_shape import model_shape
from coordinator.cost import Efficiency, StepCost

CONFIGS = Path(__file__).with_name("model_configs")
H200 = hardware("h200")
SHAPES = {
    path.stem: model_shape(json.loads(path.read_text("utf-8")), path.stem)
    for path in sorted(CONFIGS.glob("*.json"))
}
SHAPE = SHAPES["llama-3.1-8b"]
TRUE = Efficiency(
    gemm=0.6,
    attention=0.4,
    weights=0.7,
    kv=0.9,
    unhidden=0.3,
    layer_s=6e-5,
    sequence_s=2e-5,
    allreduce_s=0.0,
)
FACTS = {
    "max_model_len": 4096,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 2048,
    "kv_blocks": 4096,
    "block_size": 32,
}

points = st.builds(
    Point,
    kind=st.just("mixed"),
    seconds=st.just(1.0),
    new_tokens=st.integers(0, 4096),
    context_tokens=st.integers(0, 32768),
    batch=st.integers(1, 256),
    batch_context_tokens=st.integers(1, 500_000),
)


def made(cost: StepCost, noise: float = 0.0) -> list[Point]:
    """Points as ``cost`` has them, each off by up to ``noise``."""
    rng = random.Random(1)
    empty = [
        Point(kind="prefill", seconds=1, new_tokens=new, context_tokens=cached)
        for cached in (0, 8192)
        for new in (32, 64, 128, 256, 512, 2048, 8192)
    ]
    empty += [
        Point(kind="decode", seconds=1, batch=batch, batch_context_tokens=batch * context)
        for context in (128, 2048, 8192)
        for batch in (1, 8, 32, 128, 256)
    ]
    return [
        msgspec.structs.replace(
            point, seconds=predict_s(cost, point) * (1 + rng.uniform(-noise, noise))
        )
        for point in empty
    ]


@given(st.sampled_from(sorted(SHAPES)), points, st.sampled_from([1, 4]), st.floats(0, 1))
@settings(deadline=None)
def test_terms_add_up_to_the_step(name: str, point: Point, tp: int, unhidden: float) -> None:
    efficiency = msgspec.structs.replace(TRUE, unhidden=unhidden, expert=0.3, link=0.5)
    cost = StepCost(SHAPES[name], H200, efficiency, tp)
    found = terms(cost, point)
    total_s = sum(found[share] / getattr(efficiency, share) for share in SHARES)
    total_s += sum(found[overhead] * getattr(efficiency, overhead) for overhead in OVERHEADS)
    assert total_s == pytest.approx(predict_s(cost, point), rel=1e-9)


def test_a_fit_finds_what_made_the_points() -> None:
    found = fit(made(StepCost(SHAPE, H200, TRUE)), SHAPE, H200, source="made")
    for name in ("gemm", "attention", "weights", "kv", "unhidden", "layer_s", "sequence_s"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=0.02), name
    assert found.source == "made"


def test_a_fit_stands_noise_and_a_wild_point() -> None:
    true = StepCost(SHAPE, H200, TRUE)
    noisy = made(true, noise=0.05)
    noisy[3] = msgspec.structs.replace(noisy[3], seconds=noisy[3].seconds * 5)
    found = StepCost(SHAPE, H200, fit(noisy, SHAPE, H200))
    assert errors(found, made(true)).p95 < 0.08
    assert held_out_errors(noisy, SHAPE, H200).median < 0.05


def test_a_fit_in_units_that_nobody_reaches() -> None:
    unit = cpu(16e9)
    shape = msgspec.structs.replace(SHAPE, layers=2, compute="fp32", plain_compute="fp32")
    slow = msgspec.structs.replace(TRUE, gemm=3e-3, attention=2e-3, weights=0.01, kv=5e-3)
    found = fit(made(StepCost(shape, unit, slow)), shape, unit)
    assert errors(StepCost(shape, unit, found), made(StepCost(shape, unit, slow))).p95 < 0.03


def test_too_little_to_fit() -> None:
    point = Point(kind="decode", seconds=1.0, batch=1, batch_context_tokens=10)
    for few in ([point] * 3, [*[point] * 4, msgspec.structs.replace(point, seconds=0.0)]):
        with pytest.raises(CalibrationError, match="at least 4 points"):
            fit(few, SHAPE, H200)


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=50)
def test_nonnegative_least_squares_is_optimal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(12, 5)), rng.normal(size=12)
    x = nonnegative_least_squares(matrix, target)
    gradient = matrix.T @ (target - matrix @ x)
    assert (x >= 0).all()
    assert (gradient <= 1e-7).all()  # nothing gets better by growing ...
    assert np.allclose(gradient[x > 0], 0, atol=1e-7)  # ... or by changing what is there


@pytest.mark.parametrize("name", ["c.json", "c.yaml"])
def test_files_survive(tmp_path: Path, name: str) -> None:
    found = made(StepCost(SHAPE, H200, TRUE))
    calibration = Calibration(
        source="made", model="m", shape=SHAPE, hardware=H200, efficiency=TRUE, points=found
    )
    save(calibration, tmp_path / name)
    assert load(tmp_path / name) == calibration
    assert residuals(load(tmp_path / name).cost(), found)[0]["error_percent"] == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [({"version": 2}, "version 2, this program reads 1"), ({"poinst": []}, "unknown field")],
)
def test_files_that_are_not_ours(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "c.json"
    text = json.loads(next(SHIPPED.glob("*.json")).read_text("utf-8"))
    path.write_text(json.dumps(text | change), "utf-8")
    with pytest.raises(CalibrationError, match=said):
        load(path)
    with pytest.raises(CalibrationError, match="No such file"):
        load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("name", "median", "p95"),
    [
        ("llama-3.1-8b-h200-tp1", 0.03, 0.08),
        ("llama-3.1-8b-h100-tp1", 0.03, 0.08),
        ("llama-3.1-8b-b200-tp1", 0.03, 0.10),
        ("llama-3.1-70b-h200-tp4", 0.03, 0.08),
        ("qwen3-30b-a3b-h200-tp1", 0.03, 0.16),
        ("deepseek-v3-h200-tp8", 0.05, 0.18),
    ],
)
def test_shipped_calibrations_hold(name: str, median: float, p95: float) -> None:
    calibration = load(SHIPPED / f"{name}.json")
    found = errors(calibration.cost(), calibration.points)
    assert found.median < median
    assert found.p95 < p95
    assert "Apache-2.0" in calibration.licence
    assert "aiconfigurator-core 0.12.0" in calibration.source


def test_what_is_measured_keeps_to_the_engine() -> None:
    steps = calibrate.steps(calibrate.Plan(longest=4096, most=64), FACTS)
    assert {(step.new > 0, step.batch > 0) for step in steps} == {
        (True, False),
        (False, True),
        (True, True),
    }
    for step in steps:
        assert step.new + step.cached <= 4096
        assert step.new + step.batch <= 2048
        assert step.batch < 32
    short = calibrate.steps(calibrate.Plan(), FACTS | {"max_model_len": 1024})
    assert max(step.new + step.cached for step in short) <= 1024


def test_measurements_become_a_point() -> None:
    found = [
        {"batch": 2, "new_tokens": 5, "context_tokens": 0, "batch_context_tokens": 9, "seconds": s}
        for s in (3.0, 1.0, 2.0)
    ]
    point = calibrate.point_of(found)
    assert (point.kind, point.seconds, point.batch) == ("mixed", 2.0, 2)
    alone = calibrate.point_of([{"batch": 0, "new_tokens": 5, "seconds": 1.0}])
    assert alone.kind == "prefill"


class _Kernels:
    """Stands for AIConfigurator's engine, in milliseconds."""

    def predict_prefill_latency(self, batch: int, tokens: int, prefix: int) -> float:
        return 5.0 * batch + (tokens - prefix) * 0.02

    def predict_decode_latency(self, batch: int, tokens: int, outputs: int) -> float:
        return 5.0 + batch * tokens * 1e-5

    def mixed_step_latency(self, chunk: int, batch: int, tokens: int, outputs: int) -> float:
        return 6.0 + chunk * 0.02


def test_points_of_aiconfigurator_fit_the_memory() -> None:
    cost = StepCost(SHAPE, H200)
    found = aiconfigurator_points._points(_Kernels(), cost)
    room = cost.kv_capacity_tokens()
    assert {point.kind for point in found} == {"prefill", "decode", "mixed"}
    assert max(point.batch_context_tokens for point in found) <= room
    prefill = next(point for point in found if point.context_tokens == 4096)
    assert prefill.seconds == pytest.approx((5 + prefill.new_tokens * 0.02) / 1e3)


def test_aiconfigurator_is_optional(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    with pytest.raises(CalibrationError, match=r"pip install 'pythia-serve\[aiconfigurator\]'"):
        aiconfigurator_points.calibrate("h200_sxm", "m", 1)
    arguments = ["--system", "h200_sxm", "--model", "m", "--out", str(tmp_path / "x.json")]
    assert aiconfigurator_points.main(arguments) == 1

"""Fits an ``Efficiency`` to measured steps by non-negative least squares.

Given which side of each roofline limits a step, its time is linear in the inverse shares and
in the seconds of overhead. So: find the sides with the current estimate, solve, repeat; from
several estimates, since that may end in a corner, and for some values of ``unhidden``, which
is not linear; keep the best. Residuals are relative and weighted down when large, so a few
disturbed measurements do not bend the rest.

Shares end at 1, the published peak. What the points say nothing about keeps the value it
had. A single engine can't tell apart costs per step, per layer and per collective: they are
all put into ``layer_s``, since most of them are kernels' latencies. A fit is good for its own
model and tensor parallel size, and a first guess for others on the same hardware.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from cluster.calibration import CalibrationError, Errors, Point, errors, relative_error
from coordinator.cost import PUBLISHED, Efficiency, Hardware, ModelShape, StepCost

SHARES_OF_COMPUTE = ("gemm", "expert", "attention")
SHARES_OF_MEMORY = ("weights", "kv")
SHARES = (*SHARES_OF_COMPUTE, *SHARES_OF_MEMORY, "link")
OVERHEADS = ("layer_s", "sequence_s")
POINTS_MIN = 4
HELD_OUT_EVERY = 3
ROUNDS = 8
UNHIDDEN = tuple(step / 10 for step in range(11))
STARTS = ((1.0, 1.0), (0.01, 0.01), (0.0001, 0.01), (0.01, 0.0001))
"""Factors of the shares of FLOP/s and of bandwidth to begin with."""
SEEN_SHARE = 0.01
"""A share counts as measured if its part of some step is at least this."""
DISTURBED = 0.05
"""Relative residuals beyond this count linearly, not squared."""


def fit(
    points: Sequence[Point],
    shape: ModelShape,
    hardware: Hardware,
    tp: int = 1,
    start: Efficiency = PUBLISHED,
    source: str = "fitted",
) -> Efficiency:
    """The efficiency with the smallest relative errors over ``points``, which ``source`` gave.

    CalibrationError if there are too few points or one took no time.
    """
    if len(points) < POINTS_MIN or min(point.seconds for point in points) <= 0:
        raise CalibrationError(f"a fit takes at least {POINTS_MIN} points, all longer than 0 s")
    start = msgspec.structs.replace(start, step_s=0.0, allreduce_s=0.0, source=source)
    best, best_loss = start, float("inf")
    for (compute, read), unhidden in itertools.product(STARTS, UNHIDDEN):
        current = msgspec.structs.replace(
            start,
            unhidden=unhidden,
            **{name: compute * getattr(start, name) for name in SHARES_OF_COMPUTE},
            **{name: read * getattr(start, name) for name in SHARES_OF_MEMORY},
        )
        for _ in range(ROUNDS):
            following = _solve(points, StepCost(shape, hardware, current, tp), start)
            loss = _loss(points, StepCost(shape, hardware, following, tp))
            if loss < best_loss:
                best, best_loss = following, loss
            if following == current:
                break
            current = following
    return best


def held_out_errors(
    points: Sequence[Point], shape: ModelShape, hardware: Hardware, tp: int = 1
) -> Errors:
    """What a fit is worth on points it has not seen: every third, with a fit to the others."""
    seen = [point for index, point in enumerate(points) if index % HELD_OUT_EVERY]
    efficiency = fit(seen, shape, hardware, tp)
    return errors(StepCost(shape, hardware, efficiency, tp), points[::HELD_OUT_EVERY])


def terms(cost: StepCost, point: Point) -> dict[str, float]:
    """``point``'s step as seconds at the peak per share, and how often overheads occur.

    The step takes the sum of each share's seconds over that share and each count's seconds,
    on the sides of the rooflines that ``cost`` finds.
    """
    peak, efficiency = cost.peak, cost.efficiency
    found = dict.fromkeys((*SHARES, *OVERHEADS), 0.0)
    tokens = point.new_tokens + point.batch
    sequences = point.batch + (1 if point.new_tokens else 0)

    def linear(compute: float, compute_share: str, read: float) -> None:
        computing = compute / getattr(efficiency, compute_share)
        is_read = read / efficiency.weights >= computing
        found[compute_share] += compute * (efficiency.unhidden if is_read else 1.0)
        found["weights"] += read * (1.0 if is_read else efficiency.unhidden)

    def attention(compute: float, read: float) -> None:
        if compute / efficiency.attention > read / efficiency.kv:
            found["attention"] += compute
        else:
            found["kv"] += read

    linear(peak.dense * tokens, "gemm", peak.dense_read)
    linear(peak.head * sequences, "gemm", peak.head_read)
    if peak.expert:
        read = peak.expert_read * (1.0 - peak.untouched**tokens)
        linear(peak.expert * tokens, "expert", read)
    if point.batch:
        seen = cost.decode_seen(point.batch, point.batch_context_tokens)
        attention(peak.decode * seen, peak.kv_read * seen)
    if point.new_tokens:
        pairs, seen = cost.chunk_seen(point.new_tokens, point.context_tokens)
        attention(peak.pair * pairs, peak.kv_read * seen)
        found["gemm"] += peak.expand * point.context_tokens
    found["link"] += peak.link * tokens
    found["layer_s"], found["sequence_s"] = float(cost.shape.layers), float(sequences)
    return found


def nonnegative_least_squares(matrix: Any, target: Any) -> Any:
    """The x >= 0 with the least ``|matrix x - target|`` (Lawson and Hanson, 1974)."""
    columns = matrix.shape[1]
    x = np.zeros(columns)
    active = np.zeros(columns, dtype=bool)
    tolerance = 1e-10 * max(1.0, float(np.abs(matrix.T @ target).max()))
    for _ in range(3 * columns):
        gradient = np.where(active, -np.inf, matrix.T @ (target - matrix @ x))
        if gradient.max() <= tolerance:
            break
        active[int(gradient.argmax())] = True
        while True:
            trial = np.zeros(columns)
            trial[active] = np.linalg.lstsq(matrix[:, active], target, rcond=None)[0]
            if trial[active].min(initial=1.0) > 0:
                break
            # Go towards the trial as far as all stay positive; those at 0 leave.
            falling = active & (trial <= 0)
            step = float((x[falling] / (x[falling] - trial[falling] + 1e-300)).min())
            x = x + step * (trial - x)
            active &= x > 1e-15
            x[~active] = 0.0
        x = trial
    return x


def _solve(points: Sequence[Point], cost: StepCost, start: Efficiency) -> Efficiency:
    """The best linear coefficients, with the sides of the rooflines as ``cost`` has them."""
    seconds = np.array([point.seconds for point in points])
    rows = [terms(cost, point) for point in points]
    columns = {name: np.array([row[name] for row in rows]) / seconds for name in rows[0]}
    names = [name for name, column in columns.items() if column.any()]
    matrix = np.stack([columns[name] for name in names], axis=1)
    # Shares end at 1: what is sought is how much slower than that it is.
    rest = 1.0 - sum(columns[name] for name in SHARES)
    weights = np.sqrt([_weight(cost, point) for point in points])
    scale = matrix.max(axis=0)
    solved = nonnegative_least_squares(matrix / scale * weights[:, None], rest * weights) / scale
    changes = {name: getattr(start, name) for name in SHARES}
    for name, value in zip(names, map(float, solved), strict=True):
        if name in OVERHEADS:
            changes[name] = value
        elif columns[name].max() * max(1.0 + value, 1.0 / changes[name]) >= SEEN_SHARE:
            changes[name] = 1.0 / (1.0 + value)
    return msgspec.structs.replace(cost.efficiency, **changes)


def _weight(cost: StepCost, point: Point) -> float:
    return DISTURBED / max(DISTURBED, abs(relative_error(cost, point)))


def _loss(points: Sequence[Point], cost: StepCost) -> float:
    """Squared small and linear large relative errors (Huber)."""
    sizes = [abs(relative_error(cost, point)) for point in points]
    return sum(min(size, DISTURBED) * (2 * size - min(size, DISTURBED)) for size in sizes)

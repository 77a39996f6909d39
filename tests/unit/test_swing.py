"""Agents that read, then write, in waves; and what an oracle knows of them."""

from __future__ import annotations

import random

from cluster.bench.rebalance import cluster
from cluster.simulator.future import KnownFuture
from cluster.simulator.setup import Slo
from cluster.workload.form import call_count
from cluster.workload.swing import Swing, swinging

SWING = Swing(waves=2, tasks=40, period_s=240.0)


def test_tasks_read_new_documents_and_then_write() -> None:
    workload = swinging(SWING, random.Random(1))
    assert len(workload.runs) == 80
    assert call_count(workload) == 80 * (SWING.reads + SWING.writes)
    for run in workload.runs:
        kinds = [call.kind for call in run.calls]
        assert kinds == ["explorer"] * SWING.reads + ["engineer"] * SWING.writes
        assert [call.parents for call in run.calls[1:]] == [(n,) for n in range(len(kinds) - 1)]
    own = {block for block, _ in workload.runs[0].calls[1].blocks[1:]}
    others = {block for block, _ in workload.runs[1].calls[1].blocks}
    assert not own & others


def test_waves_come_one_after_the_other_and_steady_tasks_do_not() -> None:
    waves = [run.arrival_s for run in swinging(SWING, random.Random(1)).runs]
    assert all(at_s % SWING.period_s < SWING.within_s for at_s in waves)
    calm = Swing(waves=2, tasks=40, period_s=240.0, steady=True)
    even = [run.arrival_s for run in swinging(calm, random.Random(1)).runs]
    assert sum(at_s < 240.0 for at_s in even) in range(25, 56)
    assert any(at_s % SWING.period_s > SWING.within_s for at_s in even)


def test_equal_seeds_give_equal_workloads() -> None:
    assert swinging(SWING, random.Random(3)) == swinging(SWING, random.Random(3))
    assert swinging(SWING, random.Random(3)) != swinging(SWING, random.Random(4))


def test_the_oracle_knows_that_reading_comes_before_writing() -> None:
    future = KnownFuture(swinging(SWING, random.Random(1)), cluster(Slo()))
    future.begin(100.0)
    reading, writing = future.need(20.0, 110.0), future.need(20.0, 190.0)
    assert reading.prefill_tokens_per_s.likely > 5 * writing.prefill_tokens_per_s.likely
    assert writing.decode_tokens_per_s.likely > 2 * reading.decode_tokens_per_s.likely
    assert future.need(20.0, 10_000.0).prefill_tokens_per_s.likely == 0.0


def test_all_tokens_are_known_to_come() -> None:
    workload = swinging(Swing(waves=1, tasks=10), random.Random(1))
    future = KnownFuture(workload, cluster(Slo()))
    tokens = sum(10.0 * future.need(10.0, at * 10.0).decode_tokens_per_s.likely for at in range(90))
    expected = sum(call.output_tokens for run in workload.runs for call in run.calls)
    assert abs(tokens - expected) < 0.05 * expected

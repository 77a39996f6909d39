"""Engines on the same cores: slower while several compute, and only then."""

from __future__ import annotations

import pytest

from cluster.hardware import cpu
from cluster.simulator.engine import Engine
from cluster.simulator.engine_types import Ended, EngineRequest, FirstToken, Output
from cluster.simulator.records import CallRecord, Gaps
from cluster.simulator.setup import (
    ClusterSetup,
    EngineOptions,
    NetworkSetup,
    WorkerSetup,
)
from cluster.simulator.world import simulate
from cluster.workload.form import Call, Run, Workload
from tests.unit.test_likeness import CALIBRATION, TINY

OPTIONS = EngineOptions(block_size=32, max_num_seqs=8, max_num_batched_tokens=2048, kv_blocks=1000)
LONG_S = CALIBRATION.cost().step_s(((1000, 0),))


def engine() -> Engine:
    return Engine(CALIBRATION.cost(), OPTIONS, 1000, Gaps())


def advanced(engine: Engine) -> tuple[list[Output], float]:
    """Everything up to the next output, and when that was."""
    while True:
        at_s = engine.next_s
        assert at_s is not None
        if outputs := engine.advance(at_s):
            return outputs, at_s


def prefilled(engine: Engine) -> float:
    engine.submit(EngineRequest("a~1", b"", 1000, 1), 0.0)
    engine.advance(0.0)
    assert engine.stepping
    return LONG_S


def test_what_is_left_of_a_prefill_takes_longer_from_when_cores_are_shared() -> None:
    one = engine()
    alone_s = prefilled(one)
    one.share(1.5, 0.4 * alone_s)
    outputs, at_s = advanced(one)
    assert [type(output) for output in outputs] == [FirstToken, Ended]
    assert at_s == pytest.approx((0.4 + 0.6 * 1.5) * alone_s)
    assert not one.stepping


def test_sharing_that_ends_makes_the_rest_as_fast_as_before() -> None:
    one = engine()
    alone_s = prefilled(one)
    one.share(2.0, 0.0)
    one.share(1.0, 1.0 * alone_s)
    _, at_s = advanced(one)
    assert at_s == pytest.approx(1.5 * alone_s)


def test_decodes_that_are_planned_ahead_get_slower_at_their_next_step() -> None:
    def ended_s(share_at_s: float | None) -> float:
        one = engine()
        one.submit(EngineRequest("a~1", b"", 32, 101), 0.0)
        one.advance(0.0)
        _, first_s = advanced(one)
        if share_at_s is not None:
            one.share(2.0, first_s + share_at_s)
        outputs, at_s = advanced(one)
        assert isinstance(outputs[-1], Ended)
        one.check()
        return at_s - first_s

    alone_s = ended_s(None)
    step_s = alone_s / 100
    assert ended_s(0.0) == pytest.approx(2 * alone_s, rel=0.02)
    assert ended_s(0.5 * alone_s) == pytest.approx(1.5 * alone_s, abs=2 * step_s)


def stream(index: int, arrival_s: float) -> Run:
    call = Call(0, (), 0.0, 40, 200, ())
    return Run(f"r{index}", "w", arrival_s, f"s{index}", (call,))


def replayed(
    arrivals_s: list[float], contention: tuple[float, ...], nodes: tuple[str, str]
) -> list[CallRecord]:
    """Streams on two workers, which take turns as they come."""
    setup = ClusterSetup(
        shape=TINY,
        hardware=cpu(2.0**34),
        efficiency=CALIBRATION.efficiency,
        workers=tuple(
            WorkerSetup(f"mixed-{number}", "mixed", node=node) for number, node in enumerate(nodes)
        ),
        options=OPTIONS,
        network=NetworkSetup(same_node="tcp", same_rack="tcp", across="tcp"),
        contention=contention,
    )
    runs = tuple(stream(index, at_s) for index, at_s in enumerate(arrivals_s))
    return simulate(setup, Workload("w", "", "", 32, runs)).calls


def test_engines_of_one_node_slow_each_other_down_and_others_do_not() -> None:
    (free, _), (shared, _), (elsewhere, _) = (
        replayed([0.0, 0.0], factors, nodes)
        for factors, nodes in (
            ((), ("a", "a")),
            ((1.0, 1.5), ("a", "a")),
            ((1.0, 1.5), ("a", "b")),
        )
    )
    assert shared.itl_s == pytest.approx(1.5 * free.itl_s, rel=0.02)
    assert elsewhere.itl_s == pytest.approx(free.itl_s)


def test_an_engine_alone_on_its_node_is_as_fast_as_ever() -> None:
    free = replayed([0.0, 30.0], (), ("a", "a"))
    alone = replayed([0.0, 30.0], (1.0, 3.0), ("a", "a"))
    assert [call.itl_s for call in alone] == pytest.approx([call.itl_s for call in free])


def test_only_the_time_that_engines_step_together_counts() -> None:
    (first, second) = replayed([0.0, 0.0], (), ("a", "a"))
    length_s = first.ended_s - first.first_token_s
    late = replayed([0.0, length_s / 2], (1.0, 2.0), ("a", "a"))
    # Half of it alone, and the other half at half the speed beside the other one.
    assert late[0].itl_s == pytest.approx(1.5 * first.itl_s, rel=0.05)
    assert late[1].itl_s == pytest.approx(1.5 * second.itl_s, rel=0.05)

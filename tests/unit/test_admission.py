"""The bound on runs that are under way."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from coordinator.policy.admission import FORGET_S, HOLD_S, Gate


def test_without_signs_there_is_no_bound() -> None:
    gate = Gate()
    assert gate.opens(1_000_000, 1.0)
    gate.served(5)
    assert gate.bound == inf


def test_a_sign_leaves_less_than_what_is_under_way() -> None:
    gate = Gate()
    gate.crowded(40, 4, 100.0)
    assert gate.bound == 34.0
    assert not gate.opens(40, 101.0)
    assert gate.opens(33, 101.0)


def test_the_next_decrease_waits_until_the_last_one_had_its_effect() -> None:
    gate = Gate()
    gate.crowded(40, 4, 100.0)
    gate.crowded(40, 4, 100.0 + 2 * HOLD_S)
    assert gate.bound == 34.0
    gate.crowded(34, 4, 100.0 + HOLD_S / 2)
    assert gate.bound == 34.0
    gate.crowded(34, 4, 100.0 + 2 * HOLD_S)
    assert gate.bound == 34.0 * 0.85


def test_it_grows_while_it_binds_by_half_a_run_for_a_round_of_calls() -> None:
    gate = Gate()
    gate.crowded(40, 4, 100.0)
    for _ in range(34):
        gate.served(34)
    assert 34.4 < gate.bound < 34.6
    before = gate.bound
    gate.served(20)
    assert gate.bound == before


def test_it_is_forgotten_when_nobody_has_waited_for_long() -> None:
    gate = Gate()
    gate.crowded(10, 1, 100.0)
    assert not gate.opens(10, 100.0 + FORGET_S / 2)
    assert not gate.opens(10, 100.0 + FORGET_S)
    assert gate.opens(10, 100.0 + 2.6 * FORGET_S)
    assert gate.bound == inf


def test_waste_counts_by_its_share_of_the_workers_time() -> None:
    gate = Gate()
    for second in range(100):
        gate.wasted(0.15, 4, 20, 4, float(second))
    assert gate.bound == inf
    for second in range(100, 120):
        gate.wasted(0.3, 4, 20, 4, float(second))
    assert gate.bound == 17.0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["crowded", "wasted", "served", "opens"]),
            st.integers(0, 50),
            st.floats(0, 30),
        ),
        max_size=60,
    )
)
def test_so_many_may_be_under_way_in_any_case(events: list[tuple[str, int, float]]) -> None:
    gate, now_s = Gate(), 0.0
    for what, active, elapsed_s in events:
        now_s += elapsed_s
        if what == "crowded":
            gate.crowded(active, 3, now_s)
        elif what == "wasted":
            gate.wasted(elapsed_s, 2, active, 3, now_s)
        elif what == "served":
            gate.served(active)
        else:
            gate.opens(active, now_s)
        assert gate.bound >= 3.0
        assert gate.opens(2, now_s)

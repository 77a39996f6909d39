"""What is kept of finished calls, and for how long: the policy, and the core's accounts of it."""

from __future__ import annotations

import pytest

from coordinator.policy.retention import (
    HOLD_LEAST_S,
    HOLD_MOST_S,
    WANTED,
    Leftover,
    hold_s,
    kept,
)
from coordinator.workflow.reuse import NEVER, Delays, Reuse, ReuseBook


def leftover(name: str, **changes: object) -> Leftover:
    plain = Leftover(name, 100, 1.0, Reuse(0.9, 10.0, 20.0), wanted=False, pinned=False, age_s=1.0)
    return plain._replace(**changes)


# --- how soon calls are used again ------------------------------------------------------


def test_nothing_is_expected_of_who_was_never_used() -> None:
    delays = Delays()
    assert delays.after(0.0) is NEVER
    delays.unused()
    assert delays.after(0.0) is NEVER


def test_the_longer_it_took_the_less_probable_it_is() -> None:
    delays = Delays()
    for _ in range(20):
        delays.used(1.0)
        delays.unused()
    early, late = delays.after(0.0), delays.after(5.0)
    assert 0.4 < early.probability < 0.6
    assert 0.5 < early.expected_s < 2.0
    assert early.expected_s <= early.late_s
    assert late is NEVER


def test_what_is_always_used_is_expected_to_be() -> None:
    delays = Delays()
    for _ in range(100):
        delays.used(30.0)
    assert delays.after(0.0).probability > 0.95
    # It has not come for so long that it is due by now.
    assert delays.after(26.0).expected_s < delays.after(0.0).expected_s


def test_uses_are_told_apart_by_how_many_there_were() -> None:
    book = ReuseBook()
    agent = ("", "review", "planner")
    for _ in range(10):
        book.of(agent, 0).used(1.0)
        book.of(agent, 1).unused()
    assert book.of(agent, 0).after(0.0).probability > 0.8
    assert book.of(agent, 1).after(0.0) is NEVER
    assert book.of(agent, 99) is book.of(agent, 3)


def test_no_more_agents_are_remembered_than_there_is_room_for() -> None:
    book = ReuseBook(agents=3)
    for number in range(10):
        book.of(("", "w", f"agent-{number}"), 0).used(1.0)
    assert len(book) == 3
    assert book.of(("", "w", "agent-9"), 0).samples > 0
    assert book.of(("", "w", "agent-0"), 0).samples == 0


# --- what is kept ------------------------------------------------------------------------


def test_what_saves_most_for_a_block_and_second_is_kept() -> None:
    soon = leftover("soon", reuse=Reuse(0.9, 2.0, 4.0))
    later = leftover("later", reuse=Reuse(0.9, 20.0, 40.0))
    dear = leftover("dear", recompute_s=50.0, reuse=Reuse(0.9, 20.0, 40.0))
    assert [keep.name for keep in kept([later, soon, dear], 300)] == ["dear", "soon", "later"]
    assert [keep.name for keep in kept([later, soon, dear], 250)] == ["dear", "soon"]
    assert kept([later, soon, dear], 99) == []


def test_what_will_not_be_used_is_not_kept() -> None:
    improbable = leftover("improbable", reuse=Reuse(0.05, 1.0, 1.0))
    assert kept([improbable, leftover("never", reuse=NEVER)], 1000) == []


def test_what_a_queued_call_needs_comes_first_and_for_long() -> None:
    wanted = leftover("wanted", reuse=NEVER, wanted=True, recompute_s=0.001)
    (keep,) = kept([leftover("dear", recompute_s=1e6), wanted], 100)
    assert keep == ("wanted", HOLD_MOST_S, WANTED)


def test_pins_do_not_change_places_for_little() -> None:
    old = leftover("old", pinned=True)
    new = leftover("new", recompute_s=1.1)
    assert [keep.name for keep in kept([new, old], 100)] == ["old"]
    assert [keep.name for keep in kept([new._replace(recompute_s=1.5), old], 100)] == ["new"]


@pytest.mark.parametrize(
    ("late_s", "expected_s"), [(0.1, HOLD_LEAST_S), (20.0, 20.0), (1e6, HOLD_MOST_S)]
)
def test_a_pin_lasts_as_long_as_uses_take_within_bounds(late_s: float, expected_s: float) -> None:
    assert hold_s(leftover("x", reuse=Reuse(0.9, 1.0, late_s))) == expected_s

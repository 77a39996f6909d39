"""Lifecycles: the tables are closed, moves go through one door, stories are bounded."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import get_args

import pytest

from coordinator.deadlines import SWEEP_ENTRIES_MIN, Deadlines
from coordinator.errors import InvalidTransition
from coordinator.protocol import EngineFacts, Ready, Role
from coordinator.state import (
    CALL_MOVES,
    PAIR_MOVES,
    ROLE_TURNS,
    WORKER_MOVES,
    CallPhase,
    PairPhase,
    Story,
    Worker,
    WorkerPhase,
)

FACTS = EngineFacts("0.32", "model", "fingerprint", 16, 100, 4096, 8, 2048)


def a_worker(story_lines: int = 8) -> Worker:
    ready = Ready("w", "1", "decode", "tcp://w", FACTS)
    return Worker(ready, b"w", 0.0, 95, Story(story_lines))


@pytest.mark.parametrize(
    ("moves", "phases", "first"),
    [
        (CALL_MOVES, CallPhase, CallPhase.QUEUED),
        (WORKER_MOVES, WorkerPhase, WorkerPhase.UP),
        (PAIR_MOVES, PairPhase, PairPhase.COLD),
    ],
)
def test_every_phase_is_in_its_table_and_can_be_reached(
    moves: Mapping[enum.Enum, frozenset[enum.Enum]], phases: type[enum.Enum], first: enum.Enum
) -> None:
    assert set(moves) == set(phases)
    reached, frontier = {first}, [first]
    while frontier:
        new = moves[frontier.pop()] - reached
        reached |= new
        frontier += new
    assert reached == set(phases)


def test_a_forbidden_move_raises_with_the_story() -> None:
    worker = a_worker()
    worker.move(WorkerPhase.SUSPECT, 1.0, "silent")
    worker.move(WorkerPhase.LOST, 2.0, "still silent")
    with pytest.raises(InvalidTransition, match=r"(?s)from lost to up.*1\.000 suspect: silent"):
        worker.move(WorkerPhase.UP, 3.0, "no")
    assert worker.phase is WorkerPhase.LOST


def test_roles_turn_back_and_forth_and_mixed_workers_stay() -> None:
    worker = a_worker()
    worker.turn("prefill", 1.0, "a backlog")
    assert (worker.role, worker.turned_s, worker.ready.role) == ("prefill", 1.0, "decode")
    worker.turn("decode", 2.0, "full")
    assert worker.role == "decode"
    with pytest.raises(InvalidTransition, match=r"(?s)from decode to mixed.*2\.000 decode: full"):
        worker.turn("mixed", 3.0, "no")
    assert set(ROLE_TURNS) == set(get_args(Role))
    assert not ROLE_TURNS["mixed"]


def test_only_workers_that_are_up_may_get_work() -> None:
    worker = a_worker()
    assert worker.up
    worker.move(WorkerPhase.SUSPECT, 1.0, "silent")
    assert not worker.up


def test_a_story_forgets_its_beginning() -> None:
    worker = a_worker(story_lines=3)
    for number in range(5):
        worker.move(WorkerPhase.SUSPECT, number, "silent")
        worker.move(WorkerPhase.UP, number, f"back {number}")
    assert [why for _, _, why in worker.story.lines] == ["back 3", "silent", "back 4"]


def test_deadlines_come_in_order_and_only_when_due() -> None:
    deadlines = Deadlines()
    deadlines.set(("b",), 2.0)
    deadlines.set(("a",), 2.0)
    deadlines.set(("c",), 1.0)
    assert deadlines.next_s() == 1.0
    assert deadlines.pop(0.5) is None
    assert [deadlines.pop(2.0) for _ in range(4)] == [("c",), ("a",), ("b",), None]
    assert deadlines.next_s() is None


def test_a_deadline_that_moves_counts_once() -> None:
    deadlines = Deadlines()
    deadlines.set(("a",), 1.0)
    deadlines.set(("a",), 3.0)
    deadlines.set(("b",), 2.0)
    deadlines.drop(("b",))
    deadlines.drop(("never",))
    assert deadlines.next_s() == 3.0
    assert deadlines.pop(2.5) is None
    assert deadlines.pop(3.0) == ("a",)


def test_old_heap_entries_do_not_pile_up() -> None:
    deadlines = Deadlines()
    for number in range(10 * SWEEP_ENTRIES_MIN):
        deadlines.set(("a",), 1e6 - number)
    assert len(deadlines) == 1
    assert deadlines.entries() <= SWEEP_ENTRIES_MIN + 2
    assert deadlines.pop(1e6) == ("a",)
    assert deadlines.pop(1e6) is None

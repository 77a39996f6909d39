"""What the core tells workers to keep of finished calls."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import pytest

from coordinator.core import Core
from coordinator.limits import Limits, Placement
from coordinator.protocol import (
    ApiBeat,
    Beat,
    CallContext,
    CancelRun,
    EngineFacts,
    Finished,
    Hello,
    KvChanges,
    Load,
    Plan,
    Ready,
    Retain,
    Started,
    Submit,
    ToCore,
)
from coordinator.retention import TAILS_PER_WORKER

FACTS = EngineFacts("0.32", "model", "fingerprint", 16, 1000, 16000, 64, 2048)
TOKENS = 160


def chain(text: str, blocks: int, before: bytes = b"") -> bytes:
    """Block hashes of a text, behind others."""
    for number in range(blocks):
        before += blake2b(f"{text}{number}".encode() + before[-8:], digest_size=8).digest()
    return before


class Bed:
    """A core with one worker and an API process; what the worker was told to keep."""

    def __init__(self, retention: bool = True) -> None:
        placement = Placement(retention=retention)
        self.core = Core(Limits(), placement, "core")
        self.now_s = 100.0
        self.pinned: dict[str, float] = {}
        self.unneeded: list[str] = []
        self.say("api", Hello("api"))
        self.say("w", Ready("w", "1", "mixed", "tcp://w", FACTS))

    def say(self, peer: str, message: ToCore) -> list[Any]:
        return self._sent(self.core.handle(peer.encode(), message, self.now_s))

    def _sent(self, sends: Sequence[Any]) -> list[Any]:
        self.core.check()
        for send in sends:
            if isinstance(send.message, Retain):
                assert send.peer == b"w"
                self.pinned |= {pin.name: pin.hold_s for pin in send.message.pins}
                for name in [*send.message.released, *send.message.unneeded]:
                    self.pinned.pop(name, None)
                self.unneeded += send.message.unneeded
        return [send.message for send in sends]

    def wait(self, seconds: float) -> None:
        """Time passes; everybody beats."""
        ends_s = self.now_s + seconds
        while self.now_s < ends_s:
            self.now_s = min(ends_s, self.now_s + 0.25)
            self.say("api", ApiBeat("api"))
            self.say("w", Beat("w", "1", Load()))
            self._sent(self.core.tick(self.now_s))

    def begin(self, request: str, hashes: bytes, run: str, **context: Any) -> None:
        told = CallContext("team", run, context.pop("agent", "a"), **context)
        tokens = len(hashes) // 8 * 16 + 1
        submit = Submit("api", request, 1, tokens, 100, hashes, context=told)
        (plan,) = [each for each in self.say("api", submit) if isinstance(each, Plan)]
        assert plan.decode.worker == "w"

    def end(self, request: str, outcome: str = "stop") -> None:
        self.say("api", Started("api", request, 1))
        self.say("api", Finished("api", request, 1, outcome, output_tokens=20))

    def rounds(self, run: str, count: int, gap_s: float = 2.0, agent: str = "a") -> bytes:
        """An agent that goes on with what it said, so many times."""
        hashes = chain(run, 8)
        for number in range(count):
            hashes = chain(f"{run}/{number}", 2, hashes)
            self.begin(f"{run}-{number}", hashes, run, agent=agent)
            self.end(f"{run}-{number}")
            self.wait(gap_s)
        return hashes


def test_what_is_likely_to_be_used_again_is_pinned_until_it_is_superseded() -> None:
    bed = Bed()
    hashes = bed.rounds("r", 6)
    assert list(bed.pinned) == ["r-5~1"]
    assert 2.0 <= bed.pinned["r-5~1"] <= 60.0
    bed.begin("next", chain("next", 1, hashes), "r")
    assert "r-5~1" in bed.pinned
    bed.say("api", Started("api", "next", 1))
    assert "r-5~1" not in bed.pinned
    assert bed.unneeded[-1] == "r-5~1"


def test_a_run_that_is_over_keeps_nothing() -> None:
    bed = Bed()
    bed.rounds("r", 6)
    assert bed.pinned
    bed.begin("last", chain("last", 3), "r", agent="other", final=True)
    bed.end("last")
    assert not bed.pinned
    assert {"r-5~1"} <= set(bed.unneeded)


def test_a_cancelled_run_keeps_nothing() -> None:
    bed = Bed()
    bed.rounds("r", 6)
    assert bed.pinned
    bed.say("client", CancelRun(1, "team", "r"))
    bed.wait(2.0)
    assert not bed.pinned


def test_what_a_queued_call_needs_is_pinned_whatever_was_expected() -> None:
    bed = Bed()
    hashes = bed.rounds("r", 1)
    bed.wait(100.0)
    assert not bed.pinned
    bed.begin("late", chain("late", 1, hashes), "r")
    bed.wait(0.5)
    assert "r-0~1" in bed.pinned


def test_pins_end_when_uses_stay_away() -> None:
    bed = Bed()
    bed.rounds("r", 8)
    assert bed.pinned
    bed.wait(300.0)
    assert not bed.pinned


def test_calls_without_a_run_go_on_from_each_other() -> None:
    bed = Bed()
    hashes = bed.rounds("", 6)
    assert list(bed.pinned) == ["-5~1"]
    bed.begin("other", chain("other", 12), "")
    bed.say("api", Started("api", "other", 1))
    assert list(bed.pinned) == ["-5~1"]
    bed.begin("next", chain("answer and more", 30, hashes), "")
    bed.say("api", Started("api", "next", 1))
    assert not bed.pinned
    assert bed.unneeded[-1] == "-5~1"


def test_the_last_call_of_a_run_is_not_needed_either() -> None:
    bed = Bed()
    hashes = bed.rounds("r", 3)
    bed.begin("last", chain("last", 2, hashes), "r", final=True)
    bed.end("last")
    assert {"r-2~1", "last~1"} <= set(bed.unneeded)
    bed.wait(5.0)
    assert not bed.pinned


def room(bed: Bed) -> int:
    """Blocks of which nobody will ask for any, as placement takes them."""
    return bed.core._index.room("w")


@pytest.mark.parametrize("outcome", ["stop", "abort"])
def test_what_a_run_leaves_that_is_over_is_room(outcome: str) -> None:
    bed = Bed()
    hashes = chain("last", 2, bed.rounds("r", 3))
    bed.begin("last", hashes, "r", final=True)
    assert room(bed) < FACTS.kv_blocks
    bed.say("api", Started("api", "last", 1))
    if outcome == "abort":
        bed.say("client", CancelRun(1, "team", "r"))
    answer = chain("answer", 3, hashes)
    bed.end("last", outcome)
    bed.say("w", KvChanges("w", "1", 0, [answer], reset=True))
    bed.wait(5.0)
    assert room(bed) == FACTS.kv_blocks
    # The same once more: what is asked for is not room.
    bed.begin("again", hashes, "s")
    bed.say("api", Started("api", "again", 1))
    assert room(bed) <= FACTS.kv_blocks - len(hashes) // 8


def test_calls_without_a_run_push_no_runs_out() -> None:
    bed = Bed()
    bed.rounds("r", 6)
    for number in range(TAILS_PER_WORKER + 8):
        bed.begin(f"single-{number}", chain(f"single-{number}", 1), "")
        bed.end(f"single-{number}")
    assert list(bed.pinned) == ["r-5~1"]
    assert not [name for name in bed.unneeded if name.startswith("single")]


def test_sessions_that_begin_alike_do_not_end_each_other() -> None:
    bed = Bed()
    hashes = chain("system", 10)
    bed.begin("a", hashes, "")
    bed.end("a")
    bed.begin("b", hashes, "")
    bed.say("api", Started("api", "b", 1))
    assert not bed.unneeded


def test_failed_calls_keep_nothing() -> None:
    bed = Bed()
    for number in range(6):
        bed.begin(f"failed-{number}", chain("failed", 8 + number), "r")
        bed.end(f"failed-{number}", "error")
        bed.wait(1.0)
    assert not bed.pinned
    assert not bed.unneeded


def test_pins_leave_room_for_what_is_reserved() -> None:
    bed = Bed()
    bed.rounds("r", 6)
    assert bed.pinned
    bed.begin("large", chain("large", 990), "other")
    bed.wait(2.0)
    assert not bed.pinned


def test_off_nothing_is_kept() -> None:
    bed = Bed(retention=False)
    bed.rounds("r", 6)
    assert not bed.pinned
    assert not bed.unneeded

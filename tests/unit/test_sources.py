"""Whom a worker may read from, and its book of what it has read."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from coordinator import protocol
from coordinator.protocol import LINKS_MAX, Beat, LinkLoad, Load
from tests.unit.test_handle import GOOD
from transfer import handle as handles
from transfer.handle import Handle, HandleError
from transfer.sources import SOURCE_ENGINE, Sources

BLOCK_BYTES = 1000


def handle(engine: str = "prefill-0-a", port: int = 5600, **fields: Any) -> Handle:
    return handles.from_params({**GOOD, "remote_engine_id": engine, "remote_port": port, **fields})


def sources(*met: str, most: int = 4) -> Sources:
    """The book of ``own`` that has met engines; an engine's worker is its name without the end."""
    book = Sources("own", BLOCK_BYTES, most)
    for engine in met:
        book.trying(engine.rpartition("-")[0], handle(engine))
        book.met(engine)
    return book


def measured(book: Sources, engine: str, size_bytes: int, elapsed_s: float) -> None:
    book.measured(
        {
            SOURCE_ENGINE: [engine],
            "bytes_transferred": [size_bytes],
            "transfer_duration": [elapsed_s],
        }
    )


# --- who may be read from ------------------------------------------------------------------


def test_only_an_engine_that_was_met_is_read_from() -> None:
    book = sources()
    with pytest.raises(HandleError, match=r"prefill-0-a at 10\.0\.0\.7:5600 was never met"):
        book.check(handle())
    book.trying("prefill-0", handle())
    with pytest.raises(HandleError, match="never met"):
        book.check(handle())
    book.met("prefill-0-a")
    book.check(handle())


@pytest.mark.parametrize(
    "elsewhere", [{"port": 5601}, {"remote_host": "evil"}, {"engine": "prefill-0-b"}]
)
def test_its_name_alone_does_not_make_an_engine_known(elsewhere: dict[str, Any]) -> None:
    with pytest.raises(HandleError, match="never met"):
        sources("prefill-0-a").check(handle(**elsewhere))


def test_a_workers_new_engine_takes_the_place_of_its_old_one() -> None:
    book = sources("prefill-0-a", "prefill-1-a")
    measured(book, "prefill-0-a", 5000, 0.1)
    book.trying("prefill-0", handle("prefill-0-b"))
    with pytest.raises(HandleError):
        book.check(handle("prefill-0-a"))
    book.met("prefill-0-b")
    book.check(handle("prefill-0-b"))
    book.check(handle("prefill-1-a"))
    assert book.report() == []
    measured(book, "prefill-0-a", 5000, 0.1)
    assert book.report() == [], "what the old one still sent is not the new one's"


def test_an_engine_stays_known_when_it_is_met_again() -> None:
    """A core that was restarted lets all pairs meet anew, while calls go on."""
    book = sources("prefill-0-a")
    measured(book, "prefill-0-a", 5000, 0.1)
    book.trying("prefill-0", handle())
    book.check(handle())
    assert [load.transfers for load in book.report()] == [1]


def test_the_engine_longest_unmet_goes_first() -> None:
    book = sources("a-1", "b-1", "c-1", "a-1", "d-1", most=3)
    for engine in ("c-1", "a-1", "d-1"):
        book.check(handle(engine))
    with pytest.raises(HandleError):
        book.check(handle("b-1"))


def test_what_is_held_here_may_be_given_back_here_only() -> None:
    book = sources("prefill-0-a")
    book.check(handle("own"))
    book.check_own(handle("own"))
    with pytest.raises(HandleError, match="held by prefill-0-a, not here"):
        book.check_own(handle("prefill-0-a"))


# --- what is read ---------------------------------------------------------------------------


def test_what_is_read_is_counted_by_worker() -> None:
    book = sources("prefill-0-a", "prefill-1-a")
    measured(book, "prefill-0-a", 5000, 0.25)
    measured(book, "prefill-1-a", 7000, 0.5)
    measured(book, "prefill-0-a", 6000, 0.5)
    measured(book, "stranger", 6000, 0.5)
    first, second = book.report()
    assert (first.source, first.transfers, first.bytes_total) == ("prefill-0", 2, 11_000)
    assert (first.elapsed_s, first.fixed_s, first.bytes_per_s) == (0.75, 0.5, 0.0)
    assert (second.source, second.transfers, second.bytes_total) == ("prefill-1", 1, 7000)


def test_statistics_without_reads_change_nothing() -> None:
    book = sources("prefill-0-a")
    book.measured({})
    book.measured({"num_failed_transfers": [1], "bytes_transferred": [], SOURCE_ENGINE: []})
    assert book.report() == []


def test_bytes_are_in_flight_until_the_request_ends() -> None:
    book = sources("prefill-0-a")
    book.started("r~1", handle())
    book.started("s~1", handle(remote_request_id="s~1"))
    size_bytes = handles.blocks_held(handle()) * BLOCK_BYTES
    assert [load.in_flight_bytes for load in book.report()] == [2 * size_bytes]
    book.ended("r~1")
    book.ended("r~1")
    book.ended("never")
    assert [load.in_flight_bytes for load in book.report()] == [size_bytes]
    book.ended("s~1")
    assert [load.in_flight_bytes for load in book.report()] == [0]


def test_nothing_moves_when_a_worker_gets_its_own_handle() -> None:
    book = sources()
    book.started("r~1", handle("own"))
    book.ended("r~1")
    assert book.report() == []


def test_the_core_is_told_of_so_many_and_takes_no_more() -> None:
    engines = [f"w{number}-a" for number in range(LINKS_MAX + 1)]
    book = sources(*engines, most=4096)
    for engine in engines:
        measured(book, engine, 1, 1.0)
    links = book.report()
    assert [link.source for link in links] == [f"w{n}" for n in range(LINKS_MAX, 0, -1)]
    beat = Beat("decode-0", "i", Load(), links)
    assert protocol.decode_to_core(protocol.encode(beat)) == beat
    too_many = protocol.encode(Beat("decode-0", "i", Load(), [*links, LinkLoad("more")]))
    with pytest.raises(msgspec.ValidationError):
        protocol.decode_to_core(too_many)

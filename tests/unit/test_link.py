"""The control link over real sockets, against a core that is played by hand."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import zmq

from coordinator import link as subject
from coordinator import protocol, sockets
from coordinator.link import ControlLink, GarbageCounter, refuse_pickle
from coordinator.protocol import (
    Alive,
    ApiBeat,
    Hello,
    Refused,
    Unknown,
    Welcome,
    WorkerGone,
    encode,
)
from coordinator.sockets import make_socket

WAIT_S = 10.0
GARBAGE = [
    b"",
    b"\x00",
    b"\xc1" * 10,
    os.urandom(64),
    b"\x81\xa4type\xa7Nothing",
    encode(Hello("a message, but not one for an API process")),
    encode(WorkerGone("w", "i", "r"))[:-1],
    b"\x82\xa4type\xa6Unknown\xa4core\xa2\xff\xfe",
    b"\x82\xa4type\xa6Unknown\xa1x" + b"\x91" * 1_000_000,
    b"\x82\xa4type\xa6Unknown\xa4core\xdb\xff\xff\xff\xff",
]


class PlayedCore:
    """A ROUTER socket and what arrives on it."""

    def __init__(self, context: zmq.Context[Any], address: str = "tcp://127.0.0.1:*") -> None:
        self.socket = make_socket(context, zmq.ROUTER)
        self.address = self.socket.bind(address)
        self.peer = b""

    async def hear(self, kind: type[msgspec.Struct]) -> protocol.Message:
        """The next message of that kind."""
        async with asyncio.timeout(WAIT_S):
            while True:
                peer, frame = await self.socket.receive()
                self.peer = peer.bytes
                message = protocol.decode_to_core(frame.buffer)
                if isinstance(message, kind):
                    return message

    def say(self, *frames: bytes) -> None:
        assert self.socket.post([self.peer, *frames])

    def close(self) -> None:
        self.socket.close()


class Peer:
    """A link of an API process and what it was told."""

    def __init__(self, context: zmq.Context[Any], address: str) -> None:
        self.heard: asyncio.Queue[protocol.CoreToApi] = asyncio.Queue()
        self.link = ControlLink(
            context,
            address,
            hello=lambda: Hello("api"),
            beat=lambda: ApiBeat("api", 3),
            decode=protocol.decode_core_to_api,
            on_message=self.heard.put_nowait,
        )

    async def hear(self) -> protocol.CoreToApi:
        return await asyncio.wait_for(self.heard.get(), WAIT_S)


@pytest.fixture
async def context() -> AsyncIterator[zmq.Context[Any]]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it, but not for ever."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.005)


@asynccontextmanager
async def running(link: ControlLink[protocol.CoreToApi]) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(link.run())
    try:
        yield task
    finally:
        link.close()
        await asyncio.wait({task}, timeout=WAIT_S)
        link.socket.close()


async def test_a_peer_introduces_itself_until_it_is_taken_in_then_beats(
    context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "HELLO_INTERVAL_S", 0.05)
    core = PlayedCore(context)
    peer = Peer(context, core.address)
    async with running(peer.link):
        for _ in range(3):
            await core.hear(Hello)
        assert peer.link.welcome is None
        core.say(encode(Welcome(0.05, "core-1", 16)))
        assert await peer.hear() == Welcome(0.05, "core-1", 16)
        await asyncio.wait_for(peer.link.welcomed(), WAIT_S)
        assert peer.link.core == "core-1"
        assert await core.hear(ApiBeat) == ApiBeat("api", 3)
    core.close()


async def test_a_core_is_heard_as_long_as_it_answers_beats(context: zmq.Context[Any]) -> None:
    core = PlayedCore(context)
    peer = Peer(context, core.address)
    async with running(peer.link):
        await core.hear(Hello)
        assert not peer.link.is_heard(5, time.monotonic()), "it has not taken us in"
        core.say(encode(Welcome(0.05, "core-1")))
        await peer.hear()
        for _ in range(3):
            await core.hear(ApiBeat)
            said_s = time.monotonic()
            core.say(encode(Alive("core-1")))
            await until(lambda since_s=said_s: peer.link.heard_s > since_s)
            assert peer.link.is_heard(5, time.monotonic())
        for garbage in GARBAGE:
            core.say(garbage)
        # It is gone, or stands still: beats are not answered.
        heard_s = peer.link.heard_s
        await until(lambda: not peer.link.is_heard(5, time.monotonic()))
        assert time.monotonic() - heard_s >= 5.5 * 0.05
        assert peer.link.heard_s == heard_s, "garbage does not count"
        core.say(encode(Alive("core-1")))
        await until(lambda: peer.link.is_heard(5, time.monotonic()))
        assert peer.heard.empty(), "the link keeps these to itself"
    core.close()


async def test_garbage_is_counted_said_once_and_changes_nothing(
    context: zmq.Context[Any], caplog: pytest.LogCaptureFixture
) -> None:
    core = PlayedCore(context)
    peer = Peer(context, core.address)
    async with running(peer.link) as task:
        await core.hear(Hello)
        with caplog.at_level(logging.WARNING):
            for garbage in GARBAGE:
                core.say(garbage)
            core.say(encode(Unknown("c")), b"a second frame")
            core.say(encode(WorkerGone("w", "i", "r")))
            assert await peer.hear() == WorkerGone("w", "i", "r")
        assert peer.link.garbage.total == len(GARBAGE) + 1
        said = [record for record in caplog.records if "no message" in record.message]
        assert len(said) == 1
        assert not task.done()
        assert peer.heard.empty()
    core.close()


async def test_a_core_that_does_not_know_us_is_told_again(context: zmq.Context[Any]) -> None:
    core = PlayedCore(context)
    peer = Peer(context, core.address)
    async with running(peer.link):
        await core.hear(Hello)
        core.say(encode(Welcome(0.05, "core-1")))
        await peer.hear()
        await core.hear(ApiBeat)
        core.say(encode(Unknown("core-2")))
        await core.hear(Hello)
        assert peer.link.welcome is None
        core.say(encode(Welcome(0.05, "core-2")))
        assert await peer.hear() == Welcome(0.05, "core-2")
        assert peer.link.core == "core-2"
    core.close()


async def test_a_refusal_ends_it_with_the_reason(context: zmq.Context[Any]) -> None:
    core = PlayedCore(context)
    peer = Peer(context, core.address)
    async with running(peer.link) as task:
        await core.hear(Hello)
        core.say(encode(Refused("another vLLM version")))
        await asyncio.wait_for(task, WAIT_S)
        assert peer.link.refused == "another vLLM version"
        assert peer.heard.empty()
    core.close()


async def test_a_core_that_restarts_on_its_port_is_found_again(
    context: zmq.Context[Any],
) -> None:
    core = PlayedCore(context)
    peer = Peer(context, core.address)
    async with running(peer.link):
        await core.hear(Hello)
        core.say(encode(Welcome(0.05, "core-1")))
        await peer.hear()
        core.close()
        await asyncio.sleep(0.2)
        core = PlayedCore(context, core.address)
        await core.hear(ApiBeat)
        core.say(encode(Unknown("core-2")))
        await core.hear(Hello)
        core.say(encode(Welcome(0.05, "core-2")))
        assert await peer.hear() == Welcome(0.05, "core-2")
    core.close()


async def test_an_error_of_ours_ends_the_link_with_its_story(
    context: zmq.Context[Any],
) -> None:
    core = PlayedCore(context)
    peer = Peer(context, core.address)

    def broken(message: protocol.CoreToApi) -> None:
        raise AssertionError("ours")

    peer.link._on_message = broken
    task = asyncio.create_task(peer.link.run())
    await core.hear(Hello)
    core.say(encode(WorkerGone("w", "i", "r")))
    with pytest.raises(ExceptionGroup) as raised:
        await asyncio.wait_for(task, WAIT_S)
    assert raised.group_contains(AssertionError, match="ours")
    peer.link.socket.close()
    core.close()


async def test_nobody_listening_is_no_error(context: zmq.Context[Any]) -> None:
    peer = Peer(context, "tcp://127.0.0.1:1")
    async with running(peer.link) as task:
        assert peer.link.send(ApiBeat("api"))
        await asyncio.sleep(0.1)
        assert not task.done()


# --- sockets ------------------------------------------------------------------------------------


async def test_a_message_to_a_peer_that_is_not_there_is_told(context: zmq.Context[Any]) -> None:
    core = PlayedCore(context)
    assert not core.socket.post([b"nobody", b"frame"])
    core.close()


async def test_a_full_queue_is_told_and_what_fitted_arrives_whole_and_in_order(
    context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "SEND_QUEUE_MESSAGES", 20)
    core = PlayedCore(context)
    slow = make_socket(context, zmq.DEALER)
    slow.connect(core.address)
    slow.post([encode(Hello("slow"))])
    await core.hear(Hello)
    filler = b"x" * 200_000
    sent = 0
    while core.socket.post([core.peer, str(sent).encode(), filler]):
        sent += 1
        assert sent < 10_000
    for number in range(sent):
        head, body = await asyncio.wait_for(slow.receive(), WAIT_S)
        assert (head.bytes, len(body)) == (str(number).encode(), len(filler))
    for _ in range(1000):
        if core.socket.post([core.peer, b"again"]):
            break
        await asyncio.sleep(0.01)
    (frame,) = await asyncio.wait_for(slow.receive(), WAIT_S)
    assert frame.bytes == b"again"
    slow.close()
    core.close()


async def test_an_oversized_frame_ends_its_connection_and_nothing_else(
    context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "MESSAGE_BYTES_MAX", 10_000)
    core = PlayedCore(context)
    other = zmq.Context()
    big = other.socket(zmq.DEALER)
    big.connect(core.address)
    big.send(b"x" * 20_000)
    good = make_socket(context, zmq.DEALER)
    good.connect(core.address)
    good.post([encode(Hello("good"))])
    assert await core.hear(Hello) == Hello("good")
    good.close()
    core.close()
    other.destroy(linger=0)


def test_garbage_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    counter = GarbageCounter("a test")
    for _ in range(5):
        counter.add(ValueError("x"))
    assert counter.total == 5
    assert len(caplog.records) == 1
    assert "a test" in caplog.records[0].message


@pytest.mark.parametrize(("value", "refused"), [("1", True), ("0", False), ("", False)])
def test_unpickling_is_refused(value: str, refused: bool) -> None:
    environment = {"VLLM_ALLOW_INSECURE_SERIALIZATION": value}
    if refused:
        with pytest.raises(SystemExit, match="VLLM_ALLOW_INSECURE_SERIALIZATION"):
            refuse_pickle(environment)
    else:
        refuse_pickle(environment)
    refuse_pickle({})

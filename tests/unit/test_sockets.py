"""Sockets on an event loop: nothing that has arrived is slept through, whatever else is done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import zmq

from coordinator.sockets import Socket, make_socket

WAIT_S = 10.0
MESSAGES = 2000


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Socket, Socket]]:
    """Two sockets that are connected."""
    context: zmq.Context[Any] = zmq.Context()
    left, right = make_socket(context, zmq.DEALER), make_socket(context, zmq.DEALER)
    right.connect(left.bind("tcp://127.0.0.1:*"))
    assert right.post([b"hello"])
    await hear(left)
    yield left, right
    left.close()
    right.close()
    context.destroy(linger=0)


async def hear(socket: Socket) -> list[bytes]:
    frames = await asyncio.wait_for(socket.receive(), WAIT_S)
    return [frame.bytes for frame in frames]


async def test_a_message_wakes_the_sleeper(pair: tuple[Socket, Socket]) -> None:
    left, right = pair
    reading = asyncio.create_task(hear(left))
    await asyncio.sleep(0.05)
    assert not reading.done()
    assert right.post([b"a", b"b"])
    assert await reading == [b"a", b"b"]


async def test_both_at_once_lose_nothing_and_keep_the_order(pair: tuple[Socket, Socket]) -> None:
    """A send uses the descriptor's word up: without another look, sleepers would sleep on."""

    async def talk(socket: Socket) -> list[int]:
        async def say() -> None:
            for number in range(MESSAGES):
                assert socket.post([str(number).encode()])
                if number % 7 == 0:
                    await asyncio.sleep(0)

        saying = asyncio.create_task(say())
        heard = []
        while len(heard) < MESSAGES:
            heard += [int(frame) for frame in await hear(socket)]
            if len(heard) % 5 == 0:
                await asyncio.sleep(0)
        await saying
        return heard

    assert await asyncio.gather(*(talk(socket) for socket in pair)) == [list(range(MESSAGES))] * 2


async def test_waiting_ends_when_its_time_is_over(pair: tuple[Socket, Socket]) -> None:
    left, right = pair
    await asyncio.wait_for(left.wait(0.01), WAIT_S)
    assert left.receive_now() is None
    assert right.post([b"late"])
    await asyncio.wait_for(left.wait(WAIT_S), WAIT_S)
    assert await hear(left) == [b"late"]


async def test_who_stops_waiting_leaves_the_message_to_the_next(
    pair: tuple[Socket, Socket],
) -> None:
    left, right = pair
    reading = asyncio.create_task(hear(left))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert right.post([b"still here"])
    assert await hear(left) == [b"still here"]


async def test_a_monitor_tells_of_a_lost_connection() -> None:
    context: zmq.Context[Any] = zmq.Context()
    left, right = make_socket(context, zmq.ROUTER), make_socket(context, zmq.DEALER)
    monitor = right.monitor(zmq.EVENT_DISCONNECTED)
    right.connect(left.bind("tcp://127.0.0.1:*"))
    assert right.post([b"hello"])
    await hear(left)
    left.close()
    assert await hear(monitor)
    monitor.close()
    right.close()
    right.close()  # once more is fine
    context.destroy(linger=0)

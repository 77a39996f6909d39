"""Sockets of ours, made in one place: their limits, and how they wait on an event loop.

pyzmq's asyncio sockets make a future for every message, sent or received, which is most
of what a message costs in Python. ``Socket`` receives what is there without any and
makes one future only to sleep. It is ``zmq.Socket`` with ``loop.add_reader``, which
pyzmq's maintainers advise for this; what has to be known for it is told below.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import zmq

from coordinator.protocol import MESSAGE_BYTES_MAX

HEARTBEAT_MS = 2_000
HEARTBEAT_TIMEOUT_MS = 10_000
SEND_QUEUE_MESSAGES = 100_000


class Socket:
    """A ZeroMQ socket on the running event loop, with one reader at a time.

    ZeroMQ's descriptor becomes readable when something *may* have happened, and says so
    once: whoever asks for the events, or sends, takes that word away. So the events are
    asked for before every sleep, and after every send while somebody sleeps. Use it on
    the loop that it was made on; close it there.
    """

    def __init__(self, raw: zmq.Socket[bytes]) -> None:
        self.raw = raw
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(raw.getsockopt(zmq.FD))
        self._sleeper: asyncio.Future[None] | None = None
        self._loop.add_reader(self._descriptor, self._look)

    def bind(self, address: str) -> str:
        """Listen. The address that peers connect to, with the port that was chosen."""
        self.raw.bind(address)
        return self.raw.getsockopt_string(zmq.LAST_ENDPOINT)

    def connect(self, address: str) -> None:
        """Send to and receive from whoever listens there, now or later."""
        self.raw.connect(address)

    def post(self, frames: Sequence[Any]) -> bool:
        """Send without waiting, all frames or none. False if the peer is gone or its queue full."""
        try:
            self.raw.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        finally:
            if self._sleeper is not None:
                self._look()
        return True

    def receive_now(self) -> list[zmq.Frame] | None:
        """The next message's frames if one has arrived."""
        try:
            return self.raw.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None

    async def receive(self) -> list[zmq.Frame]:
        """The next message's frames. Does not give others a turn while messages are there."""
        while (frames := self.receive_now()) is None:
            await self.wait()
        return frames

    async def wait(self, timeout_s: float | None = None) -> None:
        """Sleep until there is something to receive, or for ``timeout_s``."""
        assert self._sleeper is None, "somebody else waits on this socket"
        if self._is_readable():
            return
        self._sleeper = self._loop.create_future()
        alarm = None if timeout_s is None else self._loop.call_later(timeout_s, self._wake)
        try:
            await self._sleeper
        finally:
            self._sleeper = None
            if alarm is not None:
                alarm.cancel()

    def monitor(self, events: int) -> Socket:
        """A socket that tells what becomes of connections."""
        return Socket(self.raw.get_monitor_socket(events))

    def close(self) -> None:
        """Close at once; what is not sent yet is lost. More than once is fine."""
        if not self.raw.closed:
            self._loop.remove_reader(self._descriptor)
            self.raw.disable_monitor()
            self.raw.close(linger=0)

    def _is_readable(self) -> bool:
        return bool(int(self.raw.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def _look(self) -> None:
        if self._is_readable():
            self._wake()

    def _wake(self) -> None:
        if self._sleeper is not None and not self._sleeper.done():
            self._sleeper.set_result(None)


def make_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> Socket:
    """A socket with the project's limits: bounded queues and frames, peers watched."""
    raw = context.socket(kind)
    raw.setsockopt(zmq.LINGER, 0)
    raw.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
    raw.setsockopt(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
    raw.setsockopt(zmq.RCVHWM, SEND_QUEUE_MESSAGES)
    raw.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    raw.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    raw.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    raw.setsockopt(zmq.RECONNECT_IVL, 100)
    raw.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)
    if kind == zmq.ROUTER:
        # A peer that is gone is an event for the caller, not a message lost in silence.
        raw.setsockopt(zmq.ROUTER_MANDATORY, 1)
    return Socket(raw)

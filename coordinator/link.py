"""The peer's end of the control connection.

``ControlLink`` says who we are until the core answers, beats, and says it again when
a restarted core does not know us. It loses messages when the core is away: whoever
needs an answer asks again (see ``protocol``). It decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import msgspec
import zmq

from coordinator import protocol
from coordinator.sockets import make_socket

logger = logging.getLogger("pythia.link")

HELLO_INTERVAL_S = 0.5

BAD_FRAME = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding a frame raises that is not a message."""
PICKLE_VARIABLE = "VLLM_ALLOW_INSECURE_SERIALIZATION"

M = TypeVar("M")


class BadBody(ValueError):
    """Frames behind a header that are not what vLLM's encoder makes."""


def refuse_pickle(environment: Mapping[str, str]) -> None:
    """SystemExit if vLLM is told to unpickle what comes over a socket."""
    if environment.get(PICKLE_VARIABLE, "0") not in ("", "0"):
        raise SystemExit(f"{PICKLE_VARIABLE} is set: whoever reaches a socket could run code here")


class GarbageCounter:
    """Counts frames that are not messages; says so once per kind of peer."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.total = 0

    def add(self, error: Exception) -> None:
        self.total += 1
        if self.total == 1:
            logger.warning(
                "dropped a frame that is no message from %s (%s); further ones are only counted",
                self.what,
                type(error).__name__,
            )


class ControlLink(Generic[M]):
    """A peer's connection to the core.

    ``hello`` makes the message that introduces us, ``beat`` the one that says we live;
    ``on_message`` gets whatever else arrives. ``refused`` is set, with the reason, when
    the core will not have us; ``run`` then returns. ``heard_s`` is when the core last spoke.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        hello: Callable[[], protocol.Message],
        beat: Callable[[], protocol.Message],
        decode: Callable[[memoryview], M],
        on_message: Callable[[M], None],
    ) -> None:
        self.socket = make_socket(context, zmq.DEALER)
        self.socket.connect(address)
        self.address = address
        self.core = ""
        self.welcome: protocol.Welcome | None = None
        self.refused = ""
        self.heard_s = float("-inf")
        self.garbage = GarbageCounter("the core")
        self._hello = hello
        self._beat = beat
        self._decode = decode
        self._on_message = on_message
        self._welcomed = asyncio.Event()
        self._closed = asyncio.Event()

    def send(self, message: protocol.Message) -> bool:
        """Send to the core without waiting; False if that is impossible now."""
        return self.socket.post([protocol.encode(message)])

    async def welcomed(self) -> None:
        """Wait until the core has taken us in."""
        await self._welcomed.wait()

    def is_heard(self, beats_missed: int, now_s: float) -> bool:
        """Whether the core has taken us in and, asked once per beat, has not been silent for
        ``beats_missed`` of them. Only a core that answers beats is heard when all is quiet."""
        if self.welcome is None:
            return False
        # As the core counts it: half a beat is the answer's own way.
        return now_s - self.heard_s < (beats_missed + 0.5) * self.welcome.beat_interval_s

    async def run(self) -> None:
        """Introduce, beat and receive until closed or refused."""
        async with asyncio.TaskGroup() as group:
            receiving = group.create_task(self._receive())
            beating = group.create_task(self._beat_forever())
            await self._closed.wait()
            receiving.cancel()
            beating.cancel()

    def close(self) -> None:
        """Make ``run`` return."""
        self._closed.set()

    async def _beat_forever(self) -> None:
        while True:
            if self.welcome is None:
                self.send(self._hello())
                interval_s = HELLO_INTERVAL_S
            else:
                self.send(self._beat())
                interval_s = self.welcome.beat_interval_s
            await asyncio.sleep(interval_s)

    async def _receive(self) -> None:
        while True:
            frames = await self.socket.receive()
            if len(frames) != 1:
                self.garbage.add(ValueError(f"{len(frames)} frames"))
                continue
            try:
                message = self._decode(frames[0].buffer)
            except BAD_FRAME as error:
                self.garbage.add(error)
                continue
            self._handle(message)

    def _handle(self, message: M) -> None:
        self.heard_s = time.monotonic()
        if isinstance(message, protocol.Welcome):
            self.welcome = message
            self.core = message.core
            self._welcomed.set()
            self._on_message(message)
        elif isinstance(message, protocol.Unknown):
            self.welcome = None
            self._welcomed.clear()
            self.send(self._hello())
        elif isinstance(message, protocol.Refused):
            self.refused = message.reason
            self._closed.set()
        elif not isinstance(message, protocol.Alive):
            self._on_message(message)

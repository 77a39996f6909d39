"""From a worker's engine to the core: what is in its prefix cache.

The engine publishes on sockets in a folder that only its owner can open, with the blocks'
tokens; what leaves this process are hashes. Batches are numbered: what was missed is asked for
again, and if the engine has forgotten it, what is known is forgotten too and told from there on.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import zmq

from coordinator.link import BAD_FRAME, GarbageCounter
from coordinator.protocol import KV_CHAINS_MAX, KvChanges, KvRemoved
from coordinator.sockets import make_socket
from transfer.kv_events import News, Translation, decode_batch

logger = logging.getLogger("pythia.worker")

NUMBER_BYTES = 8
END = (-1).to_bytes(NUMBER_BYTES, "big", signed=True)
BATCHES_KEPT = 10_000
"""By the engine, for who has missed some."""
CHAIN_BYTES_MAX = 4 * 2**20
"""In one message to the core."""


PREFIX = "pythia-kv-"


class Endpoints:
    """Where an engine publishes; the folder goes with this object.

    That of a worker that was killed goes when the next one starts.
    """

    def __init__(self) -> None:
        _sweep(Path(tempfile.gettempdir()))
        self._folder = tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-")
        folder = Path(self._folder.name)
        self.events = f"ipc://{folder}/events"
        self.replay = f"ipc://{folder}/replay"

    def config(self) -> dict[str, Any]:
        """vLLM's ``kv_events_config``."""
        return {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": self.events,
            "replay_endpoint": self.replay,
            "buffer_steps": BATCHES_KEPT,
        }

    def close(self) -> None:
        """Remove the folder. The engine is not running any more."""
        self._folder.cleanup()


def _sweep(folder: Path) -> None:
    """Remove what processes left behind that are not there any more."""
    for left in folder.glob(f"{PREFIX}*-*"):
        owner = left.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)


class KvListener:
    """Hears one engine, and makes messages of it."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoints: Endpoints,
        worker: str,
        incarnation: str,
        send: Callable[[KvChanges], bool],
        host: bool = False,
    ) -> None:
        """``host``: the engine keeps blocks in its host's memory, too."""
        self.translation = Translation(host)
        self.garbage = GarbageCounter("the engine's events")
        self._worker, self._incarnation = worker, incarnation
        self._send = send
        self._sequence = 0
        self._told = False
        """The core has been told all, and of every change since."""
        self._next_batch = 0
        self._events = make_socket(context, zmq.SUB)
        self._events.raw.setsockopt(zmq.SUBSCRIBE, b"")
        self._events.connect(endpoints.events)
        self._replay = make_socket(context, zmq.DEALER)
        self._replay.connect(endpoints.replay)

    async def run(self) -> None:
        """Listen until cancelled."""
        while True:
            frames = await self._events.receive()
            if len(frames) != 3 or len(frames[1].buffer) != NUMBER_BYTES:
                self.garbage.add(ValueError(f"{len(frames)} frames"))
                continue
            number = int.from_bytes(frames[1].buffer, "big")
            if number > self._next_batch:
                await self._catch_up(number)
            self._take(number, frames[2].buffer)

    def tell(self) -> None:
        """Tell the core what has changed since it was last told; everything if it asked."""
        if not self._told:
            self._tell(self.translation.everything())
            return
        news = self.translation.look()
        if any(news):
            self._tell(news)

    def resync(self) -> None:
        """The core has lost count."""
        self._told = False
        self.tell()

    def begin(self) -> None:
        """A core has taken the worker in: it knows nothing yet."""
        self._told = False

    def close(self) -> None:
        """Hear no more."""
        self._events.close()
        self._replay.close()

    def _take(self, number: int, payload: memoryview) -> None:
        if number < self._next_batch:
            return
        self._next_batch = number + 1
        try:
            batch = decode_batch(payload)
        except BAD_FRAME as error:
            self.garbage.add(error)
            return
        self.translation.take(batch.events)

    async def _catch_up(self, number: int) -> None:
        """Batches before ``number`` were missed."""
        first = self._next_batch
        asked = self._replay.post([b"", first.to_bytes(NUMBER_BYTES, "big")])
        while asked:
            frames = await self._replay.receive()
            # An empty frame, the topic, the batch's number, the batch.
            if len(frames) != 4 or bytes(frames[2].buffer) == END:
                break
            replayed = int.from_bytes(frames[2].buffer, "big")
            if replayed == self._next_batch and replayed < number:
                self._take(replayed, frames[3].buffer)
        if self._next_batch < number:
            logger.warning("%d of the engine's events are lost", number - self._next_batch)
            self.translation.forget()
            self._next_batch = number

    def _tell(self, news: News) -> None:
        """In messages of a bounded size. What can't be sent is told with all the rest later."""
        self._told = True
        for number, (stored, removed, host_stored, host_removed) in enumerate(_parts(news)):
            message = KvChanges(
                self._worker,
                self._incarnation,
                self._sequence,
                stored,
                removed,
                reset=news.cleared and number == 0,
                host_stored=host_stored,
                host_removed=host_removed,
            )
            if not self._send(message):
                self._told = False
                return
            self._sequence += 1


Part = tuple[list[bytes], list[KvRemoved], list[bytes], list[KvRemoved]]
"""What one message tells: what has come into the cache and gone, then the same of the host."""


def _parts(news: News) -> list[Part]:
    """What fits into one message each; at least one."""
    parts: list[Part] = [([], [], [], [])]
    room = CHAIN_BYTES_MAX

    def part_for(chain: bytes) -> Part:
        nonlocal room
        if len(chain) > room or any(len(each) >= KV_CHAINS_MAX for each in parts[-1]):
            parts.append(([], [], [], []))
            room = CHAIN_BYTES_MAX
        room -= len(chain)
        return parts[-1]

    for chain in news.stored:
        part_for(chain)[0].append(chain)
    for gone in news.removed:
        part_for(gone.chain)[1].append(gone)
    for chain in news.host_stored:
        part_for(chain)[2].append(chain)
    for gone in news.host_removed:
        part_for(gone.chain)[3].append(gone)
    return parts

"""What a simulated engine keeps for calls to come: as ``transfer.pins`` does in vLLM's.

A pin holds the blocks that an ended request has left in the prefix cache, so that they are not
evicted, until it ends, is released, or a request needs the room: then the pins of least worth go
first. What was evicted before it came can't be pinned any more.
"""

from __future__ import annotations

from collections import OrderedDict

from cluster.simulator.kv_cache import BlockPool, Holding
from coordinator.protocol import BLOCK_HASH_BYTES

REMEMBERED = 2
"""Of ended requests so many times what the pool holds is remembered."""


class Pinned:
    """Blocks, until when, and what they are worth."""

    __slots__ = ("ends_s", "holding", "worth")

    def __init__(self, holding: Holding, ends_s: float, worth: float) -> None:
        self.holding = holding
        self.ends_s = ends_s
        self.worth = worth


class Pins:
    """Of one engine. Knows the chains of requests that ended lately."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._ended: OrderedDict[str, bytes] = OrderedDict()
        self._ended_bytes = 0
        self._pins: dict[str, Pinned] = {}

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def holdings(self) -> list[Holding]:
        """What is held."""
        return [pin.holding for pin in self._pins.values()]

    @property
    def blocks(self) -> int:
        """Blocks that nobody but pins holds."""
        return self._pool.only_held_by(self.holdings) if self._pins else 0

    def ended(self, name: str, holding: Holding) -> None:
        """A request is over; its blocks are still held."""
        chain = holding.cached_chain
        self._ended_bytes += len(chain) - len(self._ended.pop(name, b""))
        self._ended[name] = chain
        while self._ended_bytes > REMEMBERED * self._pool.blocks * BLOCK_HASH_BYTES:
            _, old = self._ended.popitem(last=False)
            self._ended_bytes -= len(old)

    def pin(self, name: str, ends_s: float, worth: float) -> None:
        """Keep what a request has left, or keep it for longer or shorter; unknown ones are
        ignored."""
        known = self._pins.get(name)
        if known is not None:
            known.ends_s, known.worth = ends_s, worth
            return
        chain = self._ended.get(name)
        if not chain:
            return
        holding = Holding(chain)
        hits = self._pool.lookup(holding, holding.chain_blocks)
        if hits.blocks:
            self._pool.adopt(holding, hits)
            self._pins[name] = Pinned(holding, ends_s, worth)

    def release(self, name: str) -> None:
        """Keep it no longer; unknown ones are ignored."""
        pin = self._pins.pop(name, None)
        if pin is not None:
            self._pool.release(pin.holding)

    def expire(self, now_s: float) -> None:
        """Those that have ended by now are released."""
        for name in [name for name, pin in self._pins.items() if pin.ends_s <= now_s]:
            self.release(name)

    def give_up_one(self) -> bool:
        """A request needs the room: release the pin of least worth. False if there is none."""
        if not self._pins:
            return False
        self.release(min(self._pins, key=lambda name: (self._pins[name].worth, name)))
        return True

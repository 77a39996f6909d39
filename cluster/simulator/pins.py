"""What a simulated engine keeps for calls to come: as ``transfer.pins`` does in vLLM's.

A pin holds the blocks that an ended request has left in the prefix cache, so that they are not
evicted, until it ends, is released, or a request needs the room: then the pins of least worth go
first. What was evicted before it came can't be pinned any more.
"""

from __future__ import annotations

from collections import OrderedDict

from cluster.simulator.kv_cache import BlockPool, Holding
from coordinator.protocol import BLOCK_HASH_BYTES, Pin

REMEMBERED = 2
"""Of ended requests so many times what the pool holds is remembered."""


class Pinned:
    """Blocks, until when; ``worth`` for a second since ``used_s``, less for more."""

    __slots__ = ("ends_s", "holding", "used_s", "worth")

    def __init__(self, holding: Holding) -> None:
        self.holding = holding
        self.ends_s = self.used_s = self.worth = 0.0

    def worth_at(self, now_s: float) -> float:
        """What it is worth by now."""
        return self.worth / max(1.0, now_s - self.used_s)


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

    def ended(self, name: str, chain: bytes) -> None:
        """A request is over; ``chain``: hashes of what is cached of it."""
        self._ended_bytes += len(chain) - len(self._ended.pop(name, b""))
        self._ended[name] = chain
        while self._ended_bytes > REMEMBERED * self._pool.blocks * BLOCK_HASH_BYTES:
            _, old = self._ended.popitem(last=False)
            self._ended_bytes -= len(old)

    def pin(self, pin: Pin, now_s: float) -> None:
        """Keep what a request has left, or keep it for longer or shorter; unknown ones are
        ignored."""
        pinned = self._pins.get(pin.name)
        if pinned is None:
            chain = self._ended.get(pin.name)
            if not chain:
                return
            holding = self._adopted(chain)
            if not holding.blocks:
                return
            pinned = self._pins[pin.name] = Pinned(holding)
        pinned.ends_s, pinned.used_s = now_s + pin.hold_s, now_s - pin.age_s
        pinned.worth = pin.worth

    def release(self, name: str, cold: bool = False) -> None:
        """Keep it no longer; unknown ones are ignored. ``cold``: nobody will ask for it, so it
        is evicted first, pinned before or not."""
        pin = self._pins.pop(name, None)
        if pin is not None:
            self._pool.release(pin.holding)
        if cold and (chain := self._ended.get(name)):
            self._pool.chill(chain)

    def _adopted(self, chain: bytes) -> Holding:
        holding = Holding(chain)
        self._pool.adopt(holding, self._pool.lookup(holding, holding.chain_blocks))
        return holding

    def expire(self, now_s: float) -> None:
        """Those that have ended by now are released."""
        for name in [name for name, pin in self._pins.items() if pin.ends_s <= now_s]:
            self.release(name)

    def give_up_one(self, now_s: float) -> bool:
        """A request needs the room: release the pin of least worth. False if there is none."""
        if not self._pins:
            return False
        worth = {name: pinned.worth_at(now_s) for name, pinned in self._pins.items()}
        self.release(min(worth, key=lambda name: (worth[name], name)))
        return True

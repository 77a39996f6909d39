"""What an engine keeps for calls to come: pins on blocks that ended requests have left.

vLLM's prefix cache evicts what was used longest ago. A *pin* holds the cached blocks of one ended
request beyond that, until it ends, is released, or a request needs the room: then the pins of
least worth are given up, before any request has to wait or loses its blocks. So a pin changes
nothing but the order of eviction. What is not needed any more can also be put where it is evicted
next, as far as no other request that is remembered here has begun with it.

    ended        a request is over; which hashes its blocks have is remembered for a while
    ordered      the core's ``Retain``, which comes as a request that is over at once
    make_room    so many blocks are needed
    expire       what has ended by now

Lives beside vLLM's scheduler, in its thread, on its block pool; knows no clock. Blocks are found
by their hashes: what was evicted before the pin came can't be pinned any more.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from coordinator.protocol import Pin, Retain

ORDER = "pythia_retain"
"""Names an order among a request's ``kv_transfer_params``."""
PINNED_BLOCKS = "pinned_blocks"
"""Names, in the engine's statistics, the list of how many blocks only pins held."""
REMEMBERED = 2
"""Of ended requests so many times the blocks of the pool are remembered."""


def order_params(order: Retain) -> dict[str, Any]:
    """An order as ``kv_transfer_params``."""
    return {ORDER: msgspec.msgpack.encode(order)}


def order_in(params: Mapping[str, Any]) -> Retain | None:
    """The order among ``kv_transfer_params``; None if there is none, ValueError for nonsense."""
    frame = params.get(ORDER)
    if frame is None:
        return None
    try:
        return msgspec.msgpack.decode(frame, type=Retain)
    except (msgspec.MsgspecError, TypeError) as error:
        raise ValueError(f"no order to retain: {error}") from error


class Pinned:
    """Blocks, until when; ``worth`` for a second since ``used_s``, half of it for two."""

    __slots__ = ("blocks", "ends_s", "used_s", "worth")

    def __init__(self, blocks: list[Any]) -> None:
        self.blocks = blocks
        self.ends_s = self.used_s = self.worth = 0.0

    def worth_at(self, now_s: float) -> float:
        """What it is worth by now."""
        return self.worth / max(1.0, now_s - self.used_s)


class Pins:
    """Of one engine. ``pool``: vLLM's ``BlockPool`` of one group of full attention."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._remembered_most = REMEMBERED * pool.num_gpu_blocks
        self._ended: OrderedDict[str, list[Any]] = OrderedDict()
        self._remembered = 0
        self._users: Counter[Any] = Counter()
        """How many remembered requests have a hash."""
        self._pins: dict[str, Pinned] = {}

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def remembered(self) -> int:
        """Ended requests that could be pinned."""
        return len(self._ended)

    @property
    def only_pinned(self) -> int:
        """Blocks that nobody but pins holds."""
        pinned = Counter(block.block_id for pin in self._pins.values() for block in pin.blocks)
        return sum(self._pool.blocks[at].ref_cnt == count for at, count in pinned.items())

    # --- what happens ---------------------------------------------------------------------

    def ended(self, name: str, hashes: Sequence[Any]) -> None:
        """A request is over; ``hashes`` of its full blocks."""
        self._forget(name)
        if not hashes:
            return
        kept = self._ended[name] = list(hashes)
        self._remembered += len(kept)
        self._users.update(kept)
        while self._remembered > self._remembered_most:
            self._forget(next(iter(self._ended)))

    def ordered(self, order: Retain, now_s: float) -> None:
        """Pin, renew, shorten and release what the core says."""
        for name in order.released:
            self._release(name)
        for name in order.unneeded:
            self._discard(name)
        for pin in order.pins:
            self._pin(pin, now_s)

    def make_room(self, blocks: int, now_s: float) -> None:
        """So many blocks are to be free, if giving up pins makes them so."""
        while self._pins and self._pool.get_num_free_blocks() < blocks:
            worth = {name: pin.worth_at(now_s) for name, pin in self._pins.items()}
            self._release(min(worth, key=lambda name: (worth[name], name)))

    def expire(self, now_s: float) -> None:
        """Those that have ended by now are released."""
        for name in [name for name, pin in self._pins.items() if pin.ends_s <= now_s]:
            self._release(name)

    # --- how --------------------------------------------------------------------------------

    def _pin(self, pin: Pin, now_s: float) -> None:
        pinned = self._pins.get(pin.name)
        if pinned is None:
            blocks = self._cached(self._ended.get(pin.name, ()))
            if not blocks:
                return
            self._pool.touch(blocks)
            pinned = self._pins[pin.name] = Pinned(blocks)
        pinned.ends_s, pinned.used_s = now_s + pin.hold_s, now_s - pin.age_s
        pinned.worth = pin.worth

    def _cached(self, hashes: Sequence[Any]) -> list[Any]:
        """The blocks of a chain that are in the cache, from its beginning on."""
        blocks = []
        for block_hash in hashes:
            found = self._pool.get_cached_block(block_hash, [0])
            if found is None:
                break
            blocks.append(found[0])
        return blocks

    def _release(self, name: str) -> None:
        pin = self._pins.pop(name, None)
        if pin is not None:
            # The last one is evicted first, as of a request.
            self._pool.free_blocks(reversed(pin.blocks))

    def _discard(self, name: str) -> None:
        """Nobody will ask for it: what is its own is evicted first."""
        self._release(name)
        hashes = self._ended.get(name, ())
        blocks = self._cached(hashes)
        own = len(blocks)
        while own and self._users[hashes[own - 1]] == 1 and blocks[own - 1].ref_cnt == 0:
            own -= 1
        if len(blocks) == len(hashes):
            queue = self._pool.free_block_queue
            cold = blocks[own:]
            for block in cold:
                queue.remove(block)
            queue.prepend_n(cold[::-1])
        self._forget(name)

    def _forget(self, name: str) -> None:
        hashes = self._ended.pop(name, None)
        if hashes is None:
            return
        self._remembered -= len(hashes)
        for block_hash in hashes:
            left = self._users[block_hash] - 1
            if left:
                self._users[block_hash] = left
            else:
                del self._users[block_hash]

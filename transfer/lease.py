"""Leases: for how long held KV may be counted on, and by whom.

A prefill engine holds a request's blocks for a limited time. Three books are kept:

* ``Lease``, by the API process, from the moment a handle arrives. It is dispatched at most
  once, and never when it might run out before the decode engine speaks up for it.
* ``Spent``, by the decode worker: handles it has already used, so none is used twice.
* ``Held``, by the prefill worker: blocks it has pinned for others.

Nothing here reads a clock or sends anything; every time is an argument in seconds on the
caller's own monotonic clock.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

LeaseState = Literal["granted", "dispatched", "discarded", "missed"]

_MOVES: dict[LeaseState, tuple[LeaseState, ...]] = {
    "granted": ("dispatched", "discarded", "missed"),
    "dispatched": (),
    "discarded": (),
    "missed": (),
}
"""granted: the handle is ours. dispatched: it went to a decode worker, whose engine answers
for it from now on. discarded: its owner is to be told that nobody will read it. missed: too
late to dispatch, the owner frees the blocks by itself."""


class LeaseError(RuntimeError):
    """A lease was used against its rules: we erred."""


class Lease:
    """One handle's lease as the API process sees it, starting when the handle arrived."""

    __slots__ = ("expires_at_s", "state")

    def __init__(self, received_at_s: float, lease_s: float) -> None:
        self.expires_at_s = received_at_s + lease_s
        self.state: LeaseState = "granted"

    def dispatchable(self, now_s: float, margin_s: float) -> bool:
        """Whether the handle may be sent to a decode worker now.

        ``margin_s`` covers the way there, and the time until that worker's engine renews
        the lease for the first time.
        """
        return self.state == "granted" and now_s + margin_s < self.expires_at_s

    def take(self, now_s: float, margin_s: float) -> None:
        """Dispatch the handle, once. LeaseError the second time or when it is too late."""
        if self.state == "granted" and not self.dispatchable(now_s, margin_s):
            self._move("missed")
            raise LeaseError(f"lease ends in {self.expires_at_s - now_s:.3f} s: not dispatchable")
        self._move("dispatched")

    def discard(self) -> bool:
        """Give the handle up. True if its owner should be told to free the blocks.

        False once it has been dispatched: the decode engine may be reading then, and only
        that engine, or the end of the lease, may free the blocks.
        """
        if self.state != "granted":
            return False
        self._move("discarded")
        return True

    def _move(self, state: LeaseState) -> None:
        if state not in _MOVES[self.state]:
            raise LeaseError(f"lease is {self.state}, can't be {state}")
        self.state = state


class Spent:
    """Handles a decode worker has used: the last ``entries`` of the last ``keep_s`` seconds.

    ``keep_s`` should be longer than any lease: after that, the holder's engine has freed
    the blocks, and its connector declines the read.
    """

    def __init__(self, entries: int = 65536, keep_s: float = 3600.0) -> None:
        self._entries = entries
        self._keep_s = keep_s
        self._used_at_s: OrderedDict[tuple[str, str], float] = OrderedDict()

    def use(self, engine: str, request: str, now_s: float) -> bool:
        """Mark the handle of ``request`` on ``engine`` as used; False if it was already."""
        self._forget(now_s)
        key = (engine, request)
        if key in self._used_at_s:
            return False
        self._used_at_s[key] = now_s
        if len(self._used_at_s) > self._entries:
            self._used_at_s.popitem(last=False)
        return True

    def __len__(self) -> int:
        return len(self._used_at_s)

    def _forget(self, now_s: float) -> None:
        while self._used_at_s:
            key, used_at_s = next(iter(self._used_at_s.items()))
            if now_s - used_at_s < self._keep_s:
                return
            del self._used_at_s[key]


class Held:
    """Blocks a worker's engine has pinned for readers elsewhere.

    An estimate from outside the engine: a reader's renewals are not seen here, and a read
    that has ended is seen only when someone says so. At most ``entries`` are kept; beyond
    that the one that ends first is dropped.
    """

    def __init__(self, entries: int = 65536) -> None:
        self._entries = entries
        self._held: dict[str, tuple[int, float]] = {}

    def add(self, request: str, blocks: int, expires_at_s: float) -> None:
        """``blocks`` are pinned for ``request`` until ``expires_at_s`` at the latest."""
        if request not in self._held and len(self._held) >= self._entries:
            del self._held[min(self._held, key=lambda held: self._held[held][1])]
        self._held[request] = (blocks, expires_at_s)

    def released(self, request: str) -> int:
        """The request's blocks are free again; how many they were, 0 if not held."""
        return self._held.pop(request, (0, 0.0))[0]

    def held_blocks(self, now_s: float) -> int:
        """Blocks pinned now; forgets what has expired."""
        for request in [held for held, (_, end_s) in self._held.items() if end_s <= now_s]:
            del self._held[request]
        return sum(blocks for blocks, _ in self._held.values())

    def __len__(self) -> int:
        return len(self._held)

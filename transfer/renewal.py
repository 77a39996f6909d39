"""Renewals: a reader's book of the leases it keeps alive at other engines.

A reader renews with messages that are not answered. What it knows for certain is when it
sent each; the holder counts from the moment it receives one, so its lease ends no earlier.
From that follows whether a lease can have run out in between:

    lease ends   |-- lease_s --|                granted: until ends_s
    renewals          ^              ^          each good for lease_s, if it was not too late
    holds             yes ... yes | no          a gap can never be closed again

Pure: times are arguments in seconds on the reader's own clock. Bounded: a request that is
not renewed any more is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable

FORGET_AFTER_LEASES = 4
"""Leases without a renewal after which a request is forgotten."""


class Renewals:
    """What was renewed when. ``lease_s``: how long one renewal is good for.

    ``margin_s``: how much earlier than that a lease is taken for ended, for the way of a
    message, the error of the clocks' difference and the time between looking and reading.
    """

    def __init__(self, lease_s: float, margin_s: float) -> None:
        self._lease_s = lease_s
        self._margin_s = margin_s
        self._first_and_end_s: dict[tuple[str, str], tuple[float, float]] = {}

    def renewed(self, engine: str, requests: Iterable[str], now_s: float) -> None:
        """Renewals for ``requests`` of ``engine`` were sent at ``now_s``."""
        self._forget(now_s)
        end_s = now_s + self._lease_s - self._margin_s
        for request in requests:
            first_s, previous_end_s = self._first_and_end_s.get((engine, request), (now_s, end_s))
            # After a gap the old end stays: whatever comes later may be for reused blocks.
            kept_s = end_s if now_s < previous_end_s else previous_end_s
            self._first_and_end_s[engine, request] = (first_s, kept_s)

    def holds(self, engine: str, request: str, ends_s: float, now_s: float) -> bool:
        """Whether the lease granted until ``ends_s`` has certainly never run out by ``now_s``."""
        granted_s = ends_s - self._margin_s
        if now_s < granted_s:
            return True
        first_s, end_s = self._first_and_end_s.get((engine, request), (now_s, now_s))
        return first_s < granted_s and now_s < end_s

    def __len__(self) -> int:
        return len(self._first_and_end_s)

    def _forget(self, now_s: float) -> None:
        limit_s = now_s - FORGET_AFTER_LEASES * self._lease_s
        old = [key for key, (_, end_s) in self._first_and_end_s.items() if end_s < limit_s]
        for key in old:
            del self._first_and_end_s[key]

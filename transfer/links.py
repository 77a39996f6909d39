"""Links: what moving KV between two workers has cost, and what it will cost.

One book per ordered pair (source, target), fed by what really happened. Bandwidth and the
time that a transfer takes whatever its size are estimated from decayed sums, so that a link
that has become slower is known to be so after a few transfers. A pair that was never seen
is judged by all pairs together, and by ``Defaults`` before there is any.

Pure: no clock, no I/O. Bounded: at most ``links`` pairs, the one longest unused goes first.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

SMALL_BYTES = 1 << 20
"""Up to this size a transfer's time says more about its fixed part than about bandwidth."""


class Defaults(msgspec.Struct, frozen=True):
    """What is assumed of a link before anything has moved over any."""

    bytes_per_s: float = 1e9
    fixed_s: float = 0.005
    handshake_s: float = 0.5


class Link(msgspec.Struct):
    """One ordered pair of workers. Sums are decayed; ``in_flight_bytes`` is now."""

    warm: bool = False
    in_flight_bytes: int = 0
    transfers: int = 0
    bytes_total: int = 0
    bulk_bytes: float = 0.0
    bulk_s: float = 0.0
    fixed_s: float = 0.0


class Links:
    """All links. ``decay``: weight of what was known when something new is observed."""

    def __init__(
        self, defaults: Defaults | None = None, decay: float = 0.9, links: int = 65536
    ) -> None:
        self._defaults = defaults or Defaults()
        self._decay = decay
        self._links_max = links
        self._links: OrderedDict[tuple[str, str], Link] = OrderedDict()
        self._everything = Link()

    def started(self, source: str, target: str, size_bytes: int) -> None:
        """A transfer of ``size_bytes`` has begun; ``ended`` must follow."""
        self._link(source, target).in_flight_bytes += size_bytes

    def ended(self, source: str, target: str, size_bytes: int) -> None:
        """A transfer that had begun is over, well or not."""
        link = self._link(source, target)
        link.in_flight_bytes = max(0, link.in_flight_bytes - size_bytes)

    def observe(self, source: str, target: str, size_bytes: int, elapsed_s: float) -> None:
        """``size_bytes`` were moved in ``elapsed_s``; the pair has met."""
        link = self._link(source, target)
        link.transfers += 1
        link.bytes_total += size_bytes
        if not link.warm:
            # The first one paid for the handshake and says nothing about later ones.
            link.warm = True
            return
        for book in (link, self._everything):
            self._learn(book, size_bytes, elapsed_s)

    def forget(self, worker: str) -> None:
        """The worker has gone or started anew: whoever meets it has to shake hands again."""
        for pair in [pair for pair in self._links if worker in pair]:
            del self._links[pair]

    def is_warm(self, source: str, target: str) -> bool:
        """Whether the pair has moved anything yet."""
        link = self._links.get((source, target))
        return link is not None and link.warm

    def in_flight_bytes(self, source: str, target: str) -> int:
        """Bytes on their way from ``source`` to ``target`` now."""
        link = self._links.get((source, target))
        return link.in_flight_bytes if link else 0

    def bytes_per_s(self, source: str, target: str) -> float:
        """Estimated bandwidth."""
        for book in (self._links.get((source, target)), self._everything):
            if book and book.bulk_s > 0 and book.bulk_bytes > 0:
                return book.bulk_bytes / book.bulk_s
        return self._defaults.bytes_per_s

    def estimate_s(self, source: str, target: str, size_bytes: int) -> float:
        """Seconds until ``size_bytes`` would have arrived, behind what is in flight now."""
        queued_bytes = size_bytes + self.in_flight_bytes(source, target)
        moving_s = queued_bytes / self.bytes_per_s(source, target)
        greeting_s = 0.0 if self.is_warm(source, target) else self._defaults.handshake_s
        return greeting_s + self._fixed_s(source, target) + moving_s

    def _fixed_s(self, source: str, target: str) -> float:
        for book in (self._links.get((source, target)), self._everything):
            if book and book.fixed_s > 0:
                return book.fixed_s
        return self._defaults.fixed_s

    def _learn(self, book: Link, size_bytes: int, elapsed_s: float) -> None:
        if size_bytes <= SMALL_BYTES:
            keep = self._decay if book.fixed_s > 0 else 0.0
            book.fixed_s = keep * book.fixed_s + (1 - keep) * elapsed_s
            return
        book.bulk_bytes = self._decay * book.bulk_bytes + size_bytes
        book.bulk_s = self._decay * book.bulk_s + elapsed_s

    def _link(self, source: str, target: str) -> Link:
        pair = (source, target)
        link = self._links.get(pair)
        if link is None:
            link = self._links[pair] = Link()
            if len(self._links) > self._links_max:
                self._links.popitem(last=False)
        self._links.move_to_end(pair)
        return link

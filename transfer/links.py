"""Links: what reading KV from each engine has cost this worker.

One book per source, kept by the reader and fed by what its engine measured. Bandwidth and
the time that a read takes whatever its size are estimated from decayed sums, so that a link
that has become slower is known to be so after a few reads.

Pure: no clock, no I/O. Bounded: at most ``links`` sources, the one longest unused goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import msgspec

SMALL_BYTES = 1 << 20
"""Up to this size a read's time says more about its fixed part than about bandwidth."""


class Link(msgspec.Struct):
    """What came from one source. Totals are exact; the sums of estimates are decayed."""

    in_flight_bytes: int = 0
    transfers: int = 0
    bytes_total: int = 0
    elapsed_s: float = 0.0
    bulk_bytes: float = 0.0
    bulk_s: float = 0.0
    fixed_s: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth lately; 0 as long as nothing large has been read."""
        return self.bulk_bytes / self.bulk_s if self.bulk_s > 0 else 0.0


class Links:
    """All links. ``decay``: weight of what was known when something new is observed."""

    def __init__(self, links: int, decay: float = 0.9) -> None:
        self._decay = decay
        self._links_max = links
        self._links: OrderedDict[str, Link] = OrderedDict()

    def started(self, source: str, size_bytes: int) -> None:
        """``size_bytes`` are to be read; ``ended`` must follow."""
        self._link(source).in_flight_bytes += size_bytes

    def ended(self, source: str, size_bytes: int) -> None:
        """What had been started is over, well or not."""
        link = self._links.get(source)
        if link is not None:
            link.in_flight_bytes = max(0, link.in_flight_bytes - size_bytes)

    def observe(self, source: str, size_bytes: int, elapsed_s: float) -> None:
        """``size_bytes`` were read in ``elapsed_s``."""
        link = self._link(source)
        link.transfers += 1
        link.bytes_total += size_bytes
        link.elapsed_s += elapsed_s
        if link.transfers > 1:
            # The first one paid for the connection and says nothing about later ones.
            self._learn(link, size_bytes, elapsed_s)

    def forget(self, source: str) -> None:
        """The source is gone."""
        self._links.pop(source, None)

    def latest(self) -> Iterator[tuple[str, Link]]:
        """Every source and its book, the one last used first."""
        return reversed(self._links.items())

    def _learn(self, link: Link, size_bytes: int, elapsed_s: float) -> None:
        if size_bytes <= SMALL_BYTES:
            keep = self._decay if link.fixed_s > 0 else 0.0
            link.fixed_s = keep * link.fixed_s + (1 - keep) * elapsed_s
            return
        link.bulk_bytes = self._decay * link.bulk_bytes + size_bytes
        link.bulk_s = self._decay * link.bulk_s + elapsed_s

    def _link(self, source: str) -> Link:
        link = self._links.setdefault(source, Link())
        self._links.move_to_end(source)
        if len(self._links) > self._links_max:
            self._links.popitem(last=False)
        return link

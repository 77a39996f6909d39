"""How a simulated engine reads KV from others: what vLLM's connector and ``transfer`` do.

Only an engine that the core had it meet is read from, a handle is read once, and only while
the lease on it certainly holds: it is renewed every sixth of it from the arrival of the
handle until the read is over, and a read that ends too late counts as failed. What is not
read is given back to its holder. The books are the live system's own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from cluster.simulator.engine_types import Pull
from cluster.simulator.events import Event
from cluster.simulator.frames import Handle
from cluster.simulator.links import Links, Read
from cluster.simulator.oracle import Oracle
from coordinator.protocol import LINKS_MAX, LinkLoad, Placed
from transfer.lease import Spent
from transfer.links import Links as LinkBooks
from transfer.renewal import Renewals

if TYPE_CHECKING:
    from cluster.simulator.worker import Worker

RENEWALS_PER_LEASE = 6
READ_FAILS_S = 1.0
"""After which a read from an engine that is not there is given up."""
SOURCES_MAX = 4096


class Neighbours(Protocol):
    """The other engines."""

    links: Links
    oracle: Oracle
    notify_s: float

    def worker(self, placed: Placed) -> Worker | None:
        """An incarnation of a worker if it is alive."""
        ...

    def is_cut(self, one: str, other: str) -> bool:
        """Whether two workers can't reach each other now."""
        ...


class Reading:
    """A handle that has been given to the engine, and how far it is."""

    __slots__ = ("chain", "event", "handle", "probe", "read", "size_bytes", "tokens")

    def __init__(self, handle: Handle, chain: bytes, size_bytes: int, probe: bool) -> None:
        self.probe = probe
        self.handle = handle
        self.chain = chain
        self.size_bytes = size_bytes
        self.tokens = 0
        self.read: Read | None = None
        self.event: Event | None = None
        """When a read that can't succeed is given up."""


class Reader:
    """What ``worker`` has read and may read. ``token_bytes``: KV of one token."""

    def __init__(self, worker: Worker, neighbours: Neighbours, token_bytes: float) -> None:
        lease_s = worker.facts.kv_lease_s
        self._worker = worker
        self._neighbours = neighbours
        self._token_bytes = token_bytes
        self._events = worker.events
        self._renew_s = lease_s / RENEWALS_PER_LEASE
        self._renewals = Renewals(lease_s, self._renew_s)
        self._renewing: Event | None = None
        self._met: OrderedDict[Placed, bool] = OrderedDict()
        self._spent = Spent()
        self._books = LinkBooks(SOURCES_MAX)
        self._report: list[LinkLoad] | None = []
        self._open: dict[str, Reading] = {}

    def __len__(self) -> int:
        """Handles that are neither read nor given back yet."""
        return len(self._open)

    # --- whom and what may be read ----------------------------------------------------

    def trying(self, worker: str, holder: Placed) -> None:
        """The core lets us meet ``holder``; what ``worker`` was before is gone."""
        if holder in self._met:
            return
        for former in [each for each in self._met if each.worker == worker]:
            del self._met[former]
            self._books.forget(former.incarnation)
        self._met[holder] = False
        if len(self._met) > SOURCES_MAX:
            self._met.popitem(last=False)
        self._report = None

    def met(self, holder: Placed) -> None:
        """Its KV arrived."""
        if holder in self._met:
            self._met[holder] = True

    def refusal(self, handle: Handle) -> str:
        """Why a handle is not read, empty if it will be: then it is used from now on."""
        if handle.holder != self._worker.placed and not self._met.get(handle.holder):
            return f"{handle.worker} was never met"
        if not self._spent.use(handle.incarnation, handle.engine_id, self._events.now_s):
            return "used before: a handle is read once"
        return ""

    def use(self, handle: Handle) -> bool:
        """Take back a handle of our own; False if it is none or was used."""
        own = handle.holder == self._worker.placed
        return own and self._spent.use(handle.incarnation, handle.engine_id, self._events.now_s)

    # --- reading ----------------------------------------------------------------------

    def started(self, engine_id: str, handle: Handle, chain: bytes, *, probe: bool = False) -> None:
        """The engine gets a handle, for a prompt with these blocks; ``probe``: it is no call's."""
        reading = Reading(handle, chain, int(handle.tokens * self._token_bytes), probe)
        self._open[engine_id] = reading
        self._books.started(handle.incarnation, reading.size_bytes)
        self._report = None
        if self._renewing is None:
            self._renewing = self._events.after(self._renew_s, self._renew)

    def pull(self, pull: Pull) -> None:
        """The engine wants its KV now."""
        reading = self._open[pull.id]
        reading.tokens = pull.tokens
        handle = reading.handle
        source = self._neighbours.worker(handle.holder)
        cut = self._neighbours.is_cut(handle.worker, self._worker.name)
        if not self._holds(handle):
            self._events.after(0.0, self._failed, pull.id, reading)
        elif source is None or cut:
            reading.event = self._events.after(READ_FAILS_S, self._failed, pull.id, reading)
        else:
            self._neighbours.oracle.reading(self._worker, pull.id, reading.chain, handle, source)
            size_bytes = pull.tokens * self._token_bytes
            done: Callable[[Read], None] = lambda read: self._done(pull.id, reading, read)  # noqa: E731
            reading.read = self._neighbours.links.read(
                handle.worker, self._worker.name, size_bytes, done, reading.probe
            )

    def lost(self, read: Read) -> None:
        """A read will not come to its end: its source is gone or cut off."""
        for engine_id, reading in self._open.items():
            if reading.read is read:
                self._neighbours.links.stop(read)
                reading.read = None
                reading.event = self._events.after(READ_FAILS_S, self._failed, engine_id, reading)
                return

    def ended(self, engine_id: str) -> None:
        """A request has its first token, or will not have it; what was not read is given back."""
        reading = self._open.pop(engine_id, None)
        if reading is None:
            return
        if reading.read is not None:
            self._neighbours.links.stop(reading.read)
        self._events.cancel(reading.event)
        self._close(reading)

    def stop(self) -> None:
        """The engine is gone, and all its reads with it."""
        self._events.cancel(self._renewing)
        for reading in self._open.values():
            if reading.read is not None:
                self._neighbours.links.stop(reading.read)
            self._events.cancel(reading.event)
        self._open.clear()

    def _done(self, engine_id: str, reading: Reading, read: Read) -> None:
        handle, now_s = reading.handle, self._events.now_s
        reading.read = None
        self._books.observe(handle.incarnation, int(read.size_bytes), now_s - read.began_s)
        if not self._holds(handle):
            self._failed(engine_id, reading)
            return
        source = self._neighbours.worker(handle.holder)
        self._neighbours.oracle.has_read(self._worker, engine_id, handle, source, reading.tokens)
        del self._open[engine_id]
        self._close(reading)
        self._worker.engine.pulled(engine_id, True, now_s)
        self._worker.look()

    def _failed(self, engine_id: str, reading: Reading) -> None:
        """The engine computes what could not be read."""
        if self._open.get(engine_id) is not reading:
            return
        del self._open[engine_id]
        self._close(reading)
        self._neighbours.oracle.reads_failed += 1
        self._worker.engine.pulled(engine_id, False, self._events.now_s)
        self._worker.look()

    def _close(self, reading: Reading) -> None:
        """The holder may free the blocks."""
        self._books.ended(reading.handle.incarnation, reading.size_bytes)
        self._report = None
        self._notify(reading.handle, "release")

    # --- leases -----------------------------------------------------------------------

    def _holds(self, handle: Handle) -> bool:
        now_s = self._events.now_s
        return self._renewals.holds(handle.incarnation, handle.engine_id, handle.expires_s, now_s)

    def _renew(self) -> None:
        self._renewing = None
        if not self._open:
            return
        for reading in self._open.values():
            handle = reading.handle
            if self._notify(handle, "renew"):
                self._renewals.renewed(handle.incarnation, [handle.engine_id], self._events.now_s)
        self._renewing = self._events.after(self._renew_s, self._renew)

    def _notify(self, handle: Handle, what: str) -> bool:
        """Tell the holder's engine something; False if it can't be reached."""
        if self._neighbours.is_cut(handle.worker, self._worker.name):
            return False
        delay_s = self._neighbours.notify_s
        self._events.after(delay_s, self._notified, handle, what)
        return True

    def _notified(self, handle: Handle, what: str) -> None:
        holder = self._neighbours.worker(handle.holder)
        if holder is None:
            return
        if what == "renew":
            holder.engine.renew(handle.engine_id, self._events.now_s)
        else:
            holder.engine.release(handle.engine_id, self._events.now_s)
        holder.look()

    # --- what the core is told --------------------------------------------------------

    def report(self) -> list[LinkLoad]:
        """The links used last."""
        if self._report is None:
            names = {placed.incarnation: placed.worker for placed in self._met}
            self._report = [
                LinkLoad(
                    source=names[engine],
                    transfers=link.transfers,
                    bytes_total=link.bytes_total,
                    elapsed_s=link.elapsed_s,
                    in_flight_bytes=link.in_flight_bytes,
                    bytes_per_s=link.bytes_per_s,
                    fixed_s=link.fixed_s,
                )
                for engine, link in self._books.latest()
                if engine in names
            ][:LINKS_MAX]
        return self._report

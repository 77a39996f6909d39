"""Sources: the engines that this worker may read KV from, and what it has read.

A worker is told by its core to read from each peer once, before calls depend on it. Only an
engine met that way is read from for a call: a handle that points anywhere else would make
the engine connect to whoever wrote it.

    ProbeRead --> trying --> met ... the core says so, and the read succeeded
    Decode    --> check, started ... ended with its first token or its end
    engine    --> measured ......... exactly what came, from whom, in what time

Pure, and bounded: beyond ``sources`` engines the one longest unmet goes first.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import msgspec

from coordinator.protocol import LINKS_MAX, LinkLoad
from transfer import handle as handles
from transfer.handle import Handle, HandleError
from transfer.links import Links

SOURCE_ENGINE = "source_engine"
"""Names, in the engine's statistics, the list of whom each read was from."""
SOURCES_MAX = 4096


class Source(msgspec.Struct):
    """An engine that the core said is ``worker``'s."""

    worker: str
    address: tuple[str, int]
    met: bool = False


class Sources:
    """Whom the engine ``own_engine`` may read from. ``block_bytes``: what one block weighs."""

    def __init__(self, own_engine: str, block_bytes: int, sources: int = SOURCES_MAX) -> None:
        self._own_engine = own_engine
        self._block_bytes = block_bytes
        self._sources_max = sources
        self._sources: OrderedDict[str, Source] = OrderedDict()
        self._links = Links(sources)
        self._reads: dict[str, tuple[str, int]] = {}

    # --- who may be read from ----------------------------------------------------------

    def trying(self, worker: str, handle: Handle) -> None:
        """The core lets us meet ``worker`` behind ``handle``; what it was before is gone."""
        engine, address = handle.remote_engine_id, handles.source(handle)
        known = self._sources.get(engine)
        if known is not None and (known.worker, known.address) == (worker, address):
            return
        for other in [name for name, known in self._sources.items() if known.worker == worker]:
            self._forget(other)
        self._forget(engine)
        self._sources[engine] = Source(worker, address)
        if len(self._sources) > self._sources_max:
            self._forget(next(iter(self._sources)))

    def met(self, engine: str) -> None:
        """Its KV arrived."""
        source = self._sources.get(engine)
        if source is not None:
            source.met = True
            self._sources.move_to_end(engine)

    def is_own(self, handle: Handle) -> bool:
        """Whether the KV is held by this worker's own engine."""
        return handle.remote_engine_id == self._own_engine

    def check(self, handle: Handle) -> None:
        """HandleError unless the KV is held here or by an engine that was met."""
        source = self._sources.get(handle.remote_engine_id)
        host, port = handles.source(handle)
        known = source is not None and source.met and source.address == (host, port)
        if not known and not self.is_own(handle):
            raise HandleError(f"{handle.remote_engine_id} at {host}:{port} was never met")

    def check_own(self, handle: Handle) -> None:
        """HandleError unless the KV is held here."""
        if not self.is_own(handle):
            raise HandleError(f"held by {handle.remote_engine_id}, not here")

    def _forget(self, engine: str) -> None:
        self._sources.pop(engine, None)
        self._links.forget(engine)

    # --- what is read -------------------------------------------------------------------

    def started(self, request: str, handle: Handle) -> None:
        """The engine was given ``handle`` for ``request``."""
        if not self.is_own(handle):
            size_bytes = handles.blocks_held(handle) * self._block_bytes
            self._reads[request] = (handle.remote_engine_id, size_bytes)
            self._links.started(handle.remote_engine_id, size_bytes)

    def ended(self, request: str) -> None:
        """What ``request`` reads, if anything, has arrived or is not wanted any more."""
        read = self._reads.pop(request, None)
        if read is not None:
            self._links.ended(*read)

    def measured(self, stats: Mapping[str, Any]) -> None:
        """The lists of ``ReadStats``: one entry per read that the engine has finished."""
        for engine, size_bytes, elapsed_s in zip(
            stats.get(SOURCE_ENGINE, ()),
            stats.get("bytes_transferred", ()),
            stats.get("transfer_duration", ()),
            strict=False,
        ):
            if engine in self._sources:
                self._links.observe(engine, size_bytes, elapsed_s)

    def report(self) -> list[LinkLoad]:
        """What the core is told of the links used last."""
        known = ((self._sources.get(engine), link) for engine, link in self._links.latest())
        loads = (
            LinkLoad(
                source=source.worker,
                transfers=link.transfers,
                bytes_total=link.bytes_total,
                elapsed_s=link.elapsed_s,
                in_flight_bytes=link.in_flight_bytes,
                bytes_per_s=link.bytes_per_s,
                fixed_s=link.fixed_s,
            )
            for source, link in known
            if source is not None
        )
        return list(itertools.islice(loads, LINKS_MAX))

"""KV on its way between engines.

A read takes its tier's latency and a fixed time, then the bytes flow. Every worker has, for
each tier, a link out and a link in, every rack one out and one in if it has a bound. A link's
bandwidth is shared equally by the reads on it, and a read is as fast as the worst of its
links allows: when one begins or ends, all that share a link with it get another rate. (That
is slightly less than max-min fair: what a read leaves unused elsewhere is not given to others.)

Engines with tensor parallelism move their shards over as many links at once, so a worker's
link is as fast as all of these together.
"""

from __future__ import annotations

from collections.abc import Callable

from cluster.simulator.events import Event, Events
from cluster.simulator.setup import ClusterSetup, WorkerSetup
from coordinator.cost import Link, Tier, kv_shards


class Pipe:
    """One direction of a link, and the reads on it in the order of their beginning."""

    __slots__ = ("bytes_per_s", "reads")

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.reads: dict[Read, None] = {}


class Read:
    """One engine's read of another's KV."""

    __slots__ = (
        "began_s",
        "bytes_per_s",
        "done",
        "event",
        "left_bytes",
        "pipes",
        "probe",
        "size_bytes",
        "source",
        "target",
        "tier",
        "updated_s",
    )

    def __init__(
        self,
        source: str,
        target: str,
        tier: Tier,
        size_bytes: float,
        pipes: tuple[Pipe, ...],
        began_s: float,
        done: Callable[[Read], None],
        probe: bool,
    ) -> None:
        self.probe = probe
        self.source, self.target, self.tier = source, target, tier
        self.size_bytes = self.left_bytes = size_bytes
        self.pipes = pipes
        self.began_s = self.updated_s = began_s
        self.done = done
        self.bytes_per_s = 0.0
        self.event: Event | None = None


class Links:
    """All links of a cluster and the reads in flight."""

    def __init__(self, events: Events, setup: ClusterSetup) -> None:
        """ValueError if two workers are joined by a tier that has no link."""
        self._events = events
        self._network = setup.network
        self._workers = {worker.name: worker for worker in setup.workers}
        self._shards = kv_shards(setup.shape, setup.tp)
        self._links: dict[Tier, Link] = {**setup.hardware.links, **setup.network.links}
        self._pipes: dict[tuple[str, str, str], Pipe] = {}
        self._reads: dict[Read, None] = {}
        self.moved_bytes: dict[Tier, float] = {}
        """By tier, for calls; reads that were broken off included."""
        self.probe_bytes: dict[Tier, float] = {}
        """For probes of pairs of workers."""
        for tier in self._tiers(setup.workers):
            if tier not in self._links:
                raise ValueError(f"{setup.hardware.name} has no {tier} link, and none is given")

    def _tiers(self, workers: tuple[WorkerSetup, ...]) -> list[Tier]:
        nodes = {(worker.rack, worker.node) for worker in workers}
        racks = {worker.rack for worker in workers}
        used: list[Tier] = []
        if len(workers) > len(nodes):
            used.append(self._network.same_node)
        if len(nodes) > len(racks):
            used.append(self._network.same_rack)
        if len(racks) > 1:
            used.append(self._network.across)
        return used

    def tier(self, source: str, target: str) -> Tier:
        """What joins two workers."""
        one, other = self._workers[source], self._workers[target]
        if one.rack != other.rack:
            return self._network.across
        return self._network.same_rack if one.node != other.node else self._network.same_node

    def read(
        self,
        source: str,
        target: str,
        size_bytes: float,
        done: Callable[[Read], None],
        probe: bool = False,
    ) -> Read:
        """Begin a read of ``target`` from ``source``; ``done`` is called when all is there.

        ``probe``: it is no call's.
        """
        tier = self.tier(source, target)
        pipes = self._path(source, target, tier)
        read = Read(source, target, tier, size_bytes, pipes, self._events.now_s, done, probe)
        self._reads[read] = None
        fixed_s = self._links[tier].latency_s + self._network.transfer_fixed_s
        read.event = self._events.after(fixed_s, self._flow, read)
        return read

    def stop(self, read: Read) -> None:
        """Break a read off, wherever it is; ``done`` is not called."""
        if read not in self._reads:
            return
        self._events.cancel(read.event)
        self._end(read)

    def of(self, worker: str) -> list[Read]:
        """The reads in flight from or to a worker."""
        return [read for read in self._reads if worker in (read.source, read.target)]

    def in_flight(self) -> list[Read]:
        """All of them."""
        return list(self._reads)

    def _path(self, source: str, target: str, tier: Tier) -> tuple[Pipe, ...]:
        speed = self._links[tier].bytes_per_s * self._shards
        pipes = [self._pipe(source, tier, "out", speed), self._pipe(target, tier, "in", speed)]
        bound = self._network.rack_bytes_per_s
        one, other = self._workers[source].rack, self._workers[target].rack
        if bound and one != other:
            pipes.append(self._pipe(one, "rack", "out", bound))
            pipes.append(self._pipe(other, "rack", "in", bound))
        return tuple(pipes)

    def _pipe(self, owner: str, kind: str, way: str, bytes_per_s: float) -> Pipe:
        pipe = self._pipes.get((owner, kind, way))
        if pipe is None:
            pipe = self._pipes[owner, kind, way] = Pipe(bytes_per_s)
        return pipe

    def _flow(self, read: Read) -> None:
        """The fixed part is over."""
        read.updated_s = self._events.now_s
        read.event = None
        for pipe in read.pipes:
            pipe.reads[read] = None
        self._share(read.pipes)

    def _share(self, pipes: tuple[Pipe, ...]) -> None:
        """Give every read on these pipes its rate from now on."""
        now_s = self._events.now_s
        for read in {read: None for pipe in pipes for read in pipe.reads}:
            speed = min(pipe.bytes_per_s / len(pipe.reads) for pipe in read.pipes)
            if speed == read.bytes_per_s:
                continue
            self._advance(read, now_s)
            read.bytes_per_s = speed
            self._events.cancel(read.event)
            read.event = self._events.after(read.left_bytes / speed, self._arrived, read)

    def _advance(self, read: Read, now_s: float) -> None:
        read.left_bytes -= read.bytes_per_s * (now_s - read.updated_s)
        read.updated_s = now_s

    def _arrived(self, read: Read) -> None:
        read.event = None
        self._end(read, arrived=True)
        read.done(read)

    def _end(self, read: Read, arrived: bool = False) -> None:
        self._advance(read, self._events.now_s)
        if arrived:
            read.left_bytes = 0.0
        moved = read.size_bytes - read.left_bytes
        book = self.probe_bytes if read.probe else self.moved_bytes
        book[read.tier] = book.get(read.tier, 0.0) + moved
        del self._reads[read]
        for pipe in read.pipes:
            pipe.reads.pop(read, None)
        self._share(read.pipes)

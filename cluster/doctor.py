"""``pythia doctor`` on a cluster that runs: asks the core and every worker, then judges.

Workers are asked over their data sockets, as API processes reach them. What they say is
judged by ``cluster.doctor_checks`` and ``cluster.doctor_paths``; here is only who asks
whom. Moves some KV between every pair of workers, one pair after the other, and changes
nothing else.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Mapping, Sequence

import msgspec
import zmq
import zmq.asyncio

from cluster import doctor_checks, doctor_paths
from cluster.doctor_checks import Clock, Finding
from cluster.doctor_paths import Measure
from cluster.examined_reach import data_answers, error_of
from cluster.status import inspect
from coordinator import protocol
from coordinator.protocol import (
    AskTime,
    CallFailed,
    Discard,
    LinkLoad,
    LinkStatus,
    Look,
    Looked,
    Message,
    Peer,
    Reach,
    Sample,
    Sampled,
    SampleRead,
    Snapshot,
    TimeIs,
    WorkerStatus,
)

CORE_S = 5.0
CLOCK_TRIES = 5
ANSWER_S = 15.0
LOOK_S = 45.0
SAMPLE_S = 120.0
"""How long a worker may take to prefill a sample, or to read it."""
STATISTICS_S = 5.0
"""How long after a read its measure may take to be told."""
STATISTICS_POLL_S = 0.1
SAMPLE_BYTES = 32 << 20
READS = 2
FURTHER_TRIES = 2
PAIRS_MAX = 240
"""Pairs that are tried; of further ones is known what calls have moved."""
SEED_BITS = 31


class Silent(Exception):
    """A worker did not answer, or not what it was asked."""


class Report(msgspec.Struct, frozen=True):
    """All that was found, and what links gave."""

    findings: list[Finding]
    measures: list[Measure] = []


class Line:
    """A connection to one worker's data socket, with one question at a time."""

    def __init__(self, context: zmq.asyncio.Context, address: str) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IPV6, "[" in address)
        self._socket.setsockopt(zmq.MAXMSGSIZE, protocol.MESSAGE_BYTES_MAX)
        self._socket.connect(address)
        self._calls = itertools.count(secrets.randbits(SEED_BITS))

    def close(self) -> None:
        """Hangs up."""
        self._socket.close()

    def number(self) -> int:
        """For the next question."""
        return next(self._calls)

    async def say(self, message: Message) -> None:
        """Sends what needs no answer."""
        await self._socket.send(protocol.encode(message))

    async def ask(
        self, message: AskTime | Look | Sample | SampleRead, timeout_s: float
    ) -> TimeIs | Looked | Sampled:
        """The answer. Silent if there is none in time."""
        await self.say(message)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    answer = await self._next()
                    if isinstance(answer, CallFailed):
                        if answer.request.endswith(f"-{message.call}"):
                            return Sampled(message.call, error=answer.reason)
                    elif answer.call == message.call:
                        return answer
        except TimeoutError as error:
            raise Silent(f"no answer within {timeout_s:.0f} s") from error

    async def _next(self) -> protocol.WorkerToExaminer:
        frames = await self._socket.recv_multipart()
        try:
            answer: protocol.WorkerToExaminer = protocol.decode_worker_to_examiner(frames[0])
            return answer
        except msgspec.MsgspecError as error:
            raise Silent(f"says something else than this version expects: {error}") from error


def examine(control_address: str, expected: Sequence[str] = (), links: bool = True) -> Report:
    """Examines the cluster of the core at ``control_address``.

    ``expected``: workers that there should be; ``links``: move KV between them, too.
    ``cluster.status.Unreachable`` if no core answers.
    """
    core, snapshot = core_clock(control_address)
    return asyncio.run(_Examination(snapshot, core).run(expected, links))


def core_clock(control_address: str) -> tuple[Clock, Snapshot]:
    """The core's clock against this host's, and what the core sees."""
    best: Clock | None = None
    for _ in range(CLOCK_TRIES):
        before_s = time.time()
        snapshot = inspect(control_address, CORE_S)
        clock = _clock(snapshot.unix_time_s, before_s, time.time())
        if best is None or clock.error_s < best.error_s:
            best = clock
    assert best is not None
    return best, snapshot


def _clock(there_s: float, before_s: float, after_s: float) -> Clock:
    """Of a host that said ``there_s`` between two looks at this host's clock."""
    return Clock(there_s - (before_s + after_s) / 2, (after_s - before_s) / 2)


class _Examination:
    """One look at one cluster."""

    def __init__(self, snapshot: Snapshot, core: Clock) -> None:
        self._snapshot = snapshot
        self._core = core
        self._status = {row.worker: row for row in snapshot.workers}
        self._lines: dict[str, Line] = {}
        self._looked: dict[str, Looked] = {}
        self._silent: dict[str, str] = {}

    async def run(self, expected: Sequence[str], links: bool) -> Report:
        context = zmq.asyncio.Context()
        try:
            here = await self._connect(context)
            clocks = await self._clocks()
            await self._look_around()
            measures = await self._measure() if links else []
        finally:
            for line in self._lines.values():
                line.close()
            context.destroy(linger=0)
        return Report(self._judge(expected, here, clocks, measures), measures)

    def _judge(
        self,
        expected: Sequence[str],
        here: Sequence[Reach],
        clocks: Mapping[str, Clock],
        measures: Sequence[Measure],
    ) -> list[Finding]:
        facts = {name: each.host for name, each in self._looked.items()}
        gpus = [row.worker for row in self._snapshot.workers if row.devices]
        workers = [self._worker(row) for row in self._snapshot.workers]
        return [
            *self._of_workers(expected),
            *doctor_checks.versions(facts),
            *doctor_checks.clocks(clocks, "the coordinator's host"),
            *doctor_checks.transports(
                facts, {row.worker: row.host for row in self._snapshot.workers}, gpus
            ),
            *doctor_paths.addresses(workers, here),
            *doctor_paths.links(workers, measures),
        ]

    def _of_workers(self, expected: Sequence[str]) -> list[Finding]:
        found = [
            _problem(name, "the core does not know it", "is it running? Its log says why not")
            for name in expected
            if name not in self._status
        ]
        for row in self._snapshot.workers:
            if row.state != "up":
                advice = "look into its log, and whether its host can reach the coordinator's"
                found.append(_problem(row.worker, f"is {row.state}", advice))
            elif row.worker in self._silent:
                advice = "is it the same version? Its log says more"
                found.append(_problem(row.worker, self._silent[row.worker], advice))
        if found:
            return found
        text = f"{len(self._status)} are up"
        return [Finding(check="workers", severity="fine", about="", message=text)]

    def _worker(self, row: WorkerStatus) -> doctor_paths.Worker:
        looked = self._looked.get(row.worker)
        return doctor_paths.Worker(
            name=row.worker,
            host=row.host,
            data_address=row.data_address,
            side_channel=row.side_channel,
            gpu=bool(row.devices),
            reaches=looked.reaches if looked else [],
        )

    async def _connect(self, context: zmq.asyncio.Context) -> list[Reach]:
        """Connects to all that can be reached from here; says who can't."""
        rows = self._snapshot.workers
        errors = await asyncio.gather(*(error_of(data_answers(row.data_address)) for row in rows))
        for row, error in zip(rows, errors, strict=True):
            if not error:
                self._lines[row.worker] = Line(context, row.data_address)
        return [Reach(row.worker, error) for row, error in zip(rows, errors, strict=True)]

    async def _clocks(self) -> dict[str, Clock]:
        """Every worker's clock against the core's."""
        found = {}
        for name, line in list(self._lines.items()):
            try:
                best = min(
                    [await self._clock_of(line) for _ in range(CLOCK_TRIES)],
                    key=lambda clock: clock.error_s,
                )
            except Silent as error:
                self._hang_up(name, error)
                continue
            found[name] = Clock(
                best.offset_s - self._core.offset_s, best.error_s + self._core.error_s
            )
        return found

    async def _clock_of(self, line: Line) -> Clock:
        before_s = time.time()
        answer = await line.ask(AskTime(line.number()), ANSWER_S)
        assert isinstance(answer, TimeIs)
        return _clock(answer.unix_time_s, before_s, time.time())

    async def _look_around(self) -> None:
        """Asks all at once who they are, then whom of the others they reach."""
        await asyncio.gather(*(self._look(name, []) for name in list(self._lines)))
        await asyncio.gather(*(self._look(name, self._peers(name)) for name in list(self._lines)))

    def _peers(self, name: str) -> list[Peer]:
        return [
            Peer(
                row.worker,
                row.data_address,
                row.side_channel,
                self._looked[row.worker].engine if row.worker in self._looked else "",
            )
            for row in self._snapshot.workers
            if row.worker != name
        ][: protocol.LINKS_MAX]

    async def _look(self, name: str, peers: list[Peer]) -> None:
        line = self._lines[name]
        try:
            answer = await line.ask(Look(line.number(), peers), LOOK_S)
        except Silent as error:
            self._hang_up(name, error)
            return
        assert isinstance(answer, Looked)
        self._looked[name] = answer

    def _hang_up(self, name: str, error: Silent) -> None:
        self._silent[name] = str(error)
        self._lines.pop(name).close()

    # --- links ----------------------------------------------------------------------

    async def _measure(self) -> list[Measure]:
        pairs = [link for link in self._snapshot.links if {link.source, link.target} <= self._both]
        tried = {
            (link.source, link.target): await self._measure_pair(link) for link in pairs[:PAIRS_MAX]
        }
        await self._try_again(pairs, tried)
        return list(tried.values()) + [
            Measure(
                source=link.source,
                target=link.target,
                bytes_per_s=link.bytes_per_s,
                size_bytes=link.bytes_total,
            )
            for link in pairs[PAIRS_MAX:]
            if link.bytes_per_s
        ]

    async def _try_again(
        self, pairs: Sequence[LinkStatus], tried: dict[tuple[str, str], Measure]
    ) -> None:
        """A busy host makes a fast link look slow now and then, and nothing makes a slow one
        look fast: who seems slow gets further tries, of which the best counts."""
        workers = [self._worker(row) for row in self._snapshot.workers]
        for _ in range(FURTHER_TRIES):
            slow = {
                (each.source, each.target)
                for each in doctor_paths.doubtful(workers, list(tried.values()))
            }
            for link in pairs:
                key = (link.source, link.target)
                if key in slow:
                    again = await self._measure_pair(link)
                    tried[key] = max(tried[key], again, key=lambda each: each.bytes_per_s)

    @property
    def _both(self) -> set[str]:
        return self._lines.keys() & self._looked.keys()

    async def _measure_pair(self, link: LinkStatus) -> Measure:
        if link.state != "warm":
            return Measure(source=link.source, target=link.target, error=_cold(link.state))
        best = Measure(source=link.source, target=link.target)
        try:
            for _ in range(READS):
                before = await self._read_so_far(link)
                await self._read(link)
                after = await self._read_after(link, before)
                size_bytes = after.bytes_total - before.bytes_total
                rate = size_bytes / (after.elapsed_s - before.elapsed_s)
                if rate > best.bytes_per_s:
                    best = msgspec.structs.replace(best, bytes_per_s=rate, size_bytes=size_bytes)
        except Silent as error:
            return Measure(source=link.source, target=link.target, error=str(error))
        return best

    async def _read(self, link: LinkStatus) -> None:
        """Has the source hold a sample and the target read it. Silent with what went wrong."""
        source, target = self._lines[link.source], self._lines[link.target]
        tokens = self._sample_tokens(link)
        seed = secrets.randbits(SEED_BITS)
        held = await source.ask(Sample(source.number(), seed, tokens), SAMPLE_S)
        assert isinstance(held, Sampled)
        if held.error:
            raise Silent(f"{link.source}: {held.error}")
        read = await target.ask(SampleRead(target.number(), seed, tokens, held.handle), SAMPLE_S)
        assert isinstance(read, Sampled)
        if read.error:
            incarnation = self._status[link.source].incarnation
            await source.say(Discard(f"doctor-{seed}", 0, incarnation, held.handle))
            raise Silent(f"{link.target}: {read.error}")

    def _sample_tokens(self, link: LinkStatus) -> int:
        """Enough for ``SAMPLE_BYTES``, as far as both engines take so much."""
        facts = [self._looked[name].facts for name in (link.source, link.target)]
        block = facts[0].block_size
        wanted = SAMPLE_BYTES * block // max(1, facts[0].kv_bytes_per_block)
        fits = min(
            min(each.max_model_len - 2, each.kv_blocks * each.block_size // 4) for each in facts
        )
        return max(1, min(wanted, fits))

    async def _read_so_far(self, link: LinkStatus) -> LinkLoad:
        line = self._lines[link.target]
        answer = await line.ask(AskTime(line.number()), ANSWER_S)
        assert isinstance(answer, TimeIs)
        known = {each.source: each for each in answer.links}
        return known.get(link.source, LinkLoad(link.source))

    async def _read_after(self, link: LinkStatus, before: LinkLoad) -> LinkLoad:
        """The engine tells of its reads a step later."""
        deadline_s = time.monotonic() + STATISTICS_S
        while True:
            now = await self._read_so_far(link)
            late = time.monotonic() > deadline_s
            if now.elapsed_s > before.elapsed_s:
                return now
            if late:
                raise Silent(f"{link.target} did not say how long it took")
            await asyncio.sleep(STATISTICS_POLL_S)


def _cold(state: str) -> str:
    if state == "failed":
        return "the core's own tries failed, so calls do not use this pair"
    return f"the core has not tried it yet (it is {state}); ask again in a minute"


def _problem(worker: str, message: str, advice: str) -> Finding:
    return Finding(
        check="workers", severity="problem", about=worker, message=message, advice=advice
    )

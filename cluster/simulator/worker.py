"""A simulated worker: the real protocol around a simulated engine.

It does what ``cluster.serving``, ``prefill.worker`` and ``decode.worker`` do in a live one, and
what vLLM's connector does with KV: reads it by a handle from an engine it has met, once, while
the lease that it keeps renewing holds; gives it back when it is not wanted.

As in a live worker, the process that speaks and the engine beside it are two: a worker that
hangs neither hears nor says anything, while its engine goes on, reads and is read from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from hashlib import shake_128
from typing import Any

import msgspec

from cluster.simulator.cache_news import CacheNews
from cluster.simulator.control import Control
from cluster.simulator.cores import Cores
from cluster.simulator.engine import Engine
from cluster.simulator.engine_types import (
    Ended,
    EngineRequest,
    FirstToken,
    HostLoad,
    Output,
    Pull,
)
from cluster.simulator.events import Event, Events
from cluster.simulator.frames import (
    Handle,
    Tokens,
    ToWorker,
    Work,
    decode_handle,
    encode_handle,
)
from cluster.simulator.job import Job
from cluster.simulator.network import Connection, Network, peer_address
from cluster.simulator.oracle import Oracle
from cluster.simulator.reader import Reader
from cluster.simulator.setup import WorkerSetup
from coordinator.protocol import (
    BLOCK_HASH_BYTES,
    Abort,
    Beat,
    CallFailed,
    Deltas,
    Discard,
    EngineFacts,
    KvResync,
    Message,
    Placed,
    Prefill,
    PrefillDone,
    Probe,
    Probed,
    ProbeFinished,
    ProbeRead,
    Ready,
    Retain,
    RoleSet,
    SetRole,
    Welcome,
    engine_request_id,
)
from transfer.settings import dispatch_margin_s

PROBES_KEPT = 64

Told = Callable[[str, int], None]
"""Is told how many tokens an engine has computed for a request."""


class Worker:
    """One incarnation of a worker. ``told`` hears what no message says: what was computed."""

    def __init__(
        self,
        setup: WorkerSetup,
        incarnation: str,
        facts: EngineFacts,
        engine: Engine,
        events: Events,
        network: Network,
        oracle: Oracle,
        told: Told,
        cores: Cores | None = None,
    ) -> None:
        self.setup, self.incarnation, self.facts = setup, incarnation, facts
        self.name = setup.name
        self.placed = Placed(setup.name, incarnation)
        self.address = peer_address(self.placed)
        self.engine = engine
        self.events = events
        self.jobs: dict[str, Job] = {}
        self.reader: Reader
        self.alive = True
        self.hung = False
        self.pending_tokens = 0
        """Prompt tokens taken in, to be computed, without a first token."""
        self._network = network
        self._oracle = oracle
        self._told = told
        self._cores = cores
        self._wake: Event | None = None
        self._wake_s = float("inf")
        self._inbox: list[tuple[Connection | None, Any]] = []
        self._unsaid: list[FirstToken | Ended] = []
        self._idle_beat: Beat | None = None
        self._news = CacheNews(setup.name, incarnation)
        self._probes: deque[tuple[str, int]] = deque(maxlen=PROBES_KEPT)
        """Those asked for lately: a doubled message asks for nothing new."""
        self._control = Control(
            events, network, self.address, self._ready, self._beat, self._on_core
        )

    def start(self, reader: Reader, after_s: float) -> None:
        """Open the doors and ask to be taken in."""
        self.reader = reader
        self._network.attach(self.address, lambda _source, message: self._arrives(None, message))
        self._network.listen(self.name, self._arrives, self._on_broken)
        self._control.start(after_s)

    # --- what goes wrong ---------------------------------------------------------------

    def crash(self, machine: bool) -> None:
        """It is gone; with its ``machine`` nobody learns of it from the connections."""
        now_s = self.events.now_s
        for job in self.jobs.values():
            job.freeze(now_s)
        self.alive = False
        if self._cores is not None:
            self._cores.looked_at(self, False)
        self._network.detach(self.address)
        self._network.deafen(self.name)
        self._control.stop()
        self.events.cancel(self._wake)
        if not machine:
            self._network.break_all(self.name)

    def hang(self) -> None:
        """The process stops; its engine does not."""
        self.hung = True
        self._control.pause()
        for job in self.jobs.values():
            job.freeze(self.events.now_s)

    def recover(self) -> None:
        """The process goes on: what has arrived or happened meanwhile gets its turn."""
        self.hung = False
        self.thaw()
        unsaid, self._unsaid = self._unsaid, []
        for output in unsaid:
            self._say(output)
        inbox, self._inbox = self._inbox, []
        for connection, message in inbox:
            self._arrives(connection, message)
        self._control.resume()

    def cut_off(self) -> None:
        """Some API processes may get no tokens for now."""
        for job in self.jobs.values():
            if job.connection is not None and self._network.is_cut(self.name, job.connection.api):
                job.freeze(self.events.now_s)

    def thaw(self) -> None:
        """All get theirs again, with what they missed."""
        if not self.hung:
            for job in self.jobs.values():
                job.frozen_tokens = None

    # --- control -----------------------------------------------------------------------

    def _ready(self) -> Message:
        return Ready(
            worker=self.name,
            incarnation=self.incarnation,
            role=self.setup.role,
            data_address=self.name,
            facts=self.facts,
            host=self.setup.node,
        )

    def _beat(self) -> Message:
        ended, self.engine.cached_chains = self.engine.cached_chains, []
        pool, host = self.engine.pool, self.engine.host
        hosted = (host.pool.evicted(), host.pool.cached_of) if host is not None else ()
        for changes in self._news.look(ended, pool.evicted(), pool.cached_of, *hosted):
            self._control.send(changes)
        beat, links = self._idle_beat, self.reader.report()
        if beat is not None and beat.links is links:
            return beat
        load = self.engine.load(self.events.now_s)
        beat = Beat(self.name, self.incarnation, load, links)
        busy = load.running or load.waiting or load.kv_blocks_used or load.kv_blocks_pinned
        if self.engine.next_s is None and not busy:
            # As long as nothing comes, it will say the same again.
            self._idle_beat = beat
        return beat

    def _on_core(self, message: Message) -> None:
        if isinstance(message, Welcome | KvResync):
            self._news.begin()
            return
        if isinstance(message, Retain):
            self._retain(message)
            return
        if isinstance(message, SetRole) and message.incarnation == self.incarnation:
            self.engine.limit_chunks(message.chunk_tokens)
            self._control.send(RoleSet(self.name, self.incarnation, message.turn))
            return
        if not isinstance(message, Probe | ProbeRead) or message.incarnation != self.incarnation:
            return
        key = type(message).__name__, message.probe
        if key in self._probes:
            return
        self._probes.append(key)
        if isinstance(message, Probe):
            self._probe(message)
        else:
            self._probe_read(message)

    def _retain(self, message: Retain) -> None:
        if message.incarnation == self.incarnation:
            self._idle_beat = None
            self.engine.retain(message, self.events.now_s)
            self.look()

    def _probe(self, message: Probe) -> None:
        engine_id = engine_request_id(f"probe-{message.probe}", 0)
        job = Job(
            self.engine,
            "probe",
            engine_id,
            message.prompt_tokens,
            self.events.now_s,
            probe=message.probe,
        )
        request = self._probe_request(engine_id, message)
        self._submit(job, msgspec.structs.replace(request, hold=True))

    def _probe_read(self, message: ProbeRead) -> None:
        handle = decode_handle(message.handle)
        self.reader.trying(message.source, handle.holder)
        engine_id = engine_request_id(f"probe-read-{message.probe}", 0)
        job = Job(
            self.engine,
            "probe_read",
            engine_id,
            message.prompt_tokens,
            self.events.now_s,
            probe=message.probe,
        )
        job.source = handle.holder
        request = self._probe_request(engine_id, message)
        self.reader.started(engine_id, handle, request.chain, probe=True)
        self._submit(job, msgspec.structs.replace(request, pull_tokens=handle.tokens))

    def _probe_request(self, engine_id: str, message: Probe | ProbeRead) -> EngineRequest:
        blocks = message.prompt_tokens // self.facts.block_size
        chain = shake_128(f"probe-{message.seed}".encode()).digest(blocks * BLOCK_HASH_BYTES)
        return EngineRequest(engine_id, chain, message.prompt_tokens, 1, cached=False)

    # --- data --------------------------------------------------------------------------

    def _arrives(self, connection: Connection | None, message: Any) -> None:
        """From an API process, or without a connection from the core."""
        if self.hung:
            self._inbox.append((connection, message))
        elif connection is None:
            self._control.receive("", message)
        elif not connection.broken:
            self._on_api(connection, message)

    def _on_api(self, connection: Connection, message: ToWorker) -> None:
        match message:
            case Work():
                if message.message.incarnation != self.incarnation:
                    reason = f"meant for incarnation {message.message.incarnation}"
                    self._fail(connection, message, reason)
                elif isinstance(message.message, Prefill):
                    self._prefill(connection, message)
                else:
                    self._decode(connection, message)
            case Abort():
                for request, attempt in message.calls:
                    job = self.jobs.get(engine_request_id(request, attempt))
                    if job is not None:
                        self._abort(job)
            case Discard():
                self._discard(message)
            case _:
                pass

    def _fail(self, connection: Connection, work: Work, reason: str) -> None:
        head = work.message
        failed = CallFailed(head.request, head.attempt, self.incarnation, reason)
        self._network.to_api(connection, failed)

    def _prefill(self, connection: Connection, work: Work) -> None:
        body = work.body
        head = work.message
        assert isinstance(head, Prefill)
        engine_id = engine_request_id(head.request, head.attempt)
        job = Job(
            self.engine, "prefill", engine_id, body.prompt_tokens, self.events.now_s, connection
        )
        pull_tokens = 0
        if head.handle:
            handle = decode_handle(head.handle)
            if not self._reads(connection, work, handle):
                return
            self.reader.started(engine_id, handle, body.chain)
            pull_tokens = handle.tokens
        job.cached_only = head.cached_only
        blocks = body.prompt_tokens // self.facts.block_size
        request = EngineRequest(
            engine_id,
            body.chain[: blocks * BLOCK_HASH_BYTES],
            body.prompt_tokens,
            1,
            hold=True,
            pull_tokens=pull_tokens,
            priority=body.priority,
            cached_only=head.cached_only,
        )
        self._submit(job, request)

    def _decode(self, connection: Connection, work: Work) -> None:
        body, head = work.body, work.message
        assert not isinstance(head, Prefill)
        engine_id = engine_request_id(head.request, head.attempt)
        if engine_id in self.jobs:
            return
        pull_tokens = 0
        if head.handle:
            handle = decode_handle(head.handle)
            if not self._reads(connection, work, handle):
                return
            self.reader.started(engine_id, handle, body.chain)
            pull_tokens = handle.tokens
        job = Job(
            self.engine, "decode", engine_id, body.prompt_tokens, self.events.now_s, connection
        )
        request = EngineRequest(
            engine_id,
            body.chain,
            body.prompt_tokens,
            body.output_tokens,
            pull_tokens=pull_tokens,
            priority=body.priority,
        )
        self._submit(job, request)

    def _reads(self, connection: Connection, work: Work, handle: Handle) -> bool:
        """Whether what came with a handle can go on with it; else it is refused."""
        refusal = self.reader.refusal(handle)
        if refusal:
            head, reason = work.message, f"handle refused: {refusal}"
            self._network.to_api(
                connection,
                CallFailed(
                    head.request, head.attempt, self.incarnation, reason, handle_refused=True
                ),
            )
        return not refusal

    def _submit(self, job: Job, request: EngineRequest) -> None:
        assert job.engine_id not in self.jobs, f"{job.engine_id} was begun before"
        job.output_tokens, job.chain = request.output_tokens, request.chain
        job.pending_tokens = max(0, request.prompt_tokens - request.pull_tokens)
        if job.cached_only:
            job.pending_tokens = 1
        self.pending_tokens += job.pending_tokens
        self.jobs[job.engine_id] = job
        self._idle_beat = None
        self.engine.submit(request, self.events.now_s)
        self.look()

    def _abort(self, job: Job) -> None:
        """Forget a request, whatever it is doing."""
        now_s = self.events.now_s
        job.freeze(now_s)
        del self.jobs[job.engine_id]
        self.pending_tokens -= job.pending_tokens
        self.engine.abort(job.engine_id, now_s)
        self.reader.ended(job.engine_id)
        self.look()

    def _discard(self, message: Discard) -> None:
        handle = decode_handle(message.handle)
        if message.incarnation == self.incarnation and self.reader.use(handle):
            self.engine.release(handle.engine_id, self.events.now_s)
            self.look()

    def _on_broken(self, connection: Connection) -> None:
        """What is said next on it would have a gap before it: its calls end here."""
        for job in [each for each in self.jobs.values() if each.connection is connection]:
            self._abort(job)

    # --- the engine --------------------------------------------------------------------

    @property
    def stepping(self) -> bool:
        """Whether the engine is in a step."""
        return self.engine.stepping

    def share(self, factor: float) -> None:
        """The engine's steps take ``factor`` times as long from now on."""
        self.engine.share(factor, self.events.now_s)
        self._wake_later()

    def look(self) -> None:
        """Something has happened to the engine: be woken when it has something to do next."""
        if self._cores is not None:
            self._cores.looked_at(self, self.alive)
        self._wake_later()

    def _wake_later(self) -> None:
        next_s = self.engine.next_s
        at_s = float("inf") if next_s is None else next_s
        if at_s == self._wake_s:
            return
        self.events.cancel(self._wake)
        self._wake, self._wake_s = None, at_s
        if next_s is not None:
            self._wake = self.events.at(next_s, self._woken)

    def _woken(self) -> None:
        self._wake, self._wake_s = None, float("inf")
        for output in self.engine.advance(self.events.now_s):
            self._on_output(output)
        self.look()

    def _on_output(self, output: Output) -> None:
        if isinstance(output, Pull):
            if output.id in self.jobs:
                self.reader.pull(output)
            return
        if isinstance(output, HostLoad):
            self.events.at(output.ready_s, self._loaded, output.id)
            return
        if isinstance(output, FirstToken):
            job = self.jobs.get(output.id)
            if job is not None:
                self.pending_tokens -= job.pending_tokens
                job.pending_tokens = 0
                self.reader.ended(output.id)
                self._told(output.id, output.computed_tokens)
        elif output.recomputed_tokens:
            self._told(output.id, output.recomputed_tokens)
        if self.hung:
            self._unsaid.append(output)
        else:
            self._say(output)

    def _loaded(self, engine_id: str) -> None:
        """KV has come from the host's memory, which is gone with the worker."""
        if self.alive:
            self.engine.pulled(engine_id, True, self.events.now_s)
            self.look()

    def _say(self, output: FirstToken | Ended) -> None:
        """Tell whoever waits for it, if it was not aborted meanwhile."""
        job = self.jobs.get(output.id)
        if job is None:
            return
        first = output if isinstance(output, FirstToken) else None
        if first is not None:
            job.moved_tokens = first.moved_tokens
            job.cached_tokens = first.local_cached_tokens + first.moved_tokens
        else:
            job.frozen_tokens, job.frozen_s = job.output_tokens, output.at_s
            del self.jobs[job.engine_id]
        if job.kind == "decode":
            assert job.connection is not None
            deltas = Deltas(self.incarnation)
            tokens = Tokens(deltas, job.engine_id, job, first, ended=first is None)
            self._network.to_api(job.connection, tokens)
        elif job.kind == "probe_read":
            if first is not None:
                self._probe_has_read(job, first)
        elif isinstance(output, Ended):
            self._prefilled(job, output)

    def _probe_has_read(self, job: Job, first: FirstToken) -> None:
        elapsed_s = self.events.now_s - job.started_s
        moved = first.moved_tokens
        if moved:
            assert job.source is not None
            self.reader.met(job.source)
        error = "" if moved else "nothing moved"
        self._control.send(
            ProbeFinished(self.name, self.incarnation, job.probe, elapsed_s, moved, error)
        )

    def _prefilled(self, job: Job, output: Ended) -> None:
        """Name the KV that is held."""
        assert output.held, job.engine_id
        request, _, attempt = job.engine_id.rpartition("~")
        tokens, chain = job.prompt_tokens, job.chain
        if job.cached_only:
            tokens = min(tokens, job.cached_tokens + 1)
            chain = chain[: tokens // self.facts.block_size * BLOCK_HASH_BYTES]
        handle = Handle(
            self.name, self.incarnation, request, int(attempt), tokens, output.expires_s
        )
        frame = encode_handle(handle)
        self._oracle.made(self, job.engine_id, chain)
        if job.kind == "probe":
            self._control.send(Probed(self.name, self.incarnation, job.probe, frame))
            return
        assert job.connection is not None
        lease_s = self.facts.kv_lease_s
        done = PrefillDone(
            request,
            int(attempt),
            self.incarnation,
            handle=frame,
            prompt_tokens=job.prompt_tokens,
            cached_tokens=job.cached_tokens,
            lease_s=lease_s,
            held_at_unix_s=self.events.now_s,
            margin_s=dispatch_margin_s(lease_s),
            moved_tokens=job.moved_tokens,
        )
        self._network.to_api(job.connection, done)

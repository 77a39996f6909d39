"""A worker: one process around one vLLM engine, prefilling or decoding as it is asked.

Talks to the core (control) and to the API processes (data). What to do with a request
is said by ``prefill.worker`` and ``decode.worker``; where it goes was said by the core.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import time
import uuid
from collections import defaultdict
from collections.abc import Coroutine
from typing import Any, Literal

import msgspec
import zmq
from prometheus_client import start_http_server
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from cluster.config import WorkerConfig
from cluster.engine import WorkerEngine, engine_facts
from cluster.examined import Examined, side_channel
from cluster.health import health_server
from cluster.kv_listener import Endpoints, KvListener
from coordinator import protocol
from coordinator.link import BAD_FRAME, BadBody, ControlLink, GarbageCounter
from coordinator.protocol import engine_request_id
from coordinator.sockets import make_socket
from decode.worker import decode_request, discard_request, retain_request
from prefill.worker import first_output, prefill_request, prefill_result
from transfer import handle as handles
from transfer.lease import Spent
from transfer.profile import chunk_params
from transfer.sources import Sources

logger = logging.getLogger("pythia.worker")

ENGINE_WATCH_S = 0.5
DRAIN_POLL_S = 0.05
DRAINING_SAID_S = 1.0
OWED_S = 60.0
OWED_MAX = 65536
PROBE_TOKEN_IDS = range(3, 250)
UTILITIES = frozenset(
    {"add_lora", "remove_lora", "list_loras", "pin_lora", "reset_prefix_cache", "reset_mm_cache"}
)

Kind = Literal["prefill", "decode", "probe", "probe_read", "role"]


class Job(msgspec.Struct, gc=False):
    """A request that the engine has, and who waits for it."""

    kind: Kind
    api: bytes
    request: str
    attempt: int
    prompt_tokens: int
    cached_tokens: int = 0
    moved_tokens: int = 0
    started_s: float = 0.0
    probe: int = 0
    source: str = ""
    read_tokens: int = 0
    """Of its prompt, what another engine holds to be read; only what the cache lacks of it is."""
    first_token: bool = False
    """It samples the first token, for the client to get."""
    last: bool = False
    """... which is also the last one it wants."""

    @property
    def engine_id(self) -> str:
        """What the engine knows it by."""
        return engine_request_id(self.request, self.attempt)


class Owed(msgspec.Struct, frozen=True):
    """Bad news for an API process whose queue was full."""

    failed: protocol.CallFailed
    since_s: float


class Worker:
    """The sockets around an engine, and the table of what the engine is working on."""

    def __init__(
        self,
        config: WorkerConfig,
        engine: WorkerEngine,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoints: Endpoints | None = None,
    ) -> None:
        """``endpoints``: where the engine tells of its prefix cache, if it does."""
        self.config = config
        self.incarnation = uuid.uuid4().hex
        self.jobs: dict[str, Job] = {}
        self.owed: dict[tuple[bytes, str, int], Owed] = {}
        self.garbage = GarbageCounter("an API process")
        self.stopping = asyncio.Event()
        self.draining = False
        self.exit_code = 0
        self.data = make_socket(context, zmq.ROUTER)
        self.data_address = self.data.bind(f"tcp://{config.host}:{config.data_port or '*'}")
        self.link = ControlLink(
            context,
            config.coordinator,
            hello=self._ready,
            beat=self._beat,
            decode=protocol.decode_core_to_worker,
            on_message=self._on_core,
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._core = ""
        """Which one has taken it in."""
        self._chunk_tokens = 0
        self._settings = 0
        """How often the engine was told how to work."""
        self.engine = engine
        self.encoder = MsgpackEncoder()
        self.request_decoder = MsgpackDecoder(EngineCoreRequest)
        self.argument_decoder = MsgpackDecoder()
        self.facts = engine_facts(
            engine.vllm_config,
            config.served_model_name,
            float(config.kv_lease_s),
            config.host_bytes,
        )
        self.spent = Spent()
        self._orders = 0
        self._pins_end_s = 0.0
        """When the last pin ends that the engine was told of; 0 if it is over."""
        self.kv: KvListener | None = None
        if endpoints is not None:
            name, send, host = config.name, self.link.send, config.host_bytes > 0
            self.kv = KvListener(context, endpoints, name, self.incarnation, send, host)
        self.sources = Sources(engine.engine_id, self.facts.kv_bytes_per_block)
        self.examined = Examined(engine.engine_id, self.facts, self.sources.report, self._answer)
        engine.on_step = self._on_step
        engine.on_reads = self.sources.measured

    async def run(self) -> int:
        """Serve until told to stop or the engine dies. Returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.end)
        tasks = [
            asyncio.create_task(self.link.run(), name="control link"),
            asyncio.create_task(self._serve_data(), name="data socket"),
            asyncio.create_task(self._watch_engine(), name="engine"),
            asyncio.create_task(self.stopping.wait(), name="stop"),
        ]
        if self.kv is not None:
            tasks.append(asyncio.create_task(self.kv.run(), name="KV events"))
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if (error := task.exception()) is not None:
                logger.error("%s failed", task.get_name(), exc_info=error)
                self.exit_code = 1
        if self.link.refused:
            logger.error("the core refused this worker: %s", self.link.refused)
            self.exit_code = 3
        self.link.send(
            protocol.Leaving(self.config.name, self.incarnation, f"exit code {self.exit_code}")
        )
        await asyncio.sleep(0.05)  # lets the socket's thread put that on the wire
        for task in pending:
            task.cancel()
        return self.exit_code

    def end(self) -> None:
        """To be told to end: drains first. Told again, it goes at once."""
        if self.draining:
            self.stopping.set()
            return
        self.draining = True
        self._spawn(self._drain())

    async def _drain(self) -> None:
        """Wants no more work, ends what it has begun, as long as that may take, and stops."""
        deadline_s = time.monotonic() + self.config.drain_s
        said_s = float("-inf")
        while self._is_busy() and (now_s := time.monotonic()) < deadline_s:
            if now_s - said_s >= DRAINING_SAID_S:
                self.link.send(protocol.Draining(self.config.name, self.incarnation))
                said_s = now_s
            await asyncio.sleep(DRAIN_POLL_S)
        self.stopping.set()

    def _is_busy(self) -> bool:
        """It works on something, or holds KV that somebody has yet to read."""
        return bool(self.jobs) or self.engine.load(0).kv_blocks_used > 0

    def close(self) -> None:
        """Close the sockets."""
        if self.kv is not None:
            self.kv.close()
        self.data.close()
        self.link.socket.close()

    # --- control ---------------------------------------------------------------

    def _ready(self) -> protocol.Message:
        return protocol.Ready(
            worker=self.config.name,
            incarnation=self.incarnation,
            role=self.config.role,
            data_address=self.data_address,
            facts=self.facts,
            host=self.config.host,
            devices=",".join(str(device) for device in self.config.devices),
            side_channel=side_channel(),
            fixed=self.config.fixed,
        )

    def _beat(self) -> protocol.Message:
        if self.kv is not None:
            self.kv.tell()
        load = self.engine.load(self.garbage.total + self.link.garbage.total)
        return protocol.Beat(self.config.name, self.incarnation, load, self.sources.report())

    def _on_core(self, message: protocol.CoreToWorker) -> None:
        match message:
            case protocol.Probe():
                self._spawn(self._probe(message))
            case protocol.ProbeRead():
                self._spawn(self._probe_read(message))
            case protocol.KvResync() | protocol.Retain():
                if message.incarnation == self.incarnation:
                    self._on_cache(message)
            case protocol.SetRole():
                self._set_role(message)
            case protocol.Leave():
                logger.info("told to leave: %s", message.reason)
                self.stopping.set()
            case protocol.Welcome():
                self._welcomed(message.core)
            case protocol.Refused() | protocol.Unknown():
                raise AssertionError("the link keeps these to itself")

    def _on_cache(self, message: protocol.KvResync | protocol.Retain) -> None:
        if isinstance(message, protocol.Retain):
            self._spawn(self._retain(message))
        elif self.kv is not None:
            self.kv.resync()

    async def _probe(self, message: protocol.Probe) -> None:

        request = self._probe_request(message.seed, message.prompt_tokens)
        job = Job("probe", b"", f"probe-{message.probe}", 0, message.prompt_tokens)
        job.probe = message.probe
        await self._submit(prefill_request(request, job.request, 0), job)

    async def _probe_read(self, message: protocol.ProbeRead) -> None:

        try:
            handle = handles.decode(message.handle)
        except handles.HandleError as error:
            self._probe_finished(message.probe, error=f"unusable handle: {error}")
            return
        request = self._probe_request(message.seed, message.prompt_tokens)
        self.sources.trying(message.source, handle)
        job = Job("probe_read", b"", f"probe-read-{message.probe}", 0, message.prompt_tokens)
        job.probe, job.source = message.probe, handle.remote_engine_id
        job.read_tokens = handle.remote_num_tokens
        await self._submit(decode_request(request, job.request, 0, handle), job)

    def _welcomed(self, core: str) -> None:
        logger.info("taken in by core %s as %s", core, self.config.name)
        if self._core not in ("", core) and self._chunk_tokens:
            # What another core made of it, this one does not know.
            self._chunk_tokens = 0
            self._spawn(self._set_chunks(0, 0))
        self._core = core
        if self.kv is not None:
            self.kv.begin()

    def _set_role(self, message: protocol.SetRole) -> None:
        if message.incarnation == self.incarnation:
            self._chunk_tokens = message.chunk_tokens
            self._spawn(self._set_chunks(message.turn, message.chunk_tokens))

    async def _set_chunks(self, turn: int, chunk_tokens: int) -> None:
        """The engine is to work with such chunks; its answer says that it does."""
        self._settings += 1
        job = Job("role", b"", f"role-{turn}-{self._settings}", 0, 1)
        job.probe = turn
        request = self._probe_request(turn, 1)
        assert request.sampling_params is not None
        request.sampling_params.extra_args = {"kv_transfer_params": chunk_params(chunk_tokens)}
        request = msgspec.structs.replace(
            request, request_id=job.engine_id, external_req_id=job.engine_id
        )
        await self._submit(request, job)

    def _probe_request(self, seed: int, prompt_tokens: int) -> EngineCoreRequest:

        rng = random.Random(seed)
        vocabulary = self.engine.model_config.get_vocab_size()
        return EngineCoreRequest(
            request_id="",
            prompt_token_ids=[
                rng.choice(PROBE_TOKEN_IDS) % vocabulary for _ in range(prompt_tokens)
            ],
            mm_features=None,
            sampling_params=SamplingParams(max_tokens=1, temperature=0.0, detokenize=False),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            # Salted, so that a probe is never answered from a cache nor fills one.
            cache_salt=f"probe-{seed}-{uuid.uuid4().hex}",
            data_parallel_rank=None,
        )

    def _probe_finished(
        self, probe: int, elapsed_s: float = 0.0, tokens_moved: int = 0, error: str = ""
    ) -> None:
        self.link.send(
            protocol.ProbeFinished(
                self.config.name, self.incarnation, probe, elapsed_s, tokens_moved, error
            )
        )

    # --- data --------------------------------------------------------------------

    async def _serve_data(self) -> None:
        while True:
            frames = await self.data.receive()
            api = frames[0].bytes
            if len(frames) < 2:
                self.garbage.add(ValueError(f"{len(frames)} frames"))
                continue
            try:
                message = protocol.decode_to_worker(frames[1].buffer)
                body = self._decode_body(message, frames[2:])
            except (*BAD_FRAME, BadBody) as error:
                self.garbage.add(error)
            else:
                if isinstance(message, protocol.ExaminerToWorker):
                    await self._on_examiner(api, message)
                else:
                    await self._on_api(api, message, body)
            # What has arrived is had without waiting: the engine's outputs must get their turn.
            await asyncio.sleep(0)

    def _decode_body(
        self, message: protocol.ApiToWorker | protocol.ExaminerToWorker, frames: list[Any]
    ) -> Any:
        """What vLLM encoded behind an API process's message. BadBody if it did not."""
        try:
            match message:
                case protocol.Prefill() | protocol.Decode():
                    request: EngineCoreRequest = self.request_decoder.decode(frames)
                    if request.sampling_params is None or not request.prompt_token_ids:
                        raise BadBody("a request without prompt tokens or sampling parameters")
                    return request
                case protocol.Utility():
                    return self.argument_decoder.decode(frames)
                case _:
                    return None
        except Exception as error:  # whatever vLLM's decoder trips over
            raise BadBody(f"{type(error).__name__}: {error}") from error

    async def _on_api(self, api: bytes, message: protocol.ApiToWorker, body: Any) -> None:
        match message:
            case protocol.Prefill() | protocol.Decode():
                if self._is_current(api, message):
                    await self._begin(api, message, body)
            case protocol.Abort():
                await self._abort(
                    [engine_request_id(request, attempt) for request, attempt in message.calls]
                )
            case protocol.Discard():
                if message.incarnation == self.incarnation:
                    await self._discard(message)
            case protocol.Utility():
                self._spawn(self._utility(api, message, body))

    async def _on_examiner(self, api: bytes, message: protocol.ExaminerToWorker) -> None:
        match message:
            case protocol.AskTime():
                self.examined.tell_time(api, message)
            case protocol.Look():
                self._spawn(self.examined.look(api, message))
            case protocol.Sample() | protocol.SampleRead():
                await self._sample(api, message)

    def _is_current(self, api: bytes, message: protocol.Prefill | protocol.Decode) -> bool:
        if message.incarnation == self.incarnation:
            return True
        reason = f"meant for incarnation {message.incarnation}"
        self._fail(api, message.request, message.attempt, reason)
        return False

    def _fail(
        self,
        api: bytes,
        request: str,
        attempt: int,
        reason: str,
        retryable: bool = True,
        handle_refused: bool = False,
    ) -> None:
        failed = protocol.CallFailed(
            request, attempt, self.incarnation, reason, retryable, handle_refused
        )
        if not self.data.post([api, protocol.encode(failed)]) and len(self.owed) < OWED_MAX:
            self.owed[api, request, attempt] = Owed(failed, time.monotonic())

    async def _begin(
        self, api: bytes, message: protocol.Prefill | protocol.Decode, request: EngineCoreRequest
    ) -> None:
        """Have the engine do what an API process asks for a call."""
        call, attempt = message.request, message.attempt
        job = Job(
            "prefill" if isinstance(message, protocol.Prefill) else "decode",
            api,
            call,
            attempt,
            prompt_tokens=len(request.prompt_token_ids or ()),
        )
        if job.engine_id in self.jobs:
            return  # sent twice: the first one is being worked on
        handle = None
        if message.handle:
            try:
                handle = self._accept(message.handle)
                self.sources.started(job.engine_id, handle)
                if not self.sources.is_own(handle):
                    job.read_tokens = handle.remote_num_tokens
            except handles.HandleError as error:
                self._fail(api, call, attempt, f"handle refused: {error}", handle_refused=True)
                return
        if isinstance(message, protocol.Prefill):
            job.first_token = message.first_token
            assert request.sampling_params is not None
            job.last = job.first_token and request.sampling_params.max_tokens == 1
            made = prefill_request(
                request, call, attempt, job.first_token, handle, message.cached_only
            )
        else:
            made = decode_request(request, call, attempt, handle)
        await self._submit(made, job)

    def _accept(self, frame: bytes, own: bool = False) -> handles.Handle:
        handle = handles.decode(frame)
        if own:
            self.sources.check_own(handle)
        else:
            self.sources.check(handle)
        if not self.spent.use(handle.remote_engine_id, handles.owner(handle), time.monotonic()):
            raise handles.HandleError("used before: a handle is read once")
        return handle

    async def _submit(self, request: EngineCoreRequest, job: Job) -> None:
        if request.request_id in self.jobs:
            return  # sent twice: the first one is being worked on
        job.started_s = time.monotonic()
        self.jobs[request.request_id] = job
        try:
            await self.engine.submit(request)
        except EngineDeadError:
            raise
        except Exception as error:
            if not job.api:
                raise
            # One request that this engine can't take must not end all others.
            logger.exception("%s could not be begun", request.request_id)
            await self._abort([request.request_id])
            reason = f"{type(error).__name__}: {error}"
            self._fail(job.api, job.request, job.attempt, reason, retryable=False)

    async def _sample(self, who: bytes, message: protocol.Sample | protocol.SampleRead) -> None:
        """A probe as the core's, of another length, for somebody else."""
        name = f"sample-{who.hex()}-{message.call}"
        job = Job("probe", who, name, 0, message.prompt_tokens)
        job.probe = message.call
        request = self._probe_request(message.seed, message.prompt_tokens)
        if isinstance(message, protocol.Sample):
            await self._submit(prefill_request(request, name, 0), job)
            return
        try:
            handle = self._accept(message.handle)
        except handles.HandleError as error:
            self._answer(who, protocol.Sampled(message.call, error=f"handle refused: {error}"))
            return
        job.kind, job.source = "probe_read", handle.remote_engine_id
        job.read_tokens = handle.remote_num_tokens
        await self._submit(decode_request(request, name, 0, handle), job)

    def _answer(self, who: bytes, message: protocol.WorkerToExaminer) -> None:
        self.data.post([who, protocol.encode(message)])

    async def _abort(self, engine_ids: list[str]) -> None:
        known = [engine_id for engine_id in engine_ids if self.jobs.pop(engine_id, None)]
        for engine_id in known:
            self.sources.ended(engine_id)
        if known:
            await self.engine.forget(known)

    async def _discard(self, message: protocol.Discard) -> None:

        try:
            handle = self._accept(message.handle, own=True)
        except handles.HandleError as error:
            logger.warning("nothing to discard for %s: %s", message.request, error)
            return
        request = discard_request([0], f"discard-{message.request}", message.attempt, handle)
        await self.engine.engine_core.add_request_async(request)

    async def _retain(self, order: protocol.Retain) -> None:
        """Have the engine pin and release; and once more when the last pin has ended, as an engine
        at rest looks at nothing by itself."""
        self._orders += 1
        await self.engine.engine_core.add_request_async(retain_request(order, self._orders))
        ends_s = max((pin.hold_s for pin in order.pins), default=0.0)
        if ends_s:
            self._pins_end_s = max(self._pins_end_s, time.monotonic() + ends_s)

    def _end_pins(self) -> None:
        if self._pins_end_s and time.monotonic() > self._pins_end_s:
            self._pins_end_s = 0.0
            self._spawn(self._retain(protocol.Retain(self.incarnation)))

    async def _utility(self, api: bytes, message: protocol.Utility, arguments: list[Any]) -> None:
        error = ""
        result: object = None
        if message.method not in UTILITIES:
            error = f"{message.method} is not offered"
        else:
            try:
                result = await self._call_engine(message.method, arguments)
            except Exception as raised:
                logger.exception("utility %s failed", message.method)
                error = f"{type(raised).__name__}: {raised}"
        reply = protocol.UtilityReply(message.call, self.incarnation, error)
        self.data.post([api, protocol.encode(reply), *self.encoder.encode(result)])

    async def _call_engine(self, method: str, arguments: list[Any]) -> object:
        if method == "add_lora":
            arguments = [msgspec.convert(arguments[0], LoRARequest)]
        result: object = await getattr(self.engine.engine_core, f"{method}_async")(*arguments)
        return sorted(result) if isinstance(result, set) else result

    # --- what the engine says -----------------------------------------------------

    def _on_step(self, outputs: list[EngineCoreOutput], timestamp_s: float) -> None:
        by_api: defaultdict[bytes, list[EngineCoreOutput]] = defaultdict(list)
        for output in outputs:
            job = self.jobs.get(output.request_id)
            if job is None:
                continue  # aborted while the step ran
            stats = output.prefill_stats
            if stats is not None and self.config.kv_host_gib:
                _count_as_cached(stats, job.read_tokens)
            if job.kind == "role":
                self._role_set(job, output)
            elif job.kind == "decode":
                self.sources.ended(output.request_id)
                by_api[job.api].append(output)
            else:
                self._on_private(job, output, timestamp_s)
            if output.finish_reason is not None:
                del self.jobs[output.request_id]
        for api, api_outputs in by_api.items():
            self._send_deltas(api, api_outputs, timestamp_s)

    def _role_set(self, job: Job, output: EngineCoreOutput) -> None:
        """The engine has answered, so it works as it was told to."""
        if output.finish_reason is not None:
            name, incarnation = self.config.name, self.incarnation
            self.link.send(protocol.RoleSet(name, incarnation, job.probe))

    def _send_deltas(self, api: bytes, outputs: list[EngineCoreOutput], timestamp_s: float) -> None:

        frames = self.encoder.encode(EngineCoreOutputs(outputs=outputs, timestamp=timestamp_s))
        header = protocol.encode(protocol.Deltas(self.incarnation))
        if not self.data.post([api, header, *frames]):
            self._api_gone(api)

    def _api_gone(self, api: bytes) -> None:
        """Nothing can be sent to an API process: what it would be sent next has a gap before it.

        Its calls end here. Should it only have been slow, it is told so.
        """
        orphans = {engine_id: job for engine_id, job in self.jobs.items() if job.api == api}
        logger.warning("an API process can't be reached: aborting its %d calls", len(orphans))
        self._spawn(self._abort(list(orphans)))
        for job in orphans.values():
            self._fail(api, job.request, job.attempt, "the API process did not keep up")

    def _pay(self) -> None:
        """Tell API processes what they could not be told before, or forget it in the end."""
        now_s = time.monotonic()
        for key, owed in list(self.owed.items()):
            sent = self.data.post([key[0], protocol.encode(owed.failed)])
            if sent or now_s - owed.since_s > OWED_S:
                del self.owed[key]

    def _on_private(self, job: Job, output: EngineCoreOutput, timestamp_s: float) -> None:

        if (stats := output.prefill_stats) is not None:
            job.cached_tokens = stats.num_cached_tokens
            job.moved_tokens = stats.num_external_cached_tokens
        self.sources.ended(output.request_id)
        if job.kind == "probe_read":
            if output.finish_reason is not None:
                self._on_read(job, output)
            return
        result = prefill_result(
            output,
            job.request,
            job.attempt,
            self.incarnation,
            job.prompt_tokens,
            job.cached_tokens,
            self.facts.kv_lease_s,
            time.time(),
            job.last,
            job.moved_tokens,
        )
        if result is None:
            return
        if job.kind == "prefill":
            frames = [job.api, protocol.encode(result)]
            if job.first_token and isinstance(result, protocol.PrefillDone):
                first = first_output(output, job.last)
                frames += self.encoder.encode(
                    EngineCoreOutputs(outputs=[first], timestamp=timestamp_s)
                )
            if not self.data.post(frames):
                self._api_gone(job.api)
            return
        handle, error = b"", ""
        if isinstance(result, protocol.PrefillDone):
            handle = result.handle
        else:
            error = result.reason
        if job.api:
            self._answer(job.api, protocol.Sampled(job.probe, handle, error=error))
            return
        self.link.send(
            protocol.Probed(self.config.name, self.incarnation, job.probe, handle, error)
        )

    def _on_read(self, job: Job, output: EngineCoreOutput) -> None:
        """A probe's KV has been pulled, or computed because it could not be."""
        elapsed_s = time.monotonic() - job.started_s
        error = "" if job.moved_tokens else f"nothing moved ({output.finish_reason})"
        if job.api:
            self._answer(job.api, protocol.Sampled(job.probe, b"", job.moved_tokens, error))
            return
        if not error:
            self.sources.met(job.source)
        self._probe_finished(job.probe, elapsed_s, job.moved_tokens, error)

    async def _watch_engine(self) -> None:
        while not self.engine.errored:
            await asyncio.sleep(ENGINE_WATCH_S)
            self._pay()
            self._end_pins()
        raise RuntimeError("the engine died; its story is in the log above")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._collect)

    def _collect(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of the worker failed", exc_info=error)
            self.exit_code = 1
            self.stopping.set()


def _count_as_cached(stats: PrefillStats, read_tokens: int) -> None:
    """To vLLM whatever a connector brings comes from elsewhere. What came from this host's memory,
    as nothing of ``read_tokens`` was left to be read, was cached here."""
    if stats.num_local_cached_tokens < read_tokens:
        return
    stats.num_local_cached_tokens += stats.num_external_cached_tokens
    stats.num_external_cached_tokens = 0


async def serve(
    config: WorkerConfig, engine: WorkerEngine, endpoints: Endpoints | None = None
) -> int:
    """Serve until told to stop. Returns the process's exit code.

    ``endpoints``: where the engine tells of its prefix cache, if it does.
    """
    if config.metrics_port:
        start_http_server(config.metrics_port, addr=config.host)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    worker = Worker(config, engine, context, endpoints)
    try:
        async with contextlib.AsyncExitStack() as stack:
            if config.health_port:
                health = health_server(
                    config.host,
                    config.health_port,
                    live=lambda: not engine.errored,
                    ready=lambda: worker.link.welcome is not None and not worker.draining,
                )
                await stack.enter_async_context(health)
            return await worker.run()
    finally:
        worker.close()
        context.destroy(linger=0)

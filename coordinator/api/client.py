"""The cluster as an ``EngineClient``: vLLM's own front half over remote workers.

``ClusterClient`` is vLLM's ``AsyncLLM`` - its validation, ``n`` > 1, stop strings,
detokenising and metrics - whose engine core is not a process next door but
``ClusterEngineCore``: every engine-level request becomes a call of ``Calls``, planned by
the core and carried out by workers.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import zmq
from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.renderers import renderer_from_config
from vllm.sampling_params import SamplingParams
from vllm.tasks import SupportedTask
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from coordinator import protocol
from coordinator.api.calls import Calls
from coordinator.api.errands import Errands
from coordinator.api.exchange import CallRecord, Exchange, Failure, current_exchange
from coordinator.api.questions import Questions
from coordinator.limits import Limits
from coordinator.link import BAD_FRAME, BadBody, ControlLink, GarbageCounter
from coordinator.protocol import Placed
from coordinator.sockets import make_socket
from coordinator.workflow.limits import WorkflowLimits

logger = logging.getLogger("pythia.api")

REQUEST_ID_MAX = 200
UNFIT_IN_IDS = re.compile(r"[^A-Za-z0-9_.-]")
TICK_S = 0.25
UTILITY_S = 120.0
INSPECT_S = 5.0
RESERVED_ARGUMENTS = ("kv_transfer_params", "ec_transfer_params")


class CallError(GracefulHTTPError):
    """A call was not served; carries the HTTP status to answer with."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message, HTTPStatus(failure.status))
        self.failure = failure


class WorkerLink:
    """The data connection to one incarnation of a worker."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], up: protocol.WorkerUp) -> None:
        self.placed = Placed(up.worker, up.incarnation)
        self.role = up.role
        self.facts = up.facts
        self.socket = make_socket(context, zmq.DEALER)
        self.monitor = self.socket.monitor(zmq.EVENT_DISCONNECTED)
        self.socket.connect(up.data_address)
        self.tasks: list[asyncio.Task[None]] = []

    def start(self, group: asyncio.TaskGroup, owner: ClusterEngineCore) -> None:
        """Receive until closed. An error of ours here ends ``group``."""
        name = self.placed.worker
        self.tasks = [
            group.create_task(self._receive(owner), name=f"data of {name}"),
            group.create_task(self._watch(owner), name=f"connection to {name}"),
        ]

    async def _receive(self, owner: ClusterEngineCore) -> None:
        while True:
            frames = await self.socket.receive()
            try:
                message = protocol.decode_worker_to_api(frames[0].buffer)
                body = owner.decode_body(message, frames[1:])
            except (*BAD_FRAME, BadBody) as error:
                owner.garbage.add(error)
            else:
                owner.on_worker(self, message, body)
            # What has arrived is had without waiting: others must get their turn.
            await asyncio.sleep(0)

    async def _watch(self, owner: ClusterEngineCore) -> None:
        """A connection that broke has lost what was on it, and the worker knows the next one
        under another name: nothing more would come for calls begun on this one."""
        while True:
            await self.monitor.receive()
            owner.on_disconnected(self)

    def close(self) -> None:
        """Forget the worker."""
        for task in self.tasks:
            task.cancel()
        self.monitor.close()
        self.socket.close()


class ClusterEngineCore(EngineCoreClient):
    """What ``AsyncLLM`` takes for its engine core: the whole cluster."""

    def __init__(
        self,
        api: str,
        control_address: str,
        model: str,
        vllm_config: VllmConfig,
        limits: Limits,
        workflow_limits: WorkflowLimits,
    ) -> None:
        self.api = api
        self.workflow_limits = workflow_limits
        self.model = model
        self.vllm_config = vllm_config
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.resources = SimpleNamespace(engine_dead=False)
        self.engine_ranks_managed = [0]
        self.garbage = GarbageCounter("a worker")
        self.calls = Calls(api, self, limits)
        self.errands = Errands(api, self, self.calls)
        self.workers: dict[Placed, WorkerLink] = {}
        self.outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self.request_encoder = MsgpackEncoder()
        self.output_decoder = MsgpackDecoder(EngineCoreOutputs)
        self.plain_decoder = MsgpackDecoder()
        self.processor: OutputProcessor | None = None
        self.link = ControlLink(
            self.context,
            control_address,
            hello=lambda: protocol.Hello(api, model=model),
            beat=lambda: protocol.ApiBeat(api, len(self.calls.calls)),
            decode=protocol.decode_core_to_api,
            on_message=self._on_core,
        )
        self.questions = Questions(self.link.send)
        self._loop = asyncio.get_running_loop()
        self._group = asyncio.TaskGroup()
        self._utilities: dict[int, asyncio.Future[Any]] = {}
        self._snapshots: dict[int, asyncio.Future[protocol.Snapshot]] = {}
        self._numbers = itertools.count(1)

    @property
    def core(self) -> str:
        """The core that has taken us in; empty before one has."""
        return self.calls.core

    @property
    def block_size(self) -> int:
        """Tokens of a block, as the workers have it; 0 before one is known."""
        return self.calls.block_size

    async def run(self) -> None:
        """Keep in touch with core and workers until refused or closed. Raises if we erred."""
        async with self._group as group:
            link = group.create_task(self.link.run())
            ticking = group.create_task(self._tick())
            await link
            ticking.cancel()
            for worker in self._links():
                worker.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.calls.tick(time.monotonic())
            self.errands.tick(time.monotonic())

    # --- what AsyncLLM asks of an engine core ----------------------------------------

    async def get_output_async(self) -> EngineCoreOutputs:
        """The next outputs, of whichever worker."""
        return await self.outputs.get()

    async def get_supported_tasks_async(self) -> tuple[SupportedTask, ...]:
        """Generation; pooling models have no prefill/decode to split."""
        return ("generate",)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Start a call."""
        exchange = current_exchange.get() or Exchange()
        record = CallRecord(request.request_id, continuations=exchange.continuations)
        exchange.calls.append(record)
        assert self.processor is not None
        state = self.processor.request_states.get(request.request_id)
        parent = state.parent_req if state is not None else None
        group = parent.request_id if parent is not None else ""
        self.calls.submit(request, record, exchange.context, group, time.monotonic())

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """End calls whose stop string was found."""
        self.calls.end(request_ids, "stop", time.monotonic())

    async def add_lora_async(self, lora_request: LoRARequest) -> bool:
        """Load an adapter on every worker; True if all have it."""
        return all(await self._all_workers("add_lora", lora_request))

    async def remove_lora_async(self, lora_id: int) -> bool:
        """Unload an adapter on every worker."""
        return all(await self._all_workers("remove_lora", lora_id))

    async def list_loras_async(self) -> set[int]:
        """Adapters that every worker has."""
        lists = await self._all_workers("list_loras")
        return set.intersection(*(set(loras) for loras in lists)) if lists else set()

    async def pin_lora_async(self, lora_id: int) -> bool:
        """Keep an adapter loaded on every worker."""
        return all(await self._all_workers("pin_lora", lora_id))

    async def reset_prefix_cache_async(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Empty the prefix caches of all workers."""
        replies = await self._all_workers(
            "reset_prefix_cache", reset_running_requests, reset_connector
        )
        return all(replies)

    async def reset_mm_cache_async(self) -> None:
        """Empty the multi-modal caches of all workers."""
        await self._all_workers("reset_mm_cache")

    async def is_sleeping_async(self) -> bool:
        """Workers of a cluster do not sleep."""
        return False

    async def is_scheduler_paused_async(self) -> bool:
        """Workers of a cluster are not paused from here."""
        return False

    def dp_engines_running(self) -> bool:
        """Whether any call is open."""
        return bool(self.calls.calls)

    def shutdown(self, timeout: float | None = None) -> None:
        """Leave the cluster; open calls end with an error. From any thread, more than once."""
        if not self.resources.engine_dead and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop)
        self.resources.engine_dead = True

    def _stop(self) -> None:
        assert self.processor is not None
        self.calls.end(list(self.calls.calls), "abort", time.monotonic())
        self.processor.propagate_error(CallError(Failure(503, "the server is stopping")))
        self.link.close()

    async def _all_workers(self, method: str, *arguments: Any) -> list[Any]:
        frames = self.request_encoder.encode(arguments)
        return list(
            await asyncio.gather(*(self._utility(link, method, frames) for link in self._links()))
        )

    def _links(self) -> list[WorkerLink]:
        return list(self.workers.values())

    async def _utility(self, link: WorkerLink, method: str, frames: Sequence[Any]) -> Any:
        number = next(self._numbers)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._utilities[number] = future
        try:
            header = protocol.encode(protocol.Utility(number, method))
            if not link.socket.post([header, *frames]):
                raise RuntimeError(f"{link.placed.worker} can't be reached")
            return await asyncio.wait_for(future, UTILITY_S)
        finally:
            del self._utilities[number]

    async def inspect(self) -> protocol.Snapshot:
        """The core's view of the cluster. TimeoutError if the core is away."""
        number = next(self._numbers)
        future: asyncio.Future[protocol.Snapshot] = asyncio.get_running_loop().create_future()
        self._snapshots[number] = future
        try:
            self.link.send(protocol.Inspect(number))
            return await asyncio.wait_for(future, INSPECT_S)
        finally:
            del self._snapshots[number]

    def hears_core(self) -> bool:
        """Whether the core has taken this process in and answers its beats."""
        return self.link.is_heard(self.calls.limits.beats_missed, time.monotonic())

    # --- Wire -------------------------------------------------------------------------

    def to_core(self, message: protocol.Message) -> bool:
        """Send to the core."""
        return self.link.send(message)

    def to_worker(self, worker: Placed, message: protocol.Message, frames: Sequence[Any]) -> bool:
        """Send to a worker, if that incarnation is connected."""
        link = self.workers.get(worker)
        return link is not None and link.socket.post([protocol.encode(message), *frames])

    def deliver(self, outputs: list[EngineCoreOutput], timestamp_s: float) -> None:
        """Hand outputs to vLLM's output handler."""
        self.outputs.put_nowait(EngineCoreOutputs(outputs=outputs, timestamp=timestamp_s))

    def fail(self, request: str, failure: Failure) -> None:
        """End a request, and its siblings, with an error."""
        assert self.processor is not None
        state = self.processor.request_states.get(request)
        if state is None or state.queue is None:
            return
        state.queue.put(CallError(failure))
        family = state.parent_req.request_id if state.parent_req is not None else request
        siblings = self.processor.abort_requests([family], internal=True)
        self.calls.end(siblings, "error", time.monotonic())

    def encode(self, request: EngineCoreRequest) -> Sequence[Any]:
        """The request as vLLM's own frames."""
        frames: Sequence[Any] = self.request_encoder.encode(request)
        return frames

    # --- messages ----------------------------------------------------------------------

    def _on_core(self, message: protocol.CoreToApi) -> None:
        now_s = time.monotonic()
        match message:
            case protocol.Plan():
                self.calls.on_plan(message, now_s)
            case protocol.Rejected():
                self.calls.on_rejected(message, now_s)
            case protocol.Stop() | protocol.Check() | protocol.Move():
                self._on_doubt(message, now_s)
            case protocol.WorkerUp():
                self._worker_up(message)
            case protocol.WorkerGone():
                self._lose(Placed(message.worker, message.incarnation), message.reason)
            case protocol.Welcome():
                self.calls.on_welcome(message.core, message.block_size)
                self.calls.contexts.switch(message.contexts)
            case protocol.Snapshot() | protocol.WorkflowAnswer():
                self._on_answer(message)
            case protocol.Errand() | protocol.DropErrand():
                self.errands.on_message(message, now_s)
            case protocol.Alive() | protocol.Refused() | protocol.Unknown():
                raise AssertionError("the link keeps these to itself")

    def _on_doubt(
        self, message: protocol.Stop | protocol.Check | protocol.Move, now_s: float
    ) -> None:
        if isinstance(message, protocol.Stop):
            self.calls.on_stop(message, now_s)
        elif isinstance(message, protocol.Move):
            self.calls.on_move(message, now_s)
        else:
            self.calls.on_check(message)

    def _on_answer(self, answer: protocol.Snapshot | protocol.WorkflowAnswer) -> None:
        if isinstance(answer, protocol.WorkflowAnswer):
            self.questions.on_answer(answer)
            return
        future = self._snapshots.get(answer.token)
        if future is not None and not future.done():
            future.set_result(answer)

    def _worker_up(self, up: protocol.WorkerUp) -> None:
        placed = Placed(up.worker, up.incarnation)
        if placed in self.workers:
            return
        for former in [known for known in self.workers if known.worker == up.worker]:
            self._lose(former, "replaced by a new incarnation")
        link = self.workers[placed] = WorkerLink(self.context, up)
        link.start(self._group, self)
        self.calls.block_size = up.facts.block_size
        model = self.vllm_config.model_config
        # An engine may have fitted the context length to its memory.
        model.max_model_len = min(model.max_model_len, up.facts.max_model_len)
        logger.info("worker %s is up (%s)", up.worker, up.role)

    def _lose(self, worker: Placed, reason: str) -> None:
        link = self.workers.pop(worker, None)
        if link is not None:
            link.close()
            logger.warning("worker %s is gone: %s", worker.worker, reason)
        self.calls.on_worker_gone(worker, reason, time.monotonic())
        self.errands.on_worker_gone(worker)

    def on_disconnected(self, link: WorkerLink) -> None:
        """The connection to a worker broke; it may come back."""
        self.calls.on_worker_gone(link.placed, "the connection broke", time.monotonic())
        self.errands.on_worker_gone(link.placed)

    def decode_body(self, message: protocol.WorkerToApi, frames: list[Any]) -> Any:
        """What vLLM encoded behind a worker's message. BadBody if it did not."""
        try:
            match message:
                case protocol.Deltas():
                    return self.output_decoder.decode(frames)
                case protocol.PrefillDone():
                    return _first_output(self.output_decoder.decode(frames)) if frames else None
                case protocol.UtilityReply():
                    return self.plain_decoder.decode(frames)
                case _:
                    return None
        except Exception as error:  # whatever vLLM's decoder trips over
            raise BadBody(f"{type(error).__name__}: {error}") from error

    def on_worker(self, link: WorkerLink, message: protocol.WorkerToApi, body: Any) -> None:
        """A message from a worker."""
        now_s = time.monotonic()
        match message:
            case protocol.Deltas():
                outputs = self.errands.take(body.outputs, link.placed, now_s)
                self.calls.on_outputs(outputs, link.placed, body.timestamp, now_s)
            case protocol.PrefillDone():
                if not self.errands.on_prefill_done(message, link.placed):
                    self.calls.on_prefill_done(message, body, link.placed, now_s, time.time())
            case protocol.CallFailed():
                if not self.errands.on_call_failed(message):
                    self.calls.on_call_failed(message, link.placed, now_s)
            case protocol.UtilityReply():
                self._on_utility(message, body)

    def _on_utility(self, reply: protocol.UtilityReply, result: Any) -> None:
        future = self._utilities.get(reply.call)
        if future is None or future.done():
            return
        if reply.error:
            future.set_exception(RuntimeError(reply.error))
        else:
            future.set_result(result)


def _first_output(outputs: EngineCoreOutputs) -> EngineCoreOutput:
    (output,) = outputs.outputs
    return output


class ClusterInputProcessor(InputProcessor):
    """vLLM's input processor, whose request ids are fit to travel.

    They begin with what the client chose (``X-Request-Id``). Engines renew leases with
    comma-separated lists of them, and everybody bounds them.
    """

    @staticmethod
    def assign_request_id(request: EngineCoreRequest) -> None:
        """As vLLM's, keeping the random end, which makes the id unique."""
        InputProcessor.assign_request_id(request)
        request.request_id = UNFIT_IN_IDS.sub("_", request.request_id)[-REQUEST_ID_MAX:]


class ClusterClient(AsyncLLM):
    """vLLM's ``AsyncLLM`` over the cluster. Needs a running event loop."""

    def __init__(self, vllm_config: VllmConfig, engine_core: ClusterEngineCore) -> None:
        # AsyncLLM's own constructor starts an engine process; this sets what its methods
        # use, with the cluster in that process's place.
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.scheduler_config = vllm_config.scheduler_config
        self.observability_config = vllm_config.observability_config
        self.log_requests = False
        self.log_stats = True
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = ClusterInputProcessor(vllm_config, self.renderer)
        self.admission_stats = None
        self.output_processor = OutputProcessor(
            self.renderer.tokenizer,
            log_stats=True,
            stream_interval=vllm_config.scheduler_config.stream_interval,
            tracing_enabled=self.observability_config.otlp_traces_endpoint is not None,
        )
        self.engine_core = engine_core
        engine_core.processor = self.output_processor
        self.logger_manager = StatLoggerManager(
            vllm_config=vllm_config,
            engine_idxs=[0],
            custom_stat_loggers=None,
            enable_default_loggers=True,
            client_count=1,
        )
        self.output_handler: asyncio.Task[None] | None = None
        self._client_count = 1
        self.profiler = None
        self._run_output_handler()

    @property
    def cluster(self) -> ClusterEngineCore:
        """The engine core as what it is."""
        assert isinstance(self.engine_core, ClusterEngineCore)
        return self.engine_core

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """As vLLM's, with what happened recorded in the exchange it belongs to."""
        exchange = current_exchange.get()
        try:
            if isinstance(prompt, AsyncGenerator):
                raise VLLMValidationError("a prompt that comes in pieces can't be served")
            refuse_reserved(sampling_params)
            outputs = super().generate(prompt, sampling_params, request_id, **options)
            async with aclosing(outputs):
                async for output in outputs:
                    yield output
        except CallError as error:
            if exchange is not None:
                exchange.failure = error.failure
            raise
        except VLLMValidationError as error:
            if exchange is not None:
                exchange.failure = Failure(400, str(error))
            raise

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """End requests that their clients have given up."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        to_abort = self.output_processor.abort_requests(ids, internal)
        self.cluster.calls.end(to_abort, "abort", time.monotonic())

    @property
    def dead_error(self) -> BaseException:
        """What requests get when the cluster can't serve."""
        if not self.cluster.hears_core():
            return CallError(Failure(503, "the coordinator's core does not answer"))
        return CallError(Failure(503, "no worker is up"))

    def is_ready(self) -> bool:
        """Whether a call could be served now: core and a worker that decodes are there."""
        return self.cluster.hears_core() and bool(self.cluster.workers)

    async def check_health(self) -> None:
        """As vLLM's; being without core or workers is unhealthy too."""
        await super().check_health()
        if not self.is_ready():
            raise self.dead_error


def refuse_reserved(sampling_params: SamplingParams) -> None:
    """KV is moved by the cluster: a client that names KV of its own is refused.

    It could read another's cache, make an engine connect anywhere, or stop it.
    """
    for name in RESERVED_ARGUMENTS:
        if name in (getattr(sampling_params, "extra_args", None) or {}):
            raise VLLMValidationError(f"{name} is reserved for the cluster", parameter=name)

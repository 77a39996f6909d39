"""An engine without a model: says tokens as fast as it is let, in vLLM's own messages.

``FakeEngine`` is a ``WorkerEngine`` whose engine core is ``FakeCore`` instead of a process
with a model. Everything around it is real: the worker's sockets and tables, vLLM's output
handler and statistics. Made for measuring what is around an engine and for tests of it.

It computes nothing: a token depends on its place in the text and the request's seed alone,
so a call that goes on elsewhere goes on the same. It moves no KV, though it gives and takes
handles; it knows no logprobs, grammars, stop tokens, adapters or prefix cache.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from types import SimpleNamespace
from typing import Any

import msgspec
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.renderers import renderer_from_config
from vllm.tasks import SupportedTask
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import PrefillStats, SchedulerStats

from cluster.engine import Relay, WorkerEngine
from transfer.settings import CACHED_ONLY

STEP_ARGUMENT = "step_s"
"""In a request's ``vllm_xargs``: the least seconds from one of its tokens to the next."""
SEED_STRIDE = 31
DONE_MAX = 4096
"""Ended requests whose handles are remembered."""


class Behaviour(msgspec.Struct, frozen=True):
    """How the engine behaves. Times in seconds; 0 is at will.

    ``step_s``: from one step to the next; ``prefill_s_per_token``: from taking a prompt to
    its first token; ``transfer_s``: a pull of KV, whatever its size.
    """

    step_s: float = 0.0
    prefill_s_per_token: float = 0.0
    transfer_s: float = 0.0
    kv_blocks: int = 1 << 16


class _Running(msgspec.Struct):
    """A request that has a place in the batch."""

    request: EngineCoreRequest
    tokens_max: int
    step_s: float
    ready_s: float
    queued_s: float
    scheduled_s: float
    tokens: int = 0


class FakeCore(EngineCoreClient):  # type: ignore[misc]
    """What vLLM's ``AsyncLLM`` takes for its engine core. Needs a running event loop to step."""

    def __init__(self, config: VllmConfig, engine_id: str, behaviour: Behaviour) -> None:
        self.resources = SimpleNamespace(engine_dead=False)
        self.engine_ranks_managed = [0]
        self.behaviour = behaviour
        self.running: dict[str, _Running] = {}
        self.waiting: deque[tuple[EngineCoreRequest, float]] = deque()
        self.handles: dict[str, int] = {}
        self.steps = 0
        self.engine_id = engine_id
        self._seats = config.scheduler_config.max_num_seqs
        self._length_max = config.model_config.max_model_len
        self._vocabulary = config.model_config.get_vocab_size()
        self._block_size = config.cache_config.block_size
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._work = asyncio.Event()
        self._stepping: asyncio.Task[None] | None = None

    async def get_output_async(self) -> EngineCoreOutputs:
        """The outputs of the next step."""
        if self._stepping is None:
            self._stepping = asyncio.create_task(self._step_forever(), name="fake engine")
        return await self._outputs.get()

    async def get_supported_tasks_async(self) -> tuple[SupportedTask, ...]:
        """Generation."""
        return ("generate",)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Queue a request; one that is to be aborted at once only gives its handle back."""
        if request.abort_immediately:
            return
        self.waiting.append((request, time.monotonic()))
        self._work.set()

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Forget requests, running or waiting."""
        gone = set(request_ids)
        for request_id in gone:
            self.running.pop(request_id, None)
        self.waiting = deque(entry for entry in self.waiting if entry[0].request_id not in gone)
        self._say([])

    async def add_lora_async(self, lora_request: Any) -> bool:
        """There is nothing to load."""
        return True

    async def remove_lora_async(self, lora_id: int) -> bool:
        """There is nothing to unload."""
        return True

    async def pin_lora_async(self, lora_id: int) -> bool:
        """There is nothing to pin."""
        return True

    async def list_loras_async(self) -> set[int]:
        """None is ever loaded."""
        return set()

    async def reset_prefix_cache_async(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """There is no cache."""
        return True

    async def reset_mm_cache_async(self) -> None:
        """There is no cache."""

    def dp_engines_running(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.running or self.waiting)

    def shutdown(self, timeout: float | None = None) -> None:
        """Stop stepping."""
        if self._stepping is not None:
            self._stepping.cancel()

    async def _step_forever(self) -> None:
        while True:
            await self._work.wait()
            began_s = time.monotonic()
            outputs = self.step(began_s)
            if outputs:
                self._say(outputs, began_s)
            if not self.running and not self.waiting:
                self._work.clear()
            left_s = self._step_s() - (time.monotonic() - began_s)
            await asyncio.sleep(max(0.0, left_s))

    def step(self, now_s: float) -> list[EngineCoreOutput]:
        """One token for every request in the batch that is ready for one."""
        self.steps += 1
        while self.waiting and len(self.running) < self._seats:
            self._admit(*self.waiting.popleft(), now_s)
        outputs = [self._emit(entry) for entry in self.running.values() if entry.ready_s <= now_s]
        for output in outputs:
            if output.finish_reason is not None:
                del self.running[output.request_id]
        return outputs

    def _step_s(self) -> float:
        asked = (entry.step_s for entry in self.running.values())
        return max(self.behaviour.step_s, max(asked, default=0.0))

    def _admit(self, request: EngineCoreRequest, queued_s: float, now_s: float) -> None:
        params = request.sampling_params
        assert params is not None
        prompt_tokens = len(request.prompt_token_ids or ())
        extra = params.extra_args or {}
        if _transfer(request).get(CACHED_ONLY):
            ready_s = now_s
        elif _is_pulled(request):
            ready_s = now_s + self.behaviour.transfer_s
        else:
            ready_s = now_s + self.behaviour.prefill_s_per_token * prompt_tokens
        self.running[request.request_id] = _Running(
            request=request,
            tokens_max=params.max_tokens or self._length_max - prompt_tokens,
            step_s=float(extra.get(STEP_ARGUMENT, 0.0)),
            ready_s=ready_s,
            queued_s=queued_s,
            scheduled_s=now_s,
        )

    def _emit(self, entry: _Running) -> EngineCoreOutput:
        request, params = entry.request, entry.request.sampling_params
        assert params is not None
        place = len(request.prompt_token_ids or ()) + entry.tokens
        output = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[token_at(place, params.seed or 0, self._vocabulary)],
        )
        if entry.tokens == 0:
            output.prefill_stats = _prefill_stats(request)
            output.events = [
                EngineCoreEvent.new_event(EngineCoreEventType.QUEUED, entry.queued_s),
                EngineCoreEvent.new_event(EngineCoreEventType.SCHEDULED, entry.scheduled_s),
            ]
        entry.tokens += 1
        if entry.tokens >= entry.tokens_max:
            output.finish_reason = FinishReason.LENGTH
            if _transfer(request).get("do_remote_decode"):
                output.kv_transfer_params = self._handle(request)
        return output

    def _handle(self, request: EngineCoreRequest) -> dict[str, Any]:
        """What vLLM's NIXL connector says of KV that it holds; nobody listens at its port."""
        tokens = len(request.prompt_token_ids or ())
        blocks = -(-tokens // self._block_size)
        self.handles[request.request_id] = blocks
        if len(self.handles) > DONE_MAX:
            del self.handles[next(iter(self.handles))]
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.engine_id,
            "remote_request_id": request.request_id,
            "remote_host": "127.0.0.1",
            "remote_port": 1,
            "remote_block_ids": [list(range(blocks))],
            "remote_num_tokens": tokens,
            "tp_size": 1,
        }

    def _say(self, outputs: list[EngineCoreOutput], now_s: float = 0.0) -> None:
        used = sum(
            len(entry.request.prompt_token_ids or ()) + entry.tokens
            for entry in self.running.values()
        )
        stats = SchedulerStats(
            num_running_reqs=len(self.running),
            num_waiting_reqs=len(self.waiting),
            kv_cache_usage=min(1.0, used / self._block_size / max(1, self.behaviour.kv_blocks - 1)),
        )
        self._outputs.put_nowait(
            EngineCoreOutputs(outputs=outputs, scheduler_stats=stats, timestamp=now_s)
        )


class FakeEngine(WorkerEngine):
    """A worker's engine around a ``FakeCore``."""

    def __init__(self, config: VllmConfig, engine_core: FakeCore) -> None:
        # AsyncLLM's own constructor starts an engine process; this sets what a worker uses.
        self.vllm_config = config
        self.model_config = config.model_config
        self.log_requests = False
        self.log_stats = True
        self.renderer = renderer_from_config(config)
        self.output_processor = Relay(
            OutputProcessor(None, log_stats=True), self._step, self._reads
        )
        self.engine_core = engine_core
        self.logger_manager = StatLoggerManager(
            vllm_config=config,
            engine_idxs=engine_core.engine_ranks_managed,
            custom_stat_loggers=None,
            enable_default_loggers=True,
            client_count=1,
        )
        self.output_handler: asyncio.Task[None] | None = None
        self.profiler = None

    @property
    def engine_id(self) -> str:
        """What its handles call it."""
        return str(self.engine_core.engine_id)


def fake_engine(
    arguments: dict[str, Any], name: str, behaviour: Behaviour | None = None
) -> FakeEngine:
    """A fake of the engine that ``arguments`` (of vLLM's ``AsyncEngineArgs``) would start."""
    behaviour = behaviour or Behaviour()
    known = {name: value for name, value in arguments.items() if name != "kv_transfer_config"}
    config = AsyncEngineArgs(**known).create_engine_config()
    config.cache_config.num_gpu_blocks = behaviour.kv_blocks
    engine_id = f"{name}-{uuid.uuid4().hex}"
    return FakeEngine(config, FakeCore(config, engine_id, behaviour))


def token_at(place: int, seed: int, vocabulary: int) -> int:
    """The token at a place of a text. From the upper half of a vocabulary: whole words."""
    half = vocabulary // 2
    return half + (place + SEED_STRIDE * seed) % (vocabulary - half)


def _transfer(request: EngineCoreRequest) -> dict[str, Any]:
    assert request.sampling_params is not None
    extra: dict[str, Any] = request.sampling_params.extra_args or {}
    transfer: dict[str, Any] = extra.get("kv_transfer_params") or {}
    return transfer


def _is_pulled(request: EngineCoreRequest) -> bool:
    return bool(_transfer(request).get("do_remote_prefill"))


def _prefill_stats(request: EngineCoreRequest) -> PrefillStats:
    prompt_tokens = len(request.prompt_token_ids or ())
    stats = PrefillStats()
    # The last token of a prompt is computed in any case: it gives the first one's logits.
    moved = prompt_tokens - 1 if _is_pulled(request) else 0
    # Nobody is asked for what is cached only unless it has computed that before.
    cached = prompt_tokens - 1 if _transfer(request).get(CACHED_ONLY) else 0
    stats.set(prompt_tokens, cached, moved)
    return stats

"""A worker's vLLM engine: ``AsyncLLM`` whose outputs are passed on, not consumed.

vLLM's front half (tokenising, detokenising, stop strings) lives in the API processes;
here the raw outputs of each engine step go to ``on_step`` and only vLLM's own
statistics are kept, so that its metrics stay true.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm.config import KVEventsConfig, KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.models import ModelRegistry
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput
from vllm.v1.kv_offload.factory import OffloadingSpecFactory
from vllm.v1.metrics.stats import IterationStats, SchedulerStats
from vllm.version import __version__ as vllm_version

from cluster.schema import ConfigError
from coordinator.protocol import EngineFacts, Load
from transfer.pins import PINNED_BLOCKS
from transfer.settings import (
    CONNECTOR,
    CONNECTOR_MODULE,
    SEVERAL_CONNECTORS,
    own_statistics,
)

HOST_MEMORY_OF_GPUS = "vllm.v1.kv_offload.cpu.spec"
"""Where vLLM's own way to keep KV in host memory is, which needs a GPU; a plugin may have put
another one in its place."""

OnStep = Callable[[list[EngineCoreOutput], float], None]
OnReads = Callable[[Mapping[str, Any]], None]


class Relay(OutputProcessor):
    """Keeps vLLM's per-request statistics and hands each step's outputs on."""

    def __init__(self, original: OutputProcessor, on_step: OnStep, on_reads: OnReads) -> None:
        # No tokenizer: nothing is detokenised in this process.
        super().__init__(
            None,
            log_stats=original.log_stats,
            tracing_enabled=original.tracing_enabled,
        )
        self.on_step = on_step
        self.on_reads = on_reads
        self.scheduler_stats: SchedulerStats | None = None
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.external_tokens = 0
        self.pinned_blocks = 0

    def process_outputs(
        self,
        engine_core_outputs: list[EngineCoreOutput],
        engine_core_timestamp: float | None = None,
        iteration_stats: IterationStats | None = None,
        weight_version: str | None = None,
    ) -> OutputProcessorOutput:
        """Pass on, then count."""
        self.on_step(engine_core_outputs, engine_core_timestamp or 0.0)
        for output in engine_core_outputs:
            self.decode_tokens += len(output.new_token_ids)
            if (stats := output.prefill_stats) is not None:
                self.prefill_tokens += stats.num_computed_tokens
                self.external_tokens += stats.num_external_cached_tokens
            if iteration_stats is not None:
                self._keep_statistics(output, engine_core_timestamp, iteration_stats)
        return OutputProcessorOutput(request_outputs=[], reqs_to_abort=[])

    def _keep_statistics(
        self,
        output: EngineCoreOutput,
        timestamp_s: float | None,
        iteration_stats: IterationStats,
    ) -> None:
        """What vLLM's metrics of requests are made of."""
        state = self.request_states.get(output.request_id)
        if state is None:
            return
        self._update_stats_from_output(state, output, timestamp_s, iteration_stats)
        if state.is_prefilling:
            state.is_prefilling = False
            if (stats := output.prefill_stats) is not None:
                state.num_cached_tokens = stats.num_cached_tokens
        if output.finish_reason is not None:
            self._finish_request(state)
            self._update_stats_from_finished(state, output.finish_reason, iteration_stats)

    def update_scheduler_stats(self, scheduler_stats: SchedulerStats | None) -> None:
        """Remember the newest; the beats report it. Pass on what was read of others' KV."""
        if scheduler_stats is not None:
            self.scheduler_stats = scheduler_stats
            if reads := own_statistics(scheduler_stats.kv_connector_stats or {}):
                if pinned := reads.get(PINNED_BLOCKS):
                    self.pinned_blocks = pinned[-1]
                self.on_reads(reads)
        super().update_scheduler_stats(scheduler_stats)

    def propagate_error(self, e: Exception) -> None:
        """The engine is dead. Nobody waits here; the worker's watch ends the process."""


def _ignore(outputs: list[EngineCoreOutput], timestamp_s: float) -> None:
    """Until someone listens, outputs have no reader."""


def _ignore_reads(stats: Mapping[str, Any]) -> None:
    """Nothing is read before the first request."""


class WorkerEngine(AsyncLLM):
    """An engine that takes ready-made engine requests and reports every step."""

    output_processor: OutputProcessor
    on_step: OnStep = staticmethod(_ignore)
    """Gets each step's outputs and the engine's clock; set before the first request."""
    on_reads: OnReads = staticmethod(_ignore_reads)
    """Gets what the engine has measured of its reads of others' KV (``transfer.measured``)."""

    @property
    def engine_id(self) -> str:
        """What this engine's handles call it; another one at every start."""
        transfer = self.vllm_config.kv_transfer_config
        assert transfer is not None
        return str(transfer.engine_id)

    def _run_output_handler(self) -> None:
        # The handler captures the processor when it starts: swap it before that.
        if not isinstance(self.output_processor, Relay):
            self.output_processor = Relay(self.output_processor, self._step, self._reads)
        super()._run_output_handler()

    def drop_metrics(self) -> None:
        """Keep no statistics of requests and steps: for engines whose metrics nobody can read.

        They are a quarter of what this process does per token. How busy the engine is
        (``load``) comes with its steps all the same. Call before the first request.
        """
        assert self.output_handler is None, "the engine is at work already"
        self.log_stats = False
        self.logger_manager = None

    def _step(self, outputs: list[EngineCoreOutput], timestamp_s: float) -> None:
        self.on_step(outputs, timestamp_s)

    def _reads(self, stats: Mapping[str, Any]) -> None:
        self.on_reads(stats)

    async def submit(self, request: EngineCoreRequest) -> None:
        """Give a request to the engine. Its outputs come through ``on_step``."""
        self._run_output_handler()
        if self.log_stats:
            self.output_processor.add_request(request, None)
        await self.engine_core.add_request_async(request)

    async def forget(self, engine_ids: list[str]) -> None:
        """Abort requests by their engine ids; unknown ones are ignored by the engine."""
        if self.log_stats:
            self.output_processor.abort_requests(engine_ids, internal=True)
        await self.engine_core.abort_requests_async(engine_ids)

    def load(self, garbage_frames: int) -> Load:
        """How busy the engine is, from its latest step."""
        relay = self.output_processor
        if not isinstance(relay, Relay):
            return Load()
        stats = relay.scheduler_stats or SchedulerStats()
        blocks = self.vllm_config.cache_config.num_gpu_blocks or 0
        used = blocks_used(stats.kv_cache_usage, blocks)
        pinned = min(used, relay.pinned_blocks)
        return Load(
            running=stats.num_running_reqs,
            waiting=stats.num_waiting_reqs + stats.num_skipped_waiting_reqs,
            kv_blocks_used=used - pinned,
            prefill_tokens_total=relay.prefill_tokens,
            decode_tokens_total=relay.decode_tokens,
            external_tokens_total=relay.external_tokens,
            garbage_frames_total=garbage_frames,
            kv_blocks_pinned=pinned,
        )


def blocks_used(usage: float, blocks: int) -> int:
    """How many blocks are in use: ``usage`` is a share of all but vLLM's null block, which is never
    free and never used."""
    return round(usage * max(0, blocks - 1))


def import_model(model: str) -> None:
    """Import now what an engine on the CPU imports when it starts, for forks of this process.

    With its class at hand, vLLM need not look at the model's code in another interpreter.
    ``model``: its folder; of a model's id only the general part is known.
    """
    import vllm.v1.worker.cpu_worker  # noqa: F401

    path = Path(model) / "config.json"
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for architecture in known.get("architectures") or []:
        if (registered := ModelRegistry.models.get(architecture)) is not None:
            ModelRegistry.register_model(architecture, registered.load_model_cls())


def start_engine(arguments: dict[str, Any], metrics: bool = True) -> WorkerEngine:
    """Load the model and start the engine; blocks until it is ready.

    ``metrics``: keep what vLLM's Prometheus metrics are made of. ConfigError if the engine can't be
    what the file says.
    """
    transfer = KVTransferConfig(**arguments["kv_transfer_config"])
    events = KVEventsConfig(**arguments.get("kv_events_config", {}))
    ready = {**arguments, "kv_transfer_config": transfer, "kv_events_config": events}
    engine_arguments = AsyncEngineArgs(**ready)
    if transfer.kv_connector == SEVERAL_CONNECTORS:
        _check_host_memory()
        know_connector_by_name()
    config = engine_arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
    if current_platform.is_cpu() and config.parallel_config.distributed_executor_backend == "uni":
        # On CPU vLLM asks for a fresh interpreter, which imports all of it a second time.
        # Nothing has run in this process yet that a fork could break; forking halves the
        # time and the CPU that an engine needs to start.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    engine = WorkerEngine.from_vllm_config(config)
    assert isinstance(engine, WorkerEngine)
    if not metrics:
        engine.drop_metrics()
    return engine


def _check_host_memory() -> None:
    """ConfigError if an engine here can't keep KV in its host's memory. vLLM's plugins are loaded
    by now: they may have put another way in the place of vLLM's own."""
    spec = OffloadingSpecFactory.get_spec_cls({})
    if current_platform.is_cpu() and spec.__module__ == HOST_MEMORY_OF_GPUS:
        raise ConfigError(
            [
                "kv_host_gib: this engine runs on the CPU, its KV is in the host's memory already; "
                "leave it out, or give the worker 'devices'"
            ]
        )


def know_connector_by_name() -> None:
    """vLLM rebuilds the statistics of one of several connectors by its name, and knows those names
    only that were registered."""
    try:
        KVConnectorFactory.get_connector_class_by_name(CONNECTOR)
    except ValueError:
        KVConnectorFactory.register_connector(CONNECTOR, CONNECTOR_MODULE, CONNECTOR)


def engine_facts(
    config: VllmConfig, model: str, kv_lease_s: float, host_bytes: int = 0
) -> EngineFacts:
    """What the core compares and counts with. ``host_bytes``: of host memory, for KV."""
    cache = config.cache_config
    scheduler = config.scheduler_config
    block_size = cache.effective_attention_block_size or cache.block_size
    bytes_per_block = _kv_bytes_per_block(config, block_size)
    return EngineFacts(
        vllm_version=vllm_version,
        model=model,
        model_fingerprint=model_fingerprint(config),
        block_size=block_size,
        kv_blocks=cache.num_gpu_blocks or 0,
        max_model_len=config.model_config.max_model_len,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        kv_bytes_per_block=bytes_per_block,
        kv_lease_s=kv_lease_s,
        partial_reads=_reads_in_part(config),
        computes_once=cache.enable_prefix_caching is not False
        and not scheduler.long_prefill_token_threshold,
        kv_host_blocks=host_bytes // bytes_per_block,
    )


def _reads_in_part(config: VllmConfig) -> bool:
    """Whether every layer keeps KV of every token, so that a prompt's beginning can be read alone.

    As the connector has it: full attention in all layers, in one group. Windows and states have
    no block per token.
    """
    model = config.model_config
    chunks = getattr(model.hf_text_config, "attention_chunk_size", None)
    windows = model.get_sliding_window() or chunks
    return not (model.is_hybrid or model.is_attention_free or windows)


def model_fingerprint(config: VllmConfig) -> str:
    """Equal for two engines iff one may read the other's KV.

    Over what vLLM's own handshake compares: architecture, weights' configuration, dtype
    of model and cache. Tensor parallel size and memory may differ.
    """
    hf_config = config.model_config.hf_config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "name_or_path"):
        hf_config.pop(volatile, None)
    material = json.dumps(
        [
            hf_config,
            str(config.model_config.dtype),
            str(config.cache_config.cache_dtype),
            config.model_config.quantization,
        ],
        sort_keys=True,
        default=str,
    )
    return hashlib.sha256(material.encode()).hexdigest()[:16]


def _kv_bytes_per_block(config: VllmConfig, block_size: int) -> int:
    model = config.model_config
    heads = model.get_total_num_kv_heads()
    layers = model.get_num_layers(config.parallel_config) * (
        config.parallel_config.pipeline_parallel_size
    )
    itemsize: int = getattr(model.dtype, "itemsize", 2)
    return int(2 * layers * heads * model.get_head_size() * itemsize * block_size)

"""Pythia's KV connector: vLLM's pull connector over NIXL, made safe for a cluster.

The only code that knows NIXL. vLLM loads it by name (``kv_connector="PythiaConnector"``,
``kv_connector_module_path="transfer.connector"``) inside the engine: the scheduler half
decides which tokens come from elsewhere, the worker half moves the blocks.

What it adds to the stock connector:

* Each request's ``kv_transfer_params`` are checked before anything acts on them. A request
  whose handle can't be used is prefilled locally; it never parks and never stops the engine.
* ``do_remote_prefill`` means "pull first" and ``do_remote_decode`` means "hold afterwards";
  both may be set. A handle may cover less than the prompt: the rest is computed here. What
  is not asked to be held is freed at once.
* How long chunks of prompts are can change while the engine runs (``transfer.profile``).
* A handle that is given back to the engine that holds its blocks frees them at once.
* A request may ask for what is cached of its prompt only: it is cut behind that, so that a peer
  which has forgotten what is to be read from it computes one token, whatever it has left.
* No read counts that was not certainly over before its lease was. The holder says when the
  lease ends, on its own clock; the handshake gives the clocks' difference; the reader keeps
  the book of its renewals. A read that was, or may have been, late is computed here instead.
* What ended requests have left is pinned against eviction as the core orders (``transfer.pins``).
* Each read is counted with the engine that it came from (``transfer.measured``).
* The engine thread keeps its cores, NIXL's progress thread sleeps between two looks where
  cores are short, and garbage on the handshake socket does not end the handshakes.

Which engines may be read from is decided before a handle gets here (``transfer.sources``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import connector as stock
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import (
    NixlPullConnectorScheduler,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.v1.kv_cache_interface import FullAttentionSpec

from transfer.handle import Handle, HandleError, from_params
from transfer.handshake import serve_handshakes
from transfer.measured import ReadStats
from transfer.pages import use_huge_pages
from transfer.pins import ORDER, PINNED_BLOCKS, Pins, order_in
from transfer.profile import Chunks
from transfer.progress import progress_pause
from transfer.renewal import Renewals
from transfer.settings import CACHED_ONLY, PINS

logger = logging.getLogger(f"vllm.{__name__}")

GROWTH_PART = 16
"""One of so many blocks is kept free of pins, for what requests that run need next."""


class PythiaConnector(stock.NixlPullConnector):
    """vLLM's pull connector with our scheduler and worker halves."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        # The grandparent's constructor: the parent's would build the stock halves first,
        # and a NIXL agent with them.
        with _kv_both_is_meant():
            stock.NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = PythiaScheduler(vllm_config, self.engine_id, kv_cache_config)
        else:
            self.connector_worker = PythiaWorker(vllm_config, self.engine_id, kv_cache_config)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """vLLM's blocks, for pins."""
        if self.connector_scheduler is not None:
            self.connector_scheduler.bind_pool(gpu_block_pool)

    def get_kv_connector_stats(self) -> ReadStats | None:
        """What was read since the last time; of the scheduler's half, how much is pinned."""
        if self.connector_scheduler is not None:
            return self.connector_scheduler.pin_stats()
        stats: ReadStats | None = super().get_kv_connector_stats()
        return stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ReadStats:
        """What the engine measured, from its lists; for vLLM's log in the front half."""
        return ReadStats(data=data or {})


class PythiaScheduler(NixlPullConnectorScheduler):
    """The half beside vLLM's scheduler: what to pull, what to hold, what to release."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._releases: set[str] = set()
        self._chunks = Chunks(vllm_config.scheduler_config)
        groups = kv_cache_config.transfer_groups
        self._groups = len(groups)
        self._plain_attention = len(groups) == 1 and isinstance(
            groups[0].kv_cache_spec, FullAttentionSpec
        )
        self._pins: Pins | None = None
        self._may_pin = vllm_config.kv_transfer_config.get_from_extra_config(PINS, False)
        self._pinned_told = 0

    def bind_pool(self, pool: Any) -> None:
        """The engine's blocks. Nothing is pinned where windows and states have their own."""
        if self._may_pin and self._plain_attention and pool.enable_caching:
            self._pins = Pins(pool)
            self._growth_blocks = max(1, pool.num_gpu_blocks // GROWTH_PART)

    def pin_stats(self) -> ReadStats | None:
        """How many blocks only pins hold; None if that is as it was."""
        pinned = self._pins.only_pinned if self._pins else 0
        if pinned == self._pinned_told:
            return None
        self._pinned_told = pinned
        stats = ReadStats()
        stats.data[PINNED_BLOCKS].append(pinned)
        return stats

    def on_new_request(self, request: Any) -> None:
        """Check the request's parameters, once, before anything else looks at them."""
        params = request.kv_transfer_params
        if not isinstance(params, dict):
            if params is not None:
                logger.warning("%s: kv_transfer_params is no dict, ignored", request.request_id)
            request.kv_transfer_params = None
        elif ORDER in params:
            self._retain(params)
            request.kv_transfer_params = None
        else:
            self._check(request, params)
        super().on_new_request(request)

    def _check(self, request: Any, params: dict[str, Any]) -> None:
        self._chunks.take(params)
        if params.get("do_remote_prefill"):
            self._check_pull(request, params)
        else:
            _drop_source(params)
        if params.get(CACHED_ONLY) and not self._plain_attention:
            # Its beginning alone could not be read.
            _cut(request, 0)

    def _retain(self, params: dict[str, Any]) -> None:
        """An order of the core's that came as a request."""
        try:
            order = order_in(params)
        except ValueError as error:
            logger.warning("%s", error)
            return
        if self._pins is not None and order is not None:
            now_s = time.monotonic()
            self._pins.ordered(order, now_s)
            self._pins.expire(now_s)

    def _check_pull(self, request: Any, params: dict[str, Any]) -> None:
        """Keep the pull if its handle can be used; else make it a local prefill."""
        try:
            handle = from_params({**params, "do_remote_decode": False})
            if handle.remote_engine_id == self.engine_id:
                # Our own blocks, given back: nobody else will read them.
                self._releases.add(handle.remote_request_id)
                _drop_source(params)
                return
            params["remote_block_ids"] = self._blocks_to_pull(request, handle)
        except HandleError as error:
            logger.warning("%s: prefilled locally: %s", request.request_id, error)
            _drop_source(params)

    def _blocks_to_pull(self, request: Any, handle: Handle) -> list[list[int]]:
        """The handle's blocks up to the last token that may be pulled.

        The worker matches its own missing blocks with the *last* ones of the handle, so
        blocks beyond the prompt would shift every block before them. HandleError if the
        blocks can't be this model's.
        """
        groups = handle.remote_block_ids
        if len(groups) != self._groups:
            raise HandleError(f"remote_block_ids has {len(groups)} groups, not {self._groups}")
        wanted = self._get_remote_prefill_token_count(request.num_prompt_tokens)
        if not self._plain_attention:
            # Windows and states have no block per token; only whole handles fit.
            if handle.remote_num_tokens < wanted:
                raise HandleError(f"remote_num_tokens is {handle.remote_num_tokens}, not {wanted}")
            return groups
        tokens = min(handle.remote_num_tokens, wanted)
        blocks = -(-tokens // self.block_size)
        if len(groups[0]) < blocks:
            raise HandleError(
                f"remote_block_ids has {len(groups[0])} blocks for {tokens} tokens, not {blocks}"
            )
        return [groups[0][:blocks]]

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Tokens to pull beyond ``num_computed_tokens``, and whether they come later.

        Asked right before the request is given blocks: pins make room for it.
        """
        if self._pins:
            blocks = -(-request.num_tokens // self.block_size) + self._growth_blocks
            self._pins.make_room(blocks, time.monotonic())
        params = request.kv_transfer_params
        if params and params.get(CACHED_ONLY):
            _cut(request, num_computed_tokens)
        if not params or not params.get("do_remote_prefill"):
            return 0, False
        wanted = self._get_remote_prefill_token_count(request.num_prompt_tokens)
        tokens = min(params["remote_num_tokens"], wanted) - num_computed_tokens
        return (tokens, True) if tokens > 0 else (0, False)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Hold the blocks if that was asked for; say until when."""
        if self._pins is not None:
            full = request.num_computed_tokens // self.block_size
            self._pins.ended(request.request_id, request.block_hashes[:full])
        params = request.kv_transfer_params
        if params and not params.get("do_remote_decode") and not params.get("do_remote_prefill"):
            # It has pulled, or never had to. The stock connector would hold its blocks for
            # minutes, in case the conversation goes on elsewhere.
            self._stop_heartbeat(request.request_id)
            self._reqs_not_processed.add(request.request_id)
            return False, None
        held, handle = super().request_finished(request, block_ids)
        if handle is not None:
            handle["remote_blocks_expiry_time"] = self._reqs_need_send.get(request.request_id)
        return held, handle

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """The stock orders to the worker half, and the blocks to release."""
        if self._pins:
            # Those that run grow with every step.
            now_s = time.monotonic()
            self._pins.expire(now_s)
            self._pins.make_room(self._growth_blocks, now_s)
        metadata = super().build_connector_meta(scheduler_output)
        metadata.releases = self._releases
        self._releases = set()
        return metadata

    _nixl_handshake_listener = staticmethod(serve_handshakes)


class PythiaWorker(NixlPullConnectorWorker):
    """The half beside the model: reads blocks, keeps leases, never trusts a late read."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        cores = os.sched_getaffinity(0)
        with progress_pause(extra.get("nixl_progress_delay_us", 0)):
            super().__init__(vllm_config, engine_id, kv_cache_config)
        # On CPU the stock constructor moves the engine's main thread to the last core of
        # the machine, where it would meet every other engine.
        os.sched_setaffinity(0, cores)
        self._renewals = Renewals(
            lease_s=float(self._lease_extension), margin_s=self._lease_extension / 4
        )
        self._released: set[str] = set()
        self.xfer_stats = ReadStats()

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Make the KV cache known to NIXL."""
        if self.device_type == "cpu":
            memory = [cache.untyped_storage() for cache in kv_caches.values()]
            use_huge_pages((storage.data_ptr(), storage.nbytes()) for storage in memory)
        super().register_kv_caches(kv_caches)

    def start_load_kv(self, metadata: Any) -> None:
        """Carry out the scheduler half's orders for this step."""
        super().start_load_kv(metadata)
        for request in metadata.releases:
            # Otherwise it has been read, has expired or was released before.
            if self._reqs_to_send.pop(request, None) is not None:
                self._reqs_to_process.discard(request)
                self.consumer_notification_counts_by_req.pop(request, None)
                self.expected_consumer_notifications_by_req.pop(request, None)
                self._released.add(request)

    def get_transfer_results(self) -> Any:
        """What was read, and which held blocks may be freed."""
        results = super().get_transfer_results()
        results.finished_sending.update(self._released)
        self._released.clear()
        return results

    def _send_heartbeats(self, metadata: Any) -> None:
        reached = {
            engine: info.req_ids
            for engine, info in metadata.heartbeat_by_engine.items()
            if engine in self._remote_agents
        }
        now_s = time.perf_counter()
        super()._send_heartbeats(metadata)
        for engine, requests in reached.items():
            self._renewals.renewed(engine, requests, now_s)

    def _is_turn2_read_expired(self, meta: Any) -> bool:
        """Whether the lease on what is to be read is over, or may be by now."""
        remote = meta.remote
        if remote.blocks_expiry_time is None or not any(meta.local_block_ids):
            return False
        offset_s = self._engine_clock_offset.get(remote.engine_id)
        return offset_s is None or not self._renewals.holds(
            remote.engine_id,
            remote.request_id,
            remote.blocks_expiry_time - offset_s,
            time.perf_counter(),
        )

    def _pop_done_transfers(self, transfers: Any) -> tuple[set[str], set[str]]:
        done, failed = self._pop_done_by_source(transfers)
        for request in done - failed:
            meta = self._recving_metadata.get(request)
            if meta is not None and self._is_turn2_read_expired(meta):
                logger.warning("%s: read ended after its lease, computed here", request)
                self.xfer_stats.record_kv_expired_req()
                failed.add(request)
        return done, failed

    def _pop_done_by_source(self, transfers: Any) -> tuple[set[str], set[str]]:
        """The stock way, request by request: what it measures is of that one's source."""
        done: set[str] = set()
        failed: set[str] = set()
        for request in list(transfers):
            meta = self._recving_metadata.get(request)
            self.xfer_stats.source = meta.remote.engine_id if meta and meta.remote else ""
            one = {request: transfers[request]}
            done_now, failed_now = super()._pop_done_transfers(one)
            if one:
                transfers.update(one)
            else:
                del transfers[request]
            done |= done_now
            failed |= failed_now
        return done, failed

    def _read_blocks_for_req(self, req_id: str, meta: Any) -> None:
        reason = self._unreadable(meta)
        if reason is None:
            super()._read_blocks_for_req(req_id, meta)
            return
        logger.warning("%s: read declined: %s", req_id, reason)
        self._handle_failed_transfer(
            req_id, None, self._recv_failures, record_failed_transfer=False
        )

    def _unreadable(self, meta: Any) -> str | None:
        """Why the blocks can't be the source's, as far as its handshake tells."""
        blocks = self.dst_num_blocks.get(meta.remote.engine_id)
        if blocks is None:
            return None
        info = self.transfer_topo.get_engine_info(meta.remote.engine_id)
        blocks //= info.remote_physical_blocks_per_logical
        if any(block >= blocks for group in meta.remote.block_ids for block in group):
            return f"names a block beyond the {blocks} of {meta.remote.engine_id}"
        return None


def _cut(request: Any, cached_tokens: int) -> None:
    """Leave of a prompt that was not begun what is cached, and a token to compute.

    As vLLM cuts the prompts of prefills itself, where a model needs that.
    """
    tokens = cached_tokens + 1
    if request.prompt_token_ids is None or request.num_prompt_tokens <= tokens:
        return
    del request.prompt_token_ids[tokens:]
    del request._all_token_ids[tokens:]
    request.num_prompt_tokens = tokens


def _drop_source(params: dict[str, Any]) -> None:
    """Take everything out of ``params`` that points to another engine."""
    params["do_remote_prefill"] = False
    for name in [name for name in params if str(name).startswith("remote_")]:
        del params[name]


@contextlib.contextmanager
def _kv_both_is_meant() -> Iterator[None]:
    """Leave out vLLM's advice against engines that both hold and read KV: ours must."""

    def wanted(record: logging.LogRecord) -> bool:
        return "kv_role='kv_both'" not in str(record.msg)

    log = logging.getLogger(stock.__name__)
    log.addFilter(wanted)
    try:
        yield
    finally:
        log.removeFilter(wanted)

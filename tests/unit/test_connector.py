"""The connector's decisions, without an engine: what is pulled, held, released, believed.

vLLM's requests and configuration are stood in for by plain objects; the connector and the
stock classes below it are the real ones. Real transfers are in tests/e2e and tests/gpu.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import msgspec
import pytest
import zmq

pytest.importorskip("vllm")
pytest.importorskip("nixl")

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiKVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import RequestStatus
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from cluster.engine import know_connector_by_name
from cluster.process import free_port
from transfer import connector
from transfer.connector import PythiaConnector, PythiaScheduler, PythiaWorker
from transfer.handshake import QUESTION_BYTES_MAX, serve_handshakes
from transfer.measured import ReadStats
from transfer.pages import PAGE_BYTES, use_huge_pages
from transfer.profile import CHUNK, Chunks, chunk_params
from transfer.progress import progress_pause
from transfer.renewal import Renewals
from transfer.settings import CACHED_ONLY, kv_transfer_config, own_statistics
from transfer.sources import SOURCE_ENGINE

BLOCK = 32
ENGINE = "decode-1"


@pytest.fixture
def scheduler() -> PythiaScheduler:
    import torch

    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.float32)
    caches = KVCacheConfig(
        num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            decode_context_parallel_size=1,
            pipeline_parallel_size=1,
            data_parallel_index=0,
        ),
        cache_config=SimpleNamespace(block_size=BLOCK),
        scheduler_config=SimpleNamespace(
            disable_hybrid_kv_cache_manager=True,
            long_prefill_token_threshold=0,
            enable_chunked_prefill=True,
        ),
        kv_transfer_config=KVTransferConfig(**kv_transfer_config(ENGINE)),
        num_prefill_lookahead_tokens=0,
    )
    return PythiaScheduler(config, ENGINE, caches)


def test_nothing_is_remembered_for_pins_where_none_may_be_set(scheduler: PythiaScheduler) -> None:
    pool = SimpleNamespace(enable_caching=True, num_gpu_blocks=64)
    scheduler.bind_pool(pool)
    assert scheduler._pins is None
    scheduler._may_pin = True
    scheduler.bind_pool(pool)
    assert scheduler._pins is not None


def a_request(params: object, tokens: int = 100, request_id: str = "r~1") -> Any:
    return SimpleNamespace(
        request_id=request_id,
        kv_transfer_params=params,
        prompt_token_ids=[1] * tokens,
        num_prompt_tokens=tokens,
        num_computed_tokens=tokens,
        status=RequestStatus.FINISHED_LENGTH_CAPPED,
    )


def a_handle(**fields: Any) -> dict[str, Any]:
    handle = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [[1, 2, 3, 4]],
        "remote_engine_id": "prefill-0",
        "remote_request_id": "r~1",
        "remote_host": "127.0.0.1",
        "remote_port": 5600,
        "tp_size": 1,
        "remote_num_tokens": 100,
        "remote_blocks_expiry_time": 50.0,
    }
    return {**handle, **fields}


def pulled(scheduler: PythiaScheduler, request: Any, local_tokens: int = 0) -> tuple[int, bool]:
    scheduler.on_new_request(request)
    return scheduler.get_num_new_matched_tokens(request, local_tokens)


# --- what is cached only --------------------------------------------------------------


def cached_only(tokens: int = 100) -> Any:
    params = {"do_remote_decode": True, "do_remote_prefill": False, CACHED_ONLY: True}
    request = a_request(params, tokens)
    request._all_token_ids = list(request.prompt_token_ids)
    return request


@pytest.mark.parametrize(("local_tokens", "left"), [(96, 97), (64, 65), (0, 1)])
def test_of_what_is_cached_only_one_token_is_computed(
    scheduler: PythiaScheduler, local_tokens: int, left: int
) -> None:
    request = cached_only()
    assert pulled(scheduler, request, local_tokens) == (0, False)
    assert request.num_prompt_tokens == left
    assert len(request.prompt_token_ids) == len(request._all_token_ids) == left
    # What is looked up again, having found no room, is never more.
    assert scheduler.get_num_new_matched_tokens(request, local_tokens) == (0, False)
    assert request.num_prompt_tokens == left


def test_what_is_cached_only_is_held(scheduler: PythiaScheduler) -> None:
    request = cached_only()
    pulled(scheduler, request, 64)
    scheduler.update_state_after_alloc(request, SimpleNamespace(blocks=([],)), 0)
    request.num_computed_tokens = 65
    held, params = scheduler.request_finished(request, ([7, 8, 9],))
    assert held
    assert params is not None
    assert (params["remote_num_tokens"], params["remote_block_ids"]) == (65, ([7, 8, 9],))


def test_other_prompts_are_left_alone(scheduler: PythiaScheduler) -> None:
    request = a_request({"do_remote_decode": True, "do_remote_prefill": False})
    assert pulled(scheduler, request, 32) == (0, False)
    assert request.num_prompt_tokens == 100


def test_caches_that_are_no_chain_of_blocks_give_nothing(scheduler: PythiaScheduler) -> None:
    scheduler._plain_attention = False
    request = cached_only()
    scheduler.on_new_request(request)
    assert request.num_prompt_tokens == 1


# --- what is pulled -------------------------------------------------------------------


def test_a_good_handle_is_pulled_beyond_what_is_here(scheduler: PythiaScheduler) -> None:
    assert pulled(scheduler, a_request(a_handle())) == (100, True)
    assert pulled(scheduler, a_request(a_handle()), local_tokens=64) == (36, True)
    assert pulled(scheduler, a_request(a_handle()), local_tokens=100) == (0, False)


def test_its_lease_is_renewed_while_it_waits(scheduler: PythiaScheduler) -> None:
    scheduler.on_new_request(a_request(a_handle(remote_request_id="held~1")))
    metadata = scheduler.build_connector_meta(SimpleNamespace())
    assert metadata.heartbeat_by_engine["prefill-0"].req_ids == {"held~1"}


@pytest.mark.parametrize(
    "params",
    [
        a_handle(remote_engine_id=None),
        a_handle(remote_request_id=None),
        a_handle(remote_host=None),
        a_handle(remote_port="x"),
        a_handle(tp_size=None),
        a_handle(remote_num_tokens=None),
        a_handle(remote_block_ids=[]),
        a_handle(remote_block_ids=[[]]),
        a_handle(remote_block_ids=[[1, 2, 3]]),
        a_handle(remote_block_ids=[[1, 2, 3, 4], [5]]),
        {"do_remote_prefill": True},
    ],
)
def test_an_unusable_handle_is_a_local_prefill(
    scheduler: PythiaScheduler, params: dict[str, Any]
) -> None:
    request = a_request(params)
    assert pulled(scheduler, request) == (0, False)
    blocks = SimpleNamespace(blocks=([],))
    scheduler.update_state_after_alloc(request, blocks, 0)
    metadata = scheduler.build_connector_meta(SimpleNamespace())
    assert not metadata.reqs_to_recv
    assert not metadata.heartbeat_by_engine
    assert scheduler.request_finished(request, ([1, 2],)) == (False, None)


@pytest.mark.parametrize("params", ["handle", [1, 2], 7])
def test_parameters_of_another_type_are_dropped(scheduler: PythiaScheduler, params: object) -> None:
    request = a_request(params)
    assert pulled(scheduler, request) == (0, False)
    assert request.kv_transfer_params is None


def test_a_shorter_handle_is_a_prefix(scheduler: PythiaScheduler) -> None:
    request = a_request(a_handle(), tokens=500)
    assert pulled(scheduler, request, local_tokens=32) == (68, True)


def test_a_longer_handle_is_cut_to_the_prompt(scheduler: PythiaScheduler) -> None:
    request = a_request(a_handle(), tokens=40)
    assert pulled(scheduler, request) == (40, True)
    assert request.kv_transfer_params["remote_block_ids"] == [[1, 2]]


def test_a_holder_is_never_asked_to_pull_by_the_way(scheduler: PythiaScheduler) -> None:
    params = a_handle(do_remote_prefill=False, do_remote_decode=True)
    request = a_request(params)
    assert pulled(scheduler, request) == (0, False)
    assert params == {
        "do_remote_prefill": False,
        "do_remote_decode": True,
        "tp_size": 1,
    }


# --- what is held and released -----------------------------------------------------------


def test_a_finished_prefill_is_held_and_says_until_when(scheduler: PythiaScheduler) -> None:
    request = a_request({"do_remote_decode": True})
    scheduler.on_new_request(request)
    held, handle = scheduler.request_finished(request, ([7, 8, 9, 10],))
    assert held
    assert handle is not None
    assert handle["remote_blocks_expiry_time"] == pytest.approx(time.perf_counter() + 30, abs=1)
    assert handle["remote_block_ids"] == ([7, 8, 9, 10],)
    assert handle["remote_num_tokens"] == 100


def test_an_aborted_prefill_is_not_held(scheduler: PythiaScheduler) -> None:
    request = a_request({"do_remote_decode": True})
    scheduler.on_new_request(request)
    request.status = RequestStatus.FINISHED_ABORTED
    assert scheduler.request_finished(request, ([7, 8],)) == (False, None)


def test_a_finished_decode_is_not_held(scheduler: PythiaScheduler) -> None:
    request = a_request(a_handle())
    scheduler.on_new_request(request)
    request.kv_transfer_params["do_remote_prefill"] = False  # as after its pull
    assert scheduler.request_finished(request, ([1, 2, 3, 4],)) == (False, None)
    metadata = scheduler.build_connector_meta(SimpleNamespace())
    assert not metadata.heartbeat_by_engine
    assert not metadata.reqs_to_send


def test_a_pull_that_never_began_tells_the_holder(scheduler: PythiaScheduler) -> None:
    request = a_request(a_handle())
    scheduler.on_new_request(request)
    request.status = RequestStatus.FINISHED_ABORTED
    assert scheduler.request_finished(request, ([],)) == (False, None)
    metadata = scheduler.build_connector_meta(SimpleNamespace())
    assert metadata.reqs_to_recv["r~1"].remote.engine_id == "prefill-0"
    assert not metadata.reqs_to_recv["r~1"].local_block_ids


def test_a_handle_given_back_to_its_engine_is_released(scheduler: PythiaScheduler) -> None:
    request = a_request(a_handle(remote_engine_id=ENGINE, remote_request_id="held~1"))
    assert pulled(scheduler, request) == (0, False)
    assert scheduler.build_connector_meta(SimpleNamespace()).releases == {"held~1"}
    assert scheduler.build_connector_meta(SimpleNamespace()).releases == set()


# --- the worker half -----------------------------------------------------------------------


class PlayedNixl:
    """NIXL's transfers as numbers: an odd one is still in progress."""

    def check_xfer_state(self, handle: int) -> str:
        return "PROC" if handle % 2 else "DONE"

    def get_xfer_telemetry(self, handle: int) -> Any:
        return SimpleNamespace(
            xferDuration=handle * 1000.0, postDuration=5.0, totalBytes=handle, descCount=2
        )

    def release_xfer_handle(self, handle: int) -> None:
        """Nothing is held."""


class StillWorker(PythiaWorker):
    """The worker half without NIXL, model or threads: its books only."""

    def __init__(self) -> None:
        self._renewals = Renewals(lease_s=20.0, margin_s=5.0)
        self._released: set[str] = set()
        self._engine_clock_offset = {"prefill-0": 1000.0}
        self._recving_metadata: dict[str, Any] = {}
        self.xfer_stats = ReadStats()
        self.nixl_wrapper = PlayedNixl()

    def shutdown(self) -> None:
        """Nothing was started."""


def a_read(ends_in_s: float, blocks: tuple[list[int], ...] = ([1],)) -> Any:
    remote = SimpleNamespace(
        engine_id="prefill-0",
        request_id="held~1",
        blocks_expiry_time=time.perf_counter() + 1000.0 + ends_in_s,
    )
    return SimpleNamespace(remote=remote, local_block_ids=blocks)


def test_a_read_is_believed_only_within_its_lease() -> None:
    worker = StillWorker()
    assert not worker._is_turn2_read_expired(a_read(ends_in_s=6.0))
    assert worker._is_turn2_read_expired(a_read(ends_in_s=4.0))
    assert not worker._is_turn2_read_expired(a_read(ends_in_s=-99.0, blocks=([],)))


def test_a_renewed_lease_is_believed_beyond_its_end() -> None:
    worker = StillWorker()
    now_s = time.perf_counter()
    worker._renewals.renewed("prefill-0", ["held~1"], now_s - 15.0)
    worker._renewals.renewed("prefill-0", ["held~1"], now_s - 5.0)
    assert not worker._is_turn2_read_expired(a_read(ends_in_s=-8.0))


def test_a_read_from_an_engine_never_met_is_not_believed() -> None:
    worker = StillWorker()
    worker._engine_clock_offset.clear()
    assert worker._is_turn2_read_expired(a_read(ends_in_s=30.0))


def reading(worker: StillWorker) -> dict[str, list[int]]:
    """Two requests from two engines, one of them not over."""
    for request, engine in (("r~1", "prefill-0"), ("s~1", "prefill-1")):
        remote = SimpleNamespace(engine_id=engine, request_id=request, blocks_expiry_time=None)
        worker._recving_metadata[request] = SimpleNamespace(remote=remote, local_block_ids=([1],))
    return {"r~1": [2, 4], "s~1": [6, 7]}


def test_every_read_is_counted_with_its_source() -> None:
    worker = StillWorker()
    transfers = reading(worker)
    assert worker._pop_done_transfers(transfers) == ({"r~1"}, set())
    assert transfers == {"s~1": [7]}
    stats = worker.get_kv_connector_stats()
    assert stats.data[SOURCE_ENGINE] == ["prefill-0", "prefill-0", "prefill-1"]
    assert stats.data["bytes_transferred"] == [2, 4, 6]
    assert stats.data["transfer_duration"] == [0.002, 0.004, 0.006]
    assert worker.get_kv_connector_stats() is None, "counted once"


def test_the_engines_log_and_metrics_take_the_list_of_sources() -> None:
    """The way of the figures: two ranks, the scheduler's message, log and Prometheus."""
    first, second = StillWorker(), StillWorker()
    for worker in (first, second):
        worker._pop_done_transfers(reading(worker))
    total = first.get_kv_connector_stats().aggregate(second.get_kv_connector_stats())
    message = SchedulerStats(kv_connector_stats=total.to_dict())
    outputs = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=message))
    arrived = MsgpackDecoder(EngineCoreOutputs).decode(outputs).scheduler_stats
    data = arrived.kv_connector_stats
    assert len(data[SOURCE_ENGINE]) == len(data["bytes_transferred"]) == 6

    log = KVConnectorLogging(KVTransferConfig(**kv_transfer_config(ENGINE)))
    for _ in range(2):
        log.observe({name: list(values) for name, values in data.items()})
    lines: list[str] = []
    log.log(lambda _, line: lines.append(line))
    assert "Num successful transfers=12" in lines[0]

    kinds: dict[Any, Any] = dict.fromkeys((Gauge, Counter, Histogram), PlayedMetric)
    metrics = PythiaConnector.build_prom_metrics(
        SimpleNamespace(kv_transfer_config=None), kinds, [], {0: []}
    )
    PlayedMetric.seen.clear()
    metrics.observe(data)
    assert PlayedMetric.seen.count(6) == 2


def test_what_is_measured_beside_vllm_s_offloading_is_rebuilt_too() -> None:
    """As in an engine with room on its host: vLLM has the statistics of each connector by name."""
    know_connector_by_name()
    know_connector_by_name()
    stats = MultiKVConnectorStats()
    stats["PythiaConnector"] = ReadStats()
    stats["PythiaConnector"].data["pinned_blocks"].append(4)
    stats["OffloadingConnector"] = OffloadingConnectorStats()
    stats["OffloadingConnector"].increase_counter("vllm:kv_offload_load_bytes", 64)
    message = SchedulerStats(kv_connector_stats=stats.to_dict())
    outputs = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=message))
    arrived = MsgpackDecoder(EngineCoreOutputs).decode(outputs).scheduler_stats
    assert own_statistics(arrived.kv_connector_stats)["pinned_blocks"] == [4]
    log = KVConnectorLogging(KVTransferConfig(**kv_transfer_config(ENGINE, host_bytes=1 << 20)))
    log.observe(arrived.kv_connector_stats)
    lines: list[str] = []
    log.log(lambda _, line: lines.append(line))
    assert "'vllm:kv_offload_load_bytes': 64" in lines[0]


class PlayedMetric:
    """A metric of any kind that notes what it is given."""

    seen: ClassVar[list[float]] = []

    def __init__(self, **options: Any) -> None:
        """Its name and labels do not matter."""

    def labels(self, *values: object) -> PlayedMetric:
        return self

    def observe(self, value: float) -> None:
        self.seen.append(value)

    inc = observe


# --- the handshake socket --------------------------------------------------------------------

QUESTION = msgspec.msgpack.encode((b"get_meta_msg", 0, 0))


@pytest.fixture
def listener() -> Iterator[str]:
    port, ready, stop = free_port("127.0.0.1"), threading.Event(), threading.Event()
    thread = threading.Thread(
        target=serve_handshakes,
        args=({(0, 0): b"metadata"}, ready, stop, "127.0.0.1", port),
    )
    thread.start()
    assert ready.wait(10)
    yield f"tcp://127.0.0.1:{port}"
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def ask(address: str, kind: int, frames: list[bytes]) -> list[bytes]:
    with zmq.Context() as context, context.socket(kind) as socket:
        socket.linger = 200
        socket.connect(address)
        socket.send_multipart(frames)
        return socket.recv_multipart() if socket.poll(500) else []


def test_garbage_does_not_end_the_handshakes(listener: str) -> None:
    garbage = [
        [b"x"],
        [b""],
        [b"", b"\xc1"],
        [b"", QUESTION, b"more"],
        [b"", b"z" * (QUESTION_BYTES_MAX + 1)],
        [b"", msgspec.msgpack.encode((b"get_meta_msg", 0, 7))],
        [b"", msgspec.msgpack.encode((b"get_something", 0, 0))],
        [b"", msgspec.msgpack.encode(("get_meta_msg", "a", None))],
    ]
    for frames in garbage:
        assert ask(listener, zmq.DEALER, frames) == []
    payload, clock = ask(listener, zmq.REQ, [QUESTION])
    assert payload == b"metadata"
    assert msgspec.msgpack.decode(clock) == pytest.approx(time.perf_counter(), abs=5)


# --- NIXL and memory ---------------------------------------------------------------------------


def test_the_progress_thread_sleeps_as_told_and_only_inside() -> None:
    from nixl import _api as nixl_api

    with progress_pause(250):
        config = nixl_api.nixlBind.nixlAgentConfig()
        config.pthrDelay = 0
        config.useProgThread = True
        assert (config.pthrDelay, config.useProgThread) == (250, True)
    config = nixl_api.nixlBind.nixlAgentConfig()
    config.pthrDelay = 0
    assert config.pthrDelay == 0


def test_moving_to_huge_pages_keeps_the_contents() -> None:
    import torch

    memory = torch.arange(PAGE_BYTES, dtype=torch.int64)  # eight pages
    moved_bytes = use_huge_pages([(memory.data_ptr(), memory.nbytes)] * 2)
    assert moved_bytes % PAGE_BYTES == 0
    assert moved_bytes <= memory.nbytes
    assert torch.equal(memory, torch.arange(PAGE_BYTES, dtype=torch.int64))


def test_memory_smaller_than_a_huge_page_stays_where_it_is() -> None:
    assert use_huge_pages([(4096, 100), (PAGE_BYTES + 1, PAGE_BYTES)]) == 0


def test_the_advice_against_both_roles_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    log = logging.getLogger(connector.stock.__name__)
    with contextlib.ExitStack() as stack:
        stack.enter_context(connector._kv_both_is_meant())
        filters = list(log.filters)
        record = logging.LogRecord("n", 30, "p", 1, "Using kv_role='kv_both' with", (), None)
        assert not all(keep(record) for keep in filters if callable(keep))
    assert len(log.filters) == len(filters) - 1


def test_chunks_change_while_the_engine_runs_and_go_back_to_its_own() -> None:
    config = SimpleNamespace(long_prefill_token_threshold=100, enable_chunked_prefill=True)
    chunks = Chunks(config)
    for said, expected in ((64, 64), (0, 100), (32, 32), (-1, 32), ("x", 32), (None, 32)):
        params = chunk_params(64) | {CHUNK: said}
        chunks.take(params)
        assert config.long_prefill_token_threshold == expected
        assert params == {"do_remote_decode": False, "do_remote_prefill": False}


def test_without_chunked_prefill_there_are_no_chunks_to_change() -> None:
    config = SimpleNamespace(long_prefill_token_threshold=0, enable_chunked_prefill=False)
    Chunks(config).take(chunk_params(64))
    assert config.long_prefill_token_threshold == 0


def test_a_request_that_sets_chunks_asks_for_nothing_else(scheduler: PythiaScheduler) -> None:
    request = a_request(chunk_params(64), tokens=1)
    scheduler.on_new_request(request)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert CHUNK not in request.kv_transfer_params
    assert scheduler.request_finished(request, ([0],)) == (False, None)

"""A worker's sockets around an engine that is played: who gets what, and what if they can't."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from cluster.config import WorkerConfig
from cluster.engine import blocks_used
from cluster.serving import Worker
from coordinator import protocol, sockets
from coordinator.protocol import (
    Abort,
    CallFailed,
    Decode,
    Deltas,
    Discard,
    Load,
    Prefill,
    PrefillDone,
    Utility,
    UtilityReply,
    encode,
)
from coordinator.sockets import make_socket
from tests.unit.recording_wire import engine_request, output
from tests.unit.test_worker_requests import HANDLE, PARAMS
from transfer import handle as handles

WAIT_S = 10.0


class PlayedEngine:
    """What a worker uses of its engine; notes what it is given."""

    def __init__(self) -> None:
        self.given: dict[str, EngineCoreRequest] = {}
        self.forgotten: list[str] = []
        self.refuses: Exception | None = None
        self.errored = False
        self.on_step: Any = None
        self.on_reads: Any = None
        self.engine_id = "own-engine"
        self.engine_core = self
        self.model_config = SimpleNamespace(
            max_model_len=4096,
            dtype="float32",
            quantization=None,
            hf_config=SimpleNamespace(to_dict=dict),
            hf_text_config=SimpleNamespace(),
            is_hybrid=False,
            is_attention_free=False,
            get_sliding_window=lambda: None,
            get_total_num_kv_heads=lambda: 2,
            get_num_layers=lambda parallel: 2,
            get_head_size=lambda: 8,
            get_vocab_size=lambda: 4096,
        )
        self.vllm_config = SimpleNamespace(
            model_config=self.model_config,
            parallel_config=SimpleNamespace(pipeline_parallel_size=1),
            scheduler_config=SimpleNamespace(
                max_num_seqs=8, max_num_batched_tokens=2048, long_prefill_token_threshold=0
            ),
            cache_config=SimpleNamespace(
                block_size=16,
                effective_attention_block_size=None,
                num_gpu_blocks=100,
                cache_dtype="auto",
                enable_prefix_caching=True,
            ),
        )

    async def submit(self, request: EngineCoreRequest) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.given[request.request_id] = request

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self.given[request.request_id] = request

    async def forget(self, engine_ids: list[str]) -> None:
        self.forgotten.extend(engine_ids)

    async def list_loras_async(self) -> set[int]:
        return {3, 1}

    def load(self, garbage_frames: int) -> Load:
        return Load(garbage_frames_total=garbage_frames)


class Api:
    """The data connection of an API process."""

    def __init__(self, context: zmq.Context[Any], worker: Worker) -> None:
        self.worker = worker
        self.socket = make_socket(context, zmq.DEALER)
        self.socket.connect(worker.data_address)

    async def say(self, message: protocol.Message, body: Any = None) -> None:
        frames = MsgpackEncoder().encode(body) if body is not None else []
        assert self.socket.post([encode(message), *frames])

    async def hear(self, kind: type[msgspec.Struct]) -> tuple[Any, list[Any]]:
        header, *frames = await asyncio.wait_for(self.socket.receive(), WAIT_S)
        message = protocol.decode_worker_to_api(header.buffer)
        assert isinstance(message, kind), message
        return message, frames

    async def decode(self, request: str = "r", handle: bytes = b"") -> None:
        message = Decode(request, 1, self.worker.incarnation, handle)
        await self.say(message, engine_request(request))


async def meet(worker: Worker, engine: PlayedEngine, **stats: int) -> None:
    """The core lets the worker read from ``HANDLE``'s engine; what it says comes of it."""
    probe = protocol.ProbeRead(7, worker.incarnation, 1, 33, "prefill-0", handles.encode(HANDLE))
    worker._on_core(probe)
    await until(lambda: "probe-read-7~0" in engine.given)
    read = output("probe-read-7", 0, [1], FinishReason.LENGTH)
    read.prefill_stats = PrefillStats()
    read.prefill_stats.set(33, 0, stats.get("moved", 33))
    engine.on_step([read], 0.0)
    del engine.given["probe-read-7~0"]


async def until(condition: Any) -> None:
    for _ in range(int(WAIT_S / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come")


@asynccontextmanager
async def serving(kv_host_gib: float = 0.0) -> AsyncIterator[tuple[Worker, PlayedEngine, Api]]:
    context = zmq.Context()
    engine: Any = PlayedEngine()
    config = WorkerConfig(
        name="decode-0",
        role="mixed",
        coordinator="tcp://127.0.0.1:1",
        model="m",
        served_model_name="m",
        kv_host_gib=kv_host_gib,
    )
    worker = Worker(config, engine, context)
    running = asyncio.create_task(worker.run())
    try:
        yield worker, engine, Api(context, worker)
    finally:
        worker.stopping.set()
        await asyncio.wait({running}, timeout=WAIT_S)
        context.destroy(linger=0)


async def test_tokens_of_a_step_come_in_one_message() -> None:
    async with serving() as (_, engine, api):
        await api.decode("a")
        await api.decode("b")
        await until(lambda: len(engine.given) == 2)
        engine.on_step([output("a", 1, [1]), output("b", 1, [2]), output("c", 1, [3])], 5.0)
        _, frames = await api.hear(Deltas)
        outputs = MsgpackDecoder(EngineCoreOutputs).decode(frames)
        assert [(out.request_id, out.new_token_ids) for out in outputs.outputs] == [
            ("a~1", [1]),
            ("b~1", [2]),
        ]
        assert outputs.timestamp == 5.0


async def test_a_prefill_is_answered_with_its_handle() -> None:
    async with serving() as (worker, engine, api):
        await api.say(Prefill("r", 1, worker.incarnation), engine_request())
        await until(lambda: "r~1" in engine.given)
        done = output("r", 1, [1], FinishReason.LENGTH)
        done.kv_transfer_params = PARAMS
        engine.on_step([done], 0.0)
        message, _ = await api.hear(PrefillDone)
        assert handles.decode(message.handle) == HANDLE
        assert not worker.jobs


async def test_a_prefill_reads_by_a_handle_once_and_says_what_came() -> None:
    async with serving() as (worker, engine, api):
        await meet(worker, engine)
        frame = handles.encode(HANDLE)
        await api.say(Prefill("r", 1, worker.incarnation, handle=frame), engine_request())
        await until(lambda: "r~1" in engine.given)
        extra = engine.given["r~1"].sampling_params.extra_args
        assert extra["kv_transfer_params"]["do_remote_prefill"]
        assert extra["kv_transfer_params"]["do_remote_decode"]
        assert worker.sources.report()[0].in_flight_bytes > 0
        await api.say(Prefill("s", 1, worker.incarnation, handle=frame), engine_request("s"))
        failed, _ = await api.hear(CallFailed)
        assert (failed.request, failed.handle_refused) == ("s", True)
        done = output("r", 1, [1], FinishReason.LENGTH)
        done.kv_transfer_params = PARAMS
        done.prefill_stats = PrefillStats()
        done.prefill_stats.set(40, 16, 20)
        engine.on_step([done], 0.0)
        message, _ = await api.hear(PrefillDone)
        assert (message.cached_tokens, message.moved_tokens) == (36, 20)
        assert worker.sources.report()[0].in_flight_bytes == 0


async def test_what_comes_from_the_host_s_memory_was_cached_and_has_not_moved() -> None:
    async with serving(kv_host_gib=1.0) as (worker, engine, api):
        await meet(worker, engine)
        assert worker.facts.kv_host_blocks > 0
        await api.decode("r")
        await api.decode("s", handles.encode(HANDLE))
        await until(lambda: "s~1" in engine.given)
        outputs = [output(name, 1, [1]) for name in ("r", "s")]
        for each in outputs:
            each.prefill_stats = PrefillStats()
            each.prefill_stats.set(40, 16, 20)
        engine.on_step(outputs, 0.0)
        _, frames = await api.hear(Deltas)
        told = [
            out.prefill_stats for out in MsgpackDecoder(EngineCoreOutputs).decode(frames).outputs
        ]
        found = [(each.num_local_cached_tokens, each.num_external_cached_tokens) for each in told]
        assert found == [(36, 0), (16, 20)]


async def test_what_the_host_adds_to_what_need_not_be_read_has_not_moved() -> None:
    """A handle of no more than the cache has, and one of the engine's own."""
    async with serving(kv_host_gib=1.0) as (worker, engine, api):
        await meet(worker, engine)
        own = msgspec.structs.replace(
            HANDLE, remote_engine_id=engine.engine_id, remote_request_id="q~1"
        )
        await api.decode("r", handles.encode(HANDLE))
        await api.decode("s", handles.encode(own))
        await until(lambda: "s~1" in engine.given)
        outputs = [output(name, 1, [1]) for name in ("r", "s")]
        for each, cached_tokens in zip(outputs, (48, 0), strict=True):
            each.prefill_stats = PrefillStats()
            each.prefill_stats.set(80, cached_tokens, 16)
        engine.on_step(outputs, 0.0)
        _, frames = await api.hear(Deltas)
        told = [
            out.prefill_stats for out in MsgpackDecoder(EngineCoreOutputs).decode(frames).outputs
        ]
        found = [(each.num_local_cached_tokens, each.num_external_cached_tokens) for each in told]
        assert found == [(64, 0), (16, 0)]


async def test_what_is_cached_only_is_answered_for_beside_the_call_itself() -> None:
    async with serving() as (worker, engine, api):
        await api.say(Prefill("r", -1, worker.incarnation, cached_only=True), engine_request())
        await api.decode("r")
        await until(lambda: len(engine.given) == 2)
        assert list(engine.given) == ["r~-1", "r~1"]
        extra = engine.given["r~-1"].sampling_params.extra_args
        assert extra["kv_transfer_params"]["cached_only"]
        await api.say(protocol.Abort([("r", -1)]))
        await until(lambda: engine.forgotten)
        assert engine.forgotten == ["r~-1"]


async def test_garbage_is_dropped_and_counted() -> None:
    async with serving() as (worker, engine, api):
        good = bytes(MsgpackEncoder().encode(engine_request())[0])
        decode = encode(Decode("r", 1, worker.incarnation))
        garbage: list[list[bytes]] = [
            [b""],
            [os.urandom(40)],
            [decode],
            [decode, b""],
            [decode, os.urandom(200)],
            [decode, good[:-3]],
            [decode, *MsgpackEncoder().encode(engine_request(prompt=[]))],
            [decode, b"\xc7\x03\x01abc"],
            [encode(Utility(1, "list_loras")), b"\xff" * 3 + b"\xc1"],
            [b"\x82\xa4type\xa5Abort\xa1x" + b"\x91" * 1_000_000],
            [b"\x82\xa4type\xa6Decode\xa7request\xa2\xff\xfe"],
        ]
        for frames in garbage:
            assert api.socket.post(frames)
        await api.decode("good")
        await until(lambda: "good~1" in engine.given)
        assert list(engine.given) == ["good~1"]
        assert worker.garbage.total == len(garbage)


async def test_what_is_meant_for_a_former_incarnation_is_refused() -> None:
    async with serving() as (worker, engine, api):
        await api.say(Decode("r", 1, "former"), engine_request())
        failed, _ = await api.hear(CallFailed)
        assert (failed.request, failed.attempt, failed.retryable) == ("r", 1, True)
        assert failed.incarnation == worker.incarnation
        assert not engine.given


async def test_a_handle_is_read_once() -> None:
    async with serving() as (worker, engine, api):
        await meet(worker, engine)
        await api.decode("a", handles.encode(HANDLE))
        await api.decode("a", handles.encode(HANDLE))  # sent twice: nothing happens
        await api.decode("b", handles.encode(HANDLE))
        failed, _ = await api.hear(CallFailed)
        assert failed.request == "b"
        assert "read once" in failed.reason
        assert list(engine.given) == ["a~1"]


async def test_a_handle_that_is_given_back_is_not_read_afterwards() -> None:
    async with serving() as (worker, engine, api):
        held_here = msgspec.structs.replace(HANDLE, remote_engine_id=engine.engine_id)
        frame = handles.encode(held_here)
        await api.say(Discard("r", 1, worker.incarnation, frame))
        await api.say(Discard("r", 1, worker.incarnation, frame))
        await api.say(Discard("r", 1, worker.incarnation, b"no handle"))
        await api.decode("r", frame)
        failed, _ = await api.hear(CallFailed)
        assert failed.request == "r"
        assert list(engine.given) == ["discard-r~1"]
        assert engine.given["discard-r~1"].abort_immediately


async def test_a_handle_of_an_engine_never_met_is_refused() -> None:
    async with serving() as (worker, engine, api):
        await meet(worker, engine, moved=0)
        await api.decode("a", handles.encode(HANDLE))
        failed, _ = await api.hear(CallFailed)
        assert (failed.request, failed.retryable) == ("a", True)
        assert failed.reason == "handle refused: engine-0 at 127.0.0.1:5600 was never met"
        assert failed.handle_refused
        assert not engine.given
        await meet(worker, engine)
        elsewhere = msgspec.structs.replace(HANDLE, remote_port=5601)
        await api.decode("b", handles.encode(elsewhere))
        failed, _ = await api.hear(CallFailed)
        assert "never met" in failed.reason
        await api.decode("c", handles.encode(HANDLE))
        await until(lambda: list(engine.given) == ["c~1"])


async def test_what_another_engine_holds_is_not_given_back_here() -> None:
    async with serving() as (worker, engine, api):
        await meet(worker, engine)
        await api.say(Discard("r", 1, worker.incarnation, handles.encode(HANDLE)))
        await api.decode("r", handles.encode(HANDLE))
        await until(lambda: engine.given)
        assert list(engine.given) == ["r~1"]


async def test_the_core_is_told_what_is_read_and_what_is_on_its_way() -> None:
    async with serving() as (worker, engine, api):
        await meet(worker, engine)
        engine.on_reads(
            {
                "source_engine": ["engine-0"],
                "bytes_transferred": [4096],
                "transfer_duration": [0.5],
            }
        )
        await api.decode("a", handles.encode(HANDLE))
        await until(lambda: "a~1" in engine.given)
        (told,) = worker._beat().links  # type: ignore[attr-defined]
        size_bytes = handles.blocks_held(HANDLE) * worker.facts.kv_bytes_per_block
        assert (told.source, told.transfers, told.bytes_total) == ("prefill-0", 1, 4096)
        assert told.in_flight_bytes == size_bytes > 0
        engine.on_step([output("a", 1, [1])], 0.0)
        assert worker.sources.report()[0].in_flight_bytes == 0


async def test_an_aborted_call_has_nothing_on_its_way() -> None:
    async with serving() as (worker, engine, api):
        await meet(worker, engine)
        await api.decode("a", handles.encode(HANDLE))
        await until(lambda: "a~1" in engine.given)
        assert worker.sources.report()[0].in_flight_bytes > 0
        await api.say(Abort([("a", 1)]))
        await until(lambda: engine.forgotten == ["a~1"])
        assert worker.sources.report()[0].in_flight_bytes == 0


async def test_an_abort_reaches_the_engine_once() -> None:
    async with serving() as (worker, engine, api):
        await api.decode("r")
        await api.say(Abort([("r", 1), ("unknown", 1)]))
        await api.say(Abort([("r", 1)]))
        await api.decode("next")
        await until(lambda: "next~1" in engine.given)
        assert engine.forgotten == ["r~1"]
        assert list(worker.jobs) == ["next~1"]


async def test_a_request_that_the_engine_can_not_take_fails_alone() -> None:
    async with serving() as (worker, engine, api):
        engine.refuses = ValueError("odd")
        await api.decode("r")
        failed, _ = await api.hear(CallFailed)
        assert not failed.retryable
        assert "odd" in failed.reason
        assert not worker.jobs
        engine.refuses = None
        await api.decode("next")
        await until(lambda: "next~1" in engine.given)


async def test_calls_of_an_api_process_that_is_gone_are_aborted() -> None:
    async with serving() as (worker, engine, api):
        await api.decode("r")
        await until(lambda: "r~1" in engine.given)
        api.socket.close()
        await asyncio.sleep(0.2)
        engine.on_step([output("r", 1, [1])], 0.0)
        await until(lambda: engine.forgotten == ["r~1"])
        assert not worker.jobs


async def test_an_api_process_that_does_not_keep_up_is_told_what_it_misses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sockets, "SEND_QUEUE_MESSAGES", 5)
    async with serving() as (worker, engine, api):
        await api.decode("r")
        await until(lambda: "r~1" in engine.given)
        tokens = list(range(20_000))
        steps = 0
        while worker.jobs and steps < 10_000:
            engine.on_step([output("r", 1, tokens)], float(steps))
            steps += 1
            await asyncio.sleep(0)
        assert engine.forgotten == ["r~1"]
        heard = 0
        while True:
            header, *_ = await asyncio.wait_for(api.socket.receive(), WAIT_S)
            message = protocol.decode_worker_to_api(header)
            if isinstance(message, CallFailed):
                break
            heard += 1
        assert heard == steps - 1, "everything before the gap, then the news"
        assert (message.request, message.retryable) == ("r", True)
        await until(lambda: not worker.owed)


async def test_only_what_is_offered_can_be_called() -> None:
    async with serving() as (_, _, api):
        await api.say(Utility(1, "list_loras"), [])
        reply, frames = await api.hear(UtilityReply)
        assert (reply.call, reply.error) == (1, "")
        assert MsgpackDecoder().decode(frames) == [1, 3]
        for number, method in enumerate(("shutdown", "__init__", "collective_rpc")):
            await api.say(Utility(number, method), [])
            reply, _ = await api.hear(UtilityReply)
            assert "not offered" in reply.error
        await api.say(Utility(9, "list_loras"), [1, 2, 3])
        reply, _ = await api.hear(UtilityReply)
        assert "TypeError" in reply.error


@asynccontextmanager
async def draining(drain_s: float) -> AsyncIterator[tuple[Worker, PlayedEngine, Api, Any]]:
    """A worker with a call that its engine works on, and its ``run``."""
    context = zmq.Context()
    core = make_socket(context, zmq.ROUTER)
    address = core.bind("tcp://127.0.0.1:*")
    engine: Any = PlayedEngine()
    config = WorkerConfig(
        name="decode-0",
        role="mixed",
        coordinator=address,
        model="m",
        served_model_name="m",
        drain_s=drain_s,
    )
    worker = Worker(config, engine, context)
    running = asyncio.create_task(worker.run())
    try:
        api = Api(context, worker)
        await api.decode("r")
        await until(lambda: "r~1" in engine.given)
        yield worker, engine, api, (running, core)
    finally:
        worker.stopping.set()
        await asyncio.wait({running}, timeout=WAIT_S)
        core.close()
        worker.close()
        context.destroy(linger=0)


async def told_core(core: Any, kind: type[msgspec.Struct]) -> Any:
    """The next message of a kind that the worker says to its core."""
    async with asyncio.timeout(WAIT_S):
        while True:
            frames = await core.receive()
            message = protocol.decode_to_core(frames[-1].buffer)
            if isinstance(message, kind):
                return message


async def test_a_worker_told_to_end_says_so_and_ends_its_calls_first() -> None:
    async with draining(WAIT_S) as (worker, engine, api, (running, core)):
        worker.end()
        await told_core(core, protocol.Draining)
        engine.on_step([output("r", 1, [1])], 0.0)
        await api.hear(Deltas)
        assert not running.done()
        engine.on_step([output("r", 1, [2], FinishReason.LENGTH)], 0.0)
        await api.hear(Deltas)
        assert (await told_core(core, protocol.Leaving)).worker == "decode-0"
        assert await asyncio.wait_for(running, WAIT_S) == 0


async def test_a_drain_has_an_end() -> None:
    async with draining(0.3) as (worker, _, _, (running, core)):
        worker.end()
        await told_core(core, protocol.Leaving)
        assert await asyncio.wait_for(running, WAIT_S) == 0
        assert worker.jobs, "what is left goes on elsewhere"


async def test_a_worker_that_is_told_twice_goes_at_once() -> None:
    async with draining(600.0) as (worker, _, _, (running, _core)):
        worker.end()
        await asyncio.sleep(0.1)
        assert not running.done()
        worker.end()
        assert await asyncio.wait_for(running, WAIT_S) == 0


async def test_whoever_examines_a_worker_gets_answers() -> None:
    async with serving() as (worker, engine, api):
        await api.say(protocol.AskTime(3))
        frames = await asyncio.wait_for(api.socket.receive(), WAIT_S)
        told = protocol.decode_worker_to_examiner(frames[0].buffer)
        assert isinstance(told, protocol.TimeIs)
        assert told.call == 3
        assert abs(told.unix_time_s - time.time()) < WAIT_S
        nobody = protocol.Peer("p", "tcp://127.0.0.1:9", "127.0.0.1:9")
        await api.say(protocol.Look(4, [nobody]))
        frames = await asyncio.wait_for(api.socket.receive(), WAIT_S)
        looked = protocol.decode_worker_to_examiner(frames[0].buffer)
        assert isinstance(looked, protocol.Looked)
        assert looked.engine == "own-engine"
        assert looked.reaches == [protocol.Reach("p", "Connection refused", "Connection refused")]
        assert "tcp" in {each.name for each in looked.host.transports}
        await api.say(protocol.Sample(5, 1, 40))
        await until(lambda: any(name.endswith("-5~0") for name in engine.given))
        (name,) = (name for name in engine.given if name.endswith("-5~0"))
        assert len(engine.given[name].prompt_token_ids or ()) == 40
        done = output(name.removesuffix("~0"), 0, [1], FinishReason.LENGTH)
        done.kv_transfer_params = PARAMS
        engine.on_step([done], 0.0)
        frames = await asyncio.wait_for(api.socket.receive(), WAIT_S)
        sampled = protocol.decode_worker_to_examiner(frames[0].buffer)
        assert isinstance(sampled, protocol.Sampled)
        assert handles.decode(sampled.handle) == HANDLE
        assert worker.jobs == {}


async def test_nobody_has_a_worker_read_from_an_engine_that_it_never_met() -> None:
    async with serving() as (_, engine, api):
        await api.say(protocol.SampleRead(6, 1, 40, handles.encode(HANDLE)))
        frames = await asyncio.wait_for(api.socket.receive(), WAIT_S)
        sampled = protocol.decode_worker_to_examiner(frames[0].buffer)
        assert isinstance(sampled, protocol.Sampled)
        assert "never met" in sampled.error
        assert engine.given == {}


def test_used_blocks_are_counted_as_vllm_counts_them() -> None:
    for blocks in (1, 2, 100, 2048):
        for used in {0, 1, blocks // 2, blocks - 1}:
            usage = used / (blocks - 1) if blocks > 1 else 0.0
            assert blocks_used(usage, blocks) == (used if blocks > 1 else 0)

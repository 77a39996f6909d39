"""An API process's connections over real sockets: to the real core, and to played workers."""

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
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from coordinator import protocol
from coordinator.api.client import CallError, ClusterEngineCore
from coordinator.limits import Limits
from coordinator.protocol import Beat, Decode, Deltas, EngineFacts, Load, Ready, Welcome, encode
from coordinator.server import CoordinatorConfig, CoreServer
from coordinator.sockets import make_socket
from coordinator.workflow.limits import WorkflowLimits
from tests.unit.recording_wire import engine_request, output

WAIT_S = 10.0
FACTS = EngineFacts("0.32.0", "model", "print", 16, 1000, 2048, 8, 2048)
BEAT_S = 0.1


class PlayedWorker:
    """The sockets of a worker; what it answers is up to the test."""

    def __init__(self, context: zmq.Context[Any], core: str, incarnation: str) -> None:
        self.context = context
        self.incarnation = incarnation
        self.data = make_socket(context, zmq.ROUTER)
        self.address = self.data.bind("tcp://127.0.0.1:*")
        self.control = make_socket(context, zmq.DEALER)
        self.control.connect(core)
        self.api = b""
        self._beating: asyncio.Task[None] | None = None

    async def join(self) -> None:
        """Register with the core and keep beating."""
        ready = Ready("decode-0", self.incarnation, "decode", self.address, FACTS)
        self.control.post([encode(ready)])
        async with asyncio.timeout(WAIT_S):
            while True:
                (frame,) = await self.control.receive()
                if isinstance(protocol.decode_core_to_worker(frame.buffer), Welcome):
                    break
        self._beating = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        while True:
            self.control.post([encode(Beat("decode-0", self.incarnation, Load()))])
            await asyncio.sleep(BEAT_S)

    async def hear(self, kind: type[msgspec.Struct]) -> tuple[Any, list[Any]]:
        """The next message of that kind and the frames behind it."""
        async with asyncio.timeout(WAIT_S):
            while True:
                peer, header, *frames = await self.data.receive()
                self.api = peer.bytes
                message = protocol.decode_api_to_worker(header.buffer)
                if isinstance(message, kind):
                    return message, frames

    def say(self, *frames: Any) -> None:
        assert self.data.post([self.api, *frames])

    def tokens(self, request: str, attempt: int, tokens: list[int]) -> None:
        outputs = EngineCoreOutputs(outputs=[output(request, attempt, tokens)])
        self.say(encode(Deltas(self.incarnation)), *MsgpackEncoder().encode(outputs))

    async def reopen(self) -> None:
        """The connection breaks; the same worker is there again soon."""
        self.data.close()
        self.data = make_socket(self.context, zmq.ROUTER)
        for _ in range(100):
            try:
                self.data.bind(self.address)
            except zmq.ZMQError:  # the old socket's thread has not let go of the port yet
                await asyncio.sleep(0.05)
            else:
                return
        raise AssertionError(f"{self.address} does not come free")

    def close(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
        self.control.close()
        self.data.close()


class Api:
    """A ``ClusterEngineCore`` with vLLM's own output processor, as ``AsyncLLM`` has it."""

    def __init__(self, core: str) -> None:
        config: Any = SimpleNamespace(model_config=SimpleNamespace(max_model_len=4096))
        self.core = ClusterEngineCore("api", core, "model", config, Limits(), WorkflowLimits())
        self.processor = OutputProcessor(None, log_stats=False)
        self.core.processor = self.processor
        self.running = asyncio.create_task(self.core.run())

    async def until(self, condition: Any) -> None:
        for _ in range(int(WAIT_S / 0.01)):
            if condition() or self.running.done():
                break
            await asyncio.sleep(0.01)
        assert condition(), self.running

    async def submit(self, request: str = "r") -> RequestOutputCollector:
        made = engine_request(request, range(20), max_tokens=50, detokenize=False)
        made.external_req_id = request
        queue = RequestOutputCollector(RequestOutputKind.DELTA, request)
        self.processor.add_request(made, None, None, 0, queue)
        await self.core.add_request_async(made)
        return queue

    async def tokens(self) -> list[int]:
        outputs = await asyncio.wait_for(self.core.get_output_async(), WAIT_S)
        return [token for out in outputs.outputs for token in out.new_token_ids]


@pytest.fixture
async def context() -> AsyncIterator[zmq.Context[Any]]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@asynccontextmanager
async def cluster(context: zmq.Context[Any]) -> AsyncIterator[tuple[Api, PlayedWorker]]:
    """A core, an API process and one worker that know each other."""
    limits = Limits(beat_s=BEAT_S, beats_missed=20)
    server = CoreServer(
        context, CoordinatorConfig("tcp://127.0.0.1:*", "127.0.0.1", 0, "model", limits=limits)
    )
    serving = asyncio.create_task(server.run())
    worker = PlayedWorker(context, server.address, "i1")
    api = Api(server.address)
    try:
        await worker.join()
        await api.until(lambda: api.core.workers)
        yield api, worker
    finally:
        api.core.shutdown()
        await asyncio.wait({api.running}, timeout=WAIT_S)
        worker.close()
        serving.cancel()
        await asyncio.wait({serving}, timeout=WAIT_S)
        server.socket.close()
        api.core.context.destroy(linger=0)


async def test_a_call_goes_to_the_worker_and_its_tokens_come_back(
    context: zmq.Context[Any],
) -> None:
    async with cluster(context) as (api, worker):
        assert api.core.vllm_config.model_config.max_model_len == 2048, "what the engine can hold"
        await api.submit()
        decode, frames = await worker.hear(Decode)
        assert decode == Decode("r", 1, "i1")
        request = MsgpackDecoder(EngineCoreRequest).decode(frames)
        assert request.prompt_token_ids == list(range(20))
        worker.tokens("r", 1, [7, 8])
        assert await api.tokens() == [7, 8]


async def test_garbage_from_a_worker_is_counted_and_the_next_tokens_come(
    context: zmq.Context[Any],
) -> None:
    async with cluster(context) as (api, worker):
        await api.submit()
        await worker.hear(Decode)
        deltas = encode(Deltas("i1"))
        body = MsgpackEncoder().encode(EngineCoreOutputs(outputs=[output("r", 1, [9])]))
        garbage: list[list[bytes]] = [
            [b""],
            [os.urandom(50)],
            [deltas],
            [deltas, b""],
            [deltas, os.urandom(50)],
            [deltas, bytes(body[0])[:-1]],
            [deltas, b"\xc7\x03\x01abc"],
            [deltas, b"\xdc\xff\xff"],
            [b"\x82\xa4type\xa6Deltas\xabincarnation\xa2\xff\xfe"],
        ]
        for frames in garbage:
            worker.say(*frames)
        worker.tokens("r", 1, [7])
        assert await api.tokens() == [7]
        assert api.core.garbage.total == len(garbage)


async def test_a_connection_that_breaks_costs_an_attempt_not_the_call(
    context: zmq.Context[Any],
) -> None:
    """Whatever was on it is lost, and nobody would say so: the worker is well, the core too."""
    async with cluster(context) as (api, worker):
        await api.submit()
        await worker.hear(Decode)
        worker.tokens("r", 1, [7, 8])
        assert await api.tokens() == [7, 8]
        await worker.reopen()
        decode, frames = await worker.hear(Decode)
        assert decode.attempt == 2
        request = MsgpackDecoder(EngineCoreRequest).decode(frames)
        assert request.prompt_token_ids == [*range(20), 7, 8]
        worker.tokens("r", 2, [9])
        assert await api.tokens() == [9]


async def test_a_new_incarnation_takes_the_place_of_the_former(
    context: zmq.Context[Any],
) -> None:
    async with cluster(context) as (api, worker):
        await api.submit()
        await worker.hear(Decode)
        successor = PlayedWorker(context, api.core.link.address, "i2")
        await successor.join()
        decode, _ = await successor.hear(Decode)
        assert (decode.attempt, decode.incarnation) == (2, "i2")
        assert [placed.incarnation for placed in api.core.workers] == ["i2"]
        successor.close()


async def test_an_error_of_ours_is_not_silent(context: zmq.Context[Any]) -> None:
    async with cluster(context) as (api, worker):
        await api.submit()
        await worker.hear(Decode)

        def broken(*arguments: object) -> None:
            raise AssertionError("ours")

        api.core.calls.on_outputs = broken  # type: ignore[method-assign]
        worker.tokens("r", 1, [7])
        with pytest.raises(ExceptionGroup) as raised:
            await asyncio.wait_for(asyncio.shield(api.running), WAIT_S)
        assert raised.group_contains(AssertionError, match="ours")


async def test_a_request_that_can_not_be_encoded_fails_alone(
    context: zmq.Context[Any],
) -> None:
    async with cluster(context) as (api, worker):
        strange = engine_request("strange", extra_args={"x": object()})
        strange.external_req_id = "strange"
        api.processor.add_request(strange, None, None, 0, None)
        with pytest.raises(TypeError):
            await api.core.add_request_async(strange)
        await api.submit()
        await worker.hear(Decode)


async def test_a_stop_from_another_thread_ends_open_calls_with_an_error(
    context: zmq.Context[Any],
) -> None:
    async with cluster(context) as (api, worker):
        queue = await api.submit()
        await worker.hear(Decode)
        await asyncio.to_thread(api.core.shutdown)
        with pytest.raises(CallError) as raised:
            await asyncio.wait_for(queue.get(), WAIT_S)
        assert raised.value.failure.status == 503
        await asyncio.wait_for(api.running, WAIT_S)
        assert not api.core.calls.calls
        api.core.shutdown()


async def test_many_messages_at_once_leave_a_turn_to_others(context: zmq.Context[Any]) -> None:
    async with cluster(context) as (api, worker):
        await api.submit()
        await worker.hear(Decode)
        for number in range(2000):
            worker.tokens("r", 1, [number])
        time.sleep(0.3)  # noqa: ASYNC251  (all of them have arrived, and nobody has looked yet)
        most = had = 0
        async with asyncio.timeout(WAIT_S):
            while had < 2000:
                await asyncio.sleep(0)
                has = api.core.outputs.qsize()
                most, had = max(most, has - had), has
        assert most < 50, "outputs taken between two turns of this task"

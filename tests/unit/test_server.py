"""The core's process: its socket, over loopback, and the API processes beside it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from coordinator import protocol
from coordinator import server as subject
from coordinator.limits import Limits
from coordinator.protocol import (
    ApiBeat,
    Beat,
    EngineFacts,
    Hello,
    Inspect,
    Load,
    Plan,
    Ready,
    Rejected,
    Submit,
    Unknown,
    Welcome,
    WorkerUp,
    encode,
)
from coordinator.server import NOT_ACCEPTING, ApiProcesses, CoordinatorConfig, CoreServer
from coordinator.sockets import make_socket
from tests.unit.test_link import GARBAGE

WAIT_S = 10.0
FACTS = EngineFacts("0.32.0", "model", "print", 16, 1000, 4096, 8, 2048)


def config(**changes: object) -> CoordinatorConfig:
    defaults: dict[str, object] = {
        "control_address": "tcp://127.0.0.1:*",
        "api_host": "127.0.0.1",
        "api_port": 0,
        "model": "model",
    }
    return CoordinatorConfig(**{**defaults, **changes})  # type: ignore[arg-type]


class Peer:
    """A DEALER at the core."""

    def __init__(self, context: zmq.Context[Any], address: str) -> None:
        self.socket = make_socket(context, zmq.DEALER)
        self.socket.connect(address)

    async def say(self, *frames: bytes) -> None:
        assert self.socket.post(frames)

    async def hear(self, kind: type[msgspec.Struct]) -> protocol.Message:
        """The next message of that kind."""
        decode = msgspec.msgpack.Decoder(protocol.CoreToWorker | protocol.CoreToApi).decode
        async with asyncio.timeout(WAIT_S):
            while True:
                (frame,) = await self.socket.receive()
                message = decode(frame.buffer)
                if isinstance(message, kind):
                    return message


@pytest.fixture
async def context() -> AsyncIterator[zmq.Context[Any]]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@asynccontextmanager
async def serving(
    context: zmq.Context[Any], **changes: object
) -> AsyncIterator[tuple[CoreServer, asyncio.Task[None]]]:
    server = CoreServer(context, config(**changes))
    task = asyncio.create_task(server.run())
    try:
        yield server, task
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=WAIT_S)
        server.socket.close()


def ready(worker: str = "decode-0") -> bytes:
    return encode(Ready(worker, "i", "decode", "tcp://127.0.0.1:9", FACTS))


async def test_a_conversation_over_sockets(context: zmq.Context[Any]) -> None:
    async with serving(context) as (server, _):
        worker, api = Peer(context, server.address), Peer(context, server.address)
        await worker.say(ready())
        welcome = await worker.hear(Welcome)
        assert isinstance(welcome, Welcome)
        assert welcome.core == server.core.core_id
        await api.say(encode(Hello("api-0")))
        await api.hear(Welcome)
        up = await api.hear(WorkerUp)
        assert isinstance(up, WorkerUp)
        assert up.worker == "decode-0"
        await api.say(encode(Submit("api-0", "r", 1, 10, 10)))
        plan = await api.hear(Plan)
        assert isinstance(plan, Plan)
        assert (plan.request, plan.decode.worker, plan.prefill) == ("r", "decode-0", None)


async def test_whoever_is_not_known_is_told_so(context: zmq.Context[Any]) -> None:
    async with serving(context) as (server, _):
        worker = Peer(context, server.address)
        await worker.say(encode(Beat("decode-0", "i", Load())))
        unknown = await worker.hear(Unknown)
        assert unknown == Unknown(server.core.core_id)


async def test_time_passes_for_the_core_too(context: zmq.Context[Any]) -> None:
    async with serving(context, limits=Limits(queue_s=0.2)) as (server, _):
        api = Peer(context, server.address)
        await api.say(encode(Hello("api-0")))
        await api.hear(Welcome)
        await api.say(encode(Submit("api-0", "r", 1, 10, 10)))
        rejected = await api.hear(Rejected)
        assert isinstance(rejected, Rejected)
        assert rejected.status == 503


async def test_garbage_is_counted_and_nothing_else_happens(context: zmq.Context[Any]) -> None:
    async with serving(context) as (server, task):
        peer = Peer(context, server.address)
        frames = [garbage for garbage in GARBAGE if garbage != GARBAGE[5]]
        for garbage in frames:
            await peer.say(garbage)
        await peer.say(encode(Inspect(1)), b"one frame too many")
        await peer.say(b"", encode(Inspect(1)))
        await peer.say(encode(Inspect(7)))
        snapshot = await peer.hear(protocol.Snapshot)
        assert isinstance(snapshot, protocol.Snapshot)
        assert snapshot.token == 7
        assert snapshot.counters["garbage_frames"] == len(frames) + 2
        assert not task.done()


async def test_bytes_that_are_no_zmq_do_not_matter(context: zmq.Context[Any]) -> None:
    async with serving(context) as (server, task):
        host, _, port = server.address.removeprefix("tcp://").rpartition(":")
        for noise in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(500), b""):
            with socket.create_connection((host, int(port))) as raw:
                raw.sendall(noise)
        peer = Peer(context, server.address)
        await peer.say(encode(Inspect(1)))
        await peer.hear(protocol.Snapshot)
        assert not task.done()


async def test_a_pause_of_the_core_is_not_the_silence_of_all_others(
    context: zmq.Context[Any],
) -> None:
    """Beats that came while the process stood still are heard before time is."""
    limits = Limits(beat_s=0.2, beats_missed=5)
    async with serving(context, limits=limits) as (server, _):
        worker, api = Peer(context, server.address), Peer(context, server.address)
        await worker.say(ready())
        await worker.hear(Welcome)
        await api.say(encode(Hello("api-0")))
        await api.hear(Welcome)
        await asyncio.sleep(0.1)
        await worker.say(encode(Beat("decode-0", "i", Load())))
        await api.say(encode(ApiBeat("api-0")))
        time.sleep(1.5)  # noqa: ASYNC251  (the core's loop is this one: it stands still)
        await asyncio.sleep(0.1)
        assert server.core.counters["workers_lost"] == 0
        assert server.core.counters["apis_lost"] == 0


async def test_a_peer_that_is_gone_costs_nothing(context: zmq.Context[Any]) -> None:
    async with serving(context, limits=Limits(queue_s=0.3)) as (server, task):
        api = Peer(context, server.address)
        await api.say(encode(Hello("api-0")))
        await api.hear(Welcome)
        await api.say(encode(Submit("api-0", "r", 1, 10, 10)))
        await asyncio.sleep(0.1)
        api.socket.close()
        await asyncio.sleep(0.6)
        assert server.core.counters["sends_failed"] == 1
        assert not task.done()


# --- API processes -----------------------------------------------------------------------------

STANDIN = """#!{python}
import json, os, sys, time
start = json.loads(sys.stdin.buffer.read())
path = os.path.join({folder!r}, f"{{start['index']}}-{{os.getpid()}}")
with open(path, "w") as file:
    json.dump(start, file)
os.rename(path, os.path.join(os.path.dirname(path), "started-" + os.path.basename(path)))
time.sleep(60)
"""


@pytest.fixture
def standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Instead of an API process starts a script that notes its start in this folder."""
    script = tmp_path / "python"
    script.write_text(STANDIN.format(python=sys.executable, folder=str(tmp_path)))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return tmp_path


def starts(folder: Path, count: int) -> list[dict[str, object]]:
    deadline_s = time.monotonic() + WAIT_S
    while len(found := sorted(folder.glob("started-*"))) < count:
        assert time.monotonic() < deadline_s, found
        time.sleep(0.02)
    return [msgspec.json.decode(path.read_bytes()) for path in found]


def slots(apis: ApiProcesses) -> list[int]:
    assert apis.loads.buf is not None
    view = apis.loads.buf.cast("i")
    values = list(view[: apis.config.api_servers])
    view.release()
    return values


def test_several_api_processes_share_socket_loads_and_metrics(standin: Path) -> None:
    apis = ApiProcesses(config(api_servers=3, api_keys=["secret"]))
    assert apis.metrics_dir is not None
    metrics = Path(apis.metrics_dir.name)
    try:
        apis.start()
        found = starts(standin, 3)
        assert [start["index"] for start in found] == [0, 1, 2]
        assert {start["loads_name"] for start in found} == {apis.loads.name}
        assert {start["metrics_dir"] for start in found} == {str(metrics)}
        assert slots(apis) == [NOT_ACCEPTING] * 3
        for process in apis.processes.values():
            assert b"secret" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    finally:
        apis.stop()
    assert not metrics.exists()
    assert all(process.poll() is not None for process in apis.processes.values())


def test_one_api_process_keeps_its_metrics_to_itself(standin: Path) -> None:
    apis = ApiProcesses(config())
    try:
        apis.start()
        (start,) = starts(standin, 1)
        assert not start.get("metrics_dir")
    finally:
        apis.stop()


def serves(apis: ApiProcesses, index: int) -> None:
    """An API process has begun to take connections."""
    assert apis.loads.buf is not None
    subject.LOAD.pack_into(apis.loads.buf, subject.LOAD.size * index, 0)


async def test_an_api_process_that_dies_is_replaced_and_its_traces_go(standin: Path) -> None:
    apis = ApiProcesses(config(api_servers=2))
    assert apis.metrics_dir is not None
    watching = None
    try:
        apis.start()
        await asyncio.to_thread(starts, standin, 2)
        dead, other = apis.processes[1].pid, apis.processes[0].pid
        gauges = [Path(apis.metrics_dir.name) / f"gauge_livesum_{pid}.db" for pid in (dead, other)]
        counter = Path(apis.metrics_dir.name) / f"counter_{dead}.db"
        for path in (*gauges, counter):
            path.touch()
        serves(apis, 1)
        watching = asyncio.create_task(apis.watch())
        os.kill(dead, signal.SIGKILL)
        await asyncio.to_thread(starts, standin, 3)
        assert apis.processes[1].pid != dead
        assert slots(apis) == [NOT_ACCEPTING] * 2
        assert [path.exists() for path in gauges] == [False, True]
        assert counter.exists(), "what it has served stays served"
    finally:
        if watching is not None:
            watching.cancel()
        apis.stop()


async def test_an_api_process_that_dies_again_and_again_ends_the_coordinator(
    standin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "API_RESTARTS_MAX", 0)
    apis = ApiProcesses(config())
    try:
        apis.start()
        serves(apis, 0)
        apis.processes[0].kill()
        with pytest.raises(RuntimeError, match="restart 1 of at most 0"):
            await asyncio.wait_for(apis.watch(), WAIT_S)
    finally:
        apis.stop()


async def test_an_api_process_that_can_not_start_ends_the_coordinator(standin: Path) -> None:
    apis = ApiProcesses(config())
    try:
        apis.start()
        apis.processes[0].kill()
        with pytest.raises(RuntimeError, match="API process 0 ended with code -9"):
            await asyncio.wait_for(apis.watch(), WAIT_S)
    finally:
        apis.stop()


def test_a_taken_port_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        subject.listen("127.0.0.1", taken.getsockname()[1])

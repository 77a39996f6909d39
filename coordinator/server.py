"""The core's process: one socket and one store around ``Core``, and API processes beside it.

Reads the clock, moves frames, carries out what the core says. Decides nothing, imports
no vLLM and no GPU library.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing import shared_memory
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import msgspec
import uvloop
import zmq

from coordinator import protocol
from coordinator.collecting import rare_collections
from coordinator.core import Core, Send
from coordinator.limits import Limits, Placement
from coordinator.link import BAD_FRAME, GarbageCounter
from coordinator.sockets import make_socket
from coordinator.store import Store
from coordinator.workflow.graph import Graph
from coordinator.workflow.limits import WorkflowLimits

logger = logging.getLogger("pythia.coordinator")

TICK_S_MAX = 0.5
LEARNED_S = 0.4
"""How often what was learned is written down, give or take a tick."""
TICK_S_MIN = 0.01
MESSAGES_PER_TICK_MAX = 10_000
MESSAGES_PER_KEEP = 128
"""After how many messages in a row what they change is looked at, to be written down."""
API_STOP_S = 15.0
API_RESTARTS_MAX = 10
NOT_ACCEPTING = 2**31 - 1
LOAD = struct.Struct("i")
"""One API process's slot in the memory they share: its connections, as vLLM's server counts, and
``NOT_ACCEPTING`` until it serves."""


class CoordinatorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that the coordinator's processes need to know.

    ``engine`` and ``api_arguments`` are vLLM's engine arguments and API server options;
    ``environment`` is set in the API processes before vLLM is imported. ``workflows``: those of
    the cluster's file, by name; ``store``: the file that keeps others and what is learned, empty
    for none.
    """

    control_address: str
    api_host: str
    api_port: int
    model: str
    api_servers: int = 1
    api_keys: list[str] = msgspec.field(default_factory=list)
    api_arguments: dict[str, object] = msgspec.field(default_factory=dict)
    body_bytes_max: int = 32 * 1024 * 1024
    served_model_name: list[str] = msgspec.field(default_factory=list)
    engine: dict[str, object] = msgspec.field(default_factory=dict)
    limits: Limits = Limits()
    placement: Placement = Placement()
    environment: dict[str, str] = msgspec.field(default_factory=dict)
    workflows: dict[str, Graph] = msgspec.field(default_factory=dict)
    workflow_limits: WorkflowLimits = WorkflowLimits()
    store: str = ""
    admin_keys: list[str] = msgspec.field(default_factory=list)
    """If there are any, changing roles of workers needs one of them; they are API keys, too."""


class ApiStart(msgspec.Struct, frozen=True):
    """What an API process reads from its standard input at start."""

    config: CoordinatorConfig
    index: int
    listen_fd: int
    loads_name: str
    metrics_dir: str = ""


class ApiProcess(Protocol):
    """What is needed of a started process; ``subprocess.Popen`` has it."""

    pid: int

    def poll(self) -> int | None:
        """The exit code; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end. ``subprocess.TimeoutExpired`` after ``timeout`` seconds."""

    def terminate(self) -> None:
        """Asks it to end."""

    def kill(self) -> None:
        """Ends it."""


StartProcess = Callable[[Sequence[str], int, int], ApiProcess]
"""Starts a command line as a child. The open files of these numbers are its standard input
and one that it inherits under the same number."""


def start_fresh(command: Sequence[str], stdin: int, inherited: int) -> ApiProcess:
    """Starts a fresh program."""
    return subprocess.Popen(command, stdin=stdin, pass_fds=[inherited])


class CoreServer:
    """The control socket around a ``Core``."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], config: CoordinatorConfig) -> None:
        self.core = Core(
            config.limits,
            config.placement,
            core_id=uuid.uuid4().hex,
            model=config.model,
            workflow_limits=config.workflow_limits,
            keeps=bool(config.store),
            epoch_s=time.time() - time.monotonic(),
        )
        for name, graph in config.workflows.items():
            self.core.fix_workflow(name, graph)
        self.store = Store(Path(config.store)) if config.store else None
        if self.store is not None:
            for problem in self.core.restore(self.store.kept(), time.monotonic()):
                logger.error("%s: not taken over: %s", config.store, problem)
        self._loop = asyncio.get_running_loop()
        self._learning_kept = True
        self._learned_s = time.monotonic()
        self.garbage = GarbageCounter("a peer on the control socket")
        self.socket = make_socket(context, zmq.ROUTER)
        self.socket.raw.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.address = self.socket.bind(config.control_address)

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            await self.socket.wait(self._wait_s())
            self._receive_waiting()
            # Only now: after a pause of ours, what peers have said meanwhile proves them alive.
            self._send(self.core.tick(time.monotonic()))
            self._keep()
            self.core.foresee(time.monotonic())
            await asyncio.sleep(0)

    def close(self) -> None:
        """Let go of the socket and, when all is written, of the store."""
        self.socket.close()
        if self.store is not None:
            self.store.write(self.core.take_learned(everything=True), lambda failure: None)
            self.store.close()

    def _keep(self) -> None:
        """Have written down what the core wants to be kept: at once what somebody waits for, what
        was learned twice a second."""
        if self.store is None:
            return
        saves = self.core.take_saves()
        if saves:
            count = len(saves)
            self.store.write(saves, lambda failure: self._post(self._tell, count, failure))
        now_s = time.monotonic()
        if self._learning_kept and now_s - self._learned_s >= LEARNED_S:
            self._learned_s = now_s
            learned = self.core.take_learned()
            if learned:
                self._learning_kept = False
                self.store.write(learned, lambda failure: self._post(self._learned, failure))

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        """On the store's thread: have something done on the core's."""
        with suppress(RuntimeError):  # The loop is closed: nobody is there any more.
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _learned(self, failure: Exception | None) -> None:
        self._learning_kept = True
        if failure is not None:
            self.core.learned_lost()

    def _tell(self, count: int, failure: Exception | None) -> None:
        error = f"it could not be written: {failure}" if failure is not None else ""
        self._send(self.core.saved(count, error, time.monotonic()))

    def _wait_s(self) -> float:
        """How long nothing is to be done but to listen."""
        deadline_s = self.core.next_deadline_s()
        wait_s = TICK_S_MAX if deadline_s is None else deadline_s - time.monotonic()
        return min(max(wait_s, TICK_S_MIN), TICK_S_MAX)

    def _receive_waiting(self) -> None:
        for number in range(MESSAGES_PER_TICK_MAX):
            frames = self.socket.receive_now()
            if frames is None:
                return
            self._on_frames(frames)
            if number % MESSAGES_PER_KEEP == MESSAGES_PER_KEEP - 1:
                self._keep()

    def _on_frames(self, frames: list[zmq.Frame]) -> None:
        if len(frames) != 2:
            self._drop(ValueError(f"{len(frames)} frames"))
            return
        try:
            message = protocol.decode_to_core(frames[1].buffer)
        except BAD_FRAME as error:
            self._drop(error)
            return
        self._send(self.core.handle(frames[0].bytes, message, time.monotonic()))

    def _drop(self, error: Exception) -> None:
        self.garbage.add(error)
        self.core.counters["garbage_frames"] = self.garbage.total

    def _send(self, commands: Iterable[Send]) -> None:
        for command in commands:
            message = command.message
            if isinstance(message, protocol.Snapshot):
                # Only here is there a clock to look at.
                message = msgspec.structs.replace(message, unix_time_s=time.time())
            if not self.socket.post([command.peer, protocol.encode(message)]):
                # The peer is gone or stuck; its missed beats will tell the core.
                self.core.counters["sends_failed"] = self.core.counters.get("sends_failed", 0) + 1


class ApiProcesses:
    """The API processes: started on one listening socket, restarted when they die."""

    def __init__(
        self, config: CoordinatorConfig, start_process: StartProcess = start_fresh
    ) -> None:
        self.config = config
        self._start_process = start_process
        self.metrics_dir = metrics_directory(config.api_servers)
        self.listener = listen(config.api_host, config.api_port)
        self.loads = shared_memory.SharedMemory(create=True, size=LOAD.size * config.api_servers)
        self.processes: dict[int, ApiProcess] = {}
        self.started_s: dict[int, float] = {}
        self.served: set[int] = set()
        """Those that have got so far that another start is worth while."""
        self.restarts = 0

    def start(self) -> None:
        """Start all of them."""
        for index in range(self.config.api_servers):
            self._start(index)

    def _start(self, index: int) -> None:
        # Until it says otherwise; its predecessor's last word would keep others waiting.
        assert self.loads.buf is not None
        LOAD.pack_into(self.loads.buf, LOAD.size * index, NOT_ACCEPTING)
        start = ApiStart(
            config=msgspec.structs.replace(self.config, workflows={}, store=""),
            index=index,
            listen_fd=self.listener.fileno(),
            loads_name=self.loads.name,
            metrics_dir=self.metrics_dir.name if self.metrics_dir else "",
        )
        reading, writing = os.pipe()
        with open(reading, "rb"), open(writing, "wb") as stdin:
            command = [sys.executable, "-m", "coordinator.api"]
            process = self._start_process(command, reading, self.listener.fileno())
            stdin.write(msgspec.json.encode(start))
        self.processes[index] = process
        self.served.discard(index)
        self.started_s[index] = time.monotonic()

    async def watch(self) -> None:
        """Restart API processes that die; raise if one dies before it serves, or too often."""
        while True:
            await asyncio.sleep(0.5)
            for index, process in list(self.processes.items()):
                code = process.poll()
                if self._is_accepting(index):
                    self.served.add(index)
                if code is None:
                    continue
                lived_s = time.monotonic() - self.started_s[index]
                self.restarts += 1
                self._forget_metrics(process.pid)
                if index not in self.served or self.restarts > API_RESTARTS_MAX:
                    raise RuntimeError(
                        f"API process {index} ended with code {code} after {lived_s:.0f} s "
                        f"(restart {self.restarts} of at most {API_RESTARTS_MAX})"
                    )
                logger.error("API process %d ended with code %d: starting another", index, code)
                self._start(index)

    def _is_accepting(self, index: int) -> bool:
        assert self.loads.buf is not None
        load: int = LOAD.unpack_from(self.loads.buf, LOAD.size * index)[0]
        return load != NOT_ACCEPTING

    def _forget_metrics(self, pid: int) -> None:
        """Gauges of a process count while it lives; what it has counted stays."""
        if self.metrics_dir is not None:
            for gauge in Path(self.metrics_dir.name).glob(f"gauge_live*_{pid}.db"):
                gauge.unlink()

    def stop(self) -> None:
        """Ask them to end, wait, end them."""
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        deadline_s = time.monotonic() + API_STOP_S
        for process in self.processes.values():
            try:
                process.wait(max(0.1, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.warning("API process %d did not end in time: killed", process.pid)
                process.kill()
                process.wait()
        self.listener.close()
        self.loads.close()
        self.loads.unlink()
        if self.metrics_dir is not None:
            self.metrics_dir.cleanup()


def metrics_directory(api_servers: int) -> TemporaryDirectory[str] | None:
    """Where several API processes keep their metrics, so that each can show the sum of all."""
    return TemporaryDirectory(prefix="pythia-metrics-") if api_servers > 1 else None


def listen(host: str, port: int) -> socket.socket:
    """A bound TCP socket that API processes inherit. OSError if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.set_inheritable(True)
    return sock


def main(config: CoordinatorConfig, start_process: StartProcess = start_fresh) -> int:
    """Run the core and its API processes until SIGTERM or SIGINT. Returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    with rare_collections():
        code: int = uvloop.run(_serve(config, start_process))
    return code


async def _serve(config: CoordinatorConfig, start_process: StartProcess) -> int:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    server = CoreServer(context, config)
    apis = ApiProcesses(config, start_process)
    logger.info(
        "core listens on %s, API on %s:%d", server.address, config.api_host, config.api_port
    )
    try:
        apis.start()
        tasks = {
            asyncio.create_task(server.run(), name="core"),
            asyncio.create_task(apis.watch(), name="API processes"),
            asyncio.create_task(stopping.wait(), name="signal"),
        }
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        for task in done:
            if (error := task.exception()) is not None:
                logger.error("%s failed", task.get_name(), exc_info=error)
                return 1
        return 0
    finally:
        await loop.run_in_executor(None, apis.stop)
        server.close()
        context.destroy(linger=0)

"""What the end-to-end suites need to know about a running server.

``Server`` is any OpenAI-compatible server: the cluster under test or the plain vLLM
server that serves as the oracle. ``Control`` speaks to the cluster's core as anybody
may who can reach its control socket: it looks (``Inspect``) and, for the suites about
bad input, says what it should not. Nothing here knows how a cluster is started.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import zmq
from prometheus_client.parser import text_string_to_metric_families

from cluster.process import die_with_parent
from coordinator import protocol
from coordinator.protocol import CallStatus, Hello, Inspect, Snapshot, WorkerUp

BLOCK_TOKENS = 32
MAX_MODEL_LEN = 2048
REMOTE_MIN_TOKENS = 96
"""Prompts of at least this many uncached tokens go through the prefill worker."""
BODY_BYTES_MAX = 1024 * 1024
API_KEY = "secret-of-the-suite"
MODEL = "tiny-llama"
START_S = 300.0
BEATS_S = 3.0
"""Longest time until the core has heard of everything that a worker has done."""
QUEUE_S = 20.0
"""How long a call waits for a worker before it is refused."""

T = TypeVar("T")


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server. ``base_url`` is without ``/v1``.

    ``control_address`` is the core's, empty where there is none. ``log_dir`` holds one log
    file per process and ``pids`` the workers' process ids by name; both are known only where
    the suite started the server.
    """

    base_url: str
    api_key: str
    model: str
    control_address: str = ""
    log_dir: Path | None = None
    pids: Mapping[str, int] = field(default_factory=dict)

    def http(self, timeout_s: float = 120.0) -> httpx.Client:
        """A plain HTTP client that sends the API key."""
        headers = {"Authorization": f"Bearer {self.api_key}"}
        return httpx.Client(base_url=self.base_url, headers=headers, timeout=timeout_s)


class Control:
    """A peer on the cluster's control socket."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self._token = 0

    def close(self) -> None:
        """Leaves; what was not sent yet is lost."""
        self._socket.close()

    def send(self, *frames: bytes) -> None:
        """Sends raw frames as one message."""
        self._socket.send_multipart(frames)

    def receive(self, timeout_s: float) -> bytes | None:
        """The next frame from the core; None if nothing came in time."""
        if not self._socket.poll(int(timeout_s * 1000)):
            return None
        return bytes(self._socket.recv_multipart()[-1])

    def snapshot(self, timeout_s: float = 10.0) -> Snapshot:
        """What the core sees now. TimeoutError if it does not answer."""
        self._token += 1
        self.send(protocol.encode(Inspect(token=self._token)))
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            frame = self.receive(left_s)
            if frame is None:
                break
            message = protocol.decode_core_to_api(frame)
            if isinstance(message, Snapshot) and message.token == self._token:
                return message
        raise TimeoutError(f"no snapshot from the core within {timeout_s} s")

    def data_addresses(self, timeout_s: float = 10.0) -> dict[str, str]:
        """Each worker's data address by its name, as an API process is told.

        Registers an API process that never beats, so the core soon forgets it.
        """
        self.send(protocol.encode(Hello(api=f"suite-{uuid.uuid4().hex}")))
        with contextlib.closing(Control(self._address)) as other:
            expected = len(other.snapshot().workers)
        addresses: dict[str, str] = {}
        deadline_s = time.monotonic() + timeout_s
        while len(addresses) < expected and time.monotonic() < deadline_s:
            frame = self.receive(deadline_s - time.monotonic())
            if frame is None:
                break
            message = protocol.decode_core_to_api(frame)
            if isinstance(message, WorkerUp):
                addresses[message.worker] = message.data_address
        return addresses

    def find_call(self, request_id: str, timeout_s: float = 5.0) -> CallStatus:
        """The ended call whose id contains ``request_id``. TimeoutError if there is none."""

        def ended() -> CallStatus | None:
            for call in self.snapshot().calls:
                if request_id in call.request and call.outcome:
                    return call
            return None

        return wait_for(ended, timeout_s, f"call {request_id}")

    def wait_until_quiet(self, timeout_s: float = 60.0) -> Snapshot:
        """Waits until nothing runs, waits or is held anywhere; AssertionError with the rest."""
        deadline_s = time.monotonic() + timeout_s
        while rest := unrest(snapshot := self.snapshot()):
            assert time.monotonic() < deadline_s, f"still not quiet after {timeout_s} s: {rest}"
            time.sleep(0.3)
        return snapshot


def unrest(snapshot: Snapshot) -> list[str]:
    """Everything in the cluster that a quiet one has not got, in words."""
    rest = [f"{snapshot.active} active calls"] if snapshot.active else []
    rest += [f"{snapshot.queued} queued calls"] if snapshot.queued else []
    for worker in snapshot.workers:
        held = {
            "running": worker.load.running,
            "waiting": worker.load.waiting,
            "KV blocks used": worker.load.kv_blocks_used,
            "calls": worker.calls,
            "KV blocks reserved": worker.kv_blocks_reserved,
            "handles": worker.handles,
        }
        rest += [f"{worker.worker}: {count} {what}" for what, count in held.items() if count]
    for link in snapshot.links:
        if link.in_flight_bytes:
            rest.append(f"{link.in_flight_bytes} bytes from {link.source} to {link.target}")
    return rest


def wait_for(probe: Callable[[], T | None], timeout_s: float, what: str) -> T:
    """Polls until ``probe`` gives something true. TimeoutError naming ``what`` otherwise."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := probe()):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{what}: not within {timeout_s} s")
        time.sleep(0.1)
    return found


def decode_totals(snapshot: Snapshot) -> tuple[int, int]:
    """Prompt tokens that the decode workers pulled from peers, and that they computed."""
    loads = [worker.load for worker in snapshot.workers if worker.role == "decode"]
    return (
        sum(load.external_tokens_total for load in loads),
        sum(load.prefill_tokens_total for load in loads),
    )


def prompt_tokens_by_source(metrics_urls: list[str]) -> Counter[str]:
    """vLLM's own count of prompt tokens by where their KV came from, over several engines."""
    totals: Counter[str] = Counter()
    for url in metrics_urls:
        page = httpx.get(url, timeout=30.0).text
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name == "vllm:prompt_tokens_by_source_total":
                    totals[sample.labels["source"]] += int(sample.value)
    return totals


def command_line(arguments: dict[str, Any]) -> list[str]:
    """vLLM's command line for arguments as a cluster file gives them."""
    words = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, dict | list):
            words += [flag, json.dumps(value)]
        else:
            words += [flag, str(value)]
    return words


@contextlib.contextmanager
def started(command: list[str], environment: dict[str, str], log: Path) -> Iterator[int]:
    """Runs a program in a session of its own, its output in ``log``; ends all of it after."""
    parent = os.getpid()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(parent),
        )
    try:
        yield process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_healthy(base_url: str, pid: int, log: Path, timeout_s: float = START_S) -> None:
    """Waits for ``/health``; RuntimeError with the end of the log if the server dies."""

    def healthy() -> bool | None:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            tail = log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"the server of {log} exited:\n{tail}")
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{base_url}/health", timeout=2.0).status_code == 200
        return None

    wait_for(healthy, timeout_s, f"health of {base_url}")

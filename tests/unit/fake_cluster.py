"""A cluster of real processes whose workers are fake, and clients that check what it says.

The core and the API processes are the product's own; the workers are all of a worker but its
engine. What that says depends on a token's place and the request's seed alone, so every
stream's tokens are known beforehand, wherever and on how many workers they were made.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil

from cluster import fake_worker
from cluster.bench.sides import cluster_config
from cluster.fake_engine import token_at
from cluster.launch import COORDINATOR, LocalCluster, process_command
from cluster.model_tiny import VOCABULARY
from cluster.schema import ApiEntry
from cluster.template import TEMPLATE
from coordinator.limits import Limits, Placement
from coordinator.protocol import CallStatus

MODEL = "tiny-llama"
API_SERVERS = 2
STEP_S = 0.02
"""From one token of a stream to the next."""
LIMITS = Limits(beat_s=0.5, beats_missed=6)
WAIT_S = 60.0
MARK = ": pythia"


@contextlib.contextmanager
def running(
    log_dir: Path,
    roles: Sequence[str] = ("decode", "decode"),
    servers: int = API_SERVERS,
    placement: Placement = Placement(),  # noqa: B008, frozen
) -> Iterator[LocalCluster]:
    """``servers`` API processes on one port, and a worker of each of the ``roles``."""
    config = cluster_config(
        "fake",
        MODEL,
        roles,
        api=ApiEntry(port=0, servers=servers),
        limits=LIMITS,
        placement=placement,
    )
    with LocalCluster(config, log_dir, command_of=_command_of) as cluster:
        yield cluster


def _command_of(name: str, config_path: Path) -> list[str]:
    if name == TEMPLATE:
        return []
    if name == COORDINATOR:
        return process_command(name, config_path)
    return fake_worker.command(config_path, name, "--step-s", str(STEP_S))


def api_processes(cluster: LocalCluster) -> list[int]:
    """Their process ids."""
    children = psutil.Process(cluster.processes[COORDINATOR]).children()
    return [child.pid for child in children if "coordinator.api" in child.cmdline()]


def served_by(cluster: LocalCluster) -> dict[int, int]:
    """The API process at the other end of each open connection, by the client's port."""
    owners = {}
    for pid in api_processes(cluster):
        for connection in psutil.Process(pid).net_connections("tcp"):
            if connection.raddr and connection.laddr.port == cluster.config.api.port:
                owners[connection.raddr.port] = pid
    return owners


def port_of(response: httpx.Response) -> int:
    """The client's own port of the connection that a response comes over."""
    port: int = response.extensions["network_stream"].get_extra_info("client_addr")[1]
    return port


async def live_call(cluster: LocalCluster, name: str, asked: asyncio.Task[object]) -> CallStatus:
    """The call whose request id holds ``name``, as soon as it decodes, while ``asked`` runs."""
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        assert not asked.done(), asked
        snapshot = await asyncio.to_thread(cluster.snapshot)
        for call in snapshot.calls:
            if name in call.request and call.phase == "decoding":
                return call
        await asyncio.sleep(0.1)
    raise TimeoutError(f"{name} does not decode")


@contextlib.asynccontextmanager
async def client_of(cluster: LocalCluster) -> AsyncIterator[httpx.AsyncClient]:
    """A client that opens a connection for every request and closes it afterwards."""
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=cluster.base_url, limits=limits, timeout=WAIT_S
    ) as client:
        yield client


@dataclass
class Chat:
    """One streaming chat and what has come of it."""

    seed: int
    tokens_asked: int
    temperature: float = 0.0
    name: str = ""
    tokens: list[int] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)
    """Comments in the stream, with the tokens that came before each."""
    port: int = 0
    error: httpx.TransportError | None = None
    _prompt_tokens: int = 0
    _finish: str | None = None
    _done: bool = False
    _begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, client: httpx.AsyncClient) -> None:
        """Send it and read the answer to its end, or to where the connection is cut."""
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "word " * (1 + self.seed)}],
            "max_tokens": self.tokens_asked,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        headers = {"X-Request-Id": self.name} if self.name else {}
        path = "/v1/chat/completions"
        try:
            async with client.stream("POST", path, json=body, headers=headers) as response:
                assert response.status_code == 200, await response.aread()
                self.port = port_of(response)
                async for line in response.aiter_lines():
                    self._read(line)
        except httpx.TransportError as error:
            self.error = error

    async def begun(self) -> None:
        """Wait for the first token."""
        await asyncio.wait_for(self._begun.wait(), WAIT_S)

    def check(self) -> None:
        """The whole answer came, and it is right."""
        assert self.error is None, self.error
        assert (self._finish, self._done) == ("length", True)
        places = range(self._prompt_tokens, self._prompt_tokens + self.tokens_asked)
        assert self.tokens == [token_at(place, self.seed, VOCABULARY) for place in places]

    def _read(self, line: str) -> None:
        if line.startswith(MARK):
            self.marks.append((len(self.tokens), line))
        elif line == "data: [DONE]":
            self._done = True
        elif line:
            self._read_event(msgspec.json.decode(line.removeprefix("data: ")))

    def _read_event(self, event: Any) -> None:
        assert "error" not in event, event
        if usage := event.get("usage"):
            self._prompt_tokens = usage["prompt_tokens"]
        for choice in event["choices"]:
            self.tokens += choice.get("token_ids") or []
            self._finish = choice["finish_reason"] or self._finish
        if self.tokens:
            self._begun.set()

"""Workers that do not belong, and workers that are killed. Runs last: it kills the shared ones."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from cluster.process import ProcessIdentity, identify, is_running, session_members
from coordinator import protocol
from coordinator.protocol import EngineFacts, Hello, Ready, Refused, Welcome
from tests.e2e.harness import MODEL, Control, Server, wait_for

SEED = 20_250_731
ENDS_S = 90.0
"""Longest time in which a call whose worker was killed must have ended."""
NOTICED_S = 30.0


@pytest.fixture
def stranger(cluster: Server) -> Iterator[Control]:
    """A peer that the core has not seen before."""
    if not cluster.control_address:
        pytest.skip("PYTHIA_E2E_CONTROL does not say where the core is")
    with contextlib.closing(Control(cluster.control_address)) as peer:
        yield peer


def answer_to(peer: Control, message: protocol.Message) -> Refused | Welcome:
    """What the core says to somebody who introduces himself."""
    peer.send(protocol.encode(message))
    frame = peer.receive(10.0)
    assert frame is not None, "no answer"
    answer = protocol.decode_core_to_worker(frame)
    assert isinstance(answer, Refused | Welcome)
    return answer


@pytest.fixture
def real_facts(cluster: Server, stranger: Control) -> EngineFacts:
    """What the engines of this cluster are, as an API process is told."""
    with contextlib.closing(Control(cluster.control_address)) as api:
        api.send(protocol.encode(Hello(api=f"facts-{random.random()}")))
        while (frame := api.receive(10.0)) is not None:
            message = protocol.decode_core_to_api(frame)
            if isinstance(message, protocol.WorkerUp):
                return message.facts
    raise AssertionError("the core named no worker")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vllm_version": "0.0.1"}, "0.0.1"),
        ({"model": "another", "model_fingerprint": "0123456789abcdef"}, "model"),
        ({"block_size": 48}, "block size"),
    ],
    ids=["version", "model", "blocks"],
)
def test_unlike_worker_is_refused(
    stranger: Control, control: Control, real_facts: EngineFacts, change: Any, reason: str
) -> None:
    before = [worker.worker for worker in control.snapshot().workers]
    ready = Ready(
        worker="impostor",
        incarnation="impostor-1",
        role="decode",
        data_address="tcp://127.0.0.1:9",
        facts=msgspec.structs.replace(real_facts, **change),
    )
    answer = answer_to(stranger, ready)
    assert isinstance(answer, Refused)
    assert reason in answer.reason
    assert [worker.worker for worker in control.snapshot().workers] == before


def test_other_protocols_are_refused(
    stranger: Control, cluster: Server, real_facts: EngineFacts
) -> None:
    ready = Ready("old", "old-1", "decode", "tcp://127.0.0.1:9", real_facts, protocol_version=99)
    answer = answer_to(stranger, ready)
    assert isinstance(answer, Refused)
    assert "99" in answer.reason
    with contextlib.closing(Control(cluster.control_address)) as api:
        refusal = answer_to(api, Hello(api="old-api", protocol_version=99))
    assert isinstance(refusal, Refused)


def family(pid: int) -> list[ProcessIdentity]:
    """A worker's process and everything that it started, whichever session that is in."""
    found = {pid}
    while True:
        parents = {int(entry.name): _parent(entry) for entry in Path("/proc").glob("[0-9]*")}
        grown = found | {child for child, parent in parents.items() if parent in found}
        grown |= {member for known in grown for member in session_members(known)}
        if grown == found:
            break
        found = grown
    return [identity for member in sorted(found) if (identity := identify(member))]


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def kill_worker(cluster: Server, control: Control, name: str) -> None:
    """Kills it without warning; all of its processes must be gone, and the core must notice."""
    members = family(cluster.pids[name])
    assert len(members) >= 2, "an engine has more than one process"
    os.kill(cluster.pids[name], signal.SIGKILL)
    wait_for(lambda: not any(map(is_running, members)), NOTICED_S, f"the end of {name}'s children")
    wait_for(
        lambda: name not in {w.worker for w in control.snapshot().workers if w.state == "up"},
        NOTICED_S,
        f"the core's notice of {name}'s end",
    )


def body_of(dice: random.Random, tokens: int, output: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": [dice.randrange(300, 3000) for _ in range(tokens)],
        "max_tokens": output,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


@dataclass
class Answer:
    """A whole streamed answer. ``decode``: who began it; ``marks``: comments between its events,
    each with the number of tokens that came before."""

    tokens: list[int] = field(default_factory=list)
    decode: str = ""
    marks: list[tuple[int, str]] = field(default_factory=list)


async def answer_of(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """The answer, streamed; AssertionError unless it ends with a finish reason."""
    answer = Answer()
    finish = None
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        answer.decode = response.headers.get("X-Pythia-Decode", "")
        async for line in response.aiter_lines():
            if line.startswith(":"):
                answer.marks.append((len(answer.tokens), line))
            elif line.startswith("data: {"):
                chunk = msgspec.json.decode(line[6:])
                assert "error" not in chunk, chunk
                for choice in chunk["choices"]:
                    answer.tokens += choice["token_ids"] or []
                    finish = choice["finish_reason"] or finish
    assert finish == "length"
    return answer


async def token_ids(client: httpx.AsyncClient, body: dict[str, Any]) -> list[int]:
    """The whole answer's tokens, streamed."""
    return (await answer_of(client, body)).tokens


@contextlib.asynccontextmanager
async def client_of(server: Server) -> Any:
    headers = {"Authorization": f"Bearer {server.api_key}"}
    async with httpx.AsyncClient(
        base_url=server.base_url, headers=headers, timeout=ENDS_S
    ) as client:
        yield client


async def test_streams_go_on_when_their_decode_worker_is_killed(
    cluster: Server, oracle: Server, control: Control
) -> None:
    """Greedy streams continue on the other worker; nobody can tell from the tokens, but the
    stream says it in a comment. A seeded one goes on, too, with other random numbers."""
    dice = random.Random(SEED)
    bodies = [body_of(dice, tokens, 150) for tokens in (20, 60, 400, 700, 30, 900)]
    seeded = [body_of(dice, 40, 150) | {"temperature": 1.0, "seed": seed} for seed in (1, 2)]
    async with client_of(oracle) as client:
        expected = [await token_ids(client, body) for body in bodies]
    async with client_of(cluster) as client, asyncio.timeout(ENDS_S):
        running = [asyncio.create_task(answer_of(client, body)) for body in bodies + seeded]
        victim = await asyncio.to_thread(_busy_decode_worker, control)
        await asyncio.to_thread(kill_worker, cluster, control, victim)
        answers = await asyncio.gather(*running)
        assert (await client.get("/ready")).status_code == 200
    assert [answer.tokens for answer in answers[: len(bodies)]] == expected
    assert sum(len(answer.marks) for answer in answers) >= 2
    for number, answer in enumerate(answers):
        assert len(answer.tokens) == 150
        for tokens, mark in answer.marks:
            assert answer.decode == victim
            restarted = ", sampling restarted" if number >= len(bodies) else ""
            other = {"decode-0": "decode-1", "decode-1": "decode-0"}[victim]
            assert mark == f": pythia continued on {other} after {tokens} tokens{restarted}"
    await asyncio.to_thread(control.wait_until_quiet)


def _busy_decode_worker(control: Control) -> str:
    """The name of a decode worker that has begun to decode several calls."""

    def busy() -> str | None:
        for worker in control.snapshot().workers:
            decoding = [
                call
                for call in control.snapshot().calls
                if call.decode == worker.worker and call.phase == "decoding"
            ]
            if len(decoding) >= 2:
                return worker.worker
        return None

    return wait_for(busy, 30.0, "a decode worker with two streams")


async def test_without_prefill_workers_everything_is_local(
    cluster: Server, oracle: Server, control: Control
) -> None:
    """Calls whose prompt was being read by the killed worker are read elsewhere."""
    dice = random.Random(SEED + 1)
    bodies = [body_of(dice, tokens, 20) for tokens in (1500, 1600, 1700)]
    async with client_of(oracle) as client:
        expected = [await token_ids(client, body) for body in bodies]
    async with client_of(cluster) as client, asyncio.timeout(ENDS_S):
        running = [asyncio.create_task(token_ids(client, body)) for body in bodies]
        await asyncio.sleep(0.2)
        await asyncio.to_thread(kill_worker, cluster, control, "prefill-0")
        assert await asyncio.gather(*running) == expected
        response = await client.post("/v1/completions", json=body_of(dice, 500, 2))
    assert response.status_code == 200
    assert response.headers["X-Pythia-Prefill"] == response.headers["X-Pythia-Decode"]
    assert response.headers["X-Pythia-Moved-Tokens"] == "0"
    await asyncio.to_thread(control.wait_until_quiet)


async def test_without_workers_calls_are_refused_in_time(cluster: Server, control: Control) -> None:
    """The last worker goes: no hang, an honest answer, and the API stays alive."""
    (last,) = [worker.worker for worker in control.snapshot().workers if worker.state == "up"]
    async with client_of(cluster) as client, asyncio.timeout(ENDS_S):
        body = body_of(random.Random(SEED + 2), 30, 1500)
        running = asyncio.create_task(client.post("/v1/completions", json=body))
        await asyncio.sleep(1.0)
        await asyncio.to_thread(kill_worker, cluster, control, last)
        response = await running
        assert response.status_code == 503
        assert response.json()["error"]["code"] == 503
        assert (await client.get("/live")).status_code == 200
        assert (await client.get("/ready")).status_code == 503
    snapshot = control.snapshot()
    assert (snapshot.active, snapshot.queued) == (0, 0)

"""Workers of the live cluster turn, idle and busy, by request and by themselves, while it serves.

Every answer must be a plain engine's; none may fail or stall.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.harness import MODEL, Control, Server

STALL_S = 60.0
TURN_S = 180.0
LOOK_S = 0.05
PROMPTS = [" ".join(f"item{seed * at}" for at in range(1, 10 + 25 * seed)) for seed in range(1, 7)]
LENGTHS = (4, 40, 90)
SHORT, LONG = (1, 2), (90,)
ROLES = {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode"}


class Load:
    """Clients that compare every answer with the plain engine's."""

    def __init__(self, cluster: httpx.AsyncClient, oracle: httpx.AsyncClient) -> None:
        self._cluster, self._oracle = cluster, oracle
        self._expected: dict[tuple[str, int], str] = {}
        self._served = asyncio.Event()

    async def more(self, calls: int) -> None:
        """Wait until so many more are served. TimeoutError if none comes."""
        for _ in range(calls):
            self._served.clear()
            async with asyncio.timeout(STALL_S):
                await self._served.wait()

    async def prepare(self) -> None:
        """Ask the plain engine once for everything."""
        for prompt in PROMPTS:
            for tokens in {*LENGTHS, *SHORT, *LONG}:
                self._expected[prompt, tokens] = await answer(self._oracle, prompt, tokens)

    async def client(self, number: int, lengths: tuple[int, ...] = LENGTHS) -> None:
        """Calls for ever; whatever is wrong ends it."""
        while True:
            prompt = PROMPTS[number % len(PROMPTS)]
            tokens = lengths[number % len(lengths)]
            number += 1
            async with asyncio.timeout(STALL_S):
                found = await answer(self._cluster, prompt, tokens)
            assert found == self._expected[prompt, tokens]
            self._served.set()

    @contextlib.asynccontextmanager
    async def running(
        self, clients: int, lengths: tuple[int, ...] = LENGTHS
    ) -> AsyncIterator[None]:
        """So many clients; what went wrong with one of them is raised at the end."""
        tasks = [asyncio.create_task(self.client(number, lengths)) for number in range(clients)]
        try:
            yield
        finally:
            failed = [task for task in tasks if task.done()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in failed:
            task.result()


async def answer(http: httpx.AsyncClient, prompt: str, tokens: int) -> str:
    """A greedy completion."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0.0}
    response = await http.post("/v1/completions", json=body | {"ignore_eos": True})
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


@contextlib.asynccontextmanager
async def load_on(cluster: Server, oracle: Server) -> AsyncIterator[tuple[httpx.AsyncClient, Load]]:
    """Both servers, and a load that is ready."""
    headers = {"Authorization": f"Bearer {cluster.api_key}"}
    async with (
        httpx.AsyncClient(base_url=cluster.base_url, headers=headers, timeout=STALL_S) as ours,
        httpx.AsyncClient(
            base_url=oracle.base_url,
            headers={"Authorization": f"Bearer {oracle.api_key}"},
            timeout=STALL_S,
        ) as plain,
    ):
        load = Load(ours, plain)
        await load.prepare()
        yield ours, load


async def shown(http: httpx.AsyncClient) -> dict[str, Any]:
    response = await http.get("/v1/cluster/rebalance")
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def roles(http: httpx.AsyncClient) -> dict[str, str]:
    """By worker, with how far a turn is behind it."""
    return {one["worker"]: one["role"] + one["turning"] for one in (await shown(http))["workers"]}


async def turned(http: httpx.AsyncClient, worker: str, role: str) -> float:
    """Turn a worker; seconds until it has its role."""
    began_s = time.monotonic()
    response = await http.post(f"/v1/workers/{worker}/role", json={"role": role})
    assert response.status_code == 200, response.text
    while (await roles(http))[worker] != role:
        assert time.monotonic() - began_s < TURN_S, await shown(http)
        await asyncio.sleep(LOOK_S)
    return time.monotonic() - began_s


@pytest.fixture(autouse=True)
def as_before(cluster: Server, control: Control) -> Iterator[None]:
    """Other suites find every worker with its own role."""
    yield
    headers = {"Authorization": f"Bearer {cluster.api_key}"}
    with httpx.Client(base_url=cluster.base_url, headers=headers, timeout=30.0) as http:
        http.put("/v1/cluster/rebalance", json={"mode": "off"}).raise_for_status()
        until_s = time.monotonic() + TURN_S
        # One that has to come back may be the last of its kind until another one has.
        while {w.worker: w.role for w in control.snapshot().workers if not w.turning} != ROLES:
            assert time.monotonic() < until_s
            for name, role in ROLES.items():
                http.delete(f"/v1/workers/{name}/drain")
                http.post(f"/v1/workers/{name}/role", json={"role": role})
            time.sleep(0.2)


def test_an_idle_worker_turns_and_back(cluster: Server, oracle: Server) -> None:
    async def run() -> None:
        async with load_on(cluster, oracle) as (http, _):
            for role in ("prefill", "decode"):
                await turned(http, "decode-1", role)
                for prompt in PROMPTS[:2]:
                    expected = await answer(http, prompt, 8)
                    assert expected
            decisions = (await shown(http))["decisions"]
            assert [one["what"] for one in decisions[-2:]] == ["done", "done"]

    asyncio.run(run())


def test_busy_workers_turn_and_every_answer_is_right(cluster: Server, oracle: Server) -> None:
    async def run() -> None:
        async with load_on(cluster, oracle) as (http, load), load.running(4):
            await load.more(4)
            for worker in ("decode-0", "decode-1"):
                await turned(http, worker, "prefill")
                refused = await http.post("/v1/workers/nobody/role", json={"role": "decode"})
                assert refused.status_code == 404
                await turned(http, worker, "decode")
            # And it goes on.
            await load.more(4)

    asyncio.run(run())


def test_a_drained_worker_gets_nothing_and_others_serve(cluster: Server, oracle: Server) -> None:
    async def run() -> None:
        async with load_on(cluster, oracle) as (http, load), load.running(3):
            response = await http.post("/v1/workers/decode-0/drain")
            assert response.status_code == 200
            until_s = time.monotonic() + TURN_S
            while (await roles(http))["decode-0"] != "decodedrained":
                assert time.monotonic() < until_s
                await asyncio.sleep(LOOK_S)
            last = await http.post("/v1/workers/decode-1/drain")
            assert last.status_code == 409
            assert "no worker left for decode" in last.json()["error"]["message"]
            await load.more(4)
            assert (await http.delete("/v1/workers/decode-0/drain")).status_code == 200

    asyncio.run(run())


def test_the_ratio_follows_a_swing_of_the_mix_by_itself(cluster: Server, oracle: Server) -> None:
    async def until(http: httpx.AsyncClient, prefill: int) -> None:
        until_s = time.monotonic() + TURN_S
        while [*(await roles(http)).values()].count("prefill") != prefill:
            assert time.monotonic() < until_s, await shown(http)
            await asyncio.sleep(LOOK_S)

    async def run() -> None:
        async with load_on(cluster, oracle) as (http, load):
            settings = {"mode": "auto", "interval_s": 0.5, "dwell_s": 2.0, "margin": 0.01}
            put = await http.put("/v1/cluster/rebalance", json=settings | {"itl_s": 1.0})
            assert put.status_code == 200, put.text
            async with load.running(12, SHORT):
                await until(http, 2)
            # A promise that one worker cannot keep for so many answers.
            assert (await http.put("/v1/cluster/rebalance", json={"itl_s": 0.001})).is_success
            async with load.running(8, LONG):
                await until(http, 1)
            turns = [one for one in (await shown(http))["decisions"] if one["what"] == "turn"]
            assert {role for one in turns for role in one["turns"].values()} == {
                "prefill",
                "decode",
            }

    asyncio.run(run())

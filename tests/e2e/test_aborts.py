"""Clients that go away at any moment leave nothing behind.

Two hundred calls are cut off after a random part of the time that such a call takes: long
and short prompts, streams and not, one and several choices, alone and in company. After
them no engine has a request, no KV block is held, and the core knows of no call.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import httpx
import pytest

from tests.e2e.harness import MODEL, Control, Server

ABORTS = 200
COMPANY = 6
"""Calls in flight at a time."""
LEASE_S = 45.0
"""Longest time for which a prefill worker may hold blocks that nobody will read."""
SEED = 20_250_731
LONGEST_S = 120.0

KINDS: dict[str, dict[str, Any]] = {
    "local": {"tokens": 40, "max_tokens": 60},
    "remote": {"tokens": 700, "max_tokens": 40},
    "long": {"tokens": 1900, "max_tokens": 20},
    "choices": {"tokens": 300, "max_tokens": 30, "n": 3, "seed": 1},
}


def body_of(kind: str, dice: random.Random, stream: bool) -> dict[str, Any]:
    """A request of that kind with a prompt that no cache holds."""
    options = dict(KINDS[kind])
    prompt = [dice.randrange(300, 3000) for _ in range(options.pop("tokens"))]
    return {"model": MODEL, "prompt": prompt, "ignore_eos": True, "stream": stream, **options}


async def whole(client: httpx.AsyncClient, body: dict[str, Any]) -> float:
    """Makes the call to its end; returns how long it took in seconds."""
    started_s = time.monotonic()
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return time.monotonic() - started_s


async def cut_off(client: httpx.AsyncClient, body: dict[str, Any], after_s: float) -> bool:
    """Makes the call and closes its connection after a while; True if it was still going."""

    async def listen() -> None:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for _ in response.aiter_bytes():
                pass

    try:
        await asyncio.wait_for(listen(), after_s)
    except TimeoutError:
        return True
    return False


async def test_aborts_at_random_moments(cluster: Server, control: Control) -> None:
    dice = random.Random(SEED)
    headers = {"Authorization": f"Bearer {cluster.api_key}"}
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=cluster.base_url, headers=headers, timeout=LONGEST_S, limits=limits
    ) as client:
        usual_s = {
            kind: max([await whole(client, body_of(kind, dice, stream=False)) for _ in range(2)])
            for kind in KINDS
        }
        company = asyncio.Semaphore(COMPANY)

        async def one(number: int) -> bool:
            kind = dice.choice(list(KINDS))
            body = body_of(kind, dice, stream=bool(number % 2))
            after_s = dice.uniform(0.0, 1.5) * usual_s[kind]
            async with company:
                return await cut_off(client, body, after_s)

        aborted = await asyncio.gather(*(one(number) for number in range(ABORTS)))
        assert sum(aborted) >= ABORTS // 2, "most of them were meant to be cut off"
        await asyncio.to_thread(control.wait_until_quiet, LEASE_S)
        assert await whole(client, body_of("remote", dice, stream=False)) < LONGEST_S


@pytest.mark.parametrize("kind", KINDS)
async def test_abort_right_after_sending(cluster: Server, control: Control, kind: str) -> None:
    """Before any plan is there, before the prefill is done, and in the middle of a stream."""
    dice = random.Random(SEED + 1)
    headers = {"Authorization": f"Bearer {cluster.api_key}"}
    async with httpx.AsyncClient(
        base_url=cluster.base_url, headers=headers, timeout=LONGEST_S
    ) as client:
        for after_s in (0.001, 0.02, 0.1, 0.3):
            await cut_off(client, body_of(kind, dice, stream=True), after_s)
    await asyncio.to_thread(control.wait_until_quiet, LEASE_S)


async def test_a_client_that_stops_reading_is_cut_off_in_time(
    cluster: Server, control: Control
) -> None:
    """Headers and the first chunk are read, then the connection is dropped."""
    dice = random.Random(SEED + 2)
    headers = {"Authorization": f"Bearer {cluster.api_key}"}
    async with httpx.AsyncClient(
        base_url=cluster.base_url, headers=headers, timeout=LONGEST_S
    ) as client:
        for kind in KINDS:
            body = body_of(kind, dice, stream=True)
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for _ in response.aiter_lines():
                    break
    snapshot = await asyncio.to_thread(control.wait_until_quiet, LEASE_S)
    assert snapshot.active == 0

"""What a worker answers to probes: the truth of the moment, and nothing else."""

from __future__ import annotations

import aiohttp
import pytest

from cluster.health import health_server
from cluster.process import free_port


async def test_it_answers_what_is_so_now() -> None:
    port = free_port("127.0.0.1")
    said = {"/live": True, "/ready": False}
    live, ready = (lambda: said["/live"]), (lambda: said["/ready"])
    async with health_server("127.0.0.1", port, live, ready), aiohttp.ClientSession() as session:

        async def status(path: str) -> int:
            async with session.get(f"http://127.0.0.1:{port}{path}") as answer:
                return answer.status

        assert (await status("/live"), await status("/ready")) == (200, 503)
        said |= {"/live": False, "/ready": True}
        assert (await status("/live"), await status("/ready")) == (503, 200)
        assert await status("/metrics") == 404
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientConnectionError):
            await session.get(f"http://127.0.0.1:{port}/live")


async def test_a_taken_port_is_an_error() -> None:
    port = free_port("127.0.0.1")
    async with health_server("127.0.0.1", port, bool, bool):
        with pytest.raises(OSError, match=str(port)):
            async with health_server("127.0.0.1", port, bool, bool):
                raise AssertionError("two servers on one port")

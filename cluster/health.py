"""Two questions that a worker answers over HTTP, for whoever watches its process.

``/live``: the event loop turns and the engine has not died. ``/ready``: the core has taken
the worker in. Nothing else is served, and nothing that is sent is read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

SHUTDOWN_S = 1.0


@asynccontextmanager
async def health_server(
    host: str, port: int, live: Callable[[], bool], ready: Callable[[], bool]
) -> AsyncIterator[None]:
    """Answers on ``host:port`` while its block runs: 200 for yes, 503 for no. OSError if it
    can't listen there."""

    def answer(
        question: Callable[[], bool],
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.Response:
            return web.Response(status=200 if question() else 503)

        return handle

    app = web.Application(client_max_size=1)
    app.router.add_get("/live", answer(live))
    app.router.add_get("/ready", answer(ready))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        yield
    finally:
        await runner.cleanup()

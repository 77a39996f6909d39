"""Endpoints of our own beside vLLM's: is it alive, is it ready, what is the cluster doing."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from coordinator.api.client import ClusterClient

router = APIRouter()


def _client(request: Request) -> ClusterClient:
    client = request.app.state.engine_client
    assert isinstance(client, ClusterClient)
    return client


@router.get("/live")
async def live() -> Response:
    """200 as long as this process answers."""
    return Response(status_code=200)


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 when a call would be served, 503 while there is no core or no worker."""
    return Response(status_code=200 if _client(request).is_ready() else 503)


@router.get("/v1/cluster")
async def cluster(request: Request) -> Response:
    """The core's view: workers, queue, recent calls."""
    try:
        snapshot = await _client(request).cluster.inspect()
    except TimeoutError:
        error = {
            "message": "the coordinator's core does not answer",
            "type": "Service Unavailable",
            "param": None,
            "code": 503,
        }
        return JSONResponse({"error": error}, status_code=503)
    return Response(msgspec.json.encode(snapshot), media_type="application/json")

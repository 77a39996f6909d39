"""The endpoint that tells why a call went where it went."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from coordinator.api.workflows import ask, tenant_in
from coordinator.protocol import ShowCall

router = APIRouter(prefix="/v1")


@router.get("/calls/{request_id}/explain")
async def explain(request: Request, request_id: str) -> Response:
    """Decisions of a call, alternatives, and what happened: by its response's id, or our own.
    404 for others' calls, and for those that are too long ago."""
    tenant = tenant_in(request)
    return await ask(request, lambda token: ShowCall(token, request_id, tenant))

"""Endpoints for the roles of workers: look at them, say how they follow demand, turn and drain.

Answers come from the core, which also checks what is asked; errors have OpenAI's shape.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from coordinator.api.errors import error_body
from coordinator.api.exchange import Failure
from coordinator.api.workflows import PROBLEM_CHARACTERS_MAX, cluster_of
from coordinator.link import BAD_FRAME
from coordinator.protocol import (
    AboutRoles,
    DrainWorker,
    SetRebalance,
    ShowRebalance,
    TurnWorker,
    WorkflowAnswer,
)

BODY_MAX = 64 * 1024
NAME_CHARACTERS_MAX = 1024
NOT_ADMIN = "changing roles of workers needs one of the keys in api.admin_keys"

router = APIRouter(prefix="/v1")


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request for a role."""

    role: str


@router.get("/cluster/rebalance")
async def show(request: Request) -> Response:
    """Roles, demand and capacity, what would be better, and what was decided before."""
    return await _ask(request, ShowRebalance)


@router.put("/cluster/rebalance")
async def change(request: Request) -> Response:
    """Change settings, ``{"mode": "auto"}``; those that are left out stay. They last until the
    coordinator stops."""
    body = await request.body()
    if not _may_change(request):
        return _refusal(request, 403, [NOT_ADMIN])
    if len(body) > BODY_MAX:
        return _refusal(request, 422, [f"it is longer than {BODY_MAX} bytes"])
    return await _ask(request, lambda token: SetRebalance(token, body))


@router.post("/workers/{name}/role")
async def turn(request: Request, name: str) -> Response:
    """Turn a worker, ``{"role": "decode"}``: it gets that work from now on, and has the role when
    it has ended its old work. Asked again this says how far it is."""
    if not _may_change(request):
        return _refusal(request, 403, [NOT_ADMIN])
    try:
        wanted = msgspec.json.decode((await request.body())[:BODY_MAX], type=Wanted)
    except BAD_FRAME as error:
        return _refusal(request, 422, [str(error)])
    worker = name[:NAME_CHARACTERS_MAX]
    return await _ask(request, lambda token: TurnWorker(token, worker, wanted.role))


@router.post("/workers/{name}/drain")
async def drain(request: Request, name: str) -> Response:
    """Give a worker no more work; what it has begun it ends. Asked again it says how far it is."""
    if not _may_change(request):
        return _refusal(request, 403, [NOT_ADMIN])
    worker = name[:NAME_CHARACTERS_MAX]
    return await _ask(request, lambda token: DrainWorker(token, worker))


@router.delete("/workers/{name}/drain")
async def undrain(request: Request, name: str) -> Response:
    """Give a drained worker work again."""
    if not _may_change(request):
        return _refusal(request, 403, [NOT_ADMIN])
    worker = name[:NAME_CHARACTERS_MAX]
    return await _ask(request, lambda token: DrainWorker(token, worker, undo=True))


def _may_change(request: Request) -> bool:
    """Whether a request has an administrator's key, or the cluster has no such keys."""
    keys: tuple[str, ...] = request.app.state.admin_keys
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = ""
    # All are compared, each in constant time, so that time tells nothing of them.
    found = [secrets.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    return any(found) or not keys


async def _ask(request: Request, question: Callable[[int], AboutRoles]) -> Response:
    try:
        answer = await cluster_of(request).questions.ask(question)
    except TimeoutError:
        answer = WorkflowAnswer(0, 503, problems=["the coordinator's core does not answer"])
    if answer.problems:
        return _refusal(request, answer.status, answer.problems)
    return Response(answer.body, answer.status, media_type="application/json")


def _refusal(request: Request, status: int, problems: list[str]) -> Response:
    failure = Failure(status, "; ".join(problems)[:PROBLEM_CHARACTERS_MAX])
    return JSONResponse(error_body(request.url.path, failure), status)

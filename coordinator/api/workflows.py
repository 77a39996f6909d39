"""Endpoints for workflows: declare them, look at them, start and cancel their runs.

What is sent is checked here, so that the core gets only what makes sense, and again there. All
errors have OpenAI's shape; of a workflow that makes no sense, ``problems`` lists all that is wrong.
The header ``X-Cache-Salt`` says for which tenant (see ``identity``).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import cache
from typing import Annotated, Protocol

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from coordinator.api.errors import error_body
from coordinator.api.exchange import Failure
from coordinator.api.identity import TEXT_MAX, bounded
from coordinator.api.questions import Questions
from coordinator.api.static import StaticPrompts, static_question
from coordinator.link import BAD_FRAME
from coordinator.protocol import (
    CancelRun,
    DeclareWorkflow,
    DropWorkflow,
    EndRun,
    ListWorkflows,
    Question,
    ShowForecast,
    ShowWorkflow,
    StartRun,
    WorkflowAnswer,
)
from coordinator.tenant import tenant_of
from coordinator.workflow.graph import Graph, GraphError, checked, graph_schema
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.registry import parsed

SALT_HEADER = "x-cache-salt"
PROBLEM_CHARACTERS_MAX = 2000

router = APIRouter(prefix="/v1")


class RunTerms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a run starts. ``id``: made up if it is not given; ``deadline_s``: seconds from now;
    ``priority``: of its calls that have none of their own, lower is earlier."""

    id: Annotated[str, msgspec.Meta(max_length=TEXT_MAX)] = ""
    deadline_s: Annotated[float, msgspec.Meta(gt=0, le=1e9)] | None = None
    priority: Annotated[int, msgspec.Meta(gt=-(1 << 31), lt=1 << 31)] = 0


class RunEndTerms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a run ended. ``completed``: it came to its own end, it was not given up."""

    completed: bool = True


@router.get("/schemas/workflow")
async def schema() -> Response:
    """The JSON Schema of a workflow."""
    return Response(_schema(), media_type="application/schema+json")


@router.get("/workflows")
async def list_workflows(request: Request) -> Response:
    """All that are declared, and those with live runs."""
    tenant = _tenant(request)
    return await _ask(request, lambda token: ListWorkflows(token, tenant))


@router.put("/workflows/{name}")
async def declare(request: Request, name: str) -> Response:
    """Declare a workflow, or declare it anew: 201 or 200 once it is on disk."""
    try:
        graph = _declared(await request.body(), _limits(request))
        prefixes = await _static(request).of(graph)
    except GraphError as error:
        return _refusal(request, 422, error.problems)
    as_json = msgspec.json.encode(graph)
    answer = await _answer(request, lambda token: DeclareWorkflow(token, name, as_json))
    if prefixes and not answer.problems:
        told = await _answer(request, static_question(name, graph, prefixes))
        # Declared otherwise or dropped meanwhile: whoever did that has told the rest.
        if told.status not in (200, 404, 409):
            return _response(request, told)
    return _response(request, answer)


@router.get("/workflows/{name}")
async def show(request: Request, name: str) -> Response:
    """What is declared, learned and expected of a workflow, and its live runs."""
    tenant = _tenant(request)
    return await _ask(request, lambda token: ShowWorkflow(token, name, tenant))


@router.get("/forecast")
async def forecast(request: Request) -> Response:
    """How many tokens will be prefilled, decoded and held, and for which of the tenant's agents."""
    tenant = _tenant(request)
    return await _ask(request, lambda token: ShowForecast(token, tenant))


@router.delete("/workflows/{name}")
async def drop(request: Request, name: str) -> Response:
    """Forget a workflow, and what this tenant taught of it. Its runs go on."""
    tenant = _tenant(request)
    return await _ask(request, lambda token: DropWorkflow(token, name, tenant))


@router.post("/workflows/{name}/runs")
async def start_run(request: Request, name: str) -> Response:
    """Start a run with a deadline and a priority for its calls. Runs start without it, too."""
    body = await request.body()
    try:
        terms = msgspec.json.decode(body, type=RunTerms) if body.strip() else RunTerms()
    except BAD_FRAME as error:
        return _refusal(request, 422, [str(error)])
    run = bounded(terms.id) or uuid.uuid4().hex
    tenant, deadline_s = _tenant(request), terms.deadline_s or 0.0
    return await _ask(
        request,
        lambda token: StartRun(token, bounded(name), run, tenant, deadline_s, terms.priority),
    )


@router.delete("/workflows/{name}/runs/{run}")
async def cancel_run(request: Request, name: str, run: str) -> Response:
    """Stop all calls of a run and refuse further ones."""
    tenant = _tenant(request)
    return await _ask(request, lambda token: CancelRun(token, bounded(name), bounded(run), tenant))


@router.post("/workflows/{name}/runs/{run}/end")
async def end_run(request: Request, name: str, run: str) -> Response:
    """No more calls follow in a run; open ones go on. For clients that do not know beforehand
    which call is the last."""
    body = await request.body()
    try:
        terms = msgspec.json.decode(body, type=RunEndTerms) if body.strip() else RunEndTerms()
    except BAD_FRAME as error:
        return _refusal(request, 422, [str(error)])
    tenant, completed = _tenant(request), terms.completed
    return await _ask(
        request, lambda token: EndRun(token, bounded(name), bounded(run), tenant, completed)
    )


def tenant_in(request: Request) -> str:
    """The tenant that asks."""
    return _tenant(request)


async def ask(request: Request, question: Callable[[int], Question]) -> Response:
    """The core's answer to a question, as a response."""
    return await _ask(request, question)


@cache
def _schema() -> bytes:
    return msgspec.json.encode(graph_schema())


def _declared(body: bytes, limits: WorkflowLimits) -> Graph:
    return checked(parsed(body, limits), limits)


class Cluster(Protocol):
    """What is needed of the cluster."""

    questions: Questions
    workflow_limits: WorkflowLimits


def cluster_of(request: Request) -> Cluster:
    """The cluster behind a request."""
    cluster: Cluster = request.app.state.engine_client.cluster
    return cluster


def _limits(request: Request) -> WorkflowLimits:
    return cluster_of(request).workflow_limits


def _tenant(request: Request) -> str:
    return tenant_of(request.headers.get(SALT_HEADER, "").strip())


def _static(request: Request) -> StaticPrompts:
    prompts: StaticPrompts = request.app.state.static_prompts
    return prompts


async def _ask(request: Request, question: Callable[[int], Question]) -> Response:
    return _response(request, await _answer(request, question))


async def _answer(request: Request, question: Callable[[int], Question]) -> WorkflowAnswer:
    try:
        return await cluster_of(request).questions.ask(question)
    except TimeoutError:
        return WorkflowAnswer(0, 503, problems=["the coordinator's core does not answer"])


def _response(request: Request, answer: WorkflowAnswer) -> Response:
    if answer.problems:
        return _refusal(request, answer.status, answer.problems)
    return Response(answer.body, answer.status, media_type="application/json")


def _refusal(request: Request, status: int, problems: list[str]) -> Response:
    failure = Failure(status, "; ".join(problems)[:PROBLEM_CHARACTERS_MAX])
    body = error_body(request.url.path, failure)
    if status == 422:
        body["error"]["problems"] = problems
    return JSONResponse(body, status)

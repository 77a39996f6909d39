"""The endpoints for workflows: over HTTP on one side, a real core on the other."""

from __future__ import annotations

import asyncio
import json
from operator import eq
from types import SimpleNamespace
from typing import Any

import httpx
import jsonschema
import msgspec
import pytest
from fastapi import FastAPI

from coordinator import protocol
from coordinator.api.front import Front
from coordinator.api.questions import Questions
from coordinator.api.static import StaticPrompts
from coordinator.api.workflows import router
from coordinator.blocks import hash_blocks, salt_of
from coordinator.core import Core
from coordinator.limits import Limits, Placement
from coordinator.protocol import CallContext, Hello, Message, Rejected, Submit, WorkflowAnswer
from coordinator.tenant import tenant_of
from coordinator.workflow.graph import Agent, Graph, checked
from coordinator.workflow.limits import WorkflowLimits

TEAM: dict[str, Any] = {
    "agents": {
        "planner": {"static_prompt": "You plan.", "output_tokens": 300},
        "explorer": {"static_prompt": [{"role": "system", "content": "You explore."}]},
        "engineer": {},
        "reviewer": {},
        "writer": {},
    },
    "edges": [
        {"kind": "fan_out", "from": "planner", "to": "explorer", "least": 2, "most": 5},
        {"kind": "join", "from": ["explorer"], "to": "engineer"},
        {"kind": "next", "from": "engineer", "to": "reviewer"},
        {"kind": "loop", "from": "reviewer", "to": "engineer", "most": 3, "probability": 0.4},
        {"kind": "branch", "from": "reviewer", "to": "writer", "probability": 0.6},
    ],
    "start": "planner",
}
WAIT_S = 10.0
BLOCK_TOKENS = 4
BODY_MAX = 1 << 20


async def tokens(agent: Agent, more: str) -> list[int]:
    """A token per letter. Chats have a template whose roles take turns, text has none."""
    if isinstance(agent.static_prompt, str):
        return [*map(ord, agent.static_prompt + more)]
    messages = [*agent.static_prompt, *([{"role": "user", "content": more}] if more else [])]
    roles = [message["role"] for message in messages]
    if any(map(eq, roles, roles[1:])):
        raise ValueError("roles must take turns")
    tools = [f"[{tool['function']['name']}]" for tool in agent.tools]
    said = [f"<{message['role']}>{message['content']}" for message in messages]
    return [*map(ord, "".join([*tools, *said, "<assistant>" if more else ""]))]


class Cluster:
    """The application, its questions on the wire's own encoding, and the core behind."""

    def __init__(self, keeps: bool = False) -> None:
        self.core = Core(Limits(), Placement(), "core", keeps=keeps)
        self.questions = Questions(self.send)
        self.workflow_limits = WorkflowLimits(graph_bytes=100_000)
        self.deaf = 0
        """Questions that are lost."""
        self.asked = 0
        app = FastAPI()
        app.include_router(router)
        app.state.engine_client = SimpleNamespace(cluster=self)
        self.seen = SimpleNamespace(questions=self.questions, core="core", block_size=BLOCK_TOKENS)
        self.prompts = app.state.static_prompts = StaticPrompts(self.seen, tokens)
        self.front = Front(app, BODY_MAX)
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.front), base_url="http://cluster"
        )

    def send(self, message: Message) -> bool:
        self.asked += 1
        if self.asked <= self.deaf:
            return True
        heard = protocol.decode_to_core(memoryview(protocol.encode(message)))
        self.answer(self.core.handle(b"api", heard, 1.0))
        return True

    def answer(self, sends: Any) -> None:
        for send in sends:
            message = protocol.decode_core_to_api(memoryview(protocol.encode(send.message)))
            if isinstance(message, WorkflowAnswer):
                self.questions.on_answer(message)

    async def put(self, name: str, graph: object, **more: Any) -> httpx.Response:
        content = graph if isinstance(graph, bytes) else json.dumps(graph).encode()
        return await self.client.put(f"/v1/workflows/{name}", content=content, **more)


@pytest.fixture
async def cluster() -> Cluster:
    return Cluster()


def error_of(response: httpx.Response) -> Any:
    """The error, which has OpenAI's shape."""
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert error["code"] == response.status_code
    return error


async def test_a_workflow_is_declared_shown_listed_and_dropped(cluster: Cluster) -> None:
    assert (await cluster.put("team", TEAM)).status_code == 201
    assert (await cluster.put("team", TEAM)).status_code == 200
    shown = (await cluster.client.get("/v1/workflows/team")).json()
    assert shown["declared"]["edges"] == TEAM["edges"]
    assert shown["declared"]["start"] == "planner"
    (row,) = (await cluster.client.get("/v1/workflows")).json()
    assert (row["name"], row["declared"], row["agents"]) == ("team", True, 5)
    assert (await cluster.client.delete("/v1/workflows/team")).status_code == 200
    assert (await cluster.client.get("/v1/workflows")).json() == []
    gone = await cluster.client.get("/v1/workflows/team")
    assert error_of(gone)["message"] == "no workflow 'team' is known"


async def test_names_may_be_in_any_script_but_have_no_slash(cluster: Cluster) -> None:
    assert (await cluster.put("研究 チーム", TEAM)).status_code == 201
    assert (await cluster.client.get("/v1/workflows/研究 チーム")).json()["name"] == "研究 チーム"
    assert (await cluster.put("a%2Fb", TEAM)).status_code in (404, 405, 422)
    assert (await cluster.put("x" * 500, TEAM)).status_code == 422


def changed(**changes: Any) -> dict[str, Any]:
    return TEAM | changes


def with_edge(**edge: Any) -> dict[str, Any]:
    return changed(edges=[*TEAM["edges"], edge])


WRONG = [
    (with_edge(kind="next", **{"from": "planner", "to": "nobody"}), "no agent is called 'nobody'"),
    (
        with_edge(kind="branch", **{"from": "reviewer", "to": "planner", "probability": 0.9}),
        "probabilities of 'reviewer'",
    ),
    (with_edge(kind="next", **{"from": "writer", "to": "planner"}), "unbounded loop"),
    (changed(agents=TEAM["agents"] | {"hermit": {}}), "nothing leads from 'planner' to: hermit"),
    (
        with_edge(kind="loop", **{"from": "writer", "to": "planner"}),
        "missing required field `most`",
    ),
    (with_edge(kind="branch", **{"from": "planner", "to": "writer", "probability": 1.5}), "<= 1"),
    (changed(colour="red"), "unknown field `colour`"),
    ({"edges": []}, "missing required field `agents`"),
    ([1, 2], "Expected `object`, got `array`"),
    (b"{not json", "malformed"),
    (b"\xff\xfe", "malformed"),
    (b"", "truncated"),
    (b'{"agents":{"a":{"tools":[{"x":' + b"[" * 50_000, "recursion"),
    (changed(agents={f"a{n}": {} for n in range(300)}, edges=[], start="a0"), "at most 256"),
    (changed(description="x" * 200_000), "longer than 100000 bytes"),
]


@pytest.mark.parametrize(("graph", "problem"), WRONG, ids=[problem for _, problem in WRONG])
async def test_what_makes_no_sense_is_refused_with_reasons_before_the_core_hears_of_it(
    cluster: Cluster, graph: object, problem: str
) -> None:
    response = await cluster.put("team", graph)
    assert response.status_code == 422
    error = error_of(response)
    assert problem in error["message"]
    assert error["type"] == "Unprocessable Entity" or error["type"] == "Unprocessable Content"
    assert any(problem in each for each in error["problems"])
    assert cluster.asked == 0


async def test_all_that_is_wrong_is_said_at_once(cluster: Cluster) -> None:
    edges = [{"kind": "next", "from": f"x{n}", "to": f"y{n}"} for n in range(3)]
    problems = error_of(await cluster.put("team", changed(edges=edges)))["problems"]
    assert len(problems) == 6


async def test_a_body_that_is_too_large_is_not_read_to_its_end(cluster: Cluster) -> None:
    response = await cluster.put("team", b"x" * (BODY_MAX + 1))
    assert error_of(response)["code"] == 413


async def test_a_graph_of_a_million_nodes_is_refused_in_no_time(cluster: Cluster) -> None:
    agents = b",".join(b'"%d":{}' % number for number in range(1_000_000))
    cluster.front.body_bytes_max = 1 << 30
    response = await asyncio.wait_for(cluster.put("team", b'{"agents":{' + agents + b"}}"), WAIT_S)
    assert response.status_code == 422


async def test_the_schema_that_is_served_accepts_what_is_accepted(cluster: Cluster) -> None:
    response = await cluster.client.get("/v1/schemas/workflow")
    assert response.headers["content-type"] == "application/schema+json"
    schema = response.json()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(TEAM, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(with_edge(kind="loop", **{"from": "writer", "to": "planner"}), schema)


async def test_a_declaration_is_answered_only_when_it_is_written() -> None:
    cluster = Cluster(keeps=True)
    asked = asyncio.create_task(cluster.put("team", TEAM))
    await asyncio.sleep(0.2)
    assert not asked.done()
    assert cluster.asked == 1
    saves = cluster.core.take_saves()
    cluster.answer(cluster.core.saved(len(saves), "", 2.0))
    assert (await asked).status_code == 201


async def test_a_question_that_is_lost_is_asked_again(cluster: Cluster) -> None:
    cluster.deaf = 1
    assert (await cluster.put("team", {"agents": {"a": {}}})).status_code == 201
    assert cluster.asked == 2


async def test_a_core_that_is_away_is_told(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.api.questions.Questions.ask.__defaults__", (0.1,))
    cluster.deaf = 1 << 30
    response = await cluster.client.get("/v1/workflows")
    assert error_of(response)["message"] == "the coordinator's core does not answer"
    assert response.status_code == 503


# --- runs ----------------------------------------------------------------------------------------


def call(cluster: Cluster, request: str, run: str, tenant: str = "") -> list[Any]:
    """A call of a run; what the core says to its API process."""
    cluster.core.handle(b"api", Hello("api"), 1.0)
    context = CallContext("team", run, "planner", tenant=tenant)
    sends = cluster.core.handle(b"api", Submit("api", request, 1, 9, 9, context=context), 1.0)
    return [send.message for send in sends]


async def test_a_run_is_started_and_cancelled(cluster: Cluster) -> None:
    body = {"id": "run-1", "deadline_s": 60, "priority": -2}
    started = await cluster.client.post("/v1/workflows/team/runs", json=body)
    assert started.status_code == 201
    assert (started.json()["run"], started.json()["priority"]) == ("run-1", -2)
    assert call(cluster, "c", "run-1") == []
    cancelled = await cluster.client.delete("/v1/workflows/team/runs/run-1")
    assert cancelled.json() == {
        "workflow": "team",
        "run": "run-1",
        "ended": "cancelled",
        "stopped": 1,
    }
    (rejected,) = call(cluster, "d", "run-1")
    assert isinstance(rejected, Rejected)
    assert rejected.status == 410
    again = await cluster.client.delete("/v1/workflows/team/runs/run-1")
    assert again.json()["stopped"] == 0
    missing = await cluster.client.delete("/v1/workflows/team/runs/other")
    assert error_of(missing)["code"] == 404


async def test_a_run_is_said_to_be_over(cluster: Cluster) -> None:
    assert call(cluster, "c", "run-1") == []
    ended = await cluster.client.post("/v1/workflows/team/runs/run-1/end")
    assert ended.json() == {"workflow": "team", "run": "run-1", "ended": "", "open_calls": 1}
    given_up = await cluster.client.post(
        "/v1/workflows/team/runs/run-1/end", json={"completed": False}
    )
    assert given_up.status_code == 200
    missing = await cluster.client.post("/v1/workflows/team/runs/other/end")
    assert error_of(missing)["code"] == 404
    odd = await cluster.client.post("/v1/workflows/team/runs/run-1/end", json={"finished": 1})
    assert error_of(odd)["code"] == 422


async def test_a_run_gets_an_id_if_it_has_none(cluster: Cluster) -> None:
    one, two = [
        (await cluster.client.post("/v1/workflows/team/runs")).json()["run"] for _ in range(2)
    ]
    assert one
    assert one != two


@pytest.mark.parametrize(
    "body",
    [
        {"deadline_s": -1},
        {"deadline_s": "soon"},
        {"deadline_s": 1e300},
        {"priority": 1 << 40},
        {"id": "x" * 300},
        {"id": 5},
        {"unknown": 1},
        [],
    ],
)
async def test_odd_runs_are_refused(cluster: Cluster, body: object) -> None:
    response = await cluster.client.post("/v1/workflows/team/runs", json=body)
    assert error_of(response)["code"] == 422


async def test_a_tenants_runs_are_its_own(cluster: Cluster) -> None:
    call(cluster, "c", "run-1", tenant_of("salt-1"))
    path, mine = "/v1/workflows/team/runs/run-1", {"X-Cache-Salt": "salt-1"}
    for headers in ({}, {"X-Cache-Salt": "salt-2"}):
        assert (await cluster.client.delete(path, headers=headers)).status_code == 404
        shown = await cluster.client.get("/v1/workflows/team", headers=headers)
        assert shown.status_code == 404
    shown = await cluster.client.get("/v1/workflows/team", headers=mine)
    assert [run["run"] for run in shown.json()["runs"]] == ["run-1"]
    assert (await cluster.client.delete(path, headers=mine)).json()["stopped"] == 1


# --- static prompts ------------------------------------------------------------------------------

SEARCH = {"type": "function", "function": {"name": "search"}}
STATIC: dict[str, Any] = {
    "agents": {
        "chat": {"static_prompt": [{"role": "system", "content": "You chat."}], "tools": [SEARCH]},
        "turns": {"static_prompt": [{"role": "user", "content": "Hello there"}]},
        "text": {"static_prompt": "Once upon a time"},
        "none": {"tools": [SEARCH]},
    },
    "edges": [
        {"kind": "next", "from": "chat", "to": "turns"},
        {"kind": "next", "from": "turns", "to": "text"},
        {"kind": "next", "from": "text", "to": "none"},
    ],
}
BEGINNINGS = {
    "chat": "[search]<system>You chat.<user>",
    "turns": "<user>Hello there",
    "text": "Once upon a time",
}


def known_static(cluster: Cluster, name: str) -> dict[str, tuple[int, bytes]]:
    """What the core knows of the static prompts of a workflow."""
    known = cluster.core._registry.static.get(name, {})
    return {agent: (prefix.tokens, prefix.block_hashes) for agent, prefix in known.items()}


EXPECTED = {
    agent: (len(text), hash_blocks([*map(ord, text)], BLOCK_TOKENS, salt_of()))
    for agent, text in BEGINNINGS.items()
}


async def test_static_prompts_are_templated_and_the_core_gets_their_hashes(
    cluster: Cluster,
) -> None:
    assert (await cluster.put("team", STATIC)).status_code == 201
    assert known_static(cluster, "team") == EXPECTED
    shown = (await cluster.client.get("/v1/workflows/team")).json()
    assert shown["static_tokens"] == {agent: len(text) for agent, text in BEGINNINGS.items()}
    prompt = "[search]<system>You chat.<user>What is KV cache?<assistant>"
    hashes = hash_blocks([*map(ord, prompt)], BLOCK_TOKENS, salt_of())
    assert hashes.startswith(EXPECTED["chat"][1]), "as those of a prompt that begins so"


async def test_static_prompts_go_with_their_declaration(cluster: Cluster) -> None:
    await cluster.put("team", STATIC)
    await cluster.put("team", STATIC)
    assert known_static(cluster, "team") == EXPECTED
    await cluster.put("team", {"agents": {"text": {"static_prompt": "Another"}}})
    assert known_static(cluster, "team").keys() == {"text"}
    await cluster.put("team", {"agents": {"text": {}}})
    assert known_static(cluster, "team") == {}
    await cluster.put("team", STATIC)
    await cluster.client.delete("/v1/workflows/team")
    assert known_static(cluster, "team") == {}
    cluster.core.check()


async def test_a_static_prompt_that_the_api_would_refuse_is_refused(cluster: Cluster) -> None:
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    graph = {"agents": {"a": {"static_prompt": twice}}}
    refused = await cluster.put("team", graph)
    problem = "agents.a.static_prompt: roles must take turns"
    assert error_of(refused)["problems"] == [problem]
    assert (await cluster.client.get("/v1/workflows")).json() == []


async def test_every_core_is_told_what_is_declared(cluster: Cluster) -> None:
    graph = checked(msgspec.convert(STATIC, Graph), cluster.workflow_limits)
    cluster.core._registry.fix("of the file", graph)
    assert known_static(cluster, "of the file") == {}
    await cluster.prompts.tell_all()
    assert known_static(cluster, "of the file") == EXPECTED


async def test_hashes_come_when_the_size_of_blocks_is_known(cluster: Cluster) -> None:
    cluster.seen.block_size = 0
    await cluster.put("team", STATIC)
    assert {hashes for _, hashes in known_static(cluster, "team").values()} == {b""}
    cluster.seen.block_size = BLOCK_TOKENS
    await cluster.prompts.tell_all()
    assert known_static(cluster, "team") == EXPECTED

"""Runs and agents around the plain ``openai`` client."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import openai
import pytest

from cluster.adapters import flush, run
from tests.unit.openai_server import Seen, openai_server

GRAPH: dict[str, Any] = {
    "agents": {"planner": {}, "writer": {}},
    "edges": [{"kind": "next", "from": "planner", "to": "writer"}],
}


@pytest.fixture
def server() -> Iterator[Seen]:
    with openai_server() as seen:
        yield seen


@pytest.fixture
def client(server: Seen) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="k", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, text: str = "hello", **more: Any) -> Any:
    messages: list[Any] = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="m", messages=messages, **more)


async def ask_async(client: openai.AsyncOpenAI, text: str = "hello") -> Any:
    return await client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": text}]
    )


def test_calls_say_which_run_and_agent_they_belong_to(server: Seen, client: openai.OpenAI) -> None:
    ask(client)
    with run(client, "research") as team:
        ask(client)
        with team.agent("planner"):
            ask(client)
            list(ask(client, stream=True))
        with team.agent("writer", final=True):
            client.with_options(timeout=5).chat.completions.with_raw_response.create(
                model="m", messages=[]
            )
    ask(client)
    before, alone, planner, streamed, writer, after = server.calls
    assert not any(name.startswith("x-workflow") for name in before.headers | after.headers)
    assert {one.headers["x-workflow"] for one in (alone, planner, streamed, writer)} == {"research"}
    assert {one.run for one in (alone, planner, streamed, writer)} == {team.id}
    assert [one.agent for one in (alone, planner, streamed, writer)] == [
        "",
        "planner",
        "planner",
        "writer",
    ]
    assert (planner.parent, writer.parent) == ("", "planner")
    assert [one.headers.get("x-workflow-final") for one in (planner, writer)] == [None, "true"]
    assert server.ended() == {team.id: True}


def test_who_is_around_or_came_before_is_the_parent(server: Seen, client: openai.OpenAI) -> None:
    with run(client, "w") as team:
        for name in ("planner", "engineer", "reviewer", "engineer"):
            with team.agent(name):
                ask(client)
                if name == "reviewer":
                    with team.agent("critic"):
                        ask(client)
        with team.agent("writer", parent="planner"):
            ask(client)
    assert [(one.agent, one.parent) for one in server.calls] == [
        ("planner", ""),
        ("engineer", "planner"),
        ("reviewer", "engineer"),
        ("critic", "reviewer"),
        ("engineer", "reviewer"),
        ("writer", "planner"),
    ]


def test_what_a_call_says_itself_stands(server: Seen, client: openai.OpenAI) -> None:
    with run(client, "w") as team, team.agent("a"):
        ask(client, extra_headers={"X-Workflow": "other", "X-Workflow-Run": "7"})
    (call,) = server.calls
    assert (call.headers["x-workflow"], call.run, call.agent) == ("other", "7", "")


def test_names_may_be_in_any_script_and_are_one_line(server: Seen, client: openai.OpenAI) -> None:
    with run(client, "研究/チーム", run_id="a b/c") as team, team.agent("two\nlines"):
        ask(client)
    (call,) = server.calls
    assert call.headers["x-workflow"].encode("latin-1").decode() == "研究/チーム"
    assert (call.agent, call.run) == ("two lines", "a b/c")
    (end,) = server.reports
    assert (
        end.path
        == "/v1/workflows/%E7%A0%94%E7%A9%B6%2F%E3%83%81%E3%83%BC%E3%83%A0/runs/a%20b%2Fc/end"
    )


def test_other_servers_hear_nothing_of_it(server: Seen, client: openai.OpenAI) -> None:
    with openai_server() as other, run(client, "w"):
        shared = openai.OpenAI(base_url=other.url, api_key="k", http_client=client._client)
        ask(shared)
        ask(client)
        assert "x-workflow" not in other.calls[0].headers
    assert "x-workflow" in server.calls[0].headers


def test_a_graph_is_declared_once_and_a_run_may_have_terms(
    server: Seen, client: openai.OpenAI
) -> None:
    for _ in range(2):
        with run(client, "w", graph=GRAPH, run_id="r", deadline_s=60, priority=-1):
            ask(client)
    put, start, end, *again = server.reports
    assert (put.method, put.path, put.body) == ("PUT", "/v1/workflows/w", GRAPH)
    assert put.headers["authorization"] == "Bearer k"
    assert (start.path, start.body) == (
        "/v1/workflows/w/runs",
        {"id": "r", "deadline_s": 60, "priority": -1},
    )
    assert end.path == "/v1/workflows/w/runs/r/end"
    assert [one.path for one in again] == [start.path, end.path]
    changed = {**GRAPH, "description": "another"}
    with run(client, "w", graph=changed):
        pass
    assert [one.body for one in server.reports if one.method == "PUT"] == [GRAPH, changed]


def test_a_run_that_fails_is_not_learned_as_one_that_ended(
    server: Seen, client: openai.OpenAI
) -> None:
    team = run(client, "w")

    def fails() -> None:
        with team, team.agent("a"):
            ask(client)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert server.ended() == {team.id: False}
    ask(client)
    assert "x-workflow" not in server.calls[-1].headers


@pytest.mark.parametrize("there", [True, False])
def test_a_server_without_workflows_serves_all_the_same(
    there: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with openai_server(knows_workflows=False) as plain:
        client = openai.OpenAI(base_url=plain.url, api_key="k", max_retries=0)
        if not there:
            client.base_url = "http://127.0.0.1:9/v1"
        for _ in range(2):
            with run(client, "w", graph=GRAPH, deadline_s=9) as team, team.agent("a"):
                if there:
                    assert ask(client).choices[0].message.content == "fine"
    warnings = [one.message for one in caplog.records if one.levelno >= logging.WARNING]
    assert len(warnings) == (2 if there else 3), "each kind of trouble is told once"
    assert warnings[0].startswith("could not declare the workflow 'w', calls go on without: ")


# --- at once -------------------------------------------------------------------------------------


async def test_tasks_do_not_get_in_each_others_way(server: Seen) -> None:
    async def explore(team: Any, client: openai.AsyncOpenAI, number: int) -> None:
        with team.agent("explorer"):
            await asyncio.sleep(0.01 * number)
            await ask_async(client, f"{team.id} explorer")
        with team.agent("critic"):
            await ask_async(client, f"{team.id} critic")

    async def whole(client: openai.AsyncOpenAI) -> None:
        async with run(client, "w", graph=GRAPH) as team:
            with team.agent("planner"):
                await ask_async(client, f"{team.id} planner")
            await asyncio.gather(*(explore(team, client, number) for number in range(3)))
            with team.agent("writer"):
                await ask_async(client, f"{team.id} writer")

    async with openai.AsyncOpenAI(base_url=server.url, api_key="k", max_retries=0) as client:
        await asyncio.gather(*(whole(client) for _ in range(4)))
        await ask_async(client, "outside")
    assert "x-workflow" not in server.calls[-1].headers
    calls = server.calls[:-1]
    assert len(calls) == 4 * 8
    assert all(one.said() == f"{one.run} {one.agent}" for one in calls)
    parents = {(one.agent, one.parent) for one in calls}
    assert parents == {
        ("planner", ""),
        ("explorer", "planner"),
        ("critic", "explorer"),
        ("writer", "critic"),
    }
    assert server.ended() == dict.fromkeys((one.run for one in calls), True)
    assert [one.method for one in server.reports].count("PUT") == 1


def test_threads_do_not_get_in_each_others_way(server: Seen, client: openai.OpenAI) -> None:
    server.delay_s = 0.02
    together = threading.Barrier(3)

    def explore(team: Any, copied: bool) -> None:
        with team.agent("explorer"):
            together.wait(10)
            ask(client, f"{team.id} explorer")

    def whole(copied: bool) -> None:
        with run(client, "w") as team:
            with team.agent("planner"):
                ask(client, f"{team.id} planner")
            threads = [
                threading.Thread(
                    target=copy_context().run if copied else explore,
                    args=(explore, team, copied) if copied else (team, copied),
                )
                for _ in range(3)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            with team.agent("writer"):
                ask(client, f"{team.id} writer")

    for copied in (False, True):
        whole(copied)
    together = threading.Barrier(6)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(whole, (False, True)))
    assert len(server.calls) == 4 * 5
    assert all(one.said() == f"{one.run} {one.agent}" for one in server.calls)
    assert {(one.agent, one.parent) for one in server.calls} == {
        ("planner", ""),
        ("explorer", "planner"),
        ("writer", "explorer"),
    }
    assert len(server.ended()) == 4


async def test_a_plain_block_around_an_asynchronous_client_ends_its_run_too(server: Seen) -> None:
    async with openai.AsyncOpenAI(base_url=server.url, api_key="k") as client:
        with run(client, "w") as team:
            await ask_async(client)
    await asyncio.to_thread(flush)
    assert server.ended() == {team.id: True}


async def test_a_run_that_is_cancelled_says_so(server: Seen) -> None:
    server.delay_s = 0.5
    async with openai.AsyncOpenAI(base_url=server.url, api_key="k") as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1), run(client, "w") as team:
                await ask_async(client)
        await asyncio.to_thread(flush)
    assert server.ended() == {team.id: False}


def test_reports_are_sent_before_the_program_ends(server: Seen) -> None:
    program = f"""
import asyncio, openai
from cluster.adapters import run
async def main():
    async with openai.AsyncOpenAI(base_url={server.url!r}, api_key="k") as client:
        with run(client, "w", run_id="r"):
            pass
asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert server.ended() == {"r": True}


def test_importing_the_adapters_is_cheap() -> None:
    program = """
import sys
import cluster.adapters, cluster.adapters.langgraph, cluster.adapters.openai_agents
print(*sorted({"vllm", "torch", "zmq", "msgspec", "fastapi", "coordinator"} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=120, capture_output=True, text=True
    )
    assert done.stdout.split() == []

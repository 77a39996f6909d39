"""Teams of the Agents SDK are declared, and their agents' calls say who asks."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    RunConfig,
    RunHooks,
    function_tool,
    handoff,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

from cluster.adapters import flush, run
from cluster.adapters.openai_agents import Team, declared
from coordinator.workflow.graph import checked, ways
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.registry import parsed
from tests.unit.openai_server import Asked, Seen, openai_server

set_tracing_disabled(True)


def says(body: dict[str, Any]) -> Any:
    """What the model does, by the agent's instructions and what was asked last."""
    system, last = body["messages"][0]["content"], body["messages"][-1]
    if system == "You plan.":
        if last["role"] == "tool":
            return [("transfer_to_engineer", {})]
        return [("explore", {"input": f"{last['content']} {at}"}) for at in range(3)]
    if system == "You explore.":
        return "found" if last["role"] == "tool" else [("look_up", {"word": last["content"]})]
    if system == "You build.":
        return [("transfer_to_writer", {})]
    return "the end"


@pytest.fixture
def server() -> Iterator[Seen]:
    with openai_server(says) as seen:
        yield seen


@pytest.fixture
async def client(server: Seen) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=server.url, api_key="k", max_retries=0) as made:
        yield made


@function_tool
def look_up(word: str) -> str:
    """Look a word up."""
    return f"{word} is found"


def research(client: AsyncOpenAI) -> Agent[Any]:
    """A planner uses explorers as tools, hands over to an engineer, and that one to a writer."""
    model = OpenAIChatCompletionsModel(model="m", openai_client=client)
    explorer = Agent[Any](
        name="explorer", instructions="You explore.", model=model, tools=[look_up]
    )
    writer = Agent[Any](name="writer", instructions="You write.", model=model)
    engineer = Agent[Any](
        name="engineer", instructions="You build.", model=model, handoffs=[handoff(writer)]
    )
    return Agent[Any](
        name="planner",
        instructions="You plan.",
        model=model,
        tools=[explorer.as_tool("explore", "Explore.")],
        handoffs=[engineer],
    )


def assert_tells_the_team(calls: list[Asked]) -> None:
    agents = [one.agent for one in calls]
    assert agents[0] == "planner"
    assert agents[1:7] == ["explorer"] * 6
    assert agents[7:] == ["planner", "engineer", "writer"]
    systems = [one.body["messages"][0]["content"] for one in calls]
    named = {"You plan.": "planner", "You explore.": "explorer", "You build.": "engineer"}
    assert [named.get(system, "writer") for system in systems] == agents
    assert {(one.agent, one.parent) for one in calls} == {
        ("planner", ""),
        ("explorer", "planner"),
        ("planner", "explorer"),
        ("engineer", "planner"),
        ("writer", "engineer"),
    }


def test_agents_handoffs_and_tools_are_declared() -> None:
    graph = declared(research(AsyncOpenAI(base_url="http://127.0.0.1:9/v1", api_key="k")))
    limits = WorkflowLimits()
    assert graph["start"] == "planner"
    assert set(graph["agents"]) == {"planner", "explorer", "engineer", "writer"}
    edges = {(edge["kind"], edge["from"], edge["to"]) for edge in graph["edges"]}
    assert edges == {
        ("branch", "planner", "explorer"),
        ("branch", "planner", "engineer"),
        ("loop", "explorer", "planner"),
        ("loop", "explorer", "explorer"),
        ("branch", "engineer", "writer"),
    }
    taken = ways(checked(parsed(json.dumps(graph).encode(), limits), limits))
    assert sum(way.probability for way in taken["explorer"]) == 1, "a tool does not end a run"
    assert sum(way.probability for way in taken["planner"]) < 1
    planner = graph["agents"]["planner"]
    assert planner["static_prompt"] == [{"role": "system", "content": "You plan."}]
    names = [tool["function"]["name"] for tool in planner["tools"]]
    assert names == ["explore", "transfer_to_engineer"]


async def test_agents_say_who_asks(server: Seen, client: AsyncOpenAI) -> None:
    team = Team(research(client), client, workflow="research")
    for _ in range(2):
        result = await team.run("go")
        assert result.final_output == "the end"
    await client.chat.completions.create(
        model="m", messages=[{"role": "system", "content": "outside"}]
    )
    assert "x-workflow" not in server.calls[-1].headers
    calls = server.calls[:-1]
    runs = list(dict.fromkeys(one.run for one in calls))
    assert len(runs) == 2
    for each in runs:
        assert_tells_the_team([one for one in calls if one.run == each])
    assert {one.headers["x-workflow"] for one in calls} == {"research"}
    assert server.ended() == dict.fromkeys(runs, True)
    (put,) = [one for one in server.asked if one.method == "PUT"]
    assert put.path == "/v1/workflows/research"
    assert put.body["agents"]["planner"]["tools"] == server.calls[0].body["tools"], (
        "declared as they are sent"
    )


async def test_runs_at_once_do_not_get_in_each_others_way(
    server: Seen, client: AsyncOpenAI
) -> None:
    server.delay_s = 0.01
    team = Team(research(client), client, workflow="research")
    await asyncio.gather(*(team.run(f"n{number}") for number in range(4)))
    names: dict[str, set[str]] = {}
    for one in server.calls:
        asked = next(each for each in one.body["messages"] if each["role"] == "user")
        names.setdefault(one.run, set()).add(asked["content"].split()[0])
    assert len(names) == 4
    assert all(len(found) == 1 for found in names.values())
    for each in names:
        assert_tells_the_team([one for one in server.calls if one.run == each])
    assert server.ended() == dict.fromkeys(names, True)


async def test_streams_are_told_too_and_end_with_their_run(
    server: Seen, client: AsyncOpenAI
) -> None:
    team = Team(research(client), client, workflow="research")
    streams = [team.run_streamed(f"n{number}") for number in range(2)]
    for stream in streams:
        async for _ in stream.stream_events():
            pass
        assert stream.final_output == "the end"
    await asyncio.to_thread(flush)
    runs = {one.run for one in server.calls}
    assert len(runs) == 2
    for each in runs:
        assert_tells_the_team([one for one in server.calls if one.run == each])
    assert server.ended() == dict.fromkeys(runs, True)


def test_the_synchronous_way_works_too(server: Seen) -> None:
    client = AsyncOpenAI(base_url=server.url, api_key="k", max_retries=0)
    team = Team(research(client), client, workflow="research")
    assert team.run_sync("go").final_output == "the end"
    flush()
    assert_tells_the_team(server.calls)
    assert list(server.ended().values()) == [True]


async def test_options_of_the_runner_stand(server: Seen, client: AsyncOpenAI) -> None:
    heard: list[str] = []

    class Hooks(RunHooks[Any]):
        async def on_handoff(self, context: Any, from_agent: Any, to_agent: Any) -> None:
            heard.append(to_agent.name)

    def louder(data: Any) -> Any:
        data.model_data.instructions += " Loud."
        return data.model_data

    server.says = lambda body: (
        [("transfer_to_writer", {})]
        if body["messages"][0]["content"] == "You build. Loud."
        else "the end"
    )
    (engineer,) = research(client).handoffs
    assert isinstance(engineer, Agent)
    team = Team(engineer, client, workflow="w")
    config = RunConfig(call_model_input_filter=louder)
    await team.run("go", hooks=Hooks(), run_config=config, max_turns=3)
    await team.run("go", run_config={"call_model_input_filter": louder})
    assert heard == ["writer"]
    assert config.call_model_input_filter is louder
    systems = [one.body["messages"][0]["content"] for one in server.calls]
    assert systems == ["You build. Loud.", "You write. Loud."] * 2
    assert [one.agent for one in server.calls] == ["engineer", "writer"] * 2


async def test_a_team_may_be_part_of_a_larger_run(server: Seen, client: AsyncOpenAI) -> None:
    async with run(client, "outer") as outer:
        with outer.agent("before"):
            await client.chat.completions.create(
                model="m", messages=[{"role": "system", "content": "hi"}]
            )
        await Team(research(client), client, workflow="inner").run("go")
        with outer.agent("after"):
            await client.chat.completions.create(
                model="m", messages=[{"role": "system", "content": "hi"}]
            )
    first, *inner, last = server.calls
    assert (first.run, last.run) == (outer.id, outer.id)
    assert (last.agent, last.parent) == ("after", "before")
    assert_tells_the_team(inner)
    assert {one.headers["x-workflow"] for one in inner} == {"inner"}


async def test_a_run_that_fails_says_so(server: Seen, client: AsyncOpenAI) -> None:
    team = Team(research(client), client, workflow="w")
    with pytest.raises(Exception, match=r"[Mm]ax turns"):
        await team.run("go", max_turns=1)
    assert list(server.ended().values()) == [False]
    stream = team.run_streamed("go", max_turns=1)
    with pytest.raises(Exception, match=r"[Mm]ax turns"):
        async for _ in stream.stream_events():
            pass
    await asyncio.to_thread(flush)
    assert list(server.ended().values()) == [False, False]


async def test_a_plain_server_serves_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    with openai_server(says, knows_workflows=False) as plain:
        async with AsyncOpenAI(base_url=plain.url, api_key="k", max_retries=0) as client:
            team = Team(research(client), client, workflow="research")
            assert (await team.run("go")).final_output == "the end"
            assert (await team.run("go")).final_output == "the end"
    ours = [one for one in caplog.records if one.name == "pythia.adapters"]
    warnings = [one.message for one in ours if one.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("could not declare the workflow 'research', calls go on without")

"""LangGraph's graphs are declared, and their nodes' calls say who asks."""

from __future__ import annotations

import asyncio
import logging
import operator
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypedDict

import openai
import pytest
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, Send

from cluster.adapters import flush
from cluster.adapters.langgraph import declared, with_pythia
from coordinator.workflow.graph import checked
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.registry import parsed
from tests.unit.openai_server import Asked, Seen, openai_server

EXPLORERS = 3
ROUNDS = 2


class State(TypedDict, total=False):
    name: str
    notes: Annotated[list[str], operator.add]
    rounds: int


@pytest.fixture
def server() -> Iterator[Seen]:
    with openai_server() as seen:
        yield seen


@pytest.fixture
def model(server: Seen) -> ChatOpenAI:
    return model_of(server)


def model_of(server: Seen) -> ChatOpenAI:
    return ChatOpenAI(base_url=server.url, api_key="k", model="m", max_retries=0)  # type: ignore[arg-type]


def team(model: Any, asynchronous: bool = False) -> Any:
    """The research team. What is asked is the run's name and the node."""

    def node(name: str, **also: Any) -> Any:
        def ask(state: State) -> dict[str, Any]:
            model.invoke(f"{state['name']} {name}")
            return update(state)

        async def ask_async(state: State) -> dict[str, Any]:
            await asyncio.sleep(0)
            await model.ainvoke(f"{state['name']} {name}")
            return update(state)

        def update(state: State) -> dict[str, Any]:
            return {"rounds": state.get("rounds", 0) + 1} if name == "engineer" else also

        return ask_async if asynchronous else ask

    def explorers(state: State) -> list[Send]:
        return [Send("explorer", state) for _ in range(EXPLORERS)]

    def verdict(state: State) -> str:
        return "engineer" if state["rounds"] < ROUNDS else "writer"

    graph = StateGraph(State)
    graph.add_node("planner", node("planner"))
    graph.add_node("explorer", node("explorer", notes=["a note"]))
    graph.add_node("engineer", node("engineer"))
    graph.add_node("reviewer", node("reviewer"))
    graph.add_node("writer", node("writer"))
    graph.add_edge(START, "planner")
    graph.add_conditional_edges("planner", explorers, ["explorer"])
    graph.add_edge("explorer", "engineer")
    graph.add_edge("engineer", "reviewer")
    graph.add_conditional_edges("reviewer", verdict, ["engineer", "writer"])
    graph.add_edge("writer", END)
    return graph.compile()


AGENTS = ["planner", *["explorer"] * EXPLORERS, *["engineer", "reviewer"] * ROUNDS, "writer"]
TEAM_EDGES = [
    {"kind": "fan_out", "from": "planner", "to": "explorer", "least": 1, "most": 8},
    {"kind": "join", "from": ["explorer"], "to": "engineer"},
    {"kind": "loop", "from": "reviewer", "to": "engineer", "most": 10, "probability": 0.5},
    {"kind": "branch", "from": "reviewer", "to": "writer", "probability": 0.5},
    {"kind": "next", "from": "engineer", "to": "reviewer"},
]


def by_key(edges: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(edges, key=lambda edge: (str(edge["from"]), edge["to"]))


def assert_declarable(graph: dict[str, Any]) -> None:
    """The coordinator takes it."""
    import json

    limits = WorkflowLimits()
    checked(parsed(json.dumps(graph).encode(), limits), limits)


def assert_tells_the_team(calls: list[Asked]) -> None:
    assert sorted(one.agent for one in calls) == sorted(AGENTS)
    assert {(one.agent, one.parent) for one in calls} == {
        ("planner", ""),
        ("explorer", "planner"),
        ("engineer", "explorer"),
        ("reviewer", "engineer"),
        ("engineer", "reviewer"),
        ("writer", "reviewer"),
    }


def test_the_graph_is_declared_before_the_first_run(server: Seen, model: ChatOpenAI) -> None:
    with_pythia(team(model), model, workflow="research")
    (put,) = server.asked
    assert (put.method, put.path) == ("PUT", "/v1/workflows/research")
    assert list(put.body["agents"]) == ["planner", "explorer", "engineer", "reviewer", "writer"]
    assert put.body["start"] == "planner"
    assert by_key(put.body["edges"]) == by_key(TEAM_EDGES)
    assert_declarable(put.body)


def test_nodes_say_who_asks(server: Seen, model: ChatOpenAI) -> None:
    graph = with_pythia(team(model), model, workflow="research")
    model.invoke("outside")
    for _ in range(2):
        graph.invoke({"name": "r"})
    flush()
    assert "x-workflow" not in server.calls[0].headers
    calls = server.calls[1:]
    runs = list(dict.fromkeys(one.run for one in calls))
    assert len(runs) == 2
    for run in runs:
        assert_tells_the_team([one for one in calls if one.run == run])
    assert {one.headers["x-workflow"] for one in calls} == {"research"}
    assert server.ended() == dict.fromkeys(runs, True)
    assert [one.method for one in server.reports].count("PUT") == 1


async def test_tasks_do_not_get_in_each_others_way(server: Seen, model: ChatOpenAI) -> None:
    server.delay_s = 0.01
    graph = with_pythia(team(model, asynchronous=True), model, workflow="research")
    await asyncio.gather(*(graph.ainvoke({"name": f"n{number}"}) for number in range(4)))
    await asyncio.to_thread(flush)
    assert_runs_kept_apart(server, 4)


def test_threads_do_not_get_in_each_others_way(server: Seen, model: ChatOpenAI) -> None:
    server.delay_s = 0.01
    graph = with_pythia(team(model), model, workflow="research")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: graph.invoke({"name": f"n{number}"}), range(4)))
    flush()
    assert_runs_kept_apart(server, 4)


def assert_runs_kept_apart(server: Seen, count: int) -> None:
    names: dict[str, set[str]] = {}
    for one in server.calls:
        name, agent = one.said().split()
        assert one.agent == agent
        names.setdefault(one.run, set()).add(name)
    assert len(names) == count
    assert all(len(found) == 1 for found in names.values())
    for run in names:
        assert_tells_the_team([one for one in server.calls if one.run == run])
    assert server.ended() == dict.fromkeys(names, True)


async def test_streams_and_chains_within_nodes_are_told_too(
    server: Seen, model: ChatOpenAI
) -> None:
    chain = ChatPromptTemplate.from_messages([("user", "{name} planner")]) | model

    async def writer(state: State) -> dict[str, Any]:
        async for _ in model.astream(f"{state['name']} writer"):
            pass
        await model.abatch([f"{state['name']} writer"] * 2)
        return {}

    builder = StateGraph(State)
    builder.add_node("planner", chain | (lambda answer: {"rounds": 1}))
    builder.add_node("writer", writer)
    builder.add_edge(START, "planner")
    builder.add_edge("planner", "writer")
    graph = with_pythia(builder.compile(), model, workflow="research")
    async for _ in graph.astream({"name": "n"}):
        pass
    await asyncio.to_thread(flush)
    assert [one.agent for one in server.calls] == ["planner", "writer", "writer", "writer"]
    assert [one.parent for one in server.calls] == ["", "planner", "planner", "planner"]
    assert all(one.said() == f"n {one.agent}" for one in server.calls)
    assert list(server.ended().values()) == [True]


def test_an_agent_with_tools_is_one_agent_that_loops(server: Seen) -> None:
    model = model_of(server)

    @tool
    def look_up(word: str) -> str:
        """Look a word up."""
        return str(model.invoke(f"what is {word}").content)

    def says(body: dict[str, Any]) -> Any:
        asked = body["messages"][-1]
        return [("look_up", {"word": "x"})] if asked["content"] == "go" else "done"

    server.says = says
    bound = model.bind_tools([look_up])

    def agent(state: MessagesState) -> dict[str, Any]:
        return {"messages": [bound.invoke(state["messages"])]}

    def more(state: MessagesState) -> str:
        last = state["messages"][-1]
        return "tools" if isinstance(last, AIMessage) and last.tool_calls else END

    builder = StateGraph(MessagesState)
    builder.add_node("agent", agent)
    builder.add_node("tools", ToolNode([look_up]))
    builder.add_edge(START, "agent")
    builder.add_conditional_edges("agent", more, ["tools", END])
    builder.add_edge("tools", "agent")
    graph = with_pythia(builder.compile(), bound, workflow="react")
    end = graph.invoke({"messages": [("user", "go")]})
    assert isinstance(end["messages"][-2], ToolMessage)
    put = server.asked[0]
    assert put.body["agents"] == {"agent": {}}
    assert put.body["edges"] == [
        {"kind": "loop", "from": "agent", "to": "agent", "most": 10, "probability": 0.5}
    ]
    assert_declarable(put.body)
    assert [one.agent for one in server.calls] == ["agent", "tools", "agent"]
    assert len({one.run for one in server.calls}) == 1


def test_graphs_within_a_node_speak_for_it(server: Seen, model: ChatOpenAI) -> None:
    inner = StateGraph(State)
    inner.add_node("deep", lambda state: model.invoke(f"{state['name']} deep") and {})
    inner.add_edge(START, "deep")
    outer = StateGraph(State)
    outer.add_node("helper", inner.compile())
    outer.add_node("writer", lambda state: model.invoke(f"{state['name']} writer") and {})
    outer.add_edge(START, "helper")
    outer.add_edge("helper", "writer")
    graph = with_pythia(outer.compile(), model, workflow="nested")
    graph.invoke({"name": "n"})
    flush()
    assert [(one.agent, one.parent) for one in server.calls] == [
        ("helper", ""),
        ("writer", "helper"),
    ]
    assert len(server.ended()) == 1


def test_nodes_that_call_no_model_are_left_out(server: Seen, model: ChatOpenAI) -> None:
    builder = StateGraph(State)
    builder.add_node("planner", lambda state: model.invoke("n planner") and {})
    builder.add_node("count", lambda state: {"rounds": 1})
    builder.add_node("writer", lambda state: model.invoke("n writer") and {})
    builder.add_edge(START, "count")
    builder.add_edge("count", "planner")
    builder.add_edge("planner", "writer")
    graph = with_pythia(builder.compile(), model, workflow="w", agents=["planner", "writer"])
    graph.invoke({"name": "n"})
    put = server.asked[0]
    assert put.body["start"] == "planner"
    assert put.body["edges"] == [{"kind": "next", "from": "planner", "to": "writer"}]
    assert [(one.agent, one.parent) for one in server.calls] == [
        ("planner", ""),
        ("writer", "planner"),
    ]


def test_commands_and_parallel_branches_are_declared() -> None:
    def route(state: State) -> Command[Any]:
        return Command(goto="left")

    builder = StateGraph(State)
    builder.add_node("router", route, destinations=("left", "right"))
    for name in ("left", "right", "a", "b", "end"):
        builder.add_node(name, lambda state: {})
    builder.add_edge(START, "router")
    builder.add_edge("left", "a")
    builder.add_edge("left", "b")
    builder.add_edge(["a", "b"], "end")
    builder.add_edge("right", "end")
    graph = declared(builder.compile())
    assert_declarable(graph)
    assert by_key(graph["edges"]) == by_key(
        [
            {"kind": "branch", "from": "router", "to": "left", "probability": 0.5},
            {"kind": "branch", "from": "router", "to": "right", "probability": 0.5},
            {"kind": "fan_out", "from": "left", "to": "a", "least": 1, "most": 1},
            {"kind": "fan_out", "from": "left", "to": "b", "least": 1, "most": 1},
            {"kind": "join", "from": ["a", "b"], "to": "end"},
            {"kind": "next", "from": "right", "to": "end"},
        ]
    )


def test_a_graph_that_begins_with_several_agents_is_learned(
    server: Seen, model: ChatOpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    builder = StateGraph(State)
    for name in ("a", "b"):
        builder.add_node(name, lambda state: model.invoke("n") and {})
        builder.add_edge(START, name)
    graph = with_pythia(builder.compile(), model, workflow="w")
    graph.invoke({"name": "n"})
    assert "it does not begin with one agent but with a, b" in caplog.text
    assert {one.agent for one in server.calls} == {"a", "b"}
    assert not any(one.method == "PUT" for one in server.asked)


def test_a_run_that_fails_says_so_and_leaves_nothing_behind(
    server: Seen, model: ChatOpenAI
) -> None:
    def fails(state: State) -> dict[str, Any]:
        model.invoke("n")
        raise ZeroDivisionError

    builder = StateGraph(State)
    builder.add_node("a", fails)
    builder.add_edge(START, "a")
    graph = with_pythia(builder.compile(checkpointer=InMemorySaver()), model, workflow="w")
    with pytest.raises(ZeroDivisionError):
        graph.invoke({"name": "n"}, {"configurable": {"thread_id": "1"}})
    flush()
    assert list(server.ended().values()) == [False]
    (handler,) = graph.config["callbacks"]
    assert not handler._steps


def test_a_plain_server_serves_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    with openai_server(knows_workflows=False) as plain:
        model = model_of(plain)
        graph = with_pythia(team(model), model, workflow="research")
        graph.invoke({"name": "r"})
        flush()
        assert len(plain.calls) == len(AGENTS)
    warnings = [one.message for one in caplog.records if one.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("could not declare the workflow 'research', calls go on without")


def test_nodes_may_use_the_plain_client(server: Seen) -> None:
    client = openai.OpenAI(base_url=server.url, api_key="k")

    def node(state: State) -> dict[str, Any]:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "n a"}])
        return {}

    builder = StateGraph(State)
    builder.add_node("a", node)
    builder.add_edge(START, "a")
    with_pythia(builder.compile(), client, workflow="w").invoke({"name": "n"})
    assert [one.agent for one in server.calls] == ["a"]


def test_who_names_no_model_is_told() -> None:
    builder = StateGraph(State)
    builder.add_node("a", lambda state: {})
    builder.add_edge(START, "a")
    with pytest.raises(ValueError, match="say which models the graph calls"):
        with_pythia(builder.compile(), workflow="w")


async def test_runs_that_are_given_up_leave_nothing_behind(server: Seen, model: ChatOpenAI) -> None:
    server.delay_s = 0.3
    graph = with_pythia(team(model, asynchronous=True), model, workflow="research")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await graph.ainvoke({"name": "n"})
    stream = graph.astream({"name": "n"})
    async for _ in stream:
        break
    await stream.aclose()
    await asyncio.to_thread(flush)
    (handler,) = graph.config["callbacks"]
    assert not handler._steps
    assert set(server.ended().values()) == {False}

"""Declared workflows: what is refused and why, and what the rest means."""

from __future__ import annotations

import time

import msgspec
import pytest

from coordinator.workflow.graph import (
    Agent,
    Branch,
    FanOut,
    Graph,
    GraphError,
    Join,
    Loop,
    Next,
    Way,
    checked,
    graph_schema,
    start_of,
    ways,
)
from coordinator.workflow.limits import WorkflowLimits

LIMITS = WorkflowLimits()
REVIEW = Graph(
    {name: Agent() for name in ("planner", "explorer", "engineer", "reviewer", "writer")},
    [
        FanOut("planner", "explorer", 2, 4),
        Join(["explorer"], "engineer"),
        Next("engineer", "reviewer"),
        Loop("reviewer", "engineer", 3, 0.6),
        Next("reviewer", "writer"),
    ],
)


def graph(*edges: object, start: str = "", agents: str = "abcd") -> Graph:
    return Graph({name: Agent() for name in agents}, list(edges), start)  # type: ignore[arg-type]


def problems(declared: Graph, limits: WorkflowLimits = LIMITS) -> str:
    with pytest.raises(GraphError) as caught:
        checked(declared, limits)
    return str(caught.value)


def test_a_whole_workflow_is_taken_and_read_as_it_is_meant() -> None:
    assert checked(REVIEW, LIMITS) is REVIEW
    assert start_of(REVIEW) == "planner"
    assert ways(REVIEW) == {
        "planner": [Way("explorer", 1.0, 2, 4)],
        "explorer": [Way("engineer", 1.0)],
        "engineer": [Way("reviewer", 1.0)],
        "reviewer": [Way("engineer", 0.6), Way("writer", 0.4)],
        "writer": [],
    }


def test_it_is_written_as_people_write_it() -> None:
    document = b"""{"agents": {"a": {"static_prompt": "You are a.", "output_tokens": 100}, "b": {}},
        "edges": [{"kind": "branch", "from": "a", "to": "b", "probability": 0.25}]}"""
    read = checked(msgspec.json.decode(document, type=Graph), LIMITS)
    assert read.edges == [Branch("a", "b", 0.25)]
    assert read.agents["a"].output_tokens == 100
    assert msgspec.json.decode(msgspec.json.encode(read), type=Graph) == read


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (b'{"agents": {"a": {}}, "edges": [{"kind": "leap", "from": "a", "to": "a"}]}', "leap"),
        (b'{"agents": {"a": {}}, "edgse": []}', "edgse"),
        (b'{"agents": {"a": {"output_tokens": -1}}}', "output_tokens"),
        (
            b'{"agents": {"a": {}}, "edges": '
            b'[{"kind": "branch", "from": "a", "to": "a", "probability": 1.5}]}',
            "probability",
        ),
        (b'{"agents": {"a": {}}, "edges": [{"kind": "loop", "from": "a", "to": "a"}]}', "most"),
    ],
)
def test_what_is_no_graph_at_all_is_refused_by_its_type(document: bytes, said: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=said):
        msgspec.json.decode(document, type=Graph)


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        (Graph({}), "there are none"),
        (graph(Next("a", "x"), agents="a"), "no agent is called 'x'"),
        (
            graph(Branch("a", "b", 0.7), Branch("a", "c", 0.5), agents="abc"),
            "branches add up to 1.2",
        ),
        (
            graph(Branch("b", "c", 0.7), Loop("b", "a", 2, 0.5), Next("a", "b"), agents="abc"),
            "branches and loops add up to 1.2",
        ),
        (graph(Next("a", "b"), Next("b", "a"), agents="ab"), "unbounded loop: a -> b -> a"),
        (graph(Next("a", "a"), agents="a"), "unbounded loop"),
        (graph(Next("a", "b"), start="a", agents="abc"), "nothing leads from 'a' to: c"),
        (graph(Next("a", "b"), agents="abc"), "say which of these is first: a, c"),
        (graph(start="z", agents="a"), "start: no agent is called 'z'"),
        (graph(Next("a", "b"), Next("a", "c"), start="a", agents="abc"), "has a next in edges[0]"),
        (graph(Next("a", "b"), Branch("a", "b", 0.1), agents="ab"), "another edge leads"),
        (graph(FanOut("a", "b", 4, 2), agents="ab"), "least 4 is over most 2"),
        (graph(FanOut("a", "b", 1, 5000), agents="ab"), "at most 1024 calls at once"),
        (graph(Next("a", "b"), Loop("a", "b", 2), agents="ab"), "another edge leads"),
        (
            graph(Next("a", "b"), Next("b", "c"), Loop("a", "c", 2), agents="abc"),
            "nothing leads from 'c' to 'a'",
        ),
        (graph(Next("a", "b"), Loop("b", "a", 20_000), agents="ab"), "10000 rounds"),
        (Graph({"a\n": Agent()}), "control characters"),
        (Graph({"é" * 200: Agent()}), "1 to 256 bytes"),
        (Graph({"\ud800": Agent()}), "no text"),
        (Graph({"a": Agent(static_prompt="x" * (1 << 21))}), "over 1048576 bytes"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(declared: Graph, said: str) -> None:
    assert said in problems(declared)


def test_names_of_any_language_are_taken() -> None:
    assert checked(Graph({"ingénieur 工程师": Agent()}), LIMITS)


def test_a_graph_of_a_million_agents_is_refused_at_once() -> None:
    declared = Graph({str(number): Agent() for number in range(1_000_000)})
    began_s = time.perf_counter()
    assert problems(declared) == "agents: 1000000, at most 256 are allowed"
    assert time.perf_counter() - began_s < 0.1


def test_a_graph_of_a_million_edges_is_refused_before_they_are_read() -> None:
    joined = graph(Join(["a"] * 1_000_000, "b"), agents="ab")
    assert problems(joined) == "edges: 1000000, at most 2048 are allowed"


def test_all_problems_are_told_but_not_without_end() -> None:
    declared = graph(*(Next("a", f"x{number}") for number in range(100)), agents="a")
    said = problems(declared)
    assert "'x0'" in said
    assert said.endswith("more")
    assert len(said) < 4000


def test_the_largest_graph_is_checked_quickly() -> None:
    names = [f"agent {number}" for number in range(256)]
    edges = [
        Branch(source, target, 1e-3)
        for at, source in enumerate(names)
        for target in names[at + 1 : at + 8]
    ]
    declared = Graph({name: Agent() for name in names}, edges, names[0])  # type: ignore[arg-type]
    began_s = time.perf_counter()
    checked(declared, LIMITS)
    assert time.perf_counter() - began_s < 0.5


def test_the_schema_says_what_edges_there_are() -> None:
    schema = graph_schema()
    kinds = {
        definition["properties"]["kind"]["enum"][0]
        for definition in schema["$defs"].values()
        if "kind" in definition["properties"]
    }
    assert kinds == {"next", "branch", "fan_out", "join", "loop"}

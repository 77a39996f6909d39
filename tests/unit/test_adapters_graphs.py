"""Graphs of frameworks as declarations: whatever they look like, the coordinator takes them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.adapters.graphs import END, Link, NoGraph, contracted, graph_of
from coordinator.workflow.graph import Graph, checked, ways
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.registry import parsed

NAMES = "abcdef"
LIMITS = WorkflowLimits()
links = st.lists(
    st.builds(Link, st.sampled_from(NAMES), st.sampled_from([*NAMES, END, END]), st.booleans()),
    max_size=20,
)


def taken(graph: dict[str, Any]) -> Graph:
    """As the coordinator reads it; GraphError if it does not."""
    return checked(parsed(json.dumps(graph).encode(), LIMITS), LIMITS)


@given(links=links, kept=st.sets(st.sampled_from(NAMES)))
def test_every_graph_is_taken(links: list[Link], kept: set[str]) -> None:
    kept = kept | {"a"}
    graph = taken(graph_of("a", contracted(links, kept), {name: {} for name in sorted(kept)}))
    assert graph.start == "a"
    assert set(graph.agents) <= kept


@given(links=links)
def test_every_link_of_an_agent_that_is_reached_is_declared(links: list[Link]) -> None:
    graph = taken(graph_of("a", links, {name: {} for name in NAMES}))
    declared = {(source, way.target) for source, targets in ways(graph).items() for way in targets}
    drawn = {(link.source, link.target) for link in links if link.target != END}
    assert declared == {ends for ends in drawn if ends[0] in graph.agents}


def test_what_is_left_out_leads_on() -> None:
    links = [Link("a", "x"), Link("x", "y", True), Link("y", "b"), Link("y", "y"), Link("b", END)]
    assert contracted(links, ["a", "b"]) == [Link("b", END), Link("a", "b", True)]


def test_who_does_not_begin_with_an_agent_is_told() -> None:
    with pytest.raises(NoGraph, match="does not begin with one agent"):
        graph_of("x", [], {"a": {}})

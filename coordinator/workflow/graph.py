"""Declared workflows: who calls whom, and how often.

Agents are nodes; edges say what a call of an agent sets off when it ends::

    next      planner -> writer                 always, or whenever no branch or loop is taken
    branch    triage -> refund (p)              with a probability
    fan_out   planner -> explorer x [2..5]      several calls at once
    join      [explorer, critic] -> writer      when all calls of those agents have ended
    loop      reviewer -> engineer, at most 4   back to an agent that led here

An agent without edges out, or whose probabilities leave some over, ends the run. Only loops
may lead back, so that every run ends. Declared graphs are what somebody believes: they are
the prior of what is learned, never a promise.
"""

from __future__ import annotations

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any

import msgspec

from coordinator.workflow.limits import WorkflowLimits

PROBABILITY_SLACK = 1e-6
"""How far above 1 probabilities may add up, for people who write 0.33 and 0.67."""

LOOP_PROBABILITY = 0.5
"""How often a loop without a probability is thought to go round again."""

PROBLEMS_SHOWN = 20

Name = Annotated[str, msgspec.Meta(min_length=1)]
Probability = Annotated[float, msgspec.Meta(gt=0, le=1)]
Tokens = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
AtLeast1 = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
_ENDS = {"source": "from", "target": "to", "sources": "from"}


class GraphError(Exception):
    """A declared workflow makes no sense; ``problems`` says all that is wrong with it."""

    def __init__(self, problems: list[str]) -> None:
        shown = problems[:PROBLEMS_SHOWN]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        super().__init__("; ".join(shown))
        self.problems = shown


class Agent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is known of an agent in advance; all of it may be left out.

    ``static_prompt``: with what all its prompts begin: chat messages, which go through the chat
    template with the ``tools``, or text, as it is completed. ``prompt_tokens``,
    ``output_tokens``: expected lengths. ``tools``: what it is offered, as in a chat request.
    """

    static_prompt: str | list[dict[str, Any]] = ""
    prompt_tokens: Tokens | None = None
    output_tokens: Tokens | None = None
    tools: list[dict[str, Any]] = []


class Next(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    tag="next",
    tag_field="kind",
    rename=_ENDS,
):
    """``target`` follows ``source``, unless a branch or loop of it is taken."""

    source: Name
    target: Name


class Branch(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    tag="branch",
    tag_field="kind",
    rename=_ENDS,
):
    """``target`` follows ``source`` with a probability."""

    source: Name
    target: Name
    probability: Probability


class FanOut(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    tag="fan_out",
    tag_field="kind",
    rename=_ENDS,
):
    """``source`` sets off from ``least`` to ``most`` calls of ``target`` at once."""

    source: Name
    target: Name
    least: AtLeast1 = 1
    most: AtLeast1 = 8


class Join(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    tag="join",
    tag_field="kind",
    rename=_ENDS,
):
    """``target`` waits for all calls of ``sources``."""

    sources: Annotated[list[Name], msgspec.Meta(min_length=1)]
    target: Name


class Loop(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    tag="loop",
    tag_field="kind",
    rename=_ENDS,
):
    """``source`` goes back to ``target``, at most ``most`` times in a run."""

    source: Name
    target: Name
    most: AtLeast1
    probability: Probability = LOOP_PROBABILITY


Edge = Next | Branch | FanOut | Join | Loop


class Graph(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A declared workflow. ``start``: the first agent; may be left out if only one can be."""

    agents: dict[Name, Agent]
    edges: list[Edge] = []
    start: str = ""
    description: str = ""


class Way(msgspec.Struct, frozen=True, gc=False):
    """What a declared edge says: how probable ``target`` is, and how many calls at once."""

    target: str
    probability: float
    least: int = 1
    most: int = 1


def graph_schema() -> dict[str, Any]:
    """The JSON Schema of ``Graph``."""
    return msgspec.json.schema(Graph)


def checked(graph: Graph, limits: WorkflowLimits) -> Graph:
    """The graph, if it makes sense; GraphError otherwise.

    Takes time linear in the graph, and next to none for one that is over a limit.
    """
    problems = list(_sizes(graph, limits))
    if problems:
        raise GraphError(problems)
    problems = [*_edges(graph, limits), *_probabilities(graph)]
    if problems:
        raise GraphError(problems)
    problems = list(_shape(graph))
    if problems:
        raise GraphError(problems)
    return graph


def start_of(graph: Graph) -> str:
    """The agent that a run of a checked graph begins with."""
    return graph.start or next(iter(_possible_starts(graph)))


def ways(graph: Graph) -> dict[str, list[Way]]:
    """What each agent of a checked graph sets off. What is missing to 1 ends the run."""
    found: dict[str, list[Way]] = {agent: [] for agent in graph.agents}
    left = {agent: 1.0 - taken for agent, taken in _taken(graph).items()}
    for edge in graph.edges:
        match edge:
            case Next(source, target):
                found[source].append(Way(target, max(0.0, left[source])))
            case Branch(source, target, probability):
                found[source].append(Way(target, probability))
            case Loop(source, target, _, probability):
                found[source].append(Way(target, probability))
            case FanOut(source, target, least, most):
                found[source].append(Way(target, max(0.0, left[source]), least, most))
            case Join(sources, target):
                for source in sources:
                    found[source].append(Way(target, max(0.0, left[source])))
    return found


def _sizes(graph: Graph, limits: WorkflowLimits) -> Iterator[str]:
    if not graph.agents:
        yield "agents: there are none"
    if len(graph.agents) > limits.graph_agents:
        yield f"agents: {len(graph.agents)}, at most {limits.graph_agents} are allowed"
        return
    edges = sum(len(edge.sources) if isinstance(edge, Join) else 1 for edge in graph.edges)
    if edges > limits.graph_edges:
        yield f"edges: {edges}, at most {limits.graph_edges} are allowed"
        return
    for name, agent in graph.agents.items():
        wrong = name_problem(name, limits)
        if wrong:
            yield f"agents: {wrong}"
        if len(msgspec.json.encode((agent.static_prompt, agent.tools))) > limits.static_bytes:
            yield f"agents.{name}: static_prompt and tools are over {limits.static_bytes} bytes"


def name_problem(name: str, limits: WorkflowLimits) -> str:
    """What is wrong with the name of a workflow or agent; empty if it may be declared."""
    shown = repr(name[:32])
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return f"{shown} is no text"
    if not 0 < size <= limits.name_bytes:
        return f"{shown}: a name has 1 to {limits.name_bytes} bytes"
    if not name.isprintable() or name != name.strip():
        return f"{shown}: a name has no control characters and no spaces at its ends"
    return ""


def _edges(graph: Graph, limits: WorkflowLimits) -> Iterator[str]:
    """What is wrong with single edges, and with edges that exclude each other."""
    always: dict[str, int] = {}
    seen: set[tuple[str, str]] = set()
    for number, edge in enumerate(graph.edges):
        at = f"edges[{number}]"
        sources = _sources(edge)
        for name in (*sources, edge.target):
            if name not in graph.agents:
                yield f"{at}: no agent is called {name[:64]!r}"
        for source in sources:
            if (source, edge.target) in seen:
                yield f"{at}: another edge leads from {source!r} to {edge.target!r}"
            seen.add((source, edge.target))
        if isinstance(edge, Next):
            if edge.source in always:
                yield (
                    f"{at}: {edge.source!r} has a next in edges[{always[edge.source]}]; "
                    "write branch for one of several, or fan_out for all of them"
                )
            always[edge.source] = number
        yield from _bounds(at, edge, limits)


def _bounds(at: str, edge: Edge, limits: WorkflowLimits) -> Iterator[str]:
    if isinstance(edge, FanOut):
        if edge.least > edge.most:
            yield f"{at}: least {edge.least} is over most {edge.most}"
        if edge.most > limits.fan_out:
            yield f"{at}: most {edge.most}, at most {limits.fan_out} calls at once are allowed"
    if isinstance(edge, Loop) and edge.most > limits.loop_rounds:
        yield f"{at}: most {edge.most}, at most {limits.loop_rounds} rounds are allowed"


def _sources(edge: Edge) -> list[str]:
    return edge.sources if isinstance(edge, Join) else [edge.source]


def _taken(graph: Graph) -> dict[str, float]:
    """The probabilities of branches and loops out of each agent, added up."""
    taken = dict.fromkeys(graph.agents, 0.0)
    for edge in graph.edges:
        if isinstance(edge, Branch | Loop):
            taken[edge.source] = taken.get(edge.source, 0.0) + edge.probability
    return taken


def _probabilities(graph: Graph) -> Iterator[str]:
    has_loop = {edge.source for edge in graph.edges if isinstance(edge, Loop)}
    for agent, taken in _taken(graph).items():
        if taken > 1 + PROBABILITY_SLACK:
            what = "branches and loops" if agent in has_loop else "branches"
            yield f"the probabilities of {agent!r}'s {what} add up to {taken:.4g}"


def _forward(graph: Graph) -> dict[str, set[str]]:
    """Who follows whom, loops left out."""
    followers: dict[str, set[str]] = {agent: set() for agent in graph.agents}
    for edge in graph.edges:
        if not isinstance(edge, Loop):
            for source in _sources(edge):
                followers[source].add(edge.target)
    return followers


def _possible_starts(graph: Graph) -> list[str]:
    followed = set().union(*_forward(graph).values())
    return [agent for agent in graph.agents if agent not in followed]


def _shape(graph: Graph) -> Iterator[str]:
    """What is wrong with the whole: cycles, no or several beginnings, agents nobody reaches."""
    followers = _forward(graph)
    try:
        TopologicalSorter(followers).prepare()
    except CycleError as error:
        # Followers stand where the sorter expects predecessors, so its cycle runs backwards.
        yield (
            f"unbounded loop: {' -> '.join(reversed(error.args[1]))}; "
            "write loop with most for the edge that leads back"
        )
        return
    if graph.start and graph.start not in graph.agents:
        yield f"start: no agent is called {graph.start[:64]!r}"
        return
    starts = [graph.start] if graph.start else _possible_starts(graph)
    if len(starts) != 1:
        yield f"start: say which of these is first: {', '.join(starts[:8])}"
        return
    unreachable = sorted(set(graph.agents) - _reached(followers, starts[0]))
    if unreachable:
        yield f"nothing leads from {starts[0]!r} to: {', '.join(unreachable[:8])}"
    yield from _open_loops(graph, followers)


def _open_loops(graph: Graph, followers: dict[str, set[str]]) -> Iterator[str]:
    reached: dict[str, set[str]] = {}
    for number, edge in enumerate(graph.edges):
        if isinstance(edge, Loop):
            if edge.target not in reached:
                reached[edge.target] = _reached(followers, edge.target)
            if edge.source not in reached[edge.target]:
                yield (
                    f"edges[{number}]: a loop leads back, but nothing leads from "
                    f"{edge.target!r} to {edge.source!r}"
                )


def _reached(followers: dict[str, set[str]], start: str) -> set[str]:
    """All agents that a run may come to from ``start``, itself included."""
    reached, waiting = {start}, [start]
    while waiting:
        for target in followers[waiting.pop()]:
            if target not in reached:
                reached.add(target)
                waiting.append(target)
    return reached

"""OpenAI Agents SDK: agents, handoffs and agents as tools are declared, and calls say who asks.

::

    team = Team(triage, AsyncOpenAI(base_url="http://localhost:8000/v1", api_key="..."),
                workflow="support")
    result = await team.run("My parcel is late")     # in place of Runner.run(triage, ...)

``run``, ``run_sync`` and ``run_streamed`` take what ``Runner``'s take. The agent is told by a
filter of the run's configuration, which agents that are tools inherit; hooks run in tasks of their
own, from where nothing can be set for the call that follows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from agents import Agent, Handoff, RunConfig, Runner, RunResult, RunResultStreaming
from agents.exceptions import UserError
from agents.models.chatcmpl_converter import Converter
from agents.run_config import CallModelData
from openai import AsyncOpenAI

from cluster.adapters import graphs
from cluster.adapters.graphs import Link, graph_of
from cluster.adapters.runs import Run
from cluster.adapters.runs import run as run_of
from cluster.adapters.server import attach, run_end
from cluster.adapters.speaker import Speaker, current

logger = logging.getLogger("pythia.adapters")


class Team:
    """A starting agent and whoever it hands over to or uses as a tool.

    ``client``: the one that the agents' models use. What Runner's functions raise is raised here.
    """

    def __init__(
        self,
        start: Agent[Any],
        client: AsyncOpenAI,
        *,
        workflow: str,
        rounds_max: int = graphs.ROUNDS_MAX,
    ) -> None:
        self.start = start
        self.workflow = workflow
        self.graph = declared(start, rounds_max)
        self._client = client

    async def run(self, input: Any, **options: Any) -> RunResult:
        """``Runner.run`` of the starting agent."""
        async with self._run() as run:
            return await Runner.run(self.start, input, **_options(run, options))

    def run_sync(self, input: Any, **options: Any) -> RunResult:
        """``Runner.run_sync`` of the starting agent."""
        with self._run() as run:
            return Runner.run_sync(self.start, input, **_options(run, options))

    def run_streamed(self, input: Any, **options: Any) -> RunResultStreaming:
        """``Runner.run_streamed`` of the starting agent. The run ends when its stream does."""
        server = attach(self._client)
        run = self._run()
        before = current.get()
        current.set(Speaker(self.workflow, run.id))
        server.declare(self.workflow, self.graph)
        try:
            result = Runner.run_streamed(self.start, input, **_options(run, options))
        finally:
            current.set(before)
        loop = result.run_loop_task
        if loop is not None:
            loop.add_done_callback(
                lambda task: server.send_later(
                    run_end(self.workflow, run.id, _went_well(task, result))
                )
            )
        return result

    def _run(self) -> Run:
        return run_of(self._client, self.workflow, graph=self.graph)


def _went_well(task: asyncio.Task[Any], result: RunResultStreaming) -> bool:
    """Whether a stream has come to an answer; some errors are kept for whoever reads it."""
    return not task.cancelled() and task.exception() is None and result.final_output is not None


# --- the graph ----------------------------------------------------------------------------------


def declared(start: Agent[Any], rounds_max: int = graphs.ROUNDS_MAX) -> dict[str, Any]:
    """Agents that ``start`` may come to, as a workflow that can be declared."""
    agents: dict[str, dict[str, Any]] = {}
    links = [Link(start.name, graphs.END, conditional=True)]
    waiting = [start]
    while waiting:
        agent = waiting.pop()
        if agent.name in agents:
            continue
        agents[agent.name] = _known(agent)
        for other in _handoffs(agent):
            links.append(Link(agent.name, other.name, conditional=True))
            links.append(Link(other.name, graphs.END, conditional=True))
            waiting.append(other)
        for other in _agents_as_tools(agent):
            links.append(Link(agent.name, other.name, conditional=True))
            # It answers to whoever uses it, and does not end the run.
            links.append(Link(other.name, agent.name, conditional=True))
            waiting.append(other)
        if any(getattr(tool, "_agent_instance", None) is None for tool in agent.tools):
            links.append(Link(agent.name, agent.name, conditional=True))
    return graph_of(start.name, links, agents, rounds_max)


def _handoffs(agent: Agent[Any]) -> Iterator[Agent[Any]]:
    for handoff in agent.handoffs:
        target = handoff if isinstance(handoff, Agent) else _target(handoff)
        if isinstance(target, Agent):
            yield target


def _target(handoff: Handoff[Any, Any]) -> object:
    """The agent behind a handoff; None for one that is chosen when it comes to that."""
    reference = getattr(handoff, "_agent_ref", None)
    return reference() if reference is not None else None


def _agents_as_tools(agent: Agent[Any]) -> Iterator[Agent[Any]]:
    for tool in agent.tools:
        inner = getattr(tool, "_agent_instance", None)
        if isinstance(inner, Agent):
            yield inner


def _known(agent: Agent[Any]) -> dict[str, Any]:
    """With what all prompts of an agent begin, as far as it says so beforehand."""
    known: dict[str, Any] = {}
    if isinstance(agent.instructions, str) and agent.instructions:
        known["static_prompt"] = [{"role": "system", "content": agent.instructions}]
        known["tools"] = _tools(agent)
    return known


def _tools(agent: Agent[Any]) -> list[dict[str, Any]]:
    """Tools and handoffs as they are in a chat request; none if they have no such form."""
    try:
        tools: list[Any] = [Converter.tool_to_openai(tool) for tool in agent.tools]
        for handoff in agent.handoffs:
            if isinstance(handoff, Handoff):
                tools.append(Converter.convert_handoff_tool(handoff))
            else:
                tools.append(Converter.convert_handoff_tool(_default_handoff(handoff)))
    except UserError as error:
        logger.info("tools of %r are not declared: %s", agent.name, error)
        return []
    return [dict(tool) for tool in tools]


def _default_handoff(agent: Agent[Any]) -> Handoff[Any, Any]:
    from agents import handoff

    return handoff(agent)


# --- who asks -------------------------------------------------------------------------------------


@dataclass
class _Turns:
    """Who has asked in a run, last of all, and whom each of them followed."""

    last: str = ""
    parents: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Turn:
    turns: _Turns
    agent: str


_turn: ContextVar[_Turn | None] = ContextVar("pythia_turn", default=None)
"""Whose turn it is here. Turns are tasks; tools are tasks of the turn that calls them."""


def _options(run: Run, options: Mapping[str, Any]) -> dict[str, Any]:
    """Runner's options, with a configuration that tells who asks."""
    given = options.get("run_config")
    config = RunConfig(**given) if isinstance(given, Mapping) else given or RunConfig()
    inner = config.call_model_input_filter
    turns = _Turns()

    def filtered(data: CallModelData[Any]) -> Any:
        _asks(run, turns, data.agent.name)
        return inner(data) if inner is not None else data.model_data

    return {**options, "run_config": replace(config, call_model_input_filter=filtered)}


def _asks(run: Run, turns: _Turns, agent: str) -> None:
    """``agent`` is about to call its model, in this very task."""
    here = _turn.get()
    if here is not None and here.turns is turns and here.agent != agent:
        parent = here.agent
    else:
        parent = turns.last if turns.last != agent else turns.parents.get(agent, "")
    turns.last, turns.parents[agent] = agent, parent
    _turn.set(_Turn(turns, agent))
    current.set(Speaker(run.workflow, run.id, agent, parent))

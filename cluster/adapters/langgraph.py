"""LangGraph: the graph is declared, and calls say which run and node they belong to.

::

    model = ChatOpenAI(base_url="http://localhost:8000/v1", api_key="...", model="...")
    graph = with_pythia(builder.compile(), model, workflow="research")
    graph.invoke({...})                     # or ainvoke, stream, astream, batch, ...

Nothing else changes: LangGraph keeps what it is doing in a context variable, in threads and in
tasks alike, and a callback handler tells where runs, nodes and calls of models begin and end. An
agent is a node of ``graph``; whatever graphs run inside of it speak for it.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

import openai
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables.config import var_child_runnable_config
from langgraph.constants import END, START
from langgraph.prebuilt import ToolNode

from cluster.adapters import graphs
from cluster.adapters.graphs import Link, NoGraph, contracted, graph_of
from cluster.adapters.server import Server, attach, run_end
from cluster.adapters.speaker import Speaker, add_source

logger = logging.getLogger("pythia.adapters")

STEPS_MAX = 100_000
"""Chains and tools that are followed at once; beyond it the oldest are forgotten."""

CompiledGraph = TypeVar("CompiledGraph")


def with_pythia(
    graph: CompiledGraph,
    *models: Any,
    workflow: str,
    agents: Collection[str] | None = None,
    rounds_max: int = graphs.ROUNDS_MAX,
) -> CompiledGraph:
    """``graph``, with calls of ``models`` saying which run and node they belong to.

    ``models``: what the nodes call, ``ChatOpenAI`` or ``openai`` clients, at least one; the first
    one's server is told of the workflow. ``agents``: the nodes that call a model, where not all do
    (nodes that only run tools are known); ``rounds_max``: of its loops, as declared.
    """
    servers = [attach(client) for model in models for client in _clients(model)]
    if not servers:
        raise ValueError("say which models the graph calls")
    compiled: Any = graph
    links, names = _drawn(compiled)
    kept = names if agents is None else [name for name in names if name in agents]
    links = contracted(links, [START, *kept])
    try:
        servers[0].declare(workflow, _declared(compiled, links, kept, rounds_max))
    except NoGraph as error:
        logger.warning("the workflow %r is not declared, it will be learned: %s", workflow, error)
    add_source(_speaker)
    handler = Handler(servers[0], workflow, links)
    bound: CompiledGraph = compiled.with_config(callbacks=[handler])
    return bound


def _clients(model: Any) -> list[Any]:
    """The ``openai`` clients behind a model, the synchronous one first."""
    if isinstance(model, openai.OpenAI | openai.AsyncOpenAI):
        return [model]
    while not hasattr(model, "root_client") and hasattr(model, "bound"):
        model = model.bound  # a model with tools or other arguments bound to it
    found = [getattr(model, name, None) for name in ("root_client", "root_async_client")]
    return [client for client in found if client is not None]


# --- the graph ----------------------------------------------------------------------------------


def declared(
    graph: Any, agents: Collection[str] | None = None, rounds_max: int = graphs.ROUNDS_MAX
) -> dict[str, Any]:
    """A compiled graph as it is declared. NoGraph if that is impossible."""
    links, names = _drawn(graph)
    kept = names if agents is None else [name for name in names if name in agents]
    return _declared(graph, contracted(links, [START, *kept]), kept, rounds_max)


def _declared(
    graph: Any, links: list[Link], names: Collection[str], rounds_max: int
) -> dict[str, Any]:
    first = sorted({link.target for link in links if link.source == START} - {graphs.END})
    if len(first) != 1:
        raise NoGraph(f"it does not begin with one agent but with {', '.join(first) or 'none'}")
    links = [link for link in links if link.source != START]
    return graph_of(first[0], links, {name: {} for name in names}, rounds_max)


def _drawn(graph: Any) -> tuple[list[Link], list[str]]:
    """Links between nodes, and the nodes that may call a model."""
    drawn = graph.get_graph()
    names = [
        name
        for name, node in drawn.nodes.items()
        if name not in (START, END) and not isinstance(node.data, ToolNode)
    ]
    links = [
        Link(edge.source, graphs.END if edge.target == END else edge.target, edge.conditional)
        for edge in drawn.edges
    ]
    return links, names


# --- runs ---------------------------------------------------------------------------------------


@dataclass
class _Run:
    """A run that goes on. ``asked``: agents that have called a model; ``ended``: those of them
    that have ended, numbered in the order in which they did; ``steps``: those that go on."""

    id: str
    asked: set[str] = field(default_factory=set)
    ended: dict[str, int] = field(default_factory=dict)
    steps: set[UUID] = field(default_factory=set)


@dataclass(frozen=True)
class _Step:
    """A chain or tool that goes on. ``outermost``: its end is that of its agent, or its run."""

    run: _Run
    agent: str = ""
    parent: str = ""
    outermost: bool = False


class Handler(BaseCallbackHandler):
    """Knows which run and agent each of LangChain's steps belongs to."""

    run_inline = True
    """In order, not in a thread somewhere: what is asked next has to know it."""

    def __init__(self, server: Server, workflow: str, links: Collection[Link]) -> None:
        self._server = server
        self._workflow = workflow
        self._before: dict[str, set[str]] = {}
        """Agents that may come directly before each."""
        for link in links:
            self._before.setdefault(link.target, set()).add(link.source)
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._steps: OrderedDict[UUID, _Step] = OrderedDict()

    def speaker(self, step_id: UUID | None) -> Speaker | None:
        """Who speaks within a step: a model is called there."""
        step = self._steps.get(step_id) if step_id is not None else None
        if step is None:
            return None
        step.run.asked.add(step.agent)
        return Speaker(self._workflow, step.run.id, step.agent, step.parent)

    # --- what LangChain tells ---------------------------------------------------------------------

    def on_chain_start(
        self,
        serialized: Any,
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """A graph, a node or something within begins."""
        with self._lock:
            above = self._steps.get(parent_run_id) if parent_run_id is not None else None
            if above is None:
                self._begin(run_id, _Step(_Run(str(run_id)), outermost=True))
            elif above.agent:
                self._begin(run_id, _Step(above.run, above.agent, above.parent))
            else:
                agent = _node(metadata or {})
                parent = self._parent(above.run, agent)
                self._begin(run_id, _Step(above.run, agent, parent, outermost=bool(agent)))

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **others: Any) -> None:
        """It ended."""
        self._end(run_id, completed=True)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **others: Any) -> None:
        """It failed, or was given up."""
        self._end(run_id, completed=False)

    def on_tool_start(
        self,
        serialized: Any,
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **others: Any,
    ) -> None:
        """A tool begins; a model may be called within."""
        self._within(run_id, parent_run_id)

    def on_chat_model_start(
        self,
        serialized: Any,
        messages: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **others: Any,
    ) -> None:
        """A model is called, in this very thread or task."""
        if self._within(run_id, parent_run_id):
            _asking.set((self, run_id))

    def on_llm_start(
        self,
        serialized: Any,
        prompts: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **others: Any,
    ) -> None:
        """The same, of a model that completes texts."""
        if self._within(run_id, parent_run_id):
            _asking.set((self, run_id))

    def on_llm_end(self, response: Any, *, run_id: UUID, **others: Any) -> None:
        """It answered."""
        self._end(run_id, completed=True)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **others: Any) -> None:
        """It did not."""
        self._end(run_id, completed=False)

    def on_tool_end(self, output: Any, *, run_id: UUID, **others: Any) -> None:
        """It ended."""
        self._end(run_id, completed=True)

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **others: Any) -> None:
        """It failed."""
        self._end(run_id, completed=False)

    # --- what follows from it -------------------------------------------------------------------

    def _within(self, step_id: UUID, above_id: UUID | None) -> bool:
        """A step begins that belongs to whom the one above does, if that is known."""
        with self._lock:
            above = self._steps.get(above_id) if above_id is not None else None
            if above is not None:
                self._begin(step_id, _Step(above.run, above.agent, above.parent))
        return above is not None

    def _begin(self, step_id: UUID, step: _Step) -> None:
        self._steps[step_id] = step
        step.run.steps.add(step_id)
        while len(self._steps) > STEPS_MAX:
            oldest, forgotten = self._steps.popitem(last=False)
            forgotten.run.steps.discard(oldest)

    def _end(self, step_id: UUID, completed: bool) -> None:
        with self._lock:
            step = self._steps.pop(step_id, None)
            if step is None:
                return
            step.run.steps.discard(step_id)
            if not step.outermost:
                return
            if step.agent:
                if step.agent in step.run.asked:
                    step.run.ended[step.agent] = next(self._numbers)
                return
            # What was cancelled is not always told to have ended.
            for left in step.run.steps:
                del self._steps[left]
        self._server.send_later(run_end(self._workflow, step.run.id, completed))

    def _parent(self, run: _Run, agent: str) -> str:
        """The agent that ended last of those that may lead here, or of all if none has."""
        near = self._before.get(agent, set()) & run.ended.keys()
        return max(near or run.ended, key=lambda name: run.ended[name], default="")


def _node(metadata: Mapping[str, Any]) -> str:
    """The node of the outermost graph that a step belongs to; empty if it belongs to none."""
    place = str(metadata.get("langgraph_checkpoint_ns") or metadata.get("langgraph_node") or "")
    return place.partition("|")[0].partition(":")[0]


def _speaker() -> Speaker | None:
    """Who speaks, as LangChain's context variable has it, or as a model was called.

    Neither is enough: nodes may call a client that LangChain does not know, and of a node that is a
    chain only the first link has the context.
    """
    config = var_child_runnable_config.get()
    manager = config.get("callbacks") if config is not None else None
    for handler in getattr(manager, "handlers", ()):
        if isinstance(handler, Handler):
            found = handler.speaker(getattr(manager, "parent_run_id", None))
            if found is not None:
                return found
    asking = _asking.get()
    return asking[0].speaker(asking[1]) if asking is not None else None


_asking: ContextVar[tuple[Handler, UUID] | None] = ContextVar("pythia_asking", default=None)
"""The call of a model that began here last; its handler knows whether it goes on."""

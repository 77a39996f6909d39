"""Runs and agents as context managers, for the plain ``openai`` client.

::

    client = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="...")
    with run(client, "research") as team:
        with team.agent("planner"):
            client.chat.completions.create(...)
        with team.agent("writer"):
            client.chat.completions.create(...)

With ``openai.AsyncOpenAI`` write ``async with run(...)``, and ``with`` for agents. Whatever is
asked inside says which workflow, run and agent it belongs to. Tasks inherit it; a thread says
``with team.agent(...)`` itself. The agent above is the one around, or the one whose answer came
before; the end of the block is the end of the run.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import uuid
from contextvars import ContextVar
from types import TracebackType
from typing import Self

import openai

from cluster.adapters.server import Client, Graph, Report, Server, attach, run_end, run_start
from cluster.adapters.speaker import Speaker, current


class Run:
    """One run of a workflow. ``id`` is its name for the server. Entered once."""

    def __init__(
        self,
        server: Server,
        workflow: str,
        run_id: str,
        graph: Graph | None,
        start: Report | None,
    ) -> None:
        self.workflow = workflow
        self.id = run_id
        self._server = server
        self._graph = graph
        self._start = start
        self._before: Speaker | None = None
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._open: dict[int, Scope] = {}
        self._last = ""
        """The agent whose block ended last."""

    def agent(self, name: str, *, parent: str = "", final: bool = False) -> Scope:
        """A block in which ``name`` asks. ``parent``: if it is not the one that the order of
        blocks tells; ``final``: if it is known to be the last of the run."""
        return Scope(self, name, parent, final)

    # --- entering and leaving -----------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._graph is not None:
            self._server.declare(self.workflow, self._graph)
        if self._start is not None:
            self._server.send(self._start)
        self._enter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        current.set(self._before)
        end = run_end(self.workflow, self.id, kind is None)
        if isinstance(self._server.client, openai.OpenAI):
            self._server.send(end)
        else:
            self._server.send_later(end)

    async def __aenter__(self) -> Self:
        if self._graph is not None:
            await self._server.declare_async(self.workflow, self._graph)
        if self._start is not None:
            await self._server.send_async(self._start)
        self._enter()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        current.set(self._before)
        end = run_end(self.workflow, self.id, kind is None)
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            self._server.send_later(end)  # whoever cancels does not want to wait
        else:
            await self._server.send_async(end)

    def _enter(self) -> None:
        self._before = current.get()
        current.set(Speaker(self.workflow, self.id))

    # --- who follows whom -----------------------------------------------------------------------

    def _opened(self, scope: Scope) -> int:
        number = next(self._numbers)
        with self._lock:
            scope.parent = scope.parent or self._parent_of(scope)
            self._open[number] = scope
        return number

    def _closed(self, number: int, scope: Scope) -> None:
        with self._lock:
            self._open.pop(number, None)
            self._last = scope.name

    def _parent_of(self, scope: Scope) -> str:
        around = _around.get()
        if around is not None and around.run is self:
            return around.name
        if not self._open:
            return self._last
        # Others ask at this moment: what has ended meanwhile may be one of them.
        before = _before.get()
        if before is not None and before.run is self:
            return before.name
        siblings = list(self._open.values())
        return next((each for each in siblings if each.name == scope.name), siblings[-1]).parent


class Scope:
    """The block of one agent; it may be entered once. ``parent``: known once it is entered."""

    def __init__(self, run: Run, name: str, parent: str, final: bool) -> None:
        self.run = run
        self.name = name
        self.parent = parent
        self._final = final
        self._number = -1
        self._outside: Speaker | None = None
        self._around: Scope | None = None

    def __enter__(self) -> Self:
        self._number = self.run._opened(self)
        self._outside, self._around = current.get(), _around.get()
        current.set(Speaker(self.run.workflow, self.run.id, self.name, self.parent, self._final))
        _around.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.run._closed(self._number, self)
        current.set(self._outside)
        _around.set(self._around)
        _before.set(self)


def run(
    client: Client,
    workflow: str,
    *,
    run_id: str = "",
    graph: Graph | None = None,
    deadline_s: float | None = None,
    priority: int = 0,
) -> Run:
    """A run of ``workflow``, to be used with ``with`` (or ``async with``).

    ``run_id``: its name, made up if it is empty. ``graph``: what to declare, once, before the
    first run. ``deadline_s``, ``priority``: see ``POST /v1/workflows/{name}/runs``.
    """
    run_id = run_id or uuid.uuid4().hex
    start = None
    if deadline_s is not None or priority:
        start = run_start(workflow, run_id, deadline_s, priority)
    return Run(attach(client), workflow, run_id, graph, start)


_around: ContextVar[Scope | None] = ContextVar("pythia_around", default=None)
"""The innermost block that is open here."""
_before: ContextVar[Scope | None] = ContextVar("pythia_before", default=None)
"""The block that ended here last."""

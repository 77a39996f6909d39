"""Declared workflows, by name, and what is to be written down before it counts.

A declaration takes effect, and is answered, when it is on disk: until then everything stays as
it was. Records are handed out in order (``take``) and come back as written or not (``written``).
Without a store they are as good as written at once. Those of the cluster's file are there from
the start, are not written down, and can't be changed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from hashlib import blake2b

import msgspec

from coordinator.protocol import StaticPrefix
from coordinator.workflow.graph import Graph, GraphError, checked, name_problem, ways
from coordinator.workflow.keeping import (
    DropGraph,
    DropRun,
    KeepGraph,
    KeepProfile,
    KeepRun,
    Save,
)
from coordinator.workflow.learner import Learner
from coordinator.workflow.limits import WorkflowLimits

UNWRITTEN_MAX = 1024

Then = Callable[[str], None]
"""Called with why it could not be written; empty if it was."""

_decode_graph = msgspec.json.Decoder(Graph).decode
BAD_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding raises that is not what it should be."""


class Declared(msgspec.Struct, frozen=True):
    """A declared workflow. ``fixed``: by the cluster's file; ``last``: agents nothing follows;
    ``digest``: of the graph."""

    graph: Graph
    fixed: bool = False
    last: frozenset[str] = frozenset()
    digest: str = ""


class Busy(Exception):
    """Too much waits to be written."""


Record = KeepGraph | DropGraph | KeepProfile | KeepRun | DropRun


class _Change(msgspec.Struct, frozen=True):
    save: Record
    declared: Declared | None
    then: Then


class Registry:
    """Declared workflows. ``keeps``: whether there is a store."""

    def __init__(self, limits: WorkflowLimits, learner: Learner, keeps: bool = False) -> None:
        self._limits = limits
        self._learner = learner
        self._keeps = keeps
        self.declared: dict[str, Declared] = {}
        self.static: dict[str, dict[str, StaticPrefix]] = {}
        """Static prompts of declared agents, by workflow and agent; not written down: whoever
        templates them says them again to every core."""
        self._static_bytes = 0
        self._unwritten: deque[_Change] = deque()
        self._saves: list[Save] = []

    def fix(self, name: str, graph: Graph) -> None:
        """A workflow of the cluster's file. GraphError if it makes no sense."""
        self._declare(name, _declared(self.checked(name, graph), fixed=True))

    def restore(self, kept: KeepGraph) -> None:
        """A workflow that was written down. GraphError if it makes no sense any more."""
        known = self.declared.get(kept.name)
        if known is None or not known.fixed:
            self._declare(kept.name, _declared(self.read(kept.name, kept.graph)))

    def read(self, name: str, graph: bytes) -> Graph:
        """A graph as JSON, checked; GraphError with all that is wrong with it."""
        return self.checked(name, parsed(graph, self._limits))

    def will_be(self, name: str) -> Declared | None:
        """What is declared under a name once everything is written."""
        for change in reversed(self._unwritten):
            if isinstance(change.save, KeepGraph | DropGraph) and change.save.name == name:
                return change.declared
        return self.declared.get(name)

    def declare(self, name: str, graph: Graph, then: Then) -> None:
        """Declare a checked graph, as soon as that is written. Busy if too much waits."""
        as_json = msgspec.json.encode(graph)
        self._change(KeepGraph(name, as_json), _declared(graph), then)

    def drop(self, name: str, then: Then) -> None:
        """Declare nothing under this name, as soon as that is written. Busy if too much waits."""
        self._change(DropGraph(name), None, then)

    def keep(self, save: KeepProfile | KeepRun, then: Then) -> None:
        """Have something else written, in its turn. Busy if too much waits."""
        self._change(save, None, then)

    def run_over(self, save: DropRun) -> None:
        """An explicit run is over. Nobody waits for that: if too much else does it stays in the
        store until the next core finds that it is silent."""
        if self._keeps and len(self._unwritten) < UNWRITTEN_MAX:
            self._change(save, None, _nothing)

    def know_static(self, name: str, prefixes: Iterable[StaticPrefix]) -> None:
        """The static prompts of a declared workflow, in place of what was known of them. Hashes
        for which there is no room are left out."""
        self._forget_static(name)
        agents = self.declared[name].graph.agents
        found = self.static[name] = {}
        for prefix in prefixes:
            if prefix.agent not in agents or prefix.agent in found:
                continue
            if self._static_bytes + len(prefix.block_hashes) > self._limits.static_hashes_bytes:
                prefix = StaticPrefix(prefix.agent, prefix.tokens)
            self._static_bytes += len(prefix.block_hashes)
            found[prefix.agent] = prefix
        self._learner.know_static(name, found.values())

    def take(self) -> list[Save]:
        """What is to be written now, in order."""
        saves, self._saves = self._saves, []
        return saves

    def written(self, count: int, error: str) -> None:
        """The oldest ``count`` records that were taken are on disk, or can't be: why."""
        for _ in range(min(count, len(self._unwritten) - len(self._saves))):
            self._settle(self._unwritten.popleft(), error)

    def _change(self, save: Record, declared: Declared | None, then: Then) -> None:
        change = _Change(save, declared, then)
        if not self._keeps:
            self._settle(change, "")
            return
        if len(self._unwritten) >= UNWRITTEN_MAX:
            raise Busy
        self._unwritten.append(change)
        self._saves.append(save)

    def _settle(self, change: _Change, error: str) -> None:
        if not error:
            match change.save:
                case KeepGraph(name):
                    assert change.declared is not None
                    self._declare(name, change.declared)
                case DropGraph(name):
                    del self.declared[name]
                    self._forget_static(name)
                    self._learner.declare(name, None)
                case KeepProfile() | KeepRun() | DropRun():
                    pass  # It counts already: it is worth less than waiting for a disk.
        change.then(error)

    def _declare(self, name: str, declared: Declared) -> None:
        known = self.declared.get(name)
        if known is not None and known.digest != declared.digest:
            self._forget_static(name)
        self.declared[name] = declared
        self._learner.declare(name, declared.graph)

    def _forget_static(self, name: str) -> None:
        gone = self.static.pop(name, {})
        self._static_bytes -= sum(len(prefix.block_hashes) for prefix in gone.values())

    def checked(self, name: str, graph: Graph) -> Graph:
        """The graph, if it may be declared under this name; GraphError otherwise."""
        wrong = name_problem(name, self._limits)
        if wrong or "/" in name:
            raise GraphError([f"name: {wrong or 'it has a slash'}"])
        return checked(graph, self._limits)

    def check(self) -> None:
        """Assert that all is within bounds; for tests."""
        assert len(self._saves) <= len(self._unwritten) <= UNWRITTEN_MAX
        assert self._keeps or not self._unwritten
        assert self.static.keys() <= self.declared.keys()
        hashes = [len(each.block_hashes) for all in self.static.values() for each in all.values()]
        assert self._static_bytes == sum(hashes) <= self._limits.static_hashes_bytes


def _nothing(error: str) -> None:
    """Nobody waits for it."""


def _declared(graph: Graph, fixed: bool = False) -> Declared:
    followed = ways(graph)
    last = frozenset(agent for agent in followed if not followed[agent])
    return Declared(graph, fixed, last, digest_of(graph))


def digest_of(graph: Graph) -> str:
    """Of a graph: another one has another."""
    return blake2b(msgspec.json.encode(graph), digest_size=16).hexdigest()


def parsed(graph: bytes, limits: WorkflowLimits) -> Graph:
    """A graph as JSON, not checked yet. GraphError if it is none or too long."""
    if len(graph) > limits.graph_bytes:
        raise GraphError([f"the graph is longer than {limits.graph_bytes} bytes"])
    try:
        return _decode_graph(graph)
    except BAD_JSON as error:
        raise GraphError([str(error)]) from error

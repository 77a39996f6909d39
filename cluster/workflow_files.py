"""Workflows declared in YAML files that a cluster file names.

A file maps names to graphs (see ``coordinator.workflow.graph``)::

    research-team:
      agents: {planner: {output_tokens: 300}, explorer: {}, writer: {}}
      edges:
        - {kind: fan_out, from: planner, to: explorer, least: 2, most: 5}
        - {kind: join, from: [explorer], to: writer}
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import msgspec

from cluster.document import Document
from cluster.document import Path as Place
from cluster.schema import ConfigError
from coordinator.workflow.graph import Graph, GraphError, checked, name_problem
from coordinator.workflow.limits import WorkflowLimits

_STEP = re.compile(r"\.(\w+)|\[(\d+|\.\.\.)\]")
_EDGE = re.compile(r"edges\[(\d+)\]: ")


def read_workflows(paths: Iterable[str], limits: WorkflowLimits) -> dict[str, Graph]:
    """All workflows of these files by name; ConfigError with all that is wrong in any of them."""
    graphs: dict[str, Graph] = {}
    problems: list[str] = []
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            problems.append(f"{path}: {reason}")
            continue
        document = Document(text, path)
        for name, graph in _graphs(document, limits).items():
            if name in graphs:
                document.problem((name,), "another file declares a workflow of this name")
            graphs[name] = graph
        problems += document.problems()
    if problems:
        raise ConfigError(problems)
    return graphs


def _graphs(document: Document, limits: WorkflowLimits) -> dict[str, Graph]:
    """The workflows of one file; what is wrong is told to the document."""
    found: dict[str, Graph] = {}
    if not isinstance(document.data, dict):
        if not document.problems():
            document.problem((), "must map names of workflows to their graphs")
        return found
    for name, data in document.data.items():
        wrong = name_problem(name, limits)
        if wrong or "/" in name:
            document.problem((name,), wrong or "a name has no slash")
            continue
        try:
            found[name] = checked(msgspec.convert(data, Graph), limits)
        except msgspec.ValidationError as error:
            what, _, where = str(error).partition(" - at ")
            document.problem((name, *_place(where)), what)
        except GraphError as error:
            for problem in error.problems:
                edge = _EDGE.match(problem)
                place: Place = ("edges", int(edge[1])) if edge else ()
                document.problem((name, *place), problem[edge.end() :] if edge else problem)
    return found


def _place(where: str) -> Place:
    """msgspec's ``$.edges[0].from`` as keys; not further than it says where."""
    place: list[str | int] = []
    for name, index in _STEP.findall(where):
        if index == "...":
            break
        place.append(int(index) if index else name)
    return tuple(place)

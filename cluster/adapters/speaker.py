"""Who speaks in this thread or task, and the headers that say so.

Frameworks differ in how they tell; each is a *source*: a function that says who speaks here and
now, or nothing. The first that says something is believed. Sources read context variables, so
that threads and tasks do not get in each other's way.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from urllib.parse import quote

HEADER_CHARACTERS_MAX = 1024
"""Longer names are cut; the server tells apart what differs before that."""


@dataclass(frozen=True)
class Speaker:
    """One agent of one run. ``final``: nothing follows what it asks now."""

    workflow: str
    run: str
    agent: str = ""
    parent: str = ""
    final: bool = False

    def headers(self) -> dict[str, str]:
        """As HTTP headers; those that would be empty are left out."""
        found = {
            "X-Workflow": self.workflow,
            "X-Workflow-Run": self.run,
            "X-Workflow-Agent": self.agent,
            "X-Workflow-Parent": self.parent,
            "X-Workflow-Final": "true" if self.final else "",
        }
        return {name: header_text(value) for name, value in found.items() if value}


Source = Callable[[], Speaker | None]

current: ContextVar[Speaker | None] = ContextVar("pythia_speaker", default=None)
"""Who speaks, where an adapter can set it."""

_sources: list[Source] = [current.get]


def add_source(source: Source) -> None:
    """Ask ``source``, too, from now on; after those that are asked already."""
    if source not in _sources:
        _sources.append(source)


def speaker() -> Speaker | None:
    """Who speaks here and now; None outside of all runs."""
    for source in _sources:
        found = source()
        if found is not None:
            return found
    return None


def header_text(value: str) -> str:
    """A value that HTTP takes: one line, not too long."""
    printable = "".join(each if each.isprintable() else " " for each in value)
    line = " ".join(printable.split())[:HEADER_CHARACTERS_MAX]
    return line.encode("utf-8", "replace").decode()


def path_text(value: str) -> str:
    """A value as one part of a URL's path."""
    return quote(value, safe="")

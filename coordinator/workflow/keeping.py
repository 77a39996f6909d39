"""What of workflows is to outlive the core: the records that a store writes and reads.

The core hands them out and is told when they are on disk; it knows nothing of files. Graphs and
profiles travel as JSON, so that whoever writes them down need not understand them.
"""

from __future__ import annotations

import msgspec


class KeepGraph(msgspec.Struct, frozen=True, gc=False):
    """A declared workflow, in place of what was declared under its name."""

    name: str
    graph: bytes


class DropGraph(msgspec.Struct, frozen=True, gc=False):
    """No workflow is declared under this name any more, and what ``tenant`` taught is forgotten."""

    name: str
    tenant: str = ""


class KeepProfile(msgspec.Struct, frozen=True, gc=False):
    """What is learned of a tenant's workflow, in place of what was known."""

    tenant: str
    workflow: str
    profile: bytes


class DropProfile(msgspec.Struct, frozen=True, gc=False):
    """What was learned of a tenant's workflow is forgotten."""

    tenant: str
    workflow: str


Save = KeepGraph | DropGraph | KeepProfile | DropProfile


class Kept(msgspec.Struct, frozen=True):
    """All that a store has."""

    graphs: list[KeepGraph] = []
    profiles: list[KeepProfile] = []

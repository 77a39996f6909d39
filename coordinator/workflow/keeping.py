"""What of workflows is to outlive the core: the records that a store writes and reads.

The core hands them out and is told when they are on disk; it knows nothing of files. Graphs and
profiles travel encoded, so that whoever writes them down need not understand them.
"""

from __future__ import annotations

import msgspec

from coordinator.workflow.journal import Event


class KeepGraph(msgspec.Struct, frozen=True, gc=False):
    """A declared workflow, in place of what was declared under its name."""

    name: str
    graph: bytes


class DropGraph(msgspec.Struct, frozen=True, gc=False):
    """No workflow is declared under this name any more."""

    name: str


class KeepProfile(msgspec.Struct, frozen=True, gc=False):
    """What is learned of a tenant's workflow, in place of what was known.

    ``position``: the last event that it contains; none before it are to be learned again.
    ``profile``: empty if nothing is known.
    """

    tenant: str
    workflow: str
    profile: bytes
    position: int = 0


class DropProfile(msgspec.Struct, frozen=True, gc=False):
    """Nothing is known any more of a tenant's workflow, and no kept event is about it."""

    tenant: str
    workflow: str


class KeepRun(msgspec.Struct, frozen=True, gc=False):
    """A run that was started explicitly, on its terms. ``deadline_at_s``: on the clock of events;
    None for none."""

    tenant: str
    workflow: str
    run: str
    deadline_at_s: float | None = None
    priority: int = 0


class DropRun(msgspec.Struct, frozen=True, gc=False):
    """An explicit run is over."""

    tenant: str
    workflow: str
    run: str


class KeepEvents(msgspec.Struct, frozen=True):
    """Events in order; ``position``: the number of the last one."""

    position: int
    events: list[Event]


class DropEvents(msgspec.Struct, frozen=True, gc=False):
    """All profiles contain the events up to this one."""

    position: int


Save = (
    KeepGraph | DropGraph | KeepProfile | DropProfile | KeepRun | DropRun | KeepEvents | DropEvents
)


class Kept(msgspec.Struct, frozen=True):
    """All that a store has; events in order."""

    graphs: list[KeepGraph] = []
    profiles: list[KeepProfile] = []
    events: list[KeepEvents] = []
    runs: list[KeepRun] = []

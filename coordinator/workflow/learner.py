"""Tells ``Profiles`` what happens, and what of that is to be written down.

Its clock goes on over restarts: ``epoch_s`` is what the wall clock showed, in seconds, when the
core's showed 0. Calls that name neither workflow nor run nor agent are
learned as one workflow without a name, so that demand is known, and not written down.

Learning waits until the calls in question have been answered (``learn``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

from coordinator.protocol import StaticPrefix
from coordinator.workflow.graph import Graph
from coordinator.workflow.journal import Began, Event, Over, RunOver
from coordinator.workflow.keeping import (
    DropEvents,
    DropProfile,
    KeepEvents,
    KeepProfile,
    Kept,
    Save,
)
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.prediction import RunKey
from coordinator.workflow.profiles import Profiles
from coordinator.workflow.record import ProfileRecord

HASHES_BYTES_MAX = 32 * 1024
"""Of one event that is written down; enough for 64k tokens in blocks of 16."""
WAITING_MAX = 256
EVENTS_UNTAKEN_MAX = 100_000
SWEEP_ROUNDS = 60
"""In how many turns all profiles are written, at least one in each."""
PRIMED_MAX = 100_000

Workflow = tuple[str, str]
"""Tenant and name."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ProfileRecord).decode


class Learner:
    """What is learned of workflows, and its journal. ``keeps``: whether there is a store."""

    def __init__(
        self,
        limits: WorkflowLimits,
        keeps: bool = False,
        epoch_s: float = 0.0,
        profiles: Profiles | None = None,
    ) -> None:
        """``profiles``: those to fill, if not empty ones of the usual kind."""
        self.profiles = profiles or Profiles(limits)
        self.events_lost = 0
        """Not written down because nobody took them."""
        self._limits = limits
        self._keeps = keeps
        self._epoch_s = epoch_s
        self._graphs: dict[str, Graph] = {}
        self._primed: set[Workflow] = set()
        """Workflows that have their declared graph."""
        self._position = 0
        self._waiting: deque[tuple[Event, bool]] = deque()
        """What has happened and is not learned from yet, and whether it is written down."""
        self._untaken: list[Event] = []
        self._changed: dict[Workflow, None] = {}
        """Workflows with events that their kept profile does not contain."""
        self._kept: set[Workflow] = set()
        """Workflows with a kept profile, even an empty one."""
        self._swept_to = 0
        self._sweep: list[Workflow] = []
        self._sweep_position = 0
        self._in_flight: list[Workflow] = []
        """Whose profiles were taken last."""

    # --- what happens ------------------------------------------------------------------------

    def began(self, event: Began, noted: bool) -> None:
        """A call was submitted, at a time of the core's. ``noted``: worth to be written down."""
        self._wait(event, noted)

    def ended(self, event: Over, noted: bool) -> None:
        """A call ended. ``noted``: as when it began."""
        self._wait(event, noted)

    def run_over(self, key: RunKey, completed: bool, now_s: float) -> None:
        """A run is over."""
        self._wait(RunOver(*key, now_s + self._epoch_s, completed), True)

    def at_s(self, now_s: float) -> float:
        """A time of the core's as one of events."""
        return now_s + self._epoch_s

    def learn(self) -> None:
        """Learn from what has happened so far. Whoever asked for a plan has it by now."""
        while self._waiting:
            event, noted = self._waiting.popleft()
            workflow = event.tenant, event.workflow
            if isinstance(event, Began) and workflow not in self._primed:
                self._prime(workflow)
            self._observe(event)
            if noted and self._keeps:
                self._note(event, workflow)

    def expire(self, now_s: float) -> None:
        """Runs that are silent for too long are over."""
        self.learn()
        self.profiles.expire(now_s + self._epoch_s)

    def _wait(self, event: Event, noted: bool) -> None:
        self._waiting.append((event, noted))
        if len(self._waiting) >= WAITING_MAX:
            self.learn()

    # --- what is declared and taken over -------------------------------------------------------

    def declare(self, name: str, graph: Graph | None) -> None:
        """A workflow is declared for all tenants, or is not any more."""
        for workflow in [known for known in self._primed if known[1] == name]:
            self._primed.discard(workflow)
            self.profiles.declare(*workflow, graph)
        if graph is None:
            self._graphs.pop(name, None)
        else:
            self._graphs[name] = graph
            self._prime(("", name))

    def know_static(self, name: str, prefixes: Iterable[StaticPrefix]) -> None:
        """With what prompts of a declared workflow begin. Others than the tenant without a salt
        have other hashes."""
        self.learn()
        for prefix in prefixes:
            self.profiles.know_static("", name, prefix.agent, prefix.block_hashes)

    def replaced(self, workflow: Workflow, record: ProfileRecord | None) -> KeepProfile:
        """Take a record over in place of what was learned, or forget that. ValueError if it
        cannot be true. Returns what is to be written down."""
        self.learn()
        if record is None:
            self.profiles.forget(*workflow)
            self._primed.discard(workflow)
        else:
            self.profiles.restore(*workflow, record)
        return self._recorded(workflow)

    def restore(self, kept: Kept, now_s: float) -> list[str]:
        """What an earlier core had written down; says what of it can't be used."""
        problems = []
        positions: dict[Workflow, int] = {}
        for one in kept.profiles:
            workflow = one.tenant, one.workflow
            self._kept.add(workflow)
            positions[workflow] = one.position
            if one.profile:
                try:
                    self.profiles.restore(*workflow, _decode(one.profile))
                except (msgspec.MsgspecError, ValueError) as error:
                    problems.append(f"what was learned of {one.workflow!r}: {error}")
        at_most_s = now_s + self._epoch_s
        for batch in kept.events:
            number = batch.position - len(batch.events)
            for event in batch.events:
                number += 1
                workflow = event.tenant, event.workflow
                if number > positions.get(workflow, 0) and event.at_s <= at_most_s:
                    self.profiles.expire(event.at_s)
                    self._observe(event)
                    self._changed[workflow] = None
            self._position = batch.position
        self._position = max([self._position, *positions.values()])
        return problems

    # --- what is to be written down --------------------------------------------------------------

    def take(self) -> list[Save]:
        """What is to be written now, at most one second's worth: events, and, from time to time,
        profiles in place of events."""
        if not self._keeps:
            return []
        self.learn()
        saves: list[Save] = []
        if self._untaken:
            saves.append(KeepEvents(self._position, self._untaken))
            self._untaken = []
        if not self._sweep and self._position - self._swept_to >= self._limits.journal_events:
            self._begin_sweep()
        if self._sweep:
            saves += self._swept()
        self._in_flight = [
            (save.tenant, save.workflow) for save in saves if isinstance(save, KeepProfile)
        ]
        return saves

    def lost(self) -> None:
        """What was taken last could not be written down: profiles have to be, again."""
        self._changed.update(dict.fromkeys(self._in_flight))
        self._in_flight = []

    def take_all(self) -> list[Save]:
        """As ``take``, with all profiles, for an orderly end."""
        saves = self.take()
        if self._keeps:
            if not self._sweep:
                self._begin_sweep()
            while self._sweep:
                saves += self._swept()
        return saves

    def _begin_sweep(self) -> None:
        self._sweep = list(self._changed)
        self._sweep_position = self._position
        self._changed.clear()

    def _swept(self) -> list[Save]:
        turn = max(1, len(self._sweep) // SWEEP_ROUNDS)
        saves: list[Save] = [self._recorded(self._sweep.pop()) for _ in range(turn)]
        if not self._sweep:
            saves.append(DropEvents(self._sweep_position))
            self._swept_to = self._sweep_position
            for workflow in sorted(self._kept - self._changed.keys()):
                if self.profiles.knows(*workflow):
                    continue
                # Nothing is known of it, and no event that is left says otherwise.
                saves.append(DropProfile(*workflow))
                self._kept.discard(workflow)
        return saves

    def _recorded(self, workflow: Workflow) -> KeepProfile:
        record = self.profiles.exported(*workflow)
        self._kept.add(workflow)
        return KeepProfile(*workflow, _encode(record) if record else b"", self._position)

    def _note(self, event: Event, workflow: Workflow) -> None:
        self._position += 1
        self._changed[workflow] = None
        if isinstance(event, Began) and len(event.block_hashes) > HASHES_BYTES_MAX:
            hashes = event.block_hashes[:HASHES_BYTES_MAX]
            event = msgspec.structs.replace(event, block_hashes=hashes)
        self._untaken.append(event)
        if len(self._untaken) > EVENTS_UNTAKEN_MAX:
            del self._untaken[: EVENTS_UNTAKEN_MAX // 2]
            self.events_lost += EVENTS_UNTAKEN_MAX // 2

    def _observe(self, event: Event) -> None:
        match event:
            case Began():
                self.profiles.observe_start(
                    RunKey(event.tenant, event.workflow, event.run),
                    event.call,
                    event.agent,
                    event.prompt_tokens,
                    event.block_hashes,
                    event.at_s,
                    event.parent,
                    event.final,
                )
            case Over():
                self.profiles.observe_end(
                    event.call, event.output_tokens, event.at_s, event.completed
                )
            case RunOver():
                self.profiles.end_run(event.key, event.at_s, event.completed)

    def _prime(self, workflow: Workflow) -> None:
        """Give a tenant's workflow the graph that is declared, if one is."""
        if len(self._primed) >= PRIMED_MAX:
            self._primed.clear()
        self._primed.add(workflow)
        graph = self._graphs.get(workflow[1])
        if graph is not None:
            self.profiles.declare(*workflow, graph)

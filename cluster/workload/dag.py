"""aiperf's ``dag_jsonl``: authored conversations that fork and spawn others.

The schema is that of ai-dynamo/aiperf, ``src/aiperf/dataset/loader/dag_jsonl_models.py`` and
``dag_jsonl.py``; its manual is "DAG Benchmarks: Branching Conversations"
(https://docs.nvidia.com/aiperf/benchmark-modes/conversation-dag-benchmarks). One conversation
a line::

    {"session_id": "root", "turns": [
        {"messages": [{"role": "user", "content": "Plan."}], "max_tokens": 64},
        {"messages": [...], "delay": 500, "spawns": ["a", {"children": ["b"], "join_at": 3}]},
        {"messages": [...], "forks": ["c", {"child": "d", "background": true}]}]}

* A conversation that nobody forks or spawns is a run; the others are parts of runs.
* A turn's messages are appended to all before and their answers; ``delay`` is milliseconds.
* ``forks``: children go on from this conversation's history. It ends there, unless the
  entry says ``background``.
* ``spawns``: children begin afresh; the next turn (or turn ``join_at``) waits for them.
  Those of a last turn are waited for by nobody.
* ``pre_session_spawns``: children that begin together with the first turn.
* ``context_mode`` ``message_array_with_responses``: every turn's messages are its whole prompt.

Orchestrators (conversations without requests, with ``rounds``) are refused.

The file has texts and no lengths. Here a token is ``talk.CHARACTERS_PER_TOKEN`` characters,
a message costs ``MESSAGE_TOKENS`` more, and an answer has ``max_tokens`` tokens, or
``ANSWER_TOKENS`` where none are given. Prompts share the messages that are equal from the
beginning on, over the whole file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from cluster.workload.form import Workload, WorkloadError
from cluster.workload.lineage import linked
from cluster.workload.lines import Line, lines, workload_name
from cluster.workload.talk import TALK_BLOCK_TOKENS, BlockIds, RunOfTalks, Talks

Name = Annotated[str, msgspec.Meta(min_length=1)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class Fork(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A conversation that goes on from this one's history."""

    child: Name
    background: bool = False


class Spawn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Conversations that begin afresh, and the turn that waits for them."""

    children: Annotated[list[Name], msgspec.Meta(min_length=1)]
    join_at: int | None = None


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One call. ``extra`` is for the wire only and changes nothing here."""

    messages: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)]
    model: str | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**31)] | None = None
    tools: list[dict[str, Any]] | None = None
    extra: dict[str, Any] | None = None
    forks: list[Name | Fork] = []
    spawns: list[Name | Spawn] = []
    delay: Milliseconds = 0.0

    def fork_entries(self) -> list[Fork]:
        """The forks, all in their long form."""
        return [fork if isinstance(fork, Fork) else Fork(fork) for fork in self.forks]

    def spawn_entries(self) -> list[Spawn]:
        """The spawns, all in their long form."""
        return [entry if isinstance(entry, Spawn) else Spawn([entry]) for entry in self.spawns]


class Conversation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line."""

    session_id: Name
    turns: list[Turn] = []
    context_mode: Literal["deltas_without_responses", "message_array_with_responses"] | None = None
    pre_session_spawns: list[Name] = []
    orchestrator: bool = False
    spawns: list[Name] = []
    rounds: Any = None
    think_time_ms: float | None = None
    think_time_sigma: float | None = None
    think_time_min_ms: float | None = None
    think_time_max_ms: float | None = None

    def children(self) -> Iterator[tuple[str, str]]:
        """Every conversation that this one begins, and the field that says so."""
        for child in self.pre_session_spawns:
            yield child, "pre_session_spawns"
        for index, turn in enumerate(self.turns):
            for fork in turn.fork_entries():
                yield fork.child, f"turns[{index}].forks"
            for spawn in turn.spawn_entries():
                for child in spawn.children:
                    yield child, f"turns[{index}].spawns"


_decoder = msgspec.json.Decoder(Conversation)


def read_dag(path: Path) -> Workload:
    """The workload of a ``dag_jsonl`` file; WorkloadError if it is not one."""
    talks: Talks = {}
    places: dict[str, Line] = {}
    for line in lines(path):
        conversation = line.read(_decoder)
        if conversation.session_id in talks:
            raise line.wrong(f"{conversation.session_id!r} is there twice", "session_id")
        _check(conversation, line)
        talks[conversation.session_id] = conversation
        places[conversation.session_id] = line
    _check_children(talks, places)
    name = workload_name(path)
    begun = {child for talk in talks.values() for child, _ in talk.children()}
    reached: set[str] = set()
    runs, ids = [], BlockIds()
    for root in talks:
        if root in begun:
            continue
        try:
            builder = RunOfTalks(talks, root, scope=name, ids=ids)
            runs.append(builder.build(workflow=name))
        except WorkloadError as error:
            raise places[root].wrong(str(error), "session_id") from error
        reached |= builder.reached
    for missed in talks.keys() - reached:
        raise places[missed].wrong(f"{missed!r} begins itself, by way of others", "session_id")
    return Workload(
        name=name,
        source=str(path),
        licence="",
        block_tokens=TALK_BLOCK_TOKENS,
        runs=linked(runs, TALK_BLOCK_TOKENS),
    )


def _check(conversation: Conversation, line: Line) -> None:
    """What aiperf's loader refuses, too: turns that cannot be, branches that lead nowhere."""
    if conversation.orchestrator or conversation.rounds is not None:
        raise line.wrong("orchestrators send no requests and are not supported", "orchestrator")
    if conversation.spawns:
        raise line.wrong("is for orchestrators; a turn has spawns of its own", "spawns")
    if not conversation.turns:
        raise line.wrong("must not be empty", "turns")
    for index, turn in enumerate(conversation.turns):
        _check_turn(turn, index, len(conversation.turns), line)


def _check_turn(turn: Turn, index: int, turns: int, line: Line) -> None:
    field = f"turns[{index}]"
    for position, message in enumerate(turn.messages):
        if not isinstance(message.get("role"), str):
            raise line.wrong("has no role", f"{field}.messages[{position}]")
    if index + 1 < turns and any(not fork.background for fork in turn.fork_entries()):
        raise line.wrong("a turn that forks must be the last one, or background", f"{field}.forks")
    for spawn in turn.spawn_entries():
        if spawn.join_at is not None and not index < spawn.join_at < turns:
            raise line.wrong(f"{spawn.join_at} is not a later turn", f"{field}.spawns.join_at")
    for named in (
        [fork.child for fork in turn.fork_entries()],
        [child for spawn in turn.spawn_entries() for child in spawn.children],
    ):
        if len(set(named)) < len(named):
            raise line.wrong("names a child twice", field)


def _check_children(talks: Talks, places: dict[str, Line]) -> None:
    forked: set[str] = set()
    for name, talk in talks.items():
        for child, field in talk.children():
            if child not in talks:
                raise places[name].wrong(f"there is no conversation {child!r}", field)
            if field.endswith(".forks"):
                if child in forked:
                    raise places[name].wrong(f"{child!r} has been forked before", field)
                forked.add(child)

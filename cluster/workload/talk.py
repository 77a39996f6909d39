"""Conversations that fork and spawn others, played through into the calls of one run.

Lengths come from texts by a fixed rule, as said in ``dag``. Two prompts share the blocks in
which their messages, from the first one on, are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec

from cluster.workload.form import BLOCK_TOKENS, Call, Run, WorkloadError
from cluster.workload.spans import Spans, merged

if TYPE_CHECKING:
    from cluster.workload.dag import Conversation, Turn

    Talks = dict[str, Conversation]
else:
    Talks = dict

TALK_BLOCK_TOKENS = BLOCK_TOKENS
CHARACTERS_PER_TOKEN = 4
MESSAGE_TOKENS = 4
ANSWER_TOKENS = 128
CALLS_MAX = 100_000
"""Of a run; conversations that spawn the same ones grow exponentially."""
DEPTH_MAX = 100


class Said(msgspec.Struct, frozen=True, gc=False):
    """A piece of a prompt: what tells it from others, and its length."""

    key: bytes
    tokens: int


History = tuple[Said, ...]


class BlockIds:
    """Ids for blocks of text: the same for the same pieces in the same order."""

    def __init__(self) -> None:
        self._first: dict[bytes, int] = {}
        self._next = 0

    def of(self, history: Sequence[Said]) -> Spans:
        """The ids of the full blocks of these pieces, one after the other."""
        digest, tokens = b"", 0
        spans = []
        for said in history:
            digest = blake2b(digest + said.key, digest_size=16).digest()
            before, tokens = tokens, tokens + said.tokens
            blocks = tokens // TALK_BLOCK_TOKENS - before // TALK_BLOCK_TOKENS
            first = self._first.setdefault(digest, self._next)
            if first == self._next:
                self._next += blocks
            spans.append((first, blocks))
        return merged(spans)


class RunOfTalks:
    """One root conversation and all that it begins."""

    def __init__(self, talks: Talks, root: str, scope: str, ids: BlockIds) -> None:
        self.reached: set[str] = set()
        self._talks = talks
        self._root = root
        self._scope = scope
        self._ids = ids
        self._calls: list[Call] = []
        self._instances: dict[str, int] = {}

    def build(self, workflow: str) -> Run:
        """The run. WorkloadError if it has no end."""
        self._play(self._root, (), (), depth=0)
        return Run(self._root, workflow, 0.0, self._scope, tuple(self._calls))

    def _play(
        self, name: str, parents: tuple[int, ...], history: History, depth: int
    ) -> tuple[int, ...]:
        """Plays a conversation; returns the calls that someone who waits for it waits for."""
        if depth > DEPTH_MAX:
            raise WorkloadError(f"conversations nest more than {DEPTH_MAX} deep at {name!r}")
        self.reached.add(name)
        talk = self._talks[name]
        for child in talk.pre_session_spawns:
            self._play(child, parents, (), depth + 1)
        instance = self._instances[name] = self._instances.get(name, 0) + 1
        agent = name if instance == 1 else f"{name}#{instance}"
        joins: dict[int, list[int]] = {}
        ends: list[int] = []
        for position, turn in enumerate(talk.turns):
            said = tuple(_said(message) for message in turn.messages)
            whole = talk.context_mode == "message_array_with_responses"
            history = said if whole else history + said
            waits_for = dict.fromkeys((*parents, *joins.get(position, ())))
            index = self._call(turn, tuple(waits_for), history, agent, name)
            parents = (index,)
            history = (*history, self._answer(index))
            for spawn in turn.spawn_entries():
                join = position + 1 if spawn.join_at is None else spawn.join_at
                for child in spawn.children:
                    joins.setdefault(join, []).extend(self._play(child, parents, (), depth + 1))
            for fork in turn.fork_entries():
                child_ends = self._play(fork.child, parents, history, depth + 1)
                ends += () if fork.background else child_ends
        return tuple(ends) or parents

    def _call(
        self, turn: Turn, parents: tuple[int, ...], history: History, agent: str, kind: str
    ) -> int:
        if len(self._calls) >= CALLS_MAX:
            raise WorkloadError(f"more than {CALLS_MAX} calls in the run of {self._root!r}")
        # Chat templates render tools before the first message.
        prompt = (_piece(turn.tools), *history) if turn.tools else history
        self._calls.append(
            Call(
                index=len(self._calls),
                parents=parents,
                think_s=turn.delay / 1000,
                prompt_tokens=sum(said.tokens for said in prompt),
                output_tokens=turn.max_tokens or ANSWER_TOKENS,
                blocks=self._ids.of(prompt),
                agent=agent,
                kind=kind,
                stage=turn.model or "",
            )
        )
        return len(self._calls) - 1

    def _answer(self, index: int) -> Said:
        return Said(f"answer {self._root}#{index}".encode(), self._calls[index].output_tokens)


def _said(message: dict[str, Any]) -> Said:
    content = message.get("content")
    if isinstance(content, str) and message.keys() == {"role", "content"}:
        return Said(_key(message), _tokens(len(content)))
    return _piece({key: value for key, value in message.items() if key != "role"})


def _piece(value: Any) -> Said:
    key = _key(value)
    return Said(key, _tokens(len(key)))


def _key(value: Any) -> bytes:
    return msgspec.json.encode(value, order="sorted")


def _tokens(characters: int) -> int:
    return -(-characters // CHARACTERS_PER_TOKEN) + MESSAGE_TOKENS

"""Writes runs call by call: what agents say, what they have been told, what prompts share.

A history is all that an agent will send in its next prompt. It grows at its end, and may
lose its end; copies share what they have in common. Every history has a range of block
ids of its own for the blocks it fills itself, so that its prompts are few spans.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from cluster.workload.form import BLOCK_TOKENS, Call
from cluster.workload.habits import Agent
from cluster.workload.spans import Spans, cut, merged

ID_RANGE = 1 << 24
"""Block ids of one history; more tokens than any context."""


class BlockRanges:
    """Hands out ranges of block ids, none twice."""

    def __init__(self) -> None:
        self._next = 0

    def new(self) -> int:
        """The first id of a range nobody else has."""
        first, self._next = self._next, self._next + ID_RANGE
        return first


class History:
    """The tokens an agent would send now."""

    def __init__(self, ranges: BlockRanges, blocks: Spans = (), tokens: int = 0) -> None:
        self._ranges = ranges
        self._first_id = ranges.new()
        self._blocks = blocks
        self.tokens = tokens

    @property
    def blocks(self) -> Spans:
        """Ids of the full blocks."""
        return self._blocks

    def grow(self, tokens: int) -> None:
        """Append tokens that are in no other history."""
        before, self.tokens = self.tokens // BLOCK_TOKENS, self.tokens + max(0, tokens)
        grown = self.tokens // BLOCK_TOKENS - before
        self._blocks = merged((*self._blocks, (self._first_id + before, grown)))

    def shrink(self, tokens: int) -> None:
        """Keep the first tokens only. What comes next is not what was there before."""
        self.tokens = min(self.tokens, max(0, tokens))
        self._blocks = cut(self._blocks, self.tokens // BLOCK_TOKENS)
        self._first_id = self._ranges.new()

    def copy(self) -> History:
        """A history that begins the same and goes its own way."""
        return History(self._ranges, self._blocks, self.tokens)


class Library:
    """What agents of a kind begin with, the same in all runs of a workload."""

    def __init__(self) -> None:
        self.ranges = BlockRanges()
        self._static: dict[str, History] = {}

    def begin(self, kind: str, static_tokens: int) -> History:
        """A new agent's history: its kind's instructions and tools."""
        if kind not in self._static:
            history = self._static[kind] = History(self.ranges)
            history.grow(static_tokens)
        return self._static[kind].copy()


class Author:
    """One run being written."""

    def __init__(self, library: Library, rng: random.Random) -> None:
        self.library = library
        self.rng = rng
        self.calls: list[Call] = []
        self._agents: dict[str, int] = {}

    def name(self, kind: str) -> str:
        """A name for a new agent of a kind."""
        number = self._agents[kind] = self._agents.get(kind, 0) + 1
        return kind if number == 1 else f"{kind}-{number}"

    def say(
        self,
        agent: str,
        kind: str,
        history: History,
        parents: Sequence[int],
        output_tokens: int,
        think_s: float = 0.0,
    ) -> int:
        """A call with the whole history as prompt; its answer becomes part of the history."""
        history.grow(1 if not history.tokens else 0)
        self.calls.append(
            Call(
                index=len(self.calls),
                parents=tuple(parents),
                think_s=think_s,
                prompt_tokens=history.tokens,
                output_tokens=output_tokens,
                blocks=history.blocks,
                agent=agent,
                kind=kind,
            )
        )
        history.grow(output_tokens)
        return len(self.calls) - 1

    def answer_tokens(self, index: int) -> int:
        """How long a call's answer is: what it adds to the prompts of those who read it."""
        return self.calls[index].output_tokens


class Speaker:
    """An agent in a run, with the habits of its kind and a history of its own."""

    def __init__(
        self, author: Author, kind: str, habits: Agent, pauses: Agent, history: History
    ) -> None:
        self._author = author
        self._habits = habits
        self._pauses = pauses
        self.kind = kind
        self.name = author.name(kind)
        self.history = history
        self.last: int | None = None

    def hear(self, tokens: int) -> None:
        """Something that the next prompt contains."""
        self.history.grow(tokens)

    def speak(self, parents: Sequence[int]) -> int:
        """One call after ``parents``; pauses if it is not the agent's first."""
        rng = self._author.rng
        pause = self._pauses.think_s if self.last is not None else None
        think_s = round(pause.draw(rng), 3) if pause else 0.0
        output_tokens = self._habits.output_tokens.count(rng, least=1)
        self.last = self._author.say(
            self.name, self.kind, self.history, parents, output_tokens, think_s
        )
        return self.last

    def change(self) -> None:
        """What happens to the prompt between two calls: tool results, and losses."""
        rng, habits, history = self._author.rng, self._habits, self.history
        chance = rng.random()
        if chance < habits.compacted_share and habits.kept_share and habits.fresh_share:
            before = history.tokens
            history.shrink(round(before * habits.kept_share.draw(rng)))
            history.grow(round(before * habits.fresh_share.draw(rng)))
        else:
            lost = habits.rewritten_tokens
            if chance < habits.compacted_share + habits.rewritten_share and lost:
                history.shrink(history.tokens - round(lost.draw(rng)))
            history.grow(habits.new_tokens.count(rng))
        if history.tokens > habits.context_tokens:
            self._summarise()

    def _summarise(self) -> None:
        """The context is full: the static part stays, a summary of an answer's length follows."""
        self.history.shrink(self._habits.static_tokens)
        self.history.grow(self._habits.output_tokens.count(self._author.rng, least=1))

    def work(self, parents: Sequence[int], calls: int) -> int:
        """Several calls, each after the one before. Returns the last one."""
        for number in range(calls):
            if number:
                self.change()
            parents = (self.speak(parents),)
        return parents[0]

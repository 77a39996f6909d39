"""Static prompts of declared agents: with what tokens, and so with what blocks, prompts begin.

What is declared is text or chat messages. It is templated here as the API would, and the core gets
block hashes and counts; tokens stay in this process. A core that is new, or of which no block size
was known, is told again what is declared, whoever declared it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from itertools import takewhile
from typing import Protocol

import msgspec

from coordinator.api.questions import Questions
from coordinator.blocks import hash_blocks, salt_of
from coordinator.protocol import (
    ListWorkflows,
    ShowWorkflow,
    StaticPrefix,
    StaticPrefixes,
    WorkflowAnswer,
)
from coordinator.workflow.graph import Agent, Graph, GraphError
from coordinator.workflow.registry import digest_of

logger = logging.getLogger("pythia.api")

LOOK_S = 1.0
"""How often it is looked whether the core is a new one."""
KNOWN_MOST = 256
"""Static prompts whose tokens are kept, for errands."""
CONTINUATIONS = ("a", "\n1")
"""Two ways to go on behind a static prompt. What their prompts have in common is static, the rest
is what a template adds only at the end."""

Tokenize = Callable[[Agent, str], Awaitable[list[int]]]
"""The tokens of a prompt that begins as an agent's do and goes on with a text; if that is empty,
of the beginning alone. ValueError if the API would refuse such a request."""


class Cluster(Protocol):
    """What is needed of the cluster."""

    questions: Questions

    @property
    def core(self) -> str:
        """The core that has taken us in."""

    @property
    def block_size(self) -> int:
        """Tokens of a block; 0 before it is known."""


class _Row(msgspec.Struct, frozen=True):
    name: str
    declared: bool


class _Shown(msgspec.Struct, frozen=True):
    declared: Graph | None


class StaticPrompts:
    """Templates static prompts and tells the core of them."""

    def __init__(self, cluster: Cluster, tokenize: Tokenize) -> None:
        self._cluster = cluster
        self._tokenize = tokenize
        self._known: OrderedDict[tuple[str, str], list[int]] = OrderedDict()

    @property
    def known(self) -> Mapping[tuple[str, str], list[int]]:
        """Tokens of static prompts by digest of their graph and agent, the latest ones."""
        return self._known

    async def of(self, graph: Graph) -> list[StaticPrefix]:
        """The static prefixes of a checked graph. GraphError if the API would refuse one."""
        prefixes: list[StaticPrefix] = []
        problems: list[str] = []
        digest = digest_of(graph)
        for name, agent in graph.agents.items():
            if not agent.static_prompt:
                continue
            try:
                tokens = await self._prefix(agent)
            except ValueError as error:
                problems.append(f"agents.{name}.static_prompt: {error}")
            else:
                self._know((digest, name), tokens)
                size = self._cluster.block_size
                hashes = hash_blocks(tokens, size, salt_of()) if size else b""
                prefixes.append(StaticPrefix(name, len(tokens), hashes))
        if problems:
            raise GraphError(problems)
        return prefixes

    def _know(self, key: tuple[str, str], tokens: list[int]) -> None:
        self._known[key] = tokens
        self._known.move_to_end(key)
        while len(self._known) > KNOWN_MOST:
            self._known.popitem(last=False)

    async def keep_told(self) -> None:
        """Tell every core that takes us in. Runs until cancelled."""
        told = ("", 0)
        while True:
            now = self._cluster.core, self._cluster.block_size
            if now != told and all(now):
                try:
                    await self.tell_all()
                    told = now
                except TimeoutError:
                    logger.warning("the core does not answer, static prompts are told later")
            await asyncio.sleep(LOOK_S)

    async def tell_all(self) -> None:
        """Tell the core of all that is declared. TimeoutError if it does not answer."""
        questions = self._cluster.questions
        listed = await questions.ask(lambda token: ListWorkflows(token))
        if listed.problems:
            return
        for row in msgspec.json.decode(listed.body, type=list[_Row]):
            if row.declared:
                await self._tell(row.name)

    async def _tell(self, name: str) -> None:
        questions = self._cluster.questions
        answer: WorkflowAnswer = await questions.ask(lambda token: ShowWorkflow(token, name))
        graph = None
        if not answer.problems:
            graph = msgspec.json.decode(answer.body, type=_Shown).declared
        if graph is None:
            return
        try:
            prefixes = await self.of(graph)
        except GraphError as error:
            logger.warning("static prompts of the workflow %r are left out: %s", name, error)
            return
        if prefixes:
            await questions.ask(static_question(name, graph, prefixes))

    async def _prefix(self, agent: Agent) -> list[int]:
        """The tokens with which all prompts of an agent begin."""
        try:
            one, other = [await self._tokenize(agent, more) for more in CONTINUATIONS]
        except ValueError:
            # Some templates want the roles to take turns: nothing of a user's may follow.
            return await self._tokenize(agent, "")
        both = zip(one, other, strict=False)
        return [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], both)]


def static_question(
    name: str, graph: Graph, prefixes: list[StaticPrefix]
) -> Callable[[int], StaticPrefixes]:
    """What to tell the core, by token."""
    digest = digest_of(graph)
    return lambda token: StaticPrefixes(token, name, digest, prefixes)

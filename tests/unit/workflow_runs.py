"""Runs of a made-up workflow, told to the profiles as a cluster would.

``Application`` is a planner that fans out to two to four explorers, each of which makes one or
two calls; an engineer and a reviewer that loop; and a writer, which ends the run. Everything
about it is drawn from known distributions.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from coordinator.workflow.prediction import RunKey
from coordinator.workflow.profiles import Profiles

BLOCK_TOKENS = 16
STATIC_BLOCKS = 20


@dataclass
class Application:
    """What it does; see the module."""

    name: str = "research"
    again: float = 0.6
    output_scale: float = 1.0
    gap_s: float = 2.0
    finals: bool = True


@dataclass
class World:
    """Virtual time, and calls that are going on in it."""

    profiles: Profiles
    seed: int = 0
    now_s: float = 0.0
    queue: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    numbers: count[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.tokens_started: list[tuple[float, int]] = []
        self.answers: list[tuple[float, float, int]] = []

    def at(self, at_s: float, action: Callable[[], None]) -> None:
        """Do something at a time."""
        heapq.heappush(self.queue, (at_s, next(self.numbers), action))

    def until(self, end_s: float) -> None:
        """Let time pass."""
        while self.queue and self.queue[0][0] <= end_s:
            self.now_s, _, action = heapq.heappop(self.queue)
            action()
        self.now_s = end_s
        self.profiles.expire(end_s)

    def call(
        self,
        key: RunKey,
        agent: str,
        prompt: bytes,
        output_tokens: int,
        then: Callable[[], None],
        parent: str = "",
        final: bool = False,
    ) -> None:
        """A call that takes a tenth of a second per token of its answer, then something else."""
        name = f"call-{next(self.numbers)}"
        tokens = len(prompt) // 8 * BLOCK_TOKENS
        self.profiles.observe_start(
            key, name, agent, tokens, prompt, self.now_s, parent=parent, final=final
        )
        began_s = self.now_s
        ends_s = began_s + 0.1 * output_tokens

        def end() -> None:
            self.profiles.observe_end(name, output_tokens, self.now_s)
            then()

        self.answers.append((began_s, ends_s, output_tokens))
        self.at(ends_s, end)

    def run(self, application: Application) -> None:
        """One run of it, from now on."""
        _Run(self, application)


class _Run:
    def __init__(self, world: World, application: Application) -> None:
        self.world, self.application = world, application
        self.key = RunKey("", application.name, f"run-{next(world.numbers)}")
        self.prompts: dict[str, bytes] = {}
        self.exploring = 0
        self.say("planner", self.explore)

    def say(self, agent: str, then: Callable[[], None], parent: str = "", **more: bool) -> None:
        """The agent's next call: its prompt goes on from its last one."""
        rng = self.world.rng
        static = random.Random(agent.split("-")[0]).randbytes(8 * STATIC_BLOCKS)
        prompt = self.prompts.get(agent, static) + rng.randbytes(8 * 10)
        self.prompts[agent] = prompt
        mean = {"planner": 100, "explorer": 40, "engineer": 80, "reviewer": 20, "writer": 150}
        kind = agent.split("-")[0]
        output = max(1, round(self.application.output_scale * mean[kind] * rng.uniform(0.5, 1.5)))
        self.world.call(self.key, kind, prompt, output, then, parent, **more)

    def later(self, action: Callable[[], None]) -> None:
        """After the tools."""
        gap_s = self.world.rng.uniform(0.5, 1.5) * self.application.gap_s
        self.world.at(self.world.now_s + gap_s, action)

    def explore(self) -> None:
        width = self.world.rng.choice([2, 3, 4])
        self.exploring = width

        def start() -> None:
            for number in range(width):
                agent = f"explorer-{number}"
                self.say(agent, lambda agent=agent: self.explored(agent, 1), parent="planner")

        self.later(start)

    def explored(self, agent: str, calls: int) -> None:
        if calls == 1 and self.world.rng.random() < 0.5:
            self.later(lambda: self.say(agent, lambda: self.explored(agent, 2), parent="explorer"))
            return
        self.exploring -= 1
        if not self.exploring:
            self.later(self.engineer)

    def engineer(self) -> None:
        self.say("engineer", lambda: self.later(self.review))

    def review(self) -> None:
        self.say("reviewer", self.reviewed)

    def reviewed(self) -> None:
        again = self.world.rng.random() < self.application.again
        self.later(self.engineer if again else self.write)

    def write(self) -> None:
        self.say("writer", lambda: None, final=self.application.finals)

"""Generated runs of multi-agent workflows, with the habits of real agents.

Lengths, pauses, numbers of calls, widths and rounds are drawn from ``habits``. Options
override what a workflow's shape depends on; whether a default is measured is said with it.

::

    chain      expert -> expert -> ... -> expert           each reads what was said before
    fanout     planner -> explorer x N -> planner          explorers work in parallel
    review     planner -> explorer x N -> engineer <-> reviewer -> planner
    mapreduce  mapper x N -> reducer tree -> reducer
    coding     coder -> coder -> ...                       one long session with tools
    subagents  lead -> lead + explorers, delegates -> lead long session that forks and joins
    assistant  assistant -> assistant -> ...               short session with a customer
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Annotated

import msgspec

from cluster.workload.author import Author, History, Library, Speaker
from cluster.workload.form import BLOCK_TOKENS, Run, Workload
from cluster.workload.habits import Habits
from cluster.workload.lineage import linked

REDUCE_ARITY = 4
Positive = Annotated[int, msgspec.Meta(ge=1, le=10_000)]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What may be said of a generated workload's shape; None draws it.

    ``width``: of a fan-out (measured, 1 to 3) or of a map (8, not measured); ``stages``: of a
    chain (measured); ``rounds``: of engineer and reviewer (measured); ``calls``: of a
    session's main agent (measured).
    """

    runs: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 100
    width: Positive | None = None
    stages: Positive | None = None
    rounds: Positive | None = None
    calls: Positive | None = None


class Stage:
    """One run being generated."""

    def __init__(
        self, habits: Habits, options: Options, library: Library, rng: random.Random
    ) -> None:
        self.habits = habits
        self.options = options
        self.rng = rng
        self.author = Author(library, rng)

    def agent(self, habit: str, kind: str = "", history: History | None = None) -> Speaker:
        """A new agent with the habits of a measured one. Told nothing if it has no history."""
        habits = self.habits.agents[habit]
        kind = kind or habit
        # Some traces show no common beginning; agents of a real system have instructions.
        static_tokens = habits.static_tokens or self.habits.agents["assistant"].static_tokens
        history = history or self.author.library.begin(kind, static_tokens)
        # Where a trace has no clock, the pauses are those of an agent that only uses tools.
        pauses = habits if habits.think_s else self.habits.agents["explorer"]
        return Speaker(self.author, kind, habits, pauses, history)

    def task_tokens(self, habit: str) -> int:
        """What an agent's first prompt has beyond its kind's static part."""
        habits = self.habits.agents[habit]
        return max(1, habits.first_tokens.count(self.rng) - habits.static_tokens)

    def calls(self, habit: str) -> int:
        """How many calls an agent makes."""
        return self.habits.agents[habit].calls.count(self.rng, least=1)

    def explore(self, parent: int, context_tokens: int, width: int) -> list[int]:
        """Explorers in parallel after ``parent``; returns their last calls.

        All are told the same first and each its own task then.
        """
        static_tokens = self.habits.agents["explorer"].static_tokens
        brief = self.author.library.begin("explorer", static_tokens)
        brief.grow(context_tokens)
        ends = []
        for _ in range(width):
            explorer = self.agent("explorer", history=brief.copy())
            explorer.hear(self.task_tokens("explorer"))
            ends.append(explorer.work((parent,), self.calls("explorer")))
        return ends

    def width(self) -> int:
        """How many go at once."""
        return self.options.width or self.habits.shape.fork_width.count(self.rng, least=1)

    def heard(self, calls: list[int]) -> int:
        """Tokens of some calls' answers."""
        return sum(map(self.author.answer_tokens, calls))


def chain(stage: Stage) -> None:
    """Experts one after the other; each one's prompt is its own part and all said before."""
    speakers = stage.habits.shape.speakers.count(stage.rng, least=2)
    said_tokens = stage.task_tokens("expert")
    last: tuple[int, ...] = ()
    for number in range(stage.options.stages or speakers):
        expert = stage.agent("expert", kind=f"expert-{number + 1}")
        expert.hear(said_tokens)
        last = (expert.speak(last),)
        said_tokens += stage.heard(list(last))


def fanout(stage: Stage) -> None:
    """A plan, explorers in parallel, and the planner reads what they found."""
    planner = stage.agent("planner")
    planner.hear(stage.task_tokens("planner"))
    plan = planner.speak(())
    found = stage.explore(plan, stage.heard([plan]), stage.width())
    planner.hear(stage.heard(found))
    planner.speak(found)


def review(stage: Stage) -> None:
    """Plan, explore, then an engineer who works until the reviewer is satisfied."""
    planner = stage.agent("planner")
    planner.hear(stage.task_tokens("planner"))
    plan = planner.speak(())
    found = stage.explore(plan, stage.heard([plan]), stage.width())
    engineer, reviewer = stage.agent("engineer"), stage.agent("reviewer")
    engineer.hear(stage.task_tokens("engineer") + stage.heard([plan, *found]))
    reviewer.hear(stage.task_tokens("reviewer") + stage.heard([plan]))
    rounds = stage.options.rounds or stage.habits.shape.rounds.count(stage.rng, least=1)
    verdict = 0
    for number in range(rounds):
        if number:
            engineer.hear(stage.heard([verdict]))
        # The calls that were measured are those of a whole task, not of a round.
        calls = max(1, round(stage.calls("engineer") / rounds))
        done = engineer.work((verdict,) if number else found, calls)
        reviewer.hear(stage.heard([done]))
        verdict = reviewer.speak((done,))
    planner.hear(stage.heard([done, verdict]))
    planner.speak((verdict,))


def mapreduce(stage: Stage) -> None:
    """One mapper for each part, and reducers of some answers each until one is left."""
    answers = []
    for _ in range(stage.options.width or 8):
        mapper = stage.agent("explorer", kind="mapper")
        mapper.hear(stage.task_tokens("explorer"))
        mapper.hear(stage.habits.agents["explorer"].new_tokens.count(stage.rng))
        answers.append(mapper.speak(()))
    while True:
        groups = [answers[at : at + REDUCE_ARITY] for at in range(0, len(answers), REDUCE_ARITY)]
        answers = []
        for group in groups:
            reducer = stage.agent("expert", kind="reducer")
            reducer.hear(stage.task_tokens("reviewer") + stage.heard(group))
            answers.append(reducer.speak(group))
        if len(answers) == 1:
            return


def coding(stage: Stage) -> None:
    """A coding session without sub-agents."""
    _session(stage, "coder")


def assistant(stage: Stage) -> None:
    """A customer's session with an assistant that has tools."""
    _session(stage, "assistant")


def _session(stage: Stage, habit: str) -> None:
    agent = stage.agent(habit)
    agent.hear(stage.task_tokens(habit))
    agent.work((), stage.options.calls or stage.calls(habit))


def subagents(stage: Stage) -> None:
    """A coding session whose lead sends out sub-agents and waits for all of them."""
    lead = stage.agent("lead")
    lead.hear(stage.task_tokens("lead"))
    calls = stage.options.calls or stage.calls("lead")
    parents: tuple[int, ...] = (lead.speak(()),)
    for _ in range(calls - 1):
        if stage.rng.random() < stage.habits.shape.fork_share:
            ends = [_delegated(stage, parents[0]) for _ in range(stage.width())]
            lead.hear(stage.heard(ends))
            parents = (*parents, *ends)
        else:
            lead.change()
        parents = (lead.speak(parents),)


def _delegated(stage: Stage, parent: int) -> int:
    weights = stage.habits.shape.fork_weights
    habit = stage.rng.choices(list(weights), list(weights.values()))[0]
    agent = stage.agent(habit)
    agent.hear(stage.task_tokens(habit))
    return agent.work((parent,), stage.calls(habit))


GENERATORS: Mapping[str, Callable[[Stage], None]] = {
    "chain": chain,
    "fanout": fanout,
    "review": review,
    "mapreduce": mapreduce,
    "coding": coding,
    "subagents": subagents,
    "assistant": assistant,
}


def generated(name: str, habits: Habits, options: Options, rng: random.Random) -> Workload:
    """A workload of one of the ``GENERATORS``; runs have no arrivals yet."""
    library = Library()
    runs = []
    for number in range(options.runs):
        stage = Stage(habits, options, library, rng)
        GENERATORS[name](stage)
        runs.append(Run(f"{name}-{number}", name, 0.0, name, tuple(stage.author.calls)))
    traces = dict.fromkeys(agent.trace for agent in habits.agents.values())
    return Workload(
        name=name,
        source="generated with habits of " + ", ".join(traces),
        licence="",
        block_tokens=BLOCK_TOKENS,
        runs=linked(runs, BLOCK_TOKENS),
    )

"""Agents that read, then write, in waves: the mix of prefill and decode swings with the waves.

A run is one task. Its explorer reads a few long documents one after the other, each new to
every cache, and says little about each; then its engineer writes a few long answers, each
from a short prompt. Tasks come in waves, as when people begin to work or a pipeline starts its
jobs, so that explorers are many at first and engineers soon after: with the defaults uncached
prompt tokens for each answer's token swing by more than five times within a period.

``steady`` tasks come evenly instead, with the same calls at the same mean rate.
"""

from __future__ import annotations

import random
from typing import Annotated

import msgspec

from cluster.workload.author import Author, History, Library
from cluster.workload.form import BLOCK_TOKENS, Run, Workload
from cluster.workload.lineage import linked

Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Above0 = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
STATIC_TOKENS = 1024
"""An explorer's instructions, the same in all runs."""
TOLD_TOKENS = 256
"""What an engineer is told between two answers."""
SPREAD = 0.5
"""Of lengths: the standard deviation of their logarithm."""
WORKFLOW = "task"


class Swing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``waves`` of ``tasks`` each, one every ``period_s``, each wave's tasks within ``within_s``.

    ``reads`` documents of ``document_tokens`` in the median are read by each task's explorer,
    which says ``note_tokens``; its engineer writes ``writes`` answers of ``answer_tokens``.
    ``think_s``: pause between two calls, on average; ``pause_s``: between the two agents, for
    tests to run. An engineer's instructions, tools and code are ``engineer_tokens``, the same in
    all runs.
    """

    waves: Count = 4
    tasks: Count = 300
    period_s: Above0 = 240.0
    within_s: Above0 = 50.0
    reads: Count = 2
    document_tokens: Count = 6000
    note_tokens: Count = 60
    writes: Count = 3
    answer_tokens: Count = 1500
    think_s: Above0 = 2.0
    engineer_tokens: Count = 6144
    pause_s: Above0 = 30.0
    steady: bool = False


def swinging(swing: Swing, rng: random.Random) -> Workload:
    """The tasks, with their arrivals."""
    library, runs = Library(), []
    for number, arrival_s in enumerate(_arrivals(swing, rng)):
        author = Author(library, rng)
        _task(swing, author, rng)
        runs.append(Run(f"task-{number}", WORKFLOW, arrival_s, "task", tuple(author.calls)))
    return Workload(
        name="steady" if swing.steady else "swing",
        source="generated: agents that read, then write",
        licence="",
        block_tokens=BLOCK_TOKENS,
        runs=linked(runs, BLOCK_TOKENS),
        arrivals_known=True,
    )


def _arrivals(swing: Swing, rng: random.Random) -> list[float]:
    if swing.steady:
        lasts_s = swing.waves * swing.period_s
        return sorted(rng.random() * lasts_s for _ in range(swing.waves * swing.tasks))
    return sorted(
        wave * swing.period_s + rng.random() * swing.within_s
        for wave in range(swing.waves)
        for _ in range(swing.tasks)
    )


def _task(swing: Swing, author: Author, rng: random.Random) -> None:
    """One task's calls, each after the one before."""
    parents: tuple[int, ...] = ()
    for number in range(swing.reads):
        # A document is for one call; of those before only notes are kept.
        explorer = author.library.begin("explorer", STATIC_TOKENS)
        explorer.grow(number * swing.note_tokens + _drawn(swing.document_tokens, rng))
        parents = (_say(swing, author, rng, "explorer", explorer, parents, swing.note_tokens),)
    engineer = author.library.begin("engineer", swing.engineer_tokens)
    engineer.grow(swing.reads * swing.note_tokens)
    for number in range(swing.writes):
        engineer.grow(TOLD_TOKENS)
        tokens, pause_s = swing.answer_tokens, swing.think_s if number else swing.pause_s
        parents = (_say(swing, author, rng, "engineer", engineer, parents, tokens, pause_s),)


def _say(
    swing: Swing,
    author: Author,
    rng: random.Random,
    kind: str,
    history: History,
    parents: tuple[int, ...],
    tokens: int,
    pause_s: float = 0.0,
) -> int:
    pause_s = pause_s or swing.think_s
    think_s = round(rng.expovariate(1.0 / pause_s), 3) if parents else 0.0
    return author.say(kind, kind, history, parents, _drawn(tokens, rng), think_s)


def _drawn(median: int, rng: random.Random) -> int:
    return max(1, round(rng.lognormvariate(0.0, SPREAD) * median))

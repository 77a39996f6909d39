"""Which static prompts are computed on which idle workers, before a call asks for them.

A worker is asked only if it has nothing to do and its cache takes the prompt without forgetting
anything: then it costs nothing that anybody waits for. The prompt that most live runs may ask
for, times its length, comes first; of the workers, one that holds most of it already.

Pure: views in, pairs out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

PromptKey = tuple[str, str]
"""Workflow and agent."""


class Prompt(NamedTuple):
    """A static prompt. ``runs``: live ones of its workflow; ``held``: blocks of it by worker."""

    key: PromptKey
    blocks: int
    runs: int
    held: Mapping[str, int]


def warmed(
    prompts: Collection[Prompt],
    idle: Mapping[str, int],
    avoid: Collection[tuple[str, PromptKey]],
    most: int,
) -> list[tuple[str, PromptKey]]:
    """At most so many pairs of worker and prompt, no worker twice.

    ``idle``: workers with nothing to do, and how many blocks each has room for. ``avoid``: pairs
    that failed lately.
    """
    room = dict(idle)
    found: list[tuple[str, PromptKey]] = []
    for prompt in sorted(prompts, key=lambda each: (-each.runs * each.blocks, each.key)):
        for worker in sorted(room, key=lambda name: (-prompt.held.get(name, 0), name)):
            missing = prompt.blocks - prompt.held.get(worker, 0)
            if len(found) >= most:
                return found
            if 0 < missing <= room[worker] and (worker, prompt.key) not in avoid:
                found.append((worker, prompt.key))
                del room[worker]
    return found

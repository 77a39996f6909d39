"""Which call goes on from which: what decoding leaves in the cache for later prompts.

Traces say which blocks a prompt has, not which of them were generated. They are those
between the end of one call's prompt and the end of its output in the prompt of the first
later call that begins with all of its blocks. Where that prompt has no room for the output
(agents drop their reasoning), nothing is credited. Of several answers to one prompt only the
first is what it goes on with.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from msgspec.structs import replace

from cluster.workload.form import Call, Run, leaves
from cluster.workload.spans import Spans, after, cut, shared, total

_Waiting = tuple[int, int, int, int]
"""Last block's id, number of blocks, position of the run, index of the call."""


class _Scope:
    """The calls of one scope that nobody extends so far, by their last block."""

    def __init__(self) -> None:
        self.waiting: list[_Waiting] = []

    def candidates(self, blocks: Spans) -> list[_Waiting]:
        """Those whose last block is in this prompt, before its end."""
        found: list[_Waiting] = []
        for first, count in blocks:
            low = bisect_left(self.waiting, (first,))
            found += self.waiting[low : bisect_left(self.waiting, (first + count,))]
        # Files may have an id twice in one prompt, though no prefix can be its own.
        return list(dict.fromkeys(found))

    def forget(self, waiting: _Waiting) -> None:
        del self.waiting[bisect_left(self.waiting, waiting)]


def linked(runs: Iterable[Run], block_tokens: int) -> tuple[Run, ...]:
    """The runs with every call's ``continued`` and ``final`` set, whatever they were before."""
    runs = list(runs)
    scopes: dict[str, _Scope] = {}
    continued: dict[tuple[int, int], Spans] = {}
    for position, run in enumerate(runs):
        scope = scopes.setdefault(run.scope, _Scope())
        ancestors = _ancestors(run.calls)
        for call in run.calls:
            blocks = total(call.blocks)
            answered: set[tuple[int, int]] = set()
            for waiting in scope.candidates(call.blocks):
                other_position, index = waiting[2:]
                if other_position == position and not ancestors[call.index] >> index & 1:
                    continue
                other = runs[other_position].calls[index]
                if blocks > waiting[1] == shared(call.blocks, other.blocks):
                    if (other_position, waiting[1]) not in answered:
                        continued[other_position, index] = _output_blocks(call, other, block_tokens)
                    answered.add((other_position, waiting[1]))
                    scope.forget(waiting)
            if blocks:
                first, count = call.blocks[-1]
                insort(scope.waiting, (first + count - 1, blocks, position, call.index))
    return tuple(_marked(run, position, continued) for position, run in enumerate(runs))


def _ancestors(calls: tuple[Call, ...]) -> list[int]:
    """For every call the calls that ended before it began, as a bit mask."""
    masks: list[int] = []
    for call in calls:
        mask = 0
        for parent in call.parents:
            mask |= masks[parent] | 1 << parent
        masks.append(mask)
    return masks


def _output_blocks(call: Call, other: Call, block_tokens: int) -> Spans:
    if call.prompt_tokens < other.prompt_tokens + other.output_tokens:
        return ()
    end = -(-(other.prompt_tokens + other.output_tokens) // block_tokens)
    return after(cut(call.blocks, end), total(other.blocks))


def _marked(run: Run, position: int, continued: dict[tuple[int, int], Spans]) -> Run:
    ends = leaves(run.calls)
    calls = tuple(
        replace(
            call,
            continued=continued.get((position, call.index), ()),
            final=ends == [call.index],
        )
        for call in run.calls
    )
    return replace(run, calls=calls)

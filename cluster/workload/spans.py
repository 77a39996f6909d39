"""Block ids, run-length coded: ``((first, count), ...)`` stands for consecutive ids.

A prompt of 100,000 tokens is a handful of spans, so all that is done to prompts here is
done to spans, never to single blocks. Equal ids mean equal prefixes: an id stands for its
block and for everything before it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

Spans = tuple[tuple[int, int], ...]


def merged(spans: Iterable[tuple[int, int]]) -> Spans:
    """The only way to write these ids: no empty span, none that continues the one before."""
    out: list[tuple[int, int]] = []
    for first, count in spans:
        if count <= 0:
            continue
        if out and sum(out[-1]) == first:
            out[-1] = (out[-1][0], out[-1][1] + count)
        else:
            out.append((first, count))
    return tuple(out)


def total(spans: Spans) -> int:
    """How many blocks there are."""
    return sum(count for _, count in spans)


def cut(spans: Spans, blocks: int) -> Spans:
    """The first ``blocks`` blocks, or all if there are fewer."""
    out: list[tuple[int, int]] = []
    for first, count in spans:
        if blocks <= 0:
            break
        out.append((first, min(count, blocks)))
        blocks -= count
    return tuple(out)


def after(spans: Spans, blocks: int) -> Spans:
    """All but the first ``blocks`` blocks."""
    out: list[tuple[int, int]] = []
    for first, count in spans:
        skipped = min(count, max(blocks, 0))
        if skipped < count:
            out.append((first + skipped, count - skipped))
        blocks -= count
    return tuple(out)


def shared(one: Spans, other: Spans) -> int:
    """How many leading blocks both have. Both must be ``merged``."""
    blocks = 0
    for (first, count), (other_first, other_count) in zip(one, other, strict=False):
        if first != other_first:
            break
        blocks += min(count, other_count)
        if count != other_count:
            break
    return blocks


def divided(spans: Spans, parts: int) -> Spans:
    """The same prompt in blocks ``parts`` times smaller."""
    return tuple((first * parts, count * parts) for first, count in spans)


class SeenBlocks:
    """A growing set of block ids: what a cache without a limit would hold."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def leading(self, spans: Spans) -> int:
        """How many blocks at the beginning of a prompt are in the set."""
        blocks = 0
        for first, count in spans:
            at = bisect_right(self._starts, first) - 1
            held = max(0, min(count, self._ends[at] - first)) if at >= 0 else 0
            blocks += held
            if held < count:
                break
        return blocks

    def add(self, spans: Spans) -> None:
        """Put the blocks in."""
        for first, count in spans:
            end = first + count
            low = bisect_right(self._ends, first - 1)
            high = bisect_right(self._starts, end)
            if low < high:
                first = min(first, self._starts[low])
                end = max(end, self._ends[high - 1])
            self._starts[low:high] = [first]
            self._ends[low:high] = [end]

"""Which agent comes next: a probabilistic automaton over agents with back-off.

A state is the path of up to ``ORDER`` last agents. What followed each path, and each of its
ends, is counted; the probabilities of a short path are the back-off of those of the longer
one, interpolated as Witten and Bell do (method C of *The Zero-Frequency Problem*, IEEE
Transactions on Information Theory 37(4), 1991): a path with many different followers, seen
rarely, leaves much to its back-off. A declared graph is counted as followers of single agents
that were seen ``PRIOR_STRENGTH`` times.

Counts of a path are halved when there are ``COUNT_MOST``, as adaptive compressors do, so that
an application that has changed is learned anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

ORDER = 4
COUNT_MOST = 128.0
COUNT_LEAST = 0.2
"""Followers of less than this are forgotten when counts are halved."""
PRIOR_STRENGTH = 8.0
NEGLIGIBLE = 1e-9
"""What is left to a back-off that is not asked."""

Path = tuple[int, ...]


class _Followers:
    """What followed a path: counts by symbol, and their sum."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts: dict[int, float] = {}
        self.total = 0.0

    def add(self, symbol: int) -> None:
        self.counts[symbol] = self.counts.get(symbol, 0.0) + 1.0
        self.total += 1.0
        if self.total >= COUNT_MOST:
            halves = {at: count / 2 for at, count in self.counts.items()}
            self.counts = {at: count for at, count in halves.items() if count >= COUNT_LEAST}
            self.total = sum(self.counts.values())


class Automaton:
    """Counts of followers by path. Symbols are numbers; who they are is others' business."""

    def __init__(self, contexts_most: int) -> None:
        self._contexts_most = contexts_most
        self._contexts: OrderedDict[Path, _Followers] = OrderedDict()
        self._prior: dict[int, dict[int, float]] = {}

    def __len__(self) -> int:
        return len(self._contexts)

    def declare(self, prior: Mapping[int, Mapping[int, float]]) -> None:
        """Take what each symbol is followed by, in probabilities, from a declared graph."""
        self._prior = {symbol: dict(ways) for symbol, ways in prior.items()}

    def observe(self, path: Path, symbol: int) -> None:
        """``symbol`` came after ``path``, whose last element is the latest."""
        contexts = self._contexts
        for length in range(min(ORDER, len(path)) + 1):
            key = path[len(path) - length :]
            followers = contexts.get(key)
            if followers is None:
                followers = contexts[key] = _Followers()
                if len(contexts) > self._contexts_most:
                    contexts.popitem(last=False)
            else:
                contexts.move_to_end(key)
            followers.add(symbol)

    def probabilities(self, path: Path) -> dict[int, float]:
        """How probable each symbol is after a path; empty if nothing is known, else adds to 1."""
        prior = self._prior.get(path[-1], {}) if path else {}
        least = PRIOR_STRENGTH if prior else 1.0
        found: dict[int, float] = {}
        # The longest path first; ``left`` is what it and those after it leave to their back-off.
        # What a graph says of this agent goes before what is seen after any agent.
        left, pending = 1.0, None
        for length in range(min(ORDER, len(path)), 0 if prior else -1, -1):
            followers = self._contexts.get(path[len(path) - length :])
            if followers is None or not followers.total:
                continue
            if pending is not None:
                left = _leave(found, pending, left, least)
                if left < NEGLIGIBLE:
                    return found
            pending = followers
        if pending is None:
            return dict(prior)
        if prior:
            left = _leave(found, pending, left, least)
            pairs, scale = prior, left
        else:
            pairs, scale = pending.counts, left / pending.total
        for symbol, count in pairs.items():
            found[symbol] = found.get(symbol, 0.0) + count * scale
        return found

    def samples(self, path: Path) -> float:
        """How often the last agent of a path was seen to be followed, decayed."""
        followers = self._contexts.get(path[-1:])
        return followers.total if followers is not None else 0.0

    def forget(self, symbols: set[int]) -> None:
        """Drop all that was counted of these symbols."""
        for path in [path for path in self._contexts if not symbols.isdisjoint(path)]:
            del self._contexts[path]
        for followers in self._contexts.values():
            if not symbols.isdisjoint(followers.counts):
                kept = followers.counts.items()
                followers.counts = {at: count for at, count in kept if at not in symbols}
                followers.total = sum(followers.counts.values())

    def counts(self) -> list[tuple[Path, dict[int, float]]]:
        """All that was counted, the least recently used path first."""
        return [(path, dict(seen.counts)) for path, seen in self._contexts.items()]

    def restore(self, counts: list[tuple[Path, dict[int, float]]]) -> None:
        """Take over counts in place of what was there."""
        self._contexts.clear()
        for path, seen in counts[-self._contexts_most :]:
            followers = self._contexts[path[-ORDER:]] = _Followers()
            followers.counts = {at: count for at, count in seen.items() if count > 0}
            followers.total = sum(followers.counts.values())


def _leave(found: dict[int, float], followers: _Followers, share: float, least: float) -> float:
    """Witten-Bell: add what was seen to ``found``, and leave the rest of ``share`` by the number
    of different followers, which is taken to be at least ``least``."""
    counts = followers.counts
    different = max(float(len(counts)), least)
    scale = share / (followers.total + different)
    for symbol, count in counts.items():
        found[symbol] = found.get(symbol, 0.0) + count * scale
    return different * scale

"""A workflow as a semi-Markov chain: its agents, what follows them, and how long all that takes.

Made of the counts of a profile for the renewal equation in ``projection``. The agents with most
calls are states of their own, the others are one.
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from coordinator.workflow.histogram import edges_of
from coordinator.workflow.learned import AgentCounts, EdgeCounts
from coordinator.workflow.lengths import Lengths
from coordinator.workflow.prediction import SHOWN_LEAST
from coordinator.workflow.profile import END, OTHER, START, Profile
from coordinator.workflow.stages import Stage

Floats: TypeAlias = NDArray[np.float64]

STEPS = 48
"""Steps of a grid of time."""
AGES = 13
YOUNGEST_S = 0.5
"""Ages below this are one; each that follows is twice as long."""
AGENTS_MOST = 12
"""Agents of a workflow that are projected one by one, those with most calls."""
EDGES_MOST = 48
PIECES = 4
"""Parts that a bin of a distribution is cut into on the grid."""
TAIL = (1.1, 1.3, 1.6, 2.0, 3.0, 6.0)
"""How much longer than the longest that was seen something may last."""
TAIL_MOST = 0.05
CALL_GUESS_S = 10.0
GAP_GUESS_S = 10.0


class OnGrid(NamedTuple):
    """A distribution on a grid of time, by age.

    ``survive``: the share that is older. By step, of those: ``kernel``, the share that ends
    there; ``still``, the share that lasts longer; ``lasted_s``, how long all did so far on average.
    """

    survive: Floats
    kernel: Floats
    still: Floats
    lasted_s: Floats


class Points:
    """A distribution as weights of points in order; they add up to 1."""

    def __init__(self, lengths: Lengths, others: Lengths, guess_s: float) -> None:
        source = lengths if lengths.values.samples else others
        bins, total = source.values.weights()
        if total:
            edges = np.array([edges_of(place) for place in sorted(bins)])
            weights = np.array([bins[place] for place in sorted(bins)]) / total
            parts = (np.arange(PIECES) + 0.5) / PIECES
            width = edges[:, 1:] - edges[:, :1]
            seen_s = (edges[:, :1] + width * parts).ravel() * source.scale
            # What lasts longer than all that was seen has not ended: as many values as there
            # are leave one in so many beyond them.
            beyond = min(TAIL_MOST, 1.0 / (source.values.samples + 2.0))
            tail_s = seen_s[-1] * np.array(TAIL)
            self.at_s = np.concatenate([seen_s, tail_s])
            body: Floats = np.repeat((1.0 - beyond) * weights / PIECES, PIECES)
            tail = np.full(len(TAIL), beyond / len(TAIL))
            self.weights: Floats = np.concatenate([body, tail])
        else:
            # Nothing is known: exponential, by its quantiles.
            shares = (np.arange(32) + 0.5) / 32
            self.at_s = -guess_s * np.log1p(-shares)
            self.weights = np.full(32, 1 / 32)
        self.mean_s = max(1e-3, float(self.at_s @ self.weights))
        self._below = np.concatenate([[0.0], np.cumsum(self.weights)])
        self._time_below = np.concatenate([[0.0], np.cumsum(self.weights * self.at_s)])

    def on_grid(self, ages_s: Floats, step_s: float) -> OnGrid:
        """How much longer it lasts, for each age.

        In the kernel each point's weight goes to the two steps around it, so that means stay
        what they are.
        """
        left_s = self.at_s[None, :] - ages_s[:, None]
        weights = np.where(left_s >= 0, self.weights[None, :], 0.0)
        survive = weights.sum(axis=1)
        alive = np.maximum(survive, 1e-12)[:, None]
        scaled = weights / alive
        places = np.clip(left_s / step_s, 0.0, STEPS + 1.0)
        lower = places.astype(np.int64)
        part = places - lower
        width = STEPS + 3
        flat = (np.arange(len(ages_s))[:, None] * width + lower).ravel()
        size = len(ages_s) * width
        kernel = np.bincount(flat, (scaled * (1 - part)).ravel(), size)
        kernel += np.bincount(flat + 1, (scaled * part).ravel(), size)[:size]
        steps_s = np.arange(STEPS + 1) * step_s
        until = np.searchsorted(self.at_s, ages_s[:, None] + steps_s[None, :], side="right")
        before = np.searchsorted(self.at_s, ages_s[:, None], side="left")
        still = np.maximum(0.0, 1.0 - self._below[until]) / alive
        ended = (self._below[until] - self._below[before]) / alive
        time_s = (self._time_below[until] - self._time_below[before]) / alive
        lasted_s = time_s - ages_s[:, None] * ended + steps_s[None, :] * still
        kernel = kernel.reshape(len(ages_s), width)[:, : STEPS + 1]
        return OnGrid(survive, kernel, still, lasted_s)


class Chain:
    """A workflow's states and their distributions, by place among the projected agents."""

    def __init__(self, profile: Profile, agents: list[int]) -> None:
        size = len(agents)
        place_of = {symbol: at for at, symbol in enumerate(agents)}
        everything = profile.everything
        counts = [profile.agent(symbol) for symbol in agents]
        counts[-1] = _others(profile, place_of)
        self.size = size
        self.prompt_tokens = _means(
            [(one.prompt_tokens, everything.prompt_tokens) for one in counts]
        )
        self.output_tokens = _means(
            [(one.output_tokens, everything.output_tokens) for one in counts]
        )
        self.output_squares = _squares(
            [(one.output_tokens, everything.output_tokens) for one in counts]
        )
        self.durations = [
            Points(one.duration_s, everything.duration_s, CALL_GUESS_S) for one in counts
        ]
        self.duration_s = np.array([one.mean_s for one in self.durations])
        self.longest = np.array([one.longest or everything.longest for one in counts])
        self.final = np.array([_share(one.final_runs, one.resolved) for one in counts])
        self.ended = np.array(
            [
                _share(one.ended_runs - one.final_runs, one.resolved - one.final_runs)
                for one in counts
            ]
        )
        self.edges = _edges(profile, place_of)
        self.starts = _starts(profile, place_of)

    def in_stages(self, stages: list[Stage]) -> Chain:
        """The same with each agent once for every stage, those of the first stage first."""
        found, size = copy(self), self.size
        found.size = size * len(stages)
        for name in ("prompt_tokens", "output_tokens", "output_squares", "duration_s", "longest"):
            setattr(found, name, np.tile(getattr(self, name), len(stages)))
        found.durations = self.durations * len(stages)
        found.final = np.concatenate([_more_likely(self.final, one.odds) for one in stages])
        ended = [_more_likely(self.ended, one.odds) for one in stages]
        found.ended = np.concatenate(ended)
        found.edges = []
        for number, stage in enumerate(stages):
            going_on = (1.0 - ended[number]) / np.maximum(1.0 - self.ended, 1e-9)
            for edge in self.edges:
                factor = float(going_on[edge.source])
                for step, part in ((0, 1.0 - stage.onward), (1, stage.onward)):
                    if part:
                        moved = edge.moved(size * number, size * (number + step))
                        found.edges.append(moved.times(factor, part))
        return found


class _Pooled:
    """Edges with the same ends: their sums, and the most frequent one."""

    __slots__ = ("follows", "starts", "typical")

    def __init__(self) -> None:
        self.follows = self.starts = 0.0
        self.typical = EdgeCounts()

    def add(self, edge: EdgeCounts) -> None:
        self.follows += edge.follows
        self.starts += edge.starts
        if edge.starts > self.typical.starts:
            self.typical = edge


class Edge:
    """``calls`` of ``target`` follow a call of ``source``, with probability ``share`` any."""

    __slots__ = ("calls", "gap", "new_squares", "new_tokens", "share", "source", "target")

    def __init__(
        self, profile: Profile, ends: tuple[int, int], pooled: _Pooled, calls: float, share: float
    ) -> None:
        self.source, self.target = ends
        self.calls, self.share = calls, min(1.0, share)
        self.gap = Points(pooled.typical.gap_s, profile.gap_s, GAP_GUESS_S)
        pair = [(pooled.typical.new_tokens, profile.new_tokens)]
        self.new_tokens = float(_means(pair)[0])
        self.new_squares = float(_squares(pair)[0])

    def times(self, calls: float, part: float) -> Edge:
        """A part of it, with more or fewer calls."""
        found = copy(self)
        found.calls *= calls * part
        found.share *= part
        return found

    def moved(self, source: int, target: int) -> Edge:
        """The same between places so much further on."""
        found = copy(self)
        found.source += source
        found.target += target
        return found


def ages_s() -> Floats:
    """The age that stands for each of the ages."""
    return np.concatenate([[0.2], YOUNGEST_S * 2.0 ** np.arange(AGES - 1) * 1.4])


def projected(profile: Profile) -> list[int]:
    """The agents with most calls, and what stands for the others, which comes last."""
    by_calls = sorted(
        (-counts.output_tokens.values.samples - counts.prompt_tokens.values.samples, symbol)
        for symbol, counts in profile.agents.items()
        if symbol not in (START, END, OTHER)
    )
    return [symbol for _, symbol in by_calls[: AGENTS_MOST - 1]] + [OTHER]


def _others(profile: Profile, place_of: dict[int, int]) -> AgentCounts:
    """The agents that are not projected, as one; their lengths are those of all agents."""
    found = AgentCounts()
    for symbol, counts in profile.agents.items():
        if symbol == OTHER or (symbol not in place_of and symbol not in (START, END)):
            found.resolved += counts.resolved
            found.ended_runs += counts.ended_runs
            found.final_runs += counts.final_runs
    return found


def _edges(profile: Profile, place_of: dict[int, int]) -> list[Edge]:
    """What follows what, by place: agents that are not projected are one, at the last place.

    Of edges with the same ends the most frequent one stands for all in gaps and lengths. Rare
    edges go to the others, so that no calls are lost.
    """
    other = place_of[OTHER]
    going_on = np.zeros(len(place_of))
    pooled: dict[tuple[int, int], _Pooled] = {}
    for symbol, counts in profile.agents.items():
        place = place_of.get(symbol, other)
        alive = counts.resolved - counts.final_runs
        if symbol in (START, END) or alive <= 0:
            continue
        going_on[place] += alive
        for target, edge in counts.followers.items():
            rare = edge.follows < SHOWN_LEAST * alive
            ends = (place, other if rare else place_of.get(target, other))
            pooled.setdefault(ends, _Pooled()).add(edge)
    most = sorted(pooled.items(), key=lambda item: (-item[1].starts, item[0]))[:EDGES_MOST]
    return [
        Edge(profile, ends, one, one.starts / going_on[ends[0]], one.follows / going_on[ends[0]])
        for ends, one in most
    ]


def _starts(profile: Profile, place_of: dict[int, int]) -> list[tuple[int, float, float, float]]:
    """With what runs begin: place of the agent, calls, new tokens and their square."""
    root: AgentCounts = profile.agents[START]
    other = place_of[OTHER]
    return [
        (
            place_of.get(target, other),
            edge.starts / max(1.0, root.resolved),
            float(_means([(edge.new_tokens, profile.new_tokens)])[0]),
            float(_squares([(edge.new_tokens, profile.new_tokens)])[0]),
        )
        for target, edge in root.followers.items()
    ]


def _more_likely(shares: Floats, odds: float) -> Floats:
    return shares * odds / (1.0 - shares + shares * odds)


def _share(part: float, whole: float) -> float:
    return min(1.0, max(0.0, part / whole)) if whole > 0 else 0.0


def _means(pairs: list[tuple[Lengths, Lengths]]) -> Floats:
    return np.array([(one if one.values.samples else other).mean() for one, other in pairs])


def _squares(pairs: list[tuple[Lengths, Lengths]]) -> Floats:
    return np.array([(one if one.values.samples else other).mean_square() for one, other in pairs])

"""What a call of a workflow leads to, in tokens, over the next seconds and minutes.

A run is taken as a semi-Markov process: a call of an agent runs for a while, is idle for a
while (tools), and sets off calls of other agents. The expected demand from each state is the
solution of a Markov renewal equation (Cinlar, *Introduction to Stochastic Processes*, ch. 10),
solved step by step on two grids of time, a fine one for the next seconds and a coarse one.

How long a state has lasted matters: what has been idle for a minute will not go on within the
second in which most do, and may never. So there is a row for each age, from the part of the
distributions that lies beyond it.

Costs milliseconds, is done now and then for each workflow, and makes a forecast a product of
counts with a table.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from coordinator.workflow.histogram import edges_of
from coordinator.workflow.learned import AgentCounts, EdgeCounts
from coordinator.workflow.lengths import Lengths
from coordinator.workflow.prediction import SHOWN_LEAST
from coordinator.workflow.profile import END, OTHER, START, Profile
from coordinator.workflow.units import IDLE, RUNNING

HORIZONS_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 180.0, 300.0)
STEPS = 48
GRIDS_S = (30.0, 300.0)
"""How far the two grids reach."""
AGES = 13
YOUNGEST_S = 0.5
"""Ages below this are one; each that follows is twice as long."""
AGENTS_MOST = 12
"""Agents of a workflow that are projected one by one, those with most calls."""
EDGES_MOST = 64
PIECES = 4
"""Parts that a bin of a distribution is cut into on the grid."""
AT_ONCE_MOST = 0.9
"""What a state may set off within no time at all; the rest waits for a step."""
CALL_GUESS_S = 10.0
GAP_GUESS_S = 10.0

Floats: TypeAlias = NDArray[np.float64]


class Projection:
    """Tables of one workflow. Columns are the projected agents, by quantity.

    ``agents``: their numbers. ``rows``: per agent, phase and age. ``ahead[h]``: by row, the
    prefill and decode tokens expected within ``HORIZONS_S[h]`` and the KV tokens resident then,
    of each agent. ``squares[h]``: by row, the same of squared prefills and answers, summed.
    ``held[h]``: by row, how much of the row's own context is resident then. ``so_far``: by row,
    what a running call has already answered. ``arriving``, ``arriving_squares``: by horizon,
    what one new run a second adds.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.events = profile.events
        self.agents = _projected(profile)
        self.rows = len(self.agents) * 2 * AGES
        size, horizons = len(self.agents), len(HORIZONS_S)
        self.columns = 3 * size
        self.ahead = np.zeros((horizons, self.rows, self.columns))
        self.squares = np.zeros((horizons, self.rows, 2))
        self.held = np.zeros((horizons, self.rows))
        self.so_far = np.zeros(self.rows)
        self.arriving = np.zeros((horizons, self.columns))
        self.arriving_squares = np.zeros((horizons, 2))
        chain = _Chain(profile, self.agents)
        for number, reach_s in enumerate(GRIDS_S):
            least_s = GRIDS_S[number - 1] if number else 0.0
            wanted = [at for at, h_s in enumerate(HORIZONS_S) if least_s < h_s <= reach_s]
            self._fill(_Grid(chain, reach_s / STEPS, [HORIZONS_S[at] for at in wanted]), wanted)
        for place in range(size):
            self.so_far[2 * place * AGES : (2 * place + 1) * AGES] = chain.so_far(place)

    def row(self, agent: int, phase: int) -> int:
        """The first row, of the youngest, of an agent in a phase."""
        place = self.agents.index(agent) if agent in self.agents else self.agents.index(OTHER)
        return (2 * place + phase) * AGES

    def _fill(self, grid: _Grid, wanted: list[int]) -> None:
        size = len(self.agents)
        start = grid.arriving()
        self.arriving[wanted] = start[:, : self.columns]
        self.arriving_squares[wanted] = start[:, self.columns :]
        for place in range(size):
            for phase in (RUNNING, IDLE):
                found, held = grid.running(place) if phase == RUNNING else grid.idle(place)
                first = (2 * place + phase) * AGES
                # An agent's own context is better known than the mean one: see ``held``.
                resident = 2 * size + place
                own = found[:, :, resident] / max(1.0, grid.chain.prompt_tokens[place])
                found[:, :, resident] = 0.0
                for at, horizon in enumerate(wanted):
                    rows = slice(first, first + AGES)
                    self.ahead[horizon, rows] = found[:, at, : self.columns]
                    self.squares[horizon, rows] = found[:, at, self.columns :]
                    self.held[horizon, rows] = held[:, at] + own[:, at]


class _Points:
    """A distribution as weights of points in order; they add up to 1."""

    def __init__(self, lengths: Lengths, others: Lengths, guess_s: float) -> None:
        source = lengths if lengths.values.samples else others
        bins, total = source.values.weights()
        if total:
            edges = np.array([edges_of(place) for place in sorted(bins)])
            weights = np.array([bins[place] for place in sorted(bins)]) / total
            parts = (np.arange(PIECES) + 0.5) / PIECES
            width = edges[:, 1:] - edges[:, :1]
            self.at_s = (edges[:, :1] + width * parts).ravel() * source.scale
            self.weights: Floats = np.repeat(weights / PIECES, PIECES)
        else:
            # Nothing is known: exponential, by its quantiles.
            shares = (np.arange(32) + 0.5) / 32
            self.at_s = -guess_s * np.log1p(-shares)
            self.weights = np.full(32, 1 / 32)
        self.mean_s = max(1e-3, float(self.at_s @ self.weights))
        self._below = np.concatenate([[0.0], np.cumsum(self.weights)])
        self._time_below = np.concatenate([[0.0], np.cumsum(self.weights * self.at_s)])

    def lasting(self, ages_s: Floats, step_s: float) -> tuple[Floats, Floats]:
        """By age and step: the share that still lasts, and how long all did on average so far."""
        steps_s = np.arange(STEPS + 1) * step_s
        until = np.searchsorted(self.at_s, ages_s[:, None] + steps_s[None, :], side="right")
        before = np.searchsorted(self.at_s, ages_s[:, None], side="left")
        alive = np.maximum(1e-12, 1.0 - self._below[before])
        still = np.maximum(0.0, 1.0 - self._below[until]) / alive
        ended = (self._below[until] - self._below[before]) / alive
        time_s = (self._time_below[until] - self._time_below[before]) / alive
        lasted_s = time_s - ages_s[:, None] * ended + steps_s[None, :] * still
        return still, lasted_s

    def beyond(self, ages_s: Floats, step_s: float) -> tuple[Floats, Floats]:
        """By age, the share that lasts longer, and on the grid how long that still lasts.

        Each point's weight goes to the two steps around it, so that means stay what they are.
        """
        left_s = self.at_s[None, :] - ages_s[:, None]
        weights = np.where(left_s >= 0, self.weights[None, :], 0.0)
        survive = weights.sum(axis=1)
        scaled = weights / np.maximum(survive, 1e-12)[:, None]
        places = np.clip(left_s / step_s, 0.0, STEPS + 1.0)
        lower = places.astype(np.int64)
        part = places - lower
        width = STEPS + 3
        flat = (np.arange(len(ages_s))[:, None] * width + lower).ravel()
        size = len(ages_s) * width
        kernel = np.bincount(flat, (scaled * (1 - part)).ravel(), size)
        kernel += np.bincount(flat + 1, (scaled * part).ravel(), size)[:size]
        return survive, kernel.reshape(len(ages_s), width)[:, : STEPS + 1]


class _Chain:
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
            _Points(one.duration_s, everything.duration_s, CALL_GUESS_S) for one in counts
        ]
        self.duration_s = np.array([one.mean_s for one in self.durations])
        self.final = np.array([_share(one.final_runs, one.resolved) for one in counts])
        self.ended = np.array(
            [
                _share(one.ended_runs - one.final_runs, one.resolved - one.final_runs)
                for one in counts
            ]
        )
        self.edges = _edges(profile, place_of)
        self.starts = _starts(profile, place_of)

    def so_far(self, place: int) -> Floats:
        """By age, what a call of an agent that runs has answered."""
        rate = self.output_tokens[place] / self.duration_s[place]
        return np.minimum(rate * ages_s(), 2.0 * self.output_tokens[place])


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


class _Edge:
    """``calls`` of ``target`` follow a call of ``source``, with probability ``share`` any."""

    __slots__ = ("calls", "gap", "new_squares", "new_tokens", "share", "source", "target")

    def __init__(
        self, profile: Profile, ends: tuple[int, int], pooled: _Pooled, calls: float, share: float
    ) -> None:
        self.source, self.target = ends
        self.calls, self.share = calls, min(1.0, share)
        self.gap = _Points(pooled.typical.gap_s, profile.gap_s, GAP_GUESS_S)
        pair = [(pooled.typical.new_tokens, profile.new_tokens)]
        self.new_tokens = float(_means(pair)[0])
        self.new_squares = float(_squares(pair)[0])


class _Grid:
    """The renewal equation on one grid of time.

    ``after[j]``: by agent, what is expected by step j once one of its calls has ended;
    ``during[j]``: once one has started. Columns are those of ``Projection`` and two of squares.
    """

    def __init__(self, chain: _Chain, step_s: float, horizons_s: list[float]) -> None:
        self.chain = chain
        self.step_s = step_s
        places = np.array(horizons_s) / step_s
        self._lower = np.minimum(places.astype(np.int64), STEPS - 1)
        self._part = places - self._lower
        self._columns = 3 * chain.size + 2
        ages, fresh = ages_s(), np.zeros(1)
        self._running = [one.beyond(ages, step_s)[1] for one in chain.durations]
        self._last = [one.beyond(fresh, step_s)[1][0] for one in chain.durations]
        self._gap = [edge.gap.beyond(ages, step_s) for edge in chain.edges]
        self._fresh_gap = [edge.gap.beyond(fresh, step_s)[1][0] for edge in chain.edges]
        self._alone = [self._own_demand(place) for place in range(chain.size)]
        self.after = self._solved()
        self.during = np.stack(
            [
                self._alone[place]
                + (1 - chain.final[place]) * (_toeplitz(kernel) @ self.after[:, place])
                for place, kernel in enumerate(self._last)
            ],
            axis=1,
        )

    def running(self, place: int) -> tuple[Floats, Floats]:
        """By age and horizon, what an agent's running call leads to, and whether it still runs."""
        chain, kernel = self.chain, self._running[place]
        still, lasted_s = chain.durations[place].lasting(ages_s(), self.step_s)
        table = (1 - chain.final[place]) * self._folded(kernel, self.after[:, place])
        answered = self._at(lasted_s) / chain.duration_s[place]
        table[:, :, chain.size + place] += answered * chain.output_tokens[place]
        table[:, :, 3 * chain.size + 1] += answered * chain.output_squares[place]
        return table, self._at(still)

    def idle(self, place: int) -> tuple[Floats, Floats]:
        """By age and horizon, what an agent's ended call leads to. It holds no memory itself."""
        chain = self.chain
        table = np.zeros((AGES, len(self._lower), self._columns))
        out = [at for at, edge in enumerate(chain.edges) if edge.source == place]
        ended = chain.ended[place]
        shares = sum(chain.edges[at].share for at in out)
        alive = np.full(AGES, ended)
        for at in out:
            survive, _ = self._gap[at]
            alive = alive + (1 - ended) * chain.edges[at].share / shares * survive
        for at in out:
            edge = chain.edges[at]
            survive, kernel = self._gap[at]
            weights = edge.calls * survive / np.maximum(alive, 1e-9)
            kernel = kernel * weights[:, None]
            table += self._folded(kernel, self.during[:, edge.target])
            still, _ = edge.gap.lasting(ages_s(), self.step_s)
            arrived = self._at(1.0 - still) * weights[:, None]
            table[:, :, edge.target] += arrived * edge.new_tokens
            table[:, :, 3 * chain.size] += arrived * edge.new_squares
        return table, np.zeros((AGES, len(self._lower)))

    def arriving(self) -> Floats:
        """By horizon, what one new run a second leads to."""
        chain = self.chain
        table = np.zeros((STEPS + 1, self._columns))
        for target, calls, tokens, squares in chain.starts:
            table += calls * self.during[:, target]
            table[:, target] += calls * tokens
            table[:, 3 * chain.size] += calls * squares
        return self._at(_summed(table.T, self.step_s)).T

    def _folded(self, kernels: Floats, table: Floats) -> Floats:
        """The convolutions of kernels with a table's columns, at the horizons only."""
        lag = self._lower[:, None] - np.arange(STEPS + 1)[None, :]
        # Kernels with a zero in front, so that what lies in the future counts nothing.
        padded = np.concatenate([np.zeros((len(kernels), 1)), kernels], axis=1)
        below = padded[:, np.maximum(lag + 1, 0)]
        above = padded[:, np.maximum(lag + 2, 0)]
        part = self._part[:, None]
        return np.asarray((below * (1 - part) + above * part) @ table)

    def _at(self, rows: Floats) -> Floats:
        """Rows of steps at the horizons."""
        lower = rows[:, self._lower]
        return np.asarray(lower * (1 - self._part) + rows[:, self._lower + 1] * self._part)

    def _own_demand(self, place: int) -> Floats:
        """What a call that starts needs itself: its answer, and room for its prompt."""
        chain = self.chain
        table = np.zeros((STEPS + 1, self._columns))
        still, lasted_s = chain.durations[place].lasting(np.zeros(1), self.step_s)
        answered = lasted_s[0] / chain.duration_s[place]
        table[:, chain.size + place] = answered * chain.output_tokens[place]
        table[:, 2 * chain.size + place] = still[0] * chain.prompt_tokens[place]
        table[:, 3 * chain.size + 1] = answered * chain.output_squares[place]
        return table

    def _solved(self) -> Floats:
        """``after``, from what follows at each delay and what that needs."""
        chain, size = self.chain, self.chain.size
        delayed = np.zeros((STEPS + 1, size, size))
        needed = np.zeros((STEPS + 1, size, self._columns))
        for edge, gap in zip(chain.edges, self._fresh_gap, strict=True):
            # Calls that end their run by saying so are not idle afterwards.
            calls = edge.calls
            both = np.convolve(gap, self._last[edge.target])[: STEPS + 1]
            delayed[:, edge.source, edge.target] += calls * (1 - chain.final[edge.target]) * both
            needed[:, edge.source] += calls * (_toeplitz(gap) @ self._alone[edge.target])
            arrived = calls * (1.0 - edge.gap.lasting(np.zeros(1), self.step_s)[0][0])
            needed[:, edge.source, edge.target] += arrived * edge.new_tokens
            needed[:, edge.source, 3 * size] += arrived * edge.new_squares
        at_once = delayed[0].sum(axis=1, keepdims=True)
        waits = delayed[0] * np.maximum(0.0, 1.0 - AT_ONCE_MOST / np.maximum(at_once, 1e-12))
        delayed[0] -= waits
        delayed[1] += waits
        closed = np.linalg.inv(np.eye(size) - delayed[0])
        after = np.zeros((STEPS + 1, size, self._columns))
        # Steps side by side, so that each step is one product with all before it.
        beside = delayed[1:].transpose(1, 0, 2).reshape(size, STEPS * size)
        for step in range(STEPS + 1):
            known = needed[step]
            if step:
                before = after[step - 1 :: -1] if step > 1 else after[:1]
                known = known + beside[:, : step * size] @ before.reshape(step * size, -1)
            after[step] = closed @ known
        return after


def ages_s() -> Floats:
    """The age that stands for each of the ages."""
    return np.concatenate([[0.2], YOUNGEST_S * 2.0 ** np.arange(AGES - 1) * 1.4])


def _projected(profile: Profile) -> list[int]:
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


def _edges(profile: Profile, place_of: dict[int, int]) -> list[_Edge]:
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
        _Edge(profile, ends, one, one.starts / going_on[ends[0]], one.follows / going_on[ends[0]])
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


def _share(part: float, whole: float) -> float:
    return min(1.0, max(0.0, part / whole)) if whole > 0 else 0.0


def _means(pairs: list[tuple[Lengths, Lengths]]) -> Floats:
    return np.array([(one if one.values.samples else other).mean() for one, other in pairs])


def _squares(pairs: list[tuple[Lengths, Lengths]]) -> Floats:
    return np.array([(one if one.values.samples else other).mean_square() for one, other in pairs])


def _toeplitz(kernel: Floats) -> Floats:
    steps = np.arange(STEPS + 1)
    lag = steps[:, None] - steps[None, :]
    return np.where(lag >= 0, kernel[np.maximum(lag, 0)], 0.0)


def _summed(rows: Floats, step_s: float) -> Floats:
    """The integral over time from 0 to each step, by the trapezoidal rule."""
    inner = 0.5 * (rows[:, 1:] + rows[:, :-1]) * step_s
    return np.concatenate([np.zeros((len(rows), 1)), np.cumsum(inner, axis=1)], axis=1)

"""What a call of a workflow leads to, in tokens, over the next seconds and minutes.

A run is taken as a semi-Markov process: a call of an agent runs for a while, is idle for a
while (tools), and sets off calls of other agents. The expected demand from each state is the
solution of a Markov renewal equation (Cinlar, *Introduction to Stochastic Processes*, ch. 10),
solved step by step on two grids of time, a fine one for the next seconds and a coarse one.

How long a state has lasted matters: what has been idle for a minute will not go on within the
second in which most do, and may never. So there is a row for each age, from the part of the
distributions that lies beyond it. How many calls its run has made matters, too: workflows of few
agents are solved for several ``stages``. The last one is of runs that have said that they end.

Costs milliseconds, is done now and then for each workflow, and makes a forecast a product of
counts with a table.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from coordinator.workflow.chain import (
    AGENTS_MOST,
    AGES,
    STEPS,
    Chain,
    Floats,
    ages_s,
    projected,
)
from coordinator.workflow.profile import OTHER, Profile
from coordinator.workflow.stages import STAGES_MOST, stages_of
from coordinator.workflow.units import IDLE, LAST, RUNNING

HORIZONS_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 180.0, 300.0)
GRIDS_S = (30.0, 300.0)
"""How far the two grids reach, in ``STEPS`` steps each."""
AT_ONCE_MOST = 0.9
"""What a state may set off within no time at all; the rest waits for a step."""


class Projection:
    """Tables of one workflow. Columns are the projected agents, by quantity.

    ``agents``: their numbers. ``rows``: per stage, agent, phase and age; ``stage_rows`` of them in
    each, which begin at ``stage_calls`` calls of a run, in ascending order.
    ``ahead[h]``: by row, the prefill and decode tokens expected within ``HORIZONS_S[h]`` and the KV
    tokens resident then, of each agent. ``squares[h]``: by row, the same of squared prefills and
    answers, summed.
    ``held[h]``: by row, how much of the row's own context is resident then. ``speed``: by row,
    the output tokens per second of a running call, ``longest`` the most it answers.
    ``arriving``, ``arriving_squares``: by horizon, what one new run a second adds.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.events = profile.events
        self.agents = projected(profile)
        stages = stages_of(profile.run_calls, min(STAGES_MOST, AGENTS_MOST // len(self.agents)))
        self.stage_calls = [*(stage.calls for stage in stages[1:]), LAST]
        self.stage_rows = len(self.agents) * 2 * AGES
        self.rows = self.stage_rows * (len(stages) + 1)
        size, horizons = len(self.agents), len(HORIZONS_S)
        self.columns = 3 * size
        self.ahead = np.zeros((horizons, self.rows, self.columns))
        self.squares = np.zeros((horizons, self.rows, 2))
        self.held = np.zeros((horizons, self.rows))
        self.speed = np.zeros(self.rows)
        self.longest = np.zeros(self.rows)
        self.arriving = np.zeros((horizons, self.columns))
        self.arriving_squares = np.zeros((horizons, 2))
        one_stage = Chain(profile, self.agents)
        chain = one_stage.in_stages(stages)
        for number, reach_s in enumerate(GRIDS_S):
            least_s = GRIDS_S[number - 1] if number else 0.0
            wanted = [at for at, h_s in enumerate(HORIZONS_S) if least_s < h_s <= reach_s]
            grid = _Grid(chain, reach_s / STEPS, [HORIZONS_S[at] for at in wanted])
            self._fill(grid, wanted)
        speed = one_stage.output_tokens / one_stage.duration_s
        longest = np.maximum(one_stage.longest, one_stage.output_tokens)
        places: NDArray[np.int64] = np.arange(self.rows) % self.stage_rows // AGES
        running = places % 2 == RUNNING
        self.speed[running] = speed[places[running] // 2]
        self.longest[running] = longest[places[running] // 2]

    def row(self, agent: int, phase: int) -> int:
        """The first row, of the youngest, of an agent in a phase at the first stage."""
        place = self.agents.index(agent) if agent in self.agents else self.agents.index(OTHER)
        return (2 * place + phase) * AGES

    def _fill(self, grid: _Grid, wanted: list[int]) -> None:
        size, all_places = len(self.agents), grid.chain.size
        start = grid.arriving()
        self.arriving[wanted] = _by_agent(start[:, :-2], size)
        self.arriving_squares[wanted] = start[:, -2:]
        for place in range(all_places + size):
            # Those beyond all places are of runs that end: there only the call itself counts.
            ends = place >= all_places
            of = place - size if ends else place
            for phase in (RUNNING, IDLE):
                found, held = grid.running(of, ends) if phase == RUNNING else grid.idle(of, ends)
                first = (2 * place + phase) * AGES
                # An agent's own context is better known than the mean one: see ``held``.
                resident = 2 * all_places + of
                own = found[:, :, resident] / max(1.0, grid.chain.prompt_tokens[of])
                found[:, :, resident] = 0.0
                for at, horizon in enumerate(wanted):
                    rows = slice(first, first + AGES)
                    self.ahead[horizon, rows] = _by_agent(found[:, at, :-2], size)
                    self.squares[horizon, rows] = found[:, at, -2:]
                    self.held[horizon, rows] = held[:, at] + own[:, at]


def _by_agent(table: Floats, size: int) -> Floats:
    """Columns of all places summed over stages: by quantity and agent."""
    return table.reshape(len(table), 3, -1, size).sum(axis=2).reshape(len(table), -1)


class _Grid:
    """The renewal equation on one grid of time.

    ``after[j]``: by agent, what is expected by step j once one of its calls has ended;
    ``during[j]``: once one has started. Columns are those of ``Projection`` and two of squares.
    """

    def __init__(self, chain: Chain, step_s: float, horizons_s: list[float]) -> None:
        self.chain = chain
        self.step_s = step_s
        places = np.array(horizons_s) / step_s
        self._lower = np.minimum(places.astype(np.int64), STEPS - 1)
        self._part = places - self._lower
        self._columns = 3 * chain.size + 2
        # The first row is of what has just begun, the others are of the ages.
        ages = np.concatenate([[0.0], ages_s()])
        self._calls = [one.on_grid(ages, step_s) for one in chain.durations]
        self._gaps = [edge.gap.on_grid(ages, step_s) for edge in chain.edges]
        self._alone = [self._own_demand(place) for place in range(chain.size)]
        self.after = self._solved()
        self.during = np.stack(
            [
                self._alone[place]
                + (1 - chain.final[place]) * (_toeplitz(one.kernel[0]) @ self.after[:, place])
                for place, one in enumerate(self._calls)
            ],
            axis=1,
        )

    def running(self, place: int, ends: bool) -> tuple[Floats, Floats]:
        """By age and horizon, what an agent's running call leads to, and whether it still runs.

        ``ends``: its run ends with it.
        """
        chain, calls = self.chain, self._calls[place]
        goes_on = 0.0 if ends else 1.0 - chain.final[place]
        table = goes_on * self._folded(calls.kernel[1:], self.after[:, place])
        answered = self._at(calls.lasted_s[1:]) / chain.duration_s[place]
        table[:, :, chain.size + place] += answered * chain.output_tokens[place]
        table[:, :, 3 * chain.size + 1] += answered * chain.output_squares[place]
        return table, self._at(calls.still[1:])

    def idle(self, place: int, ends: bool) -> tuple[Floats, Floats]:
        """By age and horizon, what an agent's ended call leads to. It holds no memory itself."""
        chain = self.chain
        table = np.zeros((AGES, len(self._lower), self._columns))
        if ends:
            return table, np.zeros((AGES, len(self._lower)))
        out = [at for at, edge in enumerate(chain.edges) if edge.source == place]
        ended = chain.ended[place]
        shares = sum(chain.edges[at].share for at in out)
        alive = np.full(AGES, ended)
        for at in out:
            survive = self._gaps[at].survive[1:]
            alive = alive + (1 - ended) * chain.edges[at].share / shares * survive
        for at in out:
            edge, gaps = chain.edges[at], self._gaps[at]
            weights = (edge.calls * gaps.survive[1:] / np.maximum(alive, 1e-9))[:, None]
            table += self._folded(gaps.kernel[1:] * weights, self.during[:, edge.target])
            arrived = self._at(1.0 - gaps.still[1:]) * weights
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
        calls = self._calls[place]
        answered = calls.lasted_s[0] / chain.duration_s[place]
        table[:, chain.size + place] = answered * chain.output_tokens[place]
        table[:, 2 * chain.size + place] = calls.still[0] * chain.prompt_tokens[place]
        table[:, 3 * chain.size + 1] = answered * chain.output_squares[place]
        return table

    def _solved(self) -> Floats:
        """``after``, from what follows at each delay and what that needs."""
        chain, size = self.chain, self.chain.size
        delayed = np.zeros((STEPS + 1, size, size))
        needed = np.zeros((STEPS + 1, size, self._columns))
        for edge, gaps in zip(chain.edges, self._gaps, strict=True):
            gap = gaps.kernel[0]
            # Calls that end their run by saying so are not idle afterwards.
            calls = edge.calls
            both = np.convolve(gap, self._calls[edge.target].kernel[0])[: STEPS + 1]
            delayed[:, edge.source, edge.target] += calls * (1 - chain.final[edge.target]) * both
            needed[:, edge.source] += calls * (_toeplitz(gap) @ self._alone[edge.target])
            arrived = calls * (1.0 - gaps.still[0])
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


def _toeplitz(kernel: Floats) -> Floats:
    steps = np.arange(STEPS + 1)
    lag = steps[:, None] - steps[None, :]
    return np.where(lag >= 0, kernel[np.maximum(lag, 0)], 0.0)


def _summed(rows: Floats, step_s: float) -> Floats:
    """The integral over time from 0 to each step, by the trapezoidal rule."""
    inner = 0.5 * (rows[:, 1:] + rows[:, :-1]) * step_s
    return np.concatenate([np.zeros((len(rows), 1)), np.cumsum(inner, axis=1)], axis=1)

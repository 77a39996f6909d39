"""What all live runs are expected to ask for, by a look at the arrays of what is alive.

Counts how many units there are of each state and age, and multiplies with the tables of
``projection``. An event writes one row of the arrays; only a look costs time, and that by the
number of units in array operations, not in steps of a program.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from coordinator.workflow.chain import AGES, YOUNGEST_S, Floats
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.profile import OTHER, START, Profile
from coordinator.workflow.profiles import Profiles
from coordinator.workflow.projection import HORIZONS_S, Projection
from coordinator.workflow.stages import STAGES_MOST
from coordinator.workflow.units import IDLE, RUNNING

STALE_EVENTS = 64
"""A projection is made anew after so many events of its workflow, and when they have grown by
``STALE_SHARE``; often at first, when every event says much."""
STALE_SHARE = 0.1
PREFILL, DECODE, RESIDENT = 0, 1, 2
QUANTITIES = 3


class Look:
    """What is alive at one moment, and what that leads to at one horizon, in tokens.

    ``expected``: prefilled within the horizon, decoded within it, resident at its end.
    ``squares``: of single prefills and answers. ``parts``: by workflow's number and agent.
    """

    __slots__ = ("expected", "parts", "squares")

    def __init__(self) -> None:
        self.expected = np.zeros(QUANTITIES)
        self.squares = np.zeros(2)
        self.parts: dict[tuple[int, int], Floats] = {}


class Outlook:
    """The projections of all workflows, and how units find their rows in them."""

    def __init__(self, profiles: Profiles, limits: WorkflowLimits) -> None:
        self._profiles = profiles
        self._states = 2 * (limits.agents_per_workflow + OTHER + 1)
        self._projections: dict[int, Projection] = {}
        self._first_row: dict[int, int] = {}
        self._slot_of: NDArray[np.int32] = np.zeros(64, np.int32)
        """By workflow's number; the last one is of units that belong to none."""
        self._row_of: NDArray[np.int32] = np.zeros((1, self._states), np.int32)
        self._rows = AGES
        self._speed: Floats = np.zeros(AGES)
        self._longest: Floats = np.zeros(AGES)
        self._stage_calls: Floats = np.full((1, STAGES_MOST), np.inf)
        self._stage_rows: NDArray[np.int64] = np.zeros(1, np.int64)
        self._waiting: list[int] = []

    def refresh(self, most: int) -> int:
        """Make at most so many projections anew, each workflow in its turn; how many it were."""
        if not self._waiting:
            self._waiting = [
                number
                for number, profile in self._profiles.by_number.items()
                if self._stale(profile)
            ]
        made = 0
        while self._waiting and made < most:
            profile = self._profiles.by_number.get(self._waiting.pop())
            if profile is not None and self._stale(profile):
                self._projections[profile.number] = Projection(profile)
                made += 1
        gone = [
            number
            for number, projection in self._projections.items()
            if self._profiles.by_number.get(number) is not projection.profile
        ]
        for number in gone:
            del self._projections[number]
        if made or gone:
            self._arrange()
        return made

    def look(self, horizon_s: float, now_s: float, rates: dict[int, float]) -> Look:
        """What is expected. ``rates``: new runs per second, by workflow's number."""
        units = self._profiles.units
        rows = self._unit_rows(now_s)
        counts = np.bincount(rows, minlength=self._rows)
        held = np.bincount(rows, units.context_tokens[: units.rows], self._rows)
        upper = min(int(np.searchsorted(HORIZONS_S, horizon_s)), len(HORIZONS_S) - 1)
        lower = max(0, upper - 1)
        span_s = HORIZONS_S[upper] - HORIZONS_S[lower]
        part = (horizon_s - HORIZONS_S[lower]) / span_s if span_s else 0.0
        part = min(1.0, max(0.0, part))
        found = Look()
        for first, projection in self._placed():
            number = projection.profile.number
            own = slice(first, first + projection.rows)
            rate = rates.get(number, 0.0)
            if counts[own].any() or rate:
                weights = ((lower, 1 - part), (upper, part))
                for at, weight in weights:
                    if weight:
                        _add(found, projection, counts[own], held[own], rate, at, weight)
        if horizon_s < HORIZONS_S[0]:
            share = horizon_s / HORIZONS_S[0]
            found.expected[:RESIDENT] *= share
            found.squares *= share
            for tokens in found.parts.values():
                tokens[:RESIDENT] *= share
        return found

    def answering(self, now_s: float) -> tuple[float, float]:
        """Tokens that running calls are thought to have answered, and that they hold with them."""
        units = self._profiles.units
        rows = self._unit_rows(now_s)
        ages_s = np.maximum(0.0, now_s - units.since_s[: units.rows])
        # By its own time: an answer much longer than most would seem to stop, and to jump.
        answered = float(np.minimum(ages_s * self._speed[rows], self._longest[rows]).sum())
        state, of = units.state[: units.rows], units.workflow[: units.rows]
        running = (of >= 0) & (state & 1 == RUNNING)
        return answered, answered + float(units.context_tokens[: units.rows][running].sum())

    def _placed(self) -> list[tuple[int, Projection]]:
        """Projections with their first rows, less those whose number is another workflow's by
        now: of that nothing is projected yet."""
        known = self._profiles.by_number
        return [
            (self._first_row[number], one)
            for number, one in self._projections.items()
            if known.get(number) is one.profile
        ]

    def _stale(self, profile: Profile) -> bool:
        projection = self._projections.get(profile.number)
        if projection is None or projection.profile is not profile:
            return profile.agents[START].resolved > 0
        new = profile.events - projection.events
        return new >= STALE_EVENTS or new > STALE_SHARE * profile.events

    def _arrange(self) -> None:
        """Give every projection its rows. The first rows are of what is not projected."""
        most = max(self._projections, default=0)
        if most + 2 > len(self._slot_of):
            self._slot_of = np.zeros(2 * (most + 2), np.int32)
        self._slot_of[:] = 0
        self._row_of = np.zeros((1 + len(self._projections), self._states), np.int32)
        self._stage_calls = np.full((len(self._row_of), STAGES_MOST), np.inf)
        self._stage_rows = np.zeros(len(self._row_of), np.int64)
        self._first_row = {}
        first = AGES
        for slot, (number, projection) in enumerate(self._projections.items(), start=1):
            self._slot_of[number] = slot
            self._first_row[number] = first
            self._stage_calls[slot, : len(projection.stage_calls)] = projection.stage_calls
            self._stage_rows[slot] = projection.stage_rows
            for phase in (RUNNING, IDLE):
                self._row_of[slot, phase::2] = first + projection.row(OTHER, phase)
                for agent in projection.agents:
                    self._row_of[slot, 2 * agent + phase] = first + projection.row(agent, phase)
            first += projection.rows
        self._rows = first
        known = self._projections.values()
        self._speed = np.concatenate([np.zeros(AGES), *(one.speed for one in known)])
        self._longest = np.concatenate([np.zeros(AGES), *(one.longest for one in known)])

    def _unit_rows(self, now_s: float) -> NDArray[np.int64]:
        """By unit, the row of its stage, state and age. Free units have that of nothing."""
        units = self._profiles.units
        live = units.rows
        ages = (now_s - units.since_s[:live]) * (1.0 / YOUNGEST_S)
        _, doublings = np.frexp(ages)
        np.clip(doublings, 0, AGES - 1, out=doublings)
        of = units.workflow[:live]
        slots = self._slot_of[np.where(of < len(self._slot_of) - 1, of, -1)]
        found: NDArray[np.int64] = self._row_of[slots, units.state[:live]] + doublings
        calls = units.calls[:live]
        stage: NDArray[np.int64] = np.zeros(live, np.int64)
        for limits in self._stage_calls.T:
            stage += calls >= limits[slots]
        return found + stage * self._stage_rows[slots]


def _add(
    found: Look, projection: Projection, counts: NDArray[np.int64], held: Floats, rate: float,
    at: int, weight: float,
) -> None:  # fmt: skip
    """Add what one workflow leads to at one of the horizons, in part."""
    size = len(projection.agents)
    tokens = (counts @ projection.ahead[at] + rate * projection.arriving[at]).reshape(3, size)
    stages = projection.rows // projection.stage_rows
    tokens[RESIDENT] += (held * projection.held[at]).reshape(stages, size, -1).sum(axis=(0, 2))
    tokens *= weight
    found.expected += tokens.sum(axis=1)
    squares = counts @ projection.squares[at] + rate * projection.arriving_squares[at]
    found.squares += weight * squares
    number = projection.profile.number
    for place, agent in enumerate(projection.agents):
        key = (number, agent)
        if key in found.parts:
            found.parts[key] += tokens[:, place]
        else:
            found.parts[key] = tokens[:, place].copy()

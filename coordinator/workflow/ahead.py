"""What is still to come of a run after a call: tokens to compute and to generate until its end.

A run is taken as a Markov chain over its workflow's agents in stages (``stages``): how much
follows a call of an agent is the sum over the expected visits of an absorbing chain (Kemeny and
Snell, *Finite Markov Chains*, ch. 3). Runs of most workflows go on for longer the longer they
have; the stage says how far one is.

Made anew now and then for each workflow, some milliseconds at a time; asked it is a look-up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from coordinator.workflow.chain import AGENTS_MOST, Chain, projected
from coordinator.workflow.profile import OTHER, Profile
from coordinator.workflow.profiles import Profiles
from coordinator.workflow.stages import STAGES_MOST, stages_of

STALE_EVENTS = 64
STALE_SHARE = 0.25
"""A table is made anew after so many ends of calls of its workflow, or when they have grown by
this share if that is less."""
EVENTS_LEAST = 8
"""Ends of calls from which on there is a table."""
GOES_ON = 1.0 - 1e-4
"""A little of everything ends, so that what was never seen to end has an expectation."""
COLUMNS = 4


class Ahead(NamedTuple):
    """What is expected to come, in sums over calls. ``contexts``: of generated tokens times the
    prompt before them; ``pairs``: of new prompt tokens times the prompt."""

    prefill_tokens: float
    output_tokens: float
    contexts: float
    pairs: float


NOTHING = Ahead(0.0, 0.0, 0.0, 0.0)


class Table:
    """Of one workflow."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.events = profile.events
        agents = projected(profile)
        stages = stages_of(profile.run_calls, min(STAGES_MOST, AGENTS_MOST // len(agents)))
        self._begins = [stage.calls for stage in stages]
        self._place = {symbol: at for at, symbol in enumerate(agents)}
        self._size = len(agents)
        self._rows = _solved(Chain(profile, agents).in_stages(stages))

    def after(self, symbol: int, calls: int) -> Ahead | None:
        """What follows a call of an agent in a run that has made so many; None if what follows
        grows without an end."""
        stage = sum(1 for begin in self._begins[1:] if calls >= begin)
        place = self._place.get(symbol, self._place[OTHER])
        return self._rows[stage * self._size + place]


class Remaining:
    """The tables of all workflows of a ``Profiles``."""

    def __init__(self, profiles: Profiles) -> None:
        self._profiles = profiles
        self._tables: dict[int, Table] = {}
        self._waiting: list[int] = []

    def refresh(self) -> bool:
        """Make at most one table anew, each workflow in its turn. Whether one was."""
        known = self._profiles.by_number
        if not self._waiting:
            self._waiting = [number for number, one in known.items() if self._stale(one)]
            gone = [at for at, one in self._tables.items() if known.get(at) is not one.profile]
            for number in gone:
                del self._tables[number]
        while self._waiting:
            profile = known.get(self._waiting.pop())
            if profile is not None and self._stale(profile):
                self._tables[profile.number] = Table(profile)
                return True
        return False

    def after(self, tenant: str, workflow: str, agent: str, calls: int) -> Ahead | None:
        """What follows a call of an agent in a run that has made so many calls, this one
        included. None if that is not known."""
        profile = self._profiles.known(tenant, workflow)
        table = self._tables.get(profile.number) if profile is not None else None
        if profile is None or table is None or table.profile is not profile:
            return None
        return table.after(profile.known_symbol(agent), calls)

    def _stale(self, profile: Profile) -> bool:
        if profile.events < EVENTS_LEAST:
            return False
        table = self._tables.get(profile.number)
        if table is None or table.profile is not profile:
            return True
        grown = profile.events - table.events
        return grown >= STALE_EVENTS or grown >= STALE_SHARE * table.events


def _solved(chain: Chain) -> list[Ahead | None]:
    size = chain.size
    calls, own = np.zeros((size, size)), np.zeros((size, COLUMNS))
    for edge in chain.edges:
        each = edge.calls * (1.0 - chain.final[edge.source])
        calls[edge.source, edge.target] += each
        prompt, output = chain.prompt_tokens[edge.target], chain.output_tokens[edge.target]
        needs = (edge.new_tokens, output, output * prompt, edge.new_tokens * prompt)
        own[edge.source] += each * np.array(needs)
    try:
        found = np.linalg.solve(np.eye(size) - GOES_ON * calls, own)
    except np.linalg.LinAlgError:
        return [None] * size
    # It branches faster than it ends where sums are negative: there is no expectation.
    return [
        Ahead(*row) if np.isfinite(row).all() and min(row) >= 0.0 else None
        for row in found.tolist()
    ]

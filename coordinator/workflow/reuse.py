"""How soon, and how often, what calls leave behind in caches is used again, learned per agent.

A call's prompt and answer are used again when a later prompt of its run begins with all of its
prompt. That is seen from block hashes, whatever agent the later call is of and whatever came
between, and counted by how often it had happened to the same call before: a planner's prompt
that three explorers have begun with is likely to be wanted by the planner once more.

What is asked is conditional: given that so many seconds have passed since the last use, how
probable is another one, and when? Times are counted in classes that double, and old counts fade.
"""

from __future__ import annotations

from collections import OrderedDict
from math import exp2, frexp
from typing import NamedTuple

USES_MOST = 3
"""Uses that are told apart: none, one, two, more."""
CLASSES = 24
LEAST_S = 0.05
"""The first class ends there, the next at twice that, and so on."""
FADING = 0.98
"""What is left of a count's weight at the next one."""
LATE_SHARE = 0.9
PRIOR_WANTED, PRIOR_IDLE = 0.5, 0.5
"""What every agent begins with, so that nothing is certain."""


class Reuse(NamedTuple):
    """``probability`` of another use; ``expected_s`` until then, if it comes; ``late_s``: what
    nine in ten take at most, from now on."""

    probability: float
    expected_s: float
    late_s: float


NEVER = Reuse(0.0, 0.0, 0.0)


class Delays:
    """Of calls that were used so often: how many were again, after how long; how many not."""

    __slots__ = ("_known", "idle", "wanted")

    def __init__(self) -> None:
        self.wanted = [0.0] * CLASSES
        self.idle = PRIOR_IDLE
        self._known: dict[int, Reuse] = {}
        """What was answered since the last count, by class."""

    @property
    def samples(self) -> float:
        """How many calls it rests on, faded."""
        return sum(self.wanted) + self.idle - PRIOR_IDLE

    def used(self, delay_s: float) -> None:
        """Another use came so long after the last."""
        self._fade()
        self.wanted[_class_of(delay_s)] += 1.0

    def unused(self) -> None:
        """None came any more."""
        self._fade()
        self.idle += 1.0

    def _fade(self) -> None:
        self._known.clear()
        self.wanted = [count * FADING for count in self.wanted]
        self.idle = PRIOR_IDLE + (self.idle - PRIOR_IDLE) * FADING

    def after(self, elapsed_s: float) -> Reuse:
        """What is to be expected when ``elapsed_s`` have passed without a use.

        Time counts as passed up to the beginning of its class.
        """
        first = _class_of(elapsed_s)
        known = self._known.get(first)
        if known is None:
            known = self._known[first] = self._after(first)
        return known

    def _after(self, first: int) -> Reuse:
        total = sum(self.wanted[first:])
        if total <= 0.0:
            return NEVER
        begin_s, _ = _bounds(first)
        expected_s = late_s = passed = 0.0
        for at in range(first, CLASSES):
            count = self.wanted[at]
            low_s, high_s = _bounds(at)
            expected_s += count * (0.5 * (low_s + high_s) - begin_s)
            if passed < LATE_SHARE * total:
                late_s = high_s - begin_s
            passed += count
        probability = total / (total + self.idle + PRIOR_WANTED)
        return Reuse(probability, expected_s / total, late_s)


Agent = tuple[str, str, str]
"""Tenant, workflow and agent."""


class ReuseBook:
    """What is known of agents; beyond so many the one not heard of for longest is forgotten."""

    def __init__(self, agents: int = 4096) -> None:
        self._agents_max = agents
        self._delays: OrderedDict[Agent, list[Delays]] = OrderedDict()

    def of(self, agent: Agent, uses: int) -> Delays:
        """Of calls of an agent that were used ``uses`` times."""
        found = self._delays.get(agent)
        if found is None:
            found = self._delays[agent] = [Delays() for _ in range(USES_MOST + 1)]
            if len(self._delays) > self._agents_max:
                self._delays.popitem(last=False)
        else:
            self._delays.move_to_end(agent)
        return found[min(uses, USES_MOST)]

    def __len__(self) -> int:
        return len(self._delays)


def _class_of(seconds: float) -> int:
    if seconds < LEAST_S:
        return 0
    return min(CLASSES - 1, frexp(seconds / LEAST_S)[1])


def _bounds(at: int) -> tuple[float, float]:
    low_s = 0.0 if at == 0 else LEAST_S * exp2(at - 1)
    return low_s, LEAST_S * exp2(at)

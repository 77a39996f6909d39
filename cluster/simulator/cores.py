"""Engines that share what they compute on, as those on the CPU of one machine do.

An engine alone takes its own step times. While several of a node are in a step, each is slower
by a factor that depends on how many they are (``ClusterSetup.contention``): they share cores,
with the processes around them, and memory bandwidth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Sharer(Protocol):
    """Who has one of a node's engines."""

    @property
    def stepping(self) -> bool:
        """Whether the engine is in a step."""
        ...

    def share(self, factor: float) -> None:
        """Its steps take ``factor`` times as long from now on."""
        ...


class Cores:
    """What the engines of one node share. ``factors``: by how many of them are in a step, the
    last for more."""

    def __init__(self, factors: Sequence[float]) -> None:
        assert factors
        self._factors = factors
        self._busy: dict[Sharer, None] = {}

    def looked_at(self, sharer: Sharer, alive: bool) -> None:
        """Something has happened to an engine: if it has begun to step or stopped, the others
        are told."""
        busy = alive and sharer.stepping
        if busy == (sharer in self._busy):
            return
        if busy:
            self._busy[sharer] = None
        else:
            del self._busy[sharer]
        if self._busy:
            factor = self._factors[min(len(self._busy), len(self._factors)) - 1]
            for each in list(self._busy):
                each.share(factor)

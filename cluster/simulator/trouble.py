"""Makes happen in a simulated cluster what ``Faults`` says goes wrong with its processes.

(What goes wrong with messages is the network's.) Events of each kind come at random, on
average so many seconds apart, to a process chosen at random.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from cluster.simulator.host import Host
from cluster.simulator.network import CORE, process_at
from cluster.simulator.world import World
from coordinator.protocol import MoveCalls

CORE_AWAY_S_MAX = 2.0
"""Longest time from a core's end to the next one's start."""
API_AWAY_S_MAX = 4.0
"""Longest time from an API process's end to the next one's start."""


class Trouble:
    """Trouble for ``world``, until ``Faults.until_s``. ``happened``: how much by kind."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.happened: Counter[str] = Counter()
        self._world = world
        self._rng = rng
        self._faults = world.faults
        self._events = world.events
        self._partitioned = False

    def start(self) -> None:
        """From now on."""
        faults = self._faults
        for every_s, happen in (
            (faults.crash_every_s, self._crash),
            (faults.hang_every_s, self._hang),
            (faults.slow_every_s, self._slow),
            (faults.core_restart_every_s, self._restart_core),
            (faults.partition_every_s, self._partition),
            (faults.api_crash_every_s, self._crash_api),
            (faults.move_every_s, self._move),
        ):
            if every_s:
                self._again(every_s, happen)

    def _again(self, every_s: float, happen: Callable[[], None]) -> None:
        at_s = self._events.now_s + self._rng.expovariate(1.0 / every_s)
        if at_s < self._faults.until_s:
            self._events.at(at_s, self._happens, every_s, happen)

    def _happens(self, every_s: float, happen: Callable[[], None]) -> None:
        happen()
        self._again(every_s, happen)

    def _victim(self) -> Host | None:
        """A worker that is up and does not hang."""
        hosts = [
            host
            for host in self._world.hosts.values()
            if host.current is not None and not host.current.hung
        ]
        return self._rng.choice(hosts) if hosts else None

    def _crash(self) -> None:
        host = self._victim()
        if host is not None:
            self.happened["crash"] += 1
            self._world.crash(host, machine=self._rng.random() < 0.5)

    def _hang(self) -> None:
        host = self._victim()
        if host is not None:
            self.happened["hang"] += 1
            host.hang(self._rng.uniform(0.1, 2.0) * self._faults.hang_s)

    def _slow(self) -> None:
        host = self._victim()
        if host is not None:
            self.happened["slow"] += 1
            host.slow(self._faults.slow_factor, self._faults.slow_s)

    def _restart_core(self) -> None:
        self.happened["core restart"] += 1
        brain = self._world.brain
        if brain.running:
            brain.crash()
            self._events.after(self._rng.random() * CORE_AWAY_S_MAX, brain.start)

    def _crash_api(self) -> None:
        apis = self._world.apis
        if apis:
            self.happened["API crash"] += 1
            away_s = self._rng.random() * API_AWAY_S_MAX
            self._world.crash_api(self._rng.choice(apis), away_s)

    def _move(self) -> None:
        """Running calls of a worker are to go on elsewhere."""
        host = self._victim()
        if host is not None:
            self.happened["move"] += 1
            self._world.brain.hear("operator", MoveCalls(1, host.name))

    def _partition(self) -> None:
        if self._partitioned:
            return
        self.happened["partition"] += 1
        self._partitioned = True
        processes = [CORE, *(process_at(api.name) for api in self._world.apis), *self._world.hosts]
        cut = self._rng.sample(processes, self._rng.randrange(1, len(processes)))
        for_s = self._rng.uniform(0.1, 2.0) * self._faults.partition_s
        self._world.partition(frozenset(cut), for_s)
        self._events.after(for_s, self._healed)

    def _healed(self) -> None:
        self._partitioned = False

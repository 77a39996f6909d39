"""Where workers live: a host starts one, may lose it, and starts the next incarnation."""

from __future__ import annotations

from collections.abc import Callable

from cluster.simulator.events import Events
from cluster.simulator.setup import WorkerSetup
from cluster.simulator.worker import Worker

MakeWorker = Callable[[WorkerSetup, str], Worker]
"""Makes an incarnation of a worker, whose engine is empty."""


class Host:
    """One worker through all its incarnations."""

    def __init__(
        self, setup: WorkerSetup, events: Events, make: MakeWorker, startup_s: float
    ) -> None:
        self.setup = setup
        self.current: Worker | None = None
        self.preemptions = 0
        """Of engines that are gone."""
        self._events = events
        self._make = make
        self._startup_s = startup_s
        self._starts = 0

    @property
    def name(self) -> str:
        """The worker's name."""
        return self.setup.name

    def start(self) -> None:
        """Another incarnation is up."""
        self._starts += 1
        self.current = self._make(self.setup, f"{self.name}.{self._starts}")

    def crash(self, machine: bool) -> None:
        """The worker is gone, and comes back when its engine has started again."""
        worker = self.current
        assert worker is not None
        self.current = None
        self.preemptions += worker.engine.preemptions
        worker.crash(machine)
        worker.reader.stop()
        self._events.after(self._startup_s, self.start)

    def hang(self, for_s: float) -> None:
        """The worker hangs for a while."""
        assert self.current is not None
        self.current.hang()
        self._events.after(for_s, self._recover, self.current)

    def slow(self, factor: float, for_s: float) -> None:
        """Its engine is slower for a while."""
        assert self.current is not None
        self.current.engine.slow = factor
        self._events.after(for_s, self._as_before, self.current)

    def _recover(self, worker: Worker) -> None:
        if worker.alive:
            worker.recover()

    def _as_before(self, worker: Worker) -> None:
        worker.engine.slow = 1.0

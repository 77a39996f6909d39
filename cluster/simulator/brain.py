"""The process around the live core: gives it what arrives and what time it is."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from cluster.simulator.events import Event, Events
from cluster.simulator.network import CORE, Network
from coordinator.core import Core, Send
from coordinator.limits import Limits, Placement
from coordinator.protocol import ToCore

CoreFactory = Callable[[Limits, Placement, str], Core]
"""Makes a core from limits, placement and its id. It may know the workload, and what is still
to come: a call's request id is ``run.call.retry`` (``call.request_id``)."""


class Brain:
    """``measured``: note what real time the core takes; nothing else depends on that."""

    def __init__(
        self,
        events: Events,
        network: Network,
        make: Callable[[str], Core],
        measured: bool = False,
    ) -> None:
        self.cores = 0
        self.core_s = 0.0
        self.core_messages = 0
        """Deadlines that came are counted too."""
        self._counters: dict[str, int] = {}
        """Of cores that are gone."""
        self._events = events
        self._network = network
        self._make = make
        self._measured = measured
        self._wake: Event | None = None
        self._wake_s = float("inf")
        self._addresses: dict[bytes, str] = {}
        self._peers: dict[str, bytes] = {}
        self.running = False
        self.core: Core
        self.start()

    def start(self) -> None:
        """A core that knows nothing yet."""
        self.running = True
        self.cores += 1
        self.core = self._make(f"core-{self.cores}")
        self._network.attach(CORE, self._receive)
        self._plan_tick()

    def crash(self) -> None:
        """The core is gone with all that it knew; ``start`` makes another."""
        self._counters = self.totals()
        self.running = False
        self._network.detach(CORE)
        self._events.cancel(self._wake)
        self._wake, self._wake_s = None, float("inf")

    def hear(self, source: str, message: ToCore) -> None:
        """Somebody who is not simulated says something; nobody gets the answer."""
        if self.running:
            sends = self.core.handle(source.encode(), message, self._events.now_s)
            self._send([send for send in sends if send.peer in self._addresses])

    def totals(self) -> dict[str, int]:
        """The counters of all cores together."""
        totals = dict(self._counters)
        if self.running:
            for name, count in self.core.counters.items():
                totals[name] = totals.get(name, 0) + count
        return totals

    def _receive(self, source: str, message: ToCore) -> None:
        peer = self._peers.get(source)
        if peer is None:
            peer = self._peers[source] = source.encode()
            self._addresses[peer] = source
        began_s = perf_counter() if self._measured else 0.0
        sends = self.core.handle(peer, message, self._events.now_s)
        if self._measured:
            self.core_s += perf_counter() - began_s
            self.core_messages += 1
        self._send(sends)

    def _tick(self) -> None:
        self._wake, self._wake_s = None, float("inf")
        now_s = self._events.now_s
        due_s = self.core.next_deadline_s()
        if due_s is not None and due_s <= now_s:
            began_s = perf_counter() if self._measured else 0.0
            sends = self.core.tick(now_s)
            if self._measured:
                self.core_s += perf_counter() - began_s
                self.core_messages += 1
            self._send(sends)
        else:
            self._plan_tick()

    def _send(self, sends: list[Send]) -> None:
        for send in sends:
            self._network.send(CORE, self._addresses[send.peer], send.message)
        self._plan_tick()

    def _plan_tick(self) -> None:
        """Be woken for the next deadline, or earlier: most deadlines move before they come."""
        due_s = self.core.next_deadline_s()
        if due_s is not None and due_s < self._wake_s:
            self._events.cancel(self._wake)
            self._wake_s = due_s
            self._wake = self._events.at(due_s, self._tick)

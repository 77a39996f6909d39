"""Messages between processes, and what becomes of them on the way.

Two kinds, as in a live cluster. Control, between the core and all others, is addressed to
peers: API processes by name, workers by name and incarnation. Data, between an API process and
a worker, goes over a connection, in order; one that breaks takes with it all that is under
way on it, and both ends learn of that. Whoever is not there gets nothing.

Without faults everything arrives in the order in which it was sent between the same two. With
faults control messages are lost, doubled and delayed, data is delayed with all that follows
on its connection, connections break, and partitions cut processes off: control messages are
lost then, and data waits until the partition is over.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from cluster.simulator.events import Events
from cluster.simulator.setup import Faults, NetworkSetup
from coordinator.protocol import Placed

CORE = "core"
LETTERS_KEPT = 512

Receive = Callable[[str, Any], None]
"""Gets the sender's address and a message."""
ReceiveData = Callable[["Connection", Any], None]


class Letter(NamedTuple):
    """A message that was sent, for error messages."""

    at_s: float
    source: str
    target: str
    message: Any


class Connection:
    """From an API process to a worker, of whatever incarnation: its address is the worker's.

    ``placed``: whom the API process wanted when it connected.
    """

    __slots__ = ("api", "broken", "placed", "to_api_s", "to_worker_s")

    def __init__(self, api: str, placed: Placed) -> None:
        self.api = api
        self.placed = placed
        self.broken = False
        self.to_api_s = 0.0
        self.to_worker_s = 0.0


class Network:
    """Everything that is under way. ``rng``: all the chance there is."""

    def __init__(
        self,
        events: Events,
        setup: NetworkSetup,
        faults: Faults,
        rng: random.Random,
        letters: int = LETTERS_KEPT,
    ) -> None:
        self._events = events
        self._message_s = setup.message_s
        self._jitter_s = setup.message_jitter_s
        self._faults = faults
        self._rng = rng
        self._peers: dict[str, Receive] = {}
        self._data: dict[str, ReceiveData] = {}
        self._connections: list[Connection] = []
        self._on_broken: dict[str, Callable[[Connection], None]] = {}
        self._arrived_s: dict[tuple[str, str], float] = {}
        self._cut: frozenset[str] = frozenset()
        self._heals_s = 0.0
        self._control_faults = bool(faults.loss or faults.duplication or faults.delay)
        self.letters: deque[Letter] = deque(maxlen=letters)
        self.arrived: Callable[[str, Any], None] = lambda _target, _message: None
        """Is told what an address has just got."""

    @property
    def now_s(self) -> float:
        """What time it is."""
        return self._events.now_s

    def attach(self, address: str, receive: Receive) -> None:
        """Control messages for ``address`` are given to ``receive`` from now on."""
        self._peers[address] = receive

    def detach(self, address: str) -> None:
        """Nobody is at ``address`` any more."""
        self._peers.pop(address, None)

    # --- control -----------------------------------------------------------------------

    def send(self, source: str, target: str, message: object) -> None:
        """A control message."""
        now_s = self._events.now_s
        self.letters.append(Letter(now_s, source, target, message))
        if self._faulty(now_s):
            self._send_badly(source, target, message)
            return
        at_s = now_s + self._message_s
        if self._jitter_s:
            at_s = self._in_order(source, target, at_s + self._rng.random() * self._jitter_s)
        self._events.at(at_s, self._deliver, source, target, message)

    def _faulty(self, now_s: float) -> bool:
        if self._cut:
            return True
        return self._control_faults and now_s < self._faults.until_s

    def _send_badly(self, source: str, target: str, message: object) -> None:
        rng, faults, now_s = self._rng, self._faults, self._events.now_s
        if self.is_cut(source, target):
            return
        if now_s >= faults.until_s:
            self._events.after(self._message_s, self._deliver, source, target, message)
            return
        if rng.random() < faults.loss:
            return
        for _ in range(2 if rng.random() < faults.duplication else 1):
            at_s = now_s + self._message_s + rng.random() * self._jitter_s
            if rng.random() < faults.delay:
                at_s += rng.random() * faults.delay_s
            self._events.at(at_s, self._deliver, source, target, message)

    def _in_order(self, source: str, target: str, at_s: float) -> float:
        at_s = max(at_s, self._arrived_s.get((source, target), 0.0))
        self._arrived_s[source, target] = at_s
        return at_s

    def _deliver(self, source: str, target: str, message: object) -> None:
        receive = self._peers.get(target)
        if receive is not None:
            receive(source, message)
            self.arrived(target, message)

    # --- data --------------------------------------------------------------------------

    def listen(
        self, worker: str, receive: ReceiveData, broken: Callable[[Connection], None]
    ) -> None:
        """A worker's data address is open, or its API process's end of all connections."""
        self._data[worker] = receive
        self._on_broken[worker] = broken

    def deafen(self, worker: str) -> None:
        """Nobody listens there any more; what is connected does not learn of it."""
        self._data.pop(worker, None)
        self._on_broken.pop(worker, None)

    def connect(self, api: str, placed: Placed) -> Connection:
        """A connection from an API process to a worker."""
        connection = Connection(api, placed)
        self._connections.append(connection)
        return connection

    def disconnect(self, connection: Connection) -> None:
        """Close a connection: the worker learns of it, who closes it knows."""
        if connection in self._connections:
            self._connections.remove(connection)
        if not connection.broken:
            connection.broken = True
            self._tell_broken(connection.placed.worker, connection)

    def to_worker(self, connection: Connection, message: object) -> None:
        """Over a connection; lost without a word if it is broken or nobody is there."""
        self._send_data(connection, connection.api, connection.placed.worker, message)

    def to_api(self, connection: Connection, message: object) -> bool:
        """Over a connection; False if it is broken."""
        if connection.broken:
            return False
        self._send_data(connection, connection.placed.worker, connection.api, message)
        return not connection.broken

    def _send_data(self, connection: Connection, source: str, target: str, message: object) -> None:
        now_s, faults = self._events.now_s, self._faults
        self.letters.append(Letter(now_s, source, target, message))
        if connection.broken:
            return
        if faults.loss and now_s < faults.until_s and self._rng.random() < faults.loss:
            self.break_off(connection)
            return
        at_s = now_s + self._message_s
        if self._cut and self.is_cut(source, target):
            at_s = self._heals_s + self._message_s
        if self._jitter_s:
            at_s += self._rng.random() * self._jitter_s
        if faults.delay and now_s < faults.until_s and self._rng.random() < faults.delay:
            at_s += self._rng.random() * faults.delay_s
        if target == connection.api:
            connection.to_api_s = at_s = max(at_s, connection.to_api_s)
        else:
            connection.to_worker_s = at_s = max(at_s, connection.to_worker_s)
        self._events.at(at_s, self._deliver_data, connection, target, message)

    def _deliver_data(self, connection: Connection, target: str, message: object) -> None:
        receive = self._data.get(target)
        if receive is not None and not connection.broken:
            receive(connection, message)

    def break_off(self, connection: Connection) -> None:
        """A connection breaks: what is on it is lost, both ends learn of it."""
        connection.broken = True
        if connection in self._connections:
            self._connections.remove(connection)
        self._tell_broken(connection.placed.worker, connection)
        self._events.after(self._message_s, self._tell_broken, connection.api, connection)

    def break_all(self, worker: str) -> None:
        """All connections to a worker break: its process is gone, its machine is not."""
        for connection in [each for each in self._connections if each.placed.worker == worker]:
            self.break_off(connection)

    def close_all(self, api: str) -> None:
        """An API process is gone, and its ends of all connections with it."""
        for connection in [each for each in self._connections if each.api == api]:
            self.disconnect(connection)

    def _tell_broken(self, process: str, connection: Connection) -> None:
        broken = self._on_broken.get(process)
        if broken is not None:
            broken(connection)

    # --- partitions ---------------------------------------------------------------------

    def partition(self, cut: frozenset[str], heals_s: float) -> None:
        """From now until ``heals_s`` these processes (core, API processes, workers by name)
        reach only each other, and nobody else reaches them. One partition at a time."""
        self._cut, self._heals_s = cut, heals_s

    def heal(self) -> None:
        """The partition is over."""
        self._cut = frozenset()

    def is_cut(self, one: str, other: str) -> bool:
        """Whether a partition is between two processes."""
        if not self._cut:
            return False
        return (process_at(one) in self._cut) != (process_at(other) in self._cut)


def peer_address(placed: Placed) -> str:
    """Where an incarnation of a worker gets its control messages."""
    return f"{placed.worker}#{placed.incarnation}"


def process_at(address: str) -> str:
    """Whose address it is, whichever incarnation is there."""
    return address.partition("#")[0]

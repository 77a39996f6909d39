"""A simulated peer's end of the control connection: what ``coordinator.link`` does, in
virtual time.

It says who we are until the core answers, beats, and says it again when a restarted core does
not know us.
"""

from __future__ import annotations

from collections.abc import Callable

from cluster.simulator.events import Event, Events
from cluster.simulator.network import CORE, Network
from coordinator.protocol import Alive, Message, Refused, Unknown, Welcome

HELLO_INTERVAL_S = 0.5
"""``coordinator.link``'s."""


class Control:
    """``hello`` makes the message that introduces us, ``beat`` the one that says we live;
    ``on_message`` gets whatever else arrives, ``Welcome`` included. Whoever owns it gives it
    what arrives at its address (``receive``)."""

    def __init__(
        self,
        events: Events,
        network: Network,
        address: str,
        hello: Callable[[], Message],
        beat: Callable[[], Message],
        on_message: Callable[[Message], None],
    ) -> None:
        self.welcome: Welcome | None = None
        self.refused = ""
        self._events = events
        self._network = network
        self._address = address
        self._hello = hello
        self._beat = beat
        self._on_message = on_message
        self._next: Event | None = None

    def start(self, after_s: float = 0.0) -> None:
        """Introduce ourselves, and beat from then on."""
        self._next = self._events.after(after_s, self._say)

    def stop(self) -> None:
        """Be silent for good."""
        self._events.cancel(self._next)

    def pause(self) -> None:
        """Be silent until ``resume``."""
        self._events.cancel(self._next)

    def resume(self) -> None:
        """Speak again, at once."""
        self._next = self._events.after(0.0, self._say)

    def send(self, message: Message) -> None:
        """Send to the core."""
        self._network.send(self._address, CORE, message)

    def receive(self, _source: str, message: Message) -> None:
        """Something from the core."""
        if isinstance(message, Welcome):
            self.welcome = message
        elif isinstance(message, Unknown):
            self.welcome = None
            self.send(self._hello())
            return
        elif isinstance(message, Refused):
            self.refused = message.reason
            self.stop()
            return
        if not isinstance(message, Alive):
            self._on_message(message)

    def _say(self) -> None:
        if self.welcome is None:
            self.send(self._hello())
            pause_s = HELLO_INTERVAL_S
        else:
            self.send(self._beat())
            pause_s = self.welcome.beat_interval_s
        self._next = self._events.after(pause_s, self._say)

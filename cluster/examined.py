"""What a worker tells ``pythia doctor``: who it is, whom it reaches, how fast it reads.

Asked over the data socket, by whoever may send it calls anyway.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping

from cluster.examined_reach import reach_all
from cluster.host_facts import host_facts
from coordinator import protocol
from coordinator.protocol import EngineFacts, HostFacts, LinkLoad


def side_channel() -> str:
    """Where this process's engine says that peers are to ask it, as ``host:port``."""
    from vllm import envs

    host, port = envs.VLLM_NIXL_SIDE_CHANNEL_HOST, envs.VLLM_NIXL_SIDE_CHANNEL_PORT
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Examined:
    """Answers that need no engine. ``say`` sends a message to who asked."""

    def __init__(
        self,
        engine: str,
        facts: EngineFacts,
        links: Callable[[], list[LinkLoad]],
        say: Callable[[bytes, protocol.WorkerToExaminer], None],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._engine = engine
        self._facts = facts
        self._links = links
        self._say = say
        self._environment = os.environ if environment is None else environment
        self._host: HostFacts | None = None

    def tell_time(self, who: bytes, message: protocol.AskTime) -> None:
        """At once: whoever asked takes half of the time until then for the way."""
        self._say(who, protocol.TimeIs(message.call, time.time(), self._links()))

    async def look(self, who: bytes, message: protocol.Look) -> None:
        """Looks around and answers."""
        if self._host is None:
            # Stays what it is as long as this process does.
            loop = asyncio.get_running_loop()
            self._host = await loop.run_in_executor(None, host_facts, self._environment)
        reaches = await reach_all(message.peers)
        self._say(
            who,
            protocol.Looked(message.call, self._engine, self._facts, self._host, reaches),
        )

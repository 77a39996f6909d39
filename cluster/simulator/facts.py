"""What the engines of a running cluster are, as their workers told the core.

Asked as an API process asks, since only those are told: one that says ``Hello`` and goes. The
core forgets it when it misses its beats.
"""

from __future__ import annotations

import time
import uuid

import zmq

from cluster.status import Unreachable
from coordinator.protocol import (
    MESSAGE_BYTES_MAX,
    EngineFacts,
    Hello,
    Refused,
    WorkerUp,
    decode_core_to_api,
    encode,
)


def worker_facts(address: str, workers: int, timeout_s: float = 10.0) -> dict[str, EngineFacts]:
    """The facts of ``workers`` workers by name, from the core's address ``tcp://host:port``.

    ``Unreachable`` if it does not tell of so many in time.
    """
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    try:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        socket.connect(address)
        socket.send(encode(Hello(api=f"facts-{uuid.uuid4().hex}")))
        return _told(socket, address, workers, timeout_s)
    finally:
        socket.close()


def _told(
    socket: zmq.Socket[bytes], address: str, workers: int, timeout_s: float
) -> dict[str, EngineFacts]:
    found: dict[str, EngineFacts] = {}
    deadline_s = time.monotonic() + timeout_s
    while len(found) < workers:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not socket.poll(int(left_s * 1000) + 1):
            raise Unreachable(f"the core at {address} told of {len(found)} of {workers} workers")
        message = decode_core_to_api(socket.recv_multipart()[-1])
        if isinstance(message, Refused):
            raise Unreachable(f"the core at {address} does not take us in: {message.reason}")
        if isinstance(message, WorkerUp):
            found[message.worker] = message.facts
    return found

"""The handshake socket: where peers ask an engine for its NIXL metadata.

A reader's engine asks once per engine it meets, over ZeroMQ; the answer is what NIXL needs
to reach this engine's memory, and this process's clock. The stock listener ends at the first
frame it does not understand, and nobody can meet the engine any more; this one drops it.

It speaks vLLM's own protocol and changes nothing in it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time

import msgspec
import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import GET_META_MSG
from vllm.utils.network_utils import make_zmq_path

logger = logging.getLogger(f"vllm.{__name__}")

QUESTION_BYTES_MAX = 4096
"""Longest question that is read."""


def serve_handshakes(
    encoded_data: dict[tuple[int, int], bytes],
    ready_event: threading.Event,
    stop_event: threading.Event,
    host: str,
    port: int,
) -> None:
    """Answer peers that ask for NIXL metadata; drop, and mention once, what is no question."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.linger = 0
    socket.ipv6 = ":" in host
    socket.maxmsgsize = QUESTION_BYTES_MAX
    try:
        socket.bind(make_zmq_path("tcp", host, port))
    finally:
        # The engine's start waits for this; an error ends the thread and is printed.
        ready_event.set()
    warned = False
    while not stop_event.is_set():
        if not socket.poll(1000):
            continue
        frames = socket.recv_multipart()
        answer = _answer(frames[1:], encoded_data)
        if answer is not None:
            with contextlib.suppress(zmq.ZMQError):  # the asker is gone
                socket.send_multipart([frames[0], *answer])
        elif not warned:
            warned = True
            logger.warning("dropping frames on %s:%d that ask for nothing we have", host, port)
    context.destroy(linger=0)


def _answer(frames: list[bytes], encoded_data: dict[tuple[int, int], bytes]) -> list[bytes] | None:
    """Reply to one question of a REQ socket, or None if it is none of ours."""
    if len(frames) != 2 or frames[0]:
        return None
    try:
        word, stage, rank = msgspec.msgpack.decode(frames[1], type=tuple[bytes, int, int])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    payload = encoded_data.get((stage, rank))
    if word != GET_META_MSG or payload is None:
        return None
    # The reader works out the clocks' difference from our time.
    return [b"", payload, msgspec.msgpack.encode(time.perf_counter())]

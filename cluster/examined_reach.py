"""Trying addresses of workers: does somebody answer there, and is it who it should be?

Side channels are asked vLLM's own question, as an engine that wants to read KV would ask.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from coordinator.protocol import Peer, Reach

REACH_S = 3.0
"""How long a peer may take to answer."""
REACH_AT_ONCE = 32
ANSWER_BYTES_MAX = 64 * 1024 * 1024
QUESTION = b"get_meta_msg"
"""``GET_META_MSG`` of vLLM, which is not imported for it."""


async def reach_all(peers: list[Peer]) -> list[Reach]:
    """Tries both addresses of every peer, several at a time."""
    gate = asyncio.Semaphore(REACH_AT_ONCE)

    async def one(peer: Peer) -> Reach:
        async with gate:
            data, side = await asyncio.gather(
                error_of(data_answers(peer.data_address)),
                error_of(_side_answers(peer)),
            )
            return Reach(peer.worker, data, side)

    return list(await asyncio.gather(*map(one, peers)))


async def error_of(attempt: Awaitable[str]) -> str:
    """What went wrong in words; empty if nothing did."""
    try:
        return await asyncio.wait_for(attempt, REACH_S)
    except TimeoutError:
        return f"no answer within {REACH_S:.0f} s"
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)


async def data_answers(address: str) -> str:
    """Empty if somebody listens at ``tcp://host:port``. OSError if nobody can be reached."""
    host, port = split(address)
    _, writer = await asyncio.open_connection(host, port)
    writer.close()
    return ""


async def _side_answers(peer: Peer) -> str:
    """Asks for NIXL's metadata, after a connection that says at once why there is none."""
    host, port = split(peer.side_channel)
    await data_answers(peer.side_channel)
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.REQ)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IPV6, ":" in host)
    socket.setsockopt(zmq.MAXMSGSIZE, ANSWER_BYTES_MAX)
    try:
        socket.connect(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
        await socket.send(msgspec.msgpack.encode((QUESTION, 0, 0)))
        frames = await socket.recv_multipart()
    finally:
        context.destroy(linger=0)
    return _stranger(frames, peer)


def _stranger(frames: list[bytes], peer: Peer) -> str:
    """Who it was that answered, if it was somebody else."""
    try:
        payload: dict[str, Any] = msgspec.msgpack.decode(frames[0])
        metadata: dict[str, Any] = msgspec.msgpack.decode(payload["agent_metadata_bytes"])
        engine = str(metadata["engine_id"])
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, TypeError) as error:
        return f"what answers is no engine's side channel ({error})"
    if peer.engine and engine != peer.engine:
        return f"another engine answers there: {engine}"
    return ""


def split(address: str) -> tuple[str, int]:
    """Host and port of ``tcp://host:port`` or ``host:port``. OSError if it is neither."""
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise OSError(f"{address!r} is no address")
    return host.strip("[]"), int(port)

"""Garbage on every ZeroMQ socket of ours: dropped, counted, logged once, nothing else.

The sockets that anybody can reach are the core's control socket and each worker's data
socket; all others only connect. After each kind of garbage the cluster still answers.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
import zmq

from coordinator import protocol
from tests.e2e.harness import MODEL, Control, Server, wait_for

SEED = 20_250_731
COUNTED_S = 15.0
LOG_LINE = "dropped a frame that is no message"

REQUEST = msgspec.msgpack.encode({"request_id": "x", "prompt_token_ids": [5, 6], "attempt": "one"})
DECODE = protocol.Decode(request="garbage", attempt=0, incarnation="")


def garbage(dice: random.Random) -> dict[str, list[bytes]]:
    """Messages, as their frames, that no socket of ours can make sense of."""
    valid = protocol.encode(protocol.Hello(api="x" * 40))
    nested = b"\x91" * 5000 + b"\xc0"
    return {
        "empty": [b""],
        "no frames to speak of": [b"", b"", b""],
        "random": [dice.randbytes(200)],
        "random, long": [dice.randbytes(1024 * 1024)],
        "text": [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"],
        "truncated": [valid[:-5]],
        "trailing": [valid + b"\x00"],
        "no map": [msgspec.msgpack.encode([1, 2, 3])],
        "no tag": [msgspec.msgpack.encode({"api": "x"})],
        "unknown tag": [msgspec.msgpack.encode({"type": "Obey", "api": "x"})],
        "wrong types": [msgspec.msgpack.encode({"type": "Submit", "api": 7, "prompt_tokens": "a"})],
        "wrong direction": [protocol.encode(protocol.Welcome(beat_interval_s=1.0, core="evil"))],
        "deep": [nested],
        "huge length": [b"\xdd\xff\xff\xff\xff"],
        "infinity": [msgspec.msgpack.encode({"type": "ApiBeat", "api": "x", "open_calls": 1e308})],
    }


def mangled(dice: random.Random, incarnation: str) -> dict[str, list[bytes]]:
    """Messages for a worker whose header is right and whose other frames are not."""
    header = protocol.encode(msgspec.structs.replace(DECODE, incarnation=incarnation))
    utility = protocol.encode(protocol.Utility(call=1, method="list_loras"))
    pickled = msgspec.msgpack.encode(msgspec.msgpack.Ext(1, b"cos\nsystem\n(S'true'\ntR."))
    view = msgspec.msgpack.encode(msgspec.msgpack.Ext(3, struct.pack("<q", 99)))
    return {
        "request missing": [header],
        "request empty": [header, b""],
        "request random": [header, dice.randbytes(300)],
        "request of wrong types": [header, REQUEST],
        "request pickled": [header, pickled],
        "request points nowhere": [header, view],
        "arguments random": [utility, dice.randbytes(300)],
        "arguments pickled": [utility, pickled],
        "arguments missing": [utility],
    }


@pytest.fixture(scope="module")
def addresses(control: Control, cluster: Server) -> dict[str, tuple[str, str]]:
    """Data address and incarnation of every worker."""
    with contextlib.closing(Control(cluster.control_address)) as stranger:
        data = stranger.data_addresses()
    workers = control.snapshot().workers
    assert set(data) == {worker.worker for worker in workers}
    return {worker.worker: (data[worker.worker], worker.incarnation) for worker in workers}


@pytest.fixture(autouse=True)
def _still_serving(cluster: Server, control: Control) -> Iterator[None]:
    """The same workers are up afterwards, and short and long prompts are answered."""
    before = {worker.worker: worker.incarnation for worker in control.snapshot().workers}
    yield
    with cluster.http() as client:
        for tokens in (20, 300):
            body = {"model": MODEL, "prompt": [5 + tokens] * tokens, "max_tokens": 2}
            assert client.post("/v1/completions", json=body).status_code == 200
    after = control.snapshot().workers
    assert {worker.worker: worker.incarnation for worker in after} == before
    assert {worker.state for worker in after} == {"up"}


def send_to(address: str, messages: list[list[bytes]]) -> None:
    """Sends them over a connection of its own and waits until they are on the wire."""
    peer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    peer.setsockopt(zmq.LINGER, 10_000)
    peer.connect(address)
    for frames in messages:
        peer.send_multipart(frames)
    peer.close()


def counted_by_core(control: Control) -> int:
    return control.snapshot().counters.get("garbage_frames", 0)


def counted_by_worker(control: Control, name: str) -> int:
    return next(
        worker.load.garbage_frames_total
        for worker in control.snapshot().workers
        if worker.worker == name
    )


def test_garbage_for_the_core(cluster: Server, control: Control) -> None:
    messages = list(garbage(random.Random(SEED)).values())
    before = counted_by_core(control)
    send_to(cluster.control_address, messages)
    wait_for(
        lambda: counted_by_core(control) == before + len(messages), COUNTED_S, "the core's count"
    )


@pytest.mark.parametrize("name", ["prefill-0", "decode-0", "decode-1"])
def test_garbage_for_a_worker(
    control: Control, addresses: dict[str, tuple[str, str]], name: str
) -> None:
    address, incarnation = addresses[name]
    dice = random.Random(SEED)
    messages = [*garbage(dice).values(), *mangled(dice, incarnation).values()]
    before = counted_by_worker(control, name)
    send_to(address, messages)
    wait_for(
        lambda: counted_by_worker(control, name) == before + len(messages),
        COUNTED_S,
        f"the count of {name}",
    )


def test_random_garbage_in_bulk(
    cluster: Server, control: Control, addresses: dict[str, tuple[str, str]]
) -> None:
    """Two thousand mutations of valid messages, some of which may even be valid."""
    dice = random.Random(SEED + 1)
    seeds = [
        protocol.encode(protocol.Submit("x", "y", 0, 100, 10, block_hashes=b"12345678")),
        protocol.encode(protocol.Finished("x", "y", 0, "stop")),
        protocol.encode(protocol.Abort(calls=[("x", 0)])),
        protocol.encode(protocol.Prefill("x", 0, "nobody")),
        protocol.encode(protocol.Beat("prefill-0", "nobody", protocol.Load())),
    ]
    messages = []
    for _ in range(2000):
        frame = bytearray(dice.choice(seeds))
        for _ in range(dice.randrange(1, 6)):
            frame[dice.randrange(len(frame))] = dice.randrange(256)
        messages.append([bytes(frame)])
    before = counted_by_core(control)
    for address in (cluster.control_address, *(address for address, _ in addresses.values())):
        send_to(address, messages)
    wait_for(lambda: counted_by_core(control) > before + 100, COUNTED_S, "the core's count")


def test_messages_from_strangers(control: Control, cluster: Server) -> None:
    """Well-formed messages about calls, workers and probes that the sender does not have."""
    victims = control.snapshot().workers
    messages: list[protocol.Message] = [
        protocol.Submit("nobody", "call-1", 0, 10, 10),
        protocol.Prefilled("nobody", "call-1", 0),
        protocol.Started("nobody", "call-1", 3),
        protocol.Finished("nobody", "call-1", 0, "stop", output_tokens=-5),
        protocol.Failed("nobody", "call-1", 0, "decode-0", "because"),
        protocol.Checked("nobody", "call-1", 0, "gone"),
        protocol.ApiBeat("nobody", 3),
    ]
    for victim in victims:
        name, incarnation = victim.worker, victim.incarnation
        messages += [
            protocol.Leaving(name, incarnation, "said a stranger"),
            protocol.Leaving(name, "another", "said a stranger"),
            protocol.Beat(name, incarnation, protocol.Load(running=10_000)),
            protocol.Probed(name, incarnation, 1, b"handle"),
            protocol.ProbeFinished(name, incarnation, 1, 1.0, 5),
        ]
    send_to(cluster.control_address, [[protocol.encode(message)] for message in messages])
    time.sleep(2.0)
    assert [worker.incarnation for worker in control.snapshot().workers] == [
        victim.incarnation for victim in victims
    ]


def test_frames_beyond_the_limit(
    cluster: Server, control: Control, addresses: dict[str, tuple[str, str]]
) -> None:
    """ZeroMQ itself refuses them: the sender's connection is closed."""
    frame = b"\x00" * (protocol.MESSAGE_BYTES_MAX + 1)
    before = counted_by_core(control)
    for address in (cluster.control_address, addresses["decode-0"][0]):
        peer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        peer.setsockopt(zmq.LINGER, 0)
        monitor = peer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        peer.connect(address)
        peer.send(frame)
        assert monitor.poll(20_000), "the connection was not closed"
        peer.disable_monitor()
        monitor.close()
        peer.close()
    assert counted_by_core(control) == before


def test_what_is_not_even_zeromq(cluster: Server, addresses: dict[str, tuple[str, str]]) -> None:
    dice = random.Random(SEED + 2)
    for address in (cluster.control_address, *(address for address, _ in addresses.values())):
        target = urlsplit(address)
        assert target.hostname is not None
        for data in (dice.randbytes(5000), b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b""):
            with (
                socket.create_connection((target.hostname, target.port or 0), 5) as plain,
                contextlib.suppress(ConnectionError),
            ):
                plain.sendall(data)


def test_logged_once(cluster: Server) -> None:
    """All of the above made one line per process that was bothered."""
    assert cluster.log_dir is not None
    for name in ("coordinator", "prefill-0", "decode-0", "decode-1"):
        lines = (cluster.log_dir / f"{name}.log").read_text(errors="replace").splitlines()
        assert len([line for line in lines if LOG_LINE in line]) == 1, name


def test_garbage_for_the_api_is_bad_input(http: httpx.Client) -> None:
    """HTTP is no socket of ours, but the same holds for it."""
    response = http.request("POST", "/v1/completions", content=random.Random(SEED).randbytes(4000))
    assert response.status_code == 400

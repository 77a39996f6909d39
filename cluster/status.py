"""The cluster as the core sees it: fetched with one question, shown as tables.

Asks with a plain socket, so it works from any program and starts in no time; it
connects, reads one ``Snapshot`` and goes. Changes nothing.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgspec
import zmq
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from coordinator.protocol import (
    MESSAGE_BYTES_MAX,
    CallStatus,
    Inspect,
    LinkStatus,
    Snapshot,
    WorkerStatus,
    decode_snapshot,
    encode,
)

NARROW_COLUMNS = 130
"""Below this width of the terminal, columns that can be spared are left out."""
REQUEST_CHARACTERS = 16
LATE_BEATS_S = 3.0
ROLE_ORDER = ("prefill", "decode", "mixed")
STATE_STYLES = {
    "up": "green",
    "lost": "red",
    "left": "red",
    "suspect": "yellow",
    "warm": "green",
    "failed": "red",
}


class Unreachable(Exception):
    """No coordinator answered."""


def inspect(address: str, timeout_s: float = 2.0) -> Snapshot:
    """The core's view of the cluster, from its control address ``tcp://host:port``.

    ``Unreachable`` if nobody answers in time, or with something else.
    """
    token = secrets.randbits(31)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    try:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            raise Unreachable(f"{address}: {error}") from error
        socket.send(encode(Inspect(token=token)))
        return _answer(socket, address, token, timeout_s)
    finally:
        socket.close()


def _answer(socket: zmq.Socket[bytes], address: str, token: int, timeout_s: float) -> Snapshot:
    deadline_s = time.monotonic() + timeout_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        if not socket.poll(int(left_s * 1000) + 1):
            break
        try:
            snapshot = decode_snapshot(socket.recv_multipart()[-1])
        except msgspec.MsgspecError as error:
            raise Unreachable(f"what answers at {address} is no coordinator: {error}") from error
        if snapshot.token == token:
            return snapshot
    raise Unreachable(f"no coordinator answers at {address}")


def plain(value: Any) -> Any:
    """Structs as dictionaries with all their fields, for JSON."""
    if isinstance(value, msgspec.Struct):
        fields = msgspec.structs.asdict(value)
        return {name: plain(field) for name, field in fields.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def render(snapshot: Snapshot, width: int, calls: bool = False, links: bool = False) -> Group:
    """What ``pythia status`` shows on a terminal of ``width`` columns."""
    gap = Text()
    parts: list[Any] = [_headline(snapshot), gap, _workers(snapshot, width), gap, _front(snapshot)]
    if links:
        parts += [gap, _links(snapshot)]
    if calls:
        parts += [gap, _calls(snapshot, width)]
    return Group(*parts)


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


def _headline(snapshot: Snapshot) -> Text:
    # A prepared model goes by its folder, whose path says nothing to a person.
    model = snapshot.model.rpartition("/")[2] if snapshot.model.startswith("/") else snapshot.model
    return Text.assemble(
        (model, "bold"), f", up {duration(snapshot.uptime_s)}, core {snapshot.core[:8]}"
    )


def _front(snapshot: Snapshot) -> Text:
    apis = f"{snapshot.apis} API process" + ("" if snapshot.apis == 1 else "es")
    queue = f"{snapshot.queued} of {snapshot.queue_limit} waiting for room"
    return Text(f"{apis}, {snapshot.active} calls active, {queue}")


def _workers(snapshot: Snapshot, width: int) -> Table:
    wide = width >= NARROW_COLUMNS
    table = _table()
    for heading in ("worker", "role", "state") + (("where",) if wide else ()):
        table.add_column(heading, no_wrap=True)
    numbers = ["run", "wait", "KV used", "reserved", "calls", "warm", "beat"]
    if wide:
        numbers = [
            "running",
            "waiting",
            "KV blocks used",
            "reserved",
            "calls",
            "handles",
            "pairs warm",
            "beat",
        ]
    for heading in numbers:
        table.add_column(heading, no_wrap=True, justify="right")
    for worker in sorted(snapshot.workers, key=_order):
        table.add_row(*_worker_row(worker, wide))
    if not snapshot.workers:
        table.add_row(Text("none yet", style="yellow"))
    return table


def _order(worker: WorkerStatus) -> tuple[int, int, str]:
    """Prefill first; ``decode-10`` after ``decode-9``."""
    return (ROLE_ORDER.index(worker.role), len(worker.worker), worker.worker)


def _worker_row(worker: WorkerStatus, wide: bool) -> list[Text]:
    used, blocks = worker.load.kv_blocks_used, worker.kv_blocks
    share = f"{used / blocks:.0%}" if blocks else "-"
    cells = [
        Text(worker.worker),
        Text(worker.role),
        _state(worker),
    ]
    if wide:
        cells.append(Text(_place(worker)))
    cells += [
        Text(str(worker.load.running)),
        Text(str(worker.load.waiting)),
        Text(f"{used}/{blocks} {share:>4}" if wide else share),
        Text(str(worker.kv_blocks_reserved)),
        Text(str(worker.calls)),
        *([Text(str(worker.handles))] if wide else []),
        Text(
            f"{worker.warm_peers}/{worker.peers}",
            style="" if worker.warm_peers == worker.peers else "yellow",
        ),
        Text(
            f"{worker.last_beat_age_s:.1f} s",
            style="yellow" if worker.last_beat_age_s > LATE_BEATS_S else "",
        ),
    ]
    return cells


def _state(worker: WorkerStatus) -> Text:
    """Whether it is well; if so, how far it is with a change of its role."""
    if worker.turning and worker.state == "up":
        return Text(worker.turning, style="yellow")
    return Text(worker.state, style=STATE_STYLES.get(worker.state, ""))


def _place(worker: WorkerStatus) -> str:
    return f"{worker.host} GPU {worker.devices}" if worker.devices else f"{worker.host} CPU"


def _links(snapshot: Snapshot) -> Table:
    table = _table()
    for heading in ("from", "to", "state"):
        table.add_column(heading, no_wrap=True)
    for heading in ("transfers", "moved", "GB/s", "in flight"):
        table.add_column(heading, no_wrap=True, justify="right")
    order = {worker.worker: _order(worker) for worker in snapshot.workers}
    for link in sorted(snapshot.links, key=lambda link: (order[link.source], order[link.target])):
        table.add_row(
            Text(link.source),
            Text(link.target),
            Text(link.state, style=STATE_STYLES.get(link.state, "yellow")),
            Text(str(link.transfers)),
            Text(size(link.bytes_total)),
            Text(_gigabytes_per_s(link)),
            Text(size(link.in_flight_bytes)),
        )
    if not snapshot.links:
        table.add_row("none yet")
    return table


def _gigabytes_per_s(link: LinkStatus) -> str:
    """Lately; on average as long as nothing large has moved, which says less."""
    average = link.bytes_total / link.elapsed_s if link.elapsed_s else 0.0
    rate = (link.bytes_per_s or average) / 1e9
    if not rate:
        return "-"
    return f"{rate:.2f}" if rate >= 0.01 else "<0.01"


def _calls(snapshot: Snapshot, width: int) -> Table:
    wide = width >= NARROW_COLUMNS
    table = _table()
    for heading in ("call", "workflow/run", "agent", "phase") if wide else ("agent", "phase"):
        table.add_column(heading, no_wrap=True)
    for heading in ("prefill", "decode"):
        table.add_column(heading, no_wrap=True)
    for heading in ("prompt", *(("cached",) if wide else ()), "moved", "TTFT", "output"):
        table.add_column(heading, no_wrap=True, justify="right")
    for call in snapshot.calls:
        table.add_row(*_call_row(call, wide))
    if not snapshot.calls:
        table.add_row("none yet")
    return table


def _call_row(call: CallStatus, wide: bool) -> list[Text]:
    context = call.context
    request = call.request[-REQUEST_CHARACTERS:]
    if wide:
        run = "/".join(part[-16:] for part in (context.workflow, context.run) if part)
        cells = [request, run or "-", context.agent or "-"]
    else:
        cells = [context.agent or request]
    cells += [call.phase, call.prefill or "-", call.decode or "-"]
    cells.append(str(call.prompt_tokens))
    if wide:
        cells.append(str(call.prefill_cached_tokens + call.local_cached_tokens))
    cells += [
        str(call.moved_tokens),
        f"{call.ttft_s:.2f} s" if call.ttft_s else "-",
        str(call.output_tokens),
    ]
    return [Text(cell) for cell in cells]


def size(size_bytes: float) -> str:
    """``1_500_000`` as ``1.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"


def duration(seconds: float) -> str:
    """``95.0`` as ``1 min 35 s``; hours without seconds."""
    minutes, rest = divmod(int(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

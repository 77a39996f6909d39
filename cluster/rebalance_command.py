"""``pythia rebalance`` and ``pythia drain``: roles of workers, over the control socket."""

from __future__ import annotations

import time

import msgspec
from rich.console import Console
from rich.table import Table

from cluster.status import duration
from cluster.workflow_command import ask
from coordinator.protocol import DrainWorker, SetRebalance, ShowRebalance, TurnWorker
from coordinator.rebalancer import Decision, Role, Shown

DECISIONS_SHOWN = 10
LOOK_AGAIN_S = 0.2


def show(address: str, mode: str | None, as_json: bool, console: Console) -> int:
    """Prints roles, demand and the last decisions, after changing the mode if one is given."""
    if mode is None:
        body = ask(address, ShowRebalance)
    else:
        settings = msgspec.json.encode({"mode": mode})
        body = ask(address, lambda token: SetRebalance(token, settings))
    if as_json:
        console.print_json(body.decode())
        return 0
    shown = msgspec.json.decode(body, type=Shown)
    console.print(f"mode [bold]{shown.settings.mode}[/], {shown.verdict.reason}", highlight=False)
    console.print(_workers(shown))
    console.print(_demand(shown))
    if shown.decisions:
        console.print(_decisions(shown.decisions[-DECISIONS_SHOWN:]))
    return 0


def turn(address: str, worker: str, role: str, wait_s: float, console: Console) -> int:
    """Turns a worker and waits until it has its role."""
    ask(address, lambda token: TurnWorker(token, worker, role))
    found = _settled(address, worker, wait_s)
    if found.turning:
        console.print(f"{worker} is still {found.turning} after {wait_s:.0f} s; it goes on")
        return 1
    console.print(f"{worker} is {found.role}")
    return 0 if found.role == role else 1


def drain(address: str, worker: str, undo: bool, wait_s: float, console: Console) -> int:
    """Drains a worker and waits until it has nothing left to do; or gives it work again."""
    ask(address, lambda token: DrainWorker(token, worker, undo))
    if undo:
        console.print(f"{worker} gets work again")
        return 0
    found = _settled(address, worker, wait_s)
    if found.turning == "drained":
        console.print(f"{worker} is drained: it can be stopped")
        return 0
    console.print(f"{worker} is still {found.turning or found.state} after {wait_s:.0f} s")
    return 1


def _settled(address: str, worker: str, wait_s: float) -> Role:
    """How a worker is when it has ended what it was asked for, or after ``wait_s``."""
    until_s = time.monotonic() + wait_s
    while True:
        shown = msgspec.json.decode(ask(address, ShowRebalance), type=Shown)
        found = next((one for one in shown.workers if one.worker == worker), None)
        if found is None:
            return Role(worker, "", "", "lost", "", False, None)
        if found.turning in ("", "drained") or time.monotonic() >= until_s:
            return found
        time.sleep(LOOK_AGAIN_S)


def _workers(shown: Shown) -> Table:
    table = Table("worker", "role", "started as", "since", "state")
    for one in shown.workers:
        since = duration(one.since_s) if one.since_s is not None else "the start"
        role = f"{one.role} (fixed)" if one.fixed else one.role
        table.add_row(one.worker, role, one.started_role, since, one.turning or one.state)
    return table


def _demand(shown: Shown) -> Table:
    need, capacity = shown.need, shown.capacity
    table = Table("", "demand", "low to high", "source", "a worker gives", "pressure")
    rows = (
        ("prompt tokens/s", need.prefill_tokens_per_s, capacity.prefill_tokens_per_s, "prefill"),
        ("answer tokens/s", need.decode_tokens_per_s, capacity.decode_tokens_per_s, "decode"),
        ("tokens held", need.resident_tokens, capacity.resident_tokens, "memory"),
    )
    for (what, interval, gives, side), source in zip(rows, need.sources, strict=True):
        table.add_row(
            what,
            f"{interval.likely:,.0f}",
            f"{interval.low:,.0f} to {interval.high:,.0f}",
            source,
            f"{gives:,.0f}",
            f"{getattr(shown.verdict.pressure, side):.0%}",
        )
    wanted = ", ".join(f"{count} {role}" for role, count in shown.desired.items())
    table.caption = f"desired workers without queues: {wanted}"
    return table


def _decisions(decisions: list[Decision]) -> Table:
    table = Table("at", "by", "what", "workers", "then", "why")
    for one in decisions:
        workers = ", ".join(f"{name} {role}" for name, role in one.turns.items())
        roles = f"{one.prefill}P {one.decode}D"
        table.add_row(f"{one.at_s:,.1f}", one.by, one.what, workers, roles, one.reason)
    return table

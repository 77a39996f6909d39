"""``pythia workflows``: what a coordinator knows of workflows; take them out and in again.

Asks over the control socket, as ``pythia status`` does, and never imports vLLM.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq
from rich.console import Console, Group
from rich.table import Table

from cluster.failure import CommandFailure
from cluster.status import Unreachable
from cluster.workflow_picture import draw, tree
from coordinator.protocol import (
    MESSAGE_BYTES_MAX,
    ImportWorkflow,
    ListWorkflows,
    Question,
    RunStatus,
    ShowWorkflow,
    WorkflowAnswer,
    decode_workflow_answer,
    encode,
)
from coordinator.workflow.desk import Shown, WorkflowRow

ANSWER_S = 10.0


class WorkflowRefused(CommandFailure):
    """The coordinator does not do it; says why."""


def ask(address: str, question: Callable[[int], Question], timeout_s: float = ANSWER_S) -> bytes:
    """The answer of the coordinator at ``tcp://host:port``, as JSON.

    ``Unreachable`` if none comes in time, ``WorkflowRefused`` if it is a refusal.
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
        socket.send(encode(question(token)))
        answer = _answer(socket, address, token, timeout_s)
    finally:
        socket.close()
    if answer.problems:
        raise WorkflowRefused("; ".join(answer.problems))
    return answer.body


def _answer(
    socket: zmq.Socket[bytes], address: str, token: int, timeout_s: float
) -> WorkflowAnswer:
    deadline_s = time.monotonic() + timeout_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        if not socket.poll(int(left_s * 1000) + 1):
            break
        try:
            answer = decode_workflow_answer(socket.recv_multipart()[-1])
        except msgspec.MsgspecError as error:
            raise Unreachable(f"what answers at {address} is no coordinator: {error}") from error
        if answer.token == token:
            return answer
    raise Unreachable(f"no coordinator answers at {address}")


def list_workflows(address: str, tenant: str, console: Console) -> int:
    """Prints a table of all workflows."""
    body = ask(address, lambda token: ListWorkflows(token, tenant))
    table = Table("workflow", "declared", "agents", "learned", "live runs")
    for row in msgspec.json.decode(body, type=list[WorkflowRow]):
        declared = "by the cluster's file" if row.fixed else ("yes" if row.declared else "")
        agents = str(row.agents) if row.declared else ""
        table.add_row(row.name, declared, agents, "yes" if row.learned else "", str(row.runs_live))
    console.print(table)
    return 0


def show(
    address: str, name: str, tenant: str, pictures: list[Path], as_json: bool, console: Console
) -> int:
    """Prints a workflow as a tree, with its live runs; or all that is known, as JSON; and draws
    it into each of the files."""
    body = ask(address, lambda token: ShowWorkflow(token, name, tenant))
    shown = msgspec.json.decode(body, type=Shown)
    if as_json:
        console.print_json(body.decode())
    else:
        console.print(Group(tree(shown), *_runs(shown.runs)))
    for path in pictures:
        draw(shown, path)
        console.print(f"drawn into {path}")
    return 0


def export(address: str, name: str, tenant: str, path: Path | None, console: Console) -> int:
    """Writes all that is declared and learned of a workflow, as JSON."""
    body = ask(address, lambda token: ShowWorkflow(token, name, tenant, learned=True))
    text = msgspec.json.format(body).decode()
    if path is None:
        console.out(text, highlight=False)
    else:
        path.write_text(text, encoding="utf-8")
    return 0


def import_(address: str, path: Path, name: str, tenant: str, console: Console) -> int:
    """Takes over what ``export`` wrote, under its own name or another one."""
    try:
        record = path.read_bytes()
        own: Any = msgspec.json.decode(record)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WorkflowRefused(f"{path}: {error}") from error
    if not name:
        name = own.get("name", "") if isinstance(own, dict) else ""
    body = ask(address, lambda token: ImportWorkflow(token, str(name), record, tenant))
    console.print(f"imported {msgspec.json.decode(body)['name']}")
    return 0


def _runs(runs: list[RunStatus]) -> list[Table]:
    if not runs:
        return []
    table = Table("live run", "calls", "open", "age s", "silent s", "deadline in s", "priority")
    for run in runs:
        deadline = "" if run.deadline_s is None else f"{run.deadline_s:.0f}"
        table.add_row(
            run.run,
            str(run.calls),
            str(run.open_calls),
            f"{run.elapsed_s:.0f}",
            f"{run.silent_s:.0f}",
            deadline,
            str(run.priority) if run.explicit else "",
        )
    return [table]

"""What is kept of workflows: on disk before it is answered, whatever kills the process."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import zmq

from coordinator import protocol
from coordinator.protocol import (
    CallContext,
    DeclareWorkflow,
    DropWorkflow,
    Finished,
    Hello,
    ShowWorkflow,
    Submit,
    WorkflowAnswer,
    encode,
)
from coordinator.store import MIGRATIONS, Store, StoreError
from coordinator.workflow.journal import RunOver
from coordinator.workflow.keeping import (
    DropEvents,
    DropGraph,
    DropProfile,
    DropRun,
    KeepEvents,
    KeepGraph,
    KeepProfile,
    KeepRun,
    Kept,
    Save,
)

WAIT_S = 20.0
GRAPH = b'{"agents":{"a":{}}}'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "workflows.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store(path)
    yield store
    store.close()


def write(store: Store, *saves: Save) -> Exception | None:
    """Write and wait until that is done."""
    outcome: list[Exception | None] = []
    done = threading.Event()

    def then(failure: Exception | None) -> None:
        outcome.append(failure)
        done.set()

    store.write(saves, then)
    assert done.wait(WAIT_S)
    return outcome[0]


def kept(path: Path) -> Kept:
    store = Store(path)
    try:
        return store.kept()
    finally:
        store.close()


def test_what_was_written_is_there_for_the_next_process(store: Store, path: Path) -> None:
    assert store.kept() == Kept()
    assert write(store, KeepGraph("équipe", b"1"), KeepGraph("b", b"2")) is None
    assert write(store, KeepProfile("t", "b", b"p"), KeepGraph("b", b"3")) is None
    store.close()
    expected = Kept(
        [KeepGraph("b", b"3"), KeepGraph("équipe", b"1")], [KeepProfile("t", "b", b"p")]
    )
    assert kept(path) == expected


def test_what_is_dropped_is_gone_and_only_that(store: Store, path: Path) -> None:
    mine, other = KeepProfile("t", "a", b"1"), KeepProfile("u", "a", b"2")
    more = KeepProfile("t", "b", b"3")
    write(store, KeepGraph("a", GRAPH), KeepGraph("b", GRAPH), mine, other, more)
    events = [RunOver("t", "a", f"r{number}", 1.0) for number in range(4)]
    write(store, KeepEvents(2, events[:2]), KeepEvents(4, events[2:]))
    write(store, DropGraph("a"), DropProfile("t", "a"), DropProfile("t", "b"), DropEvents(2))
    store.close()
    left = [KeepEvents(4, events[2:])]
    assert kept(path) == Kept([KeepGraph("b", GRAPH)], [other], left)


def test_runs_are_kept_on_their_terms_until_they_are_over(store: Store, path: Path) -> None:
    first, second = KeepRun("t", "a", "1", 12.5, -3), KeepRun("t", "a", "2")
    write(store, first, second, KeepRun("", "a", "1"))
    write(store, KeepRun("t", "a", "2", 99.0), DropRun("t", "a", "1"), DropRun("u", "a", "1"))
    store.close()
    assert kept(path).runs == [KeepRun("", "a", "1"), KeepRun("t", "a", "2", 99.0)]


def test_a_file_of_the_first_version_is_brought_to_the_newest(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as database:
        for statement in MIGRATIONS[0]:
            database.execute(statement)
        database.execute("INSERT INTO graphs VALUES ('a', x'31')")
        database.execute("PRAGMA user_version = 1")
        database.commit()
    store = Store(path)
    assert store.kept() == Kept([KeepGraph("a", b"1")])
    assert write(store, KeepRun("", "a", "1")) is None
    store.close()


def test_only_its_owner_may_read_the_file(store: Store, path: Path) -> None:
    assert path.stat().st_mode & 0o077 == 0


def test_what_waits_is_written_at_the_end(path: Path) -> None:
    store = Store(path)
    done: list[Exception | None] = []
    for number in range(500):
        store.write([KeepGraph(f"w{number:03}", GRAPH)], done.append)
    store.close()
    assert done == [None] * 500
    assert [graph.name for graph in kept(path).graphs] == [f"w{number:03}" for number in range(500)]


def test_a_file_has_one_process_at_a_time(store: Store, path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from coordinator.store import Store, StoreError\n"
    )
    script += "try:\n    Store(Path(sys.argv[1]))\nexcept StoreError as error:\n    print(error)"
    output = subprocess.check_output([sys.executable, "-c", script, str(path)], text=True)
    assert "another process may have it" in output


def test_a_file_of_a_newer_version_is_left_alone(path: Path) -> None:
    Store(path).close()
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    database.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="newer version"):
        Store(path)
    assert path.read_bytes() == before


def test_something_else_than_a_store_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no database at all" * 1000)
    with pytest.raises(StoreError, match="not a database"):
        Store(path)


def test_a_step_of_the_schema_that_fails_leaves_the_file_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(path)
    write(store, KeepGraph("a", GRAPH))
    store.close()
    steps = (*MIGRATIONS, ("ALTER TABLE graphs ADD COLUMN note TEXT", "no statement"))
    monkeypatch.setattr("coordinator.store.MIGRATIONS", steps)
    with pytest.raises(StoreError, match="syntax error"):
        Store(path)
    monkeypatch.undo()
    assert kept(path) == Kept([KeepGraph("a", GRAPH)])


FULL_DISK = """
import resource, signal, sys, threading
from pathlib import Path
from coordinator.store import Store
from coordinator.workflow.keeping import KeepGraph
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store(Path(sys.argv[1]))
def write(name, size):
    done = threading.Event()
    store.write([KeepGraph(name, b"x" * size)], lambda failure: (print(name, failure), done.set()))
    done.wait()
write("before", 10)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
write("large", 1_000_000)
write("after", 10)
store.close()
"""


def test_a_full_disk_is_told_and_the_next_write_succeeds(path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(path)]
    lines = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).splitlines()
    assert lines[0] == "before None"
    assert lines[1].startswith("large ")
    assert lines[1] != "large None"
    assert lines[2] == "after None"
    assert [graph.name for graph in kept(path).graphs] == ["after", "before"]


# --- the core's process, killed ------------------------------------------------------------------

CORE = """
import asyncio, sys, zmq
from coordinator.server import CoordinatorConfig, CoreServer
from coordinator.workflow.limits import WorkflowLimits
async def main():
    config = CoordinatorConfig(
        "tcp://127.0.0.1:*",
        "127.0.0.1",
        0,
        "model",
        store=sys.argv[1],
        workflow_limits=WorkflowLimits(journal_events=400),
    )
    server = CoreServer(zmq.Context(), config)
    print(server.address, flush=True)
    await server.run()
asyncio.run(main())
"""


class CoreProcess:
    """A core of its own process, and a client of it."""

    def __init__(self, context: zmq.Context[Any], path: Path) -> None:
        command = [sys.executable, "-c", CORE, str(path)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.socket = context.socket(zmq.DEALER)
        self.socket.connect(self.process.stdout.readline().strip())

    def send(self, *messages: protocol.Message) -> None:
        for message in messages:
            self.socket.send(encode(message))

    def answers(self, timeout_s: float) -> Iterator[WorkflowAnswer]:
        """Answers as they come, until time is up."""
        end_s = time.monotonic() + timeout_s
        while (left_s := end_s - time.monotonic()) > 0:
            if self.socket.poll(int(left_s * 1000)):
                message = protocol.decode_core_to_api(memoryview(self.socket.recv()))
                if isinstance(message, WorkflowAnswer):
                    yield message

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.socket.close(linger=0)


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.destroy(linger=0)


def test_no_acknowledged_declaration_is_lost_by_kill_9(
    path: Path, context: zmq.Context[Any]
) -> None:
    rng = random.Random(7)
    names = 30
    expected: dict[str, bytes | None] = {}
    """What was acknowledged last, by name."""
    for round_ in range(6):
        core = CoreProcess(context, path)
        asked: dict[int, tuple[str, bytes | None]] = {}
        for token in range(3000):
            name = f"w{rng.randrange(names)}"
            if rng.random() < 0.2:
                asked[token] = name, None
                core.socket.send(encode(DropWorkflow(token, name)))
            else:
                graph = (
                    f'{{"agents":{{"a":{{"output_tokens":{round_ * 10_000 + token}}}}}}}'.encode()
                )
                asked[token] = name, graph
                core.socket.send(encode(DeclareWorkflow(token, name, graph)))
        answered: set[int] = set()
        for answer in core.answers(rng.uniform(0.05, 0.6)):
            assert answer.status in (200, 201, 404, 503), answer
            answered.add(answer.token)
            if answer.status in (200, 201):
                name, graph_or_none = asked[answer.token]
                expected[name] = graph_or_none
        core.kill()
        found = {graph.name: graph.graph for graph in kept(path).graphs}
        open_: dict[str, set[bytes | None]] = {}
        for token, (name, graph_or_none) in asked.items():
            if token not in answered:
                open_.setdefault(name, set()).add(graph_or_none)
        for name, graph_or_none in expected.items():
            # What was asked may have been written without having been acknowledged.
            assert found.get(name) in {graph_or_none} | open_.get(name, set()), name
        expected = {name: found.get(name) for name in expected.keys() | found.keys()}
        assert answered, "the core was killed before it answered anything"


def runs_learned(core: CoreProcess, timeout_s: float = WAIT_S) -> int:
    """How many runs of the team the core has learned from; what was said before is known then."""
    core.send(ShowWorkflow(0, "team"))
    for answer in core.answers(timeout_s):
        if answer.status == 404:
            return 0
        ended: int = json.loads(answer.body)["learned"]["runs_ended"]
        return ended
    raise TimeoutError("the core does not answer")


def run_team(core: CoreProcess, run: str) -> None:
    """A run of two calls, as an API process tells of it."""
    for agent in ("planner", "writer"):
        context = CallContext("team", run, agent, final=agent == "writer")
        request = f"{run}-{agent}"
        core.send(Submit("api", request, 1, 100, 50, bytes(48), context=context))
        core.send(Finished("api", request, 1, "stop", 40))


def test_at_most_the_last_second_of_learning_is_lost_by_kill_9(
    path: Path, context: zmq.Context[Any]
) -> None:
    rng, at_least = random.Random(3), 0
    for round_ in range(4):
        core = CoreProcess(context, path)
        core.send(Hello("api"))
        found = runs_learned(core)
        assert found >= at_least, f"round {round_}"
        seen = [(time.monotonic(), found)]
        until_s = seen[0][0] + rng.uniform(1.2, 2.0)
        number = 0
        while time.monotonic() < until_s:
            for _ in range(10):
                number += 1
                run_team(core, f"{round_}-{number}")
            seen.append((time.monotonic(), runs_learned(core)))
        assert seen[-1][1] == found + number
        killed_s = time.monotonic()
        core.kill()
        at_least = max(ended for at_s, ended in seen if at_s <= killed_s - 1.0)
        assert at_least > found or round_ == 0

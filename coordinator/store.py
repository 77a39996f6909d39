"""What the core must not forget, in SQLite: declared workflows and what was learned of them.

One thread of its own writes; the core's never waits for a disk. All that is waiting goes into
one transaction, in order, so that either all of it is there after a crash or nothing. It is
on disk (write-ahead log, ``synchronous=FULL``) before ``done`` is called. The file belongs to one
process at a time; ``kill -9`` at any moment leaves what the last commit left.
"""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec.structs import astuple

from coordinator.workflow.journal import decode_events, encode_events
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

logger = logging.getLogger("pythia.store")

BUSY_S = 2.0
"""How long to wait for a former process to let go of the file."""
TRANSACTION_BATCHES_MAX = 256

Done = Callable[[Exception | None], None]
"""Called on the store's thread: None once it is on disk, else why it is not."""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE graphs (name TEXT PRIMARY KEY, graph BLOB NOT NULL) WITHOUT ROWID",
        "CREATE TABLE profiles (tenant TEXT, workflow TEXT, profile BLOB NOT NULL,"
        " position INTEGER NOT NULL, PRIMARY KEY (tenant, workflow)) WITHOUT ROWID",
        "CREATE TABLE events (position INTEGER PRIMARY KEY, events BLOB NOT NULL)",
    ),
    (
        "CREATE TABLE runs (tenant TEXT, workflow TEXT, run TEXT, deadline_at_s REAL,"
        " priority INTEGER NOT NULL, PRIMARY KEY (tenant, workflow, run)) WITHOUT ROWID",
    ),
)
"""How to get from each version of the schema to the next. Never changed, only added to."""


class StoreError(Exception):
    """The file can't be used; says why."""


class Store:
    """A file and the thread that writes to it."""

    def __init__(self, path: Path) -> None:
        """Opens the file, or makes it. StoreError if it is another process's, made by a newer
        version, or damaged."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._database = _opened(path)
        except sqlite3.Error as error:
            hint = "; another process may have it" if "locked" in str(error) else ""
            raise StoreError(f"{path}: {error}{hint}") from error
        self._waiting: queue.SimpleQueue[tuple[Sequence[Save], Done] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="store")
        self._thread.start()

    def kept(self) -> Kept:
        """All that is there. To be called before anything is written."""
        graphs = self._database.execute("SELECT name, graph FROM graphs ORDER BY name")
        columns = "tenant, workflow, profile, position"
        profiles = self._database.execute(f"SELECT {columns} FROM profiles ORDER BY 1, 2")
        events = self._database.execute("SELECT position, events FROM events ORDER BY position")
        columns = "tenant, workflow, run, deadline_at_s, priority"
        runs = self._database.execute(f"SELECT {columns} FROM runs ORDER BY 1, 2, 3")
        return Kept(
            [KeepGraph(*row) for row in graphs.fetchall()],
            [KeepProfile(*row) for row in profiles.fetchall()],
            [KeepEvents(position, decode_events(blob)) for position, blob in events.fetchall()],
            [KeepRun(*row) for row in runs.fetchall()],
        )

    def write(self, saves: Sequence[Save], done: Done) -> None:
        """Write soon, all or nothing, after all that was given before."""
        self._waiting.put((saves, done))

    def close(self) -> None:
        """Write what is waiting, then let go of the file."""
        self._waiting.put(None)
        self._thread.join()
        self._database.close()

    def _write_all(self) -> None:
        while (batch := self._waiting.get()) is not None:
            batches = [batch]
            while batch is not None and len(batches) < TRANSACTION_BATCHES_MAX:
                if self._waiting.empty():
                    break
                batch = self._waiting.get()
                if batch is not None:
                    batches.append(batch)
            self._commit(batches)
            if batch is None:
                return

    def _commit(self, batches: list[tuple[Sequence[Save], Done]]) -> None:
        failure: Exception | None = None
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                for saves, _ in batches:
                    for save in saves:
                        self._database.execute(*_statement(save))
        except (sqlite3.Error, ValueError) as error:
            logger.error("%s: nothing could be written: %s", self.path, error)
            failure = error
        for _, done in batches:
            done(failure)


def _opened(path: Path) -> sqlite3.Connection:
    path.touch(mode=0o600)  # learned behaviour and static prompts are their owner's
    database = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA locking_mode=EXCLUSIVE")
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        _migrate(database, path)
    except BaseException:
        database.close()
        raise
    return database


def _migrate(database: sqlite3.Connection, path: Path) -> None:
    """Bring the file to the newest schema; each step is one transaction."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise StoreError(
            f"{path} was written by a newer version (schema {version}, this one knows "
            f"{len(MIGRATIONS)})"
        )
    for number in range(version, len(MIGRATIONS)):
        with database:
            database.execute("BEGIN IMMEDIATE")
            for statement in MIGRATIONS[number]:
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {number + 1}")
    with database:
        # Takes the lock now, not at the first write.
        database.execute("BEGIN EXCLUSIVE")


def _statement(save: Save) -> tuple[str, tuple[str | bytes | float | None, ...]]:
    match save:
        case KeepGraph(name, graph):
            return "INSERT OR REPLACE INTO graphs VALUES (?, ?)", (name, graph)
        case DropGraph(name):
            return "DELETE FROM graphs WHERE name = ?", (name,)
        case KeepProfile(tenant, workflow, profile, position):
            row = (tenant, workflow, profile, position)
            return "INSERT OR REPLACE INTO profiles VALUES (?, ?, ?, ?)", row
        case DropProfile(tenant, workflow):
            statement = "DELETE FROM profiles WHERE tenant = ? AND workflow = ?"
            return statement, (tenant, workflow)
        case KeepRun():
            return "INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?)", astuple(save)
        case DropRun():
            statement = "DELETE FROM runs WHERE tenant = ? AND workflow = ? AND run = ?"
            return statement, astuple(save)
        case KeepEvents(position, events):
            return "INSERT OR REPLACE INTO events VALUES (?, ?)", (position, encode_events(events))
        case DropEvents(position):
            return "DELETE FROM events WHERE position <= ?", (position,)

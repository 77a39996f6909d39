"""One process of the cluster as its launcher sees it: started, watched, ended for certain.

It runs in a session of its own, writes to a log file of its own and is killed by the
kernel when the launcher goes away. Its process id is not given back to the system
before the whole session is gone, so no stranger can be hit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from cluster.process import PHASE_PREFIX, kill_session

LOG_READ_BYTES = 256 * 1024
TAIL_LINES = 30
STOP_S = 20.0
"""How long processes may take to end on SIGTERM before they are killed, when they have drained."""
POLL_S = 0.05


class ChildProcess(Protocol):
    """What is needed of a started process; ``subprocess.Popen`` has it."""

    pid: int
    returncode: int | None

    def wait(self) -> int:
        """Waits for the end and gives the process id back."""


StartProcess = Callable[[Sequence[str], int], ChildProcess]
"""Starts a command line as a child with a session of its own that dies with this process;
its output goes to the open file of that number."""


def start_guarded(
    command: Sequence[str],
    log: int,
    stdin: int = subprocess.DEVNULL,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a fresh program. ``environment``: what is added to this process's own."""
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.process", str(os.getpid()), *command],
        stdin=stdin,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**child_environment(), **(environment or {})},
        start_new_session=True,
    )


class Child:
    """A started process. ``name`` is the worker's, or ``coordinator``."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log_path: Path,
        start: StartProcess = start_guarded,
    ) -> None:
        """Starts ``command``. To be called from a thread that lives as long as the launcher."""
        self.name = name
        self.log_path = log_path
        self.started_s = time.monotonic()
        self.announced = ""
        self._log_offset = 0
        self._log_rest = b""
        with log_path.open("wb") as log:
            self._process = start(command, log.fileno())
        self.pid = self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative is the signal that killed it."""
        if self._process.returncode is not None:
            return self._process.returncode
        end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if end is None:
            return None
        return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status

    def read_announcements(self) -> None:
        """Reads what the log has got since the last call; keeps the newest phase."""
        with self.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_offset, size - LOG_READ_BYTES))
            text = self._log_rest + log.read(LOG_READ_BYTES)
            self._log_offset = log.tell()
        *lines, self._log_rest = text.split(b"\n")
        self._log_rest = self._log_rest[-LOG_READ_BYTES:]
        for line in lines:
            _, found, phase = line.decode(errors="replace").partition(PHASE_PREFIX)
            if found:
                self.announced = phase.strip()

    def tail(self) -> str:
        """The last lines of its log."""
        with self.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - LOG_READ_BYTES))
            lines = log.read(LOG_READ_BYTES).decode(errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])

    def obituary(self) -> str:
        """How it ended, and the last lines of its log."""
        code = self.exit_code()
        lived_s = time.monotonic() - self.started_s
        how = (
            f"was killed by {signal.Signals(-code).name}"
            if code and code < 0
            else (f"exited with code {code}")
        )
        return f"{self.name} {how} after {lived_s:.0f} s; its log {self.log_path} ends with:\n" + (
            self.tail() or "(nothing)"
        )

    def terminate(self) -> None:
        """Asks it to end."""
        if self.exit_code() is None:
            os.kill(self.pid, signal.SIGTERM)

    def finish(self) -> list[int]:
        """Kills what is left of its session; returns the processes that withstood."""
        survivors = kill_session(self.pid)
        if not survivors:
            self._process.wait()
        return survivors


def stop_all(
    children: Sequence[Child], hurry: Callable[[], bool] = lambda: False, grace_s: float = STOP_S
) -> None:
    """Ends all: SIGTERM, up to ``grace_s``, SIGKILL of each one's session.

    ``hurry`` is asked all the time; true skips the rest of the wait. RuntimeError if a
    process is still there after that.
    """
    for child in children:
        child.terminate()
    deadline_s = time.monotonic() + grace_s
    while any(child.exit_code() is None for child in children):
        if time.monotonic() > deadline_s or hurry():
            break
        time.sleep(POLL_S)
    survivors = [pid for child in children for pid in child.finish()]
    if survivors:
        raise RuntimeError(f"processes that can't be killed: {survivors}")


def child_environment() -> dict[str, str]:
    """This process's own, so that the child finds the same packages and logs at once."""
    root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([root, inherited]) if inherited else root
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}

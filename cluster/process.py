"""What a process of the cluster needs to know about itself and its children on Linux.

Its parent's death, who it is even when process ids are used again, how many cores it
may really use, which ports are free, and how a whole session of processes is ended.

As a program, ``python -m cluster.process PARENT COMMAND...`` becomes ``COMMAND`` and is
killed by the kernel when its parent goes away, whatever killed that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Collection
from pathlib import Path

import msgspec

_PR_SET_PDEATHSIG = 1
PHASE_PREFIX = "pythia phase: "
FREE_PORTS_FROM, FREE_PORTS_TO = 15_000, 32_000
FREE_PORT_TRIES = 100
PORTS_REMEMBERED = 1024


class ProcessIdentity(msgspec.Struct, frozen=True):
    """A process for certain: its id, and when it started in clock ticks since boot."""

    pid: int
    start_ticks: int


def die_with_parent(parent_pid: int, death_signal: int = signal.SIGKILL) -> None:
    """Has the kernel send ``death_signal`` to this process when its parent dies.

    The kernel watches the *thread* that started this process, so the parent must start
    it from a thread that lives as long as itself. Survives ``exec``. Exits at once if the
    parent is already gone. OSError if the kernel refuses.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    if os.getppid() != parent_pid:
        raise SystemExit(f"process {parent_pid}, which started this one, is gone")


def announce(phase: str) -> None:
    """Tells whoever reads this process's log what it is doing now, e.g. "loading model"."""
    print(f"{PHASE_PREFIX}{phase}", flush=True)


def identify(pid: int) -> ProcessIdentity | None:
    """Identity of a running process; None if there is none (or only its remains)."""
    status = _status(pid)
    if status is None or status[0] in ("Z", "X"):
        return None
    return ProcessIdentity(pid, int(status[19]))


def is_running(identity: ProcessIdentity) -> bool:
    """True while that very process runs, not another one with its id."""
    return identify(identity.pid) == identity


def session_members(session: int) -> list[int]:
    """Processes, dead ones left out, whose session or process group is ``session``."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        status = _status(int(entry.name))
        if status is None or status[0] in ("Z", "X"):
            continue
        if session in (int(status[2]), int(status[3])):
            members.append(int(entry.name))
    return sorted(members)


def kill_session(session: int, wait_s: float = 5.0) -> list[int]:
    """Kills every process of a session; returns those that are still there after ``wait_s``."""
    deadline = time.monotonic() + wait_s
    while members := session_members(session):
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return session_members(session)
        time.sleep(0.02)
    return []


def usable_cores() -> int:
    """Cores this process may use: its affinity, and its control group's quota; at least 1."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


_handed_out: deque[int] = deque(maxlen=PORTS_REMEMBERED)


def free_port(host: str, taken: Collection[int] = ()) -> int:
    """A port of ``host`` that nobody listened on a moment ago, none of those ``taken``.

    From below the range that the kernel hands out by itself where there is room: whoever
    is told the port may listen much later, and until then no connection must get it, nor
    anybody else who asks here.
    """
    for _ in range(FREE_PORT_TRIES):
        port = FREE_PORTS_FROM + secrets.randbelow(FREE_PORTS_TO - FREE_PORTS_FROM)
        if port not in _handed_out and port not in taken and port_is_free(host, port):
            _handed_out.append(port)
            return port
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def port_is_free(host: str, port: int) -> bool:
    """True if a server may listen there. OSError if ``host`` is not this machine's."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _status(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; None without such a process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


def _become(arguments: list[str]) -> None:
    parent_pid, *command = arguments
    die_with_parent(int(parent_pid))
    os.execvp(command[0], command)


if __name__ == "__main__":
    _become(sys.argv[1:])

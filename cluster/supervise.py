"""``pythia up`` and ``pythia down``: a cluster that lives until it is told to end.

Whoever runs ``up`` owns the processes: it holds a lock on the cluster's run directory
and keeps a record there that says who it is, precisely enough that ``down`` can never
hit another process. With ``detach`` the same command runs in the background, and this
process only shows how it gets on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Literal

import msgspec
from rich.console import Console

from cluster.child import STOP_S, child_environment
from cluster.launch import (
    COORDINATOR,
    CommandOf,
    LaunchError,
    LocalCluster,
    process_command,
    run_directory,
)
from cluster.process import ProcessIdentity, identify, is_running, kill_session
from cluster.progress import progress_for
from cluster.schema import ClusterConfig, CoordinatorEntry, tcp_address

WATCH_S = 0.25
DOWN_S = STOP_S + 15.0
"""How long ``down`` waits for the owner, which itself gives its processes ``STOP_S``."""
RECORD_NAME = "owner.json"
OWNER_LOG_NAME = "up.log"
INTERRUPTED = 130
"""Exit code of a shell's command that Ctrl-C ended."""

State = Literal["starting", "ready"]


class Record(msgspec.Struct, frozen=True):
    """Who runs a cluster, where it listens, and its processes by name."""

    cluster: str
    state: State
    owner: ProcessIdentity
    base_url: str
    control_address: str
    processes: dict[str, ProcessIdentity] = {}
    drain_s: float = 0.0


class Stopped(BaseException):
    """A signal asked to stop; like KeyboardInterrupt, nothing catches it by accident."""


class Signals:
    """Turns the first SIGINT, SIGTERM or SIGHUP into ``Stopped``; counts all of them."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.received = 0
        self._deferred = False

    def __enter__(self) -> Signals:
        # What is ignored from outside, as nohup does it, stays ignored.
        self._before = {
            number: signal.signal(number, self._handle)
            for number in self.NUMBERS
            if signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on signals are only counted: stopping must not be interrupted."""
        self._deferred = True

    def insistent(self) -> bool:
        """True when the user asked a second time."""
        return self.received > 1

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received += 1
        if not self._deferred:
            self._deferred = True
            raise Stopped(signal.Signals(number).name)


def up(config: ClusterConfig, console: Console) -> int:
    """Starts a cluster, stays until a signal or its death, stops it. Returns the exit code.

    LaunchError when it can't be started or stopped being of use.
    """
    return run(config, console, lambda cluster: stay(cluster, console))


def run(
    config: ClusterConfig,
    console: Console,
    work: Callable[[LocalCluster], int],
    command_of: CommandOf = process_command,
) -> int:
    """Does ``work`` with a ready cluster, then stops it, whatever happened.

    Returns what ``work`` returned; after a signal 130, or 0 if the cluster was ready.
    LaunchError when it can't be started, and whatever ``work`` raises.
    """
    directory = run_directory(config.name)
    ready = False
    with _claimed(directory, config.name), Signals() as signals:
        cluster = LocalCluster(config, progress=progress_for(console), command_of=command_of)
        try:
            _write(directory, cluster, "starting")
            cluster.start()
            _write(directory, cluster, "ready")
            ready = True
            return work(cluster)
        except Stopped as stopped:
            say(console, f"{stopped}: stopping {config.name}; once more kills it")
            return 0 if ready else INTERRUPTED
        finally:
            signals.defer()
            cluster.stop(hurry=signals.insistent)
            (directory / RECORD_NAME).unlink(missing_ok=True)
            say(console, f"{config.name} is stopped")


def up_detached(name: str, command: Sequence[str], console: Console) -> int:
    """Runs ``command``, which brings the cluster up, in the background.

    Shows what it prints; returns 0 once the cluster is ready, else the command's exit code.
    """
    directory = run_directory(name)
    log_path = directory / OWNER_LOG_NAME
    with _claimed(directory, name):
        log_path.write_bytes(b"")
    with log_path.open("ab") as log:
        owner = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=child_environment(),
            start_new_session=True,
        )
    with Signals() as signals, log_path.open() as lines:
        try:
            while owner.poll() is None and not _is_ready(directory, owner.pid):
                _relay(lines, console)
                time.sleep(WATCH_S)
        except Stopped:
            signals.defer()
            owner.terminate()
            owner.wait()
        _relay(lines, console)
    return owner.returncode or 0


def down(name: str | None, everything: bool, console: Console) -> int:
    """Stops a running cluster: the one of that name, the only one, or all of them.

    Returns 0 also when there is nothing to stop. LaunchError when the choice is not clear.
    """
    records = running()
    if name is not None:
        records = [record for record in records if record.cluster == name]
    elif len(records) > 1 and not everything:
        names = ", ".join(record.cluster for record in records)
        raise LaunchError(f"several clusters are running ({names}): name one, or use --all")
    if not records:
        say(console, f"no cluster {name} is running" if name else "no cluster is running")
    for record in records:
        _stop(record, console)
    return 0


def running() -> list[Record]:
    """The clusters that this user has up on this machine, by name."""
    base = run_directory("")
    records = [_read(path.parent) for path in sorted(base.glob(f"*/{RECORD_NAME}"))]
    return [record for record in records if record is not None and is_running(record.owner)]


def running_address() -> str:
    """The control address of the one cluster that this user has up; else the default."""
    records = running()
    if len(records) == 1:
        return records[0].control_address
    usual = CoordinatorEntry()
    return tcp_address(usual.host, usual.port)


def _stop(record: Record, console: Console) -> None:
    say(console, f"stopping {record.cluster} (process {record.owner.pid})")
    with contextlib.suppress(ProcessLookupError):
        os.kill(record.owner.pid, signal.SIGTERM)
    deadline_s = time.monotonic() + DOWN_S + record.drain_s
    while is_running(record.owner) and time.monotonic() < deadline_s:
        time.sleep(WATCH_S)
    if is_running(record.owner):
        os.kill(record.owner.pid, signal.SIGKILL)
    for identity in record.processes.values():
        if is_running(identity):
            kill_session(identity.pid)
    say(console, f"{record.cluster} is stopped")


@contextlib.contextmanager
def _claimed(directory: Path, name: str) -> Iterator[None]:
    """Holds the run directory; LaunchError if another process does. Freed by the kernel."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            record = _read(directory)
            who = f" (process {record.owner.pid}, {record.base_url})" if record else ""
            raise LaunchError(
                f"cluster {name} is running already{who}; 'pythia down {name}' stops it"
            ) from None
        yield


def _write(directory: Path, cluster: LocalCluster, state: State) -> None:
    owner = identify(os.getpid())
    assert owner is not None
    processes = {name: identify(pid) for name, pid in cluster.processes.items()}
    record = Record(
        cluster=cluster.config.name,
        state=state,
        owner=owner,
        base_url=cluster.base_url,
        control_address=cluster.control_address,
        processes={name: found for name, found in processes.items() if found is not None},
        drain_s=cluster.config.stop.drain_s,
    )
    part = directory / f"{RECORD_NAME}.part"
    part.write_bytes(msgspec.json.encode(record))
    part.replace(directory / RECORD_NAME)


def _read(directory: Path) -> Record | None:
    try:
        return msgspec.json.decode((directory / RECORD_NAME).read_bytes(), type=Record)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def _is_ready(directory: Path, owner_pid: int) -> bool:
    record = _read(directory)
    return record is not None and record.state == "ready" and record.owner.pid == owner_pid


def say(console: Console, text: str) -> None:
    """Prints a line as it is: no markup, no wrapping."""
    console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _relay(lines: IO[str], console: Console) -> None:
    for line in lines:
        say(console, line.rstrip("\n"))


def stay(cluster: LocalCluster, console: Console) -> int:
    """Tells the person at the terminal that it is ready, then ``watch``."""
    name = cluster.config.name
    say(console, f"{name} is ready: {cluster.base_url}/v1 serves {cluster.config.served_name}")
    say(console, f"logs are in {cluster.log_dir}; 'pythia status' looks at it")
    say(console, f"Ctrl-C or 'pythia down {name}' stops it")
    return watch(cluster, console, lambda: None)


def watch(cluster: LocalCluster, console: Console, over: Callable[[], int | None]) -> int:
    """Stays until ``over`` says a number, and returns that.

    A lost worker is reported, a useless cluster is a LaunchError.
    """
    reported: set[str] = set()
    while (code := over()) is None:
        dead = {child.name: child for child in cluster.dead()}
        for name in dead.keys() - reported:
            say(console, dead[name].obituary())
        reported.update(dead)
        if COORDINATOR in dead:
            raise LaunchError("the coordinator is gone: the cluster is of no use any more")
        if all(e.name in dead for e in cluster.config.workers if e.role != "prefill"):
            raise LaunchError("no worker that decodes is left: the cluster is of no use any more")
        time.sleep(WATCH_S)
    return code

"""One host's end of a cluster that is started over SSH: ``python -m cluster.remote``.

Reads a request from standard input (``cluster.hosts``), answers on standard output, and
goes. What it starts has a session of its own, writes to a log and outlives the connection; a
record says which process it is, so precisely that no other one can ever be taken for it.

Folder: ``<run directory>/<cluster>/ssh/host-<host>/`` with ``cluster.yaml``, ``NAME.log`` and
``NAME.json``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from cluster import devices
from cluster.child import POLL_S, Child, child_environment
from cluster.hosts import (
    Answer,
    Checked,
    CoreState,
    Failed,
    FixedPort,
    HostState,
    Logs,
    ProcessState,
    Request,
    Stopped,
)
from cluster.launch import ANSWER_S, is_ready, run_directory
from cluster.look import look
from cluster.process import ProcessIdentity, identify, is_running, port_is_free, session_members
from cluster.status import Unreachable, inspect

MARK = "pythia-answer: "
"""Begins every line of an answer; whatever a shell prints besides is no answer."""
GO = "go"
LINE_BYTES_MAX = 8 * 1024 * 1024
STATE_S = 0.5
ANSWER_ONCE_S = 5.0
KILL_S = 5.0
TOKEN = "PYTHIA_LAUNCH"
"""The environment variable that all of one started process's descendants have."""
TAIL_BYTES = 512 * 1024


class Record(msgspec.Struct, frozen=True):
    """A started process: who it is, since which boot, and its descendants' mark."""

    identity: ProcessIdentity
    boot_id: str
    token: str

    def is_running(self) -> bool:
        """True while that very process runs."""
        return self.boot_id == boot_id() and is_running(self.identity)


def boot_id() -> str:
    """Changes when the machine starts anew, and all process ids with it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def folder_of(request: Request) -> Path:
    """Where this host's processes of a cluster keep their files. Hosts may share a disk."""
    return run_directory(request.cluster) / "ssh" / f"host-{request.host}"


def main() -> int:
    """Does what one request asks. Returns the exit code: 0 when it has been answered."""
    line = sys.stdin.buffer.readline(LINE_BYTES_MAX)
    request = msgspec.json.decode(line, type=Request)
    if request.run_dir:
        os.environ["PYTHIA_RUN_DIR"] = request.run_dir
    try:
        match request.action:
            case "up":
                _up(request)
            case "down":
                answer(stop(folder_of(request), request.grace_s))
            case "status":
                answer(_state(request))
            case "logs":
                answer(Logs(_tails(folder_of(request), list(request.processes), request.lines)))
            case "look":
                look(request, port_troubles(request.ports), _device_problems(request.gpus), answer)
    except OSError as error:
        answer(Failed(str(error)))
    return 0


def answer(value: Answer) -> None:
    """Says it to whoever asked."""
    sys.stdout.write(f"{MARK}{msgspec.json.encode(value).decode()}\n")
    sys.stdout.flush()


# --- up -----------------------------------------------------------------------


def _up(request: Request) -> None:
    folder = folder_of(request)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            answer(Checked(["another 'pythia ssh up' of this cluster is at work here"]))
            return
        problems = [*_running_problems(folder), *_port_problems(request.ports)]
        problems += _device_problems(request.gpus)
        answer(Checked(problems))
        if problems or sys.stdin.buffer.readline(LINE_BYTES_MAX).decode().strip() != GO:
            return
        _write_files(folder, request.files)
        children = [_start(folder, *item) for item in request.processes.items()]
    while True:
        answer(_watched(request, folder, children))
        # The other side says nothing more: what can be read is the end.
        if select.select([sys.stdin], [], [], STATE_S)[0]:
            return


def _start(folder: Path, name: str, arguments: Sequence[str]) -> Child:
    token = secrets.token_hex(16)

    def start(command: Sequence[str], log: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**child_environment(), TOKEN: token},
            start_new_session=True,
        )

    child = Child(name, [sys.executable, *arguments], folder / f"{name}.log", start)
    # Dead or alive, it is our child: nobody else has got its id yet.
    identity = identify(child.pid) or ProcessIdentity(child.pid, 0)
    _write_private(folder / f"{name}.json", msgspec.json.encode(Record(identity, boot_id(), token)))
    return child


def _watched(request: Request, folder: Path, children: Sequence[Child]) -> HostState:
    states = []
    for child in children:
        child.read_announcements()
        dead = child.exit_code() is not None
        obituary = child.obituary() if dead else ""
        states.append(ProcessState(child.name, child.pid, child.announced, obituary))
    return HostState(states, str(folder), _core(request))


def _write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        if Path(name).name != name:
            raise PermissionError(f"{name!r} is no file of this folder")
        _write_private(folder / name, text.encode())


def _write_private(path: Path, content: bytes) -> None:
    """A file of this user's alone: it may hold API keys."""
    part = path.with_name(f"{path.name}.part")
    part.touch(mode=0o600)
    part.chmod(0o600)
    part.write_bytes(content)
    part.replace(path)


def _running_problems(folder: Path) -> list[str]:
    return [
        f"{name} is running already (process {record.identity.pid});"
        " 'pythia ssh down' with the same file stops it"
        for name, record in records(folder).items()
        if record.is_running()
    ]


def _port_problems(ports: Sequence[FixedPort]) -> list[str]:
    return [f"{key}: {trouble}" for key, trouble in port_troubles(ports).items()]


def port_troubles(ports: Sequence[FixedPort]) -> dict[str, str]:
    """Why nobody could listen on them, by the file's key."""
    troubles = {}
    for each in ports:
        try:
            if not port_is_free(each.host, each.port):
                troubles[each.key] = f"port {each.port} on {each.host} is in use by another program"
        except OSError as error:
            troubles[each.key] = (
                f"can't listen on {each.host}:{each.port}"
                f" ({error.strerror or error}); is that an address of this machine?"
            )
    return troubles


def _device_problems(gpus: int) -> list[str]:
    if devices.is_built_for_cpu() is None:
        return [f"vLLM is not installed for {sys.executable}"]
    found = devices.gpu_count() if gpus else 0
    if found >= gpus:
        return []
    reason = "; the installed vLLM is for CPU only" if devices.is_built_for_cpu() else ""
    return [f"GPU {gpus - 1} is asked for and there are {found}{reason}"]


# --- status and logs ----------------------------------------------------------


def records(folder: Path) -> dict[str, Record]:
    """What was started here and not stopped since, by name."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError):
            found[path.stem] = msgspec.json.decode(path.read_bytes(), type=Record)
    return found


def _state(request: Request) -> HostState:
    folder = folder_of(request)
    states = [
        ProcessState(
            name,
            record.identity.pid,
            obituary="" if record.is_running() else "is not running any more",
        )
        for name, record in records(folder).items()
    ]
    return HostState(states, str(folder), _core(request))


def _core(request: Request) -> CoreState | None:
    if not request.control_address:
        return None
    try:
        # Who asks only once had better wait a little; who watches asks again.
        timeout_s = ANSWER_S if request.action == "up" else ANSWER_ONCE_S
        snapshot = inspect(request.control_address, timeout_s)
    except Unreachable:
        return None
    return CoreState(snapshot.workers, is_ready(*request.api))


def _tails(folder: Path, names: Sequence[str], lines: int) -> dict[str, str]:
    texts = {}
    for name in names:
        try:
            with (folder / f"{name}.log").open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(0, size - TAIL_BYTES))
                text = log.read(TAIL_BYTES).decode(errors="replace")
        except FileNotFoundError:
            continue
        texts[name] = "\n".join(text.splitlines()[-lines:])
    return texts


# --- down ---------------------------------------------------------------------


def stop(folder: Path, grace_s: float) -> Stopped:
    """Ends all that was started here: SIGTERM, up to ``grace_s``, SIGKILL for what is left.

    A process is signalled only while it is the one of its record, or has its mark.
    """
    known = records(folder)
    alive = {name: record for name, record in known.items() if record.is_running()}
    # What is in their sessions now is theirs, also when they are gone themselves.
    families = {name: _family(record.identity.pid) for name, record in alive.items()}
    for record in alive.values():
        send(record.identity, signal.SIGTERM)
    deadline_s = time.monotonic() + grace_s
    while time.monotonic() < deadline_s and any(r.is_running() for r in alive.values()):
        time.sleep(POLL_S)
    killed = [name for name, record in alive.items() if record.is_running()]
    survivors: list[int] = []
    for name, record in known.items():
        survivors += _kill_rest(families.get(name, []), record.token)
        if not survivors:
            (folder / f"{name}.json").unlink(missing_ok=True)
    return Stopped([name for name in alive if name not in killed], killed, survivors)


def _family(session: int) -> list[ProcessIdentity]:
    found = (identify(pid) for pid in session_members(session))
    return [identity for identity in found if identity is not None]


def _kill_rest(family: Sequence[ProcessIdentity], token: str) -> list[int]:
    deadline_s = time.monotonic() + KILL_S
    while rest := [*filter(is_running, family), *_marked(token)]:
        if time.monotonic() > deadline_s:
            return sorted({identity.pid for identity in rest})
        for identity in rest:
            send(identity, signal.SIGKILL)
        time.sleep(POLL_S)
    return []


def _marked(token: str) -> Iterator[ProcessIdentity]:
    mark = f"{TOKEN}={token}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes().split(b"\0")
        except OSError:
            continue  # gone meanwhile, or another user's
        if mark in environment and (identity := identify(int(path.parent.name))):
            yield identity


def send(identity: ProcessIdentity, number: signal.Signals) -> None:
    """Signals that very process if it still runs; never one that has got its id since."""
    try:
        handle = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return
    try:
        # What the handle means can't change any more, so it may be looked at now.
        if is_running(identity):
            signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return
    finally:
        os.close(handle)


if __name__ == "__main__":
    raise SystemExit(main())

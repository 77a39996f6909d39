"""Processes that begin as copies of one that is ready, instead of as fresh interpreters.

::

    who asks                the original                           the copy
       |--- Start, files ------>|                                     |
       |                        |--- fork --- go-between --- fork --->| its session, its title
       |                        |                 |                   |
       |                        |               ends                  |
       |<------ Started --------|                                     |
       |                        |----------------- go --------------->| its files, runs

A copy is a child of who asked, not of the original: when the go-between ends, the kernel
hands its child to the nearest ancestor that adopts orphans, and who asks is one while it
asks. So it is watched, waited for and ended like any other child, and dies with its parent.

The original forks only while it has a single thread: a lock that another thread holds would
stay locked in the copy for ever. What it can't do it refuses; the caller then starts a fresh
interpreter. It knows nothing of what it has imported.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from cluster.process import die_with_parent

MESSAGE_BYTES_MAX = 64 * 1024
FILES_MAX = 8
FILES_FROM = 200
"""Files that came along wait from this number on until they get their own."""
ANSWER_S = 30.0
POLL_S = 0.02
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37


class Start(msgspec.Struct, frozen=True, tag=True):
    """Run ``module`` as ``python -m`` does. ``files``: the numbers of the files that come along."""

    module: str
    arguments: list[str]
    files: list[int]
    parent_pid: int
    own_session: bool


class Started(msgspec.Struct, frozen=True, tag=True):
    """The copy exists and is the asker's child."""

    pid: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """There is no copy."""

    reason: str


class CanNotFork(Exception):
    """The original is gone, or refused: start a fresh interpreter."""


class Forked:
    """A child that was forked: the part of ``subprocess.Popen`` that is needed of it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal's; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end. ``subprocess.TimeoutExpired`` after ``timeout`` seconds."""
        deadline_s = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline_s is not None and time.monotonic() > deadline_s:
                assert timeout is not None
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(POLL_S)
        return code

    def terminate(self) -> None:
        """Asks it to end."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it."""
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Original:
    """The original as who asks sees it, which has to be one of its ancestors."""

    def __init__(self, connection: socket.socket, *, own_session: bool) -> None:
        self.connection = connection
        self.own_session = own_session
        connection.settimeout(ANSWER_S)

    def start(self, command: Sequence[str], files: Mapping[int, int]) -> Forked:
        """A copy that does what ``command``, a ``python -m``, would do. ``CanNotFork``.

        ``files``: which number each open file of ours has in the copy. Like any child it
        must be started from a thread that lives as long as this process.
        """
        if list(command[:2]) != [sys.executable, "-m"]:
            raise CanNotFork(f"{command[0]} is no module of this Python")
        start = Start(command[2], [*command[3:]], [*files], os.getpid(), self.own_session)
        try:
            with _adopting_orphans():
                socket.send_fds(self.connection, [msgspec.json.encode(start)], [*files.values()])
                frame = self.connection.recv(MESSAGE_BYTES_MAX)
        except OSError as error:
            raise CanNotFork(f"the process to fork does not answer: {error}") from error
        if not frame:
            raise CanNotFork("the process to fork is gone")
        answer = msgspec.json.decode(frame, type=Started | Refused)
        if isinstance(answer, Refused):
            raise CanNotFork(answer.reason)
        return Forked(answer.pid)

    def close(self) -> None:
        """The original ends when it sees that."""
        self.connection.close()


def pair() -> tuple[socket.socket, socket.socket]:
    """The connection between who asks and the original."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def split_off() -> Original:
    """Forks this process as it is now: an original whose copies are this process's children.

    They stay in its session and process group.
    """
    parent_pid = os.getpid()
    ours, theirs = pair()
    if os.fork() == 0:
        ours.close()
        die_with_parent(parent_pid)
        serve(theirs)
    theirs.close()
    return Original(ours, own_session=False)


def serve(connection: socket.socket) -> NoReturn:
    """Forks whenever it is asked to and ends when the other side is gone."""
    gc.collect()
    gc.freeze()  # the collector of a copy would touch, and so duplicate, all of this memory
    while True:
        frame, files, _, _ = socket.recv_fds(connection, MESSAGE_BYTES_MAX, FILES_MAX)
        if not frame:
            os._exit(0)
        start = msgspec.json.decode(frame, type=Start)
        threads = len(os.listdir("/proc/self/task"))
        if threads > 1:
            answer: Started | Refused = Refused(f"the process to fork has {threads} threads")
        else:
            answer = _fork(connection, start, files)
        for number in files:
            os.close(number)
        connection.send(msgspec.json.encode(answer))


def _fork(connection: socket.socket, start: Start, files: list[int]) -> Started | Refused:
    """Makes the copy, which does not return from here."""
    go_reading, go_writing = os.pipe()
    pid_reading, pid_writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        go_between = os.fork()
    except OSError as error:
        return Refused(f"fork: {error}")
    if go_between == 0:
        if _fork_or_end():
            os._exit(0)
        if start.own_session:
            os.setsid()
        os.write(pid_writing, str(os.getpid()).encode())
        for number in (pid_reading, pid_writing, go_writing):
            os.close(number)
        connection.close()
        went = os.read(go_reading, 1)
        os.close(go_reading)
        if not went:
            os._exit(1)
        _become(start, files)
    for number in (pid_writing, go_reading):
        os.close(number)
    pid = os.read(pid_reading, 32)
    os.close(pid_reading)
    # Only when it has been waited for is its child handed up for certain.
    os.waitpid(go_between, 0)
    with contextlib.suppress(BrokenPipeError):
        os.write(go_writing, b"g")
    os.close(go_writing)
    return Started(int(pid)) if pid else Refused("fork: the copy could not be made")


def _fork_or_end() -> int:
    try:
        return os.fork()
    except OSError:
        os._exit(1)


def _become(start: Start, files: list[int]) -> NoReturn:
    """In the copy: becomes a process of its own, runs the module, ends."""
    die_with_parent(start.parent_pid)
    waiting = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, FILES_FROM) for number in files]
    for number in files:
        os.close(number)
    for number, wanted in zip(waiting, start.files, strict=True):
        os.dup2(number, wanted)
        os.close(number)
    _forget_the_original(start)
    sys.argv = [start.module, *start.arguments]
    code: object = 0
    try:
        runpy.run_module(start.module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001  (whatever it is ends this process, as anywhere else)
        traceback.print_exc()
        code = 1
    _leave(code)


def _leave(code: object) -> NoReturn:
    """Ends as Python does, but for taking the interpreter apart.

    That would touch, and so duplicate, all memory that is shared with the original.
    """
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _forget_the_original(start: Start) -> None:
    """What a fork has in common with its siblings and a fresh process would have alone.

    Python itself sees to the generator of ``random``, to locks and to process ids.
    """
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    with contextlib.suppress(ImportError):
        from setproctitle import setproctitle

        setproctitle(" ".join([sys.executable, "-m", start.module, *start.arguments]))


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    """While it lasts, children of a descendant that ends become children of this process."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    before = ctypes.c_int(0)
    prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    if prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


def connection_on_stdin() -> socket.socket:
    """The connection of a process that was given it as standard input, which is then empty."""
    connection = socket.socket(fileno=os.dup(0))
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    return connection

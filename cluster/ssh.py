"""Talking to the hosts of a cluster through the system's ``ssh`` client.

``Connection`` runs ``cluster.remote`` on a host and hands over its answers; ``ask`` is for a
single one. Whatever goes wrong is an ``SshError`` that names the host. Keys, user names, ports
and jump hosts are what the user's own ``ssh`` configuration says.
"""

from __future__ import annotations

import queue
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec

from cluster.failure import CommandFailure
from cluster.hosts import Answer, Failed, Request
from cluster.remote import GO, LINE_BYTES_MAX, MARK
from cluster.schema import ConfigError

CONNECT_S = 10
ALIVE_S = 5
"""How often a silent host is asked if it is still there; it may miss three."""
UNREACHABLE = 255
"""What ``ssh`` exits with when it is to blame itself."""
COMPLAINT_BYTES = 4096

_DESTINATION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@%+-]*")


class SshError(CommandFailure):
    """A host can't be reached or can't do what it is asked; the message names it."""


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """How hosts are reached, and where Pythia is on them.

    ``destinations``: what ``ssh`` calls a host of the file, where that is something else;
    ``config``: a configuration file of ``ssh``; ``python`` and ``root``: the interpreter and
    the folder of Pythia's packages, the same on every host; ``local``: hosts that are this
    machine and need no ``ssh``.
    """

    python: str
    root: str
    destinations: dict[str, str] = {}
    config: str | None = None
    local: frozenset[str] = frozenset()

    def command(self, host: str) -> list[str]:
        """The command line that runs ``cluster.remote`` there."""
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": CONNECT_S,
            "ServerAliveInterval": ALIVE_S,
            "ServerAliveCountMax": 3,
        }
        words = [f"-o{name}={value}" for name, value in options.items()]
        words += ["-F", self.config] if self.config is not None else []
        remote = f"cd {shlex.quote(self.root)} && exec {shlex.quote(self.python)} -m cluster.remote"
        if host in self.local:
            return ["sh", "-c", remote]
        return ["ssh", "-T", *words, "--", self.destinations.get(host, host), remote]


def destinations(text: str | None, hosts: Mapping[str, object] | list[str]) -> dict[str, str]:
    """``10.0.0.1=user@node1,10.0.0.2=node2`` as a dictionary. ConfigError with all problems."""
    found: dict[str, str] = {}
    problems = []
    for item in filter(None, (text or "").split(",")):
        host, equals, destination = (part.strip() for part in item.partition("="))
        if not equals or not _DESTINATION.fullmatch(destination):
            problems.append(f"--hosts: {item!r} is not HOST=DESTINATION, a destination of ssh")
        elif host not in hosts:
            known = ", ".join(hosts)
            problems.append(f"--hosts: {host!r} is no host of the file; there are: {known}")
        elif host in found:
            problems.append(f"--hosts: {host!r} is given twice")
        found[host] = destination
    if problems:
        raise ConfigError(problems)
    return found


class Closed(msgspec.Struct, frozen=True):
    """The connection is over, and why in words."""

    reason: str


class Connection:
    """A host that is being talked to. What it says goes into ``answers`` with its name."""

    def __init__(
        self,
        way: Way,
        request: Request,
        answers: queue.SimpleQueue[tuple[str, Answer | Closed]],
    ) -> None:
        """Connects, without waiting for it. SshError if there is no ``ssh`` here."""
        self.host = request.host
        self._answers = answers
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115, closed with the connection
        try:
            self._ssh = subprocess.Popen(
                way.command(request.host),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                start_new_session=True,  # Ctrl-C is for us: what runs there is stopped in order
            )
        except FileNotFoundError as error:
            self._complaints.close()
            raise SshError("there is no 'ssh' program on this machine") from error
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._say(msgspec.json.encode(request).decode())

    def go(self) -> None:
        """Lets the host start what it has checked."""
        self._say(GO)

    def say(self, line: str) -> None:
        """Tells the host a line; whether it is still there, its answers say."""
        self._say(line)

    def close(self) -> None:
        """Ends the connection; what was started there goes on."""
        self._ssh.terminate()
        self._ssh.wait()
        self._reader.join()
        for pipe in (self._ssh.stdin, self._ssh.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue  # what was still to be said has no listener any more
        self._complaints.close()

    def _say(self, line: str) -> None:
        assert self._ssh.stdin is not None
        try:
            self._ssh.stdin.write(f"{line}\n".encode())
            self._ssh.stdin.flush()
        except BrokenPipeError:
            return  # the reader tells why

    def _read(self) -> None:
        assert self._ssh.stdout is not None
        mark = MARK.encode()
        while line := self._ssh.stdout.readline(LINE_BYTES_MAX):
            if line.startswith(mark):
                try:
                    answer: Answer = msgspec.json.decode(line[len(mark) :], type=Answer)
                except msgspec.MsgspecError as error:
                    answer = Failed(f"says something else than this version expects: {error}")
                self._answers.put((self.host, answer))
        self._answers.put((self.host, Closed(self._epitaph(self._ssh.wait()))))

    def _epitaph(self, code: int) -> str:
        self._complaints.seek(0)
        said = self._complaints.read(COMPLAINT_BYTES).decode(errors="replace").strip()
        last = said.splitlines()[-1] if said else ""
        if code == UNREACHABLE:
            return f"can't be reached over ssh: {last or 'no reason given'}"
        if code in (1, 126, 127) and said:
            return f"Pythia can't be run there: {last}"
        return f"the connection ended with code {code}" + (f": {last}" if last else "")


def ask(way: Way, request: Request, timeout_s: float) -> Answer:
    """The one answer of one host. SshError if there is none within ``timeout_s``."""
    answers: queue.SimpleQueue[tuple[str, Answer | Closed]] = queue.SimpleQueue()
    connection = Connection(way, request, answers)
    try:
        _, answer = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise SshError(f"{request.host}: no answer within {timeout_s:.0f} s") from None
    finally:
        connection.close()
    if isinstance(answer, Closed | Failed):
        raise SshError(f"{request.host}: {answer.reason}")
    return answer


def this_installation() -> tuple[str, str]:
    """The interpreter that runs this, and the folder of Pythia's packages."""
    return sys.executable, str(Path(__file__).resolve().parent.parent)

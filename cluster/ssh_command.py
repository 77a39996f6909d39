"""``pythia ssh up``, ``down``, ``status`` and ``logs``: a cluster over several hosts.

Nothing is started before every host has been reached and has found its ports free; what
goes wrong after that stops everything that was started. Processes belong to their hosts:
they stay when this program, or its connection, goes.
"""

from __future__ import annotations

import queue
import shlex
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
from rich.console import Console

from cluster.hosts import (
    Answer,
    Checked,
    CoreState,
    Failed,
    HostState,
    Logs,
    ProcessState,
    Request,
    Stopped,
)
from cluster.launch import COORDINATOR, LaunchError, PreflightError, worker_phase
from cluster.progress import READY, Progress, Row, progress_for
from cluster.schema import ClusterConfig
from cluster.ssh import Closed, Connection, SshError, Way, ask
from cluster.supervise import INTERRUPTED, Signals, say
from cluster.supervise import Stopped as Interrupted

CHECK_S = 60.0
"""How long a host may take to be reached and looked at."""
REFRESH_S = 0.25
SILENT_S = 30.0
"""A host that says nothing for so long is taken for lost."""
ANSWER_S = 30.0
STOP_SPARE_S = 30.0
AT_ONCE = 64

Answers = queue.SimpleQueue[tuple[str, Answer | Closed]]


def describe(requests: Sequence[Request], way: Way, console: Console) -> int:
    """What ``--dry-run`` shows: every host, its command line and what it is told. Returns 0."""
    for request in requests:
        say(console, f"{request.host}: {shlex.join(way.command(request.host))}")
        for name in request.files:
            say(console, f"  writes {name}")
        for each in request.ports:
            if each.port:
                say(console, f"  needs port {each.port} of {each.host} ({each.key})")
        for name, arguments in request.processes.items():
            what = shlex.join([way.python, *arguments]) if request.action == "up" else name
            say(console, f"  {request.action} {what}")
            if name in request.addresses:
                say(console, f"    {request.addresses[name]}")
    return 0


# --- up -----------------------------------------------------------------------


def up(config: ClusterConfig, requests: Sequence[Request], way: Way, console: Console) -> int:
    """Starts all, waits until all is ready. Returns 0, or 130 after a signal.

    PreflightError if nothing could be started; LaunchError if something went wrong after that,
    when all that was started has been stopped.
    """
    begun = Start(config, requests, way, progress_for(console))
    with Signals() as signals:
        try:
            begun.check()
            begun.go()
            begun.wait()
        except BaseException as error:
            signals.defer()
            begun.close()
            if isinstance(error, Interrupted):
                say(console, f"{error}: stopping {config.name}")
            if begun.is_started:
                _stop_after_failure(requests, way, console)
            if isinstance(error, Interrupted):
                return INTERRUPTED
            raise
        finally:
            begun.close()
    say(console, f"{config.name} is ready: {config.base_url}/v1 serves {config.served_name}")
    say(console, "it stays up; 'pythia ssh down' with the same file stops it")
    return 0


class Start:
    """One attempt to start a cluster: a connection to every host, and what they say."""

    def __init__(
        self, config: ClusterConfig, requests: Sequence[Request], way: Way, progress: Progress
    ) -> None:
        self._config = config
        self._requests = requests
        self._way = way
        self._progress = progress
        self._answers: Answers = queue.SimpleQueue()
        self._connections: list[Connection] = []
        self._states: dict[str, HostState] = {}
        self._core: CoreState | None = None
        self._heard_s: dict[str, float] = {}
        self._phases: dict[str, tuple[str, float]] = {}
        self._started_s = time.monotonic()
        self.is_started = False

    def check(self) -> None:
        """Reaches every host and has it look around. PreflightError with all that is wrong."""
        for request in self._requests:
            self._connections.append(Connection(self._way, request, self._answers))
        waiting = {request.host for request in self._requests}
        refusing: set[str] = set()
        problems = []
        while waiting:
            self._show(dict.fromkeys(waiting, "being reached"))
            if time.monotonic() - self._started_s > CHECK_S:
                problems += [f"{host}: no answer within {CHECK_S:.0f} s" for host in waiting]
                break
            for host, answer in self._news():
                # A host that has refused goes; one that has agreed must not.
                if host not in refusing:
                    found = [f"{host}: {problem}" for problem in _refusals(answer)]
                    refusing |= {host} if found else set()
                    problems += found
                waiting.discard(host)
        if problems:
            raise PreflightError("\n".join(problems))

    def go(self) -> None:
        """Lets every host start its processes."""
        self.is_started = True
        for connection in self._connections:
            self._heard_s[connection.host] = time.monotonic()
            connection.go()

    def wait(self) -> None:
        """Until the core answers, the API serves and all workers are warm. LaunchError if not."""
        while not all(row.phase == READY for row in self._show({})):
            for host, answer in self._news():
                self._take_in(host, answer)
            now_s = time.monotonic()
            for host, heard_s in self._heard_s.items():
                if now_s - heard_s > SILENT_S:
                    raise LaunchError(f"{host}: has said nothing for {SILENT_S:.0f} s")
            if now_s - self._started_s > self._config.start.timeout_s:
                rows = [row for row in self._show({}) if row.phase != READY]
                late = "; ".join(f"{row.label}: {row.phase}" for row in rows)
                raise LaunchError(f"not ready within {self._config.start.timeout_s:.0f} s ({late})")

    def close(self) -> None:
        """Ends the connections. May be called again."""
        self._progress.close()
        while self._connections:
            self._connections.pop().close()

    def _news(self) -> list[tuple[str, Answer | Closed]]:
        try:
            news = [self._answers.get(timeout=REFRESH_S)]
        except queue.Empty:
            return []
        while not self._answers.empty():
            news.append(self._answers.get())
        return news

    def _take_in(self, host: str, answer: Answer | Closed) -> None:
        if not isinstance(answer, HostState):
            reasons = _refusals(answer) or ["says something unexpected"]
            raise LaunchError(f"{host}: {reasons[0]}")
        self._heard_s[host] = time.monotonic()
        self._states[host] = answer
        # Once it has spoken it will again; on a busy machine that may take a while.
        self._core = answer.core or self._core
        if dead := [each.obituary for each in answer.processes if each.obituary]:
            raise LaunchError("\n\n".join(f"{host}: {obituary}" for obituary in dead))

    def _show(self, hosts: Mapping[str, str]) -> list[Row]:
        """Shows all processes, or these hosts, as they are now; returns what is shown."""
        phases = {f"host {host}": phase for host, phase in hosts.items()} or self._process_phases()
        now_s = time.monotonic()
        rows = []
        for label, phase in phases.items():
            if self._phases.get(label, ("", 0.0))[0] != phase:
                self._phases[label] = (phase, now_s)
            rows.append(Row(label, phase, now_s - self._phases[label][1]))
        self._progress.show(rows, now_s - self._started_s)
        return rows

    def _process_phases(self) -> dict[str, str]:
        phases = {}
        for request in self._requests:
            state = self._states.get(request.host)
            known = {each.name: each for each in state.processes} if state else {}
            for name in request.processes:
                label = name if name == COORDINATOR else f"worker {name}"
                phase = process_phase(name, known.get(name), self._core, len(self._config.workers))
                phases[f"{label} on {request.host}"] = phase
        return phases


def process_phase(
    name: str, process: ProcessState | None, core: CoreState | None, workers: int
) -> str:
    """How far a process's start is, in words; ``READY`` when nothing is missing."""
    if process is None:
        return "starting"
    if name == COORDINATOR:
        if core is None:
            return process.announced or "starting"
        return READY if core.api_ready else f"core is up, API: {process.announced or 'starting'}"
    known = {row.worker: row for row in core.workers} if core else {}
    return worker_phase(known.get(name), process.announced, known.keys(), workers)


def _refusals(answer: Answer | Closed) -> list[str]:
    if isinstance(answer, Closed | Failed):
        return [answer.reason]
    return answer.problems if isinstance(answer, Checked) else []


def _stop_after_failure(requests: Sequence[Request], way: Way, console: Console) -> None:
    say(console, "stopping what was started")
    stop_requests = [msgspec.structs.replace(each, action="down") for each in requests]
    for line in _stop(stop_requests, way)[0]:
        say(console, line)


# --- down, status, logs -------------------------------------------------------


def down(requests: Sequence[Request], way: Way, console: Console) -> int:
    """Stops all on every host that can be reached, and says what. Returns 1 if one can't."""
    lines, complete = _stop(requests, way)
    for line in lines:
        say(console, line)
    return 0 if complete else 1


def _stop(requests: Sequence[Request], way: Way) -> tuple[list[str], bool]:
    lines = []
    complete = True
    patience_s = max(request.grace_s for request in requests) + STOP_SPARE_S
    for host, answer in _ask_all(requests, way, patience_s):
        if not isinstance(answer, Stopped):
            lines.append(str(answer))
            complete = False
            continue
        parts = [f"stopped {', '.join(answer.ended)}"] if answer.ended else []
        parts += [f"killed {', '.join(answer.killed)}"] if answer.killed else []
        if answer.survivors:
            complete = False
            parts.append(f"processes that can't be killed: {answer.survivors}")
        lines.append(f"{host}: {'; '.join(parts) or 'nothing was running'}")
    return lines, complete


def status(requests: Sequence[Request], way: Way, console: Console) -> int:
    """Shows every host's processes. Returns 1 if something is missing or does not answer."""
    fine = True
    answers = _ask_all(requests, way, ANSWER_S)
    cores = [answer.core for _, answer in answers if isinstance(answer, HostState) and answer.core]
    core = cores[0] if cores else None
    workers = sum(name != COORDINATOR for request in requests for name in request.processes)
    for request, (host, answer) in zip(requests, answers, strict=True):
        if not isinstance(answer, HostState):
            say(console, str(answer))
            fine = False
            continue
        known = {each.name: each for each in answer.processes}
        for name in request.processes:
            line, ok = _status_line(name, known.get(name), core, workers)
            say(console, f"{host}: {line}")
            fine = fine and ok
    if core is None:
        say(console, "the coordinator does not answer")
    return 0 if fine and core is not None else 1


def _status_line(
    name: str, process: ProcessState | None, core: CoreState | None, workers: int
) -> tuple[str, bool]:
    if process is None:
        return f"{name} is not running", False
    if process.obituary:
        return f"{name} (process {process.pid}) {process.obituary}", False
    phase = process_phase(name, process, core, workers) if core else "is running"
    return f"{name} (process {process.pid}) {phase}", True


def logs(requests: Sequence[Request], way: Way, console: Console) -> int:
    """Prints the end of every process's log. Returns 1 if a host can't be reached."""
    fine = True
    for host, answer in _ask_all(requests, way, ANSWER_S):
        if not isinstance(answer, Logs):
            say(console, str(answer))
            fine = False
            continue
        for name, text in answer.texts.items():
            say(console, f"==> {host}: {name} <==\n{text}")
    return 0 if fine else 1


def _ask_all(
    requests: Sequence[Request], way: Way, timeout_s: float
) -> list[tuple[str, Answer | SshError]]:
    """Every host's answer, or what is wrong with it, in the order of ``requests``."""

    def one(request: Request) -> tuple[str, Answer | SshError]:
        try:
            return request.host, ask(way, request, timeout_s)
        except SshError as error:
            return request.host, error

    with ThreadPoolExecutor(min(AT_ONCE, len(requests))) as pool:
        return list(pool.map(one, requests))

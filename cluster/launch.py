"""A whole cluster on this machine as real processes: started, ready, stopped.

``LocalCluster`` starts one coordinator and the file's workers, each with a log of its
own, waits until the API is ready and every pair of workers is warm, and ends them all.
If anything fails on the way, it says which process and shows the end of its log. It
starts nothing on other hosts and restarts nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType

import msgspec

from cluster import devices
from cluster.child import STOP_S, Child, StartProcess, start_guarded, stop_all
from cluster.config import load
from cluster.document import dump
from cluster.process import free_port, port_is_free
from cluster.progress import READY, NoProgress, Progress, Row
from cluster.schema import ClusterConfig, reachable
from cluster.status import Unreachable, inspect
from cluster.template import TEMPLATE, Template, shared_environment
from coordinator.protocol import Snapshot, WorkerStatus

POLL_S = 0.25
ANSWER_S = 1.0
COORDINATOR = "coordinator"
STORE_NAME = "workflows.sqlite"

CommandOf = Callable[[str, Path], list[str]]
"""The command line of a process, from its name and the cluster's file. For ``TEMPLATE`` it
may be empty: nothing is forked then."""


class LaunchError(Exception):
    """The cluster could not be started; the message is for the person who tried."""


class PreflightError(LaunchError):
    """Nothing was started: the configuration does not fit this machine as it is now."""


def process_command(name: str, config_path: Path) -> list[str]:
    """How the coordinator, a worker or what they are forked from is started."""
    if name == TEMPLATE:
        return [sys.executable, "-m", "cluster.template", load(config_path).model]
    python = [sys.executable, "-m", "cluster"]
    if name == COORDINATOR:
        return [*python, "coordinator", str(config_path)]
    return [*python, "worker", "--config", str(config_path), "--name", name]


def with_store(config: ClusterConfig, directory: Path) -> ClusterConfig:
    """The cluster with a store in this directory, unless its file names one or wants none."""
    if config.coordinator.store is not None:
        return config
    store = str((directory / STORE_NAME).absolute())
    coordinator = msgspec.structs.replace(config.coordinator, store=store)
    return msgspec.structs.replace(config, coordinator=coordinator)


def run_directory(cluster_name: str) -> Path:
    """Where a cluster's logs and records are: ``$PYTHIA_RUN_DIR`` or in the user's cache."""
    base = os.environ.get("PYTHIA_RUN_DIR") or Path.home() / ".cache" / "pythia" / "run"
    return Path(base).absolute() / cluster_name


class LocalCluster:
    """A cluster of this machine; a context manager that is ready inside its block.

    ``config``'s ports of 0 for the core and the API are replaced by free ones. Start it
    from a thread that lives as long as the program: its processes end with that thread.
    ``fits`` finds out before the start why it could not work, ``preflight`` if not given.
    ``LaunchError`` when it can't be started.
    """

    def __init__(
        self,
        config: ClusterConfig,
        log_dir: Path | None = None,
        *,
        progress: Progress | None = None,
        command_of: CommandOf = process_command,
        fits: Callable[[ClusterConfig], None] | None = None,
    ) -> None:
        self.log_dir = log_dir or run_directory(config.name)
        self.config = with_store(with_free_ports(config), self.log_dir)
        self._progress = progress or NoProgress()
        self._command_of = command_of
        self._fits = fits or preflight
        self._children: list[Child] = []
        self._template: Template | None = None
        self._phases: dict[str, tuple[str, float]] = {}
        self._seen: Snapshot | None = None

    @property
    def base_url(self) -> str:
        """Where the API is, without ``/v1``."""
        return self.config.base_url

    @property
    def control_address(self) -> str:
        """Where the core is."""
        return self.config.control_address

    @property
    def processes(self) -> dict[str, int]:
        """Process ids by name: ``coordinator`` and the workers."""
        return {child.name: child.pid for child in self._children}

    @property
    def workers(self) -> dict[str, int]:
        """Process ids of the workers by name."""
        return {name: pid for name, pid in self.processes.items() if name != COORDINATOR}

    def snapshot(self, timeout_s: float = 5.0) -> Snapshot:
        """What the core sees now; ``Unreachable`` if it does not answer."""
        return inspect(self.control_address, timeout_s)

    def log_path(self, name: str) -> Path:
        """The log of the coordinator or of a worker."""
        return self.log_dir / f"{name}.log"

    def dead(self) -> list[Child]:
        """The processes that have ended by themselves."""
        template = [self._template.child] if self._template else []
        return [each for each in [*template, *self._children] if each.exit_code() is not None]

    def __enter__(self) -> LocalCluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts everything and waits until it is ready. On an error, call ``stop``."""
        assert not self._children, "started already"
        self._fits(self.config)
        started_s = time.monotonic()
        model = self._resolved_model(started_s)
        config_path = self._write_config(model)
        try:
            self._start_processes(config_path, model, started_s)
            self._wait(started_s, lambda rows: all(row.phase == READY for row in rows))
        finally:
            self._progress.close()

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Ends all processes and makes sure that none is left. ``hurry``: see ``stop_all``."""
        self._progress.close()
        self._end_template()
        stop_all(self._children, hurry, STOP_S + self.config.stop.drain_s)
        self._children.clear()

    def _resolved_model(self, started_s: float) -> str:
        from cluster.model import resolve
        from cluster.model_folder import ModelError

        def report(step: str, done: int, total: int) -> None:
            elapsed_s = time.monotonic() - started_s
            self._progress.show([Row(f"model {self.config.model}", step, elapsed_s)], elapsed_s)

        try:
            return resolve(self.config.model, report)
        except ModelError as error:
            raise LaunchError(f"model {self.config.model}: {error}") from error

    def _write_config(self, model: str) -> Path:
        """The file that the processes read: all chosen, nothing left to prepare."""
        resolved = msgspec.structs.replace(
            self.config, model=model, served_model_name=self.config.served_name
        )
        self.log_dir.mkdir(parents=True, exist_ok=True)
        path = self.log_dir / "cluster.yaml"
        # It may hold API keys.
        path.touch(mode=0o600)
        path.chmod(0o600)
        path.write_text(dump(resolved), encoding="utf-8")
        return path

    def _start_processes(self, config_path: Path, model: str, started_s: float) -> None:
        environment, sharers = shared_environment(self.config, model, COORDINATOR)
        if sharers and (command := self._command_of(TEMPLATE, config_path)):
            self._template = Template(command, self.log_path(TEMPLATE), environment)
        for name in self._names:
            if self._template is None or name not in sharers:
                self._start_process(name, config_path, start_guarded)
        if (template := self._template) is not None:
            self._wait(started_s, lambda rows: template.is_ready())
            for name in sharers:
                self._start_process(name, config_path, template.start)
            self._end_template()

    def _start_process(self, name: str, config_path: Path, start: StartProcess) -> None:
        command = self._command_of(name, config_path)
        self._children.append(Child(name, command, self.log_path(name), start))

    def _end_template(self) -> None:
        if self._template is not None:
            self._template.stop()
            self._template = None

    @property
    def _names(self) -> list[str]:
        return [COORDINATOR, *(entry.name for entry in self.config.workers)]

    def _wait(self, started_s: float, ready: Callable[[list[Row]], bool]) -> None:
        while True:
            rows = self._rows(started_s)
            elapsed_s = time.monotonic() - started_s
            self._progress.show(rows, elapsed_s)
            if dead := self.dead():
                raise LaunchError("\n\n".join(child.obituary() for child in dead))
            if ready(rows):
                return
            if elapsed_s > self.config.start.timeout_s:
                late = "; ".join(f"{row.label}: {row.phase}" for row in rows if row.phase != READY)
                raise LaunchError(
                    f"not ready within {self.config.start.timeout_s:.0f} s ({late});"
                    f" logs are in {self.log_dir}"
                )
            time.sleep(POLL_S)

    def _rows(self, started_s: float) -> list[Row]:
        with contextlib.suppress(Unreachable):
            # Once it has spoken it will again; on a busy machine that may take a while.
            self._seen = inspect(self.control_address, ANSWER_S if self._seen else POLL_S)
        snapshot = self._seen
        workers = {row.worker: row for row in snapshot.workers} if snapshot else {}
        now_s = time.monotonic()
        children = {child.name: child for child in self._children}
        rows = []
        for name in self._names:
            label = COORDINATOR if name == COORDINATOR else f"worker {name}"
            phase = self._phase(children.get(name), name, workers, snapshot)
            if self._phases.get(name, ("", 0.0))[0] != phase:
                self._phases[name] = (phase, now_s)
            rows.append(Row(label, phase, now_s - self._phases[name][1]))
        return rows

    def _phase(
        self,
        child: Child | None,
        name: str,
        workers: dict[str, WorkerStatus],
        snapshot: Snapshot | None,
    ) -> str:
        child = child or (self._template.child if self._template else None)
        if child is None:
            return "starting"
        child.read_announcements()
        if child.name == COORDINATOR:
            return self._coordinator_phase(child, snapshot)
        return worker_phase(workers.get(name), child.announced, workers, len(self.config.workers))

    def _coordinator_phase(self, child: Child, snapshot: Snapshot | None) -> str:
        if snapshot is None:
            return child.announced or "starting"
        if is_ready(reachable(self.config.api.host), self.config.api.port):
            return READY
        return f"core is up, API: {child.announced or 'starting'}"


def worker_phase(
    status: WorkerStatus | None, announced: str, known: Collection[str], expected: int
) -> str:
    """How far a worker's start is, in words; ``READY`` when nothing is missing.

    ``status``: what the core says of it; ``announced``: what its log does; ``known``: the
    workers that the core knows, of which there will be ``expected``.
    """
    if status is None:
        return announced or "starting"
    if status.state != "up" or status.warm_peers < status.peers:
        return f"{status.state}, {status.warm_peers} of {status.peers} pairs warm"
    return READY if len(known) >= expected else "up, waits for the others"


def is_ready(host: str, port: int) -> bool:
    """True if the API there answers ``/ready`` with 200."""
    connection = http.client.HTTPConnection(host, port, timeout=ANSWER_S)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (http.client.HTTPException, OSError):
        return False
    finally:
        connection.close()


def with_free_ports(config: ClusterConfig) -> ClusterConfig:
    """The same cluster with ports for the core and the API where they were left open."""
    coordinator, api = config.coordinator, config.api
    taken = {port for _, _, port in fixed_ports(config)}
    if not coordinator.port:
        port = free_port(coordinator.host, taken)
        coordinator = msgspec.structs.replace(coordinator, port=port)
    if not api.port:
        api = msgspec.structs.replace(api, port=free_port(api.host, taken))
    return msgspec.structs.replace(config, coordinator=coordinator, api=api)


def preflight(config: ClusterConfig) -> None:
    """Finds out before anything is started why it could not work. PreflightError with all."""
    problems = []
    for key, host, port in fixed_ports(config):
        try:
            if not port_is_free(host, port):
                problems.append(f"{key}: port {port} on {host} is in use by another program")
        except OSError as error:
            problems.append(
                f"{key}: can't listen on {host}:{port} ({error.strerror or error});"
                " what runs on another host is started there, with 'pythia worker'"
            )
    problems += _device_problems(config)
    if problems:
        raise PreflightError("\n".join(problems))


def fixed_ports(config: ClusterConfig) -> list[tuple[str, str, int]]:
    """Key, host and port of everything that the file has listen at a port of its choice."""
    wanted = [
        ("coordinator.port", config.coordinator.host, config.coordinator.port),
        ("api.port", config.api.host, config.api.port),
    ]
    base = config.network.side_channel_port_base
    for index, entry in enumerate(config.workers):
        here = f"workers[{index}]"
        # Port 0 proves that the host is this machine.
        wanted.append((f"{here}.data_port", entry.host, entry.data_port))
        if entry.metrics_port:
            wanted.append((f"{here}.metrics_port", entry.host, entry.metrics_port))
        if entry.health_port:
            wanted.append((f"{here}.health_port", entry.host, entry.health_port))
        if base:
            wanted.append(("network.side_channel_port_base", entry.host, base + index))
    return wanted


def _device_problems(config: ClusterConfig) -> list[str]:
    """GPUs for a vLLM that was built without, and the other way round."""
    built_for_cpu = devices.is_built_for_cpu()
    if built_for_cpu is None:
        return []
    problems = []
    for index, entry in enumerate(config.workers):
        if entry.devices and built_for_cpu:
            problems.append(f"workers[{index}].devices: the installed vLLM is for CPU only")
        if not entry.devices and not built_for_cpu:
            problems.append(
                f"workers[{index}].devices: the installed vLLM is for GPUs; say which to use"
            )
    return problems

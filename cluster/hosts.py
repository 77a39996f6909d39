"""Which process of a cluster file belongs on which host, and what each host is told.

Pure. The requests and answers here are all that is said between whoever starts a cluster
(``cluster.ssh_command``) and its hosts (``cluster.remote``): one JSON object a line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from cluster.document import dump
from cluster.launch import COORDINATOR, CommandOf, fixed_ports, process_command
from cluster.schema import ClusterConfig, ConfigError, reachable
from coordinator.protocol import HostFacts, WorkerStatus

CONFIG_NAME = "cluster.yaml"
GRACE_S = 20.0
"""How long processes may take to end on SIGTERM before they are killed, when they have drained."""
LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))
EVERYWHERE = frozenset(("0.0.0.0", "::"))

Action = Literal["up", "down", "status", "logs", "look"]


class FixedPort(msgspec.Struct, frozen=True):
    """A port that must be free before the start, and the file's key that says so."""

    key: str
    host: str
    port: int


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What one host is asked. ``host`` is the file's name for it.

    ``processes``: arguments of Python by process; ``files``: texts by name, for their folder;
    ``gpus``: how many there must be; ``control_address`` and ``api``: where the core and the
    API are, for their own host only; ``run_dir`` empty for the user's cache; ``lines`` of
    each log.
    """

    action: Action
    cluster: str
    host: str
    processes: dict[str, list[str]]
    files: dict[str, str] = {}
    ports: list[FixedPort] = []
    gpus: int = 0
    control_address: str = ""
    api: tuple[str, int] = ("", 0)
    run_dir: str = ""
    grace_s: float = GRACE_S
    lines: int = 0
    addresses: dict[str, str] = {}
    """Where others find each worker, in words; for who only wants to know."""


class ProcessState(msgspec.Struct, frozen=True):
    """A process as its host sees it: ``announced`` is what it is doing, ``obituary`` how it
    ended and the end of its log, empty while it runs."""

    name: str
    pid: int
    announced: str = ""
    obituary: str = ""


class CoreState(msgspec.Struct, frozen=True):
    """What the core says, asked on its own host."""

    workers: list[WorkerStatus]
    api_ready: bool


class Checked(msgspec.Struct, frozen=True, tag=True):
    """Why nothing can be started on a host; empty if it can."""

    problems: list[str]


class HostState(msgspec.Struct, frozen=True, tag=True):
    """A host's processes that are known there, and the core if it is there and answers."""

    processes: list[ProcessState]
    folder: str
    core: CoreState | None = None


class Stopped(msgspec.Struct, frozen=True, tag=True):
    """What was ended, what had to be killed, and what withstood even that."""

    ended: list[str]
    killed: list[str]
    survivors: list[int]


class Logs(msgspec.Struct, frozen=True, tag=True):
    """The end of every process's log."""

    texts: dict[str, str]


class Seen(msgspec.Struct, frozen=True, tag=True):
    """What a host that was asked to ``look`` has seen of itself.

    ``troubles``: by key of the ports asked for, why nobody could listen there; ``problems``: as
    in ``Checked``; ``meeting``: where it listens now, for others to try.
    """

    facts: HostFacts
    troubles: dict[str, str]
    problems: list[str]
    meeting: list[tuple[str, int]]


class Clocked(msgspec.Struct, frozen=True, tag=True):
    """The host's wall clock, just now."""

    unix_time_s: float


class Met(msgspec.Struct, frozen=True, tag=True):
    """Why meeting places of other hosts, ``host:port``, can't be reached from this one."""

    errors: dict[str, str]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The host could not do what it was asked, and why."""

    reason: str


Answer = Checked | HostState | Stopped | Logs | Seen | Clocked | Met | Failed


def requests(
    config: ClusterConfig,
    action: Action,
    *,
    run_dir: str = "",
    lines: int = 0,
    workflows: Mapping[str, str] | None = None,
    command_of: CommandOf = process_command,
) -> list[Request]:
    """One request for every host of the file, the coordinator's first.

    ``workflows``: texts of the file's workflow files by name; only the coordinator's host
    gets them. ConfigError with every reason why the file does not fit several hosts.
    """
    problems = _problems(config)
    if run_dir and not run_dir.startswith("/"):
        problems.append(f"--run-dir: must be an absolute path, the same on all hosts ({run_dir})")
    if problems:
        raise ConfigError(problems)
    home = config.coordinator.host
    hosts = dict.fromkeys([home, *(entry.host for entry in config.workers)])
    made = []
    for host in hosts:
        names = [entry.name for entry in config.workers if entry.host == host]
        names = [COORDINATOR, *names] if host == home else names
        made.append(
            Request(
                action=action,
                cluster=config.name,
                host=host,
                processes={name: command_of(name, Path(CONFIG_NAME))[1:] for name in names},
                files=_files(config, workflows or {} if host == home else {}, action),
                ports=_ports(config, host) if action in ("up", "look") else [],
                gpus=max(
                    (
                        d + 1
                        for entry in config.workers
                        if entry.host == host
                        for d in entry.devices
                    ),
                    default=0,
                ),
                control_address=config.control_address if host == home else "",
                api=(reachable(config.api.host), config.api.port) if host == home else ("", 0),
                run_dir=run_dir,
                grace_s=GRACE_S + config.stop.drain_s,
                lines=lines,
                addresses=_addresses(config, host) if action == "up" else {},
            )
        )
    return made


def _files(config: ClusterConfig, workflows: Mapping[str, str], action: Action) -> dict[str, str]:
    if action != "up":
        return {}
    # Hosts that keep workflows in no file must not look for any.
    shipped = msgspec.structs.replace(
        config,
        workflows=[f"./{name}" for name in workflows],
        served_model_name=config.served_name,
    )
    return {CONFIG_NAME: dump(shipped), **workflows}


def _addresses(config: ClusterConfig, host: str) -> dict[str, str]:
    base = config.network.side_channel_port_base
    found = {}
    for index, entry in enumerate(config.workers):
        if entry.host == host:
            data = entry.data_port or "a free port"
            side = base + index if base else "a free port"
            side_host = config.network.nixl_host or host
            environment = config.environment | entry.environment
            side_host = str(environment.get("VLLM_NIXL_SIDE_CHANNEL_HOST", side_host))
            found[entry.name] = f"data on {host}, {data}; side channel on {side_host}, {side}"
    return found


def _ports(config: ClusterConfig, host: str) -> list[FixedPort]:
    own = ("coordinator.", "api.")
    return [
        FixedPort(key, where, port)
        for key, where, port in fixed_ports(config)
        if (config.coordinator.host if key.startswith(own) else where) == host
    ]


def _problems(config: ClusterConfig) -> list[str]:
    problems = []
    hosts = {config.coordinator.host, *(entry.host for entry in config.workers)}
    for key, port in (("coordinator.port", config.coordinator.port), ("api.port", config.api.port)):
        if not port:
            problems.append(f"{key}: must be a fixed port for a cluster of other machines")
    if config.coordinator.host in EVERYWHERE:
        problems.append(
            f"coordinator.host: {config.coordinator.host} is no address that workers of other"
            " machines can reach"
        )
    local = sorted(hosts & LOOPBACK)
    if local and not all(host in LOOPBACK or host.startswith("127.") for host in hosts):
        problems.append(
            f"{', '.join(local)}: means another machine on every host of this file;"
            " give the coordinator and every worker an address that all can reach"
        )
    if config.network.nixl_host is not None and len({e.host for e in config.workers}) > 1:
        problems.append(
            "network.nixl_host: is one address for all workers, who are on several hosts;"
            " without it each one's own host is used"
        )
    return problems

"""``pythia doctor`` before a cluster runs: asks every host of the file, then judges.

Hosts are reached as ``pythia ssh`` reaches them (``cluster.ssh``); those that are this
machine without it. Nothing is started there but what answers, and that goes with the
connection.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import msgspec

from cluster import doctor_checks, doctor_paths
from cluster.doctor import Report
from cluster.doctor_checks import Clock, Finding, Port
from cluster.hosts import (
    LOOPBACK,
    Answer,
    Clocked,
    Failed,
    FixedPort,
    Met,
    Request,
    Seen,
    requests,
)
from cluster.launch import fixed_ports
from cluster.look import TIME
from cluster.process import port_is_free
from cluster.schema import ClusterConfig, WorkerEntry, tcp_address
from cluster.ssh import Closed, Connection, Way
from coordinator.protocol import HostFacts

SIDE_CHANNEL_HOST = "VLLM_NIXL_SIDE_CHANNEL_HOST"
HOST_S = 60.0
"""How long a host may take to be reached and to look at itself."""
ANSWER_S = 15.0
MEET_S = 60.0
CLOCK_TRIES = 3

Answers = queue.SimpleQueue[tuple[str, Answer | Closed]]
T = TypeVar("T", Seen, Clocked, Met)


def is_here(host: str) -> bool:
    """True if the host is this machine, so that no ``ssh`` is needed."""
    try:
        return port_is_free(host, 0)
    except OSError:
        return False


def examine(config: ClusterConfig, way: Way, is_here: Callable[[str], bool] = is_here) -> Report:
    """Examines the hosts of a file. ConfigError if it does not fit several hosts."""
    asked = look_requests(config)
    local = frozenset(request.host for request in asked if is_here(request.host))
    with _Hosts(asked, msgspec.structs.replace(way, local=way.local | local)) as hosts:
        seen = hosts.look()
        clocks = hosts.clocks()
        met = hosts.meet()
    return Report(
        [
            *_hosts(asked, seen, hosts.lost),
            *doctor_checks.versions({host: each.facts for host, each in seen.items()}),
            *doctor_checks.clocks(clocks, "this host"),
            *doctor_checks.ports(_ports(asked, seen)),
            *_transports(config, seen),
            *meetings(met, len(seen)),
            *[e for e in doctor_paths.addresses(planned(config), []) if e.severity != "fine"],
            _not_yet(),
        ]
    )


def look_requests(config: ClusterConfig) -> list[Request]:
    """One for every host of the file; a file of this machine alone may leave ports open."""
    hosts = {config.coordinator.host, *(entry.host for entry in config.workers)}
    if not hosts <= LOOPBACK:
        return [
            msgspec.structs.replace(each, ports=[*each.ports, *_side_channels(config, each.host)])
            for each in requests(config, "look")
        ]
    devices = [device for entry in config.workers for device in entry.devices]
    return [
        Request(
            action="look",
            cluster=config.name,
            host=config.coordinator.host,
            processes={},
            ports=[FixedPort(*each) for each in fixed_ports(config)],
            gpus=max(devices, default=-1) + 1,
        )
    ]


def _side_channels(config: ClusterConfig, host: str) -> list[FixedPort]:
    """Side channels that the file has listen elsewhere than on their worker's host."""
    found = []
    for index, entry in enumerate(config.workers):
        given = _side_host(config, entry)
        if entry.host == host and given not in (host, ""):
            key = f"workers[{index}].environment.{SIDE_CHANNEL_HOST}"
            found.append(FixedPort(key, given, 0))
    return found


def _side_host(config: ClusterConfig, entry: WorkerEntry) -> str:
    environment = config.environment | entry.environment
    return str(environment.get(SIDE_CHANNEL_HOST, config.network.nixl_host or ""))


def planned(config: ClusterConfig) -> list[doctor_paths.Worker]:
    """Workers as they will say that they are, whom nobody can ask yet."""
    base = config.network.side_channel_port_base
    return [
        doctor_paths.Worker(
            name=entry.name,
            host=entry.host,
            data_address=tcp_address(entry.host, entry.data_port),
            side_channel=f"{_side_host(config, entry) or entry.host}:{base + index if base else 0}",
        )
        for index, entry in enumerate(config.workers)
    ]


class _Hosts:
    """Connections to all hosts, and what they answer. ``lost``: whom it lost, and why."""

    def __init__(self, asked: Sequence[Request], way: Way) -> None:
        self._answers: Answers = queue.SimpleQueue()
        self._connections = {
            request.host: Connection(way, request, self._answers) for request in asked
        }
        self._seen: dict[str, Seen] = {}
        self.lost: dict[str, str] = {}

    def __enter__(self) -> _Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections.values():
            connection.close()

    def look(self) -> dict[str, Seen]:
        """What each host that can be reached says of itself."""
        self._seen = self._gather(set(self._connections), Seen, HOST_S)
        return self._seen

    def clocks(self) -> dict[str, Clock]:
        """Their clocks against this one's, one after the other."""
        found: dict[str, Clock] = {}
        for host in self._seen:
            for _ in range(CLOCK_TRIES):
                before_s = time.time()
                self._connections[host].say(TIME)
                told = self._gather({host}, Clocked, ANSWER_S)
                after_s = time.time()
                if host not in told:
                    break
                offset_s = told[host].unix_time_s - (before_s + after_s) / 2
                clock = Clock(offset_s, (after_s - before_s) / 2)
                if host not in found or clock.error_s < found[host].error_s:
                    found[host] = clock
        return found

    def meet(self) -> dict[str, dict[str, str]]:
        """Whom each host can't reach of the others: why, by host and by the other's address."""
        present = {host: each for host, each in self._seen.items() if host not in self.lost}
        for host in present:
            others = [place for other in present if other != host for place in _of(present, other)]
            self._connections[host].say(msgspec.json.encode(others).decode())
        told = self._gather(set(present), Met, MEET_S)
        return {host: answer.errors for host, answer in told.items()}

    def _gather(self, waiting: set[str], kind: type[T], timeout_s: float) -> dict[str, T]:
        found: dict[str, T] = {}
        deadline_s = time.monotonic() + timeout_s
        while waiting:
            try:
                left_s = max(0.0, deadline_s - time.monotonic())
                host, answer = self._answers.get(timeout=left_s)
            except queue.Empty:
                self.lost |= dict.fromkeys(waiting, f"no answer within {timeout_s:.0f} s")
                break
            if isinstance(answer, kind) and host in waiting:
                found[host] = answer
            elif isinstance(answer, Closed | Failed):
                self.lost.setdefault(host, answer.reason)
            else:
                continue
            waiting.discard(host)
        return found


def _of(seen: Mapping[str, Seen], host: str) -> list[tuple[str, int]]:
    return seen[host].meeting


def _hosts(
    asked: Sequence[Request], seen: Mapping[str, Seen], lost: Mapping[str, str]
) -> list[Finding]:
    found = [
        _problem("hosts", host, reason, "'ssh HOST true' must work from here without a question")
        for host, reason in lost.items()
    ]
    found += [
        _problem("hosts", host, problem, "see workers[].devices, and 'nvidia-smi' there")
        for host, each in seen.items()
        for problem in each.problems
    ]
    return found or [_fine("hosts", f"{len(asked)} reached")]


def _ports(asked: Sequence[Request], seen: Mapping[str, Seen]) -> dict[str, list[Port]]:
    return {
        request.host: [
            Port(
                each.key,
                each.host,
                each.port,
                seen[request.host].troubles.get(each.key, ""),
            )
            for each in request.ports
        ]
        for request in asked
        if request.host in seen
    }


def _transports(config: ClusterConfig, seen: Mapping[str, Seen]) -> list[Finding]:
    """Of every worker: its host's, with what the file sets for it."""
    only = next(iter(seen.values())) if len(seen) == 1 else None
    facts = {}
    for entry in config.workers:
        host = seen.get(entry.host) or (only if entry.host in LOOPBACK else None)
        if host is not None:
            facts[entry.name] = configured(config, entry, host.facts)
    return doctor_checks.transports(
        facts,
        {entry.name: entry.host for entry in config.workers},
        [entry.name for entry in config.workers if entry.devices],
    )


def configured(config: ClusterConfig, entry: WorkerEntry, facts: HostFacts) -> HostFacts:
    """A host's facts, with UCX's settings as the file gives them to a worker."""
    environment = config.environment | entry.environment
    return msgspec.structs.replace(
        facts,
        ucx_tls=str(environment.get("UCX_TLS", config.network.ucx_tls or "")),
        ucx_net_devices=str(environment.get("UCX_NET_DEVICES", "")),
    )


def meetings(errors: Mapping[str, Mapping[str, str]], hosts: int) -> list[Finding]:
    """Every host reaches every other at its address in the file."""
    found = [
        _problem(
            "addresses",
            f"{host} -> {place.rpartition(':')[0]}",
            f"can't be reached: {error}",
            "look at routes and firewalls between them; all ports must pass, or those that the"
            " file fixes (data_port, network.side_channel_port_base)",
        )
        for host, those in errors.items()
        for place, error in those.items()
    ]
    if found or hosts < 2:
        return found
    return [_fine("addresses", f"{hosts} hosts reach each other")]


def _not_yet() -> Finding:
    text = "what NIXL gives between workers is measured when they run: ask again then"
    return _fine("links", text)


def _problem(check: str, about: str, message: str, advice: str) -> Finding:
    return Finding(check=check, severity="problem", about=about, message=message, advice=advice)


def _fine(check: str, message: str) -> Finding:
    return Finding(check=check, severity="fine", about="", message=message)

"""What is wrong on hosts, and what to do about it: versions, clocks, ports, UCX's transports.

Pure: facts in, findings out. Who gathers the facts is ``cluster.doctor`` for a cluster that
runs and ``cluster.doctor_hosts`` for one that does not; ``cluster.doctor_paths`` judges what
is between workers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from coordinator.protocol import HostFacts, Transport

CLOCK_PROBLEM_S = 1.0
"""Leases of KV are told in wall-clock time, and have a few seconds to spare."""
CLOCK_WARNING_S = 0.1

NETWORK = frozenset(("tcp", "rc_verbs", "rc_mlx5", "ud_verbs", "ud_mlx5", "dc_mlx5", "srd"))
RDMA = NETWORK - {"tcp"}
SHARED_MEMORY = frozenset(("posix", "sysv", "cma", "knem", "xpmem"))
CUDA = frozenset(("cuda_copy", "cuda_ipc", "gdr_copy"))
ALIASES: dict[str, frozenset[str]] = {
    "mm": frozenset(("posix", "sysv", "xpmem")),
    "sm": SHARED_MEMORY,
    "shm": SHARED_MEMORY,
    "ib": RDMA - {"srd"},
    "ud_v": frozenset(("ud_verbs",)),
    "ud_x": frozenset(("ud_mlx5",)),
    "ud": frozenset(("ud_verbs", "ud_mlx5")),
    "rc_v": frozenset(("rc_verbs",)),
    "rc_x": frozenset(("rc_mlx5",)),
    "rc": frozenset(("rc_verbs", "rc_mlx5")),
    "dc": frozenset(("dc_mlx5",)),
    "dc_x": frozenset(("dc_mlx5",)),
    "cuda": CUDA,
}
"""As in UCX's ``ucp_context.c``; a transport that is none of these goes by its own name."""
AT_WILL = frozenset(("", "all"))

Severity = Literal["fine", "warning", "problem"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one check has found. ``about``: whom, a worker, a host or a pair ``A -> B``."""

    check: str
    severity: Severity
    about: str
    message: str
    advice: str = ""


class Clock(msgspec.Struct, frozen=True):
    """How far a clock is ahead, give or take ``error_s``. Seconds."""

    offset_s: float
    error_s: float


class Port(msgspec.Struct, frozen=True):
    """A port that the file fixes; ``trouble``: why nobody could listen there, if so."""

    key: str
    host: str
    port: int
    trouble: str = ""


def versions(facts: Mapping[str, HostFacts]) -> list[Finding]:
    """The same software everywhere. By worker or host."""
    found = []
    for package in ("pythia", "vllm", "nixl", "ucx"):
        by_version: defaultdict[str, list[str]] = defaultdict(list)
        for name, each in facts.items():
            by_version[each.versions.get(package, "unknown")].append(name)
        if len(by_version) < 2:
            continue
        most = max(by_version, key=lambda version: (len(by_version[version]), version))
        found += [
            Finding(
                check="versions",
                severity="problem",
                about=", ".join(names),
                message=f"{package} is {version} there, {most} on {', '.join(by_version[most])}",
                advice=f"install the same {package} on all hosts"
                " ('make install' in the same commit) and start the worker anew",
            )
            for version, names in by_version.items()
            if version != most
        ]
    if not found and facts:
        same = next(iter(facts.values())).versions
        said = ", ".join(f"{name} {version}" for name, version in same.items())
        found = [_fine("versions", f"{len(facts)} of {len(facts)} have {said}")]
    return found


def clocks(offsets: Mapping[str, Clock], reference: str) -> list[Finding]:
    """Clocks that agree with the ``reference``, the core's host or where this runs."""
    found = []
    for name, clock in offsets.items():
        certain_s = abs(clock.offset_s) - clock.error_s
        if certain_s <= CLOCK_WARNING_S:
            continue
        way = "ahead of" if clock.offset_s > 0 else "behind"
        found.append(
            Finding(
                check="clocks",
                severity="problem" if certain_s > CLOCK_PROBLEM_S else "warning",
                about=name,
                message=f"its clock is {abs(clock.offset_s):.2f} s {way} that of {reference}",
                advice="run chrony or another NTP client on both: how long a prefill's KV"
                " is held is told in wall-clock time",
            )
        )
    if not found and offsets:
        worst_s = max(abs(clock.offset_s) for clock in offsets.values())
        text = f"{len(offsets)} within {worst_s * 1000:.0f} ms of {reference}"
        found = [_fine("clocks", text)]
    return found


def ports(wanted: Mapping[str, Sequence[Port]]) -> list[Finding]:
    """Ports that the file fixes are free before the start. By host."""
    found = [
        Finding(
            check="ports",
            severity="problem",
            about=host,
            message=f"{port.key}: {port.trouble}",
            advice=f"choose another {port.key.rpartition('.')[2]} in the file, or end what"
            f" listens there ('ss -ltnp sport = :{port.port}' names it)"
            if "in use" in port.trouble
            else "give the address by which the other hosts know this one",
        )
        for host, listed in wanted.items()
        for port in listed
        if port.trouble
    ]
    for host, listed in wanted.items():
        counted = Counter((port.host, port.port) for port in listed if port.port)
        found += [
            Finding(
                check="ports",
                severity="problem",
                about=host,
                message=f"port {number} of {address} is wanted {times} times",
                advice="give each its own in the file",
            )
            for (address, number), times in counted.items()
            if times > 1
        ]
    if not found:
        fixed = sum(bool(port.port) for listed in wanted.values() for port in listed)
        found = [_fine("ports", f"{fixed} that the file fixes can be listened on")]
    return found


def transports(
    facts: Mapping[str, HostFacts], hosts: Mapping[str, str], gpus: Iterable[str] = ()
) -> list[Finding]:
    """What UCX may use fits what there is. ``hosts``: of each worker; ``gpus``: which have one."""
    several = len(set(hosts.values())) > 1
    with_gpu = set(gpus)
    found = []
    for name, each in facts.items():
        found += _transports_of(name, each, several, name in with_gpu)
    if not found and facts:
        used = {
            transport.name
            for each in facts.values()
            for transport in allowed(each, each.transports)
            if transport.name != "self"
        }
        text = f"UCX may use {', '.join(sorted(used))}"
        found = [_fine("transports", text)]
    return found


def allowed(facts: HostFacts, there: Sequence[Transport]) -> list[Transport]:
    """Of the transports ``there``, those that ``UCX_TLS`` and ``UCX_NET_DEVICES`` leave."""
    names, excluded = _names(facts.ucx_tls)
    devices = _devices(facts.ucx_net_devices)
    return [
        each
        for each in there
        if (names is None or (each.name in names) != excluded)
        and (devices is None or each.name not in NETWORK or _listed(each.device, devices))
    ]


def _transports_of(name: str, facts: HostFacts, several: bool, gpu: bool) -> list[Finding]:
    def problem(message: str, advice: str, severity: Severity = "problem") -> Finding:
        return Finding(
            check="transports", severity=severity, about=name, message=message, advice=advice
        )

    if facts.transports_error:
        return [
            problem(
                f"UCX can't be asked: {facts.transports_error}",
                "'python -m cluster.ucx' on that host shows more; is NIXL installed?",
            )
        ]
    found = []
    there = {each.name for each in facts.transports}
    for word in _words(facts.ucx_tls):
        if not ALIASES.get(word, frozenset((word,))) & there:
            found.append(
                problem(
                    f"UCX_TLS={facts.ucx_tls} asks for {word}, which is not to be had;"
                    f" there are {', '.join(sorted(there))}",
                    f"leave {word} out of network.ucx_tls, or install its driver",
                )
            )
    devices = sorted({each.device for each in facts.transports if each.name in NETWORK})
    for device in sorted(_devices(facts.ucx_net_devices) or ()):
        if not any(_listed(each, {device}) for each in devices):
            found.append(
                problem(
                    f"UCX_NET_DEVICES={facts.ucx_net_devices} names {device}, which is not there;"
                    f" there are {', '.join(devices)}",
                    "name one of those, or leave UCX_NET_DEVICES out",
                )
            )
    usable = allowed(facts, facts.transports)
    outside = [e for e in usable if e.name in NETWORK and e.device != "lo"]
    if several and not outside:
        found.append(
            problem(
                f"nothing that UCX may use ({', '.join(sorted({e.name for e in usable}))})"
                " reaches another host",
                "add tcp, or rc for RDMA, to network.ucx_tls, with a device in UCX_NET_DEVICES",
            )
        )
    if gpu and there & CUDA and not {each.name for each in usable} & CUDA:
        found.append(
            problem(
                f"UCX_TLS={facts.ucx_tls} leaves out cuda, so no GPU's memory can be moved",
                "add cuda to network.ucx_tls",
            )
        )
    rdma = sorted({each.device for each in facts.transports if each.name in RDMA})
    if several and outside and rdma and not any(each.name in RDMA for each in outside):
        found.append(
            problem(
                f"there is RDMA ({', '.join(rdma)}) and UCX may use TCP only",
                "leave network.ucx_tls out, or add rc to it",
                "warning",
            )
        )
    return found


def _words(tls: str) -> list[str]:
    """What ``UCX_TLS`` asks for by name; nothing if it excludes, or leaves UCX the choice."""
    if tls in AT_WILL or tls.startswith("^"):
        return []
    return [word.strip().rpartition("\\")[2] for word in tls.split(",") if word.strip()]


def _names(tls: str) -> tuple[frozenset[str] | None, bool]:
    """The transports that are meant, None for all, and whether those are the forbidden ones."""
    if tls in AT_WILL:
        return None, False
    excluded = tls.startswith("^")
    names: set[str] = set()
    for word in tls.removeprefix("^").split(","):
        names |= ALIASES.get(word.strip(), frozenset((word.strip(),)))
    return frozenset(names), excluded


def _devices(text: str) -> set[str] | None:
    return None if text in AT_WILL else {word.strip() for word in text.split(",") if word.strip()}


def _listed(device: str, listed: Iterable[str]) -> bool:
    """``mlx5_0`` in a list means all ports of it, ``mlx5_0:1``."""
    return any(device == each or device.partition(":")[0] == each for each in listed)


def _fine(check: str, message: str) -> Finding:
    return Finding(check=check, severity="fine", about="", message=message)

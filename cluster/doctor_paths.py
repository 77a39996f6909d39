"""What is wrong between workers: addresses that lead nowhere, links that are slow.

Pure: what every worker said about every other in, findings out.
"""

from __future__ import annotations

import ipaddress
import statistics
from collections.abc import Sequence

import msgspec

from cluster.doctor_checks import Finding
from cluster.status import size
from coordinator.protocol import Reach

SLOW_SHARE = 0.5
"""A link is slow that gives less than this share of what its like give."""
HOPELESS_SHARE = 0.1
"""Below this share no busy host explains it."""
LIKE_MIN = 2
"""Links of a tier that it takes to say what is usual there."""
HERE = "here"
"""Who asks, when it is this program and no worker."""


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """A worker, where it says that it is, and whom it reaches."""

    name: str
    host: str
    data_address: str
    side_channel: str
    gpu: bool = False
    reaches: list[Reach] = []


class Measure(msgspec.Struct, frozen=True, kw_only=True):
    """What reading KV from ``source`` gives ``target``; ``error``: why it could not be tried."""

    source: str
    target: str
    bytes_per_s: float = 0.0
    size_bytes: int = 0
    error: str = ""


def addresses(workers: Sequence[Worker], here: Sequence[Reach]) -> list[Finding]:
    """Every worker is found where it says. ``here``: whom this program reaches."""
    told = {worker.name: worker.reaches for worker in workers} | {HERE: list(here)}
    several = len({worker.host for worker in workers}) > 1
    found = []
    for worker in workers:
        data = {
            asker: reach.data_error
            for asker, reaches in told.items()
            for reach in reaches
            if reach.worker == worker.name
        }
        side = {
            asker: reach.side_error
            for asker, reaches in told.items()
            for reach in reaches
            if reach.worker == worker.name and asker != HERE
        }
        found += _data_finding(worker, data)
        found += _side_finding(worker, side, several, any(not each for each in data.values()))
    if not found and workers:
        text = f"{len(workers)} workers are reached where they say, by each other and from here"
        found = [Finding(check="addresses", severity="fine", about="", message=text)]
    return found


def _data_finding(worker: Worker, errors: dict[str, str]) -> list[Finding]:
    failed = {asker: error for asker, error in errors.items() if error}
    if not failed:
        return []
    return [
        Finding(
            check="addresses",
            severity="problem",
            about=worker.name,
            message=f"its data address {worker.data_address} can't be reached"
            f" {_askers(failed, errors)}",
            advice="calls reach a worker there: give workers[].host an address of that machine"
            " that the coordinator's host and the other workers reach, and let firewalls pass"
            " data_port",
        )
    ]


def _side_finding(
    worker: Worker, errors: dict[str, str], several: bool, reached: bool
) -> list[Finding]:
    failed = {asker: error for asker, error in errors.items() if error}
    address = worker.side_channel
    host = address.rpartition(":")[0].strip("[]")
    advice = (
        "its engine tells peers to fetch KV by that address: remove VLLM_NIXL_SIDE_CHANNEL_HOST"
        f" and network.nixl_host from the file, so that the worker's host ({worker.host}) is used,"
        " or give an address of that machine that the others reach"
    )
    if several and _leads_nowhere(host) and not _leads_nowhere(worker.host):
        where = f" {_askers(failed, errors)}" if failed else ""
        message = (
            f"its side-channel address {address} means another machine on every host,"
            f" its own is {worker.host}; it can't be asked for its KV{where}"
        )
    elif failed:
        message = f"its side-channel address {address} can't be used {_askers(failed, errors)}"
        if host == worker.host:
            advice = (
                "the address is the worker's own host: look for a firewall between these hosts"
                " (network.side_channel_port_base fixes the ports), and into the worker's log"
            )
    else:
        return []
    if not reached and failed and not _leads_nowhere(host):
        advice = "nor can its data address: see there first"
    return [
        Finding(
            check="addresses",
            severity="problem",
            about=worker.name,
            message=message,
            advice=advice,
        )
    ]


def _leads_nowhere(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _askers(failed: dict[str, str], all_: dict[str, str]) -> str:
    """``from A, B (Connection refused)``, or from all."""
    who = "from any other" if len(failed) == len(all_) > 1 else f"from {', '.join(failed)}"
    return f"{who} ({'; '.join(sorted(set(failed.values())))})"


# --- links ----------------------------------------------------------------------------


def links(workers: Sequence[Worker], measures: Sequence[Measure]) -> list[Finding]:
    """Every ordered pair moves KV, none much slower than its like.

    What is usual is the median of the faster half of a tier: a host whose link is slow
    slows most pairs of a small cluster, and must not become the rule.
    """
    found = [
        Finding(
            check="links",
            severity="problem",
            about=f"{each.source} -> {each.target}",
            message=f"no KV could be moved: {each.error}",
            advice="see addresses and transports; the worker's log has what UCX and NIXL say",
        )
        for each in measures
        if each.error
    ]
    by_tier = _by_tier(workers, measures)
    for tier, listed in sorted(by_tier.items()):
        found += _slow_findings(tier, listed)
    if not found and measures:
        for tier, listed in sorted(by_tier.items()):
            text = f"{len(listed)} pairs {tier}, {_rate(usual(listed))}"
            found.append(Finding(check="links", severity="fine", about="", message=text))
    return found


def doubtful(workers: Sequence[Worker], measures: Sequence[Measure]) -> list[Measure]:
    """Those that are slower than their like, and not so much that nothing but the link can be
    to blame."""
    return [
        each
        for listed in _by_tier(workers, measures).values()
        for each in _slow(listed)
        if each.bytes_per_s > HOPELESS_SHARE * usual(listed)
    ]


def _by_tier(workers: Sequence[Worker], measures: Sequence[Measure]) -> dict[str, list[Measure]]:
    known = {worker.name: worker for worker in workers}
    found: dict[str, list[Measure]] = {}
    for each in measures:
        if not each.error and each.source in known and each.target in known:
            tier = tier_of(known[each.source], known[each.target])
            found.setdefault(tier, []).append(each)
    return found


def tier_of(source: Worker, target: Worker) -> str:
    """Which links are alike."""
    kind = "GPU" if source.gpu and target.gpu else "CPU"
    return f"on one host, {kind}" if source.host == target.host else f"between hosts, {kind}"


def usual(measures: Sequence[Measure]) -> float:
    """Bytes per second that a link of a tier should give."""
    rates = sorted((each.bytes_per_s for each in measures), reverse=True)
    return statistics.median(rates[: (len(rates) + 1) // 2])


def _slow(measures: Sequence[Measure]) -> list[Measure]:
    if len(measures) < LIKE_MIN:
        return []
    least = SLOW_SHARE * usual(measures)
    return [each for each in measures if each.bytes_per_s < least]


def _slow_findings(tier: str, measures: Sequence[Measure]) -> list[Finding]:
    found = _slow(measures)
    normal = usual(measures)
    return [
        Finding(
            check="links",
            severity="problem",
            about=f"{each.source} -> {each.target}",
            message=f"{_rate(each.bytes_per_s)}, where {_rate(normal)} is usual ({tier})",
            advice=_slow_advice(each, found, measures),
        )
        for each in sorted(found, key=lambda each: (each.source, each.target))
    ]


def _slow_advice(one: Measure, slow: Sequence[Measure], measures: Sequence[Measure]) -> str:
    """Blames a worker's host if all that it sends, or all that it reads, is slow."""
    advice = "look at that network path (ethtool, ip -s link, tc qdisc) and UCX_NET_DEVICES"
    sent = [each for each in measures if each.source == one.source]
    read = [each for each in measures if each.target == one.target]
    if len(read) > 1 and all(each in slow for each in read):
        return f"all that {one.target} reads is slow: {advice} on its host"
    if len(sent) > 1 and all(each in slow for each in sent):
        return f"all that {one.source} sends is slow: {advice} on its host"
    return advice


def _rate(bytes_per_s: float) -> str:
    return f"{size(bytes_per_s)}/s"

"""What of a cluster becomes which pods, and what in its file can't be: decided, not done.

Workers that are alike become one set of pods: ``decode-0`` and ``decode-1`` are pods 0 and 1
of the set ``decode``. Every pod has an address of its own, so all have the same ports. Knows
no YAML and no Kubernetes object; every problem is reported to the ``Document``.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import PurePosixPath
from typing import Any

import msgspec

from cluster.document import Document, Path, dotted
from cluster.kubernetes.options import (
    CONFIG_FOLDER,
    CONTROL_PORT,
    DATA_PORT,
    HEALTH_PORT,
    METRICS_PORT,
    MODEL_FOLDER,
    SIDE_CHANNEL_PORT,
    STORE_FOLDER,
    Options,
)
from cluster.schema import ClusterConfig, ConfigError, WorkerEntry

SET_NAME_MAX = 52
"""Longest name of a set: its pods carry it in a label with 11 more characters."""
RESERVED_STEMS = frozenset({"coordinator", "core", "api", "workers"})
"""Words that other sets and Services of a cluster have."""
_ORDINAL = re.compile(r"^(.+)-(0|[1-9][0-9]{0,8})$")
_DNS_LABEL = re.compile(r"^[a-z]([a-z0-9-]*[a-z0-9])?$")
_SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|CREDENTIALS?)$")
_HERE = ("127.0.0.1", "localhost", "::1")
_EVERYWHERE = ("0.0.0.0", "::")


class WorkerSet(msgspec.Struct, frozen=True, kw_only=True):
    """Pods that are alike: the workers ``STEM-first`` and the ones behind it.

    ``entry``: the first of them, as its file has it; ``nodes``: pods of one engine.
    """

    stem: str
    first: int
    count: int
    entry: WorkerEntry
    nodes: int = 1

    @property
    def gpus(self) -> int:
        """GPUs of one pod."""
        return len(self.entry.devices) // self.nodes


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All that manifests are made of.

    ``config``: the cluster as its pods are to read it; ``keys``, ``admin_keys``: API keys, and
    ``secrets``: variables that are taken out of it, those of one set under its stem, those
    of all under ""; ``files``: what the configuration names besides, by file name.
    """

    options: Options
    config: ClusterConfig
    sets: list[WorkerSet]
    keys: list[str]
    admin_keys: list[str]
    secrets: dict[str, dict[str, str]]
    files: dict[str, str]

    @property
    def name(self) -> str:
        """The cluster's name; every object's name begins with it."""
        return self.config.name

    @property
    def core_host(self) -> str:
        """Where workers find the core."""
        return f"{self.name}-core"

    @property
    def keeps_workflows(self) -> bool:
        """Whether there is something to keep on a volume."""
        return self.config.coordinator.store != ""


def plan(
    document: Document, config: ClusterConfig, options: Options, files: dict[str, str]
) -> Plan:
    """The pods of a cluster. ``files``: texts of its workflow files, by file name in the order
    of ``workflows``. ConfigError with everything that can't be in Kubernetes."""
    _names(document, config)
    _hosts(document, config)
    _ports(document, config, options)
    _model(document, config, options)
    sets = _sets(document, config, options)
    if document.problems():
        raise ConfigError(document.problems())
    common, secrets = _without_secrets(config.environment)
    taken = {"": secrets} if secrets else {}
    for each in sets:
        if own := _without_secrets(each.entry.environment)[1]:
            taken[each.stem] = own
    changes: dict[str, Any] = {
        "model": _model_in_pod(config.model),
        "served_model_name": config.served_name,
        "environment": common,
        "workers": [_in_pod(config, entry, sets, options) for entry in config.workers],
        "workflows": [f"{CONFIG_FOLDER}/{name}" for name in files],
        "coordinator": msgspec.structs.replace(
            config.coordinator, host="0.0.0.0", store=_store_in_pod(config)
        ),
        "api": msgspec.structs.replace(config.api, host="0.0.0.0", keys=[], admin_keys=[]),
        "network": msgspec.structs.replace(
            config.network,
            side_channel_port_base=config.network.side_channel_port_base or SIDE_CHANNEL_PORT,
        ),
    }
    return Plan(
        options=options,
        config=msgspec.structs.replace(config, **changes),
        sets=sets,
        keys=config.api.keys,
        admin_keys=config.api.admin_keys,
        secrets=taken,
        files=files,
    )


def _names(document: Document, config: ClusterConfig) -> None:
    if not _DNS_LABEL.match(config.name):
        document.problem(
            ("name",),
            "becomes the name of Services: it must begin with a letter and not end with a dash"
            f" (got {config.name!r})",
        )
    for index, entry in enumerate(config.workers):
        path: Path = ("workers", index, "name")
        found = _ORDINAL.match(entry.name)
        if not found or found[1].endswith("-"):
            document.problem(
                path,
                "must be a word, a dash and a number, as pods are called"
                f" (got {entry.name!r}, could be {entry.name.rstrip('-')}-0)",
            )
        elif found[1] in RESERVED_STEMS:
            document.problem(path, f"{found[1]!r} is taken by another part of the cluster")
        elif len(set_name(config.name, found[1])) > SET_NAME_MAX:
            document.problem(
                path,
                f"its pods' set would be called {set_name(config.name, found[1])}, longer than"
                f" {SET_NAME_MAX} characters",
            )


def set_name(cluster: str, stem: str) -> str:
    """What the set of a cluster's workers called ``stem-0``, ``stem-1``, ... is called."""
    return f"{cluster}-{stem}"


def subdomain(cluster: str, each: WorkerSet) -> str:
    """The headless Service that gives a set's pods their names."""
    return set_name(cluster, each.stem) if each.nodes > 1 else f"{cluster}-workers"


def _hosts(document: Document, config: ClusterConfig) -> None:
    places: list[tuple[Path, str, str]] = [
        (("coordinator", "host"), config.coordinator.host, "the core listens on its pod"),
        (("api", "host"), config.api.host, "the API listens on its pod"),
    ]
    for path, host, what in places:
        if host not in _HERE + _EVERYWHERE:
            document.problem(path, f"{what}; leave it out (got {host!r})")
    for index, entry in enumerate(config.workers):
        if entry.host not in _HERE:
            kind = "address" if _is_address(entry.host) else "name"
            document.problem(
                ("workers", index, "host"),
                f"pods get their own {kind} from Kubernetes; leave it out (got {entry.host!r})",
            )
    if (nixl := config.network.nixl_host) is not None:
        document.problem(
            ("network", "nixl_host"),
            f"each pod's is its own address; leave it out (got {nixl!r})",
        )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _ports(document: Document, config: ClusterConfig, options: Options) -> None:
    """Ports of one pod that two servers would both want."""
    for path, port in (
        (("coordinator", "port"), config.coordinator.port),
        (("api", "port"), config.api.port),
    ):
        if not port:
            document.problem(path, "must be a fixed port: a Service leads there (got 0)")
    _clash(
        document,
        [(("coordinator", "port"), config.coordinator.port), (("api", "port"), config.api.port)],
    )
    base = config.network.side_channel_port_base or SIDE_CHANNEL_PORT
    last = base + max(len(config.workers), options.replicas_max)
    if last > 65535:
        document.problem(
            ("network", "side_channel_port_base"),
            f"leaves no room for {last - base} workers (the last would get port {last})",
        )
    for index, entry in enumerate(config.workers):
        side: Path = ("network", "side_channel_port_base")
        wanted: list[tuple[Path, int]] = [
            (("workers", index, "data_port"), entry.data_port or DATA_PORT),
            (("workers", index, "health_port"), entry.health_port or HEALTH_PORT),
            (("workers", index, "metrics_port"), metrics_port(entry, options)),
            *((side, port) for port in (base + index, last)),
        ]
        _clash(document, wanted)


def _clash(document: Document, wanted: list[tuple[Path, int]]) -> None:
    taken: dict[int, Path] = {}
    for path, port in sorted(wanted, key=lambda each: document.has(each[0])):
        if port and taken.get(port, path) != path:
            document.problem(
                path, f"port {port} of the same pod is already that of {dotted(taken[port])}"
            )
        taken.setdefault(port, path)


def metrics_port(entry: WorkerEntry, options: Options) -> int:
    """Where the worker's metrics are; 0 if nobody is to read them."""
    return entry.metrics_port or (METRICS_PORT if options.monitors else 0)


def _model(document: Document, config: ClusterConfig, options: Options) -> None:
    if config.model.startswith("/") and options.model_claim is None:
        document.problem(
            ("model",),
            "is a folder of this machine; put it on a volume and name its claim with"
            f" --model-claim (got {config.model!r})",
        )


def _model_in_pod(model: str) -> str:
    return f"{MODEL_FOLDER}/{PurePosixPath(model).name}" if model.startswith("/") else model


def _store_in_pod(config: ClusterConfig) -> str:
    return "" if config.coordinator.store == "" else f"{STORE_FOLDER}/workflows.sqlite"


def _sets(document: Document, config: ClusterConfig, options: Options) -> list[WorkerSet]:
    members: dict[str, list[tuple[int, int, WorkerEntry]]] = {}
    for index, entry in enumerate(config.workers):
        if found := _ORDINAL.match(entry.name):
            members.setdefault(found[1], []).append((int(found[2]), index, entry))
    return [_set(document, stem, sorted(each), options) for stem, each in members.items()]


def _set(
    document: Document, stem: str, members: list[tuple[int, int, WorkerEntry]], options: Options
) -> WorkerSet:
    first, _, entry = members[0]
    for position, (ordinal, index, other) in enumerate(members):
        if ordinal != first + position:
            document.problem(
                ("workers", index, "name"),
                f"pods are counted without gaps: {stem}-{first + position} is missing"
                f" (got {other.name!r})",
            )
        for key in differences(entry, other):
            document.problem(
                ("workers", index, key)
                if document.has(("workers", index, key))
                else ("workers", index),
                f"{key} of {other.name!r} is not that of {entry.name!r}; workers of one word"
                f" are pods of one set: call it {stem}-other-0, for instance",
            )
    nodes = max([_nodes(document, index, other, options) for _, index, other in members])
    if nodes > 1 and first:
        document.problem(
            ("workers", members[0][1], "name"),
            f"engines that span nodes are counted from 0 (got {entry.name!r})",
        )
    return WorkerSet(stem=stem, first=first, count=len(members), entry=entry, nodes=nodes)


def differences(entry: WorkerEntry, other: WorkerEntry) -> list[str]:
    """The keys in which two pods of one set may not differ, and these do."""
    ports = "data_port", "metrics_port", "health_port"
    keys = ["role", "engine", "environment", *ports, "fixed", "kv_host_gib"]
    found = [key for key in keys if getattr(entry, key) != getattr(other, key)]
    return found + ["devices"] * (len(entry.devices) != len(other.devices))


def _nodes(document: Document, index: int, entry: WorkerEntry, options: Options) -> int:
    """Pods of one engine. Those of a spanning engine fill their nodes."""
    needed, per_node = len(entry.devices), options.gpus_per_node
    path: Path = ("workers", index, "devices")
    for place in (("engine", "nnodes"), ("workers", index, "engine", "nnodes")):
        if document.has(place):
            document.problem(place, "follows from 'devices' and --gpus-per-node; leave it out")
    if needed <= per_node:
        return 1
    if not options.span_nodes:
        document.problem(
            path,
            f"{needed} GPUs, but a node has {per_node} (--gpus-per-node);"
            " --span-nodes runs such an engine on several nodes",
        )
    elif needed % per_node:
        document.problem(path, f"{needed} GPUs do not fill nodes of {per_node}")
    return needed // per_node


def _in_pod(
    config: ClusterConfig, entry: WorkerEntry, sets: list[WorkerSet], options: Options
) -> WorkerEntry:
    """A worker as its pod is to read it. Device plugins number a pod's GPUs from 0."""
    stem = entry.name.rpartition("-")[0]
    (each,) = (one for one in sets if one.stem == stem)
    engine = dict(entry.engine)
    if each.nodes > 1:
        given = config.engine | engine
        pipeline = given.get("pipeline_parallel_size", 1)
        engine["tensor_parallel_size"] = len(entry.devices) // pipeline
        engine |= {"nnodes": each.nodes, "distributed_executor_backend": "mp"}
    return msgspec.structs.replace(
        entry,
        host=f"{set_name(config.name, entry.name)}.{subdomain(config.name, each)}",
        devices=list(range(each.gpus)),
        engine=engine,
        environment=_without_secrets(entry.environment)[0],
        data_port=entry.data_port or DATA_PORT,
        health_port=entry.health_port or HEALTH_PORT,
        metrics_port=metrics_port(entry, options),
    )


def _without_secrets(
    environment: dict[str, str | int | float],
) -> tuple[dict[str, str | int | float], dict[str, str]]:
    """The variables that anybody may read, and those whose names say that nobody should."""
    secret = {name: str(value) for name, value in environment.items() if _SECRET.search(name)}
    return {name: value for name, value in environment.items() if name not in secret}, secret


__all__ = ["CONTROL_PORT", "Plan", "WorkerSet", "metrics_port", "plan", "set_name"]

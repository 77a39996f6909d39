"""What can be wrong with a cluster file beyond its types: values that exclude each other.

Every check reports to the ``Document``, which knows the lines; none raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.arguments import (
    RESERVED_API_ARGUMENTS,
    RESERVED_ENGINE_ARGUMENTS,
    api_argument_names,
    engine_argument_names,
)
from cluster.document import Document, Path, dotted, suggestion
from cluster.schema import ClusterConfig, WorkerEntry

CPU_BLOCK_TOKENS = 32
EVERYWHERE = ("0.0.0.0", "::")
"""Addresses to listen on that nobody can connect to."""
SAME_EVERYWHERE = ("block_size", "dtype", "kv_cache_dtype")
"""Engine arguments in which workers that exchange KV may not differ."""


def engine_arguments(document: Document) -> None:
    """Names under ``engine`` (here and at each worker) and ``api.arguments``."""
    data = document.data if isinstance(document.data, dict) else {}
    engine, api = engine_argument_names(), api_argument_names()
    elsewhere = dict.fromkeys(api or (), "it is an option of the API server: see 'api.arguments'")
    workers = data.get("workers")
    indexes = range(len(workers) if isinstance(workers, list) else 0)
    for path in [("engine",), *(("workers", index, "engine") for index in indexes)]:
        _names(document, path, engine, RESERVED_ENGINE_ARGUMENTS, elsewhere)
    elsewhere = dict.fromkeys(engine or (), "it is an argument of the engine: see 'engine'")
    _names(document, ("api", "arguments"), api, RESERVED_API_ARGUMENTS, elsewhere)


def cluster(document: Document, config: ClusterConfig) -> None:
    """Everything that concerns more than one value."""
    _worker_names(document, config)
    _roles(document, config)
    _rebalance(document, config)
    _devices(document, config)
    _ports(document, config)
    _engines(document, config)


def _names(
    document: Document,
    path: Path,
    known: frozenset[str] | None,
    reserved: Mapping[str, str],
    elsewhere: Mapping[str, str],
) -> None:
    data: Any = document.data
    for part in path:
        if isinstance(data, list) and isinstance(part, int):
            data = data[part]
        else:
            data = data.get(part) if isinstance(data, dict) else None
    for name in data if isinstance(data, dict) else ():
        if name in reserved:
            document.problem((*path, name), f"may not be set here: {reserved[name]}")
        elif known is not None and name not in known:
            hint = suggestion(name, known - reserved.keys())
            what = elsewhere.get(name, f"vLLM has no such argument{hint}")
            document.problem((*path, name), what)


def _worker_names(document: Document, config: ClusterConfig) -> None:
    first: dict[str, int] = {}
    for index, entry in enumerate(config.workers):
        if entry.name in first:
            line = document.line(("workers", first[entry.name], "name"))
            document.problem(
                ("workers", index, "name"), f"{entry.name!r} is taken by the worker on line {line}"
            )
        if entry.name == "coordinator":
            document.problem(("workers", index, "name"), "'coordinator' is not a worker's name")
        if entry.host in EVERYWHERE:
            document.problem(
                ("workers", index, "host"),
                f"must be an address that peers can connect to (got {entry.host!r})",
            )
        first.setdefault(entry.name, index)


def _roles(document: Document, config: ClusterConfig) -> None:
    if not any(entry.role in ("decode", "mixed") for entry in config.workers):
        document.problem(("workers",), "at least one worker must have the role decode or mixed")


def _rebalance(document: Document, config: ClusterConfig) -> None:
    """Roles that follow demand need workers that may turn, and nobody else that turns them."""
    path: Path = ("placement", "rebalance", "mode")
    if config.placement.rebalance.mode != "auto":
        return
    if config.placement.ratio.mode == "reactive":
        document.problem(path, "placement.ratio turns workers already (reactive): one of them can")
    able = [entry for entry in config.workers if entry.role != "mixed" and not entry.fixed]
    if len(able) < 2 or len(config.workers) < 3:
        document.problem(
            path,
            "auto needs three workers, and two of them that may turn: with the role prefill or "
            f"decode, not fixed (there are {len(config.workers)}, {len(able)} may turn)",
        )


def _devices(document: Document, config: ClusterConfig) -> None:
    owner: dict[tuple[str, int], str] = {}
    for index, entry in enumerate(config.workers):
        for position, device in enumerate(entry.devices):
            place = (entry.host, device)
            if place in owner:
                document.problem(
                    ("workers", index, "devices", position),
                    f"GPU {device} of {entry.host} is already used by worker {owner[place]!r}",
                )
            owner.setdefault(place, entry.name)


def _ports(document: Document, config: ClusterConfig) -> None:
    """Fixed ports that two servers of one host would both want."""
    wanted: list[tuple[str, int, Path]] = [
        (config.coordinator.host, config.coordinator.port, ("coordinator", "port")),
        (config.api.host, config.api.port, ("api", "port")),
    ]
    base = config.network.side_channel_port_base
    last = base + len(config.workers) - 1
    if base and last > 65535:
        document.problem(
            ("network", "side_channel_port_base"),
            f"leaves no room for {len(config.workers)} workers (the last would get port {last})",
        )
    for index, entry in enumerate(config.workers):
        wanted.append((entry.host, entry.data_port, ("workers", index, "data_port")))
        wanted.append((entry.host, entry.metrics_port, ("workers", index, "metrics_port")))
        wanted.append((entry.host, entry.health_port, ("workers", index, "health_port")))
        if base:
            wanted.append((entry.host, base + index, ("network", "side_channel_port_base")))
    wanted.sort(key=lambda each: document.has(each[2]))  # blame what was given, not a default
    taken: dict[int, list[tuple[str, Path]]] = {}
    for host, port, path in wanted:
        for other_host, other in taken.get(port, []) if port else []:
            if _overlap(host, other_host):
                document.problem(path, f"port {port} on {host} is already that of {dotted(other)}")
        taken.setdefault(port, []).append((host, path))


def _overlap(host: str, other: str) -> bool:
    return host == other or host in EVERYWHERE or other in EVERYWHERE


def _engines(document: Document, config: ClusterConfig) -> None:
    for name in SAME_EVERYWHERE:
        _same_everywhere(document, config, name)
    for index, entry in enumerate(config.workers):
        _parallelism(document, config, index, entry)
        block_size = (config.engine | entry.engine).get("block_size", CPU_BLOCK_TOKENS)
        if not entry.devices and isinstance(block_size, int) and block_size % CPU_BLOCK_TOKENS:
            document.problem(
                _engine_path(config, index, "block_size"),
                f"must be a multiple of {CPU_BLOCK_TOKENS} on CPU (got {block_size})",
            )


def _same_everywhere(document: Document, config: ClusterConfig, name: str) -> None:
    values = [(config.engine | entry.engine).get(name) for entry in config.workers]
    for index, value in enumerate(values):
        if value != values[0]:
            document.problem(
                _engine_path(config, index, name),
                f"{name} of {config.workers[index].name!r} is {value!r} and that of"
                f" {config.workers[0].name!r} is {values[0]!r}; workers that exchange KV"
                " must agree",
            )


def _parallelism(document: Document, config: ClusterConfig, index: int, entry: WorkerEntry) -> None:
    engine = config.engine | entry.engine
    needed, nodes = 1, 1
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "nnodes"):
        size = engine.get(name, 1)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            document.problem(
                _engine_path(config, index, name),
                f"must be a whole number of at least 1 (got {size!r})",
            )
            return
        if name == "nnodes":
            nodes = size
        else:
            needed *= size
    given = len(entry.devices) * nodes
    if given and "tensor_parallel_size" not in engine:
        fits = given % needed == 0
    else:
        fits = given in (0, needed)
    if not fits:
        document.problem(
            ("workers", index, "devices"),
            f"{given} GPUs do not fit the {needed} that tensor_parallel_size times"
            " pipeline_parallel_size need",
        )


def _engine_path(config: ClusterConfig, index: int, name: str) -> Path:
    """Where the argument was given: at the worker, else for all."""
    if name in config.workers[index].engine:
        return ("workers", index, "engine", name)
    return ("engine", name)

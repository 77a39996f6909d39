"""One YAML file describes one cluster; this is its schema and its meaning.

``parse`` and ``load`` report everything that is wrong at once, each with key and line
(``ConfigError``). ``worker_config`` and ``coordinator_config`` say what one process has
to know; nothing after that looks at the file again. Knows nothing of sockets or engines
and never imports vLLM.
"""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from cluster import check
from cluster.devices import beside_gpus, visible_devices
from cluster.document import Document, read
from cluster.process import free_port, usable_cores
from cluster.schema import (
    ClusterConfig,
    ConfigError,
    CoordinatorEntry,
    EnvironmentValue,
    WorkerEntry,
    tcp_address,
)
from cluster.workflow_files import read_workflows
from coordinator.protocol import Role
from transfer.settings import (
    GPU_NIXL_THREADS,
    LEASE_S,
    kv_transfer_config,
    progress_delay_us,
    transfer_environment,
)

if TYPE_CHECKING:
    from coordinator.server import CoordinatorConfig

__all__ = [
    "ClusterConfig",
    "ConfigError",
    "WorkerConfig",
    "WorkerEntry",
    "coordinator_config",
    "default_cluster",
    "joined",
    "load",
    "parse",
    "with_keys",
    "worker_config",
]

CORES_PER_ENGINE = 2
CORES_FOR_COORDINATOR = 2


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that one worker process is told.

    ``coordinator``: the core's address; ``model``: folder or Hugging Face id; ``engine``:
    the file's engine arguments; ``environment``: the file's variables; ``ucx_tls`` empty
    leaves the choice to UCX; ports of 0 are picked by the process; ``loopback``: all
    workers are on this machine's CPU; ``node_rank`` and ``leader``: of an engine that spans
    nodes, which this is and the first one's address; ``near``: what the file leaves open of
    network devices and ``cores`` is chosen next to its GPUs; ``drain_s``: how long it goes on
    with what it has begun when it is told to end; ``fixed``: its role never changes;
    ``retention``: the core may have its engine keep what ended calls have left; ``kv_host_gib``:
    of host memory, for KV.
    """

    name: str
    role: Role
    coordinator: str
    model: str
    served_model_name: str
    host: str = "127.0.0.1"
    data_port: int = 0
    metrics_port: int = 0
    health_port: int = 0
    devices: list[int] = []
    engine: dict[str, Any] = {}
    environment: dict[str, str] = {}
    nixl_host: str = "127.0.0.1"
    nixl_progress_delay_us: int = 0
    kv_lease_s: int = LEASE_S
    ucx_tls: str = ""
    side_channel_port: int = 0
    loopback: bool = False
    node_rank: int = 0
    leader: str = ""
    cores: str = ""
    near: bool = True
    drain_s: float = 0.0
    fixed: bool = False
    retention: bool = False
    kv_host_gib: float = 0.0

    @property
    def host_bytes(self) -> int:
        """Of host memory, for KV."""
        return int(self.kv_host_gib * 2**30)

    def process_environment(self) -> dict[str, str]:
        """What to set before vLLM is imported; the file's own values win."""
        port = self.side_channel_port or free_port(self.host)
        environment = transfer_environment(
            self.nixl_host, port, loopback=self.loopback, beside_gpus=beside_gpus()
        )
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = visible_devices(self.devices)
        if self.leader:
            environment["VLLM_HOST_IP"] = self.host
        if self.ucx_tls:
            environment["UCX_TLS"] = self.ucx_tls
        return environment | self.environment

    def engine_arguments(self) -> dict[str, Any]:
        """Arguments of vLLM's ``AsyncEngineArgs``. Another engine id at every call.

        Engines order by priority, then arrival, unless the file says otherwise: a client's
        ``priority`` counts there as it does in the core, and errands come last.
        """
        place = {"node_rank": self.node_rank, "master_addr": self.leader} if self.leader else {}
        return (
            {"scheduling_policy": "priority"}
            | self.engine
            | place
            | {
                "model": self.model,
                "served_model_name": [self.served_model_name],
                "kv_transfer_config": kv_transfer_config(
                    f"{self.name}-{uuid.uuid4().hex}",
                    lease_s=self.kv_lease_s,
                    nixl_progress_delay_us=self.nixl_progress_delay_us,
                    nixl_threads=GPU_NIXL_THREADS if self.devices else 0,
                    pins=self.retention,
                    host_bytes=self.host_bytes,
                ),
            }
        )


def load(path: Path) -> ClusterConfig:
    """Reads a cluster file; ConfigError with every problem found."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError([f"{path}: {reason}"]) from error
    return parse(text, str(path))


def parse(text: str, name: str) -> ClusterConfig:
    """Reads a cluster's YAML; ``name`` is its file's. ConfigError with every problem found."""
    document = Document(text, name)
    config = read(document, ClusterConfig) if document.data is not None else None
    check.engine_arguments(document)
    if config is not None:
        check.cluster(document, config)
    elif not document.problems():
        document.problem((), "the file is empty")
    if document.problems() or config is None:
        raise ConfigError(document.problems())
    folder = Path(name).parent
    changes: dict[str, Any] = {"model": _model_of(config.model, folder)}
    if config.workflows:
        changes["workflows"] = [_path_of(path, folder) for path in config.workflows]
        read_workflows(changes["workflows"], config.workflow_limits)
    if config.coordinator.store:
        store = _path_of(config.coordinator.store, folder)
        changes["coordinator"] = msgspec.structs.replace(config.coordinator, store=store)
    if "name" not in document.data:
        changes["name"] = _name_of_file(Path(name))
    return msgspec.structs.replace(config, **changes)


def default_cluster(model: str, gpus: int) -> ClusterConfig:
    """A cluster for this machine: one worker per GPU, or three on the CPU without any."""
    if gpus == 0:
        return ClusterConfig(
            model=model,
            name="default",
            engine=dict(_CPU_DEFAULT_ENGINE),
            environment={"VLLM_CPU_KVCACHE_SPACE": 1},
            workers=[
                WorkerEntry(name="prefill-0", role="prefill"),
                WorkerEntry(name="decode-0", role="decode"),
                WorkerEntry(name="decode-1", role="decode"),
            ],
        )
    if gpus == 1:
        return ClusterConfig(
            model=model,
            name="default",
            workers=[WorkerEntry(name="mixed-0", role="mixed", devices=[0])],
        )
    prefills = max(1, gpus // 4)
    workers = [
        WorkerEntry(name=f"prefill-{device}", role="prefill", devices=[device])
        for device in range(prefills)
    ] + [
        WorkerEntry(name=f"decode-{device - prefills}", role="decode", devices=[device])
        for device in range(prefills, gpus)
    ]
    return ClusterConfig(model=model, name="default", workers=workers)


_CPU_DEFAULT_ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 4096,
    "max_num_seqs": 32,
}


def joined(
    cluster: ClusterConfig, entry: WorkerEntry, coordinator: str | None = None
) -> ClusterConfig:
    """The cluster with ``entry`` in it, in the place of the worker of that name if there is one.

    ``coordinator``: its address if it is not the file's. ConfigError for anything but
    ``tcp://host:port``.
    """
    others = [entry if old.name == entry.name else old for old in cluster.workers]
    workers = others if entry in others else [*others, entry]
    changed = msgspec.structs.replace(cluster, workers=workers)
    if coordinator is None:
        return changed
    found = re.fullmatch(r"tcp://\[?([A-Za-z0-9._:-]+?)\]?:(\d{1,5})", coordinator)
    if not found or int(found[2]) > 65535:
        raise ConfigError([f"coordinator: must be tcp://host:port (got {coordinator!r})"])
    place = CoordinatorEntry(host=found[1], port=int(found[2]))
    return msgspec.structs.replace(changed, coordinator=place)


def with_keys(cluster: ClusterConfig, path: Path, admin: bool = False) -> ClusterConfig:
    """The cluster with the API keys of a file, too: one a line, empty lines left out. ``admin``:
    they are those of administrators.

    ConfigError when the file can't be read or has none: an API that was to be closed would
    be open.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError([f"{path}: {reason}"]) from error
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ConfigError([f"{path}: there is no API key in it"])
    if admin:
        api = msgspec.structs.replace(cluster.api, admin_keys=[*cluster.api.admin_keys, *keys])
    else:
        api = msgspec.structs.replace(cluster.api, keys=[*cluster.api.keys, *keys])
    return msgspec.structs.replace(cluster, api=api)


def worker_config(cluster: ClusterConfig, name: str, model: str) -> WorkerConfig:
    """What the worker ``name`` is told. ``model`` is the prepared model's folder or id.

    To be called on the worker's own host: its cores count. ConfigError without that worker.
    """
    entry = cluster.worker(name)
    neighbours = sum(other.host == entry.host for other in cluster.workers)
    cores = usable_cores()
    free_cores = max(0, (cores - CORES_FOR_COORDINATOR) // neighbours - CORES_PER_ENGINE)
    network = cluster.network
    delay_us = network.nixl_progress_delay_us
    base = network.side_channel_port_base
    environment = {} if entry.devices else _cpu_environment(max(1, cores // neighbours))
    return WorkerConfig(
        name=name,
        role=entry.role,
        coordinator=cluster.control_address,
        model=model,
        served_model_name=cluster.served_name,
        host=entry.host,
        data_port=entry.data_port,
        metrics_port=entry.metrics_port,
        health_port=entry.health_port,
        devices=entry.devices,
        engine=_engine_of(cluster, entry),
        environment=environment | _as_text(cluster.environment) | _as_text(entry.environment),
        nixl_host=network.nixl_host or entry.host,
        nixl_progress_delay_us=progress_delay_us(free_cores) if delay_us is None else delay_us,
        kv_lease_s=network.lease_s,
        ucx_tls=network.ucx_tls or "",
        side_channel_port=base + cluster.workers.index(entry) if base else 0,
        loopback=_is_loopback(cluster),
        cores=entry.cores,
        near=network.near,
        drain_s=cluster.stop.drain_s,
        fixed=entry.fixed,
        retention=cluster.placement.retention,
        kv_host_gib=entry.kv_host_gib,
    )


def coordinator_config(cluster: ClusterConfig, model: str) -> CoordinatorConfig:
    """What the coordinator is told. ``model`` is the prepared model's folder or id."""
    from coordinator.server import CoordinatorConfig

    on_cpu = not any(entry.devices for entry in cluster.workers)
    return CoordinatorConfig(
        control_address=tcp_address(cluster.coordinator.host, cluster.coordinator.port),
        api_host=cluster.api.host,
        api_port=cluster.api.port,
        api_servers=cluster.api.servers,
        api_keys=cluster.api.keys,
        api_arguments=cluster.api.arguments,
        body_bytes_max=cluster.api.body_bytes_max,
        model=model,
        served_model_name=[cluster.served_name],
        engine=(_CPU_ENGINE if on_cpu else {}) | cluster.engine,
        limits=cluster.limits,
        placement=cluster.placement,
        environment=(_cpu_environment(1) if on_cpu else {}) | _as_text(cluster.environment),
        workflows=read_workflows(cluster.workflows, cluster.workflow_limits),
        workflow_limits=cluster.workflow_limits,
        store=cluster.coordinator.store or "",
        admin_keys=cluster.api.admin_keys,
    )


_CPU_ENGINE = {"distributed_executor_backend": "uni"}
"""Without it vLLM runs another process per CPU engine, whose wake-ups get lost."""


def _cpu_environment(threads: int) -> dict[str, str]:
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
    }


def _engine_of(cluster: ClusterConfig, entry: WorkerEntry) -> dict[str, Any]:
    engine = cluster.engine | entry.engine
    if not entry.devices:
        return _CPU_ENGINE | engine
    devices = len(entry.devices) * engine.get("nnodes", 1)
    pipeline = engine.get("pipeline_parallel_size", 1)
    return {"tensor_parallel_size": devices // pipeline} | engine


def _is_loopback(cluster: ClusterConfig) -> bool:
    local = all(entry.host in ("127.0.0.1", "localhost") for entry in cluster.workers)
    return local and not any(entry.devices for entry in cluster.workers)


def _as_text(environment: dict[str, EnvironmentValue]) -> dict[str, str]:
    return {name: str(value) for name, value in environment.items()}


def _path_of(path: str, folder: Path) -> str:
    """A path of the cluster's file, from the file's folder."""
    return str((folder / Path(path).expanduser()).resolve())


def _model_of(model: str, folder: Path) -> str:
    """A model given as a path, from the file's folder; other names as they are."""
    if model.startswith(("/", "./", "../", "~")):
        return _path_of(model, folder)
    return model


def _name_of_file(path: Path) -> str:
    return re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")[:63] or "cluster"

"""The parts of a cluster file: every key, its type, its bounds and its default.

Only declares. What excludes what is in ``check``; reading is in ``config``.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from coordinator.limits import Limits, NotNegative, Placement, Seconds
from coordinator.protocol import Role
from coordinator.workflow.limits import WorkflowLimits
from transfer.settings import LEASE_S, LEASE_S_MIN

Name = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[a-z0-9][a-z0-9-]{0,62}$",
        description="lower-case letters, digits and dashes, at most 63",
    ),
]
Host = Annotated[
    str, msgspec.Meta(pattern=r"^[A-Za-z0-9._:-]{1,253}$", description="a host name or address")
]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
"""A TCP port; 0 means a free one."""
Cores = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^([0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*)?$", description="cores like 0-15,32"
    ),
]
EnvironmentValue = str | int | float
BodyBytes = Annotated[int, msgspec.Meta(ge=1024, le=1 << 30)]


class ConfigError(Exception):
    """A cluster file is not usable. ``problems``: one line of text for each reason."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the file's parts."""


class WorkerEntry(Section, frozen=True, kw_only=True):
    """One engine. ``devices``: GPU indexes on ``host``, none for CPU.

    ``metrics_port``: where its engine's Prometheus metrics are served; ``health_port``: where
    it answers ``/live`` and ``/ready``; 0 for nowhere. ``cores``: on which its processes run,
    like ``0-15,32``; else those next to its GPUs. ``fixed``: its role never changes.
    ``kv_host_gib``: of its host's memory, for KV that its own cache has no room for; 0 for none.
    """

    name: Name
    role: Role
    host: Host = "127.0.0.1"
    devices: list[NotNegative] = []
    engine: dict[str, Any] = {}
    environment: dict[str, EnvironmentValue] = {}
    data_port: Port = 0
    metrics_port: Port = 0
    health_port: Port = 0
    cores: Cores = ""
    fixed: bool = False
    kv_host_gib: Annotated[float, msgspec.Meta(ge=0, le=65536)] = 0.0


class CoordinatorEntry(Section, frozen=True, kw_only=True):
    """Where the core listens for workers and API processes.

    ``store``: the file in which it keeps workflows, in the cluster's run directory when not
    given; empty to forget them with the core.
    """

    host: Host = "127.0.0.1"
    port: Port = 5570
    store: str | None = None


class ApiEntry(Section, frozen=True, kw_only=True):
    """The HTTP front. ``arguments``: options of vLLM's own API server; ``admin_keys``: if there are
    any, only who has one of them changes roles of workers and drains them."""

    host: Host = "127.0.0.1"
    port: Port = 8000
    servers: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    keys: list[Annotated[str, msgspec.Meta(min_length=1)]] = []
    arguments: dict[str, Any] = {}
    body_bytes_max: BodyBytes = 32 * 1024 * 1024
    admin_keys: list[Annotated[str, msgspec.Meta(min_length=1)]] = []


class Network(Section, frozen=True, kw_only=True):
    """How KV travels.

    ``nixl_host``: where peers reach a worker's NIXL, its own host when not given;
    ``nixl_progress_delay_us``: pause of NIXL's polling, chosen by free cores when not given;
    ``side_channel_port_base``: first worker's handshake port, the next one's is one higher;
    0 for free ports; ``lease_s``: how long a prefill worker holds blocks for a reader that
    has not spoken up.
    """

    nixl_host: Host | None = None
    ucx_tls: str | None = None
    nixl_progress_delay_us: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] | None = None
    side_channel_port_base: Port = 0
    lease_s: Annotated[int, msgspec.Meta(ge=LEASE_S_MIN, le=3600)] = LEASE_S
    near: bool = True


class Start(Section, frozen=True, kw_only=True):
    """``timeout_s``: how long the cluster may take to become ready."""

    timeout_s: Seconds = 600.0


class Stop(Section, frozen=True, kw_only=True):
    """``drain_s``: how long a worker that is told to end goes on with what it has begun. What
    is left then goes on elsewhere."""

    drain_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 8.0


class ClusterConfig(Section, frozen=True, kw_only=True):
    """A whole cluster. ``name`` is the file's, unless given; ``workflows``: files that declare
    some."""

    model: Annotated[str, msgspec.Meta(min_length=1)]
    workers: list[WorkerEntry]
    name: Name = "cluster"
    served_model_name: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    engine: dict[str, Any] = {}
    environment: dict[str, EnvironmentValue] = {}
    coordinator: CoordinatorEntry = CoordinatorEntry()
    api: ApiEntry = ApiEntry()
    limits: Limits = Limits()
    placement: Placement = Placement()
    network: Network = Network()
    start: Start = Start()
    stop: Stop = Stop()
    workflows: list[Annotated[str, msgspec.Meta(min_length=1)]] = []
    workflow_limits: WorkflowLimits = WorkflowLimits()

    @property
    def served_name(self) -> str:
        """The model's name in the API."""
        return self.served_model_name or self.model

    @property
    def control_address(self) -> str:
        """Where workers and API processes of this file reach the core."""
        return tcp_address(reachable(self.coordinator.host), self.coordinator.port)

    @property
    def base_url(self) -> str:
        """Where clients on this machine reach the API, without ``/v1``."""
        return tcp_address(reachable(self.api.host), self.api.port).replace("tcp", "http", 1)

    def worker(self, name: str) -> WorkerEntry:
        """The worker of that name; ConfigError if there is none."""
        for entry in self.workers:
            if entry.name == name:
                return entry
        known = ", ".join(entry.name for entry in self.workers)
        raise ConfigError([f"no worker {name!r} in this cluster; there are: {known}"])


def tcp_address(host: str, port: int) -> str:
    """``tcp://host:port``, with brackets around an IPv6 address."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def reachable(host: str) -> str:
    """Where to connect, on the same machine, to what listens on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)

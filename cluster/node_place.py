"""Where a worker belongs on this host: asks the host, and sets what its file leaves open.

``UCX_NET_DEVICES`` and the process's cores, next to its GPUs (``cluster.topology``). What
the file says stands: ``UCX_NET_DEVICES`` in ``environment``, ``cores`` of the worker, or
``network.near: false`` for none of it.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from cluster.config import WorkerConfig
from cluster.devices import visible_devices
from cluster.topology import Place, TopologyError, core_list, parse, place

logger = logging.getLogger("pythia.worker")

NET_DEVICES = "UCX_NET_DEVICES"
SYSTEM = Path("/sys/class")
DEVICES = Path("/dev/infiniband")
ACTIVE = "ACTIVE"
RDMA = ("rc", "dc", "ud", "ib")
"""How the names of UCX's transports over RDMA begin."""
ASK_S = 20.0


def of_worker(config: WorkerConfig) -> Place:
    """What is to be set for a worker that runs here. TopologyError if its ``cores`` are no list."""
    near = Place()
    if config.near and config.devices:
        near = _near(visible_devices(config.devices))
    given = config.environment.get(NET_DEVICES, "")
    devices = [] if given or _excludes_rdma(config.environment | _tls(config)) else near.net_devices
    return Place(devices, core_list(config.cores) if config.cores else near.cores)


def apply(config: WorkerConfig) -> None:
    """Sets it for this process and its children. To be called before anything starts threads."""
    found = of_worker(config)
    if found.net_devices:
        os.environ[NET_DEVICES] = ",".join(found.net_devices)
        logger.info("%s=%s, next to GPU %s", NET_DEVICES, os.environ[NET_DEVICES], config.devices)
    allowed = os.sched_getaffinity(0) & set(found.cores)
    if allowed:
        # A control group may leave us fewer; none of them is no reason to run nowhere.
        os.sched_setaffinity(0, allowed)
        logger.info("on %d cores next to GPU %s", len(allowed), config.devices)


def describe(config: WorkerConfig) -> list[str]:
    """What ``--dry-run`` says of a worker on this host."""
    found = of_worker(config)
    environment = config.process_environment()
    side = config.side_channel_port or "a free port"
    host = environment["VLLM_NIXL_SIDE_CHANNEL_HOST"]
    lines = [
        f"data on {config.host}:{config.data_port or 'a free port'}, side channel on {host}:{side}"
    ]
    settings = {
        name: value for name, value in environment.items() if name.startswith(("UCX_", "CUDA_"))
    }
    if found.net_devices:
        settings[NET_DEVICES] = ",".join(found.net_devices)
    lines += [f"{name}={value}" for name, value in sorted(settings.items())]
    lines.append(f"cores {spans(found.cores)}" if found.cores else "cores: any")
    return lines


def spans(cores: list[int]) -> str:
    """``[0, 1, 2, 8]`` as ``0-2,8``."""
    parts: list[list[int]] = []
    for core in cores:
        if parts and core == parts[-1][-1] + 1:
            parts[-1].append(core)
        else:
            parts.append([core])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def _tls(config: WorkerConfig) -> dict[str, str]:
    return {"UCX_TLS": config.ucx_tls} if config.ucx_tls else {}


def _excludes_rdma(environment: Mapping[str, str]) -> bool:
    """A list of transports without RDMA: naming an RDMA device would leave it no network."""
    tls = environment.get("UCX_TLS", "")
    if not tls or tls == "all" or tls.startswith("^"):
        return False
    return not any(word.strip()[:2] in RDMA for word in tls.split(","))


def _near(visible: str) -> Place:
    """Next to these GPUs; nothing, and why in the log, if this host does not tell."""
    if not all(part.isdecimal() for part in visible.split(",")):
        logger.info("GPUs have no numbers here (%s): UCX chooses its devices", visible)
        return Place()
    try:
        done = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=ASK_S, check=True
        )
        gpus = parse(done.stdout)
    except (OSError, subprocess.SubprocessError, TopologyError) as error:
        logger.warning("nvidia-smi does not tell what is next to a GPU: %s", error)
        return Place()
    return place(gpus, [int(part) for part in visible.split(",")], active_ports(SYSTEM, DEVICES))


def active_ports(system: Path, devices: Path) -> list[str]:
    """RDMA ports that have a link, as UCX names them: ``mlx5_0:1``.

    A container sees all of its host's in ``/sys``, and may open those in ``/dev``.
    """
    usable = {
        path.read_text().strip()
        for path in system.glob("infiniband_verbs/uverbs*/ibdev")
        if os.access(devices / path.parent.name, os.R_OK | os.W_OK)
    }
    return [
        f"{path.parts[-4]}:{path.parts[-2]}"
        for path in sorted(system.glob("infiniband/*/ports/*/state"))
        if path.parts[-4] in usable and ACTIVE in path.read_text()
    ]

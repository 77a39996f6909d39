"""A cluster file as a Slurm job: who goes onto which node, and the batch script.

Pure text and numbers. The file's hosts are places, not names: every host that it names
is one node of the job, the coordinator's the first, and what the nodes are called is known
when the job runs (``cluster.slurm_job``).
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cluster.schema import ClusterConfig, ConfigError, WorkerEntry

NOTICE_S = 60
"""How long before its time limit a job is told to end, besides the time to drain. All is killed
twice 20 s after that at the latest."""
LOOPBACK = "127.0.0.1"
NO_PLACE = frozenset((LOOPBACK, "localhost", "::1", "0.0.0.0", "::"))
"""Hosts that mean no machine in particular."""

_PARTITION = re.compile(r"[A-Za-z0-9_.,-]+")
_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}")
_OPTION = re.compile(r"--[a-z][a-z-]*(=[^\s\"'\\]+)?")


class JobRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a person may say about the job besides the cluster file.

    ``nodes``: for a file of one host, over how many its workers are spread; ``time``: the
    limit as Slurm takes it; ``options``: further ones of ``sbatch``, each ``--name=value``;
    ``then``: a shell command to run when the cluster is ready, after which the job ends.
    """

    nodes: int | None = None
    partition: str | None = None
    time: str | None = None
    options: tuple[str, ...] = ()
    then: str | None = None


def places(config: ClusterConfig, nodes: int | None) -> list[int]:
    """The node of each worker, by number; the coordinator's is 0. ConfigError if unclear."""
    hosts = [_place(host) for host in (config.coordinator.host, *(e.host for e in config.workers))]
    if not hosts[0]:
        hosts[0] = hosts[1]  # the coordinator goes where the first worker does
    distinct = list(dict.fromkeys(hosts))
    if len(distinct) > 1 and "" in distinct:
        raise ConfigError(
            ["workers: some have a host and others none: give all of them one, or none"]
        )
    if len(distinct) == 1:
        return _spread(len(config.workers), 1 if nodes is None else nodes)
    if nodes is not None and nodes != len(distinct):
        raise ConfigError([f"--nodes {nodes}: the file names {len(distinct)} hosts, one per node"])
    return [distinct.index(host) for host in hosts[1:]]


def on_nodes(
    config: ClusterConfig, places: Sequence[int], addresses: Sequence[str]
) -> ClusterConfig:
    """The cluster with the nodes' addresses for hosts.

    GPUs of workers that shared one host in the file and do no longer are counted anew on
    every node. ConfigError for what can't be on several nodes.
    """
    if max(places) == 0:
        addresses = [LOOPBACK]
    elif config.network.nixl_host is not None:
        raise ConfigError(
            ["network.nixl_host: is one address for all workers, who are on several nodes here"]
        )
    spread = max(places) > 0 and len({_place(entry.host) for entry in config.workers}) == 1
    first_device = [0] * (max(places) + 1)
    workers: list[WorkerEntry] = []
    for entry, place in zip(config.workers, places, strict=True):
        devices = entry.devices
        if spread:
            start = first_device[place]
            devices = list(range(start, start + len(devices)))
            first_device[place] += len(devices)
        workers.append(msgspec.structs.replace(entry, host=addresses[place], devices=devices))
    api = config.api
    if _place(api.host):
        api = msgspec.structs.replace(api, host=addresses[0])
    coordinator = msgspec.structs.replace(config.coordinator, host=addresses[0])
    return msgspec.structs.replace(config, workers=workers, coordinator=coordinator, api=api)


def gpus_per_node(config: ClusterConfig, nodes: int | None) -> int:
    """GPUs that every node of the job must have; 0 for none."""
    where = places(config, nodes)
    placed = on_nodes(config, where, [f"node-{place}" for place in range(max(where) + 1)])
    return max((device + 1 for entry in placed.workers for device in entry.devices), default=0)


def script(
    config: ClusterConfig,
    request: JobRequest,
    log_folder: Path,
    program: Sequence[str],
    environment: dict[str, str],
) -> str:
    """The batch script. ``program``: what runs on the job's first node, see ``slurm_job``.

    Whole nodes are asked for. ConfigError with every problem of ``request``.
    """
    problems = _problems(request, log_folder)
    if problems:
        raise ConfigError(problems)
    gpus = gpus_per_node(config, request.nodes)
    options = [
        f"--job-name=pythia-{config.name}",
        f"--nodes={max(places(config, request.nodes)) + 1}",
        "--ntasks-per-node=1",
        "--exclusive",
        "--mem=0",
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        *([f"--partition={request.partition}"] if request.partition else []),
        *([f"--time={request.time}"] if request.time else []),
        f"--signal=B:TERM@{NOTICE_S + math.ceil(config.stop.drain_s)}",
        f'--output="{log_folder}/%j.log"',
        *request.options,
    ]
    lines = [
        "#!/bin/bash",
        f"# The cluster {config.name} as one job, made by 'pythia slurm'.",
        *(f"#SBATCH {option}" for option in options),
        "",
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(environment.items())),
        "",
        "# Takes this shell's place, and with it the signal that the time is nearly up.",
        f"exec {shlex.join(program)}",
    ]
    return "\n".join(lines) + "\n"


def step_command(node: str, gpus: int, command: Sequence[str]) -> list[str]:
    """The command line that runs ``command`` on one node of the job.

    All steps see all GPUs of their node: workers choose by index, and engines on one node
    move KV directly from GPU to GPU only if each can see the other's.
    """
    return [
        "srun",
        "--overlap",
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={node}",
        "--cpu-bind=none",
        "--mem=0",
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        "--kill-on-bad-exit=0",
        *command,
    ]


def _place(host: str) -> str:
    return "" if host in NO_PLACE else host


def _spread(workers: int, nodes: int) -> list[int]:
    """As evenly as neighbours in the file allow, in its order."""
    if not 1 <= nodes <= workers:
        raise ConfigError([f"--nodes {nodes}: must be from 1 to {workers}, the number of workers"])
    return [math.floor(index * nodes / workers) for index in range(workers)]


def _problems(request: JobRequest, log_folder: Path) -> list[str]:
    problems = []
    if request.partition is not None and not _PARTITION.fullmatch(request.partition):
        problems.append(f"--partition {request.partition!r}: is no partition's name")
    if request.time is not None and not _TIME.fullmatch(request.time):
        problems.append(
            f"--time {request.time!r}: must be minutes, hours:minutes:seconds or days-hours"
        )
    problems += [
        f"--sbatch {option!r}: must be one option of sbatch, like --account=name"
        for option in request.options
        if not _OPTION.fullmatch(option)
    ]
    if request.then is not None and not request.then.strip():
        problems.append("--then: the command is empty")
    if request.then is not None and "\0" in request.then:
        problems.append("--then: the command has a character that no command may have")
    if re.search(r'["\n%\\]', str(log_folder)):
        problems.append(f"{log_folder}: Slurm can't write into a folder with such a name")
    return problems

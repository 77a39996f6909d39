"""``pythia bench idle``: what a cluster costs while nobody asks it anything.

One prefill and two decode workers, warmed up by calls through each; then nothing is sent and
the kernel's account of processor time is read twice. It does not look for what uses it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress

from cluster.bench.report import table, write
from cluster.bench.sides import (
    Client,
    cluster_config,
    command_of,
    process_cpu_s,
    progress_bar,
    scratch,
)
from cluster.launch import COORDINATOR, LocalCluster
from cluster.process import session_members
from cluster.progress import progress_for
from coordinator.limits import Placement

COMMAND = "pythia bench idle"
ROLES = ("prefill", "decode", "decode")
SETTLE_S = 5.0
REMOTE_TOKENS = 64


class Setup(msgspec.Struct, frozen=True):
    """What is measured. ``seconds``: how long the cluster is watched at rest."""

    model: str = "tiny-llama"
    seconds: float = 30.0
    warm_up_calls: int = 16


def run(setup: Setup | None = None, console: Console | None = None) -> dict[str, Any]:
    """Measure. Returns ``{"figures": ..., "rows": ...}``; LaunchError or ChildError if a
    process fails."""
    setup = setup or Setup()
    console = console or Console(stderr=True)
    placement = Placement(policy="least_kv", remote_prefill_min_tokens=REMOTE_TOKENS)
    config = cluster_config("bench-idle", setup.model, ROLES, placement=placement)
    with scratch() as folder:
        cluster = LocalCluster(config, folder, progress=progress_for(console))
        with cluster, progress_bar(console, round(SETTLE_S + setup.seconds)) as progress:
            asyncio.run(_warm_up(setup, cluster, folder))
            _wait(progress, SETTLE_S, "settling")
            processes = _processes(cluster)
            before_s = {pid: process_cpu_s(pid) for pid in processes}
            began_s = time.monotonic()
            _wait(progress, setup.seconds, "at rest")
            elapsed_s = time.monotonic() - began_s
            used_s = {pid: process_cpu_s(pid) - before_s[pid] for pid in processes}
    rows = [
        {**names, "cpu_percent": 100 * used_s[pid] / elapsed_s} for pid, names in processes.items()
    ]
    return {"figures": figures(rows) | {"seconds": elapsed_s}, "rows": rows}


def main(json_path: Path | None = None, **options: Any) -> int:
    """The command: a table, and with ``json_path`` a JSON file. ``options`` make a ``Setup``."""
    console = Console()
    result = run(Setup(**options), console)
    report = write(json_path, COMMAND, result["figures"], result["rows"])
    table(console, "percent of one core at rest", report["rows"])
    figures = [{"figure": name, "value": value} for name, value in report["figures"].items()]
    table(console, "a worker is all of its processes", figures)
    return 0


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Percent of one core: the busiest worker's, all its processes together; the core's and
    the busiest API process's."""

    def worst(kind: str) -> float:
        totals: dict[str, float] = {}
        for row in rows:
            if row["kind"] == kind:
                totals[row["name"]] = totals.get(row["name"], 0.0) + row["cpu_percent"]
        return max(totals.values())

    return {
        "idle_cpu_percent_per_worker": worst("worker"),
        "idle_cpu_percent_core": worst("core"),
        "idle_cpu_percent_api": worst("api"),
    }


async def _warm_up(setup: Setup, cluster: LocalCluster, folder: Path) -> None:
    async with Client(setup.model, folder) as client:
        for tokens in (REMOTE_TOKENS // 2, 4 * REMOTE_TOKENS):
            await client.fit_prompts(cluster.base_url, tokens)
            client.next_prompts()
            await client.send(cluster.base_url, setup.warm_up_calls, 4, 16)


def _wait(progress: Progress, seconds: float, what: str) -> None:
    deadline_s = time.monotonic() + seconds
    while (left_s := deadline_s - time.monotonic()) > 0:
        task = progress.task_ids[0]
        progress.update(task, description=what)
        time.sleep(min(1.0, left_s))
        progress.advance(task)


def _processes(cluster: LocalCluster) -> dict[int, dict[str, str]]:
    """Every process of the cluster: of what kind it is, and whose."""
    found = {}
    for name, leader in cluster.processes.items():
        for pid in session_members(leader):
            command = command_of(pid)
            kind, owner = ("core", name) if name == COORDINATOR else ("worker", name)
            process = "main" if pid == leader else "helper"
            if "EngineCore" in command:
                process = "engine"
            elif "coordinator.api" in command:
                kind, owner, process = "api", f"API process {pid}", "main"
            found[pid] = {"kind": kind, "name": owner, "process": process}
    return found

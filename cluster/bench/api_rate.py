"""The API layer of ``pythia bench overhead``: tokens per second that API processes deliver.

A fake worker says tokens at will, so nothing but the API processes, and the client that
reads their streams, can be slow. Only events are counted: tokens that share one because the
API fell behind count as one.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster import fake_worker
from cluster.bench.sides import (
    Client,
    cluster_config,
    command_of,
    process_cpu_s,
    progress_bar,
    scratch,
)
from cluster.launch import COORDINATOR, LocalCluster, process_command
from cluster.process import session_members
from cluster.progress import progress_for
from cluster.schema import ApiEntry
from cluster.template import TEMPLATE

SEATS_PER_API = 32
CALLS_PER_SEAT = 2
OUTPUT_TOKENS = 256
API_COUNTS = (1, 2)


def measure(model: str, rounds: int, console: Console) -> list[dict[str, Any]]:
    """One row per round, with one API process and with two."""
    rows = []
    for servers in API_COUNTS:
        config = cluster_config(
            "bench-api",
            model,
            ["decode"],
            {"max_num_seqs": SEATS_PER_API * max(API_COUNTS)},
            api=ApiEntry(port=0, servers=servers),
        )
        with scratch() as folder:
            cluster = LocalCluster(
                config, folder, progress=progress_for(console), command_of=_command_of
            )
            with cluster, progress_bar(console, 1 + rounds) as progress:
                progress.update(progress.task_ids[0], description=f"{servers} API processes")
                for number in range(1 + rounds):
                    row = asyncio.run(_round(model, cluster, servers, folder))
                    progress.advance(progress.task_ids[0])
                    if number:
                        rows.append({"part": "api", "round": number, **row})
    return rows


def _command_of(name: str, config_path: Path) -> list[str]:
    if name == TEMPLATE:
        return []
    if name == COORDINATOR:
        return process_command(name, config_path)
    return fake_worker.command(config_path, name)


async def _round(
    model: str, cluster: LocalCluster, servers: int, folder: Path
) -> dict[str, float | int]:
    apis = _api_processes(cluster.processes[COORDINATOR])
    assert len(apis) == servers, f"{len(apis)} API processes instead of {servers}"
    seats = SEATS_PER_API * servers
    async with Client(model, folder) as client:
        before_s = {api: process_cpu_s(api) for api in apis}
        began_s = time.monotonic()
        outcome = await client.send(cluster.base_url, seats * CALLS_PER_SEAT, seats, OUTPUT_TOKENS)
        elapsed_s = time.monotonic() - began_s
        used_s = [process_cpu_s(api) - before_s[api] for api in apis]
    return {
        "api_processes": servers,
        "tokens_per_s": outcome.events / outcome.elapsed_s,
        "tokens_per_event": outcome.output_tokens / outcome.events,
        "tokens_per_cpu_s": outcome.events / sum(used_s),
        "least_busy_api_percent": 100 * min(used_s) / elapsed_s,
        "busiest_api_percent": 100 * max(used_s) / elapsed_s,
    }


def _api_processes(coordinator: int) -> list[int]:
    members = session_members(coordinator)
    return [member for member in members if "coordinator.api" in command_of(member)]


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians over the rounds: with one API process, with two, and per second of processor
    time, which is what one process could do with a core of its own."""

    def median(servers: int, name: str) -> float:
        values = [float(row[name]) for row in rows if row["api_processes"] == servers]
        return statistics.median(values)

    return {
        "api_tokens_per_s": median(1, "tokens_per_s"),
        "api_tokens_per_s_2": median(2, "tokens_per_s"),
        "api_tokens_per_cpu_s": median(1, "tokens_per_cpu_s"),
        "api_tokens_per_cpu_s_2": median(2, "tokens_per_cpu_s"),
    }

"""The hop of ``pythia bench overhead``: what going through another worker adds to a call.

Two clusters are up: in one every prompt is prefilled on a prefill worker and its KV pulled
by a decode worker, in the other a single worker does all. They take turns with prompts of one
length that no cache has seen, one call at a time:

    overhead = time to first token with the hop
             - time to first token without it    (the prefill, and all that any call costs)
             - the transfer                       (as the decode worker's NIXL counts it)

What is left is messages, waiting for a step and the decode worker's own first step. Beside
it the same against the prefill worker's own account of its prefill, from taking the prompt
up to its first token; there the cost of any call (HTTP, tokenising) is part of the rest.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from cluster.bench.sides import Client, cluster_config, metric, progress_bar, scratch
from cluster.launch import LocalCluster
from cluster.progress import progress_for
from coordinator.limits import Placement

WARM_UP_PAIRS = 3
COUNTED_S = 5.0
POLL_S = 0.02
OUTPUT_TOKENS = 2
PREFILL = "vllm:request_prefill_time_seconds"
TRANSFER = "vllm:nixl_xfer_time_seconds"


class HopError(RuntimeError):
    """A call did not go the way it was meant to."""


class _Timer:
    """A histogram of a worker, read call by call."""

    def __init__(self, port: int, name: str) -> None:
        self._port = port
        self._name = name
        self._count = 0.0
        self._sum_s = 0.0

    def read(self) -> None:
        """Forget what has been counted so far."""
        self._count = metric(self._port, f"{self._name}_count")
        self._sum_s = metric(self._port, f"{self._name}_sum")

    async def added_s(self) -> float:
        """What the one call since then took. HopError if there was none, or another number."""
        deadline_s = asyncio.get_running_loop().time() + COUNTED_S
        while (count := metric(self._port, f"{self._name}_count")) == self._count:
            if asyncio.get_running_loop().time() > deadline_s:
                raise HopError(f"{self._name} counted nothing: the call went another way")
            await asyncio.sleep(POLL_S)
        if count != self._count + 1:
            raise HopError(f"{self._name} counted {count - self._count:.0f} instead of one")
        return metric(self._port, f"{self._name}_sum") - self._sum_s


def measure(model: str, pairs: int, prompt_tokens: int, console: Console) -> list[dict[str, Any]]:
    """One row per pair; times in milliseconds."""
    split = cluster_config(
        "bench-hop",
        model,
        ["prefill", "decode"],
        placement=Placement(remote_prefill_min_tokens=1),
    )
    whole = cluster_config("bench-whole", model, ["mixed"])
    with scratch() as folder:
        remote = LocalCluster(split, folder / "split", progress=progress_for(console))
        local = LocalCluster(whole, folder / "whole", progress=progress_for(console))
        with remote, local, progress_bar(console, WARM_UP_PAIRS + pairs) as progress:
            return asyncio.run(
                _take_turns(model, remote, local, pairs, prompt_tokens, folder, progress)
            )


async def _take_turns(
    model: str,
    remote: LocalCluster,
    local: LocalCluster,
    pairs: int,
    prompt_tokens: int,
    folder: Path,
    progress: Progress,
) -> list[dict[str, Any]]:
    rows = []
    ports = {entry.role: entry.metrics_port for entry in remote.config.workers}
    prefill, transfer = _Timer(ports["prefill"], PREFILL), _Timer(ports["decode"], TRANSFER)
    async with Client(model, folder) as client:
        await client.fit_prompts(local.base_url, prompt_tokens)
        for pair in range(WARM_UP_PAIRS + pairs):
            progress.update(progress.task_ids[0], description=f"hop, pair {pair + 1}")
            client.next_prompts()
            row: dict[str, Any] = {"part": "hop", "pair": pair - WARM_UP_PAIRS + 1}
            for cluster in (local, remote) if pair % 2 else (remote, local):
                if cluster is local:
                    row["local_ttft_ms"] = await _ttft_ms(client, local)
                    continue
                prefill.read()
                transfer.read()
                row["remote_ttft_ms"] = await _ttft_ms(client, remote)
                row["prefill_ms"] = 1e3 * await prefill.added_s()
                row["transfer_ms"] = 1e3 * await transfer.added_s()
            progress.advance(progress.task_ids[0])
            if pair >= WARM_UP_PAIRS:
                rows.append(row | _rest(row))
    return rows


async def _ttft_ms(client: Client, cluster: LocalCluster) -> float:
    outcome = await client.send(cluster.base_url, 1, 1, OUTPUT_TOKENS)
    return 1e3 * outcome.ttft_s[0]


def _rest(row: Mapping[str, float]) -> dict[str, float]:
    without_transfer_ms = row["remote_ttft_ms"] - row["transfer_ms"]
    return {
        "overhead_ms": without_transfer_ms - row["local_ttft_ms"],
        "rest_ms": without_transfer_ms - row["prefill_ms"],
    }


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians over the pairs, in milliseconds."""
    names = {
        "hop_overhead_ms_p50": "overhead_ms",
        "hop_rest_ms_p50": "rest_ms",
        "hop_ttft_ms_p50": "remote_ttft_ms",
        "hop_local_ttft_ms_p50": "local_ttft_ms",
        "hop_prefill_ms_p50": "prefill_ms",
        "hop_transfer_ms_p50": "transfer_ms",
    }
    medians = {
        figure: statistics.median(row[name] for row in rows) for figure, name in names.items()
    }
    overheads = [row["overhead_ms"] for row in rows]
    if len(overheads) > 1:
        q1, _, q3 = statistics.quantiles(overheads, n=4)
        medians |= {"hop_overhead_ms_q1": q1, "hop_overhead_ms_q3": q3}
    return medians | {"hop_pairs": len(rows)}

"""The hop of ``pythia bench overhead``: what going through another worker adds to a call.

Two clusters are up: in one every prompt is prefilled on a prefill worker and its KV pulled
by a decode worker, in the other a single worker does all. They take turns with prompts of one
length that no cache has seen, one call at a time.

The prefill worker samples the first token, the decode worker the second, once it has the KV.
So the hop is over with the second token, and what it added to a call by then is

    overhead = second token of the remote call - its prefill - its transfer
             - (second token of the local call - its prefill)

with prefills as the engines count them (from taking the prompt to its first token) and the
transfer as the decode worker's NIXL counts it. What the two calls have alike falls out: HTTP,
tokenising, a plan, an engine's step for the second token. The same for the first token, which
waits for no transfer, is reported beside it, and so are the plain times.
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
PROMPTS_TRIED_MAX = 20
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
        metrics=True,
        placement=Placement(disaggregated="always"),
    )
    whole = cluster_config("bench-whole", model, ["mixed"], metrics=True)
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
    first_step = _Timer(ports["decode"], PREFILL)
    local_prefill = _Timer(local.config.workers[0].metrics_port, PREFILL)
    async with Client(model, folder) as client:
        await client.fit_prompts(local.base_url, prompt_tokens)
        for pair in range(WARM_UP_PAIRS + pairs):
            progress.update(progress.task_ids[0], description=f"hop, pair {pair + 1}")
            row: dict[str, Any] = {}
            for _ in range(PROMPTS_TRIED_MAX):
                client.next_prompts()
                for cluster in (local, remote) if pair % 2 else (remote, local):
                    if cluster is local:
                        local_prefill.read()
                        row |= await _times(client, local, "local")
                        row["local_prefill_ms"] = 1e3 * await local_prefill.added_s()
                        continue
                    for timer in (prefill, transfer, first_step):
                        timer.read()
                    row |= await _times(client, remote, "remote")
                    row["prefill_ms"] = 1e3 * await prefill.added_s()
                    row["transfer_ms"] = 1e3 * await transfer.added_s()
                    row["first_step_ms"] = 1e3 * await first_step.added_s()
                if row["local_second_ms"] and row["remote_second_ms"]:
                    break
            else:
                raise HopError(f"no answer to {PROMPTS_TRIED_MAX} prompts had text in both tokens")
            progress.advance(progress.task_ids[0])
            if pair >= WARM_UP_PAIRS:
                rows.append({"part": "hop", "pair": pair - WARM_UP_PAIRS + 1} | row | rest(row))
    return rows


async def _times(client: Client, cluster: LocalCluster, side: str) -> dict[str, float]:
    """One call: milliseconds to its first and second token; the latter is 0 if they came
    together, since a server waits for text and a token may be half a character."""
    outcome = await client.send(cluster.base_url, 1, 1, OUTPUT_TOKENS)
    return {
        f"{side}_ttft_ms": 1e3 * outcome.ttft_s[0],
        f"{side}_second_ms": 1e3 * outcome.second_s[0],
    }


def rest(row: Mapping[str, float]) -> dict[str, float]:
    """What the parts that were timed by themselves do not explain, in milliseconds."""
    local_ttft_ms = row["local_ttft_ms"] - row["local_prefill_ms"]
    local_second_ms = row["local_second_ms"] - row["local_prefill_ms"]
    remote_second_ms = row["remote_second_ms"] - row["prefill_ms"] - row["transfer_ms"]
    return {
        "overhead_ms": remote_second_ms - local_second_ms,
        "first_token_ms": row["remote_ttft_ms"] - row["prefill_ms"] - local_ttft_ms,
        "ttft_difference_ms": row["remote_ttft_ms"] - row["local_ttft_ms"],
        "local_rest_ms": local_ttft_ms,
    }


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians over the pairs, in milliseconds."""
    names = {
        "hop_overhead_ms_p50": "overhead_ms",
        "hop_first_token_overhead_ms_p50": "first_token_ms",
        "hop_ttft_difference_ms_p50": "ttft_difference_ms",
        "hop_local_rest_ms_p50": "local_rest_ms",
        "hop_first_step_ms_p50": "first_step_ms",
        "hop_ttft_ms_p50": "remote_ttft_ms",
        "hop_local_ttft_ms_p50": "local_ttft_ms",
        "hop_second_ms_p50": "remote_second_ms",
        "hop_local_second_ms_p50": "local_second_ms",
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

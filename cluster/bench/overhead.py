"""``pythia bench overhead``: what Pythia costs against the same engine behind vLLM's own server.

Three parts, each with servers of its own:

    local  one worker behind Pythia against vLLM's server, same engine arguments, environment
           and prompts; both are up, one is measured at a time, taking turns in pairs
    hop    a call prefilled on one worker and decoded on another against the same length of
           prompt prefilled where it is decoded, less the transfer as vLLM times it
    api    what API processes deliver from a fake engine that says tokens at will

All times are the client's, at the first event with a token; processor time is the kernel's,
of all processes of a side. A round that goes wrong ends the benchmark.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress

from cluster.bench import api_rate, hop
from cluster.bench.report import show_parts, write
from cluster.bench.sides import Client, Plain, cluster_config, cpu_s, progress_bar, scratch
from cluster.launch import LocalCluster
from cluster.progress import progress_for
from cluster.terminal import table_console

COMMAND = "pythia bench overhead"
PARTS = ("local", "hop", "api")
CALLS_PER_SEAT = {1: 6, 8: 4, 32: 2}
"""Concurrency of the throughput rounds, and calls one after the other in each place."""
Side = Plain | LocalCluster
TTFT_CALLS = 4
TTFT_OUTPUT_TOKENS = 2


class Setup(msgspec.Struct, frozen=True):
    """What is measured. ``pairs``: rounds of each kind and side, after each of ``starts``
    starts of both sides; ``parts``: comma-separated."""

    model: str = "tiny-llama"
    parts: str = ",".join(PARTS)
    starts: int = 2
    pairs: int = 5
    ttft_pairs: int = 20
    prompt_tokens: int = 128
    output_tokens: int = 64
    hop_pairs: int = 15
    hop_prompt_tokens: int = 1024
    api_rounds: int = 3


def run(setup: Setup | None = None, console: Console | None = None) -> dict[str, Any]:
    """Measure. Returns ``{"figures": ..., "rows": ...}``.

    LaunchError, ChildError or TimeoutError if a server fails; ValueError for an unknown part.
    """
    setup = setup or Setup()
    console = console or Console(stderr=True)
    parts = setup.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"no such part: {', '.join(sorted(unknown))}")
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    if "local" in parts:
        # Two processes of one program differ by where their memory happens to be: several
        # starts, in turns first and second, keep that out of the ratio.
        measured = [
            {**row, "start": start}
            for start in range(1, setup.starts + 1)
            for row in _local(setup, console, plain_first=start % 2 == 1)
        ]
        figures |= local_figures(measured)
        rows += measured
    if "hop" in parts:
        pairs, tokens = setup.hop_pairs, setup.hop_prompt_tokens
        hops = hop.measure(setup.model, pairs, tokens, console)
        figures |= hop.figures(hops)
        rows += hops
    if "api" in parts:
        rates = api_rate.measure(setup.model, setup.api_rounds, console)
        figures |= api_rate.figures(rates)
        rows += rates
    return {"figures": figures, "rows": rows}


def main(json_path: Path | None = None, **options: Any) -> int:
    """The command: tables, and with ``json_path`` a JSON file. ``options`` make a ``Setup``."""
    console = table_console()
    result = run(Setup(**options), console)
    report = write(json_path, COMMAND, result["figures"], result["rows"])
    show_parts(
        report,
        list(PARTS),
        "medians",
        "ratios are Pythia / plain vLLM, medians over pairs",
        console,
        summary,
    )
    return 0


def _local(setup: Setup, console: Console, plain_first: bool) -> list[dict[str, Any]]:
    config = cluster_config("bench-overhead", setup.model, ["mixed"])
    with scratch() as folder, ExitStack() as stack:
        plain = Plain(config, folder)
        cluster = LocalCluster(config, folder, progress=progress_for(console))
        sides: dict[str, Side] = {"plain": plain, "pythia": cluster}
        for name in ("plain", "pythia") if plain_first else ("pythia", "plain"):
            console.print(f"starting {name}")
            stack.enter_context(sides[name])
        progress = stack.enter_context(progress_bar(console, _rounds(setup)))
        return asyncio.run(_take_turns(setup, sides, folder, progress))


def _rounds(setup: Setup) -> int:
    return 2 * (1 + setup.ttft_pairs + len(CALLS_PER_SEAT) * (1 + setup.pairs))


async def _take_turns(
    setup: Setup, sides: dict[str, Side], folder: Path, progress: Progress
) -> list[dict[str, Any]]:
    rows = []
    kinds = [("ttft", 1, TTFT_CALLS, TTFT_OUTPUT_TOKENS, setup.ttft_pairs)]
    for seats, calls in CALLS_PER_SEAT.items():
        kinds.append((f"c{seats}", seats, seats * calls, setup.output_tokens, setup.pairs))
    async with Client(setup.model, folder) as client:
        await client.fit_prompts(sides["plain"].base_url, setup.prompt_tokens)
        for kind, seats, calls, output_tokens, pairs in kinds:
            # The first pair warms caches up and is thrown away.
            for pair in range(pairs + 1):
                client.next_prompts()
                row: dict[str, Any] = {"part": "local", "kind": kind, "pair": pair}
                order = list(sides) if pair % 2 else list(reversed(sides))
                for name in order:
                    progress.update(
                        progress.task_ids[0], description=f"{kind}, pair {pair}, {name}"
                    )
                    row |= await _round(client, name, sides[name], seats, calls, output_tokens)
                    progress.advance(progress.task_ids[0])
                if pair:
                    rows.append(row | _ratios(row))
    return rows


async def _round(
    client: Client,
    name: str,
    side: Side,
    seats: int,
    calls: int,
    output_tokens: int,
) -> dict[str, float]:
    before_s = sum(map(cpu_s, side.processes.values()))
    outcome = await client.send(side.base_url, calls, seats, output_tokens)
    used_s = sum(map(cpu_s, side.processes.values())) - before_s
    return {
        f"{name}_ttft_ms": 1e3 * statistics.median(outcome.ttft_s),
        f"{name}_tokens_per_s": outcome.output_tokens / outcome.elapsed_s,
        f"{name}_cpu_s_per_1000": 1e3 * used_s / outcome.output_tokens,
    }


def _ratios(row: Mapping[str, Any]) -> dict[str, float]:
    names = ("ttft_ms", "tokens_per_s", "cpu_s_per_1000")
    # Processor time comes in hundredths of a second: a short round may have used none.
    return {
        f"{name}_ratio": row[f"pythia_{name}"] / row[f"plain_{name}"]
        for name in names
        if row[f"plain_{name}"]
    }


def local_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians over the pairs of ``rows``, with quartiles, and how many pairs there were."""
    figures = {}

    def add(figure: str, kind: str, name: str) -> None:
        values = [row[name] for row in rows if row["kind"] == kind and name in row]
        figures[figure] = statistics.median(values)
        if len(values) > 1:
            q1, _, q3 = statistics.quantiles(values, n=4)
            figures[f"{figure}_q1"], figures[f"{figure}_q3"] = q1, q3

    add("ttft_ratio_local", "ttft", "ttft_ms_ratio")
    for seats in CALLS_PER_SEAT:
        add(f"throughput_ratio_c{seats}", f"c{seats}", "tokens_per_s_ratio")
    # The cost of a token depends on the batch; the full one is what capacity is planned with.
    add("cpu_ratio_per_token", "c32", "cpu_s_per_1000_ratio")
    add("cpu_ratio_per_token_c8", "c8", "cpu_s_per_1000_ratio")
    add("cpu_ratio_per_token_c1", "c1", "cpu_s_per_1000_ratio")
    for side in ("plain", "pythia"):
        add(f"ttft_ms_{side}", "ttft", f"{side}_ttft_ms")
        add(f"tokens_per_s_c32_{side}", "c32", f"{side}_tokens_per_s")
        add(f"cpu_s_per_1000_c32_{side}", "c32", f"{side}_cpu_s_per_1000")
    figures["pairs"] = sum(row["kind"] == "c32" for row in rows)
    figures["ttft_pairs"] = sum(row["kind"] == "ttft" for row in rows)
    return figures


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For people: one row per kind of round, or number of API processes, of a part."""
    kinds: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row.get("kind", row.get("api_processes", "hop")), []).append(row)
    return [
        {"kind": kind, "rounds": len(members)}
        | {
            name.replace("_", " "): statistics.median(row[name] for row in members if name in row)
            for name, value in members[0].items()
            if isinstance(value, float)
        }
        for kind, members in kinds.items()
    ]

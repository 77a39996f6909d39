"""``pythia bench transfer``: KV moved between two engines against the same bytes in bare NIXL.

Two vLLM engines with Pythia's connector, and two processes with nothing but NIXL, all under
the same UCX settings, with as much memory in pages of the same size. Each pair: one engine
computes a fresh prompt and holds its KV, the other pulls it; then bare NIXL reads as many
bytes in as many descriptors, and once more in a single one. While one side is measured the
other does not run.

    engine_s   the read as vLLM counts it: from posting it to noticing that it is over
    wall_s     what the pull adds to the reader's time to first token, over finding all of
               the prompt in its own cache: scheduling, reading, noticing, one more step
    bare_s     the same bytes and descriptors in bare NIXL, polled without pause

Ratios are medians over pairs, with their quartiles. ``transfer_ratio_of_best`` compares each
side's best time: on a machine with other work to do it is the steadier of the two.

The model is made up on the spot: hardly any computation, much KV per token. Its numbers say
something about moving KV and nothing about models.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from cluster.bench.child import Child
from cluster.bench.report import table, write
from cluster.bench.transfer_setup import (
    BLOCK_TOKENS,
    POOL_PROMPTS,
    VOCABULARY,
    Setup,
    model_config,
)
from cluster.devices import beside_gpus
from cluster.process import free_port
from transfer.settings import kv_transfer_config, transfer_environment

COMMAND = "pythia bench transfer"
HOST = "127.0.0.1"
ENGINE_ON_CPU = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
"""How an engine is run where cores are few; see ARCHITECTURE."""


class Bench:
    """The four processes, and what they are asked."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self._setup = setup
        self._folder = folder
        self._random = random.Random(0)
        self._requests = 0
        self._bare_reads = 0
        self._source: Child
        self._reader: Child
        self._bare_source: Child
        self._bare_reader: Child

    async def start(self, stack: AsyncExitStack) -> None:
        """Start everything and wait until it is ready; ``stack`` stops it."""
        model = self._folder / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(model_config(self._setup)))
        self._source = await self._start_engine(stack, "source", model)
        self._reader = await self._start_engine(stack, "reader", model)
        for engine in (self._source, self._reader):
            await engine.answer(300)
        self._bare_source = await self._start_bare(stack, "bare-source")
        facts = await self._bare_source.answer(60)
        self._bare_reader = await self._start_bare(stack, "bare-reader")
        await self._bare_reader.answer(60)
        await self._bare_reader.ask({"meet": facts})
        self._pause_bare()

    async def pair(self) -> dict[str, float]:
        """One transfer by the engines, one by bare NIXL, one of those in a single piece."""
        row = await self._engine_transfer()
        for child in (self._bare_source, self._bare_reader):
            child.resume()
        size_bytes, pieces = int(row["bytes"]), int(row["descriptors"])
        row["bare_s"] = await self._bare_read(size_bytes, pieces)
        row["bare_single_s"] = await self._bare_read(size_bytes, 1)
        self._pause_bare()
        row["ratio"] = row["bare_s"] / row["engine_s"]
        return row

    async def _engine_transfer(self) -> dict[str, float]:
        prompt = self._random.choices(range(10, VOCABULARY), k=self._setup.prompt_tokens)
        hold = {"do_remote_decode": True, "do_remote_prefill": False}
        held = await self._generate(self._source, prompt, hold)
        before = await self._reader.ask({})
        pulled = await self._generate(self._reader, prompt, held["kv_transfer_params"])
        after = await self._settled(before)
        found = await self._generate(self._reader, prompt, None)
        if not pulled["token"] == held["token"] == found["token"]:
            raise RuntimeError("the engines disagree on the next token: KV was damaged")
        moved = {name: after[name] - before[name] for name in after}
        return {
            "bytes": moved["bytes"],
            "descriptors": moved["descriptors"],
            "engine_s": moved["xfer_s"],
            "post_s": moved["post_s"],
            "wall_s": pulled["elapsed_s"] - found["elapsed_s"],
        }

    async def _settled(self, before: dict[str, Any]) -> dict[str, Any]:
        """The reader's counters once they include the read; they trail the tokens a little."""
        for _ in range(100):
            after = await self._reader.ask({})
            if after["transfers"] > before["transfers"]:
                return after
            await asyncio.sleep(0.05)
        raise RuntimeError("nothing was moved by NIXL: the reader computed the prompt itself")

    async def _generate(
        self, engine: Child, prompt: list[int], params: dict[str, Any] | None
    ) -> dict[str, Any]:
        self._requests += 1
        return await engine.ask(
            {"prompt": prompt, "kv_transfer_params": params, "request": f"b{self._requests}~1"}
        )

    async def _bare_read(self, size_bytes: int, pieces: int) -> float:
        # Like the engines, go round in as much memory as they have.
        self._bare_reads += 1
        offset = self._bare_reads % POOL_PROMPTS * self._setup.size_bytes
        question = {"offset": offset, "size_bytes": size_bytes, "pieces": pieces}
        return float((await self._bare_reader.ask(question))["elapsed_s"])

    def _pause_bare(self) -> None:
        for child in (self._bare_source, self._bare_reader):
            child.pause()

    async def _start_engine(self, stack: AsyncExitStack, name: str, model: Path) -> Child:
        setup = self._setup
        environment = {
            **transfer_environment(
                HOST, free_port(HOST), loopback=setup.device == "cpu", beside_gpus=beside_gpus()
            ),
            "VLLM_CPU_KVCACHE_SPACE": "2",
        }
        arguments: dict[str, Any] = {
            "model": str(model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "enforce_eager": True,
            "block_size": BLOCK_TOKENS,
            "max_model_len": setup.prompt_tokens + BLOCK_TOKENS,
            "max_num_batched_tokens": setup.prompt_tokens + BLOCK_TOKENS,
            "max_num_seqs": 4,
            "num_gpu_blocks_override": POOL_PROMPTS * setup.blocks,
            "kv_transfer_config": kv_transfer_config(
                f"{name}-{free_port(HOST)}",
                nixl_progress_delay_us=setup.delay_us,
                nixl_threads=setup.nixl_threads,
            ),
        }
        if setup.device == "cpu":
            environment |= ENGINE_ON_CPU
            arguments["distributed_executor_backend"] = "uni"
        else:
            arguments["gpu_memory_utilization"] = 0.3
        child = await Child.start(
            "cluster.bench.transfer_engine", arguments, environment, self._folder / f"{name}.log"
        )
        stack.push_async_callback(child.stop)
        return child

    async def _start_bare(self, stack: AsyncExitStack, name: str) -> Child:
        setup = self._setup
        child = await Child.start(
            "cluster.bench.transfer_bare",
            {
                "name": name,
                "size_bytes": POOL_PROMPTS * setup.size_bytes,
                "device": setup.device,
                "threads": setup.nixl_threads,
                "pause_us": setup.delay_us,
            },
            transfer_environment(
                HOST, free_port(HOST), loopback=setup.device == "cpu", beside_gpus=beside_gpus()
            ),
            self._folder / f"{name}.log",
        )
        stack.push_async_callback(child.stop)
        return child


def run(setup: Setup | None = None, console: Console | None = None) -> dict[str, Any]:
    """Measure. Returns ``{"figures": ..., "rows": ...}``; ChildError if a process fails."""
    setup = setup or Setup()
    rows = asyncio.run(_measure(setup, console or Console(stderr=True)))
    return {"figures": _figures(rows), "rows": rows}


def main(json_path: Path | None = None, **options: Any) -> int:
    """The command: a table, and with ``json_path`` a JSON file. ``options`` make a ``Setup``."""
    console = Console()
    result = run(Setup(**options))
    report = write(json_path, COMMAND, result["figures"], result["rows"])
    table(console, "KV transfer, engine against bare NIXL", report["rows"])
    figures = [{"figure": name, "value": value} for name, value in report["figures"].items()]
    table(console, "medians over all pairs", figures)
    return 0


async def _measure(setup: Setup, console: Console) -> list[dict[str, float]]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="pythia-bench-") as folder:
        async with AsyncExitStack() as stack:
            with Progress(console=console, transient=True) as progress:
                bench = Bench(setup, Path(folder))
                total = setup.warm_up_pairs + setup.pairs
                task = progress.add_task("starting two engines", total=None)
                await bench.start(stack)
                progress.update(task, total=total)
                for index in range(total):
                    progress.update(task, description=f"pair {index + 1} of {total}")
                    row = await bench.pair()
                    if index >= setup.warm_up_pairs:
                        rows.append(row)
                    progress.advance(task)
    return rows


def _figures(rows: list[dict[str, float]]) -> dict[str, float]:
    def median(name: str) -> float:
        return statistics.median(row[name] for row in rows)

    def quartiles(name: str) -> list[float]:
        values = [row[name] for row in rows]
        return statistics.quantiles(values, n=4) if len(values) > 1 else values * 3

    def best(name: str) -> float:
        return min(row[name] for row in rows)

    size_bytes = median("bytes")
    figures = {
        "transfer_ratio_to_bare_nixl": median("ratio"),
        "transfer_ratio_q1": quartiles("ratio")[0],
        "transfer_ratio_q3": quartiles("ratio")[2],
        "transfer_ratio_of_best": best("bare_s") / best("engine_s"),
        "transfer_gbytes_per_s": size_bytes / median("engine_s") / 1e9,
        "bare_gbytes_per_s": size_bytes / median("bare_s") / 1e9,
        "bare_single_gbytes_per_s": size_bytes / median("bare_single_s") / 1e9,
        "bytes_per_transfer": size_bytes,
        "descriptors_per_transfer": median("descriptors"),
        "pairs": len(rows),
    }
    wall_s = median("wall_s")
    if wall_s > 0:  # a difference of two times: on a busy machine it may come out as nothing
        figures["transfer_wall_ratio_to_bare_nixl"] = median("bare_s") / wall_s
        figures["transfer_wall_gbytes_per_s"] = size_bytes / wall_s / 1e9
    return figures

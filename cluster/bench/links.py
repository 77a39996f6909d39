"""``pythia bench links``: how fast bare NIXL moves KV between two kinds of memory.

Two processes with nothing but NIXL, one with memory of the first kind, the other reading it
into memory of the second. Each size is read in one piece and in pieces as large as one KV
block of one layer, which is what an engine asks for; pieces go in no order that could be
merged. Read this as the most that a connector can reach, and its ``fixed`` times as what
``coordinator.cost`` calls a link's latency.

On one GPU both sides use it, by way of CUDA's memory sharing between processes: what is
measured is NIXL's and UCX's own cost there, not NVLink.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress

from cluster.bench.child import Child
from cluster.bench.report import table, write
from cluster.devices import beside_gpus
from cluster.process import free_port
from transfer.settings import transfer_environment

COMMAND = "pythia bench links"
HOST = "127.0.0.1"
MEBIBYTE = 1 << 20
CPU = "cpu"


class Setup(msgspec.Struct, frozen=True):
    """``source`` and ``reader``: devices as PyTorch names them; sizes in MiB, the piece in KiB."""

    source: str = CPU
    reader: str = CPU
    largest_mebibytes: int = 256
    piece_kibibytes: int = 64
    repeats: int = 9
    threads: int = 0

    def sizes(self) -> list[tuple[int, int]]:
        """Bytes and in how many pieces, small ones first."""
        piece = self.piece_kibibytes * 1024
        found = [(piece, 1)]
        mebibytes = 1
        while mebibytes <= self.largest_mebibytes:
            size_bytes = mebibytes * MEBIBYTE
            found.append((size_bytes, 1))
            if size_bytes > piece:
                found.append((size_bytes, size_bytes // piece))
            mebibytes *= 4
        return found


def run(setup: Setup, console: Console) -> list[dict[str, Any]]:
    """One row per size and number of pieces. ChildError if a process fails."""
    return asyncio.run(_measure(setup, console))


def main(json_path: Path | None = None, **options: Any) -> int:
    """The command: a table, and with ``json_path`` a JSON file. ``options`` make a ``Setup``."""
    setup, console = Setup(**options), Console()
    rows = run(setup, console)
    figures = figures_of(rows)
    write(json_path, COMMAND, figures, rows)
    table(console, f"bare NIXL, {setup.source} to {setup.reader}", rows)
    table(console, "figures", [{"figure": k, "value": v} for k, v in figures.items()])
    return 0


def figures_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the smallest read takes, and how fast the largest is whole and in pieces."""
    largest = max(row["mebibytes"] for row in rows)
    whole = [row for row in rows if row["mebibytes"] == largest and row["pieces"] == 1]
    pieces = [row for row in rows if row["mebibytes"] == largest and row["pieces"] > 1]
    figures = {
        "fixed_us_p50": rows[0]["p50_us"],
        "whole_gbytes_per_s": whole[0]["gbytes_per_s"],
    }
    if pieces:
        figures["pieces_gbytes_per_s"] = pieces[0]["gbytes_per_s"]
    return figures


async def _measure(setup: Setup, console: Console) -> list[dict[str, Any]]:
    sizes = setup.sizes()
    rows = []
    with tempfile.TemporaryDirectory(prefix="pythia-links-") as folder:
        async with AsyncExitStack() as stack:
            with Progress(console=console, transient=True) as progress:
                task = progress.add_task("starting two processes", total=len(sizes))
                source = await _start(stack, setup, setup.source, "source", Path(folder))
                facts = await source.answer(120)
                reader = await _start(stack, setup, setup.reader, "reader", Path(folder))
                await reader.answer(120)
                await reader.ask({"meet": facts})
                for size_bytes, pieces in sizes:
                    progress.update(task, description=f"{size_bytes / MEBIBYTE:g} MiB")
                    rows.append(await _row(setup, reader, size_bytes, pieces))
                    progress.advance(task)
    return rows


async def _row(setup: Setup, reader: Child, size_bytes: int, pieces: int) -> dict[str, Any]:
    question = {"offset": 0, "size_bytes": size_bytes, "pieces": pieces}
    await reader.ask(question)  # the first one maps memory and sets up the way
    found = [float((await reader.ask(question))["elapsed_s"]) for _ in range(setup.repeats)]
    median_s = statistics.median(found)
    return {
        "mebibytes": size_bytes / MEBIBYTE,
        "pieces": pieces,
        "p50_us": median_s * 1e6,
        "least_us": min(found) * 1e6,
        "most_us": max(found) * 1e6,
        "gbytes_per_s": size_bytes / median_s / 1e9,
    }


async def _start(
    stack: AsyncExitStack, setup: Setup, device: str, name: str, folder: Path
) -> Child:
    on_cpu = setup.source == setup.reader == CPU
    child = await Child.start(
        "cluster.bench.transfer_bare",
        {
            "name": name,
            "size_bytes": setup.largest_mebibytes * MEBIBYTE,
            "device": device,
            "threads": setup.threads,
            "pause_us": 0,
        },
        transfer_environment(HOST, free_port(HOST), loopback=on_cpu, beside_gpus=beside_gpus()),
        folder / f"{name}.log",
    )
    stack.push_async_callback(child.stop)
    return child

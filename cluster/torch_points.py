"""Step times of a dense model on the GPU at hand, from PyTorch's own kernels.

For machines that have a GPU but no room for vLLM, and to see what a calibration from
elsewhere is worth: it measures the very points of another calibration's file and prints how
far off that one's estimates are.

    python -m cluster.torch_points --like llama-3.1-8b-h200-tp1 --hardware h200 --out here.json

What is measured: a few of the model's layers, and its head, with random weights, as one CUDA
graph: norms, projections, rotary positions, attention (PyTorch's flash kernel), gated
feed-forward. Times of all layers are that of these scaled up. Kernels only, as with
AIConfigurator: nothing that a host does between steps, no paging of KV, no sampling. vLLM's
kernels are others, so that this says what the hardware gives a good implementation, and not
what vLLM makes of it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from cluster.bench.report import table, write
from cluster.calibration import (
    SHIPPED,
    Calibration,
    CalibrationError,
    Point,
    errors,
    load,
    residuals,
    save,
)
from cluster.fit import fit, held_out_errors
from cluster.hardware import HARDWARE, hardware
from cluster.terminal import table_console
from coordinator.cost import ModelShape, StepCost

COMMAND = "python -m cluster.torch_points"
LAYERS_MEASURED = 2
"""Enough that nothing of one is in the GPU's cache when it is used again."""
REPEATS = 7
WARM_UPS = 2
MEMORY_SHARE = 0.85
"""Points whose weights and KV take more of the GPU's memory are left out."""


class Layers:
    """Some layers and the head of a dense model with grouped-query attention."""

    def __init__(self, shape: ModelShape, device: str, layers: int = LAYERS_MEASURED) -> None:
        import torch

        if shape.attention != "gqa" or shape.moe_layers:
            raise CalibrationError(f"{shape.name}: only dense models with plain attention")
        self._torch = torch
        self.shape, self.device, self.layers = shape, device, layers
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self._weights = [
            {
                "qkv": self._random(shape.hidden, queries + 2 * keys),
                "out": self._random(queries, shape.hidden),
                "gate_up": self._random(shape.hidden, 2 * shape.ffn),
                "down": self._random(shape.ffn, shape.hidden),
                "norm": self._random(shape.hidden),
            }
            for _ in range(layers)
        ]
        self._head = self._random(shape.hidden, shape.vocab)

    def _random(self, *size: int) -> Any:
        torch = self._torch
        values = torch.randn(size, dtype=torch.bfloat16, device=self.device)
        return values / math.sqrt(size[0])

    def step(self, point: Point) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """All layers of a step like ``point``, and its head, to be run again and again."""
        tokens = point.new_tokens + point.batch
        hidden = self._random(tokens, self.shape.hidden)
        angles = self._random(tokens, 1, self.shape.head_dim)
        # Every layer has KV of its own: what one reads is not in the cache for the next.
        stores = [self._store(point) for _ in range(self.layers)]

        def layers() -> Any:
            state = hidden
            for weights, store in zip(self._weights, stores, strict=True):
                state = self._layer(state, weights, store, angles, point)
            return state

        sequences = point.batch + (1 if point.new_tokens else 0)
        last = self._random(sequences, self.shape.hidden)
        return layers, lambda: last @ self._head

    def _store(self, point: Point) -> dict[str, Any]:
        shape = self.shape
        store = {}
        if point.new_tokens:
            size = (1, shape.kv_heads, point.context_tokens + point.new_tokens, shape.head_dim)
            store["chunk"] = (self._random(*size), self._random(*size))
        if point.batch:
            context = point.batch_context_tokens // point.batch + 1
            size = (point.batch, shape.kv_heads, context, shape.head_dim)
            store["batch"] = (self._random(*size), self._random(*size))
        return store

    def _layer(self, state: Any, weights: Any, store: Any, angles: Any, point: Point) -> Any:
        torch, shape = self._torch, self.shape
        functional = torch.nn.functional
        normed = functional.rms_norm(state, (shape.hidden,), weights["norm"])
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        q, k, v = (normed @ weights["qkv"]).split([queries, keys, keys], dim=-1)
        q = _turned(q.view(len(state), shape.heads, shape.head_dim), angles, torch)
        k = _turned(k.view(len(state), shape.kv_heads, shape.head_dim), angles, torch)
        v = v.view(len(state), shape.kv_heads, shape.head_dim)
        new, seen = point.new_tokens, []
        if new:
            seen.append(self._chunk(q[:new], k[:new], v[:new], store["chunk"]))
        if point.batch:
            seen.append(self._batch(q[new:], k[new:], v[new:], store["batch"]))
        state = state + torch.cat(seen) @ weights["out"]
        normed = functional.rms_norm(state, (shape.hidden,), weights["norm"])
        gate, up = (normed @ weights["gate_up"]).chunk(2, dim=-1)
        return state + (functional.silu(gate) * up) @ weights["down"]

    def _chunk(self, q: Any, k: Any, v: Any, store: Any) -> Any:
        """New tokens behind a context: each sees all before it."""
        from torch.nn.attention.bias import causal_lower_right

        keys, values = store
        new = len(q)
        keys[0, :, -new:] = k.transpose(0, 1)
        values[0, :, -new:] = v.transpose(0, 1)
        seen = self._torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),
            keys,
            values,
            attn_mask=causal_lower_right(new, keys.shape[2]),
            enable_gqa=True,
        )
        return seen[0].transpose(0, 1).reshape(new, -1)

    def _batch(self, q: Any, k: Any, v: Any, store: Any) -> Any:
        """One token of each sequence. Heads that share KV go as rows of one query."""
        keys, values = store
        keys[:, :, -1], values[:, :, -1] = k, v
        grouped = q.view(len(q), self.shape.kv_heads, -1, self.shape.head_dim)
        seen = self._torch.nn.functional.scaled_dot_product_attention(grouped, keys, values)
        return seen.reshape(len(q), -1)


def _turned(values: Any, angles: Any, torch: Any) -> Any:
    """Rotary positions: as many reads, writes and products as the real ones."""
    first, second = values.chunk(2, dim=-1)
    return values * angles + torch.cat((-second, first), dim=-1) * angles


def seconds_of(run: Callable[[], Any]) -> float:
    """The median of a few replays of ``run`` as a CUDA graph."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    found = []
    for index in range(WARM_UPS + REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if index >= WARM_UPS:
            found.append(start.elapsed_time(end) / 1e3)
    return float(statistics.median(found))


def measure(shape: ModelShape, points: list[Point], console: Console) -> list[Point]:
    """``points`` with the seconds that they take here; those without room are left out."""
    import torch

    layers = Layers(shape, "cuda")
    room = torch.cuda.get_device_properties(0).total_memory * MEMORY_SHARE
    found = []
    for point in track(points, "measuring", console=console):
        tokens = point.new_tokens + point.context_tokens + point.batch + point.batch_context_tokens
        if tokens * shape.kv_bytes_per_token / shape.layers * LAYERS_MEASURED > room:
            continue
        run, head = layers.step(point)
        seconds = seconds_of(run) * shape.layers / LAYERS_MEASURED + seconds_of(head)
        found.append(
            Point(
                kind=point.kind,
                seconds=seconds,
                new_tokens=point.new_tokens,
                context_tokens=point.context_tokens,
                batch=point.batch,
                batch_context_tokens=point.batch_context_tokens,
            )
        )
        del run, head
        torch.cuda.empty_cache()
    return found


def figures_of(like: Calibration, here: Calibration) -> dict[str, float]:
    """How good the other calibration, the data sheet and a fit are on what was measured."""
    shape, device, tp, points = here.shape, here.hardware, here.tp, here.points
    moved = StepCost(shape, device, like.efficiency, tp)
    figures = {"points": float(len(points))}
    for name, found in (
        ("given", errors(moved, points)),
        ("published", errors(StepCost(shape, device, tp=tp), points)),
        ("held_out", held_out_errors(points, shape, device, tp)),
        ("fitted", errors(here.cost(), points)),
    ):
        figures[f"{name}_error_median"] = found.median
        figures[f"{name}_error_p95"] = found.p95
    for kind in sorted({point.kind for point in points}):
        some = [point for point in points if point.kind == kind]
        figures[f"given_error_median_{kind}"] = errors(moved, some).median
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints estimated against measured, writes the files."""
    parser = argparse.ArgumentParser(prog=COMMAND)
    parser.add_argument("--like", required=True, help="a calibration, ours by name or a file")
    parser.add_argument("--hardware", choices=sorted(HARDWARE), required=True)
    parser.add_argument("--out", type=Path, help="the calibration to write")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    console = table_console()
    try:
        import torch

        shipped = SHIPPED / f"{options.like}.json"
        like = load(shipped if shipped.is_file() else Path(options.like))
        if not torch.cuda.is_available():
            raise CalibrationError("no GPU is to be seen")
        if like.tp != 1:
            raise CalibrationError(f"{options.like} is of {like.tp} GPUs together")
        points = measure(like.shape, like.points, console)
    except (CalibrationError, ImportError) as error:
        Console(stderr=True).print(f"[red]{error}")
        return 1
    source = f"{COMMAND}, torch {torch.__version__} on {torch.cuda.get_device_name()}"
    device = hardware(options.hardware)
    here = Calibration(
        source=source,
        model=like.model,
        tp=1,
        shape=like.shape,
        hardware=device,
        efficiency=fit(points, like.shape, device, source=source),
        points=points,
    )
    if options.out:
        save(here, options.out)
    rows = residuals(StepCost(like.shape, device, like.efficiency), points)
    figures = figures_of(like, here)
    write(options.json, COMMAND, figures, rows)
    table(console, f"estimates of {like.source}; given: {source}", rows)
    table(console, "relative errors", [{"figure": k, "value": v} for k, v in figures.items()])
    console.print(here.efficiency)
    return 0


if __name__ == "__main__":
    sys.exit(main())

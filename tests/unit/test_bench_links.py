"""``pythia bench links`` with real NIXL, and step times of PyTorch's kernels."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from cluster.bench import links
from cluster.calibration import SHIPPED as CALIBRATIONS
from cluster.calibration import CalibrationError, Point, load
from cluster.torch_points import Layers
from coordinator.cost import ModelShape
from transfer.settings import transfer_environment

SHAPE = ModelShape(
    name="small", layers=4, hidden=32, heads=8, kv_heads=2, head_dim=8, ffn=64, vocab=50
)


def test_sizes_are_read_whole_and_in_pieces() -> None:
    setup = links.Setup(largest_mebibytes=16, piece_kibibytes=1024)
    sizes = [(size >> 20, pieces) for size, pieces in setup.sizes()]
    assert sizes == [(1, 1), (1, 1), (4, 1), (4, 4), (16, 1), (16, 16)]


def test_bytes_come_over_and_figures_are_of_the_largest() -> None:
    setup = links.Setup(largest_mebibytes=4, piece_kibibytes=256, repeats=3)
    rows = links.run(setup, Console(quiet=True))
    assert [(row["mebibytes"], row["pieces"]) for row in rows][-2:] == [(4.0, 1), (4.0, 16)]
    figures = links.figures_of(rows)
    assert figures["whole_gbytes_per_s"] == rows[-2]["gbytes_per_s"] > 0
    assert figures["pieces_gbytes_per_s"] == rows[-1]["gbytes_per_s"] > 0
    assert figures["fixed_us_p50"] == rows[0]["p50_us"]


def test_one_gpu_may_read_anothers_memory_without_nvlink() -> None:
    environment = transfer_environment("10.0.0.7", 5600)
    assert environment["UCX_CUDA_IPC_ENABLE_GET_ZCOPY"] == "on"
    # NIXL does not start beside a GPU with transports that can't reach its memory.
    beside = transfer_environment("127.0.0.1", 5600, loopback=True, beside_gpus=True)
    assert "cuda_copy" in beside["UCX_TLS"]
    assert "cuda_copy" not in transfer_environment("127.0.0.1", 5600, loopback=True)["UCX_TLS"]


@pytest.mark.parametrize(
    "point",
    [
        Point(kind="prefill", seconds=1.0, new_tokens=7, context_tokens=5),
        Point(kind="decode", seconds=1.0, batch=3, batch_context_tokens=30),
        Point(kind="mixed", seconds=1.0, new_tokens=4, batch=2, batch_context_tokens=16),
    ],
)
def test_a_step_is_of_all_its_tokens(point: Point) -> None:
    run, head = Layers(SHAPE, "cpu").step(point)
    hidden, logits = run(), head()
    assert hidden.shape == (point.new_tokens + point.batch, SHAPE.hidden)
    assert logits.shape == (point.batch + (1 if point.new_tokens else 0), SHAPE.vocab)
    assert torch.isfinite(hidden).all()


def test_a_chunk_sees_what_is_before_it_and_nothing_else() -> None:
    layers = Layers(SHAPE, "cpu", layers=1)
    new, context, size = 3, 4, SHAPE.head_dim
    q = torch.randn(new, SHAPE.heads, size, dtype=torch.bfloat16)
    k, v = (torch.randn(new, SHAPE.kv_heads, size, dtype=torch.bfloat16) for _ in range(2))
    keys, values = (
        torch.randn(1, SHAPE.kv_heads, context + new, size, dtype=torch.bfloat16) for _ in range(2)
    )
    seen = layers._chunk(q, k, v, (keys, values)).view(new, SHAPE.heads, size)
    group = SHAPE.heads // SHAPE.kv_heads
    for token in range(new):
        for head in range(SHAPE.heads):
            until = context + token + 1
            scores = keys[0, head // group, :until].float() @ q[token, head].float()
            weights = torch.softmax(scores / size**0.5, dim=0)
            wanted = weights @ values[0, head // group, :until].float()
            assert torch.allclose(seen[token, head].float(), wanted, atol=0.05)


def test_models_with_experts_are_refused() -> None:
    shape = load(CALIBRATIONS / "qwen3-30b-a3b-h200-tp1.json").shape
    with pytest.raises(CalibrationError, match="only dense models"):
        Layers(shape, "cpu")

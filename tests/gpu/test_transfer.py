"""NIXL between GPU buffers: the transfer that everything else stands on, on real devices."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("nixl")

import torch

from cluster.bench import transfer
from cluster.bench.transfer_bare import Buffer

MEBIBYTE = 1 << 20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def devices() -> list[str]:
    """Two devices if there are two, else one for both sides."""
    return ["cuda:0", f"cuda:{torch.cuda.device_count() - 1}"]


@pytest.mark.parametrize("pieces", [1, 512])
def test_one_device_reads_what_another_holds(pieces: int) -> None:
    size_bytes = 64 * MEBIBYTE
    source, reader = (
        Buffer(name, size_bytes, device, threads=0, pause_us=0)
        for name, device in zip(("source", "reader"), devices(), strict=True)
    )
    pattern = torch.arange(size_bytes // 8, dtype=torch.int64, device=source.memory.device)
    source.memory.copy_(pattern.view(torch.uint8))
    torch.cuda.synchronize()
    facts = source.facts()
    elapsed_s = reader.read(reader.meet(facts), facts, 0, size_bytes, pieces)
    assert elapsed_s > 0
    assert torch.equal(reader.memory.cpu(), source.memory.cpu())


@pytest.mark.engine
def test_engines_on_gpus_move_kv_and_agree(tmp_path: Path) -> None:
    setup = transfer.Setup(mebibytes=64, pairs=2, warm_up_pairs=1, device="cuda")
    # Raises if nothing was moved or if the engines' next tokens differ.
    figures = transfer.run(setup)["figures"]
    assert figures["bytes_per_transfer"] >= 64 * MEBIBYTE
    assert figures["transfer_gbytes_per_s"] > 0

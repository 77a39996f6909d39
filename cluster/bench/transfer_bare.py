"""Child of ``pythia bench transfer``: NIXL and nothing else.

One process holds a buffer, the other reads parts of it with a given number of descriptors
and looks for the end of each read without pause. Settings are those of the engines.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from cluster.bench.child import Parent
from cluster.process import die_with_parent
from transfer.pages import use_huge_pages
from transfer.progress import progress_pause


class Buffer:
    """Registered memory and the NIXL agent it is registered with."""

    def __init__(
        self, name: str, size_bytes: int, device: str, threads: int, pause_us: int
    ) -> None:
        import torch
        from nixl._api import nixl_agent, nixl_agent_config

        with progress_pause(pause_us):
            config = nixl_agent_config(num_threads=threads, capture_telemetry=True)
            self.agent = nixl_agent(name, config)
        # Written to once, so that every page is there.
        self.memory = torch.full((size_bytes,), len(name), dtype=torch.uint8, device=device)
        self.kind = "VRAM" if device.startswith("cuda") else "DRAM"
        self.device = self.memory.get_device() if self.kind == "VRAM" else 0
        self.address = self.memory.data_ptr()
        if self.kind == "DRAM":
            # As the engines' KV.
            use_huge_pages([(self.address, size_bytes)])
        self.agent.register_memory([(self.address, size_bytes, self.device, "")], self.kind)

    def facts(self) -> dict[str, Any]:
        """What a reader needs to know."""
        return {
            "metadata": self.agent.get_agent_metadata().hex(),
            "address": self.address,
            "device": self.device,
            "kind": self.kind,
        }

    def meet(self, facts: dict[str, Any]) -> str:
        """Get to know the other side; its name."""
        name = self.agent.add_remote_agent(bytes.fromhex(facts["metadata"]))
        return name.decode() if isinstance(name, bytes) else str(name)

    def read(
        self, peer: str, facts: dict[str, Any], offset: int, size_bytes: int, pieces: int
    ) -> float:
        """Seconds to read ``size_bytes`` in ``pieces`` equal parts that can't be merged."""
        import numpy

        step = size_bytes // pieces
        offsets = range(offset, offset + pieces * step, step)
        here = [(self.address + place, step, self.device) for place in offsets]
        there = [(facts["address"] + place, step, facts["device"]) for place in offsets]
        local = self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", here, self.kind)
        remote = self.agent.prep_xfer_dlist(peer, there, facts["kind"])
        order: Any = numpy.arange(pieces, dtype=numpy.int32)[::-1].copy()
        started_s = time.perf_counter()
        handle = self.agent.make_prepped_xfer("READ", local, order, remote, order, b"read:1")
        state = self.agent.transfer(handle)
        while state == "PROC":
            state = self.agent.check_xfer_state(handle)
        elapsed_s = time.perf_counter() - started_s
        if state != "DONE":
            raise RuntimeError(f"NIXL read ended as {state}")
        for release in (local, remote):
            self.agent.release_dlist_handle(release)
        self.agent.release_xfer_handle(handle)
        return elapsed_s


async def _run() -> None:
    parent = Parent()
    buffer = Buffer(**parent.settings)
    peers: dict[str, dict[str, Any]] = {}

    async def answer(question: dict[str, Any]) -> dict[str, Any]:
        if "meet" in question:
            peers[buffer.meet(question["meet"])] = question["meet"]
            return {}
        [(peer, facts)] = peers.items()
        return {"elapsed_s": buffer.read(peer, facts, **question)}

    parent.say(buffer.facts())
    await parent.serve(answer)


if __name__ == "__main__":
    die_with_parent(os.getppid())
    asyncio.run(_run())

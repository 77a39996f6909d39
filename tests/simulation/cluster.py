"""Small simulated clusters and workloads that tests are about."""

from __future__ import annotations

import msgspec

from cluster.hardware import HARDWARE
from cluster.simulator.setup import (
    ClusterSetup,
    EngineOptions,
    NetworkSetup,
    WorkerSetup,
)
from cluster.workload.form import Call, Run, Workload
from coordinator.limits import Limits, Placement
from coordinator.protocol import Role
from coordinator.shape import ModelShape

SHAPE = ModelShape(
    name="small", layers=16, hidden=2048, heads=32, kv_heads=8, head_dim=64, ffn=8192, vocab=128256
)
BLOCK = 16


def cluster(
    *roles: Role,
    options: EngineOptions | None = None,
    network: NetworkSetup | None = None,
    limits: Limits | None = None,
    placement: Placement | None = None,
    nodes: bool = True,
    api_servers: int = 1,
    host_blocks: int = 0,
) -> ClusterSetup:
    """A worker of each role, each on a node of its own if ``nodes``."""
    workers = tuple(
        WorkerSetup(f"w{number}", role, node=f"node-{number}" if nodes else "node")
        for number, role in enumerate(roles)
    )
    setup = ClusterSetup(
        shape=SHAPE,
        hardware=HARDWARE["h100"],
        workers=workers,
        options=options or EngineOptions(kv_blocks=4096, max_model_len=16384),
        network=network or NetworkSetup(),
        limits=limits or Limits(),
        placement=placement or Placement(policy="least_kv", remote_prefill_min_tokens=BLOCK),
        api_servers=api_servers,
    )
    gib = host_blocks * setup.block_bytes() / 2**30
    return msgspec.structs.replace(setup, kv_host_gib=gib)


def call(
    index: int,
    prompt_tokens: int,
    output_tokens: int,
    *,
    first_block: int = 0,
    parents: tuple[int, ...] = (),
    think_s: float = 0.0,
) -> Call:
    """A call whose prompt is the blocks from ``first_block`` on."""
    return Call(
        index=index,
        parents=parents,
        think_s=think_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        blocks=((first_block, prompt_tokens // BLOCK),) if prompt_tokens >= BLOCK else (),
    )


def run(number: int, *calls: Call, arrival_s: float = 0.0) -> Run:
    """A run whose blocks are its own."""
    return Run(f"run-{number}", "flow", arrival_s, f"run-{number}", calls)


def workload(*runs: Run) -> Workload:
    """Runs in engine blocks."""
    return Workload("test", "test", "", BLOCK, runs, arrivals_known=True)

"""The same workload on the real cluster and in the simulator, one call after the other: where
nothing depends on times, both do the very same with every call."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.calibration import Calibration
from cluster.config import ClusterConfig
from cluster.hardware import cpu
from cluster.model import resolve
from cluster.model_shape import model_shape
from cluster.simulator.facts import worker_facts
from cluster.simulator.likeness import Constants, setup_like
from cluster.simulator.live import LiveReplay, Target
from cluster.simulator.records import CallRecord
from cluster.simulator.world import simulate
from cluster.workload.form import Call, Run, Workload
from coordinator.cost import Efficiency
from tests.e2e.harness import BLOCK_TOKENS, Server

PAUSE_S = 2.5
"""Longer than two beats: nobody believes any more that a worker is busy, and what it has generated
is known."""


def workload() -> Workload:
    """An agent whose prompts grow by what it said, and others that begin like it."""
    made = [
        # First and number of blocks of the prompt, then of the output that is extended.
        (330, 50, ((0, 10),), ((10, 1),)),
        (400, 100, ((0, 12),), ((12, 3),)),
        (510, 20, ((0, 15),), ()),
        (700, 1, ((0, 10), (100, 11)), ()),
        (40, 40, ((200, 1),), ()),
        (90, 70, ((200, 1),), ((201, 4),)),
        (200, 5, ((200, 6),), ()),
        (700, 30, ((0, 10), (100, 11)), ()),
    ]
    calls = tuple(
        Call(
            index,
            (index - 1,) if index else (),
            PAUSE_S,
            prompt_tokens,
            output_tokens,
            blocks,
            continued=continued,
        )
        for index, (prompt_tokens, output_tokens, blocks, continued) in enumerate(made)
    )
    return Workload("e2e", "", "", BLOCK_TOKENS, (Run("r", "flow", 0.0, "s", calls),))


def path_of(record: CallRecord) -> dict[str, object]:
    """Where a call ran and what it found there."""
    return {
        "call": record.call,
        "outcome": record.outcome,
        "output": record.output_tokens,
        "workers": (record.prefill, record.decode),
        "prefill found": record.prefill_cached_tokens,
        "decode found": record.local_cached_tokens,
        "moved": record.moved_tokens,
    }


async def test_the_simulator_does_with_every_call_what_the_cluster_does(
    cluster: Server, cluster_config: ClusterConfig
) -> None:
    shape = model_shape(json.loads((Path(resolve(cluster.model)) / "config.json").read_text()))
    target = Target(
        cluster.base_url,
        cluster.model,
        shape.vocab // 4,
        shape.vocab // 2,
        api_key=cluster.api_key,
    )
    replay = LiveReplay(target, workload())
    real = await replay.run()
    assert replay.unknown_outputs == 0

    facts = worker_facts(cluster.control_address, len(cluster_config.workers))
    calibration = Calibration(
        source="",
        model=cluster.model,
        shape=shape,
        hardware=cpu(2.0**34),
        efficiency=Efficiency(gemm=0.006, attention=0.004, weights=0.003, kv=0.008),
        points=[],
    )
    setup = setup_like(cluster_config, facts["decode-0"], calibration, Constants())
    simulated = simulate(setup, workload(), limited=True)
    assert [path_of(each) for each in real.calls] == [path_of(each) for each in simulated.calls]
    # It would be no comparison if nothing was found or moved.
    assert sum(call.moved_tokens for call in real.calls) > 500
    assert sum(call.local_cached_tokens for call in real.calls) > 500
    assert sum(call.prefill_cached_tokens for call in real.calls) > 500

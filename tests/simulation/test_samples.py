"""Several answers to one prompt on simulated engines: what is common is there and counted once."""

from __future__ import annotations

import msgspec
import pytest

from cluster.simulator.setup import EngineOptions
from cluster.simulator.world import simulate
from cluster.workload.change import with_samples
from coordinator.limits import Placement
from tests.simulation.cluster import call, cluster, run, workload

PROMPT_TOKENS = 8192
ANSWERS = 4
ROOM = EngineOptions(kv_blocks=PROMPT_TOKENS // 16 * 3 // 2, max_model_len=16384)
"""For one and a half of such prompts."""


@pytest.mark.parametrize("together", [True, False])
def test_a_worker_with_room_for_one_prompt_answers_it_several_times_at_once(
    together: bool,
) -> None:
    asked = with_samples(workload(run(0, call(0, PROMPT_TOKENS, 64))), ANSWERS, together=together)
    setup = cluster("mixed", options=ROOM, placement=Placement())
    result = simulate(setup, asked, 0)
    planned_s = [one.planned_s for one in result.calls]
    assert max(planned_s) < min(one.first_token_s for one in result.calls)
    assert [one.outcome for one in result.calls] == ["stop"] * ANSWERS
    assert result.totals.preemptions == 0
    assert sum(one.computed_tokens for one in result.calls) < PROMPT_TOKENS + ANSWERS * 16


def test_prompts_that_differ_wait_for_each_other() -> None:
    calls = [
        msgspec.structs.replace(call(at, PROMPT_TOKENS, 64, first_block=at * 1024), parents=())
        for at in range(2)
    ]
    setup = cluster("mixed", options=ROOM, placement=Placement())
    one, other = sorted(
        simulate(setup, workload(run(0, *calls)), 0).calls, key=lambda c: c.planned_s
    )
    assert other.planned_s >= one.ended_s

"""What the core learns of times and lengths from the life of its calls."""

from __future__ import annotations

import pytest

from coordinator.core import Core
from coordinator.limits import Placement
from coordinator.protocol import CallContext, Finished, KvChanges, Prefilled, Started
from tests.unit.test_core import LIMITS, LONG, Bed, hashes, ready


def served(
    bed: Bed, request: str, prefill_s: float, step_s: float, tokens: int, **more: object
) -> None:
    """One call, alone: prefilled and decoded in so long."""
    plan = bed.plan(request, LONG, block_hashes=b"", max_output_tokens=1000, **more)
    bed.now_s += prefill_s
    if plan.prefill is not None:
        bed.say("api", Prefilled("api", request, plan.attempt))
    bed.say("api", Started("api", request, plan.attempt))
    bed.now_s += step_s * (tokens - 1)
    bed.say("api", Finished("api", request, plan.attempt, "stop", tokens))
    bed.now_s += 1.0


@pytest.mark.parametrize("roles", [("decode",), ("prefill", "decode")])
def test_prefill_and_step_times_are_learned(roles: tuple[str, ...]) -> None:
    bed = Bed()
    bed.cluster(*roles)  # type: ignore[arg-type]
    for number in range(60):
        served(bed, f"c{number}", 2.0, 0.25, 41)
    speeds = bed.core.speeds
    assert speeds.prefill_s(LONG) == pytest.approx(2.0, rel=0.1)
    assert speeds.step_s(1, LONG) == pytest.approx(0.25, rel=0.1)


def test_prompts_that_come_from_a_host_say_nothing_of_computing() -> None:
    bed = Bed()
    bed.core = Core(LIMITS, Placement(), "core")
    bed.api()
    bed.say("d", ready("d", kv_host_blocks=500))
    guess_s = bed.core.speeds.prefill_s(LONG)
    for number in range(9):
        # Of the cache nothing is left.
        bed.say("d", KvChanges("d", "1", number, reset=True, host_stored=[hashes(LONG)]))
        plan = bed.plan(f"c{number}", LONG)
        assert (plan.decode.worker, plan.prefill) == ("d", None)
        assert bed.core._state.calls["api", f"c{number}"].loaded_blocks == LONG // 16 - 1
        bed.now_s += 2.0
        bed.say("api", Started("api", f"c{number}", 1))
        bed.say("api", Finished("api", f"c{number}", 1, "stop", 2))
    assert bed.core.speeds.prefill_s(LONG) == guess_s


def test_short_answers_and_calls_that_fail_say_nothing_of_steps() -> None:
    bed = Bed()
    bed.cluster("decode")
    guess_s = bed.core.speeds.step_s(1, LONG)
    served(bed, "a", 2.0, 5.0, 3)
    bed.plan("b", LONG)
    bed.now_s += 2.0
    bed.say("api", Started("api", "b", 1))
    bed.now_s += 500.0
    bed.say("api", Finished("api", "b", 1, "error", 20))
    assert bed.core.speeds.step_s(1, LONG) == guess_s


def test_how_long_answers_get_is_learned_by_agent_and_in_all() -> None:
    bed = Bed()
    bed.cluster("decode")
    pace = bed.core._pace
    for number in range(8):
        context = CallContext(workflow="w", run=f"r{number}", agent="planner")
        served(bed, f"p{number}", 0.1, 0.01, 40, context=context)
    for number in range(200):
        served(bed, f"c{number}", 0.1, 0.01, 90)
    bed.core.learn()
    context = CallContext(workflow="w", run="r", agent="planner")
    bed.submit("again", max_output_tokens=500, context=context)
    planner = bed.core._state.calls["api", "again"]
    assert pace.expected_tokens(planner) == pytest.approx(40, rel=0.1)
    bed.submit("plain", max_output_tokens=500)
    assert pace.expected_tokens(bed.core._state.calls["api", "plain"]) == pytest.approx(90, rel=0.1)
    bed.submit("small", max_output_tokens=7)
    assert pace.expected_tokens(bed.core._state.calls["api", "small"]) == 7.0

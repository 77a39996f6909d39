"""The policy of roles: who turns for which demand, what keeps them from it, what nonsense does."""

from __future__ import annotations

import pytest

from coordinator.limits import Rebalance
from coordinator.policy.rebalance import (
    Candidate,
    Capacity,
    Need,
    Side,
    Situation,
    cost,
    decide,
    decode_limits,
    desired,
    sane,
    seen,
    trusted,
)
from coordinator.speeds import STEP_GUESS, Law
from coordinator.workflow.blend import Interval, Judgement
from coordinator.workflow.forecast import ForecastScore

SETTINGS = Rebalance(mode="auto")
CAPACITY = Capacity(10_000.0, 1_000.0, 100_000.0)


def candidates(
    prefill: int, decode: int, turnable: bool = True, left_s: float = 0.0
) -> list[Candidate]:
    roles: list[Side] = ["prefill"] * prefill + ["decode"] * decode
    return [
        Candidate(f"{role[0]}{number}", role, turnable, left_s, 0.0, 8192)
        for number, role in enumerate(roles)
    ]


def situation(
    who: list[Candidate], prefill: float, decode: float, resident: float = 0.0, waiting: float = 0.0
) -> Situation:
    need = Need(seen(prefill), seen(decode), seen(resident), ["seen"] * 3)
    return Situation(who, 0, waiting, need, CAPACITY)


def test_workers_follow_the_demand() -> None:
    reading = decide(situation(candidates(2, 6), 50_000, 800), SETTINGS)
    writing = decide(situation(candidates(6, 2), 4_000, 4_500), SETTINGS)
    assert reading.wanted == 6
    assert reading.turns == ["d2", "d3", "d4", "d5"]
    assert writing.wanted < 3
    assert set(writing.turns) < {f"p{number}" for number in range(6)}


def test_a_balanced_cluster_stays_as_it_is() -> None:
    found = decide(situation(candidates(4, 4), 20_000, 2_000), SETTINGS)
    assert (found.wanted, found.turns) == (4, [])
    assert "4 prefill workers are best" in found.reason


def test_memory_alone_asks_for_decode_workers() -> None:
    found = decide(situation(candidates(4, 4), 15_000, 500, resident=500_000), SETTINGS)
    assert found.wanted == 2
    assert found.pressure.memory > 1.0 > found.pressure.decode


def test_prompts_that_wait_ask_for_prefill_workers() -> None:
    found = decide(situation(candidates(2, 6), 10_000, 1_000, waiting=400_000), SETTINGS)
    assert found.wanted == 6


def test_floors_are_kept_whatever_is_asked_for() -> None:
    settings = Rebalance(mode="auto", prefill_workers_min=2, decode_workers_min=3)
    reading = decide(situation(candidates(2, 6), 1e9, 0), settings)
    writing = decide(situation(candidates(5, 3), 0, 1e9), settings)
    assert len(reading.turns) == 3
    assert len(writing.turns) == 3


def test_who_has_turned_lately_does_not_turn_back() -> None:
    found = decide(situation(candidates(2, 6, turnable=False), 50_000, 800), SETTINGS)
    assert found.turns == []
    assert "nobody may turn yet" in found.reason


def test_a_turn_that_costs_more_than_it_brings_is_not_made() -> None:
    # What is missing is little; its old work would run on for minutes.
    cheap = decide(situation(candidates(4, 4), 33_000, 1_500), SETTINGS)
    dear = decide(situation(candidates(4, 4, left_s=200.0), 33_000, 1_500), SETTINGS)
    assert cheap.turns
    assert dear.turns == []
    assert "by what turning costs" in dear.reason


def test_the_cheapest_turn_and_the_last_that_holds_long_prompts_stays() -> None:
    who = [
        Candidate("p", "prefill", True, 0.0, 0.0, 8192),
        Candidate("busy", "decode", True, 30.0, 0.0, 8192),
        Candidate("large", "decode", True, 0.0, 0.0, 32768),
        Candidate("idle", "decode", True, 1.0, 0.0, 8192),
    ]
    assert decide(situation(who, 9_000, 700), SETTINGS).turns == ["idle"]


@pytest.mark.parametrize("prefill", [0.0, 1e12])
@pytest.mark.parametrize("count", [(0, 0), (0, 3), (1, 0), (1, 1)])
def test_few_workers_or_extreme_demand_break_nothing(
    prefill: float, count: tuple[int, int]
) -> None:
    found = decide(situation(candidates(*count), prefill, 1e12, 1e12), SETTINGS)
    assert found.turns == [] or sum(count) > 2
    assert found.cost >= 0.0


def test_more_of_what_is_missing_never_costs_more() -> None:
    at = situation(candidates(4, 4), 60_000, 100)
    costs = [cost(at, count, 4) for count in range(1, 9)]
    assert costs == sorted(costs, reverse=True)


def test_a_forecast_is_believed_only_while_it_is_right() -> None:
    def score(samples: float, error: float) -> list[ForecastScore]:
        return [ForecastScore("x", 5.0, Judgement(error, 1.0, 0.9, samples), error)]

    assert trusted(score(20.0, 0.8), "x", 10.0)
    assert not trusted(score(20.0, 1.5), "x", 10.0)
    assert not trusted(score(2.0, 0.5), "x", 10.0)
    assert not trusted(score(20.0, 0.5), "y", 10.0)


@pytest.mark.parametrize(
    "values",
    [
        (0, float("nan"), 0, 1),
        (-1, 0, 0, 1),
        (3, 2, 2, 4),
        (0, 1, 1, float("inf")),
        (0, 1, 1, 1e30),
    ],
)
def test_nonsense_is_no_forecast(values: tuple[float, float, float, float]) -> None:
    assert not sane(Interval(*values))
    assert sane(Interval(0, 1, 1, 2))


def test_a_decode_worker_gives_what_its_promise_allows() -> None:
    step = Law(STEP_GUESS)
    slow = decode_limits(step, 4000.0, 0.02, 1e9)
    fast = decode_limits(step, 4000.0, 0.04, 1e9)
    cramped = decode_limits(step, 4000.0, 0.04, 8000.0)
    assert cramped < slow < fast
    # A promise that can't be kept at all: one call at a time.
    start_s, sequence_s, context_s = STEP_GUESS
    assert decode_limits(step, 4000.0, 1e-3, 1e9) == pytest.approx(
        1 / (start_s + sequence_s + 4000 * context_s)
    )


def test_desired_workers_are_for_the_upper_end_and_at_least_one() -> None:
    need = Need(seen(100_000), seen(2_000), seen(1_000), ["seen"] * 3)
    assert desired(need, CAPACITY) == {"prefill": 17, "decode": 4}
    nothing = Need(seen(0), seen(0), seen(0), ["seen"] * 3)
    assert desired(nothing, CAPACITY) == {"prefill": 1, "decode": 1}

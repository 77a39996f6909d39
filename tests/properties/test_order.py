"""Waiting calls: whoever they are, nobody waits for ever, and tenants get their shares."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from coordinator.policy.fair_queue import FairQueue
from coordinator.policy.order import key_s
from coordinator.state import Call

TENANTS = ("a", "b", "c")
seconds = st.floats(0.001, 100.0)


def call(name: object) -> Call:
    return cast(Call, SimpleNamespace(name=name))


def name_of(found: Call | None) -> Any:
    return cast(Any, found).name


@given(st.lists(st.tuples(seconds, st.floats(0.0, 1e6), st.booleans()), max_size=40), seconds)
def test_nobody_waits_for_what_comes_aging_s_later(
    calls: list[tuple[float, float, bool]], aging_s: float
) -> None:
    at_s, keys = 0.0, []
    for gap_s, left_s, hurried in calls:
        at_s += gap_s
        deadline_s = at_s + 1.0 if hurried else None
        key = key_s(at_s, left_s, 10.0, aging_s, deadline_s)
        assert key <= at_s + aging_s
        keys.append((at_s, key, hurried))
    for came_s, key, _ in keys:
        for later_s, other, hurried in keys:
            if later_s > came_s + aging_s and not hurried:
                assert key < other


@given(seconds, seconds, seconds)
def test_the_shorter_run_goes_first_of_those_that_come_together(
    one_s: float, other_s: float, typical_s: float
) -> None:
    short_s, long_s = sorted((one_s, other_s))
    keys = [key_s(5.0, left_s, typical_s, 30.0, None) for left_s in (short_s, long_s)]
    assert keys == sorted(keys)


@given(
    st.lists(st.tuples(st.sampled_from(TENANTS), seconds), min_size=30, max_size=120),
    st.fixed_dictionaries({tenant: st.floats(0.1, 1.0) for tenant in TENANTS}),
)
def test_tenants_that_all_wait_are_served_alike(
    works: list[tuple[str, float]], weights: dict[str, float]
) -> None:
    queue = FairQueue(weights)
    left = dict.fromkeys(TENANTS, 0)
    for number, (tenant, work_s) in enumerate(works):
        queue.push(tenant, (True, 0, 0.0, number), call((tenant, work_s, number)), door=False)
        left[tenant] += 1
    most_s = max(work_s for _, work_s in works) / min(weights.values())
    served = dict.fromkeys(TENANTS, 0.0)
    # As long as all of them have something queued.
    while all(left.values()):
        tenant, work_s, number = name_of(queue.first(door=False))
        queue.remove(tenant, (True, 0, 0.0, number), door=False)
        queue.serve(tenant, work_s)
        queue.check()
        left[tenant] -= 1
        served[tenant] += work_s / weights[tenant]
        if all(left.values()):
            assert max(served.values()) - min(served.values()) <= most_s + 1e-6


@given(st.integers(1, 200), seconds)
def test_a_flood_does_not_hold_up_who_comes_after_it(flood: int, work_s: float) -> None:
    queue = FairQueue({})
    for number in range(flood):
        queue.push("flood", (True, 0, float(number), number), call(("flood", number)), door=False)
    for number in range(flood // 2):
        queue.remove("flood", (True, 0, float(number), number), door=False)
        queue.serve("flood", work_s)
    queue.push("late", (True, 0, 1e9, flood), call(("late", flood)), door=False)
    before = 0
    while name_of(queue.first(door=False))[0] != "late":
        _, number = name_of(queue.first(door=False))
        queue.remove("flood", (True, 0, float(number), number), door=False)
        queue.serve("flood", work_s)
        before += 1
    assert before <= 1


@given(st.integers(1, 50))
def test_who_was_away_has_not_saved_anything_up(rounds: int) -> None:
    queue = FairQueue({})
    for number in range(rounds):
        queue.push("busy", (True, 0, 0.0, number), call(number), door=False)
        queue.remove("busy", (True, 0, 0.0, number), door=False)
        queue.serve("busy", 1.0)
    for number in range(8):
        for tenant in ("busy", "back"):
            rank = (True, 0, 0.0, 1000 + 2 * number + (tenant == "back"))
            queue.push(tenant, rank, call((tenant, rank)), door=False)
    order = []
    for _ in range(8):
        tenant, rank = name_of(queue.first(door=False))
        queue.remove(tenant, rank, door=False)
        queue.serve(tenant, 1.0)
        order.append(tenant)
    assert abs(order.count("busy") - order.count("back")) <= 1


ranks = st.tuples(st.booleans(), st.integers(-2, 2), st.floats(0, 10), st.booleans())


@given(st.lists(st.tuples(st.sampled_from(TENANTS), ranks), max_size=40))
def test_explicit_priority_goes_before_everything_but_lost_plans(
    calls: list[tuple[str, tuple[bool, int, float, bool]]],
) -> None:
    queue = FairQueue({})
    for number, (tenant, (fresh, priority, key, door)) in enumerate(calls):
        rank = (fresh, priority, key, number)
        queue.push(tenant, rank, call((tenant, rank, door)), door=door)
    assert len(list(queue)) == len(queue) == len(calls)
    seen = []
    while (found := queue.first(door=True)) is not None:
        tenant, rank, door = name_of(found)
        queue.remove(tenant, rank, door=door)
        queue.serve(tenant, 1.0)
        queue.check()
        seen.append((rank, door))
    first = [rank[:2] for rank, door in seen]
    outside = [rank[:2] for rank, door in seen if not door]
    assert outside == sorted(outside)
    assert len(first) == len(calls)

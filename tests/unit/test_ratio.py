"""When a worker turns from prefill to decode or back, and when not."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.limits import Ratio
from coordinator.policy.ratio import Trend, Turn, look
from coordinator.protocol import Role
from tests.unit.seen import Seen

RATIO = Ratio(
    mode="reactive",
    interval_s=5.0,
    looks=3,
    dwell_s=30.0,
    prefill_tokens_high=1000,
    decode_kv_high=0.9,
    spare=0.8,
)


def prefill(name: str, tokens: int = 0, **more: object) -> Seen:
    return Seen(name, "prefill", prefill_tokens=tokens, **more)  # type: ignore[arg-type]


def decode(name: str, used: int = 0, **more: object) -> Seen:
    return Seen(name, "decode", kv_blocks_used=used, **more)  # type: ignore[arg-type]


def looked(
    workers: list[Seen], looks: int, ratio: Ratio = RATIO, trend: Trend | None = None
) -> tuple[Trend, list[tuple[int, Turn]]]:
    """So many looks, 5 s apart; the turns by number of the look. Turned workers turn."""
    trend, turns = trend or Trend(), []
    for number in range(1, looks + 1):
        now_s = 5.0 * number
        trend, turn = look(workers, trend, ratio, now_s)
        if turn is not None:
            turns.append((number, turn))
            (worker,) = (each for each in workers if each.name == turn.worker)
            worker.role, worker.turned_s = turn.role, now_s
    return trend, turns


def moved(turns: list[tuple[int, Turn]]) -> list[tuple[int, str, Role]]:
    return [(number, turn.worker, turn.role) for number, turn in turns]


def test_a_sustained_backlog_turns_a_decode_worker_and_not_before() -> None:
    workers = [prefill("p", 1000), decode("d", 30), decode("e", 20), decode("f", 40)]
    _, turns = looked(workers, 2)
    assert not turns
    _, turns = looked(workers, 3)
    assert moved(turns) == [(3, "e", "prefill")]
    assert turns[0][1].reason == "1000 tokens wait for 1 prefill workers"


def test_a_backlog_with_a_pause_is_not_sustained() -> None:
    workers = [prefill("p", 1000), decode("d"), decode("e")]
    trend, _ = looked(workers, 2)
    workers[0].prefill_tokens = 999
    trend, _ = looked(workers, 1, trend=trend)
    workers[0].prefill_tokens = 1000
    _, turns = looked(workers, 3, trend=trend)
    assert moved(turns) == [(3, "d", "prefill")]


def test_full_decode_workers_get_the_idlest_prefill_worker() -> None:
    workers = [prefill("p", 20), prefill("q", 10), decode("d", 90), decode("e", 90)]
    _, turns = looked(workers, 3)
    assert moved(turns) == [(3, "q", "decode")]
    assert turns[0][1].reason == "90% of the KV of 2 decode workers is in use"


@pytest.mark.parametrize("used", [88, 89])
def test_below_the_threshold_nothing_turns(used: int) -> None:
    workers = [prefill("p"), prefill("q"), decode("d", used), decode("e", 90)]
    assert looked(workers, 9)[1] == []


def test_what_is_reserved_for_calls_that_wait_for_their_prefill_is_no_load_on_decode() -> None:
    booked = [decode(name, kv_blocks_reserved=95) for name in "de"]
    assert looked([prefill("p"), prefill("q"), *booked], 9)[1] == []
    assert moved(looked([prefill("p", 1000), *booked], 3)[1]) == [(3, "d", "prefill")]


def test_a_side_that_cannot_spare_a_worker_keeps_it() -> None:
    # With one less 73.5 % of the rest would be in use; spared are workers below 0.8 * 0.9 = 72 %.
    workers = [prefill("p", 9000), *(decode(name, 49) for name in "def")]
    assert looked(workers, 9)[1] == []
    workers = [prefill("p", 9000), *(decode(name, 47) for name in "def")]
    assert len(looked(workers, 3)[1]) == 1
    # One prefill worker of two would have 800 tokens or more.
    workers = [prefill("p", 400), prefill("q", 400), decode("d", 95)]
    assert looked(workers, 9)[1] == []
    workers = [prefill("p", 400), prefill("q", 399), decode("d", 95)]
    assert len(looked(workers, 3)[1]) == 1


def test_if_both_are_overloaded_nothing_turns() -> None:
    workers = [prefill("p", 9000), prefill("q", 9000), decode("d", 95), decode("e", 95)]
    assert looked(workers, 9)[1] == []


def test_floors_are_kept() -> None:
    assert looked([prefill("p", 9000), decode("d")], 9)[1] == []
    assert looked([prefill("p"), decode("d", 95)], 9)[1] == []
    two = msgspec.structs.replace(RATIO, decode_workers_min=2, prefill_workers_min=2)
    workers = [prefill("p", 9000), decode("d"), decode("e"), decode("f")]
    assert moved(looked(workers, 9, two)[1]) == [(3, "d", "prefill")]
    workers = [prefill("p"), prefill("q"), decode("d", 95)]
    assert looked(workers, 9, two)[1] == []


def test_the_overload_may_last_and_turn_one_after_the_other() -> None:
    workers = [prefill("p", 90_000), *(decode(name) for name in "defg")]
    _, turns = looked(workers, 12)
    assert moved(turns) == [(3, "d", "prefill"), (6, "e", "prefill"), (9, "f", "prefill")]


def test_the_direction_is_reversed_only_after_the_dwell_time() -> None:
    workers = [prefill("p", 9000), prefill("q"), decode("d"), decode("e"), decode("f")]
    trend, turns = looked(workers, 3)
    assert moved(turns) == [(3, "d", "prefill")]
    for worker in workers:
        worker.prefill_tokens, worker.kv_blocks_used = 0, 95
    # The turn was at 15 s; from now on looks are at 5 s, 10 s and so on again.
    _, turns = looked(workers, 9, trend=trend)
    assert moved(turns) == [(9, "d", "decode")]


def test_a_worker_keeps_its_role_for_the_dwell_time() -> None:
    workers = [prefill("p", 9000), decode("d", turned_s=-10.0), decode("e", 5), decode("f", 6)]
    assert moved(looked(workers, 3)[1]) == [(3, "e", "prefill")]
    workers = [prefill("p", 9000), decode("d", turned_s=-10.0), decode("e", 5, turned_s=-14.9)]
    assert moved(looked(workers, 4)[1]) == [(4, "d", "prefill")]


def test_mixed_workers_count_on_both_sides_and_stay() -> None:
    workers = [Seen("m", "mixed", prefill_tokens=9000), Seen("n", "mixed")]
    assert looked(workers, 9)[1] == []
    workers = [Seen("m", "mixed", prefill_tokens=2000), prefill("p"), decode("d"), decode("e")]
    assert moved(looked(workers, 3)[1]) == [(3, "d", "prefill")]


def test_suspects_neither_turn_nor_count() -> None:
    workers = [prefill("p", 9000), decode("d", up=False), decode("e"), decode("f")]
    assert moved(looked(workers, 3)[1]) == [(3, "e", "prefill")]


def test_the_only_worker_for_the_longest_prompts_stays() -> None:
    workers = [prefill("p", 9000), decode("d", tokens_max=9999), decode("e", 5)]
    assert moved(looked(workers, 3)[1]) == [(3, "e", "prefill")]


def test_nobody_to_turn_and_nobody_at_all() -> None:
    assert looked([], 3)[1] == []
    assert looked([prefill("p", 9000)], 3)[1] == []

"""When a worker turns from prefill to decode or back, and when not."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.limits import Ratio
from coordinator.policy.ratio import Trend, Turn, look
from coordinator.protocol import Load, Role
from tests.unit.seen import Seen

RATIO = Ratio(
    mode="reactive",
    interval_s=5.0,
    looks=3,
    dwell_s=30.0,
    prefill_tokens_high=1000,
    decode_kv_high=0.9,
    decode_itl_high_s=0.05,
    spare=0.8,
)


def prefill(name: str, tokens: int = 0, **more: object) -> Seen:
    return Seen(name, "prefill", prefill_tokens=tokens, **more)  # type: ignore[arg-type]


def decode(name: str, used: int = 0, **more: object) -> Seen:
    return Seen(name, "decode", kv_blocks_used=used, **more)  # type: ignore[arg-type]


def looked(
    workers: list[Seen], looks: int, ratio: Ratio = RATIO, trend: Trend | None = None
) -> tuple[Trend, list[tuple[int, Turn]]]:
    """So many more looks, 5 s apart; the turns by number of the look. Turned workers turn."""
    trend, turns = trend or Trend(), []
    began_s = max(0.0, trend.looked_s)
    for number in range(1, looks + 1):
        now_s = began_s + 5.0 * number
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
    workers = [prefill("p"), prefill("q"), prefill("r"), decode("d", 90), decode("e", 90)]
    workers[0].prefill_tokens = 10
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
    # Two prefill workers of three would have 800 tokens each.
    workers = [prefill("p", 800), prefill("q"), prefill("r"), decode("d", 95)]
    assert len(looked(workers, 3)[1]) == 1
    workers = [prefill("p", 1600), prefill("q"), prefill("r"), decode("d", 95)]
    assert looked(workers, 9)[1] == []


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
    _, turns = looked(workers, 6, trend=trend)
    assert moved(turns) == [(6, "d", "decode")]


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


# --- what is slow or full long before the KV is --------------------------------------------------


class Decoding:
    """Decode workers whose engines make a token for each of their requests every ``itl_s``."""

    def __init__(self, *others: Seen, count: int, running: int = 4, trend: Trend | None = None):
        self.decoders = [decode(name) for name in "defghi"[:count]]
        for worker in self.decoders:
            worker.incarnation = worker.name
        self.workers = [*others, *self.decoders]
        self.running = running
        self.trend, self.now_s = trend or Trend(), 0.0
        self.made = 0

    def look(self, itl_s: float, times: int = 1) -> list[tuple[str, Role, str]]:
        """Looks 5 s apart; who turned."""
        turns = []
        for _ in range(times):
            self.now_s += 5.0
            self.made += round(5.0 / itl_s) * self.running
            for worker in self.decoders:
                worker.load = Load(running=self.running, decode_tokens_total=self.made)
            self.trend, turn = look(self.workers, self.trend, RATIO, self.now_s)
            if turn is not None:
                (worker,) = (each for each in self.workers if each.name == turn.worker)
                worker.role, worker.turned_s = turn.role, self.now_s
                turns.append((turn.worker, turn.role, turn.reason))
        return turns


def test_slow_decoding_is_overload_though_the_kv_is_free() -> None:
    bed = Decoding(prefill("p"), prefill("q"), count=2)
    assert bed.look(0.049, 9) == []
    assert bed.look(0.05, 2) == []
    assert bed.look(0.05) == [("p", "decode", "50 ms between tokens on 2 decode workers")]


def test_full_batches_are_overload_though_the_kv_is_free() -> None:
    workers = [prefill("p"), prefill("q"), decode("d", load=Load(running=7)), decode("e")]
    workers[3].load, workers[3].waiting = Load(running=4, waiting=4), 4
    assert looked(workers, 9)[1] == []
    workers[2].load = Load(running=8)
    _, turns = looked(workers, 3)
    assert moved(turns) == [(3, "p", "decode")]
    assert turns[0][1].reason == "16 requests on 2 decode workers"


def test_decode_spares_nobody_whose_loss_would_make_it_slow() -> None:
    # 10 ms with nothing to do and 25 ms now: three fifths of the time grow with the batches,
    # with two workers of three nine tenths would, and a token take 100 ms.
    bed = Decoding(prefill("p"), count=3, running=1)
    bed.look(0.010, 2)
    bed.workers[0].prefill_tokens = 9000
    assert bed.look(0.025, 9) == []
    # At 16 ms it would be 23 ms.
    assert [turn[:2] for turn in bed.look(0.016, 3)] == [("d", "prefill")]


def test_of_decoding_that_is_no_slower_than_ever_growth_in_proportion_is_feared() -> None:
    # Of an idle engine nothing is known here: 27 ms would be 40.5 ms, 80 % of the bound are 40.
    for itl_s, spared in ((0.027, 0), (0.026, 1)):
        bed = Decoding(prefill("p", 9000), count=3)
        assert len(bed.look(itl_s, 4)) == spared


def test_prefill_spares_nobody_while_all_have_been_at_work_though_the_queue_is_short() -> None:
    busy = [prefill(name, 10) for name in "pqr"]
    trend, _ = looked([*busy, decode("d", 20), decode("e", 20)], 6)
    assert trend.busy_share == 1.0
    workers = [*busy, decode("d", 95), decode("e", 95)]
    assert looked(workers, 3, trend=trend)[1] == []
    for worker in busy[1:]:
        worker.prefill_tokens = 0
    # The mean over half a minute has to fall below 80 % of what two workers can do.
    trend, turns = looked(workers, 9, trend=trend)
    assert [turn.role for _, turn in turns] == ["decode"]
    assert turns[0][0] > 3


# --- the way back ---------------------------------------------------------------------------------


def test_a_turn_is_undone_when_the_overload_is_over() -> None:
    workers = [prefill("p", 9000), decode("d"), decode("e"), decode("f")]
    trend, turns = looked(workers, 3)
    assert moved(turns) == [(3, "d", "prefill")]
    workers[0].prefill_tokens = 0
    trend, turns = looked(workers, 12, trend=trend)
    assert moved(turns) == [(6, "d", "decode")]
    assert turns[0][1].reason == "prefill does not need it any more"
    assert [worker.role for worker in workers] == ["prefill", "decode", "decode", "decode"]


def test_a_turn_is_not_undone_while_it_is_needed() -> None:
    workers = [prefill("p", 9000), decode("d"), decode("e"), decode("f")]
    trend, turns = looked(workers, 3)
    assert moved(turns) == [(3, "d", "prefill")]
    # No overload any more, but there would be one again.
    workers[0].prefill_tokens, workers[1].prefill_tokens = 900, 0
    assert looked(workers, 30, trend=trend)[1] == []


def test_a_turn_to_decode_is_undone_too() -> None:
    workers = [prefill("p"), prefill("q"), decode("d", 95)]
    trend, turns = looked(workers, 3)
    assert moved(turns) == [(3, "p", "decode")]
    workers[2].kv_blocks_used = 50
    trend, turns = looked(workers, 12, trend=trend)
    assert moved(turns) == [(6, "p", "prefill")]
    assert turns[0][1].reason == "decode does not need it any more"


def test_who_was_started_in_a_role_stays_there_without_need() -> None:
    workers = [prefill("p"), prefill("q", started_role="decode"), decode("d"), decode("e")]
    workers[3].started_role = "prefill"
    # As many have turned one way as the other.
    assert looked(workers, 12)[1] == []
    workers[3].started_role = "decode"
    assert moved(looked(workers, 3)[1]) == [(3, "q", "decode")]

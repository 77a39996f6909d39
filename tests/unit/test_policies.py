"""What makes each placement policy that policy, and each switch that switch."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from coordinator.limits import Limits, Placement
from coordinator.policy.placement import (
    NO_PREFILL_ROOM,
    NO_ROOM,
    Ask,
    Choice,
    Decision,
    place,
)
from tests.unit.seen import Seen

BLOCK_SIZE = 16
LIMITS = Limits(calls_per_worker=100, prefills_per_worker=3)
ASK = Ask(prompt_tokens=320, output_tokens=64, aggregated=False, avoid=(), sibling="")
CALL_BLOCKS = 24
"""Of a call that asks ``ASK``."""


def where(
    *workers: Seen, held: dict[str, int] | None = None, ask: Ask = ASK, **placement: object
) -> Decision:
    chosen = Placement(**{"policy": "least_kv", **placement})  # type: ignore[arg-type]
    return place(ask, workers, lambda: held or {}, LIMITS, chosen, BLOCK_SIZE)


def chosen(
    *workers: Seen, held: dict[str, int] | None = None, ask: Ask = ASK, **placement: object
) -> Choice:
    decision = where(*workers, held=held, ask=ask, **placement)
    assert isinstance(decision, Choice), decision
    return decision


def but(**changes: object) -> Ask:
    return msgspec.structs.replace(ASK, **changes)


def calls(number: int) -> list[str]:
    return [str(each) for each in range(number)]


# --- round robin ----------------------------------------------------------------------------


def test_round_robin_visits_all_in_turn_whatever_they_have_to_do() -> None:
    workers = [
        Seen("c"),
        Seen("a", kv_blocks_reserved=70, decodes=calls(50), prefill_tokens=10**6, waiting=90),
        Seen("b"),
    ]
    visited = [
        chosen(*workers, ask=but(turn=turn), held={"c": 20}, policy="round_robin").decode
        for turn in range(6)
    ]
    assert visited == ["a", "b", "c", "a", "b", "c"]


def test_prefill_workers_are_visited_in_turn_too() -> None:
    workers = [
        Seen("d", warm_sources={"p", "q"}),
        Seen("q", "prefill"),
        Seen("p", "prefill", prefill_tokens=10**6),
    ]
    how = {"held": {"q": 20}, "prefill_policy": "round_robin", "disaggregated": "always"}
    visited = [chosen(*workers, ask=but(turn=turn), **how).prefill for turn in range(4)]
    assert visited == ["p", "q", "p", "q"]


# --- least loaded ---------------------------------------------------------------------------


def test_least_loaded_counts_open_calls_before_anything_else() -> None:
    few_but_long = Seen("b", kv_blocks_reserved=70, decodes=calls(1), prefill_tokens=9000)
    many_but_short = Seen("a", decodes=calls(2))
    assert chosen(few_but_long, many_but_short, policy="least_loaded").decode == "b"
    prefilling = Seen("a", prefilling=2)
    assert chosen(few_but_long, prefilling, policy="least_loaded").decode == "b"


def test_least_loaded_knows_no_caches() -> None:
    workers = Seen("a", decodes=calls(1)), Seen("b")
    assert chosen(*workers, held={"a": 20}, policy="least_loaded").decode == "b"


def test_among_equal_numbers_of_calls_prompts_and_memory_decide() -> None:
    computing = Seen("a", prefill_tokens=100)
    assert chosen(computing, Seen("b"), policy="least_loaded").decode == "b"
    assert chosen(Seen("a", kv_blocks_used=5), Seen("b"), policy="least_loaded").decode == "b"
    assert chosen(Seen("b"), Seen("a"), policy="least_loaded").decode == "a"


def test_the_least_loaded_prefill_worker_has_the_shortest_queue_whatever_it_holds() -> None:
    workers = [
        Seen("d", warm_sources={"p", "q"}),
        Seen("p", "prefill", prefill_tokens=100),
        Seen("q", "prefill", prefill_tokens=99),
    ]
    how = {"held": {"p": 20}, "disaggregated": "always"}
    assert chosen(*workers, prefill_policy="least_loaded", **how).prefill == "q"
    assert chosen(*workers, **how).prefill == "p"


# --- cache aware and sticky -----------------------------------------------------------------


def test_the_longest_cached_prefix_wins_over_load_within_reach() -> None:
    workers = Seen("a"), Seen("b", decodes=calls(7), kv_blocks_reserved=60)
    assert chosen(*workers, held={"a": 10, "b": 11}, policy="cache_aware").decode == "b"
    assert chosen(*workers, held={"a": 11, "b": 11}, policy="cache_aware").decode == "a"


def test_a_small_part_that_is_cached_attracts_nobody() -> None:
    workers = Seen("a"), Seen("b", decodes=calls(1))
    # 6 of 20 blocks are three tenths.
    assert chosen(*workers, held={"b": 6}, policy="cache_aware").decode == "b"
    assert chosen(*workers, held={"b": 5}, policy="cache_aware").decode == "a"
    less = {"policy": "cache_aware", "affinity_cached_min": 0.05}
    assert chosen(*workers, held={"b": 1}, **less).decode == "b"


def test_sticky_goes_back_to_the_last_worker_until_its_load_is_over_the_bound() -> None:
    ask = but(last="b")
    sticky = {"policy": "cache_aware", "sticky": True, "ask": ask}
    assert chosen(Seen("a"), Seen("b", decodes=calls(7)), **sticky).decode == "b"
    assert chosen(Seen("a"), Seen("b", decodes=calls(8)), **sticky).decode == "a"
    # Of two workers none can have twice the mean of both; of three it can.
    others = [Seen("a", decodes=calls(6)), Seen("c", decodes=calls(6))]
    assert chosen(*others, Seen("b", decodes=calls(23)), **sticky).decode == "b"
    assert chosen(*others, Seen("b", decodes=calls(24)), **sticky).decode == "a"
    assert chosen(*others, Seen("b", decodes=calls(24)), affinity_load_max=3, **sticky).decode == (
        "b"
    )


def test_without_sticky_the_last_worker_is_like_any_other() -> None:
    workers = Seen("a"), Seen("b", decodes=calls(7))
    assert chosen(*workers, policy="cache_aware", ask=but(last="b")).decode == "a"


def test_a_longer_cached_prefix_elsewhere_wins_over_stickiness() -> None:
    workers, ask = (Seen("a"), Seen("b")), but(last="b")
    sticky = {"policy": "cache_aware", "sticky": True, "ask": ask}
    assert chosen(*workers, held={"a": 10, "b": 10}, **sticky).decode == "b"
    assert chosen(*workers, held={"a": 11, "b": 10}, **sticky).decode == "a"


def test_affinity_does_not_overfill_a_worker() -> None:
    full = Seen("b", kv_blocks_reserved=100 - CALL_BLOCKS + 19 + 1, decodes=calls(1))
    free = Seen("a", decodes=calls(3))
    unreserved = {"policy": "cache_aware", "reserve": False, "held": {"b": 19}}
    assert chosen(free, full, **unreserved).decode == "a"
    full.kv_blocks_reserved -= 1
    assert chosen(free, full, **unreserved).decode == "b"


def test_where_nobody_is_in_reach_the_least_loaded_serves() -> None:
    workers = [Seen(name, kv_blocks_used=100, decodes=calls(9)) for name in "ab"]
    workers.append(Seen("c", kv_blocks_used=100, decodes=calls(5)))
    assert chosen(*workers, policy="cache_aware", reserve=False, held={"a": 20}).decode == "c"


# --- cost -----------------------------------------------------------------------------------


def test_the_cost_is_blocks_to_prefill_and_blocks_to_decode() -> None:
    # 320 tokens are 20 blocks, with output 24; cost = 20 - cached + pending + reserved + 24.
    workers = [
        Seen("a", prefill_tokens=128, kv_blocks_reserved=10),  # 20 + 8 + 10 + 24 = 62
        Seen("b", prefill_tokens=0, kv_blocks_reserved=30),  # 20 - 12 + 30 + 24 = 62
        Seen("c", prefill_tokens=160, kv_blocks_reserved=12),  # 20 - 5 + 10 + 12 + 24 = 61
    ]
    assert chosen(*workers, held={"b": 12, "c": 5}, policy="cost").decode == "c"
    assert chosen(*workers, held={"b": 14, "c": 5}, policy="cost").decode == "b"
    assert chosen(*workers, held={"b": 12, "c": 3}, policy="cost").decode == "a"


def test_the_overlap_weight_trades_prefill_against_decode() -> None:
    workers = Seen("a", kv_blocks_reserved=19), Seen("b")
    # a: 20 - 10 to prefill and 19 + 24 to decode; b: 20 and 24.
    assert chosen(*workers, held={"a": 10}, policy="cost").decode == "b"
    assert chosen(*workers, held={"a": 10}, policy="cost", overlap_weight=2).decode == "a"
    assert chosen(*workers, held={"a": 10}, policy="cost", overlap_weight=0).decode == "b"


def test_a_temperature_draws_the_cheaper_more_often_and_the_same_call_alike() -> None:
    workers = [Seen("a", kv_blocks_reserved=10), Seen("b", kv_blocks_reserved=20), Seen("c")]

    def drawn(temperature: float) -> list[str]:
        return [
            chosen(*workers, ask=but(turn=turn), policy="cost", temperature=temperature).decode
            for turn in range(3000)
        ]

    counts = Counter(drawn(1.0))
    # exp(0), exp(-1/2) and exp(-1) over their sum.
    assert counts["c"] / 3000 == pytest.approx(0.506, abs=0.03)
    assert counts["a"] / 3000 == pytest.approx(0.307, abs=0.03)
    assert drawn(1.0) == drawn(1.0)
    assert Counter(drawn(0.05)).most_common(1)[0] == ("c", 3000)
    assert set(drawn(0.0)) == {"c"}


def test_equal_costs_can_be_drawn_from() -> None:
    drawn = {
        chosen(Seen("a"), Seen("b"), ask=but(turn=turn), policy="cost", temperature=0.5).decode
        for turn in range(32)
    }
    assert drawn == {"a", "b"}


# --- disaggregation -------------------------------------------------------------------------


def test_always_never_prefills_where_it_decodes_if_it_can_be_helped() -> None:
    workers = Seen("d", warm_sources={"p"}), Seen("p", "prefill", prefill_tokens=10**6)
    for held in ({}, {"d": 20}):
        for prompt_tokens in (1, 16, 1500):
            ask = but(prompt_tokens=prompt_tokens)
            choice = chosen(*workers, ask=ask, held=held, disaggregated="always", reserve=False)
            assert choice.prefill == "p"
    assert chosen(Seen("d"), disaggregated="always").prefill == ""
    assert chosen(*workers, ask=but(aggregated=True), disaggregated="always").prefill == ""


def test_conditional_prefills_locally_below_the_threshold() -> None:
    workers = Seen("d", warm_sources={"p"}), Seen("p", "prefill")
    conditional = {"remote_prefill_min_tokens": 100}
    assert chosen(*workers, ask=but(prompt_tokens=99), **conditional).prefill == ""
    assert chosen(*workers, ask=but(prompt_tokens=100), **conditional).prefill == "p"
    assert chosen(*workers, held={"d": 14}, **conditional).prefill == ""


def test_never_is_aggregated_serving() -> None:
    workers = Seen("m", "mixed", warm_sources={"n"}), Seen("n", "mixed", kv_blocks_reserved=50)
    choice = chosen(*workers, disaggregated="never", remote_prefill_min_tokens=0)
    assert (choice.decode, choice.prefill) == ("m", "")


# --- switches -------------------------------------------------------------------------------


def test_without_reservation_calls_are_sent_to_full_workers() -> None:
    full = Seen("d", kv_blocks_reserved=100, decodes=calls(1), warm_sources={"p"})
    busy = Seen("p", "prefill", kv_blocks_reserved=100)
    assert where(full, busy) is NO_ROOM
    choice = chosen(full, busy, reserve=False, remote_prefill_min_tokens=0)
    assert (choice.decode, choice.prefill, choice.decode_blocks) == ("d", "p", CALL_BLOCKS)
    busy.prefilling = LIMITS.prefills_per_worker
    assert where(full, busy, reserve=False, remote_prefill_min_tokens=0) is NO_PREFILL_ROOM


def test_without_a_weight_caches_do_not_count() -> None:
    workers = Seen("a"), Seen("b", kv_blocks_reserved=5)
    assert chosen(*workers, held={"b": 20}).decode == "b"
    assert chosen(*workers, held={"b": 20}, cached_weight=0).decode == "a"


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded", "cache_aware", "cost"])
def test_every_policy_keeps_siblings_together_and_avoids_who_failed(policy: str) -> None:
    workers = Seen("a"), Seen("b", decodes=calls(3), kv_blocks_reserved=40)
    assert chosen(*workers, ask=but(sibling="b"), policy=policy).decode == "b"
    assert chosen(*workers, ask=but(avoid={("a", "1")}), policy=policy).decode == "b"

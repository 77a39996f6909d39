"""Where calls go: load, caches, room, links and blame."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.limits import Limits, Placement
from coordinator.policy.placement import (
    NO_PREFILL_ROOM,
    NO_ROOM,
    NO_WORKER,
    Ask,
    Choice,
    Decision,
    Impossible,
    place,
)
from tests.unit.seen import Seen

BLOCK_SIZE = 16
LIMITS = Limits(calls_per_worker=4, prefills_per_worker=2)
PLACEMENT = Placement(policy="least_kv", remote_prefill_min_tokens=100, reserve_output_tokens=64)


ASK = Ask(prompt_tokens=320, output_tokens=1000, aggregated=False, avoid=(), sibling="")


def where(*workers: Seen, ask: Ask = ASK, held: dict[str, int] | None = None) -> Decision:
    return place(ask, workers, lambda: held or {}, LIMITS, PLACEMENT, BLOCK_SIZE)


def chosen(*workers: Seen, ask: Ask = ASK, held: dict[str, int] | None = None) -> Choice:
    decision = where(*workers, ask=ask, held=held)
    assert isinstance(decision, Choice), decision
    return decision


def but(**changes: object) -> Ask:
    return msgspec.structs.replace(ASK, **changes)


def test_the_least_loaded_worker_decodes() -> None:
    assert chosen(Seen("a", kv_blocks_reserved=20), Seen("b", kv_blocks_reserved=10)).decode == "b"
    assert chosen(Seen("a", kv_blocks_used=20), Seen("b", kv_blocks_reserved=10)).decode == "b"
    assert chosen(Seen("a", waiting=3), Seen("b", kv_blocks_reserved=10)).decode == "b"
    big = Seen("b", kv_blocks_reserved=30, usable_blocks=1000)
    assert chosen(Seen("a", kv_blocks_reserved=20), big).decode == "b"


def test_ties_go_to_the_smallest_name_in_any_order() -> None:
    assert chosen(Seen("b"), Seen("a"), Seen("c")).decode == "a"
    assert chosen(Seen("a"), Seen("c"), Seen("b")).decode == "a"


def test_a_cached_prefix_counts_among_near_equals_only() -> None:
    held = {"b": 20}
    assert chosen(Seen("a"), Seen("b", kv_blocks_reserved=5), held=held).decode == "b"
    assert chosen(Seen("a"), Seen("b", kv_blocks_reserved=50), held=held).decode == "a"


def test_output_is_reserved_up_to_the_smaller_limit() -> None:
    assert chosen(Seen("a")).decode_blocks == (320 + 64) // BLOCK_SIZE
    assert chosen(Seen("a"), ask=but(output_tokens=1)).decode_blocks == 21


def test_suspects_get_nothing() -> None:
    assert chosen(Seen("a", up=False), Seen("b", kv_blocks_reserved=70)).decode == "b"
    assert where(Seen("a", up=False)) is NO_WORKER
    assert where() is NO_WORKER


def test_without_room_a_call_waits() -> None:
    assert where(Seen("a", kv_blocks_reserved=77)) is NO_ROOM
    assert where(Seen("a", kv_blocks_reserved=1, kv_blocks_used=77)) is NO_ROOM
    assert chosen(Seen("a", kv_blocks_reserved=76)).decode == "a"
    assert where(Seen("a", decodes=["1", "2", "3", "4"])) is NO_ROOM


def test_a_worker_with_nothing_reserved_takes_one_call_whatever_it_says() -> None:
    choice = chosen(Seen("a", usable_blocks=10, kv_blocks_used=10))
    assert choice.decode_blocks == 10


@pytest.mark.parametrize(("tokens", "fits"), [(1599, True), (1600, False)])
def test_what_no_engine_can_hold_is_impossible(tokens: int, fits: bool) -> None:
    decision = where(
        Seen("a"), Seen("p", "prefill", tokens_max=9999), ask=but(prompt_tokens=tokens)
    )
    assert isinstance(decision, Choice if fits else Impossible)


def test_what_only_a_suspect_can_hold_waits() -> None:
    suspect = Seen("b", up=False, tokens_max=9999)
    assert where(Seen("a"), suspect, ask=but(prompt_tokens=5000)) is NO_WORKER


def test_long_uncached_prompts_are_prefilled_elsewhere() -> None:
    decode = Seen("d", warm_sources={"p"})
    choice = chosen(decode, Seen("p", "prefill"))
    assert (choice.decode, choice.prefill) == ("d", "p")
    assert (choice.prefill_blocks, choice.uncached_tokens) == (20, 320)
    assert chosen(decode, Seen("p", "prefill"), ask=but(prompt_tokens=99)).prefill == ""
    assert chosen(decode, Seen("p", "prefill"), ask=but(prompt_tokens=100)).prefill == "p"


def test_what_counts_is_not_the_prompt_but_what_is_not_cached_of_it() -> None:
    decode, prefill = Seen("d", warm_sources={"p"}), Seen("p", "prefill")
    assert chosen(decode, prefill, held={"d": 14}).prefill == ""
    assert chosen(decode, prefill, held={"d": 13}).prefill == "p"
    assert chosen(decode, prefill, held={"d": 13, "other": 17}).held_blocks == 17
    assert chosen(decode, prefill, held={"d": 14, "other": 17}).held_blocks == 17
    whole = chosen(decode, prefill, held={"d": 20})
    assert (whole.cached_blocks, whole.uncached_tokens) == (19, 16)


def test_aggregated_calls_stay_together() -> None:
    decode = Seen("d", warm_sources={"p"})
    assert chosen(decode, Seen("p", "prefill"), ask=but(aggregated=True)).prefill == ""


def test_without_a_decode_worker_a_prefill_worker_serves_everything() -> None:
    choice = chosen(Seen("p", "prefill"), Seen("q", "prefill", warm_sources={"p"}))
    assert (choice.decode, choice.prefill) == ("p", "")


def test_cold_links_lost_workers_and_decode_workers_do_not_prefill() -> None:
    assert chosen(Seen("d"), Seen("p", "prefill")).prefill == ""
    warm = Seen("d", warm_sources={"p", "e"})
    assert chosen(warm, Seen("p", "prefill", up=False)).prefill == ""
    assert chosen(warm, Seen("e", kv_blocks_reserved=50)).prefill == ""
    small = Seen("p", "prefill", tokens_max=300)
    assert chosen(warm, small).prefill == ""


def test_a_mixed_worker_prefills_for_others_but_not_for_itself() -> None:
    decode = Seen("d", warm_sources={"m"})
    mixed = Seen("m", "mixed", kv_blocks_reserved=30)
    assert chosen(decode, mixed).prefill == "m"
    alone = Seen("m", "mixed")
    assert chosen(alone).prefill == ""


def test_the_prefill_worker_with_least_to_compute_is_chosen() -> None:
    decode = Seen("d", warm_sources={"p", "q"})
    busy = Seen("p", "prefill", prefill_tokens=200)
    assert chosen(decode, busy, Seen("q", "prefill")).prefill == "q"
    assert chosen(decode, Seen("q", "prefill"), Seen("p", "prefill")).prefill == "p"
    cached = chosen(decode, busy, Seen("q", "prefill"), held={"p": 19})
    assert (cached.prefill, cached.uncached_tokens) == ("p", 16)


def test_if_all_prefill_workers_are_full_the_call_waits() -> None:
    decode = Seen("d", warm_sources={"p"})
    assert where(decode, Seen("p", "prefill", prefilling=2)) is NO_PREFILL_ROOM
    assert where(decode, Seen("p", "prefill", kv_blocks_reserved=90)) is NO_PREFILL_ROOM


def test_siblings_go_together_while_there_is_room() -> None:
    ask = but(sibling="b")
    assert chosen(Seen("a"), Seen("b", kv_blocks_reserved=50), ask=ask).decode == "b"
    assert chosen(Seen("a"), Seen("b", kv_blocks_reserved=90), ask=ask).decode == "a"
    assert chosen(Seen("a"), Seen("b", up=False), ask=ask).decode == "a"


def test_who_failed_a_call_is_avoided_if_another_can_serve() -> None:
    ask = but(avoid={("a", "1")})
    assert chosen(Seen("a"), Seen("b", kv_blocks_reserved=50), ask=ask).decode == "b"
    assert chosen(Seen("a"), ask=ask).decode == "a"
    assert chosen(Seen("a", incarnation="2"), Seen("b"), ask=ask).decode == "a"
    assert where(Seen("a"), Seen("b", kv_blocks_reserved=99), ask=ask) is NO_ROOM
    decode = Seen("d", warm_sources={"p"})
    assert chosen(decode, Seen("p", "prefill"), ask=but(avoid={("p", "1")})).prefill == ""


def test_caches_are_asked_for_only_when_there_is_a_choice() -> None:
    def never() -> dict[str, int]:
        raise AssertionError

    full = [Seen("a", kv_blocks_reserved=99)]
    assert place(ASK, full, never, LIMITS, PLACEMENT, BLOCK_SIZE) is NO_ROOM

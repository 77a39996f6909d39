"""Room for prompts that begin alike: once for all, as long as one of them is there."""

from __future__ import annotations

import msgspec

from coordinator.core import Core
from coordinator.protocol import Beat, CallContext, Finished, Load, Plan, Prefilled, Started
from tests.unit.test_core import LIMITS, PLACEMENT, Bed, ready

STRETCH = 32
"""Blocks of 16 tokens."""
PROMPT_TOKENS = 1100
"""68 full blocks, and with the output's 71 in all."""
ALONE = 71 - 68


def bed(**placement: object) -> Bed:
    made = Bed()
    made.core = Core(LIMITS, msgspec.structs.replace(PLACEMENT, **placement), "core")
    return made


def chain(name: int, common: int = 0) -> bytes:
    """Hashes of a prompt whose first ``common`` blocks are like those of all others."""
    blocks = [1 + at if at < common else 1000 * name + at for at in range(68)]
    return b"".join(block.to_bytes(8, "little") for block in blocks)


def ask(made: Bed, number: int, common: int, **more: object) -> Plan:
    return made.plan(f"c{number}", PROMPT_TOKENS, block_hashes=chain(number, common), **more)


def end(made: Bed, number: int) -> None:
    made.say("api", Finished("api", f"c{number}", 1, "stop", 4))


def test_what_calls_have_in_common_is_reserved_once() -> None:
    made = bed()
    made.cluster("decode")
    ask(made, 1, 68)
    assert made.reserved() == [71]
    ask(made, 2, 68)
    assert made.reserved() == [71 + ALONE]
    # Of a stretch that is in common in part nothing counts: 39 more are too many.
    made.submit("c3", PROMPT_TOKENS, block_hashes=chain(3, STRETCH + 8))
    assert not made.heard(Plan)
    end(made, 1)
    assert made.reserved() == [71], "the other one still has all of it"
    assert made.row("c3").phase == "queued"
    end(made, 2)
    assert made.only(Plan).request == "c3"
    assert made.reserved() == [71]
    end(made, 3)
    assert made.reserved() == [0]


def test_prompts_that_differ_take_room_each() -> None:
    made = bed()
    made.cluster("decode")
    ask(made, 1, 0)
    made.submit("c2", PROMPT_TOKENS, block_hashes=chain(2))
    assert not made.heard(Plan)
    end(made, 1)
    assert made.only(Plan).request == "c2"


def test_what_is_moved_is_in_common_when_it_has_come() -> None:
    made = bed(disaggregated="always")
    made.cluster("prefill", "decode")
    ask(made, 1, 68)
    assert made.reserved() == [71, 69]
    made.submit("c2", PROMPT_TOKENS, block_hashes=chain(2, 68))
    assert not made.heard(Plan), "an engine that reads it twice has it twice"
    made.say("api", Prefilled("api", "c1", 1))
    made.say("api", Started("api", "c1", 1))
    assert made.only(Plan).request == "c2"
    assert made.reserved() == [71 + ALONE, 69]
    end(made, 1)
    end(made, 2)
    assert made.reserved() == [0, 0]


def test_a_lost_worker_takes_what_was_in_common_with_it() -> None:
    made = bed()
    made.cluster("decode")
    ask(made, 1, 68)
    ask(made, 2, 68)
    made.worker("decode-0", incarnation="2")
    assert {plan.request for plan in made.heard(Plan)} == {"c1", "c2"}
    assert made.reserved() == [71 + ALONE]


def test_other_tenants_prompts_are_not_in_common() -> None:
    made = bed()
    made.cluster("decode")
    ask(made, 1, 68)
    other = bytes(byte ^ 0x55 for byte in chain(1, 68))
    made.submit("c2", PROMPT_TOKENS, block_hashes=other, context=CallContext(tenant="t"))
    assert not made.heard(Plan)


def test_in_a_large_cluster_that_is_full_those_that_have_the_beginning_are_asked() -> None:
    made = bed(compared_workers=1)
    made.cluster("decode", "decode")
    ask(made, 1, 68)
    ask(made, 2, 0)
    assert ask(made, 3, 68).decode.worker == made.row("c1").decode
    made.submit("c4", PROMPT_TOKENS, block_hashes=chain(4))
    assert not made.heard(Plan)


# --- who waits for what another call brings -------------------------------------------------------


def test_an_engine_that_computes_prompts_side_by_side_has_them_each() -> None:
    made = bed()
    made.api()
    made.say("w", ready("w", computes_once=False))
    ask(made, 1, 68)
    made.submit("c2", PROMPT_TOKENS, block_hashes=chain(2, 68))
    assert not made.heard(Plan)


def test_a_prompt_that_is_another_ones_beginning_has_a_block_of_its_own() -> None:
    made = bed(disaggregated="always")
    made.cluster("prefill", "decode")
    made.plan("c1", 70 * 16, block_hashes=chain(1, 68) + bytes(16))
    # All but one of its stretches are there; what it adds must fit.
    made.submit("c2", 64 * 16, block_hashes=chain(1, 68)[: 64 * 8])
    assert max(made.reserved()) <= 90


def test_equal_hashes_of_prompts_that_differ_in_length_do_no_harm() -> None:
    made = bed()
    made.cluster("decode")
    for number, blocks in enumerate((33, 40)):
        hashes = chain(1, 68)[: 32 * 8] + bytes(8 * (blocks - 33)) + b"the same"
        made.plan(f"c{number}", blocks * 16 + 1, block_hashes=hashes)
    end(made, 0)
    end(made, 1)
    assert made.reserved() == [0]


def test_a_full_large_cluster_decodes_nothing_on_prefill_workers() -> None:
    made = bed(compared_workers=1, disaggregated="always")
    made.cluster("prefill", "decode")
    ask(made, 1, 68)
    made.submit("c2", PROMPT_TOKENS, block_hashes=chain(2, 68))
    assert not made.heard(Plan)
    made.say("api", Prefilled("api", "c1", 1))
    made.say("api", Started("api", "c1", 1))
    assert made.only(Plan).decode.worker == "decode-1"


def following(**placement: object) -> tuple[Bed, Plan]:
    """A call that waits for what the other one brings: its prompt is computed on a worker that has
    no room for it once more, and the other one that could knows nothing of it."""
    made = bed(policy="pythia", disaggregated="always", **placement)
    made.cluster("prefill", "prefill", "decode")
    first = made.plan("c1", 600, block_hashes=chain(1, 68)[: 37 * 8])
    assert first.prefill is not None
    name = first.prefill.worker
    made.say(name, Beat(name, "1", Load(kv_blocks_used=90)))
    made.submit("c2", 600, block_hashes=chain(1, 68)[: 37 * 8])
    return made, first


def test_a_call_waits_for_what_another_one_brings_and_would_be_computed_again() -> None:
    made, first = following()
    assert not made.heard(Plan)
    assert made.core.counters["calls_followed"] == 1
    assert made.row("c2").phase == "queued"
    made.say("api", Prefilled("api", "c1", 1))
    assert not made.heard(Plan)
    made.say("api", Started("api", "c1", 1))
    second = made.only(Plan)
    assert (second.request, second.decode) == ("c2", first.decode)


def test_nobody_waits_longer_than_computing_it_takes_all() -> None:
    made, _ = following()
    made.wait(1.0, "api", "prefill-0", "prefill-1", "decode-2")
    assert "c2" in {plan.request for plan in made.heard(Plan)}, "600 tokens are soon computed"


def test_without_single_flight_nobody_waits_for_others() -> None:
    made, _ = following(single_flight=False)
    assert made.only(Plan).request == "c2"


def test_who_follows_goes_its_own_way_when_the_other_one_ends() -> None:
    made, _ = following()
    made.say("api", Finished("api", "c1", 1, "abort"))
    assert made.only(Plan).request == "c2"


def test_who_follows_can_end() -> None:
    made, _ = following()
    made.say("api", Finished("api", "c2", 1, "abort"))
    made.say("api", Started("api", "c1", 1))
    end(made, 1)
    assert set(made.reserved()) == {0}

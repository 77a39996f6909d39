"""The simulated engine, behaviour by behaviour, with times computed by hand.

The model and its hardware are such that a step takes 10 ms, 1 ms for each sequence in it, and
10 us for each token of KV that it reads or writes (``step_s`` below).
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, TypeVar

import msgspec
import pytest

from cluster.simulator.engine import STEPS_MAX_S, Engine
from cluster.simulator.engine_types import (
    Ended,
    EngineRequest,
    FirstToken,
    HostLoad,
    Output,
    Pull,
)
from cluster.simulator.host_memory import HostMemory
from cluster.simulator.records import Gaps
from cluster.simulator.setup import EngineOptions
from coordinator.cost import Efficiency, Hardware, ModelShape, StepCost

T = TypeVar("T")
OPTIONS = EngineOptions(
    block_size=4, max_num_seqs=3, max_num_batched_tokens=16, kv_lease_s=5.0, max_model_len=400
)
SHAPE = ModelShape(layers=1, hidden=1, heads=1, kv_heads=1, head_dim=1, ffn=1, vocab=1)
"""4 bytes of KV per token."""
HARDWARE = Hardware(
    name="slow memory", flops_per_s={"bf16": 1e30}, memory_bytes_per_s=4e5, memory_bytes=1e9
)
COST = StepCost(
    SHAPE,
    HARDWARE,
    Efficiency(weights=1e12, kv=1.0, layer_s=0.0, step_s=0.01, sequence_s=0.001),
)


def step_s(*chunks: tuple[int, int], decodes: int = 0, context: int = 0) -> float:
    """What a step takes: each chunk's new tokens and those before it; the decodes' KV."""
    kv = sum(2 * new + before for new, before in chunks) + context + decodes
    return 0.01 + 0.001 * (len(chunks) + decodes) + 1e-5 * kv


class Driven:
    """An engine that is driven from one moment at which it has something to do to the next."""

    def __init__(
        self,
        kv_blocks: int = 101,
        options: EngineOptions = OPTIONS,
        host: HostMemory | None = None,
    ) -> None:
        self.gaps = Gaps()
        self.engine = Engine(COST, options, kv_blocks, self.gaps, host)

    def submit(self, name: str, prompt: int, outputs: int, at_s: float, **fields: Any) -> None:
        text = str(fields.pop("text", name))
        blocks = (prompt + outputs - 1) // OPTIONS.block_size
        whole = EngineRequest(name, chain(text, blocks), prompt, outputs)
        self.engine.submit(msgspec.structs.replace(whole, **fields), at_s)

    def until(self, now_s: float) -> list[Output]:
        """Everything that comes out by ``now_s``, to a rounding."""
        outputs: list[Output] = []
        while (next_s := self.engine.next_s) is not None and next_s <= now_s + 1e-9:
            outputs += self.engine.advance(next_s)
            self.engine.check()
        return outputs

    def used(self, now_s: float) -> int:
        return self.engine.load(now_s).kv_blocks_used


def chain(text: str, blocks: int) -> bytes:
    """``text`` names what is in the blocks: "a5,b" is 5 blocks of a, then b."""
    hashes = [b""]
    for part in text.split(","):
        name, count = part[0], part[1:]
        for number in range(int(count) if count.isdigit() else blocks):
            block = hashes[-1] + f"{name}{number}".encode()
            hashes.append(blake2b(block, digest_size=8).digest())
    return b"".join(hashes[1 : blocks + 1])


def loaded(driven: Driven, outputs: list[Output]) -> list[Output]:
    """What comes once the load that was asked for is over."""
    load = only(outputs, HostLoad)
    driven.engine.advance(load.ready_s)
    driven.engine.pulled(load.id, True, load.ready_s)
    return driven.until(load.ready_s + 9.0)


def only(outputs: list[Output], kind: type[T]) -> T:
    (found,) = (output for output in outputs if isinstance(output, kind))
    return found


def at(outputs: list[Output]) -> list[tuple[str, str, Any]]:
    return [(type(o).__name__, o.id, pytest.approx(o.at_s, abs=1e-12)) for o in outputs]


# --- steps ------------------------------------------------------------------------------


def test_a_prompt_is_computed_then_a_token_per_step() -> None:
    driven = Driven()
    driven.submit("a", 10, 4, at_s=1.0)
    first_s = 1.0 + step_s((10, 0))
    # Contexts of 10, 11 and 12 tokens.
    gaps_s = [step_s(decodes=1, context=context) for context in (10, 11, 12)]
    outputs = driven.until(9.0)
    assert at(outputs) == [("FirstToken", "a", first_s), ("Ended", "a", first_s + sum(gaps_s))]
    assert only(outputs, FirstToken).computed_tokens == 10
    assert not only(outputs, Ended).held
    assert driven.gaps.count == 3
    assert driven.gaps.sum_s == pytest.approx(sum(gaps_s))
    load = driven.engine.load(9.0)
    assert (load.prefill_tokens_total, load.decode_tokens_total) == (10, 4)
    assert (load.running, load.waiting, load.kv_blocks_used) == (0, 0, 0)
    assert driven.engine.next_s is None


def test_steps_of_decodes_alone_are_taken_at_once_and_can_be_looked_into() -> None:
    driven = Driven()
    driven.submit("a", 8, 33, at_s=0.0)
    first_s = step_s((8, 0))
    assert at(driven.until(first_s)) == [("FirstToken", "a", first_s)]
    ends_s = [first_s]
    for context in range(8, 8 + 32):
        ends_s.append(ends_s[-1] + step_s(decodes=1, context=context))
    assert driven.engine.next_s == pytest.approx(ends_s[-1])
    for steps in (1, 5, 31):
        before_s, after_s = ends_s[steps] - 1e-6, ends_s[steps] + 1e-6
        assert driven.engine.generated("a", before_s) == steps
        assert driven.engine.generated("a", after_s) == steps + 1
        assert driven.engine.load(after_s).decode_tokens_total == steps + 1
        # The step under way computes the latest token, and has its block.
        assert driven.used(after_s) == -(-(8 + steps + 1) // 4)


def test_what_comes_waits_for_the_step_under_way() -> None:
    driven = Driven()
    driven.submit("a", 8, 100, at_s=0.0)
    driven.until(step_s((8, 0)))
    second_s = step_s((8, 0)) + step_s(decodes=1, context=8)
    third_s = second_s + step_s(decodes=1, context=9)
    driven.submit("b", 3, 1, at_s=second_s + 0.001)
    assert driven.engine.next_s == pytest.approx(third_s)
    ended = only(driven.until(third_s + 0.02), Ended)
    assert ended.at_s == pytest.approx(third_s + step_s((3, 0), decodes=1, context=10))


def test_long_prompts_are_cut_and_decodes_go_first() -> None:
    driven = Driven()
    driven.submit("a", 4, 20, at_s=0.0)
    now_s = step_s((4, 0))
    assert at(driven.until(now_s)) == [("FirstToken", "a", now_s)]
    driven.submit("b", 40, 1, at_s=0.0)
    now_s += step_s(decodes=1, context=4)
    # 16 tokens per step, one of them for the first sequence.
    now_s += step_s((15, 0), decodes=1, context=5)
    now_s += step_s((15, 15), decodes=1, context=6)
    now_s += step_s((10, 30), decodes=1, context=7)
    outputs = driven.until(now_s)
    assert at(outputs) == [("FirstToken", "b", now_s), ("Ended", "b", now_s)]


def test_seats_are_given_in_order_and_others_wait() -> None:
    driven = Driven()
    for name in "abcd":
        driven.submit(name, 4, 3, at_s=0.0)
    driven.until(0.0)
    load = driven.engine.load(0.0)
    assert (load.running, load.waiting) == (3, 1)
    ends = [o.id for o in driven.until(9.0) if isinstance(o, Ended)]
    assert ends == ["a", "b", "c", "d"]


def test_the_smallest_priority_is_first_if_any_differ() -> None:
    driven = Driven(options=msgspec.structs.replace(OPTIONS, max_num_seqs=1))
    driven.submit("a", 4, 3, at_s=0.0)
    driven.submit("b", 4, 3, at_s=0.0, priority=2)
    driven.submit("c", 4, 3, at_s=0.0, priority=1)
    ends = [o.id for o in driven.until(9.0) if isinstance(o, Ended)]
    assert ends == ["a", "c", "b"]


def test_a_slow_engine_takes_longer_soon() -> None:
    driven = Driven(options=msgspec.structs.replace(OPTIONS, step_overhead_s=0.005))
    driven.engine.slow = 3.0
    driven.submit("a", 8, 300, at_s=0.0)
    first_s = 3.0 * step_s((8, 0)) + 0.005
    assert at(driven.until(first_s)) == [("FirstToken", "a", first_s)]
    driven.engine.slow = 1.0
    next_s = driven.engine.next_s
    assert next_s is not None
    assert STEPS_MAX_S <= next_s - first_s < STEPS_MAX_S + 0.05
    before = driven.engine.generated("a", next_s)
    driven.until(next_s)
    step = 0.005 + step_s(decodes=1, context=8 + before - 1)
    assert driven.engine.generated("a", next_s + step - 1e-6) == before
    assert driven.engine.generated("a", next_s + step + 1e-6) == before + 1


def test_generation_ends_at_the_model_length() -> None:
    driven = Driven(options=msgspec.structs.replace(OPTIONS, max_model_len=12))
    driven.submit("a", 10, 50, at_s=0.0)
    driven.until(9.0)
    assert driven.engine.load(9.0).decode_tokens_total == 2


@pytest.mark.parametrize(("prompt", "outputs"), [(400, 1), (0, 3), (10, 0), (390, 9)])
def test_what_could_never_run_is_refused(prompt: int, outputs: int) -> None:
    driven = Driven(kv_blocks=99)
    with pytest.raises(ValueError, match="engine"):
        driven.engine.submit(EngineRequest("a", b"", prompt, outputs), 0.0)
    assert driven.engine.next_s is None


def test_more_seats_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        Driven(options=msgspec.structs.replace(OPTIONS, max_num_seqs=17))


# --- the prefix cache -------------------------------------------------------------------


def cached(driven: Driven, name: str, prompt: int, text: str, at_s: float, **more: Any) -> int:
    """Tokens found for a prompt that is computed alone."""
    driven.submit(name, prompt, 1, at_s=at_s, text=text, **more)
    return only(driven.until(at_s + 1.0), FirstToken).local_cached_tokens


def test_full_blocks_are_found_but_never_the_whole_prompt() -> None:
    driven = Driven()
    assert cached(driven, "1", 12, "a", 0.0) == 0
    assert cached(driven, "2", 12, "a", 1.0) == 8
    assert cached(driven, "3", 13, "a", 2.0) == 12
    assert cached(driven, "4", 11, "a", 3.0) == 8
    assert cached(driven, "5", 16, "a1,b", 4.0) == 4
    assert cached(driven, "6", 16, "b", 5.0) == 0


def test_what_was_generated_is_found_too() -> None:
    driven = Driven()
    driven.submit("1", 8, 9, at_s=0.0, text="a")
    driven.until(1.0)
    # The last of 17 tokens was never an input, so 16 have KV.
    assert cached(driven, "2", 30, "a", 2.0) == 16


def test_a_block_is_found_as_soon_as_it_is_scheduled() -> None:
    driven = Driven()
    driven.submit("1", 9, 1, at_s=0.0, text="a")
    driven.submit("2", 13, 1, at_s=0.0, text="a")
    outputs = driven.until(9.0)
    assert {o.local_cached_tokens for o in outputs if isinstance(o, FirstToken)} == {0, 8}
    # In the same step: 9 tokens of one, 5 of the other.
    both_s = pytest.approx(step_s((9, 0), (5, 8)))
    assert [output.at_s for output in outputs] == [both_s] * 4


def test_a_request_that_may_not_be_cached_is_not() -> None:
    driven = Driven()
    assert cached(driven, "1", 13, "a", 0.0, cached=False) == 0
    assert cached(driven, "2", 13, "a", 1.0) == 0
    assert cached(driven, "3", 13, "a", 2.0, cached=False) == 0


def test_the_longest_unused_is_evicted_first_its_end_before_its_start() -> None:
    # Three prompts of three blocks, and a block that was never used.
    driven = Driven(kv_blocks=11)
    for number, text in enumerate("abc"):
        assert cached(driven, text, 12, text, float(number)) == 0
    # The third block of a, which holds the last token, is computed and kept a second time, in
    # the block that was never used. That leaves the first copy of it as the longest unused.
    assert cached(driven, "4", 12, "a", 3.0) == 8
    # That one goes, and the third block of b.
    assert cached(driven, "5", 7, "d", 4.0) == 0
    assert cached(driven, "6", 13, "b", 5.0) == 8
    # Its new blocks took the one that d left without a hash, and the third of c.
    assert cached(driven, "7", 13, "a", 6.0) == 12
    assert cached(driven, "8", 9, "c", 7.0) == 8


def test_what_is_generated_can_let_in_who_waits_for_room() -> None:
    driven = Driven(kv_blocks=11)
    driven.submit("a", 5, 24, at_s=0.0, text="a")
    first_s = step_s((5, 0))
    driven.until(first_s)
    # It needs all 10 blocks. One of them is full, 8 are free: one too few.
    driven.submit("b", 40, 1, at_s=first_s, text="a")
    second_s = first_s + step_s(decodes=1, context=5)
    driven.until(second_s)
    assert driven.engine.load(second_s).waiting == 1
    # The third step fills the second block, which both can use then.
    third_s = second_s + step_s(decodes=1, context=6)
    driven.until(third_s)
    assert driven.engine.load(third_s).waiting == 0
    found = {o.id: o.local_cached_tokens for o in driven.until(9.0) if isinstance(o, FirstToken)}
    assert found == {"b": 8}


def test_steps_take_their_blocks_when_they_begin() -> None:
    # 3 blocks of a text that is no longer used, 1 that is held, 2 for what decodes.
    driven = Driven(kv_blocks=7)
    assert cached(driven, "1", 12, "a", 0.0) == 0
    driven.submit("held", 2, 1, at_s=1.0, hold=True)
    driven.submit("2", 5, 7, at_s=1.0, text="b")
    both_s = 1.0 + step_s((2, 0), (5, 0))
    driven.until(both_s)
    # The step for its 9th token takes a third block, which is the third one of a.
    ends_s = both_s + sum(step_s(decodes=1, context=5 + i) for i in range(4))
    driven.engine.release("held", ends_s - 0.001)
    driven.until(2.0)
    assert driven.used(2.0) == 0
    assert cached(driven, "3", 13, "a", 3.0) == 8


def test_equal_blocks_are_kept_side_by_side() -> None:
    driven = Driven(kv_blocks=101)
    driven.submit("1", 12, 5, at_s=0.0, text="a")
    driven.until(0.5)
    for number in range(3, 6):
        # The last block is computed anew each time, and cached each time.
        assert cached(driven, str(number), 12, "a", float(number)) == 8
    driven.engine.check()
    assert cached(driven, "6", 13, "a", 9.0) == 12


# --- running out of blocks --------------------------------------------------------------


def test_the_last_one_is_preempted_and_computed_again() -> None:
    # 9 blocks for two sequences that grow to 7 each.
    driven = Driven(kv_blocks=10)
    driven.submit("a", 8, 20, at_s=0.0)
    driven.submit("b", 8, 20, at_s=0.0)
    both_s = step_s((8, 0), (8, 0))
    # Blocks hold 16 tokens of the one; the 17th needs a fifth each, of 9: 8 steps, then b goes.
    now_s = both_s + sum(step_s(decodes=2, context=16 + 2 * i) for i in range(8))
    outputs = driven.until(now_s)
    assert at(outputs) == [("FirstToken", "a", both_s), ("FirstToken", "b", both_s)]
    assert driven.engine.preemptions == 1
    load = driven.engine.load(now_s)
    assert (load.running, load.waiting, load.preemptions_total) == (1, 1, 1)
    # The other one's blocks are free; it goes on when the first has ended.
    a_ends_s = now_s + sum(step_s(decodes=1, context=16 + i) for i in range(11))
    outputs = driven.until(a_ends_s)
    assert at(outputs) == [("Ended", "a", a_ends_s)]
    assert driven.engine.generated("b", a_ends_s) == 9
    # 17 tokens; of 4 blocks that it had filled, some are still cached.
    outputs = driven.until(9.0)
    ended = only(outputs, Ended)
    assert ended.recomputed_tokens == 17 - 4 * 2
    assert driven.gaps.count == 2 * 19
    assert driven.gaps.sum_s == pytest.approx(a_ends_s + ended.at_s - 2 * both_s)


def test_a_whole_prompt_must_fit_before_its_first_part_is_admitted() -> None:
    driven = Driven(kv_blocks=11)
    driven.submit("a", 16, 10, at_s=0.0)
    driven.submit("b", 32, 1, at_s=0.0)
    outputs = driven.until(9.0)
    assert [o.id for o in outputs if isinstance(o, Ended)] == ["a", "b"]
    assert driven.engine.preemptions == 0
    a_ends_s, b_ends_s = (o.at_s for o in outputs if isinstance(o, Ended))
    assert b_ends_s == pytest.approx(a_ends_s + step_s((16, 0)) + step_s((16, 16)))


def test_by_priority_the_least_important_is_preempted() -> None:
    driven = Driven(kv_blocks=10)
    driven.submit("a", 8, 20, at_s=0.0, priority=1)
    driven.submit("b", 8, 20, at_s=0.0)
    ends = [o.id for o in driven.until(9.0) if isinstance(o, Ended)]
    assert driven.engine.preemptions > 0
    assert ends == ["b", "a"]


def test_who_runs_behind_one_that_preempts_itself_misses_a_step() -> None:
    driven = Driven(kv_blocks=10)
    driven.submit("c", 3, 8, at_s=0.0)
    driven.submit("a", 6, 8, at_s=0.0, priority=1)
    driven.until(0.0)
    driven.submit("b", 7, 7, at_s=0.001)
    first_s = step_s((3, 0), (6, 0))
    second_s = first_s + step_s((7, 0), decodes=2, context=9)
    now_s = second_s + sum(step_s(decodes=3, context=18 + 3 * i) for i in range(5))
    # All 9 blocks are taken, and a needs another. It is the least important itself.
    driven.until(now_s)
    assert driven.engine.preemptions == 1
    c_ends_s = now_s + step_s(decodes=1, context=9)
    assert at(driven.until(c_ends_s)) == [("Ended", "c", c_ends_s)]
    assert driven.engine.generated("b", c_ends_s) == 6
    # All but one token of a is in the cache.
    ends_s = c_ends_s + step_s((1, 12), decodes=1, context=12)
    assert at(driven.until(ends_s)) == [("Ended", "b", ends_s), ("Ended", "a", ends_s)]
    assert driven.gaps.count == 7 + 7 + 6
    gaps_s = c_ends_s + 2 * ends_s - 2 * first_s - second_s
    assert driven.gaps.sum_s == pytest.approx(gaps_s)


# --- holding ----------------------------------------------------------------------------


def test_what_is_held_ends_with_its_first_token_and_stays_until_released() -> None:
    driven = Driven()
    driven.submit("a", 10, 7, at_s=0.0, hold=True)
    outputs = driven.until(1.0)
    ended = only(outputs, Ended)
    assert ended == Ended("a", ended.at_s, True, ended.at_s + OPTIONS.kv_lease_s)
    assert ended.at_s == pytest.approx(step_s((10, 0)))
    assert driven.engine.holds("a", 1.0)
    assert (driven.used(1.0), driven.engine.load(1.0).running) == (3, 0)
    driven.engine.release("a", 1.0)
    assert not driven.engine.holds("a", 1.0)
    assert driven.used(1.0) == 0
    driven.engine.release("a", 2.0)
    driven.engine.check()


def test_a_lease_ends_by_itself() -> None:
    driven = Driven()
    driven.submit("a", 10, 1, at_s=0.0, hold=True)
    expires_s = only(driven.until(1.0), Ended).expires_s
    assert driven.engine.holds("a", expires_s - 1e-6)
    assert not driven.engine.holds("a", expires_s)
    assert driven.used(expires_s + 1e-6) == 0


def test_the_end_of_a_lease_lets_in_who_waits_for_room() -> None:
    driven = Driven(kv_blocks=11)
    driven.submit("a", 28, 1, at_s=0.0, hold=True)
    expires_s = only(driven.until(1.0), Ended).expires_s
    driven.submit("b", 16, 1, at_s=1.0)
    assert driven.until(expires_s - 1e-6) == []
    assert driven.engine.next_s == expires_s
    ended = only(driven.until(9.0), Ended)
    assert ended.at_s == pytest.approx(expires_s + step_s((16, 0)))


# --- pulling ----------------------------------------------------------------------------


def test_kv_that_is_pulled_is_not_computed() -> None:
    driven = Driven()
    driven.submit("a", 10, 2, at_s=0.0, pull_tokens=10)
    assert driven.until(1.0) == [Pull("a", 0.0, 10)]
    load = driven.engine.load(1.0)
    assert (load.running, load.waiting, load.kv_blocks_used) == (0, 1, 3)
    assert driven.engine.next_s is None
    driven.engine.pulled("a", ok=True, now_s=2.0)
    outputs = driven.until(9.0)
    # The last token of the prompt is computed: the next one is sampled from it.
    first_s = 2.0 + step_s((1, 9))
    ended_s = first_s + step_s(decodes=1, context=10)
    assert at(outputs) == [("FirstToken", "a", first_s), ("Ended", "a", ended_s)]
    assert only(outputs, FirstToken) == FirstToken("a", outputs[0].at_s, 0, 10, 0)
    assert driven.engine.load(9.0).external_tokens_total == 10
    assert cached(driven, "b", 9, "a", 9.0) == 8


def test_only_what_the_cache_lacks_is_pulled_and_the_rest_is_computed() -> None:
    driven = Driven()
    cached(driven, "1", 9, "a", 0.0)
    driven.submit("2", 30, 1, at_s=1.0, text="a", pull_tokens=20)
    assert driven.until(1.0) == [Pull("2", 1.0, 12)]
    driven.engine.pulled("2", ok=True, now_s=2.0)
    outputs = driven.until(9.0)
    assert at(outputs)[0] == ("FirstToken", "2", 2.0 + step_s((10, 20)))
    assert only(outputs, FirstToken) == FirstToken("2", outputs[0].at_s, 8, 12, 10)


@pytest.mark.parametrize(("same", "local"), [(17, 16), (9, 8), (3, 0)])
def test_of_what_is_cached_only_one_token_is_computed_and_all_is_held(
    same: int, local: int
) -> None:
    driven = Driven()
    cached(driven, "1", same, "a", 0.0)
    driven.submit("2", 17, 1, at_s=1.0, text="a", hold=True, cached_only=True)
    outputs = driven.until(1.0 + step_s((1, local)))
    assert only(outputs, FirstToken) == FirstToken("2", outputs[0].at_s, local, 0, 1)
    assert only(outputs, Ended).held
    assert driven.used(1.5) == local // OPTIONS.block_size + 1
    driven.engine.release("2", 2.0)
    assert driven.used(2.0) == 0


def test_nothing_is_pulled_if_all_is_here() -> None:
    driven = Driven()
    cached(driven, "1", 17, "a", 0.0)
    driven.submit("2", 17, 1, at_s=1.0, text="a", pull_tokens=16)
    first = only(driven.until(9.0), FirstToken)
    assert (first.local_cached_tokens, first.moved_tokens, first.computed_tokens) == (16, 0, 1)


def test_kv_that_does_not_come_is_computed_here() -> None:
    driven = Driven()
    cached(driven, "1", 9, "a", 0.0)
    driven.submit("2", 16, 1, at_s=1.0, text="a", pull_tokens=16)
    assert driven.until(1.0) == [Pull("2", 1.0, 8)]
    driven.engine.pulled("2", ok=False, now_s=2.0)
    outputs = driven.until(9.0)
    assert only(outputs, FirstToken) == FirstToken("2", outputs[0].at_s, 8, 0, 8)
    assert outputs[0].at_s == pytest.approx(2.0 + step_s((8, 8)))


def test_pulls_need_no_seat_but_room() -> None:
    driven = Driven(kv_blocks=11)
    for name in "abcdef":
        driven.submit(name, 8, 1, at_s=0.0, pull_tokens=8)
    pulls = [output.id for output in driven.until(0.0)]
    assert pulls == ["a", "b", "c", "d", "e"]
    driven.engine.pulled("c", ok=True, now_s=1.0)
    outputs = driven.until(2.0)
    assert [type(output) for output in outputs] == [FirstToken, Ended, Pull]
    assert outputs[-1].id == "f"


# --- giving up --------------------------------------------------------------------------


def test_a_request_can_be_aborted_anywhere() -> None:
    driven = Driven()
    driven.submit("pulling", 8, 9, at_s=0.0, pull_tokens=8)
    driven.submit("decoding", 4, 99, at_s=0.0)
    driven.submit("prefilling", 40, 9, at_s=0.0)
    driven.submit("waiting", 4, 9, at_s=0.0)
    # The prefill is under way for its second part.
    now_s = step_s((4, 0), (12, 0)) + 0.001
    assert [output.id for output in driven.until(now_s)] == ["pulling", "decoding"]
    for name in ("pulling", "decoding", "prefilling", "waiting", "never seen"):
        driven.engine.abort(name, now_s)
        driven.engine.check()
        assert driven.engine.generated(name, now_s) == 0
    # Who is in the step under way leaves when it is over, without its token.
    assert driven.engine.next_s == pytest.approx(
        now_s - 0.001 + step_s((15, 12), decodes=1, context=4)
    )
    assert driven.until(9.0) == []
    load = driven.engine.load(9.0)
    assert (load.running, load.waiting, load.kv_blocks_used) == (0, 0, 0)
    assert load.decode_tokens_total == 1
    driven.engine.pulled("pulling", ok=True, now_s=9.0)
    assert driven.until(10.0) == []


def test_an_abort_in_the_middle_of_many_steps_ends_them_with_the_one_under_way() -> None:
    driven = Driven()
    driven.submit("a", 8, 100, at_s=0.0)
    driven.submit("b", 8, 100, at_s=0.0)
    first_s = step_s((8, 0), (8, 0))
    driven.until(first_s)
    ends_s = [first_s]
    for step in range(4):
        ends_s.append(ends_s[-1] + step_s(decodes=2, context=16 + 2 * step))
    driven.engine.abort("a", ends_s[3] - 0.001)
    assert driven.engine.next_s == pytest.approx(ends_s[3])
    driven.until(ends_s[3])
    # Two steps gave a token to both, the third only to the one that is left.
    assert driven.gaps.count == 2 + 2 + 1
    assert driven.engine.generated("b", ends_s[3]) == 4
    driven.engine.check()


# --- gaps -------------------------------------------------------------------------------


def test_gaps_are_counted_exactly_and_told_to_half_a_bin() -> None:
    gaps = Gaps()
    gaps.add(0.010, 98)
    gaps.add(0.5)
    gaps.add(2.0)
    assert gaps.mean_s == pytest.approx((0.98 + 2.5) / 100)
    assert gaps.quantile(0.5) == pytest.approx(0.010, rel=0.025)
    assert gaps.quantile(0.98) == pytest.approx(0.010, rel=0.025)
    assert gaps.quantile(0.99) == pytest.approx(0.5, rel=0.025)
    assert gaps.quantile(1.0) == pytest.approx(2.0, rel=0.025)


def test_growing_gaps_are_those_one_by_one() -> None:
    together, single = Gaps(), Gaps()
    together.add_growing(0.01, 0.0001, 500, 3)
    for step in range(500):
        single.add(0.01 + 0.0001 * step, 3)
    assert together.counts == single.counts
    assert together.count == single.count
    assert together.sum_s == pytest.approx(single.sum_s)
    twice = Gaps()
    twice.merge(together)
    twice.merge(single)
    assert twice.count == 2 * together.count
    assert twice.quantile(0.5) == together.quantile(0.5)
    assert twice.mean_s == pytest.approx(0.01 + 0.0001 * 249.5)


# --- the host's memory --------------------------------------------------------------------


def test_what_was_evicted_is_loaded_from_the_host() -> None:
    driven = Driven(kv_blocks=11, host=HostMemory(100, 0.25))
    driven.submit("a", 24, 1, at_s=0.0)
    driven.submit("b", 36, 1, at_s=2.0)
    assert not [o for o in driven.until(5.0) if isinstance(o, HostLoad)]
    assert driven.engine.pool.cached_of(chain("a", 6)) == 1
    driven.submit("again", 25, 2, at_s=5.0, text="a")
    asked = driven.until(5.0)
    # One block is in the cache, and the last token is computed in any case.
    assert only(asked, HostLoad) == HostLoad("again", 5.0, 5.0 + 5 * 0.25)
    first = only(loaded(driven, asked), FirstToken)
    assert first.at_s == pytest.approx(6.25 + step_s((1, 24)))
    assert (first.local_cached_tokens, first.moved_tokens, first.computed_tokens) == (24, 0, 1)
    assert driven.used(20.0) == 0


def test_loads_come_one_after_the_other_and_others_are_computed_meanwhile() -> None:
    driven = Driven(kv_blocks=41, host=HostMemory(100, 1.0))
    for name in "ab":
        driven.submit(name, 40, 1, at_s=0.0)
    driven.until(3.0)
    driven.submit("large", 157, 1, at_s=3.0)
    driven.until(6.0)
    for name in "ab":
        driven.submit(f"{name}2", 33, 1, at_s=6.0, text=name)
    driven.submit("c", 5, 1, at_s=6.0)
    outputs = driven.until(7.0)
    ready = {o.id: o.ready_s for o in outputs if isinstance(o, HostLoad)}
    assert ready == {"a2": 14.0, "b2": 22.0}
    assert [o.id for o in outputs if isinstance(o, FirstToken)] == ["c"]


def test_the_host_forgets_what_was_used_longest_ago_the_ends_first() -> None:
    host = HostMemory(8, 0.1)
    driven = Driven(kv_blocks=11, host=host)
    for number, name in enumerate("abc"):
        driven.submit(name, 16, 1, at_s=float(number))
    driven.until(9.0)
    assert [host.pool.cached_of(chain(name, 4)) for name in "abc"] == [0, 4, 4]
    host.store(chain("d", 2))
    assert [host.pool.cached_of(chain(name, 4)) for name in "bcd"] == [2, 4, 2]
    host.store(chain("e", 20))
    assert host.pool.cached_of(chain("e", 20)) == 8


def test_what_is_read_from_elsewhere_is_not_loaded_but_kept() -> None:
    host = HostMemory(100, 0.1)
    driven = Driven(kv_blocks=11, host=host)
    host.store(chain("a", 6))
    driven.submit("a", 25, 1, at_s=0.0, pull_tokens=25)
    outputs = driven.until(0.0)
    assert only(outputs, Pull).tokens == 25
    driven.engine.pulled("a", True, 1.0)
    assert only(driven.until(3.0), FirstToken).moved_tokens == 25
    # Of a prompt of which only the cached part is wanted nothing is loaded either.
    driven.submit("b", 36, 1, at_s=4.0)
    driven.until(6.0)
    driven.submit("c", 25, 1, at_s=6.0, text="a", cached_only=True, hold=True)
    assert not [o for o in driven.until(6.0) if isinstance(o, HostLoad)]


def test_an_aborted_load_leaves_nothing() -> None:
    host = HostMemory(100, 1.0)
    driven = Driven(kv_blocks=11, host=host)
    host.store(chain("a", 6))
    driven.submit("a", 25, 1, at_s=0.0)
    assert only(driven.until(0.0), HostLoad).ready_s == 6.0
    driven.engine.abort("a", 1.0)
    driven.engine.pulled("a", True, 6.0)
    driven.until(9.0)
    assert driven.used(9.0) == 0

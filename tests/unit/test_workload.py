"""The common form: chains of block hashes, what goes on from what, replay, changes."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from cluster.workload.chains import Chains
from cluster.workload.change import (
    Bursty,
    ClosedLoop,
    Poisson,
    Recorded,
    limited,
    mixed,
    of_tenant,
    scaled,
    with_arrivals,
    with_pace,
    with_samples,
)
from cluster.workload.form import Call, Run, Workload, WorkloadError, context_of
from cluster.workload.lineage import linked
from cluster.workload.measure import cached
from cluster.workload.quantiles import PROBABILITIES, fitted
from cluster.workload.replay import Due, Replay
from cluster.workload.spans import SeenBlocks, Spans, after, cut, merged, shared, total
from coordinator.blocks import hash_blocks
from coordinator.protocol import BLOCK_HASH_BYTES
from coordinator.tenant import tenant_of


def call(
    index: int = 0,
    prompt_tokens: int = 64,
    output_tokens: int = 8,
    blocks: Spans = (),
    parents: tuple[int, ...] = (),
    think_s: float = 0.0,
    continued: Spans = (),
    kind: str = "",
) -> Call:
    return Call(
        index, parents, think_s, prompt_tokens, output_tokens, blocks, kind, kind, "", continued
    )


def run_of(*calls: Call, name: str = "r", scope: str = "s", arrival_s: float = 0.0) -> Run:
    return Run(name, "flow", arrival_s, scope, calls)


def workload_of(*runs: Run, block_tokens: int = 64, arrivals_known: bool = False) -> Workload:
    return Workload("w", "tests", "none", block_tokens, runs, arrivals_known)


def ids(spans: Spans) -> list[int]:
    return [first + offset for first, count in spans for offset in range(count)]


def split(chain: bytes) -> list[bytes]:
    return [chain[at : at + BLOCK_HASH_BYTES] for at in range(0, len(chain), BLOCK_HASH_BYTES)]


def leading(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items both begin with."""
    count = 0
    for item, other_item in zip(one, other, strict=False):
        if item != other_item:
            break
        count += 1
    return count


raw_spans = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), max_size=6)


# --- spans ------------------------------------------------------------------------


@given(raw_spans)
def test_merged_keeps_the_ids_and_there_is_one_way_to_write_them(
    raw: list[tuple[int, int]],
) -> None:
    spans = merged(raw)
    assert ids(spans) == ids(tuple(raw))
    assert merged((block, 1) for block in ids(spans)) == spans
    assert all(count > 0 for _, count in spans)


@given(raw_spans, raw_spans, st.integers(0, 40))
def test_cutting_and_sharing_are_those_of_the_ids(
    raw: list[tuple[int, int]], other_raw: list[tuple[int, int]], blocks: int
) -> None:
    spans, other = merged(raw), merged(other_raw)
    assert ids(cut(spans, blocks)) == ids(spans)[:blocks]
    assert ids(after(spans, blocks)) == ids(spans)[blocks:]
    assert shared(spans, other) == leading(ids(spans), ids(other))
    assert total(spans) == len(ids(spans))


@given(st.lists(raw_spans, max_size=6), raw_spans)
@example([[(5, 2)], [(3, 2)]], [(3, 4)])
@example([[(3, 2)], [(5, 2)]], [(3, 4)])
def test_seen_blocks_are_a_set_of_ids(seen: list[list[tuple[int, int]]], raw: list) -> None:
    blocks, model = SeenBlocks(), set()
    for spans in seen:
        blocks.add(merged(spans))
        model |= set(ids(merged(spans)))
    wanted = ids(merged(raw))
    expected = next((at for at, block in enumerate(wanted) if block not in model), len(wanted))
    assert blocks.leading(merged(raw)) == expected


# --- chains -----------------------------------------------------------------------


@st.composite
def calls_of_a_run(draw: st.DrawFn) -> tuple[int, Run]:
    """Calls whose prompts begin alike, and diverge, and have tails and outputs."""
    block_tokens = draw(st.sampled_from([1, 4, 6, 8]))
    calls: list[Call] = []
    for index in range(draw(st.integers(2, 4))):
        base = draw(st.sampled_from([(), *(ids(c.blocks + c.continued) for c in calls)]))
        kept = draw(st.integers(0, len(base)))
        grown = draw(raw_spans)
        blocks = merged([*((block, 1) for block in base[:kept]), *grown])
        known = draw(st.integers(0, total(blocks)))
        tail = draw(st.integers(0, block_tokens - 1))
        tokens = max(1, known * block_tokens + tail)
        calls.append(
            call(
                index,
                tokens,
                draw(st.integers(1, 30)),
                cut(blocks, tokens // block_tokens),
                continued=after(blocks, tokens // block_tokens),
            )
        )
    return block_tokens, run_of(*calls)


def tokens_of(run: Run, one: Call, block_tokens: int, wanted: int) -> list[object]:
    """The truth: what every token is, as far as the workload says, one by one."""
    known: list[object] = [
        (block, offset)
        for block in ids(one.blocks + one.continued)
        for offset in range(block_tokens)
    ]
    own: list[object] = [(run.id, one.index, at) for at in range(wanted)]
    return (known + own[len(known) :])[:wanted]


@settings(max_examples=300)
@given(calls_of_a_run(), st.sampled_from([1, 2, 3, 4, 5, 8, 16, 32]))
def test_two_calls_share_exactly_the_engine_blocks_that_their_shared_tokens_fill(
    drawn: tuple[int, Run], engine_block: int
) -> None:
    block_tokens, run = drawn
    chains = Chains(block_tokens, engine_block)
    prompts = [(chains.prompt(run, one), one, one.prompt_tokens, "prompt") for one in run.calls]
    whole = [
        (chains.computed(run, one), one, one.prompt_tokens + one.output_tokens - 1, "computed")
        for one in run.calls
    ]
    seen = [
        (split(chain), tokens_of(run, one, block_tokens, count))
        for chain, one, count, _ in [*prompts, *whole]
    ]
    for hashes, tokens in seen:
        assert len(hashes) == len(tokens) // engine_block
        for other_hashes, other_tokens in seen:
            same = leading(tokens, other_tokens)
            assert leading(hashes, other_hashes) == same // engine_block
            # A hash stands for all before it: nothing is shared behind a difference.
            rest = same // engine_block
            assert not set(hashes[rest:]) & set(other_hashes[rest:])


@given(calls_of_a_run(), st.sampled_from([2, 4, 16]))
def test_chains_do_not_depend_on_what_was_asked_before(
    drawn: tuple[int, Run], engine_block: int
) -> None:
    block_tokens, run = drawn
    kept = Chains(block_tokens, engine_block)
    for one in (*run.calls, *reversed(run.calls)):
        fresh = Chains(block_tokens, engine_block)
        assert kept.prompt(run, one) == fresh.prompt(run, one)
        assert kept.computed(run, one)[: len(kept.prompt(run, one))] == kept.prompt(run, one)
    kept.forget(run.id)
    assert kept.prompt(run, run.calls[0]) == Chains(block_tokens, engine_block).prompt(
        run, run.calls[0]
    )


def test_scopes_keep_equal_ids_apart_and_share_them() -> None:
    chains = Chains(64, 16)
    one = call(blocks=((7, 1),))
    here, there = run_of(one, name="a", scope="x"), run_of(one, name="b", scope="y")
    also_here = run_of(one, name="c", scope="x")
    assert chains.prompt(here, one) == chains.prompt(also_here, one)
    assert not set(split(chains.prompt(here, one))) & set(split(chains.prompt(there, one)))


def test_chains_look_like_those_of_real_prompts() -> None:
    chain = Chains(64, 16).prompt(run_of(), call(prompt_tokens=1000, blocks=((5, 15),)))
    assert len(chain) == len(hash_blocks(range(1000), 16))
    assert len(set(split(chain))) == 62


def test_a_long_prompt_costs_little() -> None:
    calls = [call(index, 100_000 + 64 * index, blocks=((1, 1562 + index),)) for index in range(200)]
    run, chains = run_of(*calls), Chains(64, 16)
    chains.prompt(run, calls[0])
    begun_s = time.perf_counter()
    for one in calls:
        chains.prompt(run, one)
    # A hundred times what it takes where nothing else runs would still be below.
    assert (time.perf_counter() - begun_s) / len(calls) < 0.001


# --- lineage ----------------------------------------------------------------------


def test_the_next_prompt_says_which_blocks_the_output_fills() -> None:
    first = call(0, 130, 100, ((0, 2),))
    second = call(1, 400, 10, ((0, 6),), parents=(0,))
    run = linked([run_of(first, second)], 64)[0]
    # Tokens 130 to 229 are in blocks 2 and 3; block 3 ends behind the output, and counts.
    assert run.calls[0].continued == ((2, 2),)
    assert run.calls[1].continued == ()
    assert [one.final for one in run.calls] == [False, True]
    chains = Chains(64, 16)
    computed, next_prompt = chains.computed(run, run.calls[0]), chains.prompt(run, run.calls[1])
    assert leading(split(computed), split(next_prompt)) == (130 + 99) // 16


@pytest.mark.parametrize(
    "second",
    [
        call(1, 400, 10, ((0, 1), (50, 5)), parents=(0,)),  # its second block is another
        call(1, 200, 10, ((0, 3),), parents=(0,)),  # too short for prompt and output
        call(1, 400, 10, ((0, 6),)),  # began at the same time
    ],
)
def test_who_does_not_go_on_credits_nothing(second: Call) -> None:
    first = call(0, 130, 100, ((0, 2),))
    assert linked([run_of(first, second)], 64)[0].calls[0].continued == ()


def test_a_shortened_history_is_not_taken_for_the_output_by_a_later_call() -> None:
    first = call(0, 130, 100, ((0, 2),))
    shortened = call(1, 200, 10, ((0, 3),), parents=(0,))
    third = call(2, 400, 10, ((0, 6),), parents=(1,))
    run = linked([run_of(first, shortened, third)], 64)[0]
    assert run.calls[0].continued == ()
    assert run.calls[1].continued == ((3, 1),)


def test_calls_go_on_across_runs_of_one_scope_only() -> None:
    first, second = call(0, 130, 100, ((0, 2),)), call(0, 400, 10, ((0, 6),))
    together = linked([run_of(first, name="a"), run_of(second, name="b")], 64)
    apart = linked([run_of(first, name="a"), run_of(second, name="b", scope="t")], 64)
    assert together[0].calls[0].continued == ((2, 2),)
    assert apart[0].calls[0].continued == ()


def test_an_id_that_occurs_twice_in_a_prompt_does_no_harm() -> None:
    first = call(0, 64, 10, ((3, 1),))
    odd = call(1, 64 * 4, 10, ((3, 2), (3, 2)), parents=(0,))
    assert linked([run_of(first, odd)], 64)[0].calls[0].continued == ((4, 1),)


def test_no_call_is_final_where_two_end_at_will() -> None:
    run = linked([run_of(call(0), call(1, parents=(0,)), call(2, parents=(0,)))], 64)[0]
    assert not any(one.final for one in run.calls)


def test_an_infinite_cache_holds_prompts_and_whole_blocks_of_outputs() -> None:
    first = call(0, 130, 100, ((0, 2),))
    second = call(1, 400, 10, ((0, 6),), parents=(0,))
    workload = workload_of(*linked([run_of(first, second)], 64))
    # Blocks 0, 1 (prompt) and 2 (tokens 128 to 191); block 3 is not full with 230 tokens.
    assert [entry.cached_tokens for entry in cached(workload)] == [0, 192]


def test_a_call_says_who_speaks() -> None:
    run = linked([run_of(call(0, kind="planner"), call(1, kind="coder", parents=(0,)))], 64)[0]
    context = context_of(run, run.calls[1])
    assert (context.workflow, context.run) == ("flow", "r")
    assert (context.agent, context.parent, context.final) == ("coder", "planner", True)
    assert context_of(run, run.calls[0]).parent == ""


# --- replay -----------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> Workload:
    runs = []
    for number in range(draw(st.integers(1, 5))):
        calls = []
        for index in range(draw(st.integers(1, 6))):
            wanted = draw(st.sets(st.integers(0, max(0, index - 1)), max_size=3)) if index else ()
            think_s = draw(st.integers(0, 5))
            calls.append(call(index, parents=tuple(sorted(wanted)), think_s=float(think_s)))
        runs.append(run_of(*calls, name=str(number), arrival_s=float(draw(st.integers(0, 9)))))
    return workload_of(*runs, arrivals_known=True)


def play(workload: Workload, rng: random.Random) -> dict[tuple[int, int], tuple[float, float]]:
    """Replays with random durations; when each call was due and when it ended."""
    replay = Replay(workload)
    going: list[tuple[float, int, int]] = []
    times: dict[tuple[int, int], tuple[float, float]] = {}
    announced: set[Due] = set()
    while replay.calls_left:
        nearest = [end_s for end_s, _, _ in going]
        if replay.next_s is not None:
            nearest.append(replay.next_s)
        now_s = min(nearest)
        for due in replay.due(now_s):
            assert due.at_s == now_s
            assert (due.run, due.call) not in times
            times[due.run, due.call] = (now_s, now_s + rng.randint(0, 4))
            going.append((times[due.run, due.call][1], due.run, due.call))
        for entry in sorted(entry for entry in going if entry[0] <= now_s):
            going.remove(entry)
            scheduled = replay.ended(entry[1], entry[2], now_s)
            assert not announced & set(scheduled)
            announced |= set(scheduled)
    assert replay.next_s is None
    return times


@given(graphs(), st.integers(0, 99))
def test_calls_are_due_when_their_parents_ended_and_the_pause_is_over(
    workload: Workload, seed: int
) -> None:
    times = play(workload, random.Random(seed))
    assert len(times) == sum(len(run.calls) for run in workload.runs)
    for position, run in enumerate(workload.runs):
        for one in run.calls:
            ends_s = [times[position, parent][1] for parent in one.parents]
            since_s = max(ends_s) if ends_s else run.arrival_s
            assert times[position, one.index][0] == since_s + one.think_s


@given(graphs(), st.integers(1, 3), st.integers(0, 99))
def test_a_closed_loop_keeps_as_many_runs_going_as_asked(
    workload: Workload, runs: int, seed: int
) -> None:
    closed = with_arrivals(workload, ClosedLoop(runs), random.Random(0))
    times = play(closed, random.Random(seed))
    lives = []
    for position, run in enumerate(closed.runs):
        mine = [times[position, one.index] for one in run.calls]
        begun_s = min(times[position, o.index][0] - o.think_s for o in run.calls if not o.parents)
        lives.append((begun_s, max(end_s for _, end_s in mine)))
    assert [begun_s for begun_s, _ in lives[:runs]] == [0.0] * min(runs, len(lives))
    ends_s = sorted(end_s for _, end_s in lives)
    for number, (begun_s, _) in enumerate(lives[runs:]):
        assert begun_s == ends_s[number]


def test_an_abandoned_run_sends_nothing_more_and_lets_the_next_one_begin() -> None:
    chain = (call(0), call(1, parents=(0,)))
    workload = replace(
        workload_of(run_of(*chain, name="a"), run_of(*chain, name="b")), concurrency=1
    )
    replay = Replay(workload)
    assert replay.due(0.0) == [Due(0.0, 0, 0)]
    assert replay.abandoned(0, 5.0) == [Due(5.0, 1, 0)]
    assert replay.ended(0, 0, 6.0) == []
    assert replay.abandoned(0, 6.0) == []
    assert replay.due(6.0) == [Due(5.0, 1, 0)]
    assert replay.calls_left == 2


# --- changes ----------------------------------------------------------------------


def test_scaled_prompts_share_the_same_blocks_of_smaller_size() -> None:
    first = call(0, 6400 + 63, 160, ((0, 100),))
    second = call(1, 6400 + 640, 8, ((0, 110),), parents=(0,))
    small = scaled(workload_of(*linked([run_of(first, second)], 64)), 16)
    one, two = small.runs[0].calls
    assert small.block_tokens == 4
    assert (one.prompt_tokens, one.output_tokens, two.output_tokens) == (403, 10, 1)
    assert (total(one.blocks), total(two.blocks)) == (100, 110)
    chains = Chains(4, 16)
    both = [split(chains.prompt(small.runs[0], each)) for each in (one, two)]
    # 403 tokens of the first prompt are all in the second.
    assert leading(*both) == 403 // 16


def test_scaling_by_what_does_not_divide_blocks_is_refused() -> None:
    with pytest.raises(WorkloadError, match="scale: 10 does not divide"):
        scaled(workload_of(run_of(call())), 10)


def test_limits_leave_out_runs_that_do_not_fit_and_count_them() -> None:
    long = run_of(call(0, 10), call(1, 999, parents=(0,)), name="long")
    short = [run_of(call(0, 10), name=f"short-{number}") for number in range(3)]
    workload = workload_of(long, *short)
    fitting = limited(workload, runs=2, prompt_tokens_max=100)
    assert [run.id for run in fitting.runs] == ["short-0", "short-1"]
    assert fitting.dropped_runs == 2
    cut_short = limited(workload, calls_per_run=1, prompt_tokens_max=100)
    assert [len(run.calls) for run in cut_short.runs] == [1, 1, 1, 1]
    assert cut_short.runs[0].calls[0].final
    with pytest.raises(WorkloadError, match="calls per run"):
        limited(workload, calls_per_run=0)


@pytest.mark.parametrize(("arrivals", "variation"), [(Poisson(2.0), 1.0), (Bursty(2.0, 3.0), 3.0)])
def test_arrivals_have_their_rate_and_their_bursts(
    arrivals: Poisson | Bursty, variation: float
) -> None:
    workload = workload_of(*[run_of(call(), name=str(number)) for number in range(4000)])
    arrived = with_arrivals(workload, arrivals, random.Random(3))
    times_s = [run.arrival_s for run in arrived.runs]
    gaps_s = [after_s - before_s for before_s, after_s in pairwise([0.0, *times_s])]
    mean_s = sum(gaps_s) / len(gaps_s)
    spread_s = (sum((gap_s - mean_s) ** 2 for gap_s in gaps_s) / len(gaps_s)) ** 0.5
    assert mean_s == pytest.approx(0.5, rel=0.15)
    assert spread_s / mean_s == pytest.approx(variation, rel=0.15)
    assert arrived.arrivals_known
    again = with_arrivals(workload, arrivals, random.Random(3))
    assert again == arrived


def test_recorded_arrivals_are_refused_where_there_are_none() -> None:
    with pytest.raises(WorkloadError, match="no recorded arrivals"):
        with_arrivals(workload_of(run_of(call())), Recorded(), random.Random(0))
    known = workload_of(run_of(call(), arrival_s=8.0), arrivals_known=True)
    faster = with_arrivals(known, Recorded(speed=4.0), random.Random(0))
    assert faster.runs[0].arrival_s == 2.0
    with pytest.raises(WorkloadError, match="rate"):
        with_arrivals(known, Poisson(0.0), random.Random(0))


def test_pace_shortens_pauses_and_arrivals() -> None:
    workload = workload_of(run_of(call(0), call(1, think_s=6.0, parents=(0,)), arrival_s=9.0))
    faster = with_pace(workload, 3.0)
    assert faster.runs[0].arrival_s == 3.0
    assert faster.runs[0].calls[1].think_s == 2.0


def test_runs_can_be_a_tenants_who_is_known_by_the_digest_of_a_salt() -> None:
    workload = of_tenant(workload_of(run_of(call(0))), "acme")
    run = workload.runs[0]
    assert context_of(run, run.calls[0]).tenant == tenant_of("acme")


@pytest.mark.parametrize("together", [True, False])
def test_calls_are_asked_for_several_answers_and_what_follows_waits_for_all(
    together: bool,
) -> None:
    before = run_of(call(0, 128, 64, ((0, 2),)), call(1, 256, parents=(0,), blocks=((0, 4),)))
    run = with_samples(workload_of(before), 3, together=together).runs[0]
    assert [one.index for one in run.calls] == list(range(6))
    assert [one.parents for one in run.calls] == [()] * 3 + [(0, 1, 2)] * 3
    groups = [one.group for one in run.calls]
    assert len(set(groups)) == (2 if together else 1)
    assert groups[0] == groups[2] != "" if together else not any(groups)
    # One of them is what goes on; and nobody of several ends the run alone.
    assert sum(bool(one.continued) for one in run.calls[:3]) == 1
    assert not any(one.final for one in run.calls)


def test_mixed_workloads_share_no_blocks_and_are_in_order() -> None:
    fine = workload_of(run_of(call(0, 128, 8, ((0, 2),)), arrival_s=5.0), block_tokens=64)
    coarse = workload_of(run_of(call(0, 1024, 8, ((0, 2),)), arrival_s=1.0), block_tokens=512)
    mix = mixed([fine, coarse])
    assert mix.block_tokens == 64
    assert [run.id for run in mix.runs] == ["w-2/r", "w-1/r"]
    assert [total(run.calls[0].blocks) for run in mix.runs] == [16, 2]
    chains = Chains(64, 64)
    one, two = (set(split(chains.prompt(run, run.calls[0]))) for run in mix.runs)
    assert not one & two
    # Nothing else changes: the coarse run's chain is as long as its prompt says.
    assert len(one) == 16


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_quantiles_stay_within_their_samples_and_rise(samples: list[float], at: float) -> None:
    table = fitted(samples)
    assert min(samples) - 0.01 <= table.at(at) <= max(samples) + 0.01
    values = [table.at(probability) for probability in PROBABILITIES]
    assert values == sorted(values)
    assert values == pytest.approx(list(table.values))

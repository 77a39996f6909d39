"""Token ids for a workload's prompts: shared where the workload says so, and nowhere else."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from cluster.simulator.prompts import Prompts
from cluster.workload.chains import Chains
from cluster.workload.change import scaled
from cluster.workload.form import Call, Run, Workload
from cluster.workload.generators import GENERATORS, Options, generated
from cluster.workload.habits import load_habits
from cluster.workload.spans import Spans
from coordinator.blocks import hash_blocks
from coordinator.protocol import BLOCK_HASH_BYTES

FIRST, LAST = 100, 2099
BLOCK = 8


def call(
    index: int, prompt_tokens: int, output_tokens: int, blocks: Spans, continued: Spans = ()
) -> Call:
    return Call(index, (), 0.0, prompt_tokens, output_tokens, blocks, continued=continued)


def run_of(*calls: Call, name: str = "r", scope: str = "s") -> Run:
    return Run(name, "flow", 0.0, scope, calls)


def prompts(salt: str = "") -> Prompts:
    return Prompts(BLOCK, FIRST, LAST, salt)


def test_equal_blocks_are_equal_tokens_and_others_are_not() -> None:
    one, other = call(0, 20, 1, ((0, 2),)), call(1, 24, 1, ((0, 1), (7, 2)))
    run = run_of(one, other)
    made = prompts()
    tokens, other_tokens = made.prompt(run, one), made.prompt(run, other)
    assert (len(tokens), len(other_tokens)) == (20, 24)
    assert set(tokens) | set(other_tokens) <= set(range(FIRST, LAST + 1))
    assert tokens[:BLOCK] == other_tokens[:BLOCK]
    assert tokens[BLOCK : 2 * BLOCK] != other_tokens[BLOCK : 2 * BLOCK]


def test_only_calls_of_one_scope_share_blocks() -> None:
    one = call(0, 16, 1, ((0, 2),))
    made = prompts()
    here = made.prompt(run_of(one), one)
    assert here == made.prompt(run_of(one, name="another run"), one)
    assert here[:BLOCK] != made.prompt(run_of(one, scope="elsewhere"), one)[:BLOCK]


def test_another_salt_makes_other_prompts_and_the_same_one_the_same() -> None:
    one = call(0, 20, 1, ((0, 2),))
    run = run_of(one)
    assert prompts("a").prompt(run, one) == prompts("a").prompt(run, one)
    assert prompts("a").prompt(run, one)[:BLOCK] != prompts("b").prompt(run, one)[:BLOCK]


def test_the_tail_of_a_prompt_that_nobody_extends_is_its_own() -> None:
    one, other = call(0, 20, 4, ((0, 2),)), call(1, 20, 4, ((0, 2),))
    run = run_of(one, other)
    made = prompts()
    tokens, other_tokens = made.prompt(run, one), made.prompt(run, other)
    assert tokens[:16] == other_tokens[:16]
    assert tokens[16:] != other_tokens[16:]


def test_a_prompt_that_extends_a_call_contains_what_it_really_said() -> None:
    # 20 prompt tokens, 10 of output: they end in the fourth block.
    parent = call(0, 20, 10, ((0, 2),), continued=((2, 2),))
    child = call(1, 40, 1, ((0, 5),))
    run = run_of(parent, child)
    made = prompts()
    before = made.prompt(run, parent)
    said = list(range(5000, 5010))
    made.generated(run, parent, said)
    after = made.prompt(run, child)
    assert after[:30] == before + said
    assert set(after[30:]) <= set(range(FIRST, LAST + 1))
    assert made.unknown_outputs == 0


def test_what_a_prompt_has_shown_is_not_changed_by_an_output_that_comes_later() -> None:
    parent = call(0, 20, 10, ((0, 2),), continued=((2, 2),))
    child = call(1, 28, 1, ((0, 3),))
    run = run_of(parent, child)
    made = prompts()
    early = made.prompt(run, child)
    made.prompt(run, parent)
    made.generated(run, parent, list(range(5000, 5010)))
    assert made.prompt(run, child) == early
    # The child's third block was sent before; its last, partial one is its own.
    assert made.unknown_outputs == 4


@pytest.mark.parametrize("generator", sorted(GENERATORS))
@pytest.mark.parametrize("engine_block_tokens", [8, 32])
def test_engines_find_in_their_caches_what_the_workload_says(
    generator: str, engine_block_tokens: int
) -> None:
    """Hashes of the real tokens are shared as the simulator's chains are: between prompts,
    and between a prompt and what earlier calls have left in a cache."""
    workload = made_small(generator)
    chains = Chains(workload.block_tokens, engine_block_tokens)
    made = Prompts(workload.block_tokens, FIRST, LAST)
    rng = random.Random(1)
    seen: list[tuple[bytes, bytes]] = []
    for run in workload.runs:
        for one in run.calls:
            prompt = made.prompt(run, one)
            output = [rng.randrange(LAST + 1, 10_000) for _ in range(one.output_tokens)]
            made.generated(run, one, output)
            seen.append((hash_blocks(prompt, engine_block_tokens), chains.prompt(run, one)))
            computed = hash_blocks(prompt + output[:-1], engine_block_tokens)
            seen.append((computed, chains.computed(run, one)))
    assert made.unknown_outputs == 0
    for (tokens, chain), (other_tokens, other_chain) in combinations(seen, 2):
        assert len(tokens) == len(chain)
        assert shared_blocks(tokens, other_tokens) == shared_blocks(chain, other_chain)


def made_small(generator: str) -> Workload:
    options = Options(runs=2, calls=6, width=2, rounds=2, stages=3)
    return scaled(generated(generator, load_habits(), options, random.Random(5)), 8)


def shared_blocks(one: bytes, other: bytes) -> int:
    count = 0
    size = BLOCK_HASH_BYTES
    while (
        count * size < min(len(one), len(other))
        and one[count * size : (count + 1) * size] == other[count * size : (count + 1) * size]
    ):
        count += 1
    return count

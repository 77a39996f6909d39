"""The chain of block hashes names prefixes, and nothing else."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from coordinator.blocks import hash_blocks
from coordinator.protocol import BLOCK_HASH_BYTES

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=70)
BLOCK = 16


def split(hashes: bytes) -> list[bytes]:
    return [hashes[at : at + BLOCK_HASH_BYTES] for at in range(0, len(hashes), BLOCK_HASH_BYTES)]


@given(TOKENS, st.integers(1, 20))
def test_one_hash_per_full_block(tokens: list[int], block_size: int) -> None:
    hashes = hash_blocks(tokens, block_size)
    assert len(hashes) == len(tokens) // block_size * BLOCK_HASH_BYTES
    assert hashes == hash_blocks(tuple(tokens), block_size), "the same every time"


@given(TOKENS, TOKENS)
def test_a_longer_prompt_begins_with_the_hashes_of_the_shorter(
    head: list[int], tail: list[int]
) -> None:
    shorter, longer = hash_blocks(head, BLOCK), hash_blocks([*head, *tail], BLOCK)
    assert longer.startswith(shorter)


@given(TOKENS, TOKENS)
def test_equal_hashes_mean_equal_prefixes(one: list[int], other: list[int]) -> None:
    pairs = zip(split(hash_blocks(one, BLOCK)), split(hash_blocks(other, BLOCK)), strict=False)
    for index, (first, second) in enumerate(pairs):
        end = (index + 1) * BLOCK
        assert (first == second) == (one[:end] == other[:end])


def test_a_change_shows_in_its_block_and_in_all_behind_it() -> None:
    tokens = list(range(5 * BLOCK))
    changed = [*tokens]
    changed[2 * BLOCK] += 1
    before, after = split(hash_blocks(tokens, BLOCK)), split(hash_blocks(changed, BLOCK))
    assert [one == other for one, other in zip(before, after, strict=True)] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_the_same_block_in_another_place_is_another_one() -> None:
    hashes = split(hash_blocks([7] * (4 * BLOCK), BLOCK))
    assert len(set(hashes)) == 4


@given(TOKENS, st.text(), st.text())
def test_salts_separate(tokens: list[int], one: str, other: str) -> None:
    first, second = hash_blocks(tokens, BLOCK, one), hash_blocks(tokens, BLOCK, other)
    if one == other:
        assert first == second
    else:
        assert not set(split(first)) & set(split(second))


def test_a_long_prompt_is_hashed_at_once() -> None:
    """No bound is asserted; pytest shows the time of slow tests."""
    tokens = list(range(131_072))
    started_s = time.perf_counter()
    hashes = hash_blocks(tokens, BLOCK)
    print(f"131,072 tokens in {time.perf_counter() - started_s:.4f} s")
    assert len(split(hashes)) == 8192

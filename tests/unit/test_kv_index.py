"""The index of KV blocks: prefixes, bounds, corrections."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.kv_index import KvIndex


def chain(*blocks: int) -> bytes:
    return b"".join(block.to_bytes(8, "little") for block in blocks)


def index_of(**capacities: int) -> KvIndex:
    index = KvIndex()
    for worker, capacity_blocks in capacities.items():
        index.add(worker, capacity_blocks)
    return index


def test_longest_prefix_tells_each_worker_apart() -> None:
    index = index_of(a=9, b=9, c=9)
    index.stored("a", chain(1, 2, 3))
    index.stored("b", chain(1, 2))
    index.stored("c", chain(2, 3))
    assert index.longest_prefix(chain(1, 2, 3, 4)) == {"a": 3, "b": 2}
    assert index.longest_prefix(chain(9)) == {}
    assert index.longest_prefix(b"") == {}


def test_a_prefix_ends_at_the_first_hole() -> None:
    index = index_of(a=9)
    index.stored("a", chain(1, 2, 3))
    index.removed("a", chain(2))
    assert index.longest_prefix(chain(1, 2, 3)) == {"a": 1}


def test_the_oldest_blocks_go_first_and_the_end_of_a_chain_before_its_beginning() -> None:
    index = index_of(a=4)
    index.stored("a", chain(1, 2, 3))
    index.stored("a", chain(7, 8))
    assert index.longest_prefix(chain(1, 2, 3)) == {"a": 2}
    assert index.longest_prefix(chain(7, 8)) == {"a": 2}
    index.stored("a", chain(1))
    index.stored("a", chain(9, 10))
    assert index.longest_prefix(chain(1, 2)) == {"a": 1}
    assert index.blocks("a") == 4


def test_a_chain_longer_than_the_worker_keeps_its_beginning() -> None:
    index = index_of(a=2)
    index.stored("a", chain(1, 2, 3, 4))
    assert index.longest_prefix(chain(1, 2, 3, 4)) == {"a": 2}


def test_a_forgotten_worker_holds_nothing_and_its_place_is_used_again() -> None:
    index = index_of(a=9, b=9)
    index.stored("a", chain(1, 2))
    index.stored("b", chain(1))
    index.forget("a")
    assert index.longest_prefix(chain(1, 2)) == {"b": 1}
    index.add("c", 9)
    assert index.longest_prefix(chain(1, 2)) == {"b": 1}
    index.stored("c", chain(1, 2))
    assert index.longest_prefix(chain(1, 2)) == {"b": 1, "c": 2}
    index.check()


def test_unknown_workers_are_ignored() -> None:
    index = index_of()
    index.stored("a", chain(1))
    index.removed("a", chain(1))
    index.forget("a")
    assert index.longest_prefix(chain(1)) == {}
    assert index.blocks("a") == 0


def test_half_a_hash_is_an_error() -> None:
    with pytest.raises(ValueError, match="block hashes"):
        index_of(a=1).stored("a", b"1234567")


WORKERS = "abc"
chains = st.lists(st.integers(0, 6), max_size=5)
steps = st.lists(
    st.tuples(st.sampled_from(["stored", "removed", "forget"]), st.sampled_from(WORKERS), chains),
    max_size=30,
)


@given(steps, chains)
def test_agrees_with_plain_sets(steps: list[tuple[str, str, list[int]]], asked: list[int]) -> None:
    index = index_of(**dict.fromkeys(WORKERS, 1000))
    plain: dict[str, set[int]] = {worker: set() for worker in WORKERS}
    for what, worker, blocks in steps:
        if what == "stored":
            index.stored(worker, chain(*blocks))
            plain[worker] |= set(blocks)
        elif what == "removed":
            index.removed(worker, chain(*blocks))
            plain[worker] -= set(blocks)
        else:
            index.forget(worker)
            index.add(worker, 1000)
            plain[worker] = set()
        index.check()
    expected = {}
    for worker, held in plain.items():
        count = 0
        while count < len(asked) and asked[count] in held:
            count += 1
        if count:
            expected[worker] = count
    assert index.longest_prefix(chain(*asked)) == expected

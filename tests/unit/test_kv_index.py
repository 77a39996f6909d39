"""The index of KV blocks: prefixes, bounds, corrections."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
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
    index.stored("c", chain(7, 8))
    assert index.longest_prefix(chain(1, 2, 3, 4)) == {"a": 3, "b": 2}
    assert index.longest_prefix(chain(9)) == {}
    assert index.longest_prefix(b"") == {}


def test_a_prefix_ends_at_the_first_hole() -> None:
    index = index_of(a=9)
    index.stored("a", chain(1, 2, 3))
    index.removed("a", chain(1, 2), 1)
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


class Blocks:
    """What the index must agree with: every block for itself, in the order of use."""

    def __init__(self, capacity_blocks: int) -> None:
        self.capacity_blocks = capacity_blocks
        self.held: dict[int, None] = {}

    def stored(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            self.held.pop(block, None)
            self.held[block] = None
        while len(self.held) > self.capacity_blocks:
            del self.held[next(iter(self.held))]

    def removed(self, blocks: Sequence[int], kept_blocks: int) -> None:
        gone = blocks[kept_blocks:]
        for block in list(self.held):
            # What goes on from it has its name with some turns more.
            if any(block >> turns in gone for turns in range(block.bit_length())):
                del self.held[block]

    def prefix(self, blocks: Sequence[int]) -> int:
        count = 0
        while count < len(blocks) and blocks[count] in self.held:
            count += 1
        return count


WORKERS = "abc"
# Where a chain goes on two ways: short ones share much, long ones little.
turns = st.lists(st.integers(0, 1), max_size=9)
steps = st.lists(
    st.tuples(
        st.sampled_from(["stored", "stored", "stored", "removed", "forget", "chill"]),
        st.sampled_from(WORKERS),
        turns,
        st.integers(0, 9),
    ),
    max_size=40,
)


def blocks_of(turns: Sequence[int]) -> list[int]:
    """A block per turn, named by all turns so far, as hashes in a chain are."""
    names, name = [], 1
    for turn in turns:
        name = 2 * name + turn
        names.append(name)
    return names


def check_some(some: dict[str, int], everything: dict[str, int], most: int) -> None:
    """What is told of a few is true, and whoever is left out holds no more than those told of
    whom nobody asked about."""
    assert some.items() <= everything.items()
    assert ("b" in some) == ("b" in everything)
    unasked = some.keys() - {"b"}
    assert len(some) <= most + 1
    left_out = [everything[name] for name in everything.keys() - some.keys()]
    assert max(left_out, default=0) <= min((some[name] for name in unasked), default=10**9)


@settings(max_examples=300)
@given(st.sampled_from([1, 3, 12, 1000]), steps, st.lists(turns, max_size=4))
def test_agrees_with_single_blocks(
    capacity_blocks: int, steps: list[tuple[str, str, list[int], int]], asked: list[list[int]]
) -> None:
    index = index_of(**dict.fromkeys(WORKERS, capacity_blocks))
    plain = {worker: Blocks(capacity_blocks) for worker in WORKERS}
    for what, worker, way, kept_blocks in steps:
        blocks = blocks_of(way)
        if what == "stored":
            index.stored(worker, chain(*blocks))
            plain[worker].stored(blocks)
        elif what == "removed":
            index.removed(worker, chain(*blocks), kept_blocks)
            plain[worker].removed(blocks, kept_blocks)
        elif what == "chill":
            index.chill(worker, chain(*blocks), len(blocks) + kept_blocks)
            if capacity_blocks < 1000:
                # What is dead is forgotten first: which is not known here.
                index.forget(worker)
                index.add(worker, capacity_blocks)
                plain[worker] = Blocks(capacity_blocks)
        else:
            index.forget(worker)
            index.add(worker, capacity_blocks)
            plain[worker] = Blocks(capacity_blocks)
        index.check()
        for prompt in (way, *asked):
            blocks = blocks_of(prompt)
            found = {name: held.prefix(blocks) for name, held in plain.items()}
            found = {name: count for name, count in found.items() if count}
            assert index.longest_prefix(chain(*blocks)) == found
            for most in range(len(WORKERS) + 1):
                check_some(index.longest_prefix(chain(*blocks), most, "b"), found, most)
    for worker, held in plain.items():
        assert index.blocks(worker) == len(held.held)


anything = st.lists(st.integers(0, 3), max_size=6)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["stored", "removed", "chill"]), st.sampled_from(WORKERS), anything
        ),
        max_size=30,
    ),
    anything,
)
def test_what_is_no_chain_breaks_nothing(
    steps: list[tuple[str, str, list[int]]], asked: list[int]
) -> None:
    index = index_of(**dict.fromkeys(WORKERS, 5))
    for what, worker, blocks in steps:
        if what == "stored":
            index.stored(worker, chain(*blocks))
        elif what == "chill":
            index.chill(worker, chain(*blocks), len(blocks) + 1)
        else:
            index.removed(worker, chain(*blocks))
        index.check()
        assert all(0 < held <= len(asked) for held in index.longest_prefix(chain(*asked)).values())


def test_prompts_that_grow_cost_a_run_and_not_one_each() -> None:
    """A session's prompts, on the worker that computes and on the one that decodes."""
    index = index_of(a=10_000, b=10_000)
    blocks = list(range(1, 3001))
    for end in range(10, 3001, 10):
        index.stored("a", chain(*blocks[:end]))
        index.stored("b", chain(*blocks[:end]))
    assert len(index._runs) == 1
    assert index.longest_prefix(chain(*blocks)) == {"a": 3000, "b": 3000}
    index.check()


def test_a_few_of_many_holders_are_those_that_hold_the_most() -> None:
    names = [f"w{number:02}" for number in range(40)]
    index = index_of(**dict.fromkeys(names, 100))
    for number, name in enumerate(names):
        index.stored(name, chain(*range(1, 10), 100 + number // 4))
    ours = chain(*range(1, 10), 103)
    assert index.longest_prefix(ours, 8) == dict.fromkeys(["w12", "w13", "w14", "w15"], 10)
    asked = index.longest_prefix(ours, 8, ["w00", "w13", "nobody"])
    assert asked == dict.fromkeys(["w12", "w13", "w14", "w15"], 10) | {"w00": 9}
    assert index.longest_prefix(chain(*range(1, 10)), 8) == {}
    assert len(index.longest_prefix(chain(*range(1, 10)), 40)) == 40


def test_room_is_what_can_be_stored_before_anything_is_forgotten() -> None:
    index = index_of(a=4)
    index.stored("a", chain(1, 2, 3))
    assert (index.room("a"), index.room("nobody")) == (1, 0)
    index.stored("a", chain(4, 5))
    assert index.room("a") == 0


# --- what nobody will ask for ------------------------------------------------------------


def test_what_is_dead_is_room_and_is_forgotten_first() -> None:
    index = index_of(a=10)
    index.stored("a", chain(1, 2, 3, 4))
    index.stored("a", chain(11, 12, 13, 14))
    index.chill("a", chain(11, 12, 13), 4)
    assert index.room("a") == 10 - 4
    index.stored("a", chain(21, 22, 23, 24))
    index.check()
    assert index.longest_prefix(chain(1, 2, 3, 4)) == {"a": 4}
    assert index.longest_prefix(chain(11, 12, 13, 14)) == {"a": 2}
    assert index.room("a") == 2


def test_what_others_go_on_from_is_not_dead() -> None:
    index = index_of(a=20, b=20)
    index.stored("a", chain(1, 2, 3))
    index.stored("a", chain(1, 2, 5))
    index.chill("a", chain(1, 2, 3), 3)
    assert index.room("a") == 20 - 3
    index.chill("a", chain(1, 2, 5), 3)
    assert index.room("a") == 20
    # The next call goes on from it: it has it all, and its beginning with it.
    index.stored("a", chain(1, 2, 3, 4, 5, 6))
    assert index.room("a") == 20 - 7 + 1
    index.chill("a", chain(1, 2, 3), 4)
    assert index.room("a") == 20 - 7 + 1
    index.check()


def test_a_copy_that_was_left_behind_is_dead_where_it_is() -> None:
    index = index_of(a=20, b=20)
    index.stored("a", chain(1, 2, 3, 4))
    index.stored("b", chain(1, 2, 3, 4, 5, 6))
    index.chill("a", chain(1, 2, 3), 4)
    assert (index.room("a"), index.room("b")) == (20, 14)
    assert index.longest_prefix(chain(1, 2, 3, 4)) == {"a": 4, "b": 4}
    index.stored("a", chain(1, 2))
    assert index.room("a") == 18
    index.check()


def test_an_answer_that_the_next_prompt_leaves_out_is_dead() -> None:
    index = index_of(a=20)
    index.stored("a", chain(1, 2, 3, 4))
    index.stored("a", chain(1, 2, 15, 16))
    index.chill("a", chain(1, 2), 4)
    assert index.room("a") == 20 - 6
    index.chill("a", chain(1, 2), 4, chain(1, 2, 15, 16))
    assert index.room("a") == 20 - 4
    index.check()


def test_what_is_asked_for_after_all_is_not_dead_any_more() -> None:
    index = index_of(a=20)
    index.stored("a", chain(1, 2, 3, 4))
    index.chill("a", chain(1, 2), 4)
    assert index.room("a") == 20
    index.stored("a", chain(1, 2, 3))
    assert index.room("a") == 17
    index.removed("a", chain(1, 2, 3, 4), 2)
    assert index.room("a") == 18
    index.check()
    index.chill("nobody", chain(1), 1)

"""Pins change the order of eviction and nothing else: in the simulated engine, and in vLLM's own
block pool. Whoever needs blocks gets them, and nothing is held in the end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.simulator.engine import Engine
from cluster.simulator.records import Gaps
from coordinator.protocol import Pin, Retain
from tests.properties.test_simulated_engine import (
    COST,
    KV_BLOCKS,
    OPTIONS,
    Arrival,
    arrivals,
    requests,
)

names = st.lists(st.integers(0, 14).map(lambda number: f"r{number}"), max_size=3)
pins = st.builds(
    Pin,
    name=st.integers(0, 14).map(lambda number: f"r{number}"),
    hold_s=st.sampled_from([0.001, 0.1, 5.0]),
    worth=st.floats(0.0, 10.0),
    age_s=st.sampled_from([0.0, 3.0]),
)
orders = st.builds(
    Retain,
    incarnation=st.just("1"),
    pins=st.lists(pins, max_size=3),
    released=names,
    unneeded=names,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(arrivals, min_size=1, max_size=15), st.lists(orders, max_size=15), st.booleans())
def test_an_engine_with_pins_serves_all_that_one_without_serves(
    plan: list[Arrival], told: list[Retain], priorities: bool
) -> None:
    made = requests(plan, priorities)
    ended: set[str] = set()
    engine = Engine(COST, OPTIONS, KV_BLOCKS, Gaps())
    now_s = 0.0

    def advance(until_s: float) -> None:
        nonlocal now_s
        while (next_s := engine.next_s) is not None and next_s <= until_s:
            now_s = max(now_s, next_s)
            for output in engine.advance(now_s):
                if type(output).__name__ == "Pull":
                    engine.pulled(output.id, True, now_s)
                elif type(output).__name__ == "Ended":
                    ended.add(output.id)
                    if engine.holds(output.id, now_s):
                        engine.release(output.id, now_s)
            engine.check()
        now_s = max(now_s, until_s)

    for number, (at_s, request) in enumerate(made):
        advance(at_s)
        engine.submit(request, now_s)
        if number < len(told):
            engine.retain(told[number], now_s)
            engine.check()
    advance(now_s + 1000.0)
    for order in told:
        engine.retain(order, now_s)
        engine.check()
    assert ended == {request.id for _, request in made}
    load = engine.load(now_s)
    assert load.kv_blocks_used == 0
    assert load.kv_blocks_pinned <= KV_BLOCKS - 1
    advance(now_s + 100.0)
    load = engine.load(now_s + 100.0)
    assert (load.kv_blocks_used, load.kv_blocks_pinned) == (0, 0)
    engine.check()


# --- vLLM's own pool --------------------------------------------------------------------

pytest.importorskip("vllm")

from vllm.v1.core.block_pool import BlockPool  # noqa: E402
from vllm.v1.core.kv_cache_utils import (  # noqa: E402
    BlockHash,
    make_block_hash_with_group_id,
)

from transfer.pins import Pins, order_in, order_params  # noqa: E402

POOL_BLOCKS = 40


class Requests:
    """What a scheduler does to the pool, request by request."""

    def __init__(self) -> None:
        self.pool = BlockPool(POOL_BLOCKS, True, 16)
        self.pins = Pins(self.pool)
        self.now_s = 0.0

    def run(self, name: str, hashes: list[BlockHash]) -> int:
        """A request comes, computes what is not cached, and is over; how much was cached."""
        self.pins.make_room(len(hashes), self.now_s)
        found = []
        for block_hash in hashes:
            cached = self.pool.get_cached_block(block_hash, [0])
            if cached is None:
                break
            found += cached
        self.pool.touch(found)
        new = self.pool.get_new_blocks(len(hashes) - len(found))
        for block_hash, block in zip(hashes[len(found) :], new, strict=True):
            key = make_block_hash_with_group_id(block_hash, 0)
            self.pool._insert_block_hash(key, block, num_tokens=16)
        self.pins.ended(name, hashes)
        self.pool.free_blocks(reversed([*found, *new]))
        return len(found)


def text(name: str, blocks: int) -> list[BlockHash]:
    return [BlockHash(f"{name}/{number}".encode()) for number in range(blocks)]


def test_what_is_pinned_survives_what_would_have_evicted_it() -> None:
    for pinned in (False, True):
        world = Requests()
        assert world.run("kept", text("kept", 10)) == 0
        if pinned:
            world.pins.ordered(Retain("1", [Pin("kept", 60.0, 1.0)]), world.now_s)
            assert world.pins.only_pinned == 10
        for number in range(8):
            world.run(f"other-{number}", text(f"other-{number}", 20))
        assert world.run("again", text("kept", 10)) == (10 if pinned else 0)


def test_a_request_that_needs_the_room_gets_it_from_what_is_worth_least() -> None:
    world = Requests()
    for name, worth in (("dear", 5.0), ("cheap", 1.0), ("old", 5.0)):
        world.run(name, text(name, 10))
        age_s = 100.0 if name == "old" else 0.0
        world.pins.ordered(Retain("1", [Pin(name, 60.0, worth, age_s)]), world.now_s)
    assert world.pins.only_pinned == 30
    world.run("large", text("large", 28))
    assert world.pins.only_pinned == 10
    assert world.run("again", text("dear", 10)) == 10
    world.run("all", text("all", POOL_BLOCKS - 1))
    assert len(world.pins) == 0


def test_what_is_unneeded_is_evicted_first_but_for_what_others_began_with() -> None:
    world = Requests()
    shared = text("shared", 5)
    world.run("first", shared + text("first", 5))
    world.run("second", shared + text("second", 5))
    world.run("third", text("third", 10))
    world.pins.ordered(Retain("1", unneeded=["second"]), world.now_s)
    # 14 blocks were never used; the first of those that were are the unneeded ones.
    world.run("large", text("large", 19))
    assert world.run("again", shared + text("first", 5)) == 10
    assert world.run("others", text("third", 10)) == 10
    assert world.run("gone", text("second", 5)) == 0


def test_pins_end_by_themselves_and_orders_survive_the_wire() -> None:
    world = Requests()
    world.run("kept", text("kept", 10))
    order = Retain("1", [Pin("kept", 5.0, 1.0, 2.0)], ["a"], ["b"])
    assert order_in(order_params(order)) == order
    assert order_in({}) is None
    for nonsense in (b"\xff", "text", 5, b"\x80"):
        with pytest.raises(ValueError, match="no order"):
            order_in({"pythia_retain": nonsense})
    world.pins.ordered(order, 0.0)
    world.pins.expire(4.9)
    assert world.pins.only_pinned == 10
    world.pins.expire(5.0)
    assert world.pins.only_pinned == 0
    assert world.pool.get_num_free_blocks() == POOL_BLOCKS - 1


def test_no_more_is_remembered_than_there_is_room_for() -> None:
    world = Requests()
    for number in range(1000):
        world.pins.ended(f"nothing-{number}", [])
        world.pins.ended(f"some-{number}", text(f"{number}", 10))
    assert world.pins.remembered == 2 * POOL_BLOCKS // 10


works = st.tuples(st.sampled_from("abcd"), st.integers(1, 12), st.sampled_from("abcd"))
steps = st.lists(st.one_of(works, orders), max_size=40)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_vllms_pool_is_whole_whatever_is_pinned(plan: list[object]) -> None:
    world = Requests()
    for number, step in enumerate(plan):
        if isinstance(step, Retain):
            world.pins.ordered(step, world.now_s)
        else:
            assert isinstance(step, tuple)
            head, blocks, tail = step
            world.run(f"r{number % 15}", text(head, blocks) + text(f"{head}{blocks}{tail}", 3))
        world.now_s += 0.05
        world.pins.expire(world.now_s)
        free = world.pool.get_num_free_blocks()
        assert free + world.pins.only_pinned == POOL_BLOCKS - 1
        queued = world.pool.free_block_queue.get_all_free_blocks()
        assert len(queued) == free
        assert all(block.ref_cnt == 0 for block in queued)
    world.pins.expire(world.now_s + 10.0)
    assert world.pool.get_num_free_blocks() == POOL_BLOCKS - 1

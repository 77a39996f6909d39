"""What simulated workers say of their engines' caches."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.simulator.cache_news import CHAINS_REMEMBERED, CacheNews
from cluster.simulator.host_memory import HostMemory
from cluster.simulator.kv_cache import BlockPool, Holding
from coordinator.kv_index import KvIndex
from coordinator.protocol import BLOCK_HASH_BYTES, KV_CHAINS_MAX, KvChanges, KvRemoved


def chain(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(8, "little") for number in numbers)


def said(sequence: int, *chains: int, reset: bool = False) -> KvChanges:
    return KvChanges("w", "1", sequence, [chain(number) for number in chains], reset=reset)


def all_of(chain: bytes) -> int:
    """Everything is cached."""
    return len(chain) // BLOCK_HASH_BYTES


def test_a_sequence_is_told_of_one_look_after_it_ended() -> None:
    news = CacheNews("w", "1")
    assert news.look([chain(1)], [], all_of) == [said(0, reset=True)]
    assert news.look([chain(2)], [], all_of) == [said(1, 1)]
    assert news.look([], [], all_of) == [said(2, 2)]
    assert news.look([], [], all_of) == []


def test_a_core_that_has_lost_count_is_told_all_that_is_known() -> None:
    news = CacheNews("w", "1")
    news.look([chain(1)], [], all_of)
    news.look([chain(2)], [], all_of)
    news.begin()
    assert news.look([], [], all_of) == [said(2, 1, 2, reset=True)]
    assert news.look([], [], all_of) == []


def test_what_is_evicted_is_told_and_what_came_back_is_not() -> None:
    news = CacheNews("w", "1")
    news.look([chain(1, 2, 3), chain(4)], [], all_of)
    (told,) = news.look([], [chain(1, 2, 3), chain(4)], lambda each: min(1, all_of(each)))
    assert told.stored == [chain(1), chain(4)]
    assert told.removed == [KvRemoved(chain(1, 2, 3), 1)]


def test_messages_and_memory_are_bounded() -> None:
    news = CacheNews("w", "1")
    news.look([], [], all_of)
    many = [chain(number) for number in range(KV_CHAINS_MAX + 10)]
    assert news.look(many, [], all_of) == []
    assert [len(part.stored) for part in news.look([], [], all_of)] == [KV_CHAINS_MAX, 10]
    gone = news.look([], many, lambda each: 0)
    assert [len(part.removed) for part in gone] == [KV_CHAINS_MAX, 10]
    news.begin()
    (again,) = news.look([], [], all_of)
    assert len(again.stored) == CHAINS_REMEMBERED


def test_the_host_is_told_of_beside_the_cache() -> None:
    news = CacheNews("w", "1")
    news.look([chain(1, 2, 3)], [], all_of, [], all_of)
    (told,) = news.look([], [], lambda each: 1, [], all_of)
    assert (told.stored, told.host_stored) == ([chain(1)], [chain(1, 2, 3)])
    (told,) = news.look([], [], all_of, [chain(1, 2, 3)], lambda each: 2)
    assert (told.removed, told.host_removed) == ([], [KvRemoved(chain(1, 2, 3), 2)])
    news.begin()
    (told,) = news.look([], [], lambda each: 0, [chain(7)], all_of)
    assert told.reset
    assert (told.stored, told.host_stored, told.host_removed) == ([], [chain(1, 2, 3)], [])


BLOCKS = 24
HOST_BLOCKS = 40
texts = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)
steps = st.lists(st.tuples(texts, st.integers(0, 3), st.booleans()), max_size=40)


def begin(
    pool: BlockPool,
    running: list[Holding],
    text: tuple[int, ...],
    names: dict[tuple[int, ...], int],
) -> None:
    """A sequence gets its blocks and fills them, if there is room. A block's name stands for all
    that is before it, too."""
    parts = [text[: end + 1] for end in range(len(text))]
    holding = Holding(chain(*(names.setdefault(part, len(names) + 1) for part in parts)))
    hits = pool.lookup(holding, len(text))
    if pool.free - hits.idle >= len(text) - hits.blocks:
        pool.adopt(holding, hits)
        pool.take(len(text) - hits.blocks)
        holding.plain += len(text) - hits.blocks
        pool.fill(holding, len(text))
        running.append(holding)


def release(pool: BlockPool, over: list[Holding], cold: bool) -> list[bytes]:
    """Sequences are over; what they leave."""
    left = [holding.cached_chain for holding in over]
    for holding in over:
        pool.release(holding)
    for chain in left if cold else []:
        pool.chill(chain)
    return left


def believe(index: KvIndex, stored: list[bytes], removed: list[KvRemoved]) -> None:
    """What the core makes of it."""
    for each in stored:
        index.stored("w", each)
    for gone in removed:
        index.removed("w", gone.chain, gone.kept_blocks)
    index.check()


@settings(max_examples=300)
@given(steps=steps)
def test_what_is_told_is_what_the_cache_has(
    steps: list[tuple[tuple[int, ...], int, bool]],
) -> None:
    """Sequences that begin alike come and go in a small cache, some of them for good."""
    pool, news, index = BlockPool(BLOCKS), CacheNews("w", "1"), KvIndex()
    host, hosts = HostMemory(HOST_BLOCKS, 0.0), KvIndex()
    index.add("w", 10 * BLOCKS)
    hosts.add("w", 10 * BLOCKS)
    names: dict[tuple[int, ...], int] = {}
    running: list[Holding] = []
    ended: list[bytes] = []
    seen: set[bytes] = set()

    def tell(ended: list[bytes]) -> None:
        seen.update(ended)
        for each in ended:
            host.store(each)
        host.pool.check([])
        hosted = host.pool.evicted(), host.pool.cached_of
        for changes in news.look(ended, pool.evicted(), pool.cached_of, *hosted):
            believe(index, changes.stored, changes.removed)
            believe(hosts, changes.host_stored, changes.host_removed)

    for text, ends, cold in steps:
        begin(pool, running, text, names)
        over, running = running[:ends], running[ends:]
        ended += release(pool, over, cold)
        pool.check(running)
        if cold:
            tell(ended)
            ended = []
    tell(ended + release(pool, running, False))
    tell([])
    for each in seen:
        assert index.longest_prefix(each).get("w", 0) == pool.cached_of(each)
        assert hosts.longest_prefix(each).get("w", 0) == host.pool.cached_of(each)

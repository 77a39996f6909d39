"""What simulated workers say of their engines' caches."""

from __future__ import annotations

from cluster.simulator.cache_news import CHAINS_REMEMBERED, CacheNews
from coordinator.protocol import KV_CHAINS_MAX, KvChanges


def chain(number: int) -> bytes:
    return number.to_bytes(8, "little")


def said(sequence: int, *chains: int, reset: bool = False) -> KvChanges:
    return KvChanges("w", "1", sequence, [chain(number) for number in chains], reset=reset)


def test_a_sequence_is_told_of_one_look_after_it_ended() -> None:
    news = CacheNews("w", "1")
    assert news.look([chain(1)]) == [said(0, reset=True)]
    assert news.look([chain(2)]) == [said(1, 1)]
    assert news.look([]) == [said(2, 2)]
    assert news.look([]) == []


def test_a_core_that_has_lost_count_is_told_all_that_is_known() -> None:
    news = CacheNews("w", "1")
    news.look([chain(1)])
    news.look([chain(2)])
    news.begin()
    assert news.look([]) == [said(2, 1, 2, reset=True)]
    assert news.look([]) == []


def test_messages_and_memory_are_bounded() -> None:
    news = CacheNews("w", "1")
    news.look([])
    many = [chain(number) for number in range(KV_CHAINS_MAX + 10)]
    assert news.look(many) == []
    assert [len(part.stored) for part in news.look([])] == [KV_CHAINS_MAX, 10]
    news.begin()
    (again,) = news.look([])
    assert len(again.stored) == CHAINS_REMEMBERED

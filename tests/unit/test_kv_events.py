"""Blocks of an engine's prefix cache, told in the cluster's own names."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.distributed import kv_events as vllm_events

from coordinator.blocks import hash_blocks, salt_of
from coordinator.protocol import BLOCK_HASH_BYTES, KvRemoved
from transfer.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    News,
    Translation,
    decode_batch,
)

BLOCK = 4
PLAIN = salt_of("", "")


def tokens(*blocks: int) -> list[int]:
    """A prompt of blocks that are known by a number."""
    return [block * 10 + place for block in blocks for place in range(BLOCK)]


def chain(*blocks: int, salt: str = PLAIN) -> bytes:
    """What such a prompt is called everywhere else."""
    return hash_blocks(tokens(*blocks), BLOCK, salt)


def name(blocks: Sequence[int]) -> int:
    """The engine's own hash of the last block."""
    return hash(tuple(blocks))


def stored(*blocks: int, after: int = 0, **more: object) -> BlockStored:
    """The engine stores blocks; the first ``after`` of them were there."""
    names = [name(blocks[: number + 1]) for number in range(after, len(blocks))]
    parent = name(blocks[:after]) if after else None
    return BlockStored(names, parent, tokens(*blocks[after:]), BLOCK, **more)  # type: ignore[arg-type]


def removed(*blocks: int) -> BlockRemoved:
    return BlockRemoved([name(blocks)])


Told = tuple[bool, list[bytes], list[KvRemoved]]


def look(translation: Translation) -> Told:
    """What is told now of the cache."""
    return translation.look()[:3]


def told(translation: Translation) -> Told:
    """What is told once nothing grows any more."""
    cleared, first, gone = look(translation)
    again, more, later = look(translation)
    return cleared or again, first + more, gone + later


def told_of_host(translation: Translation) -> tuple[list[bytes], list[KvRemoved]]:
    """The same of the host."""
    first, then = translation.look(), translation.look()
    return first.host_stored + then.host_stored, first.host_removed + then.host_removed


def copied(*blocks: int, after: int = 0) -> list[BlockStored]:
    """The engine has copied blocks to the host: of each it tells its hash, in any order."""
    names = [name(blocks[: number + 1]) for number in range(after, len(blocks))]
    return [BlockStored([each], None, [], 0, medium="CPU", group_idx=0) for each in reversed(names)]


def dropped(*blocks: int) -> BlockRemoved:
    """A block's copy is gone."""
    return BlockRemoved([name(blocks)], "CPU", 0)


def test_a_chain_has_the_name_that_its_prompt_has() -> None:
    translation = Translation()
    translation.take([stored(1, 2, 3)])
    assert told(translation) == (False, [chain(1, 2, 3)], [])
    assert told(translation) == (False, [], [])


def test_a_chain_that_grows_is_told_when_it_has_stopped() -> None:
    translation = Translation()
    translation.take([stored(1, 2)])
    assert look(translation) == (False, [], [])
    translation.take([stored(1, 2, 3, after=2)])
    assert look(translation) == (False, [], [])
    assert look(translation) == (False, [chain(1, 2, 3)], [])


def test_salts_and_adapters_have_blocks_of_their_own() -> None:
    translation = Translation()
    key = msgspec.Raw(msgspec.msgpack.encode("secret"))
    lora = msgspec.Raw(msgspec.msgpack.encode("adapter"))
    translation.take([stored(1, extra_keys=[[key]])])
    salted = chain(1, salt=salt_of("secret", ""))
    assert told(translation) == (False, [salted], [])
    translation = Translation()
    translation.take([stored(1, lora_name="adapter", extra_keys=[[lora, key]])])
    both = chain(1, salt=salt_of("secret", "adapter"))
    assert told(translation) == (False, [both], [])
    translation = Translation()
    translation.take([stored(1, lora_name="adapter", extra_keys=[[lora]])])
    assert told(translation)[1] == [chain(1, salt=salt_of("", "adapter"))]


def test_what_is_evicted_from_the_end_is_told_as_one() -> None:
    translation = Translation()
    translation.take([stored(1, 2, 3, 4)])
    told(translation)
    translation.take([removed(1, 2, 3, 4), removed(1, 2, 3)])
    assert told(translation) == (False, [], [KvRemoved(chain(1, 2, 3, 4), 2)])


def test_what_is_back_before_anybody_heard_is_not_told_as_gone() -> None:
    translation = Translation()
    translation.take([stored(1, 2, 3, 4)])
    told(translation)
    translation.take([removed(1, 2, 3, 4), removed(1, 2, 3), removed(1, 2)])
    translation.take([stored(1, 2, 3, after=1)])
    assert told(translation) == (False, [chain(1, 2, 3)], [KvRemoved(chain(1, 2, 3, 4), 3)])


def test_what_came_and_went_in_between_is_not_told_as_there() -> None:
    translation = Translation()
    translation.take([stored(1, 2), removed(1, 2), removed(1)])
    assert told(translation) == (False, [], [KvRemoved(chain(1, 2), 0)])
    assert len(translation) == 0


def test_other_memory_and_other_groups_of_layers_do_not_count() -> None:
    translation = Translation()
    translation.take([stored(1, medium="CPU"), stored(2, group_idx=1)])
    assert told(translation) == (False, [], [])
    translation.take([stored(1, medium="GPU", group_idx=0)])
    translation.take([BlockRemoved([name([1])], "CPU"), BlockRemoved([name([1])], None, 1)])
    assert told(translation) == (False, [chain(1)], [])


def test_what_is_copied_to_the_host_is_told_by_the_names_of_the_cache() -> None:
    translation = Translation(host=True)
    key = msgspec.Raw(msgspec.msgpack.encode("secret"))
    salted = chain(1, 2, salt=salt_of("secret", ""))
    translation.take([stored(1, 2, extra_keys=[[key], None]), *copied(1, 2)])
    assert told_of_host(translation) == ([salted], [])
    translation.take([removed(1, 2), removed(1)])
    assert told_of_host(translation) == ([], [])
    translation.take([dropped(1, 2)])
    assert told_of_host(translation) == ([], [KvRemoved(salted, 1)])


def test_a_copy_may_be_told_of_when_the_block_has_left_the_cache() -> None:
    translation = Translation(host=True)
    translation.take([stored(1, 2), removed(1, 2), removed(1), *copied(1, 2)])
    assert told(translation)[1] == []
    assert translation.everything().host_stored == [chain(1, 2)]


def test_a_copy_without_its_beginning_is_of_no_use() -> None:
    translation = Translation(host=True)
    translation.take([stored(1, 2, 3), *copied(1, 2, 3, after=1)])
    assert told_of_host(translation) == ([], [])
    assert translation.strays == 2
    translation.take([*copied(4)])
    assert translation.strays == 3


def test_of_copies_whose_beginning_goes_first_only_the_longest_chain_is_told() -> None:
    translation = Translation(host=True)
    translation.take([stored(1, 2, 3, 4), *copied(1, 2, 3, 4)])
    told_of_host(translation)
    translation.take([dropped(1, 2), dropped(1, 2, 3)])
    assert told_of_host(translation) == ([], [KvRemoved(chain(1, 2, 3), 1)])
    assert translation.everything().host_stored == [chain(1)]


def test_what_lies_behind_a_gap_is_told_when_the_gap_is_filled() -> None:
    translation = Translation(host=True)
    translation.take([stored(1, 2, 3, 4), *copied(1, 2, 3, 4)])
    translation.take([stored(1, 2, 3, 5, after=3), *copied(1, 2, 3, 5, after=3)])
    told_of_host(translation)
    translation.take([dropped(1, 2)])
    assert told_of_host(translation) == ([], [KvRemoved(chain(1, 2), 1)])
    translation.take(copied(1, 2, after=1))
    ends = [chain(1, 2, 3, 4), chain(1, 2, 3, 5)]
    assert told_of_host(translation) == (ends, [])
    assert translation.everything().host_stored == ends


def test_of_what_lies_behind_a_gap_that_is_filled_an_end_may_go_before_it_is_told() -> None:
    translation = Translation(host=True)
    translation.take([stored(1, 2, 3), *copied(1, 2, 3)])
    told_of_host(translation)
    translation.take([dropped(1)])
    told_of_host(translation)
    translation.take([*copied(1), dropped(1, 2, 3)])
    assert told_of_host(translation) == ([chain(1, 2)], [KvRemoved(chain(1, 2, 3), 2)])


def test_all_that_is_cleared_is_cleared_on_the_host_too() -> None:
    translation = Translation(host=True)
    translation.take([stored(1), *copied(1), AllBlocksCleared()])
    assert translation.look() == (True, [], [], [], [])
    assert translation.everything() == (True, [], [], [], [])


def test_blocks_without_a_beginning_are_counted_and_not_told() -> None:
    translation = Translation()
    translation.take([stored(1, 2, 3, after=1)])
    assert told(translation) == (False, [], [])
    assert translation.strays == 2


def test_everything_is_told_to_who_has_lost_count() -> None:
    translation = Translation()
    translation.take([stored(1, 2), stored(1, 3, after=1), stored(4)])
    told(translation)
    translation.take([removed(4)])
    assert sorted(translation.everything().stored) == sorted([chain(1, 2), chain(1, 3)])
    assert told(translation) == (False, [], [])


def test_vllm_s_own_messages_are_understood() -> None:
    batch = vllm_events.KVEventBatch(
        ts=1.0,
        events=[
            vllm_events.BlockStored(
                block_hashes=[b"x" * 32],
                parent_block_hash=None,
                token_ids=tokens(1),
                block_size=BLOCK,
                lora_id=None,
                medium="GPU",
                lora_name=None,
                extra_keys=[("salt",)],
                group_idx=0,
            ),
            vllm_events.BlockRemoved(block_hashes=[b"y" * 32], medium="GPU", group_idx=0),
            vllm_events.AllBlocksCleared(),
        ],
    )
    found = decode_batch(msgspec.msgpack.encode(batch))
    translation = Translation()
    translation.take(found.events[:2])
    assert told(translation)[1] == [chain(1, salt=salt_of("salt", ""))]
    translation.take(found.events)
    assert told(translation) == (True, [], [])
    with pytest.raises(msgspec.MsgspecError):
        decode_batch(b"nonsense")


class Mirror:
    """Who believes what is told: all blocks by their chains."""

    def __init__(self) -> None:
        self.blocks: set[bytes] = set()

    def hear(self, cleared: bool, chains: list[bytes], gone: list[KvRemoved]) -> None:
        if cleared:
            self.blocks.clear()
        for each in chains:
            self.blocks |= set(prefixes(each))
        for each in gone:
            # With a block goes what goes on from it.
            first = prefixes(each.chain)[each.kept_blocks]
            self.blocks = {block for block in self.blocks if not block.startswith(first)}


def prefixes(each: bytes) -> list[bytes]:
    return [each[:end] for end in range(BLOCK_HASH_BYTES, len(each) + 1, BLOCK_HASH_BYTES)]


moves = st.lists(
    st.one_of(
        st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple),
        st.sampled_from(["evict", "look", "clear", "resync"]),
    ),
    max_size=40,
)


@settings(max_examples=300)
@given(moves, st.randoms(use_true_random=False))
def test_whoever_believes_what_is_told_knows_what_is_there(
    moves: list[object], rng: object
) -> None:
    translation, mirror = Translation(), Mirror()
    there: list[tuple[int, ...]] = []
    for move in moves:
        match move:
            case "look":
                mirror.hear(*look(translation))
            case "resync":
                mirror.hear(*translation.everything()[:3])
            case "clear":
                there.clear()
                translation.forget()
            case "evict":
                ends = [
                    each for each in there if not any(is_behind(other, each) for other in there)
                ]
                if ends:
                    gone = rng.choice(ends)  # type: ignore[attr-defined]
                    there.remove(gone)
                    translation.take([removed(*gone)])
            case tuple():
                known = 0
                while known < len(move) and move[: known + 1] in there:
                    known += 1
                if known < len(move):
                    translation.take([stored(*move, after=known)])
                    there += [move[: end + 1] for end in range(known, len(move))]
    mirror.hear(*look(translation))
    mirror.hear(*look(translation))
    assert mirror.blocks == {chain(*each) for each in there}
    assert len(translation) == len(there)
    assert translation.strays == 0


class Hosting:
    """An engine with blocks on its host, and who believes what is told of both."""

    def __init__(self) -> None:
        self.translation = Translation(host=True)
        self.cache, self.host = Mirror(), Mirror()
        self.cached: list[tuple[int, ...]] = []
        self.copies: set[tuple[int, ...]] = set()

    def hear(self, news: News) -> None:
        self.cache.hear(*news[:3])
        self.host.hear(news.cleared, news.host_stored, news.host_removed)

    def clear(self) -> None:
        self.cached.clear()
        self.copies.clear()
        self.translation.take([AllBlocksCleared()])

    def drop(self, rng: object) -> None:
        """A copy goes, whatever is behind it."""
        if self.copies:
            gone = rng.choice(sorted(self.copies))  # type: ignore[attr-defined]
            self.copies.remove(gone)
            self.translation.take([dropped(*gone)])

    def store(self, move: tuple[int, ...], rng: object) -> None:
        """A prompt is cached, and what lacks of it on the host copied: its end, gaps, or as many
        of them as the host takes."""
        known = 0
        while known < len(move) and move[: known + 1] in self.cached:
            known += 1
        if known < len(move):
            self.translation.take([stored(*move, after=known)])
            self.cached += [move[: end + 1] for end in range(known, len(move))]
        parts = [move[:end] for end in range(1, len(move) + 1)]
        new = [part for part in parts if part not in self.copies]
        new = new[: rng.randint(0, len(new))]  # type: ignore[attr-defined]
        self.translation.take(
            [event for part in new for event in copied(*part, after=len(part) - 1)]
        )
        self.copies.update(new)

    @property
    def whole(self) -> set[bytes]:
        """Copies of use: those whose beginning is there, too."""
        return {
            chain(*each)
            for each in self.copies
            if all(each[:end] in self.copies for end in range(1, len(each)))
        }


@settings(max_examples=300)
@given(moves, st.randoms(use_true_random=False))
def test_whoever_believes_what_is_told_of_the_host_knows_what_is_of_use_there(
    moves: list[object], rng: object
) -> None:
    engine = Hosting()
    for move in moves:
        match move:
            case "look":
                engine.hear(engine.translation.look())
            case "resync":
                engine.hear(engine.translation.everything())
            case "clear":
                engine.clear()
            case "evict":
                engine.drop(rng)
            case tuple():
                engine.store(move, rng)
    engine.hear(engine.translation.look())
    engine.hear(engine.translation.look())
    assert engine.cache.blocks == {chain(*each) for each in engine.cached}
    assert engine.host.blocks == engine.whole
    engine.hear(engine.translation.everything())
    assert engine.host.blocks == engine.whole


def is_behind(other: tuple[int, ...], each: tuple[int, ...]) -> bool:
    return len(other) > len(each) and other[: len(each)] == each

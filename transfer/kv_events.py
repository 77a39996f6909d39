"""What an engine's prefix cache holds, in the cluster's own names of blocks.

vLLM tells of every block that enters or leaves its prefix cache, by hashes of its own and with
the block's tokens. Here blocks get the names that prompts have everywhere else in Pythia
(``coordinator.blocks``), so that no token leaves the worker. What is told on is chains from
their beginning: whoever hears of one needs nothing that was told before, and hearing it twice
changes nothing.

A block that is generated is one of a chain that grows with every few tokens: a chain is told
when it has not grown for a while. Evictions are told at once, a chain's together.
Blocks of prompts with images are not told apart by vLLM's events before the first image;
beyond it they have names that nobody asks for. Of hybrid models the first group of layers counts.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import msgspec

from coordinator.blocks import hash_after, root_hash, salt_of
from coordinator.protocol import BLOCK_HASH_BYTES, KvRemoved

MEDIUM = "GPU"


class BlockStored(msgspec.Struct, tag=True):
    """As in ``vllm.distributed.kv_events``, what is used of it."""

    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[msgspec.Raw] | None] | None = None
    group_idx: int | None = None


class BlockRemoved(msgspec.Struct, tag=True):
    """As in ``vllm.distributed.kv_events``, what is used of it."""

    block_hashes: list[bytes | int]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    """As in ``vllm.distributed.kv_events``."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True):
    """What one step of an engine did to its cache."""

    ts: float
    events: list[Event]


decode_batch = msgspec.msgpack.Decoder(EventBatch).decode
"""MsgspecError for anything else."""


class Node:
    """A block that is cached: the end of a chain, or a part of several."""

    __slots__ = ("children", "depth", "grown", "name", "parent", "there", "told")

    def __init__(self, name: bytes, parent: Node | None, grown: int) -> None:
        self.name = name
        self.parent = parent
        self.depth: int = parent.depth + 1 if parent is not None else 1
        self.children = 0
        self.grown = grown
        """In which look it came."""
        self.there = True
        """It is cached."""
        self.told = False
        """It was in a chain that was told."""

    def chain(self, told: bool = False) -> bytes:
        """Names from the first block to this one; ``told``: they are told now."""
        names = bytearray(self.depth * BLOCK_HASH_BYTES)
        node: Node | None = self
        while node is not None:
            end = node.depth * BLOCK_HASH_BYTES
            names[end - BLOCK_HASH_BYTES : end] = node.name
            node.told = node.told or told
            node = node.parent
        return bytes(names)


class Translation:
    """The blocks of one engine, by its own hashes and by ours."""

    def __init__(self) -> None:
        self._nodes: dict[Hashable, Node] = {}
        self._fresh: dict[Node, None] = {}
        """Ends of chains that nobody has been told of."""
        self._removed: dict[bytes, tuple[Node, Node]] = {}
        """Parts of chains that are gone, first and last block, by the name of the first."""
        self._looks = 0
        self.cleared = False
        """Everything that was told before is gone; true until the next look."""
        self.strays = 0
        """Blocks whose beginning is not known: events were lost."""

    def __len__(self) -> int:
        return len(self._nodes)

    def take(self, events: Sequence[Event]) -> None:
        """What the engine did, in its order."""
        for event in events:
            match event:
                case BlockStored():
                    self._stored(event)
                case BlockRemoved():
                    self._gone(event)
                case AllBlocksCleared():
                    self.forget()

    def forget(self) -> None:
        """Nothing is cached any more, as far as is known."""
        self._nodes.clear()
        self._fresh.clear()
        self._removed.clear()
        self.cleared = True

    def look(self) -> tuple[bool, list[bytes], list[KvRemoved]]:
        """What is to be told: whether all that was told is void, chains that are there and did
        not grow since the last look, and what is gone of which chains."""
        cleared, self.cleared = self.cleared, False
        removed = [
            KvRemoved(last.chain(), first.depth - 1) for first, last in self._removed.values()
        ]
        self._removed.clear()
        ready = [node for node in self._fresh if node.grown < self._looks]
        self._looks += 1
        for node in ready:
            del self._fresh[node]
        return cleared, [node.chain(told=True) for node in ready], removed

    def everything(self) -> Iterator[bytes]:
        """All chains that are there, for whoever has lost count. Then nothing is fresh."""
        self._fresh.clear()
        self._removed.clear()
        self.cleared = False
        ends = [node for node in self._nodes.values() if not node.children]
        return (node.chain(told=True) for node in ends)

    def _stored(self, event: BlockStored) -> None:
        if event.medium not in (None, MEDIUM) or event.group_idx not in (None, 0):
            return
        parent: Node | None = None
        if event.parent_block_hash is not None:
            parent = self._nodes.get(event.parent_block_hash)
            if parent is None:
                self.strays += len(event.block_hashes)
                return
            above = parent.name
        else:
            above = root_hash(salt_of(_cache_salt(event), event.lora_name or ""))
        names = hash_after(above, event.token_ids, event.block_size)
        for number, engine_hash in enumerate(event.block_hashes):
            name = names[number * BLOCK_HASH_BYTES : (number + 1) * BLOCK_HASH_BYTES]
            if len(name) < BLOCK_HASH_BYTES:
                return
            parent = self._put(engine_hash, name, parent)

    def _put(self, engine_hash: Hashable, name: bytes, parent: Node | None) -> Node:
        node = self._nodes.get(engine_hash)
        if node is None:
            node = self._nodes[engine_hash] = Node(name, parent, self._looks)
            if parent is not None:
                parent.children += 1
                self._fresh.pop(parent, None)
            self._fresh[node] = None
            self._back(name)
        return node

    def _back(self, name: bytes) -> None:
        """A block is there again before anybody was told that it had gone."""
        gone = self._removed.pop(name, None)
        if gone is not None:
            first, last = gone
            if last is not first:
                while last.parent is not first:
                    assert last.parent is not None
                    last = last.parent
                self._removed[last.name] = last, gone[1]

    def _gone(self, event: BlockRemoved) -> None:
        if event.medium not in (None, MEDIUM) or event.group_idx not in (None, 0):
            return
        for engine_hash in event.block_hashes:
            node = self._nodes.pop(engine_hash, None)
            if node is not None:
                self._take_out(node)

    def _take_out(self, node: Node) -> None:
        node.there = False
        self._fresh.pop(node, None)
        above = node.parent
        if above is not None:
            above.children -= 1
            if not above.children and not above.told and above.there:
                self._fresh[above] = None
        # Engines evict from the end: what is behind it is gone already, most often just now.
        last = node
        if self._removed:
            name, (first, behind) = next(reversed(self._removed.items()))
            if first.parent is node:
                del self._removed[name]
                last = behind
        self._removed[node.name] = node, last


def _cache_salt(event: BlockStored) -> str:
    """The salt of the prompt that a first block is of: the last of its extra keys that is a text
    and not the adapter's name."""
    keys = (event.extra_keys or [None])[0] or []
    for key in reversed(keys):
        try:
            text = msgspec.msgpack.decode(key, type=str)
        except msgspec.ValidationError:
            continue
        if text != event.lora_name:
            return text
    return ""

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

What an engine keeps in its host's memory is told in the same way, beside it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import msgspec

from coordinator.blocks import hash_after, root_hash, salt_of
from coordinator.protocol import BLOCK_HASH_BYTES, KvRemoved

MEDIUM = "GPU"
HOST_MEDIUM = "CPU"
GONE_MOST = 16384
"""Blocks that have left the cache are remembered for the host's sake: it is told that they are
there when they have been copied, and by then they may have gone here."""


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
    """A block that one memory has: the end of a chain, or a part of several.

    ``key``: the engine's own hash of it.
    """

    __slots__ = ("children", "depth", "grown", "key", "name", "parent", "there", "told")

    def __init__(self, key: Hashable, name: bytes, parent: Node | None, grown: int) -> None:
        self.key = key
        self.name = name
        self.parent = parent
        self.depth: int = parent.depth + 1 if parent is not None else 1
        self.children: dict[Node, None] = {}
        """What goes on from it and is there."""
        self.grown = grown
        """In which look it came."""
        self.there = True
        """It is there still."""
        self.told = False
        """It was in a chain that was told."""

    def chain(self, told: bool = False) -> bytes:
        """Names from the first block to this one; ``told``: they are told now, as being there, and
        none if one is not."""
        names = bytearray(self.depth * BLOCK_HASH_BYTES)
        node: Node | None = self
        while node is not None:
            if told and not node.there:
                # What is behind a gap counts as not told when that is filled.
                return b""
            end = node.depth * BLOCK_HASH_BYTES
            names[end - BLOCK_HASH_BYTES : end] = node.name
            node.told = node.told or told
            node = node.parent
        return bytes(names)

    def untold(self) -> list[Node]:
        """The ends of what is there from this block on. Nobody has been told of any of it."""
        ends, left = [], [self]
        while left:
            node = left.pop()
            node.told = False
            left += reversed(node.children)
            if not node.children:
                ends.append(node)
        return ends


class Tier:
    """The blocks that one memory of an engine has, and what has been told of them."""

    def __init__(self) -> None:
        self.nodes: dict[Hashable, Node] = {}
        self._fresh: dict[Node, None] = {}
        """Ends of chains that nobody has been told of."""
        self._removed: dict[bytes, tuple[Node, Node]] = {}
        """Parts of chains that are gone, first and last block, by the name of the first."""
        self._gaps: dict[Hashable, Node] = {}
        """Blocks that are gone though what is behind them is there."""
        self._looks = 0

    def forget(self) -> None:
        """Nothing is there any more, as far as is known."""
        self.nodes.clear()
        self._fresh.clear()
        self._removed.clear()
        self._gaps.clear()

    def look(self) -> tuple[list[bytes], list[KvRemoved]]:
        """Chains that are there and did not grow since the last look, and what is gone of which
        chains."""
        removed = [
            KvRemoved(last.chain(), first.depth - 1) for first, last in self._removed.values()
        ]
        self._removed.clear()
        ready = [node for node in self._fresh if node.grown < self._looks]
        self._looks += 1
        for node in ready:
            del self._fresh[node]
        return _told(ready), removed

    def everything(self) -> list[bytes]:
        """All chains that are there. Then nothing is fresh."""
        self._fresh.clear()
        self._removed.clear()
        return _told(node for node in self.nodes.values() if not node.children)

    def put(self, key: Hashable, name: bytes, parent: Node | None) -> Node:
        """A block is there, after ``parent``; if it was a gap, so is what lies behind it."""
        node = self.nodes.get(key)
        if node is not None:
            return node
        node = self._gaps.pop(key, None) or Node(key, name, parent, self._looks)
        node.there, node.parent = True, parent
        self.nodes[key] = node
        if parent is not None:
            parent.children[node] = None
            self._fresh.pop(parent, None)
        # Whoever heard of the gap has forgotten all that goes on from it.
        for end in node.untold():
            end.grown = self._looks
            self._fresh[end] = None
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

    def take_out(self, key: Hashable) -> Node | None:
        """A block is gone; None if it was not there."""
        node = self.nodes.pop(key, None)
        if node is None:
            return None
        node.there = False
        self._fresh.pop(node, None)
        above = node.parent
        if above is not None:
            del above.children[node]
            if not above.children and not above.there:
                self._gaps.pop(above.key, None)
            elif not above.children and not above.told:
                self._fresh[above] = None
        if node.children:
            self._gaps[key] = node
        # Engines evict from the end: what is behind it is gone already, most often just now.
        first, last = node, node
        if self._removed:
            name, (begin, end) = next(reversed(self._removed.items()))
            if begin.parent is node:
                del self._removed[name]
                last = end
            elif end is above:
                first = begin
        self._removed[first.name] = first, last
        return node


def _told(ends: Iterable[Node]) -> list[bytes]:
    """Their chains, of those that are whole."""
    return [chain for node in ends if (chain := node.chain(told=True))]


class News(NamedTuple):
    """What is to be told. ``cleared``: all that was told is void."""

    cleared: bool
    stored: list[bytes]
    removed: list[KvRemoved]
    host_stored: list[bytes]
    host_removed: list[KvRemoved]


class Translation:
    """The blocks of one engine, by its own hashes and by ours: of its cache, and of its host's
    memory if it keeps any there (``host``).

    Of blocks on the host vLLM tells hashes only. They have been in the cache, or are still.
    """

    def __init__(self, host: bool = False) -> None:
        self.device = Tier()
        self.host = Tier() if host else None
        self._gone: OrderedDict[Hashable, Node] = OrderedDict()
        """Lately from the cache, and maybe on their way to the host."""
        self.cleared = False
        """Everything that was told before is gone; true until the next look."""
        self.strays = 0
        """Blocks whose beginning is not known: events were lost."""

    def __len__(self) -> int:
        return len(self.device.nodes)

    def take(self, events: Sequence[Event]) -> None:
        """What the engine did, in its order."""
        copied: list[bytes | int] = []
        for event in events:
            match event:
                case BlockStored() if _is_of(event, MEDIUM):
                    self._stored(event)
                case BlockRemoved() if _is_of(event, MEDIUM):
                    self._removed(event)
                case BlockStored() if _is_of(event, HOST_MEDIUM):
                    copied += event.block_hashes
                case BlockRemoved() if _is_of(event, HOST_MEDIUM):
                    self._copied(copied)
                    copied = []
                    if self.host is not None:
                        for engine_hash in event.block_hashes:
                            self.host.take_out(engine_hash)
                case BlockStored() | BlockRemoved():
                    pass
                case AllBlocksCleared():
                    self.forget()
                    copied = []
        self._copied(copied)

    def forget(self) -> None:
        """Nothing is cached any more, as far as is known."""
        self.device.forget()
        if self.host is not None:
            self.host.forget()
        self._gone.clear()
        self.cleared = True

    def look(self) -> News:
        """What is to be told now."""
        cleared, self.cleared = self.cleared, False
        host = self.host.look() if self.host is not None else ([], [])
        return News(cleared, *self.device.look(), *host)

    def everything(self) -> News:
        """All chains that are there, for whoever has lost count. Then nothing is fresh."""
        self.cleared = False
        host = self.host.everything() if self.host is not None else []
        return News(True, self.device.everything(), [], host, [])

    def _removed(self, event: BlockRemoved) -> None:
        for engine_hash in event.block_hashes:
            node = self.device.take_out(engine_hash)
            if node is not None and self.host is not None:
                self._gone[engine_hash] = node
                if len(self._gone) > GONE_MOST:
                    self._gone.popitem(last=False)

    def _copied(self, engine_hashes: Sequence[bytes | int]) -> None:
        """Blocks are on the host now; vLLM tells them in any order."""
        if self.host is None or not engine_hashes:
            return
        found = (self.device.nodes.get(key) or self._gone.get(key) for key in engine_hashes)
        known = sorted((node for node in found if node is not None), key=lambda node: node.depth)
        self.strays += len(engine_hashes) - len(known)
        for node in known:
            above = self.host.nodes.get(node.parent.key) if node.parent is not None else None
            if above is None and node.parent is not None:
                self.strays += 1
            else:
                self.host.put(node.key, node.name, above)

    def _stored(self, event: BlockStored) -> None:
        parent: Node | None = None
        if event.parent_block_hash is not None:
            parent = self.device.nodes.get(event.parent_block_hash)
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
            parent = self.device.put(engine_hash, name, parent)


def _is_of(event: BlockStored | BlockRemoved, medium: str) -> bool:
    """It is of blocks in that memory, of the layers that count."""
    return (event.medium or MEDIUM) == medium and event.group_idx in (None, 0)


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

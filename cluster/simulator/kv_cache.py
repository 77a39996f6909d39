"""The blocks of a simulated engine's KV cache: vLLM's ``BlockPool``, kept as runs of blocks.

vLLM gives each block a number, a reference count, a hash once it is full, and a place in a
queue of free blocks. New blocks come from the queue's front. A freed block without a hash goes
back to the front, one with a hash to the end, the last of a sequence first; there it can still
be found, and is taken out when it is. Blocks with the same hash are all kept (vLLM 0.32,
``v1/core/block_pool.py`` and ``single_type_kv_cache_manager.py``).

Which block has which number decides nothing, so here there are none. Blocks without a hash are
counted. Blocks with hashes are held in *runs*: neighbours in a chain that were always held and
freed together. A run is split where somebody needs a part of it, and joined to its neighbour
when both become free at once. So what a request costs depends on the number of its runs, which
is about the number of texts that it is put together from, and hardly on their lengths.

Three rules make runs equal to blocks. The index knows the first hash of each run; every other
hash of the cache is in the same run as the hash before it. Runs that have a hash in common
(twins) have all in common: they are split and cut together. And a hash is cached only while
the hash before it is: whoever holds a block holds one with the hash before and frees it later,
so it is evicted later.
"""

from __future__ import annotations

from coordinator.protocol import BLOCK_HASH_BYTES

__all__ = ["BlockPool", "Hits", "Holding"]


class Run:
    """``blocks`` neighbours of a chain: their hashes are in ``data`` from ``offset`` on.

    ``before``: the hash before its first. ``chain``: from its beginning, of which this run's are
    those from block ``position`` on. ``rest``: what was split off behind while it was held;
    whoever held it before holds that too. ``older`` and ``newer``: neighbours among the free runs,
    None while somebody holds it.
    """

    __slots__ = (
        "before",
        "blocks",
        "chain",
        "data",
        "first",
        "holders",
        "newer",
        "offset",
        "older",
        "position",
        "rest",
    )

    def __init__(
        self,
        data: bytes,
        offset: int,
        blocks: int,
        holders: int,
        before: bytes = b"",
        chain: bytes = b"",
        position: int = 0,
    ) -> None:
        self.before = before
        self.chain = chain
        self.position = position
        self.data = data
        self.offset = offset
        self.blocks = blocks
        self.holders = holders
        self.first = data[offset : offset + BLOCK_HASH_BYTES]
        self.rest: Run | None = None
        self.older: Run | None = None
        self.newer: Run | None = None

    def shrink(self) -> None:
        """Keep only the own hashes, not the whole chain that they were cut from."""
        size = self.blocks * BLOCK_HASH_BYTES
        if len(self.data) != size:
            self.data = self.data[self.offset : self.offset + size]
            self.offset = 0
        self.chain = self.chain[: self.position * BLOCK_HASH_BYTES + size]


class Holding:
    """The blocks of one sequence: ``cached`` ones with hashes first, then ``plain`` ones.

    ``chain``: hashes of its blocks, ``chain_blocks`` of them.
    """

    __slots__ = ("cached", "chain", "chain_blocks", "own", "plain", "runs")

    def __init__(self, chain: bytes) -> None:
        assert len(chain) % BLOCK_HASH_BYTES == 0, "a chain consists of whole hashes"
        self.chain = chain
        self.chain_blocks = len(chain) // BLOCK_HASH_BYTES
        self.cached = 0
        self.plain = 0
        self.runs: list[tuple[Run, int]] = []
        self.own: Run | None = None
        """The run that was made of this holding's latest blocks."""

    @property
    def blocks(self) -> int:
        """All that it holds."""
        return self.cached + self.plain

    @property
    def cached_chain(self) -> bytes:
        """Hashes of what is cached of it."""
        return self.chain[: self.cached * BLOCK_HASH_BYTES]

    def hash_at(self, block: int) -> bytes:
        """The hash of block number ``block`` of the chain."""
        at = block * BLOCK_HASH_BYTES
        return self.chain[at : at + BLOCK_HASH_BYTES]


class Hits:
    """What of a chain is in the cache: ``blocks`` from its start, ``idle`` of them free."""

    __slots__ = ("blocks", "found", "idle")

    def __init__(self) -> None:
        self.blocks = 0
        self.idle = 0
        self.found: list[tuple[Run, int]] = []


class BlockPool:
    """``blocks`` blocks, all free and empty at first."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._plain_free = blocks
        self._cached_free = 0
        self._index: dict[bytes, Run | list[Run]] = {}
        self._followers: dict[bytes, int] = {}
        """How many runs have a hash before them."""
        end = Run(b"", 0, 0, 0)
        end.older = end.newer = end
        self._end = end
        """Between the newest and the oldest free run."""
        self._evicted: list[bytes] = []

    @property
    def free(self) -> int:
        """Blocks that can be taken, cached or not."""
        return self._plain_free + self._cached_free

    def lookup(self, holding: Holding, limit: int) -> Hits:
        """The longest part of the chain, of at most ``limit`` blocks, that is cached."""
        hits = Hits()
        chain, limit = holding.chain, min(limit, holding.chain_blocks)
        position = 0
        while position < limit:
            entry = self._index.get(holding.hash_at(position))
            if entry is None:
                break
            run = entry if isinstance(entry, Run) else entry[0]
            most = min(run.blocks, limit - position)
            blocks = _common_blocks(chain, position, run, most)
            hits.found.append((run, blocks))
            position += blocks
            if not run.holders:
                hits.idle += blocks
        hits.blocks = position
        return hits

    def adopt(self, holding: Holding, hits: Hits) -> None:
        """Hold what was just looked up; takes the idle part out of the free blocks."""
        assert not holding.blocks, "hits come before all other blocks"
        for run, blocks in hits.found:
            if blocks < run.blocks:
                self._split(run, blocks)
            if not run.holders:
                self._unlink(run)
                self._cached_free -= blocks
            run.holders += 1
            holding.runs.append((run, blocks))
        holding.cached = hits.blocks

    def take(self, count: int) -> None:
        """Take free blocks, the oldest first; what they had cached is lost.

        The caller adds them to the ``plain`` ones of whoever gets them.
        """
        assert count <= self.free, "the caller looks before it takes"
        plain = min(count, self._plain_free)
        self._plain_free -= plain
        if count > plain:
            self._evict(count - plain)

    def evicted(self) -> list[bytes]:
        """Chains whose ends were lost since this was asked last; they may be back by now."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def cached_of(self, chain: bytes) -> int:
        """How many blocks of a chain are cached, from its beginning on."""
        holding = Holding(chain)
        return self.lookup(holding, holding.chain_blocks).blocks

    def fill(self, holding: Holding, blocks: int) -> None:
        """The first ``blocks`` blocks of a holding are full now: cache those that are not.

        Blocks beyond the chain are never cached.
        """
        begin, end = holding.cached, min(blocks, holding.chain_blocks)
        if end <= begin:
            return
        assert end <= holding.blocks, "only blocks that are held can be full"
        holding.plain -= end - begin
        holding.cached = end
        while begin < end and (entry := self._index.get(holding.hash_at(begin))) is not None:
            begin = self._add_twin(holding, entry, begin, end)
        if begin < end:
            # The first that is not cached: neither are those behind it.
            self._append(holding, begin, end)

    def release(self, holding: Holding) -> None:
        """Free a holding's blocks, its last one first."""
        later: Run | None = None
        for run, blocks in reversed(holding.runs):
            for part in reversed(_parts(run, blocks)):
                part.holders -= 1
                if part.holders:
                    later = None
                    continue
                part.rest = None
                self._cached_free += part.blocks
                self._retire(part, later)
                later = part
        self._plain_free += holding.plain
        holding.cached = holding.plain = 0
        holding.runs = []
        holding.own = None

    def _append(self, holding: Holding, begin: int, end: int) -> None:
        """Cache blocks whose hashes nobody else has."""
        own = holding.own
        if (
            own is not None
            and own.holders == 1
            and own.rest is None
            and own.offset + own.blocks * BLOCK_HASH_BYTES == begin * BLOCK_HASH_BYTES
            and isinstance(self._index[own.first], Run)
        ):
            own.blocks += end - begin
            holding.runs[-1] = (own, own.blocks)
        else:
            run = self._add_run(holding, begin, end)
            self._index[run.first] = run

    def _add_run(self, holding: Holding, begin: int, end: int) -> Run:
        before = holding.hash_at(begin - 1) if begin else b""
        chain = holding.chain
        run = Run(chain, begin * BLOCK_HASH_BYTES, end - begin, 1, before, chain, begin)
        self._follow(before, 1)
        holding.own = run
        holding.runs.append((run, run.blocks))
        return run

    def _add_twin(self, holding: Holding, entry: Run | list[Run], begin: int, end: int) -> int:
        """Cache blocks beside a run that has the same hashes; where they differ, or end."""
        run = entry if isinstance(entry, Run) else entry[0]
        blocks = _common_blocks(holding.chain, begin, run, min(run.blocks, end - begin))
        if blocks < run.blocks:
            self._split(run, blocks)
        twin = self._add_run(holding, begin, begin + blocks)
        if isinstance(entry, Run):
            self._index[run.first] = [run, twin]
        else:
            entry.append(twin)
        return begin + blocks

    def _split(self, run: Run, blocks: int) -> None:
        """Cut a run and its twins behind ``blocks`` blocks; all parts stay cached."""
        entry = self._index[run.first]
        if isinstance(entry, Run):
            tail = self._split_one(run, blocks)
            self._index[tail.first] = tail
        else:
            tails = [self._split_one(twin, blocks) for twin in entry]
            self._index[tails[0].first] = tails

    def _split_one(self, run: Run, blocks: int) -> Run:
        offset = run.offset + blocks * BLOCK_HASH_BYTES
        before = run.data[offset - BLOCK_HASH_BYTES : offset]
        behind = run.blocks - blocks
        tail = Run(run.data, offset, behind, run.holders, before, run.chain, run.position + blocks)
        self._follow(before, 1)
        run.blocks = blocks
        if run.holders:
            tail.rest, run.rest = run.rest, tail
        else:
            # The last blocks are the first to be evicted.
            older = run.older
            assert older is not None
            self._link(tail, older, run)
            tail.shrink()
            run.shrink()
        return tail

    def _retire(self, run: Run, later: Run | None) -> None:
        """Put a run at the end of the free ones, joined to ``later``, which follows it."""
        if (
            later is not None
            and isinstance(self._index[run.first], Run)
            and isinstance(self._index[later.first], Run)
        ):
            del self._index[later.first]
            self._follow(later.before, -1)
            self._unlink(later)
            run.shrink()
            later.shrink()
            run.data += later.data
            run.blocks += later.blocks
            run.chain = later.chain
        else:
            run.shrink()
        newest = self._end.older
        assert newest is not None
        self._link(run, newest, self._end)

    def chill(self, chain: bytes) -> None:
        """Nobody will look for a chain any more: what is free of it, and nothing else in the cache
        goes on from, is evicted before everything else."""
        cold: list[Run] = []
        for run, end in reversed(self._own_runs(chain)):
            start = run.blocks if run.holders else self._alone_from(run, cold[-1:])
            if 0 < start < run.blocks:
                behind = end - (run.blocks - start) * BLOCK_HASH_BYTES
                self._split(run, start)
                tail = self._index[chain[behind : behind + BLOCK_HASH_BYTES]]
                assert isinstance(tail, Run)
                cold.append(tail)
            elif start == 0:
                cold.append(run)
            if start:
                break
        for run in reversed(cold):
            self._unlink(run)
            oldest = self._end.newer
            assert oldest is not None
            self._link(run, self._end, oldest)

    def _own_runs(self, chain: bytes) -> list[tuple[Run, int]]:
        """The runs that a chain consists of, and where in it each ends; none if somebody else has
        the same blocks or goes on from within one of them."""
        found: list[tuple[Run, int]] = []
        position, blocks = 0, len(chain) // BLOCK_HASH_BYTES
        while position < blocks:
            at = position * BLOCK_HASH_BYTES
            entry = self._index.get(chain[at : at + BLOCK_HASH_BYTES])
            if entry is None:
                break
            if not isinstance(entry, Run) or entry.blocks > blocks - position:
                return []
            if _common_blocks(chain, position, entry, entry.blocks) < entry.blocks:
                return []
            position += entry.blocks
            found.append((entry, position * BLOCK_HASH_BYTES))
        return found

    def _alone_from(self, run: Run, after: list[Run]) -> int:
        """From which of its blocks on nothing but the run ``after`` it, if any, goes on from it."""
        begin = run.offset // BLOCK_HASH_BYTES
        hashes = _hashes(run.data, begin, begin + run.blocks)
        for at in reversed(range(run.blocks)):
            others = self._followers.get(hashes[at], 0)
            if after and at == run.blocks - 1:
                others -= 1
            if others:
                return at + 1
        return 0

    def _evict(self, count: int) -> None:
        self._cached_free -= count
        while count:
            run = self._end.newer
            assert run is not None
            assert run is not self._end
            if run.blocks > count:
                self._cut(run, run.blocks - count)
                return
            count -= run.blocks
            self._unlink(run)
            self._follow(run.before, -1)
            entry = self._index[run.first]
            if isinstance(entry, Run):
                del self._index[run.first]
                self._evicted_from(run, 0)
            else:
                entry.remove(run)
                if len(entry) == 1:
                    self._index[run.first] = entry[0]

    def _cut(self, run: Run, blocks: int) -> None:
        """Forget all of a free run but its first ``blocks`` blocks."""
        entry = self._index[run.first]
        if not isinstance(entry, Run):
            tails = [self._split_one(twin, blocks) for twin in entry if twin is not run]
            self._index[tails[0].first] = tails if len(tails) > 1 else tails[0]
        else:
            self._evicted_from(run, blocks)
        run.blocks = blocks
        if len(run.data) > 2 * blocks * BLOCK_HASH_BYTES:
            run.shrink()

    def _evicted_from(self, run: Run, kept_blocks: int) -> None:
        """Nothing of the cache has what a run has behind its first ``kept_blocks`` blocks."""
        if kept_blocks == run.blocks:
            return
        end = (run.position + run.blocks) * BLOCK_HASH_BYTES
        last = self._evicted[-1] if self._evicted else b""
        # What was evicted just before went on from these blocks, mostly.
        if last[end - BLOCK_HASH_BYTES : end] != run.chain[end - BLOCK_HASH_BYTES : end]:
            self._evicted.append(run.chain[:end])

    def _follow(self, before: bytes, count: int) -> None:
        followers = self._followers.get(before, 0) + count
        if followers:
            self._followers[before] = followers
        else:
            del self._followers[before]

    def _link(self, run: Run, older: Run, newer: Run) -> None:
        run.older, run.newer = older, newer
        older.newer = newer.older = run

    def _unlink(self, run: Run) -> None:
        older, newer = run.older, run.newer
        assert older is not None
        assert newer is not None
        older.newer, newer.older = newer, older
        run.older = run.newer = None

    def only_held_by(self, holdings: list[Holding]) -> int:
        """How many blocks nobody but these holdings holds; they hold no plain ones."""
        found: dict[int, list[int]] = {}
        for holding in holdings:
            for entry in holding.runs:
                for part in _parts(*entry):
                    count = found.setdefault(id(part), [0, part.holders, part.blocks])
                    count[0] += 1
        return sum(blocks for count, holders, blocks in found.values() if count == holders)

    def cached_hashes(self) -> list[bytes]:
        """Hashes of the free cached blocks in the order in which they would be evicted."""
        hashes: list[bytes] = []
        run = self._end.newer
        while run is not self._end:
            assert run is not None
            begin = run.offset // BLOCK_HASH_BYTES
            hashes += reversed(_hashes(run.data, begin, begin + run.blocks))
            run = run.newer
        return hashes

    def check(self, holdings: list[Holding]) -> None:
        """Assert that each block is free or in exactly those of all ``holdings`` that hold it."""
        holders: dict[int, int] = {}
        held: dict[int, Run] = {}
        for holding in holdings:
            assert holding.plain >= 0
            assert sum(blocks for _, blocks in holding.runs) == holding.cached
            position = 0
            for entry in holding.runs:
                for part in _parts(*entry):
                    assert _common_blocks(holding.chain, position, part, part.blocks)
                    position += part.blocks
                    holders[id(part)] = holders.get(id(part), 0) + 1
                    held[id(part)] = part
        self._check_index(held)
        used = sum(run.blocks for run in held.values()) + sum(h.plain for h in holdings)
        assert all(run.holders == holders[key] for key, run in held.items())
        assert len(self.cached_hashes()) == self._cached_free
        assert used + self.free == self.blocks, "the sum of blocks is constant"

    def _check_index(self, held: dict[int, Run]) -> None:
        """Assert that the index knows all runs, and no hash twice except in twins."""
        free: set[int] = set()
        run = self._end.newer
        while run is not self._end:
            assert run is not None
            assert run.holders == 0
            free.add(id(run))
            run = run.newer
        seen: set[bytes] = set()
        indexed: set[int] = set()
        for first, entry in self._index.items():
            twins = [entry] if isinstance(entry, Run) else entry
            assert isinstance(entry, Run) or len(twins) > 1
            contents = {
                twin.data[twin.offset :][: twin.blocks * BLOCK_HASH_BYTES] for twin in twins
            }
            assert len(contents) == 1, "twins are equal"
            hashes = contents.pop()
            assert hashes[:BLOCK_HASH_BYTES] == first
            new = _hashes(hashes, 0, len(hashes) // BLOCK_HASH_BYTES)
            assert seen.isdisjoint(new), "equal blocks are in twins only"
            seen.update(new)
            indexed.update(map(id, twins))
        followers: dict[bytes, int] = {}
        for entry in self._index.values():
            for each in [entry] if isinstance(entry, Run) else entry:
                followers[each.before] = followers.get(each.before, 0) + 1
        assert followers == self._followers
        assert indexed == free | set(held)
        assert free.isdisjoint(held)


def _hashes(chain: bytes, begin: int, end: int) -> list[bytes]:
    size = BLOCK_HASH_BYTES
    return [chain[at : at + size] for at in range(begin * size, end * size, size)]


def _common_blocks(chain: bytes, position: int, run: Run, most: int) -> int:
    """How many of ``most`` blocks from ``position`` on are those of ``run``."""
    size, data = BLOCK_HASH_BYTES, run.data
    left, right = position * size, run.offset
    if chain[left : left + most * size] == data[right : right + most * size]:
        return most
    same, different = 0, most
    while different - same > 1:
        middle = (same + different) // 2
        low, high = same * size, middle * size
        if chain[left + low : left + high] == data[right + low : right + high]:
            same = middle
        else:
            different = middle
    return same


def _parts(run: Run, blocks: int) -> list[Run]:
    """The runs that a run has become which had ``blocks`` blocks when it was taken."""
    parts = [run]
    blocks -= run.blocks
    while blocks:
        rest = parts[-1].rest
        assert rest is not None
        parts.append(rest)
        blocks -= rest.blocks
    return parts

"""Which worker holds which prompt blocks, as far as the core knows.

Blocks are named by 8-byte chained hashes, many of them in one ``bytes`` object: equal hashes
mean equal content and equal history. So blocks that were stored together stay together: they
are kept in *runs*, neighbours in a chain, each known by its first hash and compared as bytes.
What a prompt costs depends on how many runs it consists of, hardly on its length. A run is
split where a prompt leaves it or ends in it, and joined to the next one where all workers
hold, and have used, both alike.

The index is approximate. It is fed by what calls leave behind and by what engines say of their
caches, and forgets blocks of a worker beyond its capacity as an engine does. It decides nothing
and is never trusted for correctness: an engine that lacks a block computes it. What is no chain
(equal hashes after different ones) breaks nothing; of it the index may forget too much.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from coordinator.protocol import BLOCK_HASH_BYTES


def _count(hashes: bytes) -> int:
    """How many hashes there are; ValueError if the length is not a multiple of 8."""
    blocks, odd_bytes = divmod(len(hashes), BLOCK_HASH_BYTES)
    if odd_bytes:
        raise ValueError(f"{len(hashes)} bytes are no sequence of block hashes")
    return blocks


FOLLOWERS_MOST = 64
"""What so many prompts go on from is nobody's own."""


class Run:
    """Neighbours of a chain and which workers hold how many of them, from the first on.

    ``before``: the hash before the first.
    """

    __slots__ = ("before", "blocks", "data", "entries")

    def __init__(self, data: bytes, before: bytes) -> None:
        self.data = data
        self.before = before
        self.blocks = len(data) // BLOCK_HASH_BYTES
        self.entries: dict[str, Entry] = {}

    @property
    def first(self) -> bytes:
        """The hash that it is known by."""
        return self.data[:BLOCK_HASH_BYTES]

    @property
    def last(self) -> bytes:
        """The hash that whatever goes on from it has before its own."""
        return self.data[-BLOCK_HASH_BYTES:]


class Entry:
    """What a worker holds of a run: ``blocks`` blocks. Linked in the order of use.

    ``cold``: nobody will ask for it.
    """

    __slots__ = ("blocks", "cold", "newer", "older", "run")

    def __init__(self, run: Run | None, blocks: int, cold: bool = False) -> None:
        self.run = run
        self.blocks = blocks
        self.cold = cold
        self.older = self.newer = self

    def link(self, older: Entry) -> None:
        """Into line, right after ``older``."""
        self.older, self.newer = older, older.newer
        older.newer.older = self
        older.newer = self

    def unlink(self) -> None:
        """Out of line."""
        self.older.newer, self.newer.older = self.newer, self.older


class Held:
    """What a worker holds in all, ``cold_blocks`` of it for nobody."""

    __slots__ = ("blocks", "capacity_blocks", "cold_blocks", "ends")

    def __init__(self, capacity_blocks: int) -> None:
        self.capacity_blocks = capacity_blocks
        self.blocks = self.cold_blocks = 0
        self.ends = Entry(None, 0)
        """Between the newest (``older``) and the oldest entry (``newer``)."""

    def touch(self, entry: Entry) -> None:
        """``entry`` is the newest from now on."""
        entry.unlink()
        entry.link(self.ends.older)
        self.warm(entry)

    def warm(self, entry: Entry) -> None:
        """Somebody may ask for it."""
        if entry.cold:
            entry.cold = False
            self.cold_blocks -= entry.blocks

    def chill(self, entry: Entry, older: Entry) -> None:
        """Nobody will ask for it: it is forgotten right after ``older``."""
        if not entry.cold:
            entry.cold = True
            self.cold_blocks += entry.blocks
        entry.unlink()
        entry.link(older)

    def shrink(self, entry: Entry, blocks: int) -> None:
        """So many blocks less are held."""
        entry.blocks -= blocks
        self.blocks -= blocks
        if entry.cold:
            self.cold_blocks -= blocks


class KvIndex:
    """Blocks per worker, bounded per worker; what nobody will ask for goes first, then what was
    used longest ago."""

    def __init__(self) -> None:
        self._runs: dict[bytes, Run] = {}
        self._followers: dict[bytes, Run | dict[Run, None]] = {}
        """Runs by the hash before their first; most are the only one."""
        self._held: dict[str, Held] = {}

    def __len__(self) -> int:
        """How many workers are known."""
        return len(self._held)

    def add(self, worker: str, capacity_blocks: int) -> None:
        """Make ``worker`` known; at most ``capacity_blocks`` blocks are kept for it."""
        assert worker not in self._held, worker
        self._held[worker] = Held(capacity_blocks)

    def stored(self, worker: str, hashes: bytes) -> None:
        """``worker`` holds these blocks, a chain, now; unknown workers are ignored.

        A chain's end is marked as older than its beginning, as engines evict: without the
        beginning the end is of no use.
        """
        blocks = _count(hashes)
        held = self._held.get(worker)
        if held is None or not blocks:
            return
        path = self._path(hashes, blocks)
        for run in reversed(path):
            entry = run.entries.get(worker)
            if entry is None:
                entry = run.entries[worker] = Entry(run, 0)
                entry.link(held.ends.older)
            else:
                held.touch(entry)
            held.shrink(entry, entry.blocks - run.blocks)
        self._join(path)
        self._evict(worker, held)

    def removed(self, worker: str, hashes: bytes, kept_blocks: int = 0) -> None:
        """Of this chain ``worker`` holds only the first ``kept_blocks``, at most, and nothing that
        goes on from the rest."""
        blocks = _count(hashes)
        held = self._held.get(worker)
        if held is None or kept_blocks >= blocks:
            return
        position = 0
        while position < blocks:
            run = self._run_at(hashes, position)
            if run is None:
                return
            same = _common_blocks(hashes, position, run, min(run.blocks, blocks - position))
            if position < kept_blocks < position + same:
                self._split(run, kept_blocks - position)
                same = kept_blocks - position
            elif position >= kept_blocks:
                self._drop_from(worker, held, run)
                return
            position += same

    def chill(self, worker: str, hashes: bytes, blocks: int, after: bytes = b"") -> None:
        """Nobody will ask ``worker`` for this prompt and the answer behind it, ``blocks`` in all:
        they count as room and are forgotten first, as far as nothing else goes on from them.

        ``after``: a prompt that went on from this one, maybe without the answer."""
        held = self._held.get(worker)
        if held is None:
            return
        newest = held.ends
        for run in reversed(self._with_answer(worker, hashes, blocks, after)):
            entry = run.entries.get(worker)
            if entry is None:
                continue
            behind = self._behind(run)
            if len(behind) > FOLLOWERS_MOST:
                return
            entries = (each.entries.get(worker) for each in behind)
            if not all(each is None or each.cold for each in entries):
                return
            held.chill(entry, newest)
            newest = entry

    def _with_answer(self, worker: str, hashes: bytes, blocks: int, after: bytes) -> list[Run]:
        """The runs of a prompt and of what was generated behind it; none if something longer is
        in one of them, too. Of an answer there are no hashes, but it is all that follows."""
        runs = list(dict.fromkeys(run for run, _ in self._walk(hashes)))
        position = sum(run.blocks for run in runs)
        while runs and position < blocks:
            behind = self._behind(runs[-1])
            if len(behind) > FOLLOWERS_MOST:
                break
            at = position * BLOCK_HASH_BYTES
            named = after[at : at + BLOCK_HASH_BYTES]
            behind = [run for run in behind if worker in run.entries and run.first != named]
            if len(behind) != 1 or behind[0] in runs:
                break
            runs.append(behind[0])
            position += behind[0].blocks
        return runs if position <= blocks else []

    def forget(self, worker: str) -> None:
        """``worker`` is gone with everything that it held; unknown ones are ignored."""
        held = self._held.pop(worker, None)
        if held is None:
            return
        entry = held.ends.newer
        while entry.run is not None:
            run, entry = entry.run, entry.newer
            del run.entries[worker]
            self._trim(run)

    def longest_prefix(
        self, hashes: bytes, most: int | None = None, among: Collection[str] = ()
    ) -> dict[str, int]:
        """How many leading blocks each worker holds; workers with none are left out.

        With ``most`` it is told of the workers ``among`` and of no more than ``most`` others:
        those that hold the prompt farther than a point that more than ``most`` have reached.
        """
        path = self._walk(hashes)
        start = 0
        if most is not None:
            while start < len(path) and len(path[start][0].entries) > most:
                start += 1
        found = _prefixes(path, start)
        for worker in among:
            if worker not in found and (held := _holds(worker, path)):
                found[worker] = held
        return found

    def blocks(self, worker: str) -> int:
        """How many blocks the index believes ``worker`` to hold."""
        held = self._held.get(worker)
        return held.blocks if held is not None else 0

    def capacity(self, worker: str) -> int:
        """How many blocks are kept for ``worker`` at most."""
        held = self._held.get(worker)
        return held.capacity_blocks if held is not None else 0

    def room(self, worker: str) -> int:
        """How many blocks ``worker`` can store before it forgets any that may be asked for."""
        held = self._held.get(worker)
        return held.capacity_blocks - held.blocks + held.cold_blocks if held is not None else 0

    def check(self) -> None:
        """Assert that runs and workers agree and the bounds hold."""
        entries = 0
        for worker, held in self._held.items():
            assert held.blocks <= held.capacity_blocks, worker
            blocks, cold, entry = 0, 0, held.ends.newer
            while entry.run is not None:
                assert entry.run.entries[worker] is entry
                assert entry.newer.older is entry
                blocks += entry.blocks
                cold += entry.blocks if entry.cold else 0
                entries += 1
                entry = entry.newer
            assert (blocks, cold) == (held.blocks, held.cold_blocks), worker
        followers = [
            run
            for runs in self._followers.values()
            for run in ((runs,) if isinstance(runs, Run) else runs)
        ]
        assert len(followers) == len(self._runs)
        assert set(followers) == set(self._runs.values())
        for first, run in self._runs.items():
            assert run.first == first
            known = self._followers[run.before]
            assert known is run or (isinstance(known, dict) and run in known)
            assert len(run.data) == run.blocks * BLOCK_HASH_BYTES
            assert run.blocks == max(entry.blocks for entry in run.entries.values())
            assert min(entry.blocks for entry in run.entries.values()) > 0
            entries -= len(run.entries)
        assert entries == 0, "runs and workers disagree"

    # --- runs ---------------------------------------------------------------------------

    def _run_at(self, hashes: bytes, block: int) -> Run | None:
        at = block * BLOCK_HASH_BYTES
        return self._runs.get(hashes[at : at + BLOCK_HASH_BYTES])

    def _walk(self, hashes: bytes) -> list[tuple[Run, int]]:
        """The runs along a chain as far as anybody holds them, and how much of each is in it."""
        blocks = _count(hashes)
        path: list[tuple[Run, int]] = []
        position = 0
        while position < blocks:
            run = self._run_at(hashes, position)
            if run is None:
                break
            same = _common_blocks(hashes, position, run, min(run.blocks, blocks - position))
            path.append((run, same))
            position += same
        return path

    def _path(self, hashes: bytes, blocks: int) -> list[Run]:
        """The runs that a chain consists of exactly, made where there are none."""
        path: dict[Run, None] = {}
        position = 0
        while position < blocks:
            run = self._run_at(hashes, position)
            if run is None:
                at = position * BLOCK_HASH_BYTES
                run = Run(hashes[at:], hashes[max(0, at - BLOCK_HASH_BYTES) : at])
                self._add(run)
                path[run] = None
                break
            if run in path:
                # This is no chain.
                break
            same = _common_blocks(hashes, position, run, min(run.blocks, blocks - position))
            if same < run.blocks:
                self._split(run, same)
            path[run] = None
            position += same
        return list(path)

    def _split(self, run: Run, blocks: int) -> None:
        """Cut a run behind ``blocks`` blocks; whoever held it holds both parts as before."""
        at = blocks * BLOCK_HASH_BYTES
        tail = Run(run.data[at:], run.data[at - BLOCK_HASH_BYTES : at])
        run.data, run.blocks = run.data[:at], blocks
        known = tail.first in self._runs
        for worker, entry in run.entries.items():
            beyond = entry.blocks - blocks
            if beyond <= 0:
                continue
            if known:
                # Its first hash is that of another run: this was no chain.
                self._held[worker].shrink(entry, beyond)
            else:
                entry.blocks = blocks
                part = tail.entries[worker] = Entry(tail, beyond, entry.cold)
                part.link(entry.older)
        if tail.entries:
            self._add(tail)

    def _add(self, run: Run) -> None:
        self._runs[run.first] = run
        known = self._followers.get(run.before)
        if known is None:
            self._followers[run.before] = run
        elif isinstance(known, Run):
            self._followers[run.before] = {known: None, run: None}
        else:
            known[run] = None

    def _remove(self, run: Run) -> None:
        del self._runs[run.first]
        known = self._followers[run.before]
        if isinstance(known, dict):
            del known[run]
        if known is run or not known:
            del self._followers[run.before]

    def _behind(self, run: Run) -> Collection[Run]:
        """What goes on from it."""
        known = self._followers.get(run.last, ())
        return (known,) if isinstance(known, Run) else known

    def _join(self, path: list[Run]) -> None:
        """Join neighbours that all their workers hold whole and used last together, where nothing
        else goes on from the first."""
        run = path[0]
        for after in path[1:]:
            alone = len(self._behind(run)) == 1
            if after is not run and alone and _alike(run, after):
                run.data += after.data
                run.blocks += after.blocks
                for worker, entry in after.entries.items():
                    entry.unlink()
                    run.entries[worker].blocks = run.blocks
                self._remove(after)
            else:
                run = after

    def _trim(self, run: Run) -> None:
        """Forget what nobody holds of a run, or all of it."""
        blocks = max((entry.blocks for entry in run.entries.values()), default=0)
        if not blocks:
            self._remove(run)
        elif blocks < run.blocks:
            run.blocks = blocks
            run.data = run.data[: blocks * BLOCK_HASH_BYTES]

    def _drop(self, worker: str, held: Held, run: Run) -> None:
        """``worker`` holds nothing of a run."""
        entry = run.entries.pop(worker, None)
        if entry is not None:
            entry.unlink()
            held.shrink(entry, entry.blocks)
            self._trim(run)

    def _drop_from(self, worker: str, held: Held, run: Run) -> None:
        """``worker`` holds nothing of a run, nor of what goes on from it."""
        gone = [run]
        while gone:
            run = gone.pop()
            if worker in run.entries:
                gone += self._behind(run)
                self._drop(worker, held, run)

    def _evict(self, worker: str, held: Held) -> None:
        excess = held.blocks - held.capacity_blocks
        while excess > 0:
            entry = held.ends.newer
            assert entry.run is not None
            if entry.blocks > excess:
                held.shrink(entry, excess)
                self._trim(entry.run)
                return
            excess -= entry.blocks
            self._drop(worker, held, entry.run)


Path = Sequence[tuple[Run, int]]
"""Runs along a chain, and how many blocks of each are meant."""


def _prefixes(path: Path, start: int) -> dict[str, int]:
    """How many leading blocks each worker holds that holds something of run ``start``, whole
    what is before it."""
    found: dict[str, int] = {}
    if start == len(path):
        return found
    before = path[:start]
    position = sum(same for _, same in before)
    alive = [name for name in path[start][0].entries if _holds(name, before) == position]
    for run, same in path[start:]:
        entries = run.entries
        still: list[str] = []
        for worker in alive:
            entry = entries.get(worker)
            held = 0 if entry is None else entry.blocks
            if held >= same:
                still.append(worker)
            elif position + held:
                found[worker] = position + held
        alive = still
        position += same
        if not alive:
            return found
    for worker in alive:
        found[worker] = position
    return found


def _holds(worker: str, path: Path) -> int:
    """How many leading blocks of a path a worker holds."""
    position = 0
    for run, same in path:
        entry = run.entries.get(worker)
        held = 0 if entry is None else entry.blocks
        if held < same:
            return position + held
        position += same
    return position


def _common_blocks(hashes: bytes, position: int, run: Run, most: int) -> int:
    """How many of ``most`` hashes from ``position`` on are the first ones of ``run``."""
    size, data = BLOCK_HASH_BYTES, run.data
    start = position * size
    if hashes[start : start + most * size] == data[: most * size]:
        return most
    # The first is the same: it was found by it.
    same, different = 1, most
    while different - same > 1:
        middle = (same + different) // 2
        low, high = same * size, middle * size
        if hashes[start + low : start + high] == data[low:high]:
            same = middle
        else:
            different = middle
    return same


def _alike(run: Run, after: Run) -> bool:
    """Whether all workers of two neighbours hold both whole, and used ``after`` just before."""
    if run.entries.keys() != after.entries.keys():
        return False
    return all(
        entry.blocks == run.blocks
        and entry.older is (behind := after.entries[worker])
        and entry.cold == behind.cold
        and behind.blocks == after.blocks
        for worker, entry in run.entries.items()
    )

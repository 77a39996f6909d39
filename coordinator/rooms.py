"""What calls take of workers' KV: prompts that begin alike take room for that once.

An engine gives the same blocks to requests that begin alike, if those are in its cache: once it
has begun to compute them itself or, of what is read from elsewhere, when all of it has come. So
a stretch of blocks that a call computes where it is kept is common from its plan on, and one that
is read from when the call begins to decode; until then it is the call's alone. What two calls
read at the same time is there twice, in engines and here.

Prompts are compared at some marks, the same for all and the farther apart the farther behind, and
at their end, so that a long prompt has a few dozen stretches. A stretch is known by the hash of its
last block, which stands for all before it; what a prompt has in common with others is found by
bisection.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice

from coordinator.standing import Standing
from coordinator.state import Call, CallPhase, State, Stretches, Worker

STRETCH_TOKENS = 512
"""The first stretches', a block at least."""
STRETCHES_ALIKE = 8
"""Each is then longer by an eighth of what is before it."""
MARKED_BLOCKS = 1 << 20
"""What is behind them in a prompt is one stretch."""
END_BITS = 32
"""Where a stretch ends is part of its key: what has one key has one length, whatever the hashes."""


class Rooms:
    """The only writer of what calls have reserved, but for what peers hold and what moves take."""

    def __init__(self, state: State, standing: Standing) -> None:
        self._state = state
        self._standing = standing
        self._begun: dict[int, dict[str, None]] = {}
        """Workers that have a first stretch, by its key."""

    def spared(self, call: Call) -> Callable[[str, int], int]:
        """Of so many blocks that a call would need on a worker, those that others have reserved."""
        workers = self._state.workers

        def spared(name: str, blocks: int) -> int:
            worker = workers[name]
            if not worker.beginnings:
                return 0
            keys, ends = _stretches(call, worker)
            return ends[min(_common(keys, worker.beginnings), _sharable(ends, blocks))]

        return spared

    def begun(self, call: Call, most: int) -> list[str]:
        """Some workers that have the beginning of a prompt reserved."""
        worker = next(iter(self._state.workers.values()), None)
        keys = _stretches(call, worker).keys if worker is not None else []
        return list(islice(self._begun.get(keys[0], ()), most)) if keys else []

    def leader(self, call: Call, worker: Worker, known_blocks: int) -> Call | None:
        """Who is bringing to a worker what a call has in common with it, some hundred tokens beyond
        the first ``known_blocks`` of its prompt."""
        keys, ends = _stretches(call, worker)
        at = max(_common(keys, worker.beginnings), bisect_right(ends, known_blocks) - 1)
        least_blocks = _shortest_blocks(worker.facts.block_size)
        if at == len(keys) or ends[at + 1] < known_blocks + least_blocks:
            return None
        for other in worker.decodes.values():
            # What it computed itself would be in common already.
            if other.phase is not CallPhase.DECODING:
                its_keys, _ = _stretches(other, worker)
                if its_keys[at : at + 1] == keys[at : at + 1]:
                    return other
        return None

    def decode(self, call: Call, worker: Worker, blocks: int, *, computes: bool) -> None:
        """A call will be decoded there. ``computes``: all of its prompt that the worker lacks
        it computes itself."""
        call.decode, worker.decodes[call.key] = worker, call
        call.decode_blocks, call.decode_stretches = self._take(call, worker, blocks, computes)

    def prefill(self, call: Call, worker: Worker, blocks: int, *, computes: bool) -> None:
        """The same of whoever computes its prompt for another one."""
        call.prefill, worker.prefills[call.key] = worker, call
        call.prefill_blocks, call.prefill_stretches = self._take(call, worker, blocks, computes)

    def decodes(self, call: Call) -> None:
        """Its KV has come: others may have it in common now."""
        worker, first = call.decode, call.decode_stretches
        assert worker is not None
        keys, ends = _stretches(call, worker)
        last = _sharable(ends, ends[first] + call.decode_blocks)
        if last > first and keys[first] not in worker.beginnings:
            new_blocks = _join(keys, ends, first, last, worker.beginnings)
            self._begun.setdefault(keys[0], {})[worker.name] = None
            self._state.room_changed = True
            blocks = ends[last] - ends[first]
            worker.kv_blocks_shared += blocks - new_blocks
            worker.kv_blocks_reserved -= blocks - new_blocks
            call.decode_blocks -= blocks
            call.decode_stretches = last
            self._standing.touch(worker)

    def leave_decode(self, call: Call) -> None:
        """It is not decoded there any more; nothing happens if it was not."""
        if call.decode is not None:
            del call.decode.decodes[call.key]
            self._give_back(call, call.decode, call.decode_blocks, call.decode_stretches)
            call.decode, call.decode_blocks, call.decode_stretches = None, 0, 0

    def leave_prefill(self, call: Call) -> None:
        """Nobody has to keep its prompt any more; nothing happens if nobody did."""
        if call.prefill is not None:
            del call.prefill.prefills[call.key]
            self._give_back(call, call.prefill, call.prefill_blocks, call.prefill_stretches)
            call.prefill, call.prefill_blocks, call.prefill_stretches = None, 0, 0

    def _take(self, call: Call, worker: Worker, blocks: int, computes: bool) -> tuple[int, int]:
        """What the call has reserved for itself alone, and how many stretches with others."""
        keys, ends = _stretches(call, worker)
        count = _sharable(ends, blocks)
        if not (computes and worker.computes_once):
            count = min(count, _common(keys, worker.beginnings))
        new_blocks = _join(keys, ends, 0, count, worker.beginnings)
        if count:
            self._begun.setdefault(keys[0], {})[worker.name] = None
        alone = blocks - ends[count]
        worker.kv_blocks_reserved += alone + new_blocks
        worker.kv_blocks_shared += ends[count] - new_blocks
        self._standing.touch(worker)
        return alone, count

    def _give_back(self, call: Call, worker: Worker, alone: int, count: int) -> None:
        keys, ends = _stretches(call, worker)
        freed_blocks = _leave(keys, ends, count, worker.beginnings)
        if count and keys[0] not in worker.beginnings:
            workers = self._begun[keys[0]]
            workers.pop(worker.name, None)
            if not workers:
                del self._begun[keys[0]]
        blocks = alone + freed_blocks
        worker.kv_blocks_reserved -= blocks
        worker.kv_blocks_shared -= ends[count] - freed_blocks
        worker.kv_blocks_used = max(0, worker.kv_blocks_used - blocks)
        self._standing.touch(worker)
        self._state.room_changed = True


def checked_blocks(worker: Worker) -> int:
    """What calls have reserved there, summed up anew; AssertionError if that is not kept."""
    taken = [(call, call.decode_blocks, call.decode_stretches) for call in worker.decodes.values()]
    taken += [
        (call, call.prefill_blocks, call.prefill_stretches) for call in worker.prefills.values()
    ]
    users: dict[int, int] = {}
    alone_blocks = common_blocks = shared_blocks = 0
    for call, alone, count in taken:
        keys, ends = _stretches(call, worker)
        new_blocks = _join(keys, ends, 0, count, users)
        alone_blocks += alone
        common_blocks += new_blocks
        shared_blocks += ends[count] - new_blocks
    assert worker.beginnings == users, worker.name
    assert worker.kv_blocks_shared == shared_blocks, worker.name
    return alone_blocks + common_blocks


def _shortest_blocks(block_size: int) -> int:
    return max(1, STRETCH_TOKENS // block_size)


@cache
def _marks(stretch_blocks: int) -> tuple[int, ...]:
    marks = [0]
    while marks[-1] < MARKED_BLOCKS:
        longer = marks[-1] // STRETCHES_ALIKE // stretch_blocks * stretch_blocks
        marks.append(marks[-1] + max(stretch_blocks, longer))
    return tuple(marks)


def _stretches(call: Call, worker: Worker) -> Stretches:
    if call.stretches is None:
        call.stretches = _divided(call.submit.block_hashes, worker.facts.block_size)
    return call.stretches


def _divided(block_hashes: bytes, block_size: int) -> Stretches:
    hashes = memoryview(block_hashes).cast("Q")
    marks = _marks(_shortest_blocks(block_size))
    ends = list(marks[: bisect_right(marks, len(hashes))])
    if ends[-1] < len(hashes):
        ends.append(len(hashes))
    keys = [hashes[end - 1] << END_BITS | end for end in ends[1:]]
    return Stretches(keys, ends)


def _sharable(ends: Sequence[int], blocks: int) -> int:
    """How many stretches of a call that takes so many blocks it may have with others: at least one
    block is its own."""
    return bisect_right(ends, blocks - 1) - 1


def _common(keys: Sequence[int], beginnings: dict[int, int]) -> int:
    """How many of them some call has; who has one has all before it."""
    return bisect_left(keys, True, key=lambda key: key not in beginnings)


def _join(
    keys: Sequence[int], ends: Sequence[int], first: int, last: int, beginnings: dict[int, int]
) -> int:
    """Have those from ``first`` to before ``last``, too; blocks of those that nobody had."""
    new_blocks = 0
    for at in range(first, last):
        users = beginnings.get(keys[at], 0)
        beginnings[keys[at]] = users + 1
        if not users:
            new_blocks += ends[at + 1] - ends[at]
    return new_blocks


def _leave(keys: Sequence[int], ends: Sequence[int], count: int, beginnings: dict[int, int]) -> int:
    """Blocks of those that nobody has any more."""
    freed_blocks = 0
    for at in range(count):
        users = beginnings[keys[at]] - 1
        if users:
            beginnings[keys[at]] = users
        else:
            del beginnings[keys[at]]
            freed_blocks += ends[at + 1] - ends[at]
    return freed_blocks

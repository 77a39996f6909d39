"""What calls take of workers' KV: prompts that begin alike take room for that once.

An engine gives the same blocks to requests that begin alike, if those are in its cache: once it
has begun to compute them itself or, of what is read from elsewhere, when all of it has come. So
a stretch of blocks that a call computes where it is kept is common from its plan on, and one that
is read from when the call begins to decode; until then it is the call's alone. What two calls
read at the same time is there twice, in engines and here.

Prompts are compared at some marks, the same for all and the farther apart the farther behind, so
that a long prompt has a few dozen stretches. A stretch is known by the hash of its last block,
which stands for all before it; what a prompt has in common with others is found by bisection.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

from coordinator.standing import Standing
from coordinator.state import Call, State, Worker

STRETCH_TOKENS = 512
"""The first stretches', a block at least."""
STRETCHES_ALIKE = 4
"""Each is then longer by a fourth of what is before it."""
MARKED_BLOCKS = 1 << 20
"""What is behind them in a prompt is its own."""
PLACE_BITS = 6
"""A stretch's place is part of its key, so that a hash that occurs twice does no harm."""


class Rooms:
    """The only writer of what calls have reserved, but for what peers hold and what moves take."""

    def __init__(self, state: State, standing: Standing) -> None:
        self._state = state
        self._standing = standing

    def spared(self, call: Call) -> Callable[[str], int]:
        """Of the blocks that a call would need on a worker, those that others have reserved."""
        workers, known = self._state.workers, list[Sequence[int]]()

        def spared(name: str) -> int:
            worker = workers[name]
            if not worker.beginnings:
                return 0
            marks = marks_of(worker)
            if not known:
                # All engines have blocks of one size.
                known.append(_stretches(call, marks))
            common = _common(known[0], worker.beginnings)
            return marks[common]

        return spared

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
        marks = marks_of(worker)
        last = bisect_right(marks, marks[first] + call.decode_blocks - 1) - 1
        stretches = _stretches(call, marks)[:last]
        if len(stretches) > first and stretches[first] not in worker.beginnings:
            new_blocks = _join(stretches, first, worker.beginnings, marks)
            blocks = marks[len(stretches)] - marks[first]
            worker.kv_blocks_shared += blocks - new_blocks
            worker.kv_blocks_reserved -= blocks - new_blocks
            call.decode_blocks -= blocks
            call.decode_stretches = len(stretches)
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
        marks = marks_of(worker)
        stretches = _stretches(call, marks)[: bisect_right(marks, blocks - 1) - 1]
        if not computes:
            del stretches[_common(stretches, worker.beginnings) :]
        new_blocks = _join(stretches, 0, worker.beginnings, marks)
        alone = blocks - marks[len(stretches)]
        worker.kv_blocks_reserved += alone + new_blocks
        worker.kv_blocks_shared += marks[len(stretches)] - new_blocks
        self._standing.touch(worker)
        return alone, len(stretches)

    def _give_back(self, call: Call, worker: Worker, alone: int, count: int) -> None:
        marks = marks_of(worker)
        freed_blocks = _leave(_stretches(call, marks)[:count], worker.beginnings, marks)
        blocks = alone + freed_blocks
        worker.kv_blocks_reserved -= blocks
        worker.kv_blocks_shared -= marks[count] - freed_blocks
        worker.kv_blocks_used = max(0, worker.kv_blocks_used - blocks)
        self._standing.touch(worker)
        self._state.room_changed = True


def checked_blocks(worker: Worker) -> int:
    """What calls have reserved there, summed up anew; AssertionError if that is not kept."""
    marks = marks_of(worker)
    taken = [(call, call.decode_blocks, call.decode_stretches) for call in worker.decodes.values()]
    taken += [
        (call, call.prefill_blocks, call.prefill_stretches) for call in worker.prefills.values()
    ]
    users = Counter(
        stretch for call, _, count in taken for stretch in _stretches(call, marks)[:count]
    )
    assert worker.beginnings == users, worker.name
    places = [stretch % (1 << PLACE_BITS) for stretch in users]
    common_blocks = sum(marks[place + 1] - marks[place] for place in places)
    shared_blocks = sum(marks[count] for _, _, count in taken) - common_blocks
    assert worker.kv_blocks_shared == shared_blocks, worker.name
    return sum(alone for _, alone, _ in taken) + common_blocks


def marks_of(worker: Worker) -> Sequence[int]:
    """Blocks before each mark: of no stretch, of one, of two and so on."""
    return _marks(max(1, STRETCH_TOKENS // worker.facts.block_size))


@cache
def _marks(stretch_blocks: int) -> tuple[int, ...]:
    marks = [0]
    while marks[-1] < MARKED_BLOCKS:
        longer = marks[-1] // STRETCHES_ALIKE // stretch_blocks * stretch_blocks
        marks.append(marks[-1] + max(stretch_blocks, longer))
    assert len(marks) <= 1 << PLACE_BITS
    return tuple(marks)


def _stretches(call: Call, marks: Sequence[int]) -> list[int]:
    """Keys of those in the prompt's full blocks."""
    hashes = memoryview(call.submit.block_hashes).cast("Q")
    full = marks[1 : bisect_right(marks, len(hashes))]
    return [hashes[mark - 1] << PLACE_BITS | place for place, mark in enumerate(full)]


def _common(stretches: Sequence[int], beginnings: dict[int, int]) -> int:
    """How many of them some call has; who has one has all before it."""
    low, high = 0, len(stretches)
    while low < high:
        middle = (low + high) // 2
        if stretches[middle] in beginnings:
            low = middle + 1
        else:
            high = middle
    return low


def _join(
    stretches: Sequence[int], first: int, beginnings: dict[int, int], marks: Sequence[int]
) -> int:
    """Have those from the ``first`` on, too; blocks of those that nobody had."""
    new_blocks = 0
    for at in range(first, len(stretches)):
        users = beginnings.get(stretches[at], 0)
        beginnings[stretches[at]] = users + 1
        if not users:
            new_blocks += marks[at + 1] - marks[at]
    return new_blocks


def _leave(stretches: Sequence[int], beginnings: dict[int, int], marks: Sequence[int]) -> int:
    """Blocks of those that nobody has any more."""
    freed_blocks = 0
    for at, stretch in enumerate(stretches):
        users = beginnings[stretch] - 1
        if users:
            beginnings[stretch] = users
        else:
            del beginnings[stretch]
            freed_blocks += marks[at + 1] - marks[at]
    return freed_blocks

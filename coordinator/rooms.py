"""What calls take of workers' KV: prompts that begin alike take room for that once.

An engine gives the same blocks to requests that begin alike, if those are in its cache: once it
has begun to compute them itself or, of what is read from elsewhere, when all of it has come. So
a stride of blocks that a call computes where it is kept is common from its plan on, and one that
is read from when the call begins to decode; until then it is the call's alone. What two calls
read at the same time is there twice, in engines and here.

Strides are known by the hash of their last block, which stands for all before it, so that what a
prompt has in common with others is found by bisection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from coordinator.standing import Standing
from coordinator.state import Call, State, Worker

STRIDE_TOKENS = 512
"""What is common is counted in so many tokens, a block at least."""


class Rooms:
    """The only writer of what calls have reserved, but for what peers hold and what moves take."""

    def __init__(self, state: State, standing: Standing) -> None:
        self._state = state
        self._standing = standing

    def spared(self, call: Call) -> Callable[[str], int]:
        """Of the blocks that a call would need on a worker, those that others have reserved."""
        workers, strides = self._state.workers, list[int]()

        def spared(name: str) -> int:
            worker = workers[name]
            if not worker.beginnings:
                return 0
            stride = stride_blocks(worker)
            if not strides:
                # All engines have blocks of one size.
                strides.extend(_strides(call, stride))
            return _common(strides, worker.beginnings) * stride

        return spared

    def decode(self, call: Call, worker: Worker, blocks: int, *, computes: bool) -> None:
        """A call will be decoded there. ``computes``: all of its prompt that the worker lacks
        it computes itself."""
        call.decode, worker.decodes[call.key] = worker, call
        call.decode_blocks, call.decode_strides = self._take(call, worker, blocks, computes)

    def prefill(self, call: Call, worker: Worker, blocks: int, *, computes: bool) -> None:
        """The same of whoever computes its prompt for another one."""
        call.prefill, worker.prefills[call.key] = worker, call
        call.prefill_blocks, call.prefill_strides = self._take(call, worker, blocks, computes)

    def decodes(self, call: Call) -> None:
        """Its KV has come: others may have it in common now."""
        worker = call.decode
        assert worker is not None
        stride = stride_blocks(worker)
        most = (call.decode_blocks - 1) // stride
        strides = _strides(call, stride)[call.decode_strides :][:most]
        if strides and strides[0] not in worker.beginnings:
            new_blocks = _join(strides, worker.beginnings) * stride
            worker.kv_blocks_shared += len(strides) * stride - new_blocks
            call.decode_blocks -= len(strides) * stride
            call.decode_strides += len(strides)
            worker.kv_blocks_reserved -= len(strides) * stride - new_blocks
            self._standing.touch(worker)

    def leave_decode(self, call: Call) -> None:
        """It is not decoded there any more; nothing happens if it was not."""
        if call.decode is not None:
            del call.decode.decodes[call.key]
            self._give_back(call, call.decode, call.decode_blocks, call.decode_strides)
            call.decode, call.decode_blocks, call.decode_strides = None, 0, 0

    def leave_prefill(self, call: Call) -> None:
        """Nobody has to keep its prompt any more; nothing happens if nobody did."""
        if call.prefill is not None:
            del call.prefill.prefills[call.key]
            self._give_back(call, call.prefill, call.prefill_blocks, call.prefill_strides)
            call.prefill, call.prefill_blocks, call.prefill_strides = None, 0, 0

    def _take(self, call: Call, worker: Worker, blocks: int, computes: bool) -> tuple[int, int]:
        """What the call has reserved for itself alone, and how many strides with others."""
        stride = stride_blocks(worker)
        strides = _strides(call, stride)[: (blocks - 1) // stride]
        if not computes:
            del strides[_common(strides, worker.beginnings) :]
        new = _join(strides, worker.beginnings)
        alone = blocks - len(strides) * stride
        worker.kv_blocks_reserved += alone + new * stride
        worker.kv_blocks_shared += (len(strides) - new) * stride
        self._standing.touch(worker)
        return alone, len(strides)

    def _give_back(self, call: Call, worker: Worker, alone: int, strides: int) -> None:
        stride = stride_blocks(worker)
        freed = _leave(_strides(call, stride)[:strides], worker.beginnings)
        blocks = alone + freed * stride
        worker.kv_blocks_reserved -= blocks
        worker.kv_blocks_shared -= (strides - freed) * stride
        worker.kv_blocks_used = max(0, worker.kv_blocks_used - blocks)
        self._standing.touch(worker)
        self._state.room_changed = True


def checked_blocks(worker: Worker) -> int:
    """What calls have reserved there, summed up anew; AssertionError if that is not kept."""
    stride = stride_blocks(worker)
    users = Counter[int]()
    for call in worker.decodes.values():
        users.update(_strides(call, stride)[: call.decode_strides])
    for call in worker.prefills.values():
        users.update(_strides(call, stride)[: call.prefill_strides])
    assert worker.beginnings == users, worker.name
    assert worker.kv_blocks_shared == (users.total() - len(users)) * stride, worker.name
    alone = sum(call.decode_blocks for call in worker.decodes.values())
    alone += sum(call.prefill_blocks for call in worker.prefills.values())
    return alone + len(users) * stride


def stride_blocks(worker: Worker) -> int:
    """Blocks of a stride."""
    return max(1, STRIDE_TOKENS // worker.facts.block_size)


def _strides(call: Call, stride: int) -> list[int]:
    """Of all of the prompt's full blocks."""
    return memoryview(call.submit.block_hashes).cast("Q")[stride - 1 :: stride].tolist()


def _common(strides: Sequence[int], beginnings: dict[int, int]) -> int:
    """How many of them some call has; who has one has all before it."""
    low, high = 0, len(strides)
    while low < high:
        middle = (low + high) // 2
        if strides[middle] in beginnings:
            low = middle + 1
        else:
            high = middle
    return low


def _join(strides: Sequence[int], beginnings: dict[int, int]) -> int:
    """How many of them nobody had."""
    new = 0
    for stride in strides:
        users = beginnings.get(stride, 0)
        beginnings[stride] = users + 1
        new += not users
    return new


def _leave(strides: Sequence[int], beginnings: dict[int, int]) -> int:
    """How many of them nobody has any more."""
    freed = 0
    for stride in strides:
        users = beginnings[stride] - 1
        if users:
            beginnings[stride] = users
        else:
            del beginnings[stride]
            freed += 1
    return freed

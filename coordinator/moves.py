"""Running calls that are to go on on another worker, with their KV: what is reserved for them.

::

    DECODING on the source --Move--> the same, room reserved on the target
        |<--- declined, late, target lost: the room is given back, nothing else happens
        |
        +-- MoveReady --> the next attempt's plan: LOADING on the target, DECODING there

Until ``MoveReady`` the call is the source's and whatever happens to it there happens as ever; its
API process reads what the source has cached into the target's cache meanwhile. From the plan on it
is an attempt like any other, of a prompt that its worker has cached: what fails then is planned
anew. The plan alone decides: an API process that has not seen it goes on with the source, and gets
it again with whatever it says next.

Where to is asked of placement, as for a call whose whole prompt is computed where it is decoded.
The source is never the answer, nor is a worker that has not been seen to read from it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from coordinator.limits import Limits
from coordinator.policy.placement import Choice, Decision
from coordinator.protocol import Move, MoveDeclined, MoveReady, Placed
from coordinator.standing import Standing
from coordinator.state import Call, CallKey, CallPhase, Relocation, State, Worker

AGAIN_S = 5.0
"""How long a call is left alone that could not be moved."""

Incarnation = tuple[str, str]
Ask = Callable[[Call, float, set[Incarnation]], Decision]
"""Where a call would go that avoids some workers and computes its prompt where it is decoded."""


class Moves:
    """All moves under way, by what is reserved for them."""

    def __init__(self, state: State, standing: Standing, ask: Ask) -> None:
        self._state = state
        self._standing = standing
        self._ask = ask
        self._numbers = 0

    def begin(self, call: Call, now_s: float, reason: str, target: str = "") -> bool:
        """Move a running call, to ``target`` if that is named. False if that can't be now."""
        source = call.decode
        if call.phase is not CallPhase.DECODING or call.relocation is not None:
            return False
        if now_s < call.movable_from_s or source is None or not source.partial_reads:
            return False
        limits, workers = self._state.limits, self._state.workers.values()
        if _moving(source) >= limits.moves_per_worker:
            return False
        unfit = {
            (worker.name, worker.incarnation)
            for worker in workers
            if not _fits(call, source, worker, limits) or target not in ("", worker.name)
        }
        if len(unfit) == len(workers):
            return False
        choice = self._ask(call, now_s, unfit | call.avoid)
        found = self._state.workers[choice.decode] if isinstance(choice, Choice) else None
        if found is None or (found.name, found.incarnation) in unfit:
            return False
        assert isinstance(choice, Choice)
        self._reserve(call, found, choice.decode_blocks, now_s, reason)
        return True

    def _reserve(self, call: Call, target: Worker, blocks: int, now_s: float, reason: str) -> None:
        state = self._state
        self._numbers += 1
        call.relocation = Relocation(target, blocks, self._numbers)
        target.arriving[call.key] = call
        target.kv_blocks_reserved += blocks
        self._standing.touch(target)
        state.counters["moves_begun"] += 1
        # The API process keeps the bound; this is for one that says nothing.
        due_s = now_s + state.limits.move_s + state.limits.check_s
        state.deadlines.set(call.move_key, due_s)
        placed = Placed(target.name, target.incarnation)
        move = Move(call.request, call.attempt, self._numbers, placed, reason)
        state.send(call.api.peer, move)

    def is_current(self, call: Call, number: int) -> bool:
        """Whether a call is being moved, by that order."""
        return call.relocation is not None and call.relocation.number == number

    def arrived(self, call: Call, message: MoveReady, now_s: float) -> Choice | None:
        """The target has the call's KV: what it is to be planned with. None if it can't have it
        any more."""
        relocation = call.relocation
        assert relocation is not None
        target = relocation.target
        full = len(target.decodes) >= self._state.limits.calls_per_worker
        if full or not target.up or target.role == "prefill":
            self.forgotten(call)
            call.movable_from_s = now_s + AGAIN_S
            return None
        grown = max(call.generated_tokens, message.generated_tokens)
        call.generated_tokens = min(grown, max(0, call.submit.max_output_tokens))
        tokens = max(0, min(message.tokens, call.prompt_tokens - 1))
        self._free(call, relocation)
        self._state.counters["moves_made"] += 1
        self._state.counters["move_tokens"] += max(0, min(message.moved_tokens, tokens))
        return Choice(
            decode=target.name,
            prefill="",
            decode_blocks=relocation.blocks,
            prefill_blocks=0,
            cached_blocks=0,
            uncached_tokens=call.prompt_tokens - tokens,
            reason=f"moved with {tokens} tokens",
            held_blocks=max(call.held_blocks, tokens // self._state.block_size),
        )

    def declined(self, call: Call, message: MoveDeclined, now_s: float) -> None:
        """The call stays where it is."""
        self.forgotten(call)
        call.movable_from_s = float("inf") if message.for_good else now_s + AGAIN_S

    def target_lost(self, worker: Worker) -> None:
        """A worker is gone: what was on its way there stays where it is."""
        for call in list(worker.arriving.values()):
            self.forgotten(call)

    def due(self, key: CallKey, now_s: float) -> None:
        """The API process has not said anything for too long."""
        call = self._state.calls[key]
        self.forgotten(call)
        call.movable_from_s = now_s + AGAIN_S

    def forgotten(self, call: Call) -> None:
        """Give back what is reserved; nothing happens if the call is not being moved."""
        if call.relocation is not None:
            self._free(call, call.relocation)
            self._state.counters["moves_undone"] += 1

    def _free(self, call: Call, relocation: Relocation) -> None:
        target = relocation.target
        call.relocation = None
        del target.arriving[call.key]
        target.kv_blocks_reserved -= relocation.blocks
        self._standing.touch(target)
        self._state.deadlines.drop(call.move_key)
        self._state.room_changed = True


def _moving(source: Worker) -> int:
    return sum(call.relocation is not None for call in source.decodes.values())


def _fits(call: Call, source: Worker, worker: Worker, limits: Limits) -> bool:
    """Whether a call may go on on a worker as far as placement does not see to it."""
    needed_tokens = min(source.tokens_max, call.prompt_tokens + call.output_tokens)
    return (
        worker is not source
        and worker.up
        and worker.role != "prefill"
        and worker.partial_reads
        and source.name in worker.warm_sources
        and worker.tokens_max >= needed_tokens
        and len(worker.decodes) + len(worker.arriving) < limits.calls_per_worker
    )


def begin_some(
    moves: Moves, calls: Collection[Call], now_s: float, reason: str, target: str = ""
) -> tuple[int, int]:
    """Move as many running calls as can be now: how many are being moved, and how many are not."""
    for call in calls:
        moves.begin(call, now_s, reason, target)
    moving = sum(call.relocation is not None for call in calls)
    return moving, len(calls) - moving

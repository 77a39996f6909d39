"""A running call that is to go on on another worker, in an API process.

::

    holding --the source names what it has cached--> warming --the target has read it--> ready
       |                                                |                                  |
       +------------------------------------------------+----------------------------------+
       v                                                                                   v
    the call goes on where it is, and the core is told why                the next attempt's plan

All of that is beside the call: tokens go on coming from the source. What is asked of it is to hold
what it has cached of prompt and answer, as a peer that is pulled from. The target reads that into
its own cache, for a request whose one token nobody wants. Then only the core's plan is missing;
with that the source is stopped, and the target finds nearly all of the longer prompt in its cache.

Whatever fails or takes long before the plan ends the move and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from vllm.v1.engine import EngineCoreRequest

from coordinator import protocol
from coordinator.api.continuing import may_begin_elsewhere, needs_one_worker, resume_request
from coordinator.api.pulling import pull_request
from coordinator.limits import Limits
from coordinator.protocol import Placed, PrefillDone, move_attempt

if TYPE_CHECKING:
    from coordinator.api.calls import Call, Wire

logger = logging.getLogger("pythia.api")

TOKENS_LEFT_LEAST = 8
"""Of an answer, to be worth a move."""
READY_AGAIN_S = 1.0
"""How often the core is told anew that its plan may come."""

Step = Literal["holding", "warming", "ready"]
STEPS: dict[Step, frozenset[Step]] = {
    "holding": frozenset({"warming"}),
    "warming": frozenset({"ready"}),
    "ready": frozenset(),
}


class Discard(Protocol):
    """Tells a holder that its handle will not be read."""

    def __call__(self, done: PrefillDone, holder: Placed) -> None: ...


@dataclass(slots=True)
class Move:
    """One move of one call. ``request``: what both workers are asked for."""

    order: protocol.Move
    source: Placed
    side: int
    """What both workers know as the attempt."""
    request: EngineCoreRequest
    sent_s: float
    began_s: float
    """From when on ``move_s`` counts."""
    step: Step = "holding"
    held: PrefillDone | None = None
    """What the source holds and the target is to read."""
    ready: protocol.MoveReady | None = None
    told_s: float = 0.0

    def go(self, step: Step) -> None:
        """The only writer of ``step``."""
        assert step in STEPS[self.step], f"{self.order.request}: {self.step} -> {step}"
        self.step = step


@dataclass(slots=True)
class Moving:
    """What a call knows of its moves."""

    current: Move | None = None
    moves: int = 0
    """How many there were; each has names of its own on its workers."""
    number: int = 0
    """Of the last order that was heard of the core."""

    def restarted(self) -> None:
        """Another core counts anew, and knows of no move: one that is under way is over in time."""
        self.number = 0
        if self.current is not None:
            self.current.began_s = float("-inf")


@dataclass(slots=True)
class Moves:
    """All moves of an API process. ``held_s``: how long blocks have been held for an answer."""

    api: str
    wire: Wire
    limits: Limits
    tombstones: MutableMapping[tuple[str, int], float]
    discard: Discard
    held_s: Callable[[PrefillDone, float, float, float], float]
    under_way: dict[str, Call] = field(default_factory=dict)
    """By request."""

    def on_move(self, call: Call, order: protocol.Move, block_size: int, now_s: float) -> None:
        """Begin, unless the call can't be moved or that is an old order."""
        if order.attempt != call.attempt or order.number <= call.moving.number:
            return
        call.moving.number = order.number
        self.forget(call, now_s)
        reason, for_good = _unmovable(call, order)
        request = None if reason else _wanted(call, block_size)
        if request is None:
            self._decline(order, reason or "nothing to be moved", for_good)
            return
        assert call.plan is not None
        call.moving.moves += 1
        side = move_attempt(call.moving.moves)
        move = Move(order, call.plan.decode, side, request, now_s, now_s)
        message = protocol.Prefill(order.request, side, move.source.incarnation, cached_only=True)
        if self._send(move, move.source, message):
            call.moving.current = move
            self.under_way[order.request] = call
        else:
            self._decline(order, f"{move.source.worker} can't be reached")

    def on_done(
        self, call: Call | None, done: PrefillDone, worker: Placed, now_s: float, unix_s: float
    ) -> bool:
        """A worker has done its part. False if that was not waited for (any more)."""
        move = call.moving.current if call is not None else None
        if call is None or move is None or move.side != done.attempt:
            return False
        if move.step == "holding" and worker == move.source:
            self._held(call, move, done, now_s, unix_s)
        elif move.step == "warming" and worker == move.order.target:
            self._read(call, move, done, now_s)
        else:
            return False
        return True

    def on_failed(self, call: Call | None, failed: protocol.CallFailed, worker: Placed) -> bool:
        """A worker could not do its part. False if that was not waited for (any more)."""
        move = call.moving.current if call is not None else None
        if call is None or move is None or move.side != failed.attempt:
            return False
        if worker != (move.source if move.step == "holding" else move.order.target):
            return False
        if move.step == "warming" and failed.handle_refused:
            assert move.held is not None
            self.discard(move.held, move.source)
        self._end(call, failed.reason)
        return True

    def on_worker_gone(self, call: Call, lost: Placed, now_s: float) -> None:
        """A worker is lost, or the connection to it."""
        move = call.moving.current
        if move is not None and lost == move.order.target:
            self.forget(call, now_s)
            self._decline(move.order, f"{lost.worker} is lost")

    def tick(self, now_s: float) -> None:
        """End what takes too long; ask again for the plan."""
        for call in list(self.under_way.values()):
            move = call.moving.current
            assert move is not None
            if now_s - move.began_s >= self.limits.move_s:
                self.forget(call, now_s)
                self._decline(move.order, f"it is {move.step} for too long")
            elif move.ready is not None and now_s - move.told_s >= READY_AGAIN_S:
                move.told_s = now_s
                self.wire.to_core(move.ready)

    def forget(self, call: Call, now_s: float) -> None:
        """Stop what workers do for a move; nothing happens if there is none."""
        move, call.moving.current = call.moving.current, None
        if move is None:
            return
        del self.under_way[move.order.request]
        if move.step == "ready":
            return
        side = move.order.request, move.side
        busy = move.source if move.step == "holding" else move.order.target
        self.wire.to_worker(busy, protocol.Abort([side]), ())
        # It may be done already, its handle on the way here.
        self.tombstones[side] = now_s

    # --- steps --------------------------------------------------------------------------

    def _held(self, call: Call, move: Move, done: PrefillDone, now_s: float, unix_s: float) -> None:
        """The source holds what it has cached: the target is to read it."""
        late = self.held_s(done, move.sent_s, now_s, unix_s) > done.lease_s - done.margin_s
        if late or 2 * done.cached_tokens < done.prompt_tokens or not done.handle:
            # What is missing would have to be computed.
            if done.handle:
                self.discard(done, move.source)
            found = f"only {done.cached_tokens} of {done.prompt_tokens} tokens are cached"
            self._end(call, "the handle came late" if late else found)
            return
        target = move.order.target
        message = protocol.Prefill(
            move.order.request, move.side, target.incarnation, handle=done.handle
        )
        if self._send(move, target, message):
            move.go("warming")
            move.held = done
        else:
            self.discard(done, move.source)
            self._end(call, f"{target.worker} can't be reached")

    def _read(self, call: Call, move: Move, done: PrefillDone, now_s: float) -> None:
        """The target has it: it keeps it in its cache, and the plan may come."""
        if done.handle:
            self.discard(done, move.order.target)
        move.go("ready")
        order = move.order
        generated = len(call.tokens) - call.submitted_tokens
        move.ready = protocol.MoveReady(
            self.api,
            order.request,
            order.attempt,
            order.number,
            done.cached_tokens,
            generated,
            done.moved_tokens,
        )
        move.told_s = now_s
        logger.info("%s may go on on %s", order.request, order.target.worker)
        self.wire.to_core(move.ready)

    def _send(self, move: Move, worker: Placed, message: protocol.Prefill) -> bool:
        return self.wire.to_worker(worker, message, self.wire.encode(move.request))

    def _end(self, call: Call, reason: str) -> None:
        """Nobody does anything for it any more."""
        move, call.moving.current = call.moving.current, None
        assert move is not None
        del self.under_way[move.order.request]
        self._decline(move.order, reason)

    def _decline(self, order: protocol.Move, reason: str, for_good: bool = False) -> None:
        logger.info("%s is not moved to %s: %s", order.request, order.target.worker, reason)
        self.wire.to_core(
            protocol.MoveDeclined(
                self.api, order.request, order.attempt, order.number, reason, for_good
            )
        )


def _unmovable(call: Call, order: protocol.Move) -> tuple[str, bool]:
    """Why a call is not to be moved, empty if it is, and whether that stays so."""
    request = call.engine_request
    params = request.sampling_params
    assert params is not None
    if needs_one_worker(request) or not may_begin_elsewhere(request):
        return "its answer would be another one", True
    if call.phase != "decoding" or call.plan is None or call.plan.decode == order.target:
        return f"it is {call.phase}", False
    said = len(call.tokens) - call.resumed_tokens
    if params.max_tokens is not None and params.max_tokens - said < TOKENS_LEFT_LEAST:
        return "nearly all is said", False
    return "", False


def _wanted(call: Call, block_size: int) -> EngineCoreRequest | None:
    """Prompt and answer so far, in whole blocks and a token."""
    longer = resume_request(call.engine_request, call.tokens[call.resumed_tokens :])
    if longer is None:
        return None
    return pull_request(longer, len(longer.prompt_token_ids or ()) - 1, block_size)

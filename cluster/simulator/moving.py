"""What a simulated API process does with a running call that is to go on elsewhere.

The same conduct as ``coordinator.api.moving``, without vLLM's requests: the source is asked to
hold what it has cached, the target to read that, and then the core for the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cluster.simulator.call import Call
from cluster.simulator.events import Event, Events
from cluster.simulator.frames import Body, Work
from coordinator.limits import Limits
from coordinator.protocol import (
    Abort,
    CallFailed,
    Message,
    Move,
    MoveDeclined,
    MoveReady,
    Placed,
    Prefill,
    PrefillDone,
    move_attempt,
)

TOKENS_LEFT_LEAST = 8
"""As in ``coordinator.api.moving``."""


class Going:
    """One move of one call."""

    __slots__ = ("again", "body", "bound", "held", "order", "sent_s", "side", "source", "step")

    def __init__(self, order: Move, source: Placed, side: int, body: Body, now_s: float) -> None:
        self.order = order
        self.source = source
        self.side = side
        self.body = body
        self.sent_s = now_s
        self.step: Literal["holding", "warming", "ready"] = "holding"
        self.held: PrefillDone | None = None
        self.bound: Event | None = None
        self.again: Event | None = None


class Moves:
    """All moves of an API process. The functions are its own."""

    def __init__(
        self,
        name: str,
        events: Events,
        limits: Limits,
        repeat_s: float,
        send: Callable[[Placed, object], bool],
        to_core: Callable[[Message], object],
        bury: Callable[[str, int], None],
        discard: Callable[[PrefillDone, Placed], None],
        held_s: Callable[[PrefillDone, float], float],
    ) -> None:
        self._name = name
        self._events = events
        self._limits = limits
        self._repeat_s = repeat_s
        self._send = send
        self._to_core = to_core
        self._bury = bury
        self._discard = discard
        self._held_s = held_s
        self._going: dict[str, Going] = {}

    def on_move(self, call: Call, order: Move, block_size: int) -> None:
        """Begin, unless the call can't be moved or that is an old order."""
        if order.attempt != call.attempt or order.number <= call.move_number:
            return
        call.move_number = order.number
        self.forget(call)
        said = call.said(self._events.now_s)
        tokens = (call.submit.prompt_tokens + said - 1) // max(1, block_size) * block_size
        left = call.submit.max_output_tokens - said
        plan = call.plan
        decodes = call.phase == "decoding" and plan is not None and plan.decode != order.target
        if not decodes or left < TOKENS_LEFT_LEAST or tokens <= 0:
            self._decline(order)
            return
        assert plan is not None
        call.moves += 1
        body = Body(call.chain, tokens + 1, 1, call.submit.priority)
        side = move_attempt(call.moves)
        going = Going(order, plan.decode, side, body, self._events.now_s)
        message = Prefill(call.request, side, plan.decode.incarnation, cached_only=True)
        if self._send(plan.decode, Work(message, body)):
            self._going[call.request] = going
            going.bound = self._events.after(self._limits.move_s, self._late, call)
        else:
            self._decline(order)

    def on_done(self, call: Call | None, done: PrefillDone, worker: Placed) -> bool:
        """A worker has done its part. False if that was not waited for (any more)."""
        going = self._going.get(done.request)
        if call is None or going is None or going.side != done.attempt:
            return False
        if going.step == "holding" and worker == going.source:
            self._held(call, going, done)
        elif going.step == "warming" and worker == going.order.target:
            self._discard(done, worker)
            going.step = "ready"
            self._ready(call, going, done.cached_tokens, done.moved_tokens)
        else:
            return False
        return True

    def on_failed(self, call: Call | None, failed: CallFailed, worker: Placed) -> bool:
        """A worker could not do its part. False if that was not waited for (any more)."""
        going = self._going.get(failed.request)
        if call is None or going is None or going.side != failed.attempt:
            return False
        if worker != (going.source if going.step == "holding" else going.order.target):
            return False
        if going.step == "warming" and failed.handle_refused:
            assert going.held is not None
            self._discard(going.held, going.source)
        self._end(call, going)
        return True

    def on_worker_gone(self, call: Call, lost: Placed) -> None:
        """A worker is lost, or the connection to it."""
        going = self._going.get(call.request)
        if going is not None and lost == going.order.target:
            self.forget(call)
            self._decline(going.order)

    def forget(self, call: Call) -> None:
        """Stop what workers do for a move; nothing happens if there is none."""
        going = self.drop(call)
        if going is None or going.step == "ready":
            return
        busy = going.source if going.step == "holding" else going.order.target
        self._send(busy, Abort([(call.request, going.side)]))
        self._bury(call.request, going.side)

    def drop(self, call: Call) -> Going | None:
        """Its API process is gone, or nobody does anything for the move any more."""
        going = self._going.pop(call.request, None)
        if going is not None:
            self._events.cancel(going.bound)
            self._events.cancel(going.again)
        return going

    def restarted(self, call: Call) -> None:
        """Another core knows of no move, and counts anew."""
        self.forget(call)
        call.move_number = 0

    # --- steps --------------------------------------------------------------------------

    def _held(self, call: Call, going: Going, done: PrefillDone) -> None:
        late = self._held_s(done, going.sent_s) > done.lease_s - done.margin_s
        target = going.order.target
        message = Prefill(call.request, going.side, target.incarnation, handle=done.handle)
        lacking = 2 * done.cached_tokens < done.prompt_tokens
        if late or lacking or not self._send(target, Work(message, going.body)):
            self._discard(done, going.source)
            self._end(call, going)
        else:
            going.step, going.held = "warming", done

    def _ready(self, call: Call, going: Going, tokens: int, moved: int) -> None:
        order = going.order
        generated = call.said(self._events.now_s) - call.submitted_tokens
        self._to_core(
            MoveReady(
                self._name,
                call.request,
                order.attempt,
                order.number,
                tokens,
                max(0, generated),
                moved,
            )
        )
        going.again = self._events.after(self._repeat_s, self._ready, call, going, tokens, moved)

    def _late(self, call: Call) -> None:
        order = self._going[call.request].order
        self.forget(call)
        self._decline(order)

    def _end(self, call: Call, going: Going) -> None:
        self.drop(call)
        self._decline(going.order)

    def _decline(self, order: Move) -> None:
        self._to_core(
            MoveDeclined(self._name, order.request, order.attempt, order.number, "not now")
        )

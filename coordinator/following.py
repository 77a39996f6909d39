"""Calls that wait for KV which another call brings to their worker, instead of computing it again.

What is read from a peer or a host is found by an engine's next request only when all of it has
come. Who would compute it meanwhile waits in the queue, but lets others go before it: as long as
all would wait for what it computes once more, at most ``FOLLOWED_S``. It is placed anew when the
other call has its first token, is over, or that time has passed.
"""

from __future__ import annotations

from coordinator.ordering import Ordering
from coordinator.pace import Pace
from coordinator.policy.placement import Choice
from coordinator.rooms import Rooms
from coordinator.state import Call, State

FOLLOWED_S = 5.0
"""How long a call waits for KV that another one brings to its worker."""


class Following:
    """Of one core."""

    def __init__(self, state: State, rooms: Rooms, pace: Pace, queue: Ordering | None) -> None:
        """``queue``: of those that may follow, None: nobody does."""
        self._state = state
        self._rooms = rooms
        self._pace = pace
        self._queue = queue

    def waits(self, call: Call, choice: Choice, now_s: float) -> bool:
        """Whether a waiting call that may be planned so follows another one instead."""
        moves = choice.prefill or choice.pull or choice.loaded_blocks
        queue = self._queue
        if not moves or queue is None or now_s >= call.follows_until_s:
            return False
        if queue.at_door(call):
            # It would not count as under way.
            return False
        workers = self._state.workers
        known_tokens = call.prompt_tokens - choice.uncached_tokens
        blocks = known_tokens // self._state.block_size
        leader = self._rooms.leader(call, workers[choice.decode], blocks)
        if leader is None:
            return False
        compute_s = self._pace.speeds.prefill_s(choice.uncached_tokens, known_tokens)
        decoding = workers[choice.prefill or choice.decode].gauge.decoding
        wait_s = min(FOLLOWED_S, compute_s * (1 + decoding))
        queue.set_aside(call)
        call.follows = leader
        call.follows_until_s = min(call.follows_until_s, now_s + wait_s)
        leader.followers[call.key] = call
        self._set_due(call, call.follows_until_s)
        self._state.counters["calls_followed"] += 1
        return True

    def recall(self, call: Call, now_s: float) -> None:
        """It follows nobody any more; nothing happens if it does not."""
        if call.follows is None:
            return
        assert self._queue is not None
        del call.follows.followers[call.key]
        call.follows = None
        self._set_due(call, max(now_s + FOLLOWED_S, self._queue.recalled(call, now_s)))
        self._state.room_changed = True

    def lead_no_more(self, call: Call, now_s: float) -> None:
        """What it has brought is there, or will not come."""
        for follower in list(call.followers.values()):
            self.recall(follower, now_s)

    def _set_due(self, call: Call, due_s: float) -> None:
        self._state.deadlines.set(call.deadline_key, min(due_s, call.deadline_s))

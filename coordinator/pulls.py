"""Calls that read a part of their prompt from a peer's cache: what the peer holds for them.

A pull is the beginning of a plan. The peer is asked to hold what it has cached; its blocks
count there until they are where they are needed, as those of a prefill worker do. A pull that
comes to nothing, or to less, costs time and no more: the rest is computed as if it had never
been cached, but for what comes from a host where nothing is read.

No room is asked for on the peer: what it is to hold is in its cache, mostly in use by calls that
count there already. It counts as far as there is room.
"""

from __future__ import annotations

import msgspec

from coordinator.kv_index import KvIndex
from coordinator.pace import Pace
from coordinator.policy.placement import Choice
from coordinator.protocol import Pulled
from coordinator.standing import Standing
from coordinator.state import Call, CallPhase, State


class Pulls:
    """The accounts of all pulls."""

    def __init__(
        self, state: State, index: KvIndex, standing: Standing, pace: Pace, hosts: KvIndex
    ) -> None:
        """``index``: who holds which blocks in its cache; ``hosts``: on its host."""
        self._state = state
        self._index = index
        self._hosts = hosts
        self._standing = standing
        self._pace = pace

    def planned(self, call: Call, choice: Choice) -> None:
        """A call is to read from a peer. What it needs elsewhere is reserved already."""
        peer = self._state.workers[choice.pull]
        blocks = choice.pull_tokens // self._state.block_size + 1
        call.pull, call.pull_tokens = peer, choice.pull_tokens
        call.pulled_blocks = choice.pulled_blocks
        call.pull_blocks = min(blocks, max(0, peer.usable_blocks - peer.kv_blocks_reserved))
        peer.pulls[call.key] = call
        peer.kv_blocks_reserved += call.pull_blocks
        self._standing.touch(peer)
        self._state.counters["plans_pull"] += 1

    def answered(self, call: Call, message: Pulled, now_s: float) -> None:
        """What came of it. The peer's blocks still count if they are being read."""
        state, counters = self._state, self._state.counters
        tokens = min(call.pull_tokens, max(0, message.tokens))
        tokens -= tokens % state.block_size
        if message.missing and call.pull is not None:
            counters["pulls_missing"] += 1
            kept_blocks = tokens // state.block_size
            self._index.removed(call.pull.name, call.submit.block_hashes, kept_blocks)
        if tokens == 0:
            counters["pulls_unread"] += 1
            if message.late and call.pull is not None:
                call.pull.readable_from_s = now_s + state.limits.late_peer_s
            self.release(call)
        self._compute_rest(call, tokens, now_s)

    def peer_lost(self, call: Call, now_s: float) -> None:
        """The peer is gone. Whoever has not begun to read does without."""
        self.release(call)
        if call.phase is CallPhase.PULLING and call.plan is not None:
            # Should the plan not have arrived, it is sent once more: without the lost one.
            call.plan = msgspec.structs.replace(call.plan, pull_worker=None, pull_tokens=0)
            self._compute_rest(call, 0, now_s)

    def _compute_rest(self, call: Call, tokens: int, now_s: float) -> None:
        """Of what was to be pulled only ``tokens`` are: the rest is computed. Where that is nothing
        the engine loads what its host has."""
        if call.computing is None:
            return
        block_size, name = self._state.block_size, call.computing.name
        own_tokens = call.pull_tokens - call.pulled_blocks * block_size
        if tokens <= own_tokens:
            hosted = self._hosts.longest_prefix(call.submit.block_hashes, 0, (name,))
            own_tokens = max(own_tokens, hosted.get(name, 0) * block_size)
        lost_tokens = call.pull_tokens - max(tokens, own_tokens)
        if lost_tokens > 0:
            call.pulled_blocks -= lost_tokens // block_size
            call.pull_tokens -= lost_tokens
            call.computing.prefill_tokens += lost_tokens
            call.uncached_tokens += lost_tokens
            self._pace.grown(call, now_s)
            self._standing.touch(call.computing)

    def release(self, call: Call) -> None:
        """The peer holds nothing for the call any more; nothing happens if it did not."""
        peer = call.pull
        if peer is None:
            return
        del peer.pulls[call.key]
        peer.kv_blocks_reserved -= call.pull_blocks
        peer.kv_blocks_used = max(0, peer.kv_blocks_used - call.pull_blocks)
        call.pull, call.pull_blocks = None, 0
        self._standing.touch(peer)
        self._state.room_changed = True

    def forgotten(self, call: Call) -> None:
        """The attempt is over."""
        self.release(call)
        call.pull_tokens = call.pulled_blocks = 0

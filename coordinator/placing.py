"""Where a waiting call goes: what placement is asked, and whom it compares.

Up to ``Placement.compared_workers`` workers are all compared. In a larger cluster ``pythia``
and ``least_kv`` compare those that can be the answer: an eighth of that number each of the least
loaded decode and prefill workers and of those with the most room, and up to a half that hold
the most of the prompt. So what a decision costs grows with the logarithm of the cluster. Where
these are no answer all are asked, and so they are where nobody has room for sure, after a
failure and by the other policies, which are here to be compared with.
"""

from __future__ import annotations

from itertools import islice

import msgspec

from coordinator.kv_index import KvIndex
from coordinator.limits import Placement
from coordinator.pace import Pace
from coordinator.policy.joint import NO_HOST, Host, Hosts, Outlook
from coordinator.policy.placement import (
    NO_PREFILL_ROOM,
    NO_PREFILL_WORKER,
    NO_ROOM,
    Ask,
    Choice,
    Decision,
    Spared,
    decode_blocks,
    fits,
    none_spared,
    place,
    prefill_blocks,
)
from coordinator.policy.placer import Placer
from coordinator.rooms import Rooms
from coordinator.standing import Standing
from coordinator.state import Call, State

FEW_COMPARED = ("pythia", "least_kv")
"""Policies that compare only some workers of a large cluster."""


class Placing:
    """Asks the configured policy, or the ``placer``."""

    def __init__(
        self,
        state: State,
        index: KvIndex,
        standing: Standing,
        placement: Placement,
        placer: Placer | None,
        pace: Pace,
        hosts: KvIndex,
        rooms: Rooms,
    ) -> None:
        """``index``: who holds which blocks in its cache; ``hosts``: on its host."""
        self._state = state
        self._index = index
        self._hosts = hosts
        self._standing = standing
        self._placement = placement
        self._placer = placer
        self._pace = pace
        self._rooms = rooms

    def decide(self, call: Call, ask: Ask, now_s: float) -> Decision:
        """For the call that is first in the queue."""
        decision = self._decide(call, ask, now_s)
        if isinstance(decision, Choice) and self._counted_as_held:
            return self._apart(decision, ask, call.submit.block_hashes)
        return decision

    def _decide(self, call: Call, ask: Ask, now_s: float) -> Decision:
        workers = self._state.workers
        hashes = call.submit.block_hashes

        # What goes on elsewhere brings all that it has.
        spared = self._rooms.spared(call) if call.decode is None else none_spared
        if (
            self._placer is None
            and len(workers) > self._placement.compared_workers
            and self._placement.policy in FEW_COMPARED
        ):
            decision = self._near(call, ask, spared, now_s)
            if decision is not None:
                return decision
        hosted = self._hosts.longest_prefix(hashes) if len(self._hosts) else {}

        def cached() -> dict[str, int]:
            return self._usable(self._index.longest_prefix(hashes), hosted)

        if self._placer is not None:
            return self._placer.place(call, ask, workers.values(), cached, now_s)
        state = self._state
        return place(
            ask,
            workers.values(),
            cached,
            state.limits,
            self._placement,
            state.block_size,
            self._outlook(now_s, hosted),
            spared,
        )

    def _outlook(self, now_s: float, hosted: dict[str, int]) -> Outlook:
        hosts = Hosts(hosted, self._host) if len(self._hosts) else None
        return Outlook(self._pace.speeds, now_s, self._index.room, self._pace.reuse, hosts)

    def _host(self, worker: str) -> Host:
        """Both forget what was used longest ago: a host that is no larger than the cache forgets
        with it, one that is larger as much later. It may be full of what the index does not know:
        of what lies behind a gap, or was told in messages that were lost."""
        blocks = self._hosts.capacity(worker)
        if not blocks:
            return NO_HOST
        room = 0 if self._state.workers[worker].host_full else self._hosts.room(worker)
        return Host(room, min(1.0, self._index.capacity(worker) / blocks))

    @property
    def _counted_as_held(self) -> bool:
        """What hosts have counts as held: all policies but ``pythia`` know only cached from not,
        and what is loaded is not computed."""
        return len(self._hosts) > 0 and self._placement.policy != "pythia"

    def _usable(self, held: dict[str, int], hosted: dict[str, int]) -> dict[str, int]:
        """What counts as held."""
        if hosted and self._counted_as_held:
            return {name: max(held.get(name, 0), hosted.get(name, 0)) for name in (held | hosted)}
        return held

    def _apart(self, choice: Choice, ask: Ask, hashes: bytes) -> Choice:
        """What counted as held told apart: it is in a cache, or loaded."""
        computing = choice.prefill or choice.decode
        held = self._index.longest_prefix(hashes, 0, (choice.decode, computing))
        own_blocks = (ask.prompt_tokens - choice.uncached_tokens) // self._state.block_size
        loaded_blocks = max(0, own_blocks - held.get(computing, 0))
        return msgspec.structs.replace(
            choice,
            cached_blocks=min(choice.cached_blocks, held.get(choice.decode, 0)),
            # Engines read what a peer holds for them, or what their host has.
            loaded_blocks=0 if choice.pull else loaded_blocks,
        )

    def _near(self, call: Call, ask: Ask, spared: Spared, now_s: float) -> Decision | None:
        """What comes of comparing a few; None if that settles nothing."""
        state, standing, placement = self._state, self._standing, self._placement
        standing.renew()
        decoders, prefillers = standing.decoders, standing.prefillers
        if ask.avoid or not decoders or standing.largest_tokens <= ask.prompt_tokens:
            return None
        hashes = call.submit.block_hashes
        few = max(1, placement.compared_workers // 8)
        needed = decode_blocks(ask, placement, state.block_size)
        full = decoders.full(needed)
        if full:
            # Only who has some of it reserved can have room for the rest.
            begun = self._rooms.begun(call, 4 * placement.compared_workers)
            roomy = (
                name
                for name in begun
                if name in decoders and fits(state.workers[name], needed - spared(name, needed))
            )
            names = dict.fromkeys(islice(roomy, few))
            if not names:
                return NO_ROOM
        else:
            names = dict.fromkeys(decoders.first(few))
        names |= dict.fromkeys(prefillers.first(few))
        if ask.sibling in state.workers:
            names[ask.sibling] = None
        held = self._index.longest_prefix(hashes, 4 * few, names)
        names |= dict.fromkeys(held)
        hosted: dict[str, int] = {}
        if len(self._hosts):
            hosted = self._hosts.longest_prefix(hashes, 4 * few, names)
            names |= dict.fromkeys(hosted)
            held = self._index.longest_prefix(hashes, 4 * few, names)
        near = [state.workers[name] for name in names]
        decision = place(
            ask,
            near,
            lambda: self._usable(held, hosted),
            state.limits,
            placement,
            state.block_size,
            self._outlook(now_s, hosted),
            spared,
        )
        if full and decision is NO_ROOM:
            settled = True
        elif isinstance(decision, Choice):
            # Of ``least_kv``: others may have a link.
            settled = decision.reason != NO_PREFILL_WORKER or not prefillers
        else:
            blocks = prefill_blocks(ask, state.block_size)
            settled = decision is NO_PREFILL_ROOM and prefillers.full(blocks)
        return decision if settled else None

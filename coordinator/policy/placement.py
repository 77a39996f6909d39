"""Where a call decodes, and whether somebody else computes its prompt first.

Which workers may be asked: those that are up, can hold the prompt, have not failed the call
before if there are others, and have room. What is taken on a worker is the larger of
what is reserved and what the engine says is in use: outputs longer than their
reservation, and calls that another core has planned, count too. A worker on which nothing
is reserved always takes one call, whatever the numbers say, so that no call that fits an
engine waits for ever.

``pythia`` chooses decode worker and prefill worker together, by what they cost in seconds
(``joint``); where no prefill worker has room it knows what it costs to do without.

Every other ``Placement.policy`` chooses the decode worker first (``decode_choice``). Then
a dedicated worker computes the prompt iff enough of it is not cached on the decode worker
and a link to it is known to work; one of those with room, chosen by
``Placement.prefill_policy`` (``prefill_choice``). If all of them are full the call waits;
if there is none, the decode worker does it.

Pure functions of views; nothing is remembered between calls.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from coordinator.limits import Limits, Placement
from coordinator.policy.ask import Ask, cached_blocks_of
from coordinator.policy.decode_choice import DECODE_CHOICES
from coordinator.policy.joint import Outlook, Seen, cheapest
from coordinator.policy.prefill_choice import PREFILL_CHOICES
from coordinator.speeds import Speeds
from coordinator.view import WorkerView

__all__ = ["Ask", "Choice", "Decision", "Impossible", "Wait", "can_ever_hold", "place"]


class Choice(msgspec.Struct, frozen=True, gc=False):
    """Where a call goes. ``prefill`` empty: the decode worker prefills."""

    decode: str
    prefill: str
    decode_blocks: int
    """To reserve on the decode worker."""
    prefill_blocks: int
    """To reserve on the prefill worker."""
    cached_blocks: int
    """Of the prompt, on the decode worker."""
    uncached_tokens: int
    """To compute, on whoever prefills."""
    reason: str
    pull: str = ""
    """From whose cache the prompt's beginning comes to whoever prefills; empty: nobody's."""
    pull_tokens: int = 0
    """Of the prompt, in that cache."""
    pulled_blocks: int = 0
    """Of those, what whoever prefills has not cached itself."""
    seen: Seen | None = None
    """What was compared."""
    loaded_blocks: int = 0
    """Of the prompt, what comes from the host of whoever prefills."""
    held_blocks: int = 0
    """Of the prompt, on whoever has the most of it, in a cache or on a host."""


class Wait(msgspec.Struct, frozen=True, gc=False):
    """Not now."""

    reason: str


class Impossible(msgspec.Struct, frozen=True, gc=False):
    """Not on any worker of this cluster, however long it waits."""

    reason: str


Decision = Choice | Wait | Impossible
Spared = Callable[[str, int], int]


def none_spared(_name: str, _blocks: int) -> int:
    """Nothing that a call needs is reserved for others."""
    return 0


NOTHING = Outlook(Speeds(), 0.0, lambda worker: 0, 0.0)
"""What is known before anything is: a guess of speeds, and that caches do not matter."""
NO_WORKER = Wait("no worker is up")
NO_ROOM = Wait("no worker has room")
NO_PREFILL_ROOM = Wait("no prefill worker has room")
NO_PREFILL_WORKER = "local: no prefill worker"


def decode_blocks(ask: Ask, placement: Placement, block_size: int) -> int:
    """What a call needs on the worker that decodes it."""
    output_tokens = min(ask.output_tokens, placement.reserve_output_tokens)
    return -(-(ask.prompt_tokens + output_tokens) // block_size)


def prefill_blocks(ask: Ask, block_size: int) -> int:
    """What a call needs on the worker that computes its prompt for another one."""
    return -(-ask.prompt_tokens // block_size)


def can_ever_hold(
    workers: Collection[WorkerView], prompt_tokens: int, roles_shared: bool = False
) -> bool:
    """Some registered worker that may decode is large enough for the prompt and one token.

    Whether it is up or not. Prefill workers count only where there are no others, or where
    roles are shared.
    """
    decoders = False
    for worker in workers:
        if roles_shared or worker.role != "prefill":
            decoders = True
            if worker.tokens_max > prompt_tokens:
                return True
    return not decoders and any(worker.tokens_max > prompt_tokens for worker in workers)


def place(
    ask: Ask,
    workers: Collection[WorkerView],
    cached: Callable[[], Mapping[str, int]],
    limits: Limits,
    placement: Placement,
    block_size: int,
    outlook: Outlook | None = None,
    spared: Spared = none_spared,
) -> Decision:
    """Choose workers for a call.

    ``workers``: all registered ones, with blocks of ``block_size`` tokens. ``cached``: how
    many leading blocks of the prompt each holds; asked for only when there is a choice.
    ``outlook``: what ``pythia`` knows of times, if anything; ``spared``: of the blocks that the
    call needs on a worker, those that are reserved for others already.
    """
    prompt_tokens = ask.prompt_tokens
    no_decoders = not any(worker.up and worker.role != "prefill" for worker in workers)
    able = [
        worker
        for worker in workers
        if worker.up
        and (no_decoders or placement.roles_shared or worker.role != "prefill")
        and worker.tokens_max > prompt_tokens
    ]
    if not able:
        if not workers or can_ever_hold(workers, prompt_tokens, placement.roles_shared):
            return NO_WORKER
        return Impossible(f"no worker can hold {prompt_tokens} prompt tokens")
    blocks = decode_blocks(ask, placement, block_size)
    roomy = [
        worker
        for worker in _with_room(_without(able, ask) or able, blocks, placement, spared)
        if len(worker.decodes) < limits.calls_per_worker
    ]
    if not roomy:
        return NO_ROOM
    held = cached()
    if placement.policy == "pythia":
        others = () if no_decoders else _without(workers, ask)
        known = outlook or NOTHING
        return _jointly(ask, others, roomy, held, limits, placement, block_size, known, spared)
    decode = _sibling(ask, roomy) or DECODE_CHOICES[placement.policy](
        ask, roomy, blocks, held, placement, block_size
    )
    cached_blocks = cached_blocks_of(ask, held, decode, block_size)
    alone = ask.aggregated or no_decoders or placement.disaggregated == "never"
    local = Choice(
        decode=decode.name,
        prefill="",
        decode_blocks=min(blocks, decode.usable_blocks),
        prefill_blocks=0,
        cached_blocks=cached_blocks,
        held_blocks=max(held.values(), default=0),
        uncached_tokens=prompt_tokens - cached_blocks * block_size,
        reason="local: served aggregated" if alone else "local: few uncached tokens",
    )
    if alone or local.uncached_tokens < _remote_from_tokens(placement):
        return local
    linked = [
        worker
        for worker in _without(workers, ask)
        if worker.role != "decode"
        and worker.up
        and worker.name in decode.warm_sources
        and worker.tokens_max > prompt_tokens
    ]
    return _with_prefill(ask, local, linked, held, limits, placement, block_size, spared)


def _jointly(
    ask: Ask,
    workers: Collection[WorkerView],
    roomy: Sequence[WorkerView],
    held: Mapping[str, int],
    limits: Limits,
    placement: Placement,
    block_size: int,
    outlook: Outlook,
    spared: Spared,
) -> Choice:
    """Decode worker and way to have the prompt's KV there, chosen together."""
    alone = ask.aggregated or placement.disaggregated == "never"
    sibling = _sibling(ask, roomy)
    needed = prefill_blocks(ask, block_size)
    prefillers: Sequence[WorkerView] = ()
    if not alone:
        prefillers = [
            worker
            for worker in _with_room(workers, needed, placement, spared)
            if worker.role != "decode"
            and worker.up
            and worker.tokens_max > ask.prompt_tokens
            and worker.prefilling < limits.prefills_per_worker
        ]
    peers = workers if placement.pulls and not alone and held else ()
    decode, prefill, seconds, pull, pull_blocks, seen = cheapest(
        ask,
        [sibling] if sibling else roomy,
        prefillers,
        held,
        placement,
        block_size,
        outlook,
        peers,
        limits.pull_s,
    )
    computing = prefill or decode
    own_blocks = cached_blocks_of(ask, held, computing, block_size)
    held_blocks, loaded_blocks = max(held.values(), default=0), 0
    if outlook.hosts is not None:
        held_blocks = max(held_blocks, max(outlook.hosts.held.values(), default=0))
        if not pull:
            # Engines read what a peer holds for them, or what their host has.
            hosted_blocks = cached_blocks_of(ask, outlook.hosts.held, computing, block_size)
            loaded_blocks = max(0, hosted_blocks - own_blocks)
            own_blocks += loaded_blocks
    way = f"remote: {seconds:.3f} s" if prefill else f"local: {seconds:.3f} s"
    if pull:
        way += f", {pull_blocks * block_size} tokens from {pull}"
    return Choice(
        decode=decode.name,
        prefill=prefill.name if prefill else "",
        decode_blocks=min(decode_blocks(ask, placement, block_size), decode.usable_blocks),
        prefill_blocks=min(needed, prefill.usable_blocks) if prefill else 0,
        cached_blocks=cached_blocks_of(ask, held, decode, block_size),
        uncached_tokens=ask.prompt_tokens - max(own_blocks, pull_blocks) * block_size,
        reason=way,
        pull=pull,
        pull_tokens=pull_blocks * block_size,
        pulled_blocks=max(0, pull_blocks - own_blocks),
        seen=seen,
        loaded_blocks=loaded_blocks,
        held_blocks=held_blocks,
    )


def _remote_from_tokens(placement: Placement) -> int:
    return 0 if placement.disaggregated == "always" else placement.remote_prefill_min_tokens


def _with_prefill(
    ask: Ask,
    local: Choice,
    linked: Sequence[WorkerView],
    held: Mapping[str, int],
    limits: Limits,
    placement: Placement,
    block_size: int,
    spared: Spared,
) -> Decision:
    """Add one of the prefill workers that ``local.decode`` can pull from."""
    if not linked:
        return msgspec.structs.replace(local, reason=NO_PREFILL_WORKER)
    blocks = prefill_blocks(ask, block_size)
    roomy = [
        worker
        for worker in _with_room(linked, blocks, placement, spared)
        if worker.prefilling < limits.prefills_per_worker
    ]
    if not roomy:
        return NO_PREFILL_ROOM
    prefill = PREFILL_CHOICES[placement.prefill_policy](ask, roomy, held, block_size)
    own_blocks = cached_blocks_of(ask, held, prefill, block_size)
    return Choice(
        decode=local.decode,
        prefill=prefill.name,
        decode_blocks=local.decode_blocks,
        prefill_blocks=min(blocks, prefill.usable_blocks),
        cached_blocks=local.cached_blocks,
        held_blocks=local.held_blocks,
        uncached_tokens=ask.prompt_tokens - own_blocks * block_size,
        reason=f"remote: {local.uncached_tokens} tokens not cached on {local.decode}",
    )


def _sibling(ask: Ask, roomy: Sequence[WorkerView]) -> WorkerView | None:
    """The worker of the call's group, if it has room."""
    if ask.sibling:
        for worker in roomy:
            if worker.name == ask.sibling:
                return worker
    return None


def _without(workers: Collection[WorkerView], ask: Ask) -> Collection[WorkerView]:
    if not ask.avoid:
        return workers
    return [worker for worker in workers if (worker.name, worker.incarnation) not in ask.avoid]


def _with_room(
    workers: Collection[WorkerView], blocks: int, placement: Placement, spared: Spared
) -> Collection[WorkerView]:
    """Those that have so many blocks free, or already reserved; one with nothing reserved always
    has."""
    if not placement.reserve:
        return workers
    return [
        worker
        for worker in workers
        if worker.kv_blocks_reserved == 0
        or fits(worker, blocks)
        or fits(worker, blocks - spared(worker.name, blocks))
    ]


def fits(worker: WorkerView, blocks: int) -> bool:
    """A worker has so many blocks free."""
    return (
        worker.kv_blocks_reserved + blocks <= worker.usable_blocks
        and worker.kv_blocks_used + blocks <= worker.usable_blocks
    )

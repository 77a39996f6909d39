"""Where a call is decoded and how its prompt's KV gets there, chosen together by what it costs.

For each worker that may decode the call, and each way to have the prompt's KV there,

    locally     behind the prompts that wait there, on top of what it holds of this one
    remotely    on another worker, behind those that wait there, then what the decode worker
                lacks is moved over the link between them
    pulled      either of them, behind what a peer has cached of it: the peer names it in a step
                of its own, and what is lacked of it is moved first

this is reckoned, in seconds of all calls together:

    own         until the first token, then decoding in the batch that will be there
    others      the calls that a worker decodes while it computes the prompt; longer steps of
                those decoded beside this one, for as long as both are
    later       calls that come while prompts wait, and wait longer for this one. Where it is
                computed makes no difference to how much work there is, so that all workers
                have one price: what makes it dear is what nobody has cached
    forgotten   what caches give up for the new KV is computed again, as far as it will be asked
                for, or loaded again where the host's memory keeps it for longer; KV beyond what
                a worker has is preempted

What a worker has of the prompt in its host's memory only is loaded before the rest is computed.

The least sum is taken. What was planned counts at once, so that decisions on the same reports do
not all fall alike. Affinity to caches, balance, whether disaggregation pays, and workers that
rather prefill or rather decode all come of the sums: there are no thresholds.

One estimate of queueing, prefill and transfer for each pair is Mooncake's ("Conductor", FAST
2025); costs to others, and of what is evicted, are Preble's ("E2", ICLR 2025).

Pure functions of views; nothing is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from coordinator.gauge import FADING_S, Gauge
from coordinator.limits import Placement
from coordinator.policy.ask import Ask
from coordinator.policy.sources import MESSAGES_S, STEPS_WAITED, Source, most_cached
from coordinator.speeds import Speeds
from coordinator.view import WorkerView

SHOWN_MOST = 4
"""Workers of which a choice keeps what was known."""
PREFILLERS_TRIED = 3
"""Of the workers that can compute a prompt soonest, for each that could decode."""
LINK_BYTES_PER_S = 10e9
LINK_FIXED_S = 5e-3
"""Of a link nobody has used yet."""
OVERFLOW_WEIGHT = 2.0
"""What is preempted is computed again, and others wait meanwhile."""
BUSY_MOST = 0.9
"""A worker is taken to spend at most this share of its time on prompts."""


class Host(NamedTuple):
    """A worker's room in its host's memory: ``room`` blocks before any is forgotten there; of what
    the cache forgets then, ``share`` is forgotten by the host as soon."""

    room: int
    share: float


NO_HOST = Host(0, 1.0)


class Hosts(NamedTuple):
    """What workers keep in their hosts' memory: ``held`` blocks of the prompt, and what room they
    have."""

    held: Mapping[str, int]
    of: Callable[[str], Host]


class Outlook(NamedTuple):
    """What is known beyond the workers. ``room``: blocks that a worker's cache takes before it
    forgets any; ``reuse``: share of prompts that is found in caches; ``hosts``: None if nobody
    keeps anything there."""

    speeds: Speeds
    now_s: float
    room: Callable[[str], int]
    reuse: float
    hosts: Hosts | None = None


class Glance(NamedTuple):
    """What a worker decoded, and had room for, when it was considered. ``capacity``: blocks for
    all that it decodes, what calls have in common counted for each."""

    decoding: int
    context_tokens: float
    left_tokens: float
    batch: int
    room: int
    capacity: int
    host: Host


class Seen(NamedTuple):
    """What a choice was made of, for whoever asks later. ``places``: the chosen one and some."""

    costs: _Costs
    ways: Sequence[_Way]
    sources: Sequence[Source]
    places: list[tuple[_Place, Glance]]


class Option(msgspec.Struct, frozen=True, gc=False):
    """One of the ways that were compared; seconds. ``prefill`` empty: on ``decode`` itself;
    ``pull``: from whose cache the prompt's beginning comes, if from any.

    ``total_s`` is the sum that was compared: ``first_token_s`` (in which ``waiting_s`` behind
    other prompts and ``moving_s`` to whoever decodes), ``decode_s``, and what it costs others:
    ``others_s`` those that are there, ``later_s`` those that come meanwhile, ``forgotten_s``
    computing again what caches give up. ``cached_tokens`` are in the cache of ``decode``,
    ``loaded_tokens`` come from the host of whoever computes the prompt.
    """

    decode: str
    prefill: str
    total_s: float
    first_token_s: float
    waiting_s: float
    moving_s: float
    decode_s: float
    others_s: float
    later_s: float
    forgotten_s: float
    cached_tokens: int
    pull: str = ""
    loaded_tokens: int = 0


class Found(NamedTuple):
    """Where to decode, what it costs; ``prefill`` None: there. ``pull``: whose first
    ``pull_blocks`` of the prompt come to whoever computes it."""

    decode: WorkerView
    prefill: WorkerView | None
    seconds: float
    pull: str = ""
    pull_blocks: int = 0
    seen: Seen | None = None


class _Place(NamedTuple):
    """A worker as this call finds it. ``cached``: blocks of the prompt that are of use there;
    ``own_s``: to compute the rest, ``waiting_s``: before that; ``share`` of its time that it
    computed prompts lately, ``prompts_per_s``: how many; ``loaded``: blocks that only its host
    has, ``load_s``: until they are there."""

    worker: WorkerView
    cached: int
    own_s: float
    waiting_s: float
    share: float
    prompts_per_s: float
    loaded: int = 0
    load_s: float = 0.0


class _Way(NamedTuple):
    """A worker that can compute the prompt for another one; ``others_s``: what others pay."""

    seconds: float
    name: str
    ready_s: float
    others_s: float
    worker: WorkerView
    place: _Place
    pull: str = ""


def cheapest(
    ask: Ask,
    roomy: Sequence[WorkerView],
    prefillers: Sequence[WorkerView],
    held: Mapping[str, int],
    placement: Placement,
    block_size: int,
    outlook: Outlook,
    peers: Collection[WorkerView] = (),
    pull_s: float = 0.0,
) -> Found:
    """The cheapest worker and way.

    ``roomy``: those that may decode, at least one; ``prefillers``: those that may compute the
    prompt for another one; ``peers``: those whose caches may be read, if they have said what they
    hold within ``pull_s``. With ``disaggregated`` = always nothing is computed locally that
    can be computed elsewhere.
    """
    costs = _Costs(ask, held, placement, block_size, outlook)
    places = {worker.name: costs.place(worker) for worker in roomy}
    for worker in prefillers:
        if worker.name not in places:
            places[worker.name] = costs.place(worker)
    costs.set_price(places.values())
    sources = costs.sources(peers, pull_s) if peers else []
    free = prefillers
    able = [places[worker.name] for worker in roomy]
    if costs.promises:
        free = [worker for worker in free if not costs.breaks_promise(places[worker.name])]
        able = [place for place in able if not costs.held_up(place)] or able
    ways = [costs.way(places[worker.name], sources) for worker in free or prefillers]
    ways = sorted(ways)[:PREFILLERS_TRIED]
    found: list[tuple[float, str, str, str]] = []
    most = float("inf")
    # Who holds the most is first: what cannot be the best any more then is not looked into.
    able.sort(key=_cached, reverse=True)
    for place in able:
        seconds, prefill, pull = costs.of(place, ways, sources, most)
        if seconds <= most:
            found.append((seconds, place.worker.name, prefill, pull))
            most = seconds
    # Ties go to the smallest names.
    found.sort()
    seconds, name, prefill, pull = found[0]
    computes = places[prefill].worker if prefill else None
    blocks = next((source.blocks for source in sources if source.name == pull), 0)
    seen = Seen(costs, ways, sources, _glances(name, found, places, outlook))
    return Found(places[name].worker, computes, seconds + costs.alone_s, pull, blocks, seen)


def _cached(place: _Place) -> int:
    return place.cached + place.loaded


def _glances(
    chosen: str,
    found: Sequence[tuple[float, str, str, str]],
    places: Mapping[str, _Place],
    outlook: Outlook,
) -> list[tuple[_Place, Glance]]:
    """Of the chosen worker, others that were the best so far, and some more."""
    names = dict.fromkeys([chosen, *(name for _, name, _, _ in found[:SHOWN_MOST])])
    for name in places:
        if len(names) >= SHOWN_MOST:
            break
        names[name] = None
    glances = []
    for name in names:
        place = places[name]
        worker, gauge = place.worker, place.worker.gauge
        glance = Glance(
            gauge.decoding,
            gauge.context_tokens,
            gauge.left_tokens,
            len(worker.decodes),
            outlook.room(name),
            worker.usable_blocks + worker.kv_blocks_shared,
            outlook.hosts.of(name) if outlook.hosts is not None else NO_HOST,
        )
        glances.append((place, glance))
    return glances


def options(seen: Seen) -> list[Option]:
    """What was compared, as it was then, the cheapest first."""
    return sorted(seen.costs.options(seen), key=lambda each: each.total_s)


class _Costs:
    """Of one call, wherever it goes."""

    def __init__(
        self,
        ask: Ask,
        held: Mapping[str, int],
        placement: Placement,
        block_size: int,
        outlook: Outlook,
    ) -> None:
        self._held = held
        self._placement = placement
        self._block_size = block_size
        self._outlook = outlook
        self._hosts = outlook.hosts
        self._prompt_tokens = ask.prompt_tokens
        self._useful_blocks = (ask.prompt_tokens - 1) // block_size
        self._blocks = -(-ask.prompt_tokens // block_size)
        self._output_tokens = ask.expected_tokens or float(ask.output_tokens)
        self._always = placement.disaggregated == "always"
        self._gap_s = placement.gap_s
        self.promises = self._gap_s > 0.0
        """Workers owe what they decode a time between tokens."""
        self._preferred = placement.roles_shared
        """A role is what a worker does rather, not all that it does."""
        self._coefficients = outlook.speeds.prefill.coefficients
        _, token_s, pair_s = self._coefficients
        self._block_s = (token_s + pair_s * 0.5 * ask.prompt_tokens) * block_size
        """To compute a block again."""
        step_s, sequence_s, context_s = outlook.speeds.step.coefficients
        self._longer_s = sequence_s + context_s * (ask.prompt_tokens + 0.5 * self._output_tokens)
        """By how much this call makes steps longer."""
        self._step_s, self._sequence_s, self._context_s = step_s, sequence_s, context_s
        self.alone_s = self._output_tokens * (step_s + self._longer_s)
        """To decode it alone: the same everywhere."""
        self._later = self._arriving = 0.0

    def place(self, worker: WorkerView) -> _Place:
        """What does not depend on the way."""
        cached = self._held.get(worker.name, 0)
        if cached > self._useful_blocks:
            cached = self._useful_blocks
        cached_tokens = cached * self._block_size
        new_tokens = self._prompt_tokens - cached_tokens
        start_s, token_s, pair_s = self._coefficients
        own_s = start_s + new_tokens * (token_s + pair_s * (cached_tokens + 0.5 * new_tokens))
        place = _Place(worker, cached, own_s, *worker.gauge.reading(self._outlook.now_s))
        return place if self._hosts is None else self._beside_host(place, self._hosts)

    def _beside_host(self, place: _Place, hosts: Hosts) -> _Place:
        """What the host has beyond the cache is loaded, not computed."""
        hosted = min(self._useful_blocks, hosts.held.get(place.worker.name, 0))
        loaded = hosted - place.cached
        if loaded <= 0:
            return place
        own_s = self._compute_s(hosted * self._block_size)
        return place._replace(own_s=own_s, loaded=loaded, load_s=self._load_s(place.worker, loaded))

    def set_price(self, places: Collection[_Place]) -> None:
        """How many calls come, for each worker, before the prompts that wait by now are computed:
        so many seconds a second of work costs them. (Of an M/G/1 queue's busy period.)"""
        waiting_s = share = prompts_per_s = 0.0
        for place in places:
            waiting_s += place.waiting_s
            share += place.share
            prompts_per_s += place.prompts_per_s
        count = len(places)
        free = 1.0 - min(BUSY_MOST, share / count)
        self._arriving = self._placement.work_price * prompts_per_s / count / free
        self._later = self._arriving * waiting_s / count

    def later(self, compute_s: float) -> float:
        """How many calls that come later wait for each second of so much work."""
        return self._later + 0.5 * self._arriving * compute_s

    def sources(self, peers: Collection[WorkerView], pull_s: float) -> list[Source]:
        """The best peers to read from, those that hold the most first."""
        found = []
        for blocks, worker in most_cached(
            peers, self._held, self._useful_blocks, self._outlook.now_s
        ):
            gauge = worker.gauge
            waiting_s = gauge.reading(self._outlook.now_s)[0]
            step_s = self._step_s + self._sequence_s * len(worker.decodes)
            step_s += self._context_s * gauge.context_tokens
            ready_s = MESSAGES_S + waiting_s + STEPS_WAITED * step_s
            tokens = blocks * self._block_size
            others_s = gauge.decoding * (self._sequence_s + self._context_s * tokens)
            # Estimates may be wrong by a factor; one that comes too late is waited for in vain.
            if 2.0 * ready_s < pull_s:
                rest_s = self._compute_s(tokens)
                found.append(Source(blocks, worker.name, ready_s, others_s, rest_s))
        return found

    def way(self, place: _Place, sources: Sequence[Source]) -> _Way:
        """To compute the prompt there for another worker."""
        worker = place.worker
        gauge = worker.gauge
        decoding = gauge.decoding
        room = self._outlook.room(worker.name)
        capacity = worker.usable_blocks + worker.kv_blocks_shared
        forgotten_s = self._forgotten_s(worker, gauge, room, capacity, self._prompt_tokens)
        ready_s = place.waiting_s + place.load_s + place.own_s
        others_s, pull = place.own_s * (decoding + self.later(place.own_s)), ""
        for source in sources:
            if source.blocks <= place.cached:
                break
            if source.name in worker.warm_sources:
                moving_s = self._moving_s(source.name, worker, source.blocks - place.cached)
                came_s = max(source.ready_s + moving_s, place.waiting_s) + source.rest_s
                pay_s = source.rest_s * (decoding + self.later(source.rest_s)) + source.others_s
                if came_s + pay_s < ready_s + others_s:
                    ready_s, others_s, pull = came_s, pay_s, source.name
        others_s += forgotten_s
        return _Way(ready_s + others_s, worker.name, ready_s, others_s, worker, place, pull)

    def of(
        self, place: _Place, ways: Sequence[_Way], sources: Sequence[Source], most: float
    ) -> tuple[float, str, str]:
        """What the call costs beyond ``alone_s`` if it is decoded there, who computes its prompt
        then, an empty name: the same, and from whose cache it is pulled, if from any. Ways that
        cost more than ``most`` may be missed."""
        decode = place.worker
        here_s = self._decode_s(place, most)
        if here_s > most:
            return here_s, "", ""
        each = 1.0 + decode.gauge.decoding
        own_s = place.own_s * (each + self.later(place.own_s))
        local = (here_s + place.waiting_s + place.load_s + own_s, "", "")
        for source in sources:
            if source.blocks <= place.cached:
                break
            if here_s + source.ready_s + source.rest_s > most:
                continue
            if source.name in decode.warm_sources:
                moving_s = self._moving_s(source.name, decode, source.blocks - place.cached)
                ready_s = max(source.ready_s + moving_s, place.waiting_s)
                rest_s = source.rest_s * (each + self.later(source.rest_s))
                seconds = here_s + ready_s + rest_s + source.others_s
                if seconds < local[0]:
                    local = seconds, "", source.name
        found = [local]
        elsewhere = self._always or (self.promises and self.breaks_promise(place))
        for way in ways:
            if here_s + way.seconds > most and not elsewhere:
                break
            if way.worker is not decode and way.name in decode.warm_sources:
                # What waits here to be computed slows decoding when that begins.
                moving_s = self._moving_s(way.name, decode, self._blocks - place.cached)
                ready_s = max(way.ready_s + moving_s, place.waiting_s)
                found.append((here_s + ready_s + way.others_s, way.name, way.pull))
        return min(found[1:] if elsewhere and len(found) > 1 else found)

    def breaks_promise(self, place: _Place) -> bool:
        """Computing the prompt would leave a worker too little time for the tokens that it owes.
        One without roles owes none."""
        gap_s, decode = self._gap_s, place.worker
        owes = decode.ending or decode.role == "decode"
        owes = owes or (self._preferred and decode.role == "prefill" and len(decode.decodes) > 0)
        if not owes:
            return False
        step_s = self._step_s + self._sequence_s * len(decode.decodes)
        step_s += self._context_s * decode.gauge.context_tokens
        share = place.share + (place.waiting_s + place.own_s) / FADING_S
        return step_s > gap_s * (1.0 - share)

    def held_up(self, place: _Place) -> bool:
        """Prompts leave a prefill worker too little time for the tokens of one call more."""
        gap_s, decode = self._gap_s, place.worker
        if not self._preferred or decode.role != "prefill":
            return False
        step_s = self._step_s + self._sequence_s * len(decode.decodes) + self._longer_s
        step_s += self._context_s * decode.gauge.context_tokens
        return step_s > gap_s * (1.0 - place.share - place.waiting_s / FADING_S)

    def _compute_s(self, cached_tokens: int) -> float:
        """To compute what comes behind so many tokens of the prompt."""
        start_s, token_s, pair_s = self._coefficients
        new_tokens = self._prompt_tokens - cached_tokens
        return start_s + new_tokens * (token_s + pair_s * (cached_tokens + 0.5 * new_tokens))

    def _load_s(self, worker: WorkerView, blocks: float) -> float:
        """Until so many blocks have come from the worker's host."""
        return blocks * worker.kv_bytes_per_block / self._placement.host_bytes_per_s

    def _again_s(
        self, worker: WorkerView, lost_blocks: float, new_blocks: float, host: Host
    ) -> float:
        """To have again what a worker's cache gives up, as far as it will be asked for. The host
        has it for as long as there is room for what is new, and where it holds more than the
        cache, for longer."""
        reuse = self._outlook.reuse
        if self._hosts is None:
            return reuse * self._block_s * lost_blocks
        computed = host.share * min(lost_blocks, max(0.0, new_blocks - max(0, host.room)))
        return reuse * (self._block_s * computed + self._load_s(worker, lost_blocks - computed))

    def _moving_s(self, source: str, target: WorkerView, blocks: int) -> float:
        """Until so many blocks have come."""
        size_bytes = blocks * target.kv_bytes_per_block
        link = target.link(source)
        if link is None or link.bytes_per_s <= 0.0:
            return LINK_FIXED_S + size_bytes / LINK_BYTES_PER_S
        return link.fixed_s + (size_bytes + link.in_flight_bytes) / link.bytes_per_s

    def _decode_s(self, place: _Place, most: float) -> float:
        """By how much decoding takes longer beside those that are there, and what that costs
        them; a part of it if that is more than ``most``."""
        decode, output_tokens = place.worker, self._output_tokens
        gauge, batch = decode.gauge, len(decode.decodes)
        step_s = self._step_s + self._sequence_s * batch + self._longer_s
        step_s += self._context_s * gauge.context_tokens
        together = min(gauge.left_tokens, output_tokens * batch)
        own_s = output_tokens * step_s - self.alone_s
        seconds = own_s + together * self._longer_s
        if seconds > most:
            return seconds
        room = self._outlook.room(decode.name)
        capacity = decode.usable_blocks + decode.kv_blocks_shared
        tokens = self._prompt_tokens + output_tokens
        return seconds + self._forgotten_s(decode, gauge, room, capacity, tokens)

    def _forgotten_s(
        self,
        worker: WorkerView,
        gauge: Gauge | Glance,
        room: int,
        capacity: int,
        tokens: float,
        host: Host | None = None,
    ) -> float:
        """To compute again what a worker gives up for so many tokens of the call. How it is comes
        from the caller, as it may have been some time ago."""
        block_size = self._block_size
        new_blocks = tokens / block_size - self._held.get(worker.name, 0)
        lost_blocks = new_blocks - max(0, room)
        seconds = 0.0
        if lost_blocks > 0.0:
            if host is None:
                host = self._hosts.of(worker.name) if self._hosts is not None else NO_HOST
            again_s = self._again_s(worker, lost_blocks, new_blocks, host)
            seconds = self._placement.forgotten * again_s * (1.0 + gauge.decoding + self._later)
        over_blocks = (gauge.context_tokens + tokens) / block_size - capacity
        if over_blocks > 0.0:
            seconds += OVERFLOW_WEIGHT * over_blocks * self._block_s
        return seconds

    def options(self, seen: Seen) -> Iterator[Option]:
        """Each place and way with its parts."""
        for place, glance in seen.places:
            decode = place.worker
            yield self._option(place, glance, None, None)
            for source in seen.sources:
                if source.blocks > place.cached and source.name in decode.warm_sources:
                    yield self._option(place, glance, None, source)
            for way in seen.ways:
                if way.worker is not decode and way.name in decode.warm_sources:
                    pulled = next((one for one in seen.sources if one.name == way.pull), None)
                    yield self._option(place, glance, way, pulled)

    def _option(
        self, place: _Place, glance: Glance, way: _Way | None, source: Source | None
    ) -> Option:
        output_tokens = self._output_tokens
        step_s = self._step_s + self._sequence_s * glance.batch + self._longer_s
        step_s += self._context_s * glance.context_tokens
        others_s = min(glance.left_tokens, output_tokens * glance.batch) * self._longer_s
        moving_s = 0.0
        computes = place if way is None else way.place
        compute_s = computes.own_s if source is None else source.rest_s
        waiting_s, later_s = computes.waiting_s, compute_s * self.later(compute_s)
        if way is not None:
            moving_s = self._moving_s(way.name, place.worker, self._blocks - place.cached)
            first_s = max(way.ready_s + moving_s, place.waiting_s)
            others_s += way.others_s - later_s
        elif source is not None:
            moving_s = self._moving_s(source.name, place.worker, source.blocks - place.cached)
            first_s = max(source.ready_s + moving_s, place.waiting_s) + compute_s
            others_s += compute_s * glance.decoding + source.others_s
        else:
            first_s = place.waiting_s + place.load_s + compute_s
            others_s += compute_s * glance.decoding
        tokens = self._prompt_tokens + output_tokens
        forgotten_s = self._forgotten_s(
            place.worker, glance, glance.room, glance.capacity, tokens, glance.host
        )
        decode_s = output_tokens * step_s
        return Option(
            decode=place.worker.name,
            prefill=way.name if way is not None else "",
            total_s=first_s + decode_s + others_s + later_s + forgotten_s,
            first_token_s=first_s,
            waiting_s=waiting_s,
            moving_s=moving_s,
            decode_s=decode_s,
            others_s=others_s,
            later_s=later_s,
            forgotten_s=forgotten_s,
            cached_tokens=place.cached * self._block_size,
            pull=source.name if source is not None else "",
            loaded_tokens=computes.loaded * self._block_size if source is None else 0,
        )

"""A placer that knows the workload: a bound to measure policies by, not a policy.

It knows how many tokens each call will generate and everything that its run will still ask
for, and reckons with the engines' own step times. For the call that is first it looks at
every way to serve it, on every worker with room for exactly its KV,

    prefill here        behind the prompts that wait here
    prefill elsewhere   behind those that wait there, then the KV is moved

and takes the one that adds the fewest seconds to all runs together:

    own        waiting, prefill, transfer, decoding in the batch that will be there
    others     the steps that its prefill delays, and longer steps for as long as both decode
    future     the work left of the runs whose contexts are here and of this one, as far as
               both will be there at once: their calls will delay each other
    forgotten  computing again what contexts of live runs have to give way for the new KV

First in the queue is the run with the least work left, within it the call with the longest
path to the end. As order counts only for calls that still wait in the core, none is sent
out while every worker has enough to prefill.

Not proven optimal, and not: it places one call at a time, does not know what an engine has
evicted, and takes batches to stay as they are. What no cluster can beat is in
``critical_path``; how far an informed policy gets is here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

from cluster.simulator.foresight import Foresight, foresee
from cluster.simulator.setup import ClusterSetup
from cluster.workload.form import Workload
from coordinator.cost import Link
from coordinator.policy.ask import Ask, cached_blocks_of
from coordinator.policy.placement import NO_ROOM, Choice, Decision, Wait, place
from coordinator.policy.placer import Placer
from coordinator.policy.queue import Rank, rank
from coordinator.protocol import Submit
from coordinator.state import Call, CallPhase, Worker

Lookup = Callable[[Submit], tuple[int, int] | None]
"""Which call of the workload this is: the run's position and the call's index."""

REQUEST = re.compile(r"(?P<run>[0-9]{1,9})[.-](?P<call>[0-9]{1,9})(?:[.-]|$)")
PREFILLERS_TRIED = 4
"""Of the workers that could prefill soonest, for each that could decode."""
HOLD_S = 0.25
"""Prompts that wait on a worker take at least this long: another one need not come yet."""
TYPICAL_CHUNK = 8192, 16384
TYPICAL_BATCH = 16, 16 * 16384
"""Where rates are taken that are needed as one number: a chunk behind a context; sequences and
their tokens together."""
PATH_BITS = 40
OVERLAP_SHARE = 0.3
"""Of the time that two runs of a worker could be served at once, what is reckoned with."""
FORGOTTEN_WEIGHT = 2.0
"""What is computed again also delays others. This and the share were chosen by trial, on
recorded coding sessions and on generated reviews."""

ALL_PREFILL = Wait("every worker has enough to prefill")


class _Burden(NamedTuple):
    """A run that lives on a worker. ``seconds``: what is left of it, as its neighbours feel it;
    ``tokens``: the context it will have."""

    seconds: float
    active: float
    tokens: int


class _Prefiller(NamedTuple):
    """A way to have the prompt computed."""

    ready_s: float
    delayed_s: float
    """What it costs the calls that are decoded there."""
    worker: Worker
    uncached_tokens: int


class _Served(NamedTuple):
    """What has been found out about the call in hand."""

    ask: Ask
    foresight: Foresight
    output_tokens: int
    blocks: int
    held: Mapping[str, int]
    burden: _Burden


def by_request(workload: Workload) -> Lookup:
    """Requests are named ``{run's position}.{call's index}.{anything}``; others are nobody's."""

    def lookup(submit: Submit) -> tuple[int, int] | None:
        named = REQUEST.match(submit.request)
        if named is None or int(named["run"]) >= len(workload.runs):
            return None
        run, call = int(named["run"]), int(named["call"])
        found = workload.runs[run]
        if call >= len(found.calls) or submit.context.run not in ("", found.id):
            return None
        return run, call

    return lookup


def clairvoyants(workload: Workload, setup: ClusterSetup) -> Callable[[], Placer]:
    """Makes placers for the cores of one replay, the first and those after crashes."""
    foreseen = foresee(workload, setup)
    lookup = by_request(workload)
    return lambda: Clairvoyant(setup, foreseen, lookup)


class Clairvoyant:
    """The placer of one core."""

    def __init__(
        self, setup: ClusterSetup, foreseen: Mapping[tuple[int, int], Foresight], lookup: Lookup
    ) -> None:
        """Of the cluster ``setup``; ``foreseen`` by what ``lookup`` says a call is."""
        self._lookup = lookup
        self._foreseen = foreseen
        self._setup = setup
        self._cost = setup.cost()
        self._block_size = setup.options.block_size
        self._places = {worker.name: worker for worker in setup.workers}
        self._homes: dict[str, dict[int, _Burden]] = {}
        """Runs whose contexts are on a worker and will be needed again."""
        self._home: dict[int, str] = {}
        new_tokens, context_tokens = TYPICAL_CHUNK
        self._token_s = self._cost.prefill_s(new_tokens, context_tokens) / new_tokens
        batch, tokens = TYPICAL_BATCH
        with_s = self._cost.decode_step_s(batch + 1, tokens + tokens // batch)
        alone_s = self._cost.decode_step_s(1, tokens // batch)
        self._neighbour = (with_s - self._cost.decode_step_s(batch, tokens)) / alone_s
        """How much of a second of decoding alone another sequence of the batch feels."""

    def rank(self, call: Call) -> Rank:
        """The least work left of its run, then the longest path to its end."""
        known = self._lookup(call.submit)
        if known is None:
            return rank(call)
        foresight = self._foreseen[known]
        remaining_us, path_us = int(1e6 * foresight.remaining_s), int(1e6 * foresight.path_s)
        return call.plans == 0, (remaining_us << PATH_BITS) - path_us, call.arrival

    def place(
        self,
        call: Call,
        ask: Ask,
        workers: Collection[Worker],
        cached: Callable[[], Mapping[str, int]],
        now_s: float,
    ) -> Decision:
        """The way that adds the fewest seconds; as the configured policy for unknown calls."""
        limits, known = self._setup.limits, self._lookup(call.submit)
        able = [each for each in workers if each.up and each.tokens_max > ask.prompt_tokens]
        if known is None or not able:
            return place(ask, workers, cached, limits, self._setup.placement, self._block_size)
        foresight = self._foreseen[known]
        output_tokens = max(1, foresight.output_tokens - call.generated_tokens)
        blocks = -(-(ask.prompt_tokens + output_tokens) // self._block_size)
        able = [each for each in able if (each.name, each.incarnation) not in ask.avoid] or able
        roomy = [
            each
            for each in able
            if _has_room(each, blocks) and len(each.decodes) < limits.calls_per_worker
        ]
        if not roomy:
            return NO_ROOM
        if all(self._backlog_s(each) > HOLD_S for each in able):
            return ALL_PREFILL
        seconds = foresight.after_prefill_s + foresight.after_decode_s * self._neighbour
        burden = _Burden(seconds, foresight.active, foresight.largest_tokens)
        served = _Served(ask, foresight, output_tokens, blocks, cached(), burden)
        choice = self._best(known[0], served, able, roomy)
        self._settle(known[0], served, choice.decode)
        return choice

    # --- ways -------------------------------------------------------------------------------

    def _best(
        self, run: int, served: _Served, able: Collection[Worker], roomy: Collection[Worker]
    ) -> Choice:
        """Of all ways the one that costs least; ties go to the smallest names."""
        prefill_s = self._prefill_times(served.ask)
        remote: list[_Prefiller] = []
        if not served.ask.aggregated:
            remote = sorted(
                self._prefillers(served, able, prefill_s),
                key=lambda each: (each.ready_s + each.delayed_s, each.worker.name),
            )[:PREFILLERS_TRIED]
        ways: list[tuple[float, str, str, Worker, _Prefiller]] = []
        own_tokens = served.ask.prompt_tokens + served.output_tokens
        for decode in roomy:
            here_s = self._decoding_s(served, decode) + self._future_s(run, served, decode)
            here_s += self._forgotten_s(run, served, decode, own_tokens)
            local = self._prefiller(served, decode, prefill_s)
            ways.append((here_s + local.ready_s + local.delayed_s, decode.name, "", decode, local))
            backlog_s = self._backlog_s(decode)
            for way in remote:
                if way.worker is decode or way.worker.name not in decode.warm_sources:
                    continue
                # What waits here to be prefilled slows decoding when that begins.
                ready_s = max(way.ready_s + self._moving_s(served, way.worker, decode), backlog_s)
                total_s = here_s + ready_s + way.delayed_s
                total_s += self._forgotten_s(run, served, way.worker, served.ask.prompt_tokens)
                ways.append((total_s, decode.name, way.worker.name, decode, way))
        seconds, _, prefill, decode, way = min(ways, key=lambda each: each[:3])
        prompt_blocks = -(-served.ask.prompt_tokens // self._block_size)
        return Choice(
            decode=decode.name,
            prefill=prefill,
            decode_blocks=min(served.blocks, decode.usable_blocks),
            prefill_blocks=min(prompt_blocks, way.worker.usable_blocks) if prefill else 0,
            cached_blocks=cached_blocks_of(served.ask, served.held, decode, self._block_size),
            uncached_tokens=way.uncached_tokens,
            reason=f"clairvoyant: {seconds:.3f} s",
        )

    def _prefill_times(self, ask: Ask) -> Callable[[int], float]:
        """Seconds to compute the prompt behind so many cached tokens; each reckoned once."""
        known: dict[int, float] = {}
        chunk_tokens = self._setup.options.max_num_batched_tokens

        def prefill_s(cached_tokens: int) -> float:
            if cached_tokens not in known:
                new_tokens = ask.prompt_tokens - cached_tokens
                known[cached_tokens] = self._cost.prefill_s(new_tokens, cached_tokens, chunk_tokens)
            return known[cached_tokens]

        return prefill_s

    def _prefillers(
        self, served: _Served, able: Collection[Worker], prefill_s: Callable[[int], float]
    ) -> Iterator[_Prefiller]:
        blocks = -(-served.ask.prompt_tokens // self._block_size)
        for worker in able:
            room = _has_room(worker, blocks)
            if room and worker.prefilling < self._setup.limits.prefills_per_worker:
                yield self._prefiller(served, worker, prefill_s)

    def _prefiller(
        self, served: _Served, worker: Worker, prefill_s: Callable[[int], float]
    ) -> _Prefiller:
        blocks = cached_blocks_of(served.ask, served.held, worker, self._block_size)
        cached_tokens = blocks * self._block_size
        own_s = prefill_s(cached_tokens)
        return _Prefiller(
            ready_s=self._backlog_s(worker) + own_s,
            delayed_s=own_s * sum(call.phase is CallPhase.DECODING for call in _decoded(worker)),
            worker=worker,
            uncached_tokens=served.ask.prompt_tokens - cached_tokens,
        )

    # --- seconds ----------------------------------------------------------------------------

    def _backlog_s(self, worker: Worker) -> float:
        """Until the prompts that a worker has are computed."""
        return worker.prefill_tokens * self._token_s

    def _moving_s(self, served: _Served, source: Worker, target: Worker) -> float:
        """Until what the target lacks of the prompt has come."""
        blocks = cached_blocks_of(served.ask, served.held, target, self._block_size)
        tokens = served.ask.prompt_tokens - blocks * self._block_size
        link = self._link(source.name, target.name)
        size_bytes = tokens * self._cost.kv_bytes_per_token / self._setup.tp
        moving_s = link.latency_s + size_bytes / link.bytes_per_s
        return moving_s + self._setup.network.transfer_fixed_s

    def _link(self, source: str, target: str) -> Link:
        network, one, other = self._setup.network, self._places[source], self._places[target]
        if one.node == other.node:
            tier = network.same_node
        else:
            tier = network.same_rack if one.rack == other.rack else network.across
        return network.links.get(tier) or self._setup.hardware.links[tier]

    def _decoding_s(self, served: _Served, decode: Worker) -> float:
        """To decode the call in the batch that is there, and what that costs the others."""
        count = len(decode.decodes)
        tokens = decode.kv_blocks_reserved * self._block_size
        own_tokens = served.ask.prompt_tokens + served.output_tokens
        without_s = self._cost.decode_step_s(count, tokens) if count else 0.0
        with_s = self._cost.decode_step_s(count + 1, tokens + own_tokens)
        together = sum(
            min(served.output_tokens, self._left_tokens(call)) for call in _decoded(decode)
        )
        return (served.output_tokens - 1) * with_s + together * (with_s - without_s)

    def _left_tokens(self, call: Call) -> int:
        """What a planned call will still generate, about: half if it has begun."""
        known = self._lookup(call.submit)
        tokens = self._foreseen[known].output_tokens if known else call.output_tokens
        return tokens // 2 if call.phase is CallPhase.DECODING else tokens

    def _forgotten_s(self, run: int, served: _Served, worker: Worker, tokens: int) -> float:
        """To compute again what a worker forgets if it is to hold so many tokens of the call.

        An engine forgets what was used longest ago, needed or not.
        """
        homes = self._homes.get(worker.name, {})
        needed = sum(other.tokens for number, other in homes.items() if number != run)
        share = min(1.0, needed / (worker.facts.kv_blocks * self._block_size))
        blocks = cached_blocks_of(served.ask, served.held, worker, self._block_size)
        new_tokens = tokens - blocks * self._block_size
        return FORGOTTEN_WEIGHT * share * new_tokens * self._token_s

    def _future_s(self, run: int, served: _Served, decode: Worker) -> float:
        """By how much the rest of this run and those that live on a worker delay each other."""
        if not served.foresight.continued:
            return 0.0
        own = served.burden
        # Each of two runs waits for the other.
        return (
            2.0
            * OVERLAP_SHARE
            * sum(
                min(other.seconds * own.active, own.seconds * other.active)
                for number, other in self._homes.get(decode.name, {}).items()
                if number != run
            )
        )

    def _settle(self, run: int, served: _Served, worker: str) -> None:
        """The run's context is there from now on, if it is needed any more.

        A call that nobody goes on from leaves the context where it was.
        """
        former = self._home.pop(run, None)
        if former is not None:
            del self._homes[former][run]
        if served.burden.seconds > 0.0:
            home = worker if former is None or served.foresight.continued else former
            self._home[run] = home
            self._homes.setdefault(home, {})[run] = served.burden


def _decoded(worker: Worker) -> Collection[Call]:
    return worker.decodes.values()


def _has_room(worker: Worker, blocks: int) -> bool:
    """For so many blocks; a worker with nothing reserved takes one call in any case."""
    taken = max(worker.kv_blocks_reserved, worker.kv_blocks_used)
    return worker.kv_blocks_reserved == 0 or taken + blocks <= worker.usable_blocks

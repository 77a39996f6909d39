"""Prefetches: the context of a run is moved to where its next call will be decoded.

::

    decoding  a call has its first token: if several calls of one agent are likely to follow it, all
              but one will be decoded elsewhere. They begin with what this one began with
    ended     a call of a live run is over: what follows is placed as if it had come by now
    look      right after either, when nobody waits for a plan: what is likely is asked for

Where the next call would go is asked of the placement itself. If that is a worker without a call, a
peer has what the call will begin with and the link between them has been used before, the API
process that served the run is asked to move it (``errands``). A prefetch is dropped in the moment
in which any call is planned onto one of the two workers.

Of each run its first call and the last one of some agents are remembered, by their block hashes.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from coordinator.errands import Errands
from coordinator.kv_index import KvIndex
from coordinator.limits import Placement
from coordinator.pace import Pace
from coordinator.policy.ask import Ask
from coordinator.policy.joint import Outlook
from coordinator.policy.placement import Choice, place
from coordinator.policy.prefetching import beginning, copies, likely
from coordinator.protocol import BLOCK_HASH_BYTES, Finished
from coordinator.state import Call, State, Worker
from coordinator.workflow.prediction import NextCall, Origin
from coordinator.workflow.roster import Run
from coordinator.workflow.tracker import Tracker

LOOKED_AT = 16
"""Runs from which on a look is enough: the rest is for the next one."""
AGAIN_S = 1e-3
LOOK_S = 5.0
"""Between two looks at what nobody has asked for."""
RUNS_MOST = 4096
AGENTS_MOST = 16
"""Of a run, whose last calls are remembered."""
MOVED_MOST = 8
"""Prefetches of a run that nobody has asked for yet."""
UNUSED_S = 120.0
"""What was moved and not asked for in so long was in vain."""
WAITED_MOST_S = 2.0
"""Behind prompts that wait where it is."""
MISSING_LEAST = 2
"""Blocks from which on it is worth a message."""


class Context(msgspec.Struct, frozen=True, gc=False):
    """A call of a run, as far as another one may begin like it."""

    api: str
    request: str
    hashes: bytes

    @property
    def blocks(self) -> int:
        """Full blocks of its prompt."""
        return len(self.hashes) // BLOCK_HASH_BYTES


class Moved(msgspec.Struct, frozen=True):
    """A prefetch: blocks ``first`` to ``blocks`` of ``hashes``."""

    worker: Worker
    hashes: bytes
    first: int
    blocks: int
    asked_s: float

    def begins(self, hashes: bytes) -> bool:
        """Whether a prompt begins with some of what was moved."""
        at = slice(self.first * BLOCK_HASH_BYTES, (self.first + 1) * BLOCK_HASH_BYTES)
        return hashes[at] == self.hashes[at] != b""


class Trail:
    """What is remembered of one run."""

    def __init__(self, first: Context) -> None:
        self.first = self.last = first
        self.worker: Worker | None = None
        """Where the last call is decoded."""
        self.of_agent: OrderedDict[str, Context] = OrderedDict()
        self.moved: list[Moved] = []
        """What has arrived and nobody has asked for yet."""

    def add(self, agent: str, context: Context) -> None:
        """A call was begun."""
        self.last = context
        self.of_agent.pop(agent, None)
        self.of_agent[agent] = context
        if len(self.of_agent) > AGENTS_MOST:
            self.of_agent.popitem(last=False)

    def contexts(self, agent: str) -> dict[Origin, Context]:
        """The calls that the next one of an agent may begin like."""
        found: dict[Origin, Context] = {"first": self.first, "previous": self.last}
        if agent in self.of_agent:
            found["own"] = self.of_agent[agent]
        return found


class Prefetches:
    """Of one core. Off, it remembers nothing."""

    def __init__(
        self,
        state: State,
        index: KvIndex,
        placement: Placement,
        tracker: Tracker,
        pace: Pace,
        errands: Errands,
    ) -> None:
        self._state = state
        self._index = index
        self.on = placement.prefetch and placement.policy == "pythia"
        self._placement = placement
        self._tracker = tracker
        self._pace = pace
        self._errands = errands
        errands.over = self._over
        self._trails: OrderedDict[Run, Trail] = OrderedDict()
        self._waiting: dict[Run, bool] = {}
        """Runs to look at, and whether their last call has ended."""
        self._moving: dict[int, tuple[Run, Moved]] = {}
        """By the number of the errand."""
        self._sweep_s = 0.0

    # --- what happens to calls ----------------------------------------------------------------

    def planned(self, call: Call) -> None:
        """A call goes to workers: has anything of it been moved there?"""
        trail = self._trails.get(call.run) if self.on and call.run is not None else None
        if trail is None or not trail.moved:
            return
        hashes, workers = call.submit.block_hashes, (call.decode, call.prefill)
        for moved in list(trail.moved):
            cached = moved.worker is not call.decode or call.cached_blocks > moved.first
            if moved.worker in workers and cached and moved.begins(hashes):
                trail.moved.remove(moved)
                self._state.counters["prefetches_used"] += 1

    def decoding(self, call: Call, now_s: float) -> None:
        """A call has its first token: its prompt is cached where it is decoded."""
        if not self._is_followed(call):
            return
        run = call.run
        assert run is not None
        context = Context(call.api.name, call.request, call.submit.block_hashes)
        trail = self._trails.get(run)
        if trail is None:
            trail = self._trails[run] = Trail(context)
            if len(self._trails) > RUNS_MOST:
                self._forget(next(iter(self._trails)))
        trail.add(call.submit.context.agent, context)
        trail.worker = call.decode
        self._look_at(run, False, now_s)

    def ended(
        self, call: Call, worker: Worker | None, message: Finished | None, now_s: float
    ) -> None:
        """A call is over."""
        if not self.on or call.run is None:
            return
        if not self._is_live(call.run):
            self._forget(call.run)
        elif message is not None and worker is not None and self._is_followed(call):
            self._look_at(call.run, True, now_s)

    def worker_lost(self, worker: Worker) -> None:
        """A worker is gone, and with it what was moved there."""
        for trail in self._trails.values():
            self._wasted(trail, [moved for moved in trail.moved if moved.worker is worker])

    # --- time -----------------------------------------------------------------------------------

    def look(self, now_s: float) -> None:
        """Ask for what is likely to be wanted next; give up what was not."""
        if self._waiting:
            self._tracker.learner.learn()
        for run in list(self._waiting)[:LOOKED_AT]:
            ended = self._waiting.pop(run)
            trail = self._trails.get(run)
            if trail is not None and self._is_live(run) and not run.final:
                self._consider(run, trail, ended, now_s)
        if now_s >= self._sweep_s:
            self._sweep_s = now_s + LOOK_S
            self._sweep(now_s)
        if self._trails:
            self._wake(now_s + (AGAIN_S if self._waiting else LOOK_S))

    def _sweep(self, now_s: float) -> None:
        for run, trail in list(self._trails.items()):
            self._wasted(trail, [one for one in trail.moved if now_s - one.asked_s > UNUSED_S])
            if not self._is_live(run):
                self._forget(run)

    def _consider(self, run: Run, trail: Trail, ended: bool, now_s: float) -> None:
        """What follows the run's last call, and where that would be decoded."""
        learner = self._tracker.learner
        following = likely(learner.profiles.predict(run.key, learner.at_s(now_s)))
        if following is None:
            return
        number = copies(following)
        if number == 1 and not ended:
            # The one that goes on is best off where this one is: it will be over by then.
            return
        contexts = trail.contexts(following.agent)
        blocks_of = {origin: context.blocks for origin, context in contexts.items()}
        found = beginning(following, blocks_of)
        if found is None:
            return
        context = contexts[found.origin]
        hashes = context.hashes[: found.blocks * BLOCK_HASH_BYTES]
        held = self._index.longest_prefix(hashes)
        # One of several goes on where this call is, which will be over by then.
        stays = [] if ended or trail.worker is None else [trail.worker]
        for worker in self._targets(following, hashes, held, number, stays, now_s):
            if len(trail.moved) < MOVED_MOST:
                self._move(run, context, hashes, held, worker, now_s)

    def _targets(
        self,
        following: NextCall,
        hashes: bytes,
        held: dict[str, int],
        number: int,
        stays: list[Worker],
        now_s: float,
    ) -> list[Worker]:
        """Where so many calls would be decoded, each on the best worker that has none of them;
        beyond those of which it is known."""
        state = self._state
        outlook = Outlook(self._pace.speeds, now_s, self._index.room, self._pace.reuse)
        tokens = len(hashes) // BLOCK_HASH_BYTES * state.block_size + 1
        output_tokens = max(1, round(following.output_tokens.mean))
        compared = self._compared(held)
        found = list(stays)
        while len(found) < number:
            ask = Ask(
                prompt_tokens=max(tokens, round(following.prompt_tokens.mean)),
                output_tokens=output_tokens,
                aggregated=False,
                avoid={(worker.name, worker.incarnation) for worker in found},
                sibling="",
                expected_tokens=following.output_tokens.mean,
            )
            decision = place(
                ask,
                compared,
                lambda: held,
                state.limits,
                self._placement,
                state.block_size,
                outlook,
            )
            if not isinstance(decision, Choice) or state.workers[decision.decode] in found:
                break
            found.append(state.workers[decision.decode])
        return found[len(stays) :]

    def _compared(self, held: dict[str, int]) -> list[Worker]:
        """All workers, or in a large cluster those that have something of it and some idle ones."""
        workers, most = self._state.workers, max(2, self._placement.compared_workers)
        if len(workers) <= most:
            return list(workers.values())
        holders = sorted(held, key=lambda one: -held[one])[: most // 2]
        found = {name: workers[name] for name in holders}
        for name, worker in workers.items():
            if len(found) >= most:
                break
            if worker.up and not (worker.decodes or worker.prefills):
                found[name] = worker
        return list(found.values())

    def _move(
        self,
        run: Run,
        context: Context,
        hashes: bytes,
        held: dict[str, int],
        worker: Worker,
        now_s: float,
    ) -> None:
        """Ask for it, if nobody is in the way and something is lacking."""
        api = self._state.apis.get(context.api)
        source = self._source(held, worker, now_s)
        if api is None or source is None or not self._errands.may(worker, source):
            return
        first, blocks = held.get(worker.name, 0), held[source.name]
        missing = blocks - first
        # Older KV that is given up for it is given up for the call in any case.
        if not MISSING_LEAST <= missing <= worker.usable_blocks - worker.kv_blocks_reserved:
            return
        tokens = blocks * self._state.block_size
        hashes = hashes[: blocks * BLOCK_HASH_BYTES]
        number = self._errands.prefetch(api, source, worker, context.request, tokens, hashes, now_s)
        self._moving[number] = run, Moved(worker, hashes, first, blocks, now_s)

    def _over(self, number: int, done: bool) -> None:
        """What became of an errand."""
        run, moved = self._moving.pop(number, (None, None))
        trail = self._trails.get(run) if run is not None else None
        if done and moved is not None:
            if trail is not None and len(trail.moved) < MOVED_MOST:
                trail.moved.append(moved)
            else:
                self._state.counters["prefetches_wasted"] += 1

    def _source(self, held: dict[str, int], target: Worker, now_s: float) -> Worker | None:
        """Who has the most of it and can soon be read from."""
        best, most = None, 0
        for name in sorted(held):
            worker = self._state.workers[name]
            waiting_s = worker.gauge.reading(now_s)[0]
            readable = worker.up and name in target.warm_sources and waiting_s < WAITED_MOST_S
            if held[name] > most and readable and worker is not target:
                best, most = worker, held[name]
        return best

    # --- accounts -------------------------------------------------------------------------------

    def _is_followed(self, call: Call) -> bool:
        run = call.run
        if not self.on or run is None or run.final or not self._is_live(run):
            return False
        return len(call.submit.block_hashes) >= BLOCK_HASH_BYTES

    def _is_live(self, run: Run) -> bool:
        return self._tracker.runs.live.get(run.key) is run

    def _look_at(self, run: Run, ended: bool, now_s: float) -> None:
        self._waiting[run] = ended
        self._wake(now_s)

    def _wake(self, at_s: float) -> None:
        due_s = self._state.deadlines.get(("prefetches",))
        if due_s is None or due_s > at_s:
            self._state.deadlines.set(("prefetches",), at_s)

    def _forget(self, run: Run) -> None:
        """A run is over."""
        self._waiting.pop(run, None)
        trail = self._trails.pop(run, None)
        if trail is not None:
            self._wasted(trail, list(trail.moved))
        for number in [at for at, (of, _) in self._moving.items() if of is run]:
            self._errands.cancel(number)

    def _wasted(self, trail: Trail, moved: list[Moved]) -> None:
        """Nobody has asked for these."""
        for one in moved:
            trail.moved.remove(one)
        self._state.counters["prefetches_wasted"] += len(moved)

    def check(self) -> None:
        """Assert that all accounts agree; for tests."""
        assert self.on or not (self._trails or self._waiting)
        assert len(self._trails) <= RUNS_MOST
        assert self._waiting.keys() <= self._trails.keys()
        assert {run for run, _ in self._moving.values()} <= self._trails.keys()
        moving = {at for at, errand in self._errands.open.items() if errand.source is not None}
        assert self._moving.keys() == moving
        for trail in self._trails.values():
            assert len(trail.of_agent) <= AGENTS_MOST
            assert len(trail.moved) <= MOVED_MOST
            for moved in trail.moved:
                assert self._state.workers.get(moved.worker.name) is moved.worker
        if self._trails:
            assert self._state.deadlines.get(("prefetches",)) is not None

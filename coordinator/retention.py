"""What calls have left in engines' caches, and which of it is pinned.

::

    opened    a call whose prompt begins with all of an ended call's of its run, or, if it is of
              none, of any such call: that is wanted from now on
    decoding  it has its first token: used; it has the blocks itself from now on
    ended     a finished call of a live run has left its prompt and answer on its worker
    look      a few times a second: what is worth it is pinned, renewed, shortened, released

What is decided is in ``policy.retention``, by what ``workflow.reuse`` has learned of calls like it
and what is known of the run's next step. Here are the accounts: which ended calls there are, what
the workers were told, until when. An engine gives pins up by itself when they end or a request
needs the room (``transfer.pins``), so that a lost message, or a lost core, costs no more than
memory for a while, and nothing that is said here can make a call wait.

Of each run so many ended calls are known and no more, the latest ones; of runs that are not
tracked none. Calls without a run are known by how their prompts end.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from typing import NamedTuple

from coordinator.kv_index import KvIndex
from coordinator.limits import Placement
from coordinator.pace import Pace
from coordinator.policy.retention import SOON_S, Keep, Leftover, kept
from coordinator.protocol import BLOCK_HASH_BYTES, Pin, Retain, engine_request_id
from coordinator.protocol import Finished as FinishedMessage
from coordinator.state import Call, CallKey, State, Worker
from coordinator.workflow.reuse import NEVER, Reuse, ReuseBook
from coordinator.workflow.roster import Run, Runs

LOOK_S = 0.25
"""Between two looks, while there is anything to look at."""
AGAIN_S = 1.0
"""A worker where nothing has happened is looked at again after so long."""
LOOKED_AT = 128
"""Ended calls from which on a look is enough: the rest is for the next one."""
TAILS_PER_RUN = 16
TAILS_PER_WORKER = 512
UNUSED_S = 900.0
"""What was not used for so long will not be."""
WORTH_MOST = 1e9
SETTLE_S = 3.0
"""After so long a worker has told what an ended call has left in its cache."""
UNSETTLED_MOST = 4096
SETTLED_MOST = 64
"""So many at one look."""
LOOKED_BACK = 512
"""An answer and what came behind it have at most so many blocks where nobody says what a prompt
goes on from."""
RENEW_SHARE = 0.5
"""A pin is renewed when less than this share of what it should last is left."""


class Tail:
    """What an ended call has left on ``worker``: ``blocks`` of prompt and answer; its prompt alone
    on ``prefill``, if another worker computed that.

    ``wanted``: calls that begin with it and have no token yet; ``uses``: those that had one.
    ``ends_s``: until when it is pinned, as the worker was told; 0 if it is not.
    """

    __slots__ = (
        "agent",
        "blocks",
        "ends_s",
        "hashes",
        "last_s",
        "name",
        "prefill",
        "prompt_blocks",
        "recompute_s",
        "run",
        "uses",
        "wanted",
        "worker",
    )

    def __init__(
        self,
        call: Call,
        run: Run | None,
        worker: Worker,
        prefill: Worker | None,
        blocks: int,
        now_s: float,
    ) -> None:
        context = call.submit.context
        self.name = engine_request_id(call.request, call.attempt)
        self.run = run
        self.worker = worker
        self.prefill = prefill
        self.agent = context.tenant, context.workflow, context.agent
        self.hashes = call.submit.block_hashes
        self.prompt_blocks = len(self.hashes) // BLOCK_HASH_BYTES
        self.blocks = blocks
        self.recompute_s = 0.0
        self.last_s = now_s
        self.uses = 0
        self.wanted: frozenset[CallKey] = frozenset()
        self.ends_s = 0.0

    @property
    def end(self) -> bytes:
        """The last hash of its prompt."""
        return self.hashes[-BLOCK_HASH_BYTES:]

    def begins(self, hashes: bytes) -> bool:
        """Whether a prompt begins with all of this call's."""
        end = self.prompt_blocks * BLOCK_HASH_BYTES
        return hashes[end - BLOCK_HASH_BYTES : end] == self.end


class Dead(NamedTuple):
    """What nobody will ask a worker for: a prompt and an answer, ``blocks`` in all. ``after``: the
    prompt that went on from it, if one did. ``due_s``: when the worker has told of it."""

    due_s: float
    worker: Worker
    hashes: bytes
    blocks: int
    after: bytes


class Retention:
    """Of all workers. Off, it learns and remembers nothing."""

    def __init__(
        self, state: State, index: KvIndex, placement: Placement, runs: Runs, pace: Pace
    ) -> None:
        self._state = state
        self._index = index
        self._on = placement.retention
        self._share = placement.retained_share
        self._runs = runs
        self._pace = pace
        self._book = ReuseBook()
        self._tails: dict[str, Tail] = {}
        """By the engine's name for the call."""
        self._of_run: dict[Run, list[Tail]] = {}
        self._loose: dict[bytes, Tail] = {}
        """Those without a run, by the last hash of their prompts."""
        self._lengths: Counter[int] = Counter()
        """How many of these have so many blocks of prompt."""
        self._of_worker: dict[Worker, dict[str, Tail]] = {}
        """Each one's by name, the longest ended first; whom to look at next first."""
        self._looked_s: dict[Worker, float] = {}
        """When a worker was looked at last, if nothing has happened to it since."""
        self._wanting: dict[CallKey, list[Tail]] = {}
        self._unneeded: dict[Worker, list[str]] = {}
        """What workers are to be told that nobody will ask for again."""
        self._released: dict[Worker, list[str]] = {}
        """Whose pins they are to be told to release besides."""
        self._settling: deque[Dead] = deque(maxlen=UNSETTLED_MOST)
        """What the index is to be told so."""

    def __len__(self) -> int:
        return len(self._tails)

    @property
    def pinned(self) -> int:
        """How many pins workers were told of that have not ended."""
        return sum(1 for tail in self._tails.values() if tail.ends_s > 0.0)

    # --- what happens to calls --------------------------------------------------------

    def opened(self, call: Call, now_s: float) -> None:
        """A call is submitted: what it begins with is wanted until it has its first token."""
        if not self._on:
            return
        for tail in self._begun_with(call.run, call.submit.block_hashes):
            if not tail.wanted:
                self._book.of(tail.agent, tail.uses).used(now_s - tail.last_s)
            tail.wanted |= {call.key}
            self._looked_s.pop(tail.worker, None)
            self._wanting.setdefault(call.key, []).append(tail)
            self._look_soon(now_s)

    def _begun_with(self, run: Run | None, hashes: bytes) -> list[Tail]:
        """Whose prompts are the beginning of this one; without a run, also their answers must
        have room in it: others may have asked the same."""
        if run is not None:
            return [tail for tail in self._of_run.get(run, ()) if tail.begins(hashes)]
        size, lengths = BLOCK_HASH_BYTES, self._lengths
        blocks = len(hashes) // size
        within = range(max(0, blocks - LOOKED_BACK) + 1, blocks + 1)
        if len(lengths) < LOOKED_BACK:
            known = sorted(length for length in lengths if length in within)
        else:
            known = [length for length in within if length in lengths]
        for length in reversed(known):
            tail = self._loose.get(hashes[(length - 1) * size : length * size])
            if tail is not None and tail.blocks <= blocks:
                return [tail]
        return []

    def decoding(self, call: Call, now_s: float) -> None:
        """A call has its first token; its worker's engine holds its prompt for it."""
        context = call.submit.context
        agent = context.tenant, context.workflow, context.agent
        for tail in self._unwant(call.key):
            tail.uses += 1
            tail.last_s = now_s
            if tail.agent == agent and not tail.wanted:
                # What comes next goes on from this call, not from the one before it.
                self._drop(tail, now_s, call.submit.block_hashes)
        self._tell()

    def ended(
        self, call: Call, worker: Worker | None, message: FinishedMessage | None, now_s: float
    ) -> None:
        """A call is over. ``worker``: who decoded it, if anybody began to; ``message``: if it came
        to its end."""
        self._unwant(call.key)
        run = call.run
        if run is not None and not self._is_live(run):
            self._over(run, now_s)
            if worker is not None and self._on and call.submit.block_hashes:
                most_tokens = call.submit.max_output_tokens
                self._dead(self._tail(call, run, worker, most_tokens, now_s), now_s)
        elif message is None or worker is None or not self._on:
            return
        elif len(call.submit.block_hashes) >= BLOCK_HASH_BYTES:
            self._left(call, run, worker, message.output_tokens, now_s)
        self._tell()

    def _left(
        self, call: Call, run: Run | None, worker: Worker, output_tokens: int, now_s: float
    ) -> None:
        tail = self._tail(call, run, worker, output_tokens, now_s)
        tail.recompute_s = self._pace.speeds.prefill_s(tail.blocks * self._state.block_size)
        former = self._tails.get(tail.name)
        if former is not None:
            self._drop(former, now_s)
        if run is None and (alike := self._loose.get(tail.end)) is not None:
            self._leave(alike)
        of_worker = self._of_worker.setdefault(worker, {})
        self._tails[tail.name] = of_worker[tail.name] = tail
        self._looked_s.pop(worker, None)
        if run is None:
            self._loose[tail.end] = tail
            self._lengths[tail.prompt_blocks] += 1
        else:
            of_run = self._of_run.setdefault(run, [])
            of_run.append(tail)
            if len(of_run) > TAILS_PER_RUN:
                self._leave(of_run[0])
        if len(of_worker) > TAILS_PER_WORKER:
            # Those without a run are many, and few of them are gone on from.
            loose = (each for each in of_worker.values() if each.run is None)
            self._leave(next(loose, None) or next(iter(of_worker.values())))
        self._look_soon(now_s)

    def worker_lost(self, worker: Worker) -> None:
        """A worker is gone with everything that it held."""
        for tail in list(self._of_worker.get(worker, {}).values()):
            self._forget(tail)
        self._unneeded.pop(worker, None)
        self._released.pop(worker, None)

    # --- time -----------------------------------------------------------------------------

    def look(self, now_s: float) -> None:
        """Pin what is worth it, release what is not, on the workers whose turn it is."""
        for _ in range(SETTLED_MOST):
            if not self._settling or self._settling[0].due_s > now_s:
                break
            dead = self._settling.popleft()
            if self._is_there(dead.worker):
                self._index.chill(dead.worker.name, dead.hashes, dead.blocks, dead.after)
        looked = 0
        for worker in list(self._of_worker):
            if looked >= LOOKED_AT:
                break
            if now_s - self._looked_s.get(worker, float("-inf")) < AGAIN_S:
                continue
            tails = self._of_worker.pop(worker)
            self._of_worker[worker] = tails
            self._looked_s[worker] = now_s
            looked += len(tails)
            self._forget_idle(list(tails.values()), now_s)
            self._look_at(worker, list(tails.values()), now_s)
        self._tell()
        if self._tails or self._settling:
            self._look_soon(now_s)

    def _forget_idle(self, tails: list[Tail], now_s: float) -> None:
        for tail in tails:
            idle = not tail.wanted and now_s - tail.last_s > UNUSED_S
            if idle or not self._is_live(tail.run):
                self._unused(tail, now_s)

    def _look_at(self, worker: Worker, tails: list[Tail], now_s: float) -> None:
        """Decide on all of one worker's; tell it what changes."""
        leftovers = [self._leftover(tail, now_s) for tail in tails]
        free = worker.usable_blocks - worker.kv_blocks_reserved
        room = min(free, int(self._share * worker.usable_blocks))
        keeps = {keep.name: keep for keep in kept(leftovers, room)}
        pins: list[Pin] = []
        released: list[str] = []
        for tail in tails:
            keep = keeps.get(tail.name)
            if keep is None:
                if tail.ends_s > 0.0:
                    tail.ends_s = 0.0
                    self._state.counters["pins_released"] += 1
                    released.append(tail.name)
                continue
            if self._is_due(tail, keep, now_s):
                self._state.counters["pins"] += tail.ends_s == 0.0
                tail.ends_s = now_s + keep.hold_s
                age_s = now_s - tail.last_s
                worth = min(WORTH_MOST, keep.worth * max(SOON_S, age_s))
                pins.append(Pin(tail.name, keep.hold_s, worth, age_s))
        unneeded = self._unneeded.pop(worker, [])
        if pins or released or unneeded:
            self._state.send(worker.peer, Retain(worker.incarnation, pins, released, unneeded))

    def _leftover(self, tail: Tail, now_s: float) -> Leftover:
        wanted = bool(tail.wanted)
        reuse = NEVER if wanted else self._reuse(tail, now_s)
        pinned = tail.ends_s > now_s
        return Leftover(
            tail.name, tail.blocks, tail.recompute_s, reuse, wanted, pinned, now_s - tail.last_s
        )

    def _reuse(self, tail: Tail, now_s: float) -> Reuse:
        if tail.run is not None and tail.run.final and not tail.run.open:
            return NEVER
        return self._book.of(tail.agent, tail.uses).after(now_s - tail.last_s)

    def _is_due(self, tail: Tail, keep: Keep, now_s: float) -> bool:
        """Whether the worker has to be told: it is not pinned, ends too soon or much too late."""
        left_s = tail.ends_s - now_s
        return left_s < RENEW_SHARE * keep.hold_s or left_s > keep.hold_s / RENEW_SHARE

    # --- accounts ---------------------------------------------------------------------------

    def _is_live(self, run: Run | None) -> bool:
        return run is None or self._runs.live.get(run.key) is run

    def _unwant(self, key: CallKey) -> list[Tail]:
        """A call wants nothing any more; what it wanted."""
        tails = self._wanting.pop(key, [])
        for tail in tails:
            tail.wanted -= {key}
        return tails

    def _tail(
        self, call: Call, run: Run | None, worker: Worker, output_tokens: int, now_s: float
    ) -> Tail:
        tokens = call.submit.prompt_tokens + max(0, output_tokens)
        placed = call.plan.prefill if call.plan is not None else None
        prefill = self._state.workers.get(placed.worker) if placed is not None else None
        if prefill is worker or (prefill and placed and prefill.incarnation != placed.incarnation):
            prefill = None
        return Tail(call, run, worker, prefill, tokens // self._state.block_size, now_s)

    def _over(self, run: Run, now_s: float) -> None:
        """A run is over: nothing of it is used any more."""
        for tail in list(self._of_run.get(run, ())):
            self._unused(tail, now_s)

    def _unused(self, tail: Tail, now_s: float) -> None:
        """It was not used any more, and will not be."""
        if not tail.wanted:
            self._book.of(tail.agent, tail.uses).unused()
        self._drop(tail, now_s)

    def _drop(self, tail: Tail, now_s: float, after: bytes = b"") -> None:
        """Forget it: its worker need not keep it."""
        self._forget(tail)
        self._dead(tail, now_s, after)

    def _leave(self, tail: Tail) -> None:
        """Forget it, there are too many: it is evicted as what was used as long ago."""
        if tail.ends_s > 0.0:
            self._released.setdefault(tail.worker, []).append(tail.name)
        self._forget(tail)

    def _dead(self, tail: Tail, now_s: float, after: bytes = b"") -> None:
        """Nobody will ask for it."""
        left = [(tail.worker, tail.blocks), (tail.prefill, tail.prompt_blocks)]
        for worker, blocks in left:
            if worker is not None and self._is_there(worker):
                self._unneeded.setdefault(worker, []).append(tail.name)
                self._settling.append(Dead(now_s + SETTLE_S, worker, tail.hashes, blocks, after))
        self._look_soon(now_s)

    def _is_there(self, worker: Worker) -> bool:
        return self._state.workers.get(worker.name) is worker

    def _forget(self, tail: Tail) -> None:
        if tail.ends_s > 0.0:
            tail.ends_s = 0.0
            self._state.counters["pins_released"] += 1
        for key in tail.wanted:
            wanting = self._wanting[key]
            wanting.remove(tail)
            if not wanting:
                del self._wanting[key]
        tail.wanted = frozenset()
        del self._tails[tail.name]
        of_worker = self._of_worker[tail.worker]
        del of_worker[tail.name]
        if not of_worker:
            del self._of_worker[tail.worker]
            self._looked_s.pop(tail.worker, None)
        if tail.run is None:
            del self._loose[tail.end]
            self._lengths[tail.prompt_blocks] -= 1
            if not self._lengths[tail.prompt_blocks]:
                del self._lengths[tail.prompt_blocks]
            return
        tails = self._of_run[tail.run]
        tails.remove(tail)
        if not tails:
            del self._of_run[tail.run]

    def _tell(self) -> None:
        """Say what nobody needs since the last time."""
        for worker in dict.fromkeys([*self._unneeded, *self._released]):
            released, unneeded = self._released.get(worker, []), self._unneeded.get(worker, [])
            self._state.send(worker.peer, Retain(worker.incarnation, [], released, unneeded))
        self._unneeded.clear()
        self._released.clear()

    def _look_soon(self, now_s: float) -> None:
        if self._state.deadlines.get(("retention",)) is None:
            self._state.deadlines.set(("retention",), now_s + LOOK_S)

    def tails(self) -> Iterator[Tail]:
        """All of them, for tests."""
        return iter(self._tails.values())

    def check(self) -> None:
        """Assert that all accounts agree; for tests."""
        assert self._on or not self._tails
        assert all(0 < len(each) <= TAILS_PER_WORKER for each in self._of_worker.values())
        everywhere = {
            name: tail for each in self._of_worker.values() for name, tail in each.items()
        }
        assert everywhere == self._tails
        assert self._looked_s.keys() <= self._of_worker.keys()
        assert not self._unneeded
        assert not self._released
        listed = [tail for tails in self._of_run.values() for tail in tails]
        listed += self._loose.values()
        assert all(tail.run is None and tail.end == end for end, tail in self._loose.items())
        assert self._lengths == Counter(tail.prompt_blocks for tail in self._loose.values())
        assert {tail.name for tail in listed} == self._tails.keys()
        assert len(listed) == len(self._tails)
        assert all(0 < len(tails) <= TAILS_PER_RUN for tails in self._of_run.values())
        workers, calls = self._state.workers, self._state.calls
        pinned: dict[str, int] = {}
        for name, tail in self._tails.items():
            assert tail.name == name
            assert workers.get(tail.worker.name) is tail.worker, f"{name} is on a lost worker"
            assert tail.run is None or tail in self._of_run[tail.run]
            assert tail.wanted <= calls.keys()
            if tail.ends_s > 0.0:
                pinned[tail.worker.name] = pinned.get(tail.worker.name, 0) + tail.blocks
        for worker_name, blocks in pinned.items():
            assert blocks <= self._share * workers[worker_name].usable_blocks, worker_name
        wanting = {(key, tail.name) for tail in self._tails.values() for key in tail.wanted}
        assert wanting == {
            (key, tail.name) for key, tails in self._wanting.items() for tail in tails
        }
        if self._tails:
            assert self._state.deadlines.get(("retention",)) is not None

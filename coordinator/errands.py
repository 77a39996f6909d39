"""Errands: work on workers for calls that have not come yet, carried out by API processes.

::

    core                              API process                       worker
      | Errand (worker, what, until)       | a request for one token        |
      |----------------------------------->|------------------------------->|
      | DropErrand, as soon as a call      | Abort                          |
      | is planned onto the worker         |                                |
      | ErrandDone                         |                                |
      |<-----------------------------------|                                |

Only API processes know tokens, so the core can but ask. Two kinds: *warm*, the static prompt of a
declared agent is computed on an idle worker that lacks it; and *prefetch*, what one worker has
cached is moved to an idle one (``prefetching``). Nothing is reserved for either: it is asked of
workers without any call, one at a time, and dropped in the same moment in which a call is planned
onto one, or onto the one that is read from. A call waits for it for no longer than the engine's
step under way takes.

Here are the accounts; what is warmed is chosen in ``policy.warming``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import msgspec

from coordinator.kv_index import KvIndex
from coordinator.limits import Placement
from coordinator.policy.warming import Prompt, PromptKey, warmed
from coordinator.protocol import BLOCK_HASH_BYTES, DropErrand, Errand, ErrandDone, Placed
from coordinator.state import Api, State, Worker
from coordinator.workflow.registry import Registry
from coordinator.workflow.roster import Runs

LOOK_S = 1.0
ERRANDS_MOST = 2
"""In the whole cluster at a time."""
ERRAND_S = 30.0
"""What takes longer is given up."""
PREFETCH_S = 5.0
AVOID_S = 60.0
"""How long what failed is not tried again."""
AVOIDED_MOST = 1024


class Open(msgspec.Struct, frozen=True):
    """An errand that is being carried out. ``source``: from where, if it is a prefetch."""

    api: str
    worker: Worker
    key: PromptKey
    hashes: bytes
    due_s: float
    source: Worker | None = None


class Errands:
    """Of one core."""

    def __init__(
        self,
        state: State,
        index: KvIndex,
        placement: Placement,
        registry: Registry,
        runs: Runs,
    ) -> None:
        self._state = state
        self._index = index
        self._on = placement.warm_up
        self._registry = registry
        self._runs = runs
        self._number = 0
        self.over: Callable[[int, bool], None] = lambda number, done: None
        """Told of each prefetch that is over, and whether all of it is there."""
        self.open: dict[int, Open] = {}
        self._avoid: OrderedDict[tuple[str, PromptKey], float] = OrderedDict()
        """What failed on a worker, and until when it is not tried again there."""

    # --- what happens -----------------------------------------------------------------------

    def wake(self, now_s: float) -> None:
        """There may be something to do from now on."""
        if self._on and self._registry.static and not self._is_awake():
            self._state.deadlines.set(("errands",), now_s + LOOK_S)

    def planned(self, worker: Worker) -> None:
        """A call goes to a worker: nothing may be in its way."""
        for number, errand in self._of(worker):
            self._drop(number, errand)

    def done(self, api: Api, message: ErrandDone, now_s: float) -> None:
        """An API process says what became of an errand."""
        errand = self.open.get(message.errand)
        if errand is None or errand.api != api.name:
            self._state.counters["messages_stale"] += 1
            return
        del self.open[message.errand]
        done = message.outcome == "done"
        if done:
            self._state.counters["errands_done"] += 1
            self._index.stored(errand.worker.name, errand.hashes)
        if errand.source is not None:
            name = "prefetches_done" if done else "prefetches_dropped"
            self._state.counters[name] += 1
            self._state.counters["tokens_prefetched"] += max(0, message.moved_tokens)
            self.over(message.errand, done)
        elif not done:
            self._failed(errand, now_s)

    def worker_lost(self, worker: Worker) -> None:
        """A worker is gone; the API processes hear of it themselves."""
        for number, errand in self._of(worker):
            if errand.worker is worker:
                self._forget(number, errand)
            else:
                self._drop(number, errand)

    def api_lost(self, api: Api) -> None:
        """An API process is gone, and with it its requests."""
        for number, errand in list(self.open.items()):
            if errand.api == api.name:
                self._forget(number, errand)

    def look(self, now_s: float) -> None:
        """Give up what takes too long, ask for what is worth it, look again later."""
        for number, errand in list(self.open.items()):
            if now_s >= errand.due_s:
                self._drop(number, errand)
                if errand.source is None:
                    self._failed(errand, now_s)
        while self._avoid and next(iter(self._avoid.values())) <= now_s:
            self._avoid.popitem(last=False)
        apis = sorted(self._state.apis)
        room = ERRANDS_MOST - len(self.open) if self._on else 0
        if apis and room > 0 and (idle := self._idle()):
            for worker, key in warmed(self._prompts(), idle, self._avoid, room):
                self._ask(apis[self._number % len(apis)], worker, key, now_s)
        if (self._on and self._registry.static) or self.open:
            self._state.deadlines.set(("errands",), now_s + LOOK_S)

    # --- prefetches -------------------------------------------------------------------------------

    def may(self, worker: Worker, source: Worker) -> bool:
        """Whether something may be moved there now, and from there: nobody is in the way."""
        busy = {errand.worker.name for errand in self.open.values()}
        busy |= {errand.source.name for errand in self.open.values() if errand.source is not None}
        free = worker.up and not (worker.decodes or worker.prefills)
        room = len(self.open) < ERRANDS_MOST
        return free and room and worker.name not in busy and source.name not in busy

    def prefetch(
        self,
        api: Api,
        source: Worker,
        worker: Worker,
        call: str,
        tokens: int,
        hashes: bytes,
        now_s: float,
    ) -> int:
        """Have the first tokens of a call's prompt moved; the errand's number."""
        self._number += 1
        due_s = now_s + PREFETCH_S
        self.open[self._number] = Open(api.name, worker, ("", ""), hashes, due_s, source)
        self._state.counters["errands_sent"] += 1
        self._state.counters["prefetches"] += 1
        errand = Errand(
            self._number,
            "prefetch",
            Placed(worker.name, worker.incarnation),
            "",
            "",
            PREFETCH_S,
            source=Placed(source.name, source.incarnation),
            call=call,
            tokens=tokens,
        )
        self._state.send(api.peer, errand)
        if not self._is_awake():
            self._state.deadlines.set(("errands",), now_s + LOOK_S)
        return self._number

    def cancel(self, number: int) -> None:
        """A prefetch is of no use any more."""
        self._drop(number, self.open[number])

    # --- what is there ------------------------------------------------------------------------

    def _idle(self) -> dict[str, int]:
        """Workers with nothing to do, and for how many blocks there is room."""
        busy = {errand.worker.name for errand in self.open.values()}
        return {
            name: self._index.room(name)
            for name, worker in self._state.workers.items()
            if worker.up
            and name not in busy
            and not (worker.decodes or worker.prefills or worker.load.running or worker.waiting)
        }

    def _prompts(self) -> list[Prompt]:
        """Static prompts of workflows with live runs. Tenants with a salt have other blocks."""
        found: list[Prompt] = []
        for name, prefixes in self._registry.static.items():
            runs = len(self._runs.of_workflow("", name))
            if not runs:
                continue
            for agent, prefix in prefixes.items():
                blocks = len(prefix.block_hashes) // BLOCK_HASH_BYTES
                held = self._index.longest_prefix(prefix.block_hashes) if blocks else {}
                found.append(Prompt((name, agent), blocks, runs, held))
        return found

    def _ask(self, api: str, worker_name: str, key: PromptKey, now_s: float) -> None:
        worker = self._state.workers[worker_name]
        workflow, agent = key
        hashes = self._registry.static[workflow][agent].block_hashes
        self._number += 1
        self.open[self._number] = Open(api, worker, key, hashes, now_s + ERRAND_S)
        self._state.counters["errands_sent"] += 1
        placed = Placed(worker.name, worker.incarnation)
        digest = self._registry.declared[workflow].digest
        errand = Errand(self._number, "warm", placed, digest, agent, ERRAND_S)
        self._state.send(self._state.apis[api].peer, errand)

    # --- accounts -----------------------------------------------------------------------------

    def _of(self, worker: Worker) -> list[tuple[int, Open]]:
        return [
            item
            for item in self.open.items()
            if worker is item[1].worker or worker is item[1].source
        ]

    def _drop(self, number: int, errand: Open) -> None:
        self._forget(number, errand)
        self._state.send(self._state.apis[errand.api].peer, DropErrand(number))

    def _forget(self, number: int, errand: Open) -> None:
        del self.open[number]
        self._state.counters["errands_dropped"] += 1
        if errand.source is not None:
            self._state.counters["prefetches_dropped"] += 1
            self.over(number, False)

    def _failed(self, errand: Open, now_s: float) -> None:
        key = errand.worker.name, errand.key
        self._avoid.pop(key, None)
        self._avoid[key] = now_s + AVOID_S
        if len(self._avoid) > AVOIDED_MOST:
            self._avoid.popitem(last=False)

    def _is_awake(self) -> bool:
        return self._state.deadlines.get(("errands",)) is not None

    def check(self) -> None:
        """Assert that all accounts agree; for tests."""
        assert len(self.open) <= ERRANDS_MOST
        assert self._on or all(errand.source is not None for errand in self.open.values())
        assert len(self._avoid) <= AVOIDED_MOST
        workers = [errand.worker for errand in self.open.values()]
        workers += [errand.source for errand in self.open.values() if errand.source is not None]
        assert len({worker.name for worker in workers}) == len(workers), "one for each worker"
        for errand in self.open.values():
            assert errand.api in self._state.apis
            assert self._state.workers.get(errand.worker.name) is errand.worker
            assert not errand.worker.decodes, "a call would wait for it"
            assert not errand.worker.prefills, "a call would wait for it"
        assert not self.open or self._is_awake()

"""A whole cluster in virtual time: the live core, and everything around it simulated.

Equal arguments give equal results: all chance comes from the seed, and no clock but the
virtual one is read, unless the core's decisions are to be measured, which nothing else
depends on.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from cluster.simulator.api import Api
from cluster.simulator.brain import Brain, CoreFactory
from cluster.simulator.clients import Clients, Progress
from cluster.simulator.cores import Cores
from cluster.simulator.engine import Engine
from cluster.simulator.events import Events
from cluster.simulator.host import Host
from cluster.simulator.links import Links
from cluster.simulator.network import LETTERS_KEPT, Network
from cluster.simulator.oracle import Oracle, OracleError
from cluster.simulator.reader import Reader
from cluster.simulator.recorder import Recorder
from cluster.simulator.records import Result, Totals
from cluster.simulator.setup import ClusterSetup, Faults, WorkerSetup
from cluster.simulator.worker import Worker
from cluster.workload.form import Workload
from coordinator.collecting import rare_collections
from coordinator.core import Core
from coordinator.cost import Tier
from coordinator.protocol import EngineFacts, Placed, Role

NO_FAULTS = Faults(until_s=0.0)
WARM_UP_S_MAX = 600.0
"""Longest time for the core to try all pairs of workers before the replay begins."""
SETTLE_STEP_S = 1.0
COLLECT_OBJECTS = 200_000
"""Engines and network come and go in this process, too."""


class World:
    """One simulation of ``workload`` on the cluster of ``setup``."""

    def __init__(
        self,
        setup: ClusterSetup,
        workload: Workload,
        faults: Faults = NO_FAULTS,
        seed: int = 0,
        *,
        core_factory: CoreFactory = Core,
        measured: bool = False,
        limited: bool = False,
        progress: Progress | None = None,
        letters: int = LETTERS_KEPT,
    ) -> None:
        """DoesNotFit if the model does not; ValueError if a link or dtype is missing."""
        options = setup.options
        self.setup, self.workload, self.faults, self.seed = setup, workload, faults, seed
        self.events = Events()
        self.rng = random.Random(f"{seed}/world")
        self.network = Network(
            self.events, setup.network, faults, random.Random(f"{seed}/network"), letters
        )
        self.oracle = Oracle(seed, self.network, options.block_size, setup.limits)
        self.links = Links(self.events, setup)
        self.notify_s = setup.network.message_s
        self.recorder = Recorder(workload)
        self.overdue = 0
        """Calls that API processes which are gone had given up by themselves."""
        self._probed_before: dict[Tier, float] = {}
        self._cost = setup.cost()
        self._cores: dict[tuple[str, str], Cores] = {}
        self.facts = engine_facts(setup)
        self.brain = Brain(
            self.events,
            self.network,
            lambda core_id: core_factory(setup.limits, setup.placement, core_id),
            measured,
        )
        self.clients = Clients(
            self.events,
            workload,
            self.recorder,
            random.Random(f"{seed}/clients"),
            block_size=options.block_size,
            tokens_max=self.facts.max_model_len,
            api_s=setup.network.api_s,
            api_token_s=setup.network.api_token_s,
            aborted=faults.abort,
            aborts_until_s=faults.until_s,
            limited=limited,
            finished=self.events.stop,
            progress=progress,
        )
        self.hosts = {
            worker.name: Host(worker, self.events, self._make_worker, options.startup_s)
            for worker in setup.workers
        }
        self._api_starts = [0] * setup.api_servers
        self._apis: list[Api | None] = [self._make_api(at) for at in range(setup.api_servers)]
        if faults != NO_FAULTS:
            self.network.arrived = self._arrived

    # --- parts ---------------------------------------------------------------------------

    def worker(self, placed: Placed) -> Worker | None:
        """An incarnation of a worker if it is alive."""
        host = self.hosts.get(placed.worker)
        current = host.current if host is not None else None
        return current if current is not None and current.placed == placed else None

    def workers(self) -> list[Worker]:
        """All workers that are alive."""
        return [host.current for host in self.hosts.values() if host.current is not None]

    @property
    def apis(self) -> list[Api]:
        """All API processes that are alive."""
        return [api for api in self._apis if api is not None]

    def role(self, worker: Worker) -> Role:
        """What the core uses it for by now; while it has lost it, what it was started for."""
        return self.brain.core.role(worker.name) or worker.setup.role

    def is_cut(self, one: str, other: str) -> bool:
        """Whether a partition is between two processes."""
        return self.network.is_cut(one, other)

    # --- what goes wrong -----------------------------------------------------------------

    def crash(self, host: Host, machine: bool) -> None:
        """A worker crashes, or its whole machine: what others read from it fails."""
        host.crash(machine)
        for read in self.links.of(host.name):
            target = self.hosts[read.target].current
            if target is not None:
                target.reader.lost(read)

    def crash_api(self, api: Api, away_s: float) -> None:
        """An API process crashes, and another one is started in its place."""
        at = self._apis.index(api)
        self._apis[at] = None
        self.overdue += api.overdue
        self.events.after(away_s, self._start_api, at)
        api.crash()

    def _start_api(self, at: int) -> None:
        api = self._apis[at] = self._make_api(at)
        api.start(0.0)

    def _make_api(self, at: int) -> Api:
        """Another process at that place: it has a name of its own, as in a live cluster."""
        self._api_starts[at] += 1
        starts = self._api_starts[at]
        return Api(
            f"api-{at}" if starts == 1 else f"api-{at}#{starts}",
            self.events,
            self.network,
            self.setup.limits,
            self.clients,
            self.oracle,
            reliable=self.faults == NO_FAULTS,
        )

    def _arrived(self, target: str, message: object) -> None:
        for api in self.apis:
            if api.name == target:
                self.oracle.arrived(api, message)

    def partition(self, cut: frozenset[str], for_s: float) -> None:
        """These processes and all others are cut off from each other for a while."""
        self.network.partition(cut, self.events.now_s + for_s)
        for read in self.links.in_flight():
            target = self.hosts[read.target].current
            if target is not None and self.is_cut(read.source, read.target):
                target.reader.lost(read)
        for worker in self.workers():
            worker.cut_off()
        self.events.after(for_s, self._heal)

    def _heal(self) -> None:
        self.network.heal()
        for worker in self.workers():
            worker.thaw()

    def _make_worker(self, setup: WorkerSetup, incarnation: str) -> Worker:
        engine = Engine(
            self._cost,
            self.setup.options,
            self.facts.kv_blocks,
            self.recorder.gaps,
            self.setup.host_memory(),
        )
        worker = Worker(
            setup,
            incarnation,
            self.facts,
            engine,
            self.events,
            self.network,
            self.oracle,
            self.recorder.computed,
            self._cores_of(setup),
        )
        reader = Reader(worker, self, self._cost.kv_bytes_per_token)
        # Processes do not start in the same instant, and do not beat in it.
        worker.start(reader, self.rng.random() * self.setup.limits.beat_s)
        return worker

    def _cores_of(self, setup: WorkerSetup) -> Cores | None:
        """What the engines of a worker's node share."""
        factors = self.setup.contention
        if not factors:
            return None
        return self._cores.setdefault((setup.rack, setup.node), Cores(factors))

    # --- running -------------------------------------------------------------------------

    def start(self) -> None:
        """All processes are up."""
        for host in self.hosts.values():
            host.start()
        for api in self.apis:
            api.start(0.0)

    def warm_up(self) -> None:
        """Let the core try all pairs of workers, as in a cluster that has been up for a while."""
        ends_s = self.events.now_s + WARM_UP_S_MAX
        step_s = self.setup.limits.beat_s
        wanted = len(self.hosts) * (len(self.hosts) - 1)
        while self.events.now_s < ends_s:
            self.events.run(self.events.now_s + step_s)
            counters = self.brain.core.counters
            known = counters["workers_registered"] >= len(self.hosts)
            if known and counters["pairs_warmed"] + counters["pairs_failed"] >= wanted:
                return

    def run(self, limit_s: float = float("inf")) -> None:
        """Replay the workload to its end, or for ``limit_s`` seconds of it."""
        began_s = self.events.now_s
        self._probed_before = dict(self.links.probe_bytes)
        self.clients.start(self._apis)
        self.recorder.keep_sampling(self.events, self.workers, self.role)
        if not self.clients.done:
            self.events.run(began_s + limit_s)

    def settle(self, longest_s: float) -> bool:
        """Let what is under way come to its end; whether it has."""
        ends_s = self.events.now_s + longest_s
        while not self.quiet():
            if self.events.now_s >= ends_s:
                return False
            self.events.run(self.events.now_s + SETTLE_STEP_S)
        return True

    def check(self) -> None:
        """What must be true at any moment. OracleError if it is not."""
        self.oracle.check(self.brain.core, self.workers())

    def quiet(self) -> bool:
        """Whether there is nothing of any call anywhere."""
        if not self.clients.done or self.links.in_flight():
            return False
        now_s = self.events.now_s
        for worker in self.workers():
            load = worker.engine.load(now_s)
            if worker.jobs or load.running or load.waiting or load.kv_blocks_used:
                return False
        snapshot = self.brain.core.snapshot(0, now_s)
        # Those that are gone will have been missed, too.
        return not snapshot.queued and not snapshot.active and snapshot.apis == len(self.apis)

    def result(self, configuration: str) -> Result:
        """What it left behind. To be asked once, at the end."""
        recorder, began_s = self.recorder, self.clients.began_s
        recorder.shift(began_s)
        counters = self.brain.totals()
        counters |= {
            "handles_read": self.oracle.reads,
            "reads_failed": self.oracle.reads_failed,
            "calls_overdue": self.overdue + sum(api.overdue for api in self.apis),
        }
        memories = [worker.engine.host for worker in self.workers()]
        if self.setup.host_blocks():
            loaded = sum(memory.loaded_blocks for memory in memories if memory is not None)
            counters["host_blocks_loaded"] = loaded
        totals = Totals(
            duration_s=max((call.ended_s for call in recorder.calls), default=0.0),
            gpus=len(self.hosts) * self.setup.tp,
            preemptions=sum(host.preemptions for host in self.hosts.values())
            + sum(worker.engine.preemptions for worker in self.workers()),
            recomputed_tokens=recorder.recomputed_tokens,
            flips=counters.get("role_flips", 0),
            moved_bytes={tier: round(size) for tier, size in self.links.moved_bytes.items()},
            probe_bytes={
                tier: round(size - self._probed_before.get(tier, 0.0))
                for tier, size in self.links.probe_bytes.items()
            },
            core_s=self.brain.core_s,
            core_messages=self.brain.core_messages,
            counters=counters,
        )
        return Result(
            configuration=configuration,
            workload=self.workload.name,
            seed=self.seed,
            where="simulator",
            calls=recorder.calls,
            runs=recorder.runs,
            samples=recorder.samples,
            gaps=recorder.gaps,
            totals=totals,
        )


def engine_facts(setup: ClusterSetup) -> EngineFacts:
    """What a worker of the cluster says of its engine."""
    options, kv_blocks = setup.options, setup.kv_blocks()
    return EngineFacts(
        vllm_version="simulated",
        model=setup.shape.name,
        model_fingerprint="simulated",
        block_size=options.block_size,
        kv_blocks=kv_blocks,
        # vLLM does not start with less memory than one longest prompt takes; one block is its own.
        max_model_len=min(options.max_model_len, (kv_blocks - 1) * options.block_size),
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        kv_bytes_per_block=round(setup.cost().kv_bytes_per_token * options.block_size),
        kv_lease_s=options.kv_lease_s,
        kv_host_blocks=setup.host_blocks(),
    )


def simulate(
    setup: ClusterSetup,
    workload: Workload,
    seed: int = 0,
    *,
    configuration: str = "",
    core_factory: CoreFactory = Core,
    limit_s: float = float("inf"),
    measured: bool = False,
    limited: bool = False,
    progress: Progress | None = None,
    began: Callable[[float], None] | None = None,
) -> Result:
    """Replay ``workload`` on a cluster without faults, from when it is warm.

    Ends with the last call or after ``limit_s`` seconds of the replay: calls that have no
    ``outcome`` then are unfinished. ``measured``: time the core's decisions. ``limited``:
    clients ask for no more tokens than they get, see ``clients``. ``began`` is told when the
    replay begins. OracleError if
    anything happened that must not; DoesNotFit and ValueError as ``World`` says.
    """
    world = World(
        setup,
        workload,
        seed=seed,
        core_factory=core_factory,
        measured=measured,
        limited=limited,
        progress=progress,
    )
    with rare_collections(COLLECT_OBJECTS):
        world.start()
        world.warm_up()
        if began is not None:
            began(world.events.now_s)
        world.run(limit_s)
    if world.clients.done:
        settle(world, setup.options.kv_lease_s / 2)
    return world.result(configuration)


def settle(world: World, longest_s: float) -> None:
    """Wait until nothing is left of any call, and let the oracle look. OracleError if not.

    ``longest_s``: how long that may take. Where no message is lost all is given back at once,
    and no lease has to end for that.
    """
    world.settle(longest_s)
    world.oracle.quiet(world.brain.core, world.workers(), world.apis)


__all__ = ["OracleError", "World", "settle", "simulate"]

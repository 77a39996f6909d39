"""Large clusters: a few workers are compared, and the answer is the one of comparing all."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from coordinator.kv_index import KvIndex
from coordinator.limits import Limits, Placement
from coordinator.pace import Pace
from coordinator.placing import Placing
from coordinator.policy.placement import NO_ROOM, Ask, Choice, Decision, place
from coordinator.protocol import CallContext, EngineFacts, Load, Ready, Role, Submit
from coordinator.rooms import Rooms
from coordinator.standing import Standing
from coordinator.state import Api, Call, State, Worker, WorkerPhase
from coordinator.workflow.learner import Learner
from coordinator.workflow.limits import WorkflowLimits

BLOCK = 16
LIMITS = Limits(calls_per_worker=4, prefills_per_worker=2)


def chain(*blocks: int) -> bytes:
    """Hashes of a chain of blocks with these names."""
    return b"".join(block.to_bytes(8, "little") for block in blocks)


@dataclass
class Bed:
    """Workers without a core: what placement sees of them is set at will."""

    placement: Placement
    state: State = field(default_factory=lambda: State(LIMITS))
    index: KvIndex = field(default_factory=KvIndex)

    def __post_init__(self) -> None:
        self.state.block_size = BLOCK
        self.standing = Standing(LIMITS, self.placement)
        pace = Pace(Learner(WorkflowLimits()))
        self.hosts = KvIndex()
        self.placing = Placing(
            self.state,
            self.index,
            self.standing,
            self.placement,
            None,
            pace,
            self.hosts,
            Rooms(self.state, self.standing),
        )

    def worker(self, name: str, role: Role = "decode", kv_blocks: int = 100) -> Worker:
        facts = EngineFacts("0", "m", "f", BLOCK, kv_blocks, 10_000, 8, 2048)
        ready = Ready(name, f"{name}-1", role, f"tcp://{name}", facts)
        made = Worker(ready, name.encode(), 0.0, kv_blocks, self.state.story())
        self.state.workers[name] = made
        self.index.add(name, kv_blocks)
        self.standing.add(made)
        return made

    def take(self, worker: Worker, blocks: int, calls: int = 1) -> None:
        """So much is reserved on a worker, for so many calls."""
        worker.kv_blocks_reserved += blocks
        for _ in range(calls):
            worker.decodes["api", f"{worker.name}-{len(worker.decodes)}"] = None  # type: ignore[assignment]
        self.standing.touch(worker)

    def warm(self) -> None:
        """Everybody has pulled from everybody else."""
        names = set(self.state.workers)
        for worker in self.state.workers.values():
            worker.warm_sources = names - {worker.name}

    def ask(self, prompt_tokens: int, **terms: object) -> Ask:
        made = {"output_tokens": 16, "aggregated": False, "avoid": (), "sibling": ""} | terms
        return Ask(prompt_tokens=prompt_tokens, **made)  # type: ignore[arg-type]

    def near(self, ask: Ask, hashes: bytes = b"") -> Decision:
        submit = Submit("api", "c", 1, ask.prompt_tokens, ask.output_tokens, hashes, CallContext())
        api = Api("api", b"api", 0.0, 0.0)
        call = Call(api, submit, 0, 0.0, 1e9, 1, self.state.story())
        return self.placing.decide(call, ask, 0.0)

    def all(self, ask: Ask, hashes: bytes = b"") -> Decision:
        """The decision with everybody compared."""
        workers = self.state.workers.values()
        held = self.index.longest_prefix(hashes)
        return place(ask, workers, lambda: held, LIMITS, self.placement, BLOCK)


def cluster(few: int = 8, **placement: object) -> Bed:
    """A prefill worker for every three that decode, more than are compared."""
    terms = {"policy": "least_kv", "compared_workers": few, **placement}
    bed = Bed(Placement(**terms))  # type: ignore[arg-type]
    for number in range(4 * few):
        bed.worker(f"w{number:03}", "prefill" if number % 4 == 0 else "decode")
    bed.warm()
    return bed


def test_the_least_loaded_of_many_is_found() -> None:
    bed = cluster()
    for number, worker in enumerate(bed.state.workers.values()):
        bed.take(worker, 10 + (number * 7) % 29)
        worker.prefill_tokens = 100 + (number * 5) % 31
    for tokens in (100, 900):
        chosen = bed.near(bed.ask(tokens))
        assert isinstance(chosen, Choice)
        assert chosen == bed.all(bed.ask(tokens))


def test_who_holds_the_most_is_compared_however_loaded() -> None:
    bed = cluster(cached_weight=2.0)
    for worker in bed.state.workers.values():
        bed.take(worker, 5)
    bed.take(bed.state.workers["w030"], 20)
    hashes = chain(*range(1, 50))
    bed.index.stored("w030", hashes)
    found = bed.near(bed.ask(49 * BLOCK), hashes)
    assert isinstance(found, Choice)
    assert (found.decode, found.prefill) == ("w030", "")


def test_the_joint_choice_among_a_few_is_that_among_all() -> None:
    bed = cluster(policy="pythia")
    for worker in bed.state.workers.values():
        bed.take(worker, 5)
        worker.gauge.plan(80.0, 20.0)
    hashes = chain(*range(1, 50))
    for holder in ("w030", "w028"):
        bed.index.stored(holder, hashes)
        found = bed.near(bed.ask(49 * BLOCK), hashes)
        everywhere = bed.all(bed.ask(49 * BLOCK), hashes)
        assert isinstance(found, Choice)
        assert isinstance(everywhere, Choice)
        # What was compared differs, what came of it does not.
        assert replace(found, seen=None) == replace(everywhere, seen=None)
        assert found.decode == holder, "w028 has the role prefill and the smaller name"


@pytest.mark.parametrize("policy", ["least_kv", "pythia"])
@pytest.mark.parametrize("few", [8, 64])
def test_who_has_the_most_on_its_host_is_compared_however_loaded(policy: str, few: int) -> None:
    bed = Bed(Placement(policy=policy, compared_workers=few, cached_weight=2.0))  # type: ignore[arg-type]
    for number in range(32):
        bed.take(bed.worker(f"w{number:03}"), 5)
    bed.take(bed.state.workers["w030"], 20)
    hashes = chain(*range(1, 50))
    ask = bed.ask(49 * BLOCK)
    found = bed.near(ask, hashes)
    assert isinstance(found, Choice)
    assert found.decode != "w030"
    bed.hosts.add("w030", 1000)
    bed.hosts.stored("w030", hashes)
    found = bed.near(ask, hashes)
    assert isinstance(found, Choice)
    assert found.decode == "w030"
    assert found.uncached_tokens == BLOCK


@pytest.mark.parametrize("few", [1, 64])
@pytest.mark.parametrize("policy", ["pythia", "least_kv", "cost"])
def test_what_only_a_host_has_is_loaded_and_not_cached(policy: str, few: int) -> None:
    bed = Bed(Placement(policy=policy, compared_workers=few, disaggregated="never"))  # type: ignore[arg-type]
    for name in ("a", "b"):
        bed.worker(name)
    hashes = chain(*range(1, 50))
    bed.hosts.add("b", 1000)
    bed.hosts.stored("b", hashes[: 30 * 8])
    bed.index.stored("b", hashes[: 10 * 8])
    found = bed.near(bed.ask(49 * BLOCK), hashes)
    assert isinstance(found, Choice)
    parts = found.cached_blocks, found.loaded_blocks, found.uncached_tokens
    assert (found.decode, parts) == ("b", (10, 20, 19 * BLOCK))


def test_a_prefill_worker_loads_what_only_its_host_has() -> None:
    bed = Bed(Placement(policy="least_kv", disaggregated="always"))
    bed.worker("d")
    bed.worker("p", "prefill")
    bed.warm()
    hashes = chain(*range(1, 50))
    for name in ("d", "p"):
        bed.hosts.add(name, 1000)
    bed.hosts.stored("d", hashes)
    bed.hosts.stored("p", hashes[: 30 * 8])
    bed.index.stored("p", hashes[: 10 * 8])
    found = bed.near(bed.ask(49 * BLOCK), hashes)
    assert isinstance(found, Choice)
    parts = found.cached_blocks, found.loaded_blocks, found.uncached_tokens
    assert (found.prefill, parts) == ("p", (0, 20, 19 * BLOCK))


def test_when_nobody_has_room_nobody_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    bed = cluster()
    for worker in bed.state.workers.values():
        bed.take(worker, 95)
    monkeypatch.setattr("coordinator.placing.place", None)
    assert bed.near(bed.ask(200)) is NO_ROOM


def test_room_that_only_a_busy_large_worker_has_is_found() -> None:
    bed = cluster()
    bed.worker("wide", kv_blocks=1000)
    bed.warm()
    for worker in bed.state.workers.values():
        bed.take(worker, 50 if worker.name != "wide" else 700)
    chosen = bed.near(bed.ask(100 * BLOCK, aggregated=True))
    assert isinstance(chosen, Choice)
    assert chosen.decode == "wide"


def test_a_prefill_worker_that_is_linked_is_found_among_many_that_are_not() -> None:
    bed = cluster()
    for worker in bed.state.workers.values():
        worker.warm_sources = {"w028"}
    bed.state.workers["w028"].prefill_tokens = 10_000
    chosen = bed.near(bed.ask(900))
    assert isinstance(chosen, Choice)
    assert chosen.prefill == "w028"


def test_workers_that_are_gone_suspect_or_turned_are_not_in_the_order() -> None:
    bed = cluster()
    for worker in list(bed.state.workers.values()):
        if worker.role == "prefill":
            worker.turn("decode", 0.0, "test")
            bed.standing.add(worker)
        elif worker.name.endswith("1"):
            worker.move(WorkerPhase.SUSPECT, 0.0, "test")
            bed.standing.touch(worker)
        elif worker.name.endswith("2"):
            del bed.state.workers[worker.name]
            bed.standing.remove(worker)
    bed.standing.check(bed.state.workers.values())
    assert not bed.standing.prefillers
    up = sum(worker.up for worker in bed.state.workers.values())
    assert len(bed.standing.decoders) == up


def test_a_worker_that_failed_the_call_is_avoided_among_many() -> None:
    bed = cluster()
    first = bed.near(bed.ask(100))
    assert isinstance(first, Choice)
    again = bed.near(bed.ask(100, avoid={(first.decode, f"{first.decode}-1")}))
    assert isinstance(again, Choice)
    assert again.decode != first.decode


def load_of(bed: Bed, name: str) -> float:
    """What the policy goes by, of a worker with 100 blocks and 8 slots."""
    worker = bed.state.workers[name]
    return max(worker.kv_blocks_reserved, worker.kv_blocks_used) / 100 + worker.waiting / 8


policies = st.sampled_from(["pythia", "least_kv"])
loads = st.lists(
    st.tuples(st.integers(0, 120), st.integers(0, 5), st.integers(0, 3), st.integers(0, 2000)),
    min_size=20,
    max_size=20,
)


@settings(max_examples=200, deadline=None)
@given(loads, st.integers(1, 1500), st.integers(0, 2**32), st.booleans(), policies)
def test_a_few_find_a_place_whenever_all_do_and_the_best_by_load(
    loads: list[tuple[int, int, int, int]],
    prompt_tokens: int,
    seed: int,
    caches: bool,
    policy: Literal["pythia", "least_kv"],
) -> None:
    bed, rng = Bed(Placement(policy=policy, compared_workers=16)), Random(seed)
    for number, (blocks, calls, waiting, tokens) in enumerate(loads):
        worker = bed.worker(f"w{number:03}", "prefill" if number % 4 == 0 else "decode")
        worker.prefilling = min(calls, 2) if worker.role == "prefill" else 0
        worker.prefill_tokens = tokens
        worker.beat(Load(waiting=waiting), [])
        bed.take(worker, blocks, calls)
    bed.warm()
    hashes = chain(*range(1, prompt_tokens // BLOCK + 1))
    if caches:
        for name in rng.sample(sorted(bed.state.workers), 6):
            bed.index.stored(name, hashes[: 8 * rng.randrange(len(hashes) // 8 + 1)])
    ask = bed.ask(prompt_tokens)
    few, everybody = bed.near(ask, hashes), bed.all(ask, hashes)
    assert type(few) is type(everybody)
    bed.standing.check(bed.state.workers.values())
    if policy == "pythia" or caches:
        return
    if isinstance(few, Choice) and isinstance(everybody, Choice):
        assert load_of(bed, few.decode) == pytest.approx(load_of(bed, everybody.decode))


def test_renewing_costs_what_was_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    bed = cluster()
    bed.standing.renew()
    put: list[str] = []
    monkeypatch.setattr(bed.standing, "_put", lambda worker: put.append(worker.name))
    bed.standing.touch(bed.state.workers["w005"])
    bed.standing.renew()
    bed.standing.renew()
    assert put == ["w005"]
    assert bed.standing._touched == set()

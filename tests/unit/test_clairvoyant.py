"""What the clairvoyant placer does with what it knows."""

from __future__ import annotations

import pytest

from cluster.hardware import hardware
from cluster.simulator.baselines import BASELINES, applied, core_factory
from cluster.simulator.clairvoyant import HOLD_S, by_request
from cluster.simulator.setup import ClusterSetup, EngineOptions, WorkerSetup
from cluster.workload.form import Call, Run, Workload
from coordinator.limits import Limits
from coordinator.protocol import (
    CallContext,
    Failed,
    Finished,
    Plan,
    Probe,
    Probed,
    ProbeFinished,
    ProbeRead,
    Started,
    Submit,
)
from tests.unit.test_core import Bed, Told, hashes, ready
from tests.unit.test_critical_path import SHAPE

BLOCK_SIZE = 16


def run_of(name: str, *outputs: int, prompt_tokens: int = 64, pause_s: float = 1.0) -> Run:
    """A chain of calls, each of which goes on from the one before."""
    calls = tuple(
        Call(
            index,
            (index - 1,) if index else (),
            pause_s,
            prompt_tokens,
            output_tokens,
            (),
            continued=((1, 1),) if index + 1 < len(outputs) else (),
        )
        for index, output_tokens in enumerate(outputs)
    )
    return Run(name, "flow", 0.0, name, calls)


class Cluster:
    """A core with a clairvoyant placer."""

    def __init__(self, *runs: Run, workers: int = 2, kv_blocks: int = 100, **limits: int) -> None:
        self.workload = Workload("w", "tests", "none", BLOCK_SIZE, runs)
        setup = ClusterSetup(
            SHAPE,
            hardware("h200"),
            tuple(WorkerSetup(f"mixed-{number}", "mixed") for number in range(workers)),
            options=EngineOptions(block_size=BLOCK_SIZE, kv_blocks=kv_blocks),
            limits=Limits(**{"calls_per_worker": 64, **limits}),
        )
        self.setup = applied(BASELINES["clairvoyant"], setup, 1)
        make = core_factory(BASELINES["clairvoyant"], self.setup, self.workload)
        self.bed = Bed()
        self.bed.core = make(self.setup.limits, self.setup.placement, "core")
        self._register(workers, kv_blocks)

    def _register(self, workers: int, kv_blocks: int) -> None:
        """An API process and workers, all pairs of them warm."""
        self.bed.api()
        told: Told = []
        for number in range(workers):
            name = f"mixed-{number}"
            facts = {"kv_blocks": kv_blocks, "max_model_len": 100_000, "max_num_seqs": 256}
            told += self.bed.say(name, ready(name, "mixed", **facts))
        while told:
            peer, message = told.pop(0)
            if isinstance(message, Probe):
                told += self.bed.say(peer, Probed(peer, "1", message.probe, b"handle"))
            elif isinstance(message, ProbeRead):
                told += self.bed.say(peer, ProbeFinished(peer, "1", message.probe, 0.1, 16))

    def plan(self, request: str, prompt_tokens: int = 64, **more: object) -> Plan:
        more.setdefault("block_hashes", b"")
        return self.bed.plan(request, prompt_tokens, **more)

    def started(self, request: str) -> None:
        self.bed.say("api", Started("api", request, 1))

    def ended(self, request: str, cached_tokens: int = 10**6) -> list[Plan]:
        """A call ends; the plans that this makes possible."""
        self.started(request)
        told = self.bed.say(
            "api", Finished("api", request, 1, "stop", 4, cached_tokens, cached_tokens)
        )
        return [message for _, message in told if isinstance(message, Plan)]


def named(request: str, run: str = "") -> Submit:
    return Submit("api", request, 1, 64, 8, context=CallContext("flow", run))


def test_calls_are_known_by_their_request() -> None:
    lookup = by_request(Workload("w", "", "", 64, (run_of("a", 1, 2), run_of("b", 3))))
    assert lookup(named("0.1.0")) == (0, 1)
    assert lookup(named("1-0-x", "b")) == (1, 0)
    for request in ("2.0.0", "0.2.0", "1.1.0", "x.0.0", "0", "0.1x", "", "-1.0.0"):
        assert lookup(named(request)) is None, request
    assert lookup(named("0.1.0", "b")) is None


def test_the_run_with_the_least_work_left_is_served_first() -> None:
    long, short = run_of("long", 90, 90, 90), run_of("short", 90)
    nearly_over = run_of("nearly over", 90, 90, 2)
    cluster = Cluster(long, short, nearly_over, workers=1, calls_per_worker=1)
    cluster.plan("x")
    for request in ("0.0.0", "1.0.0", "2.0.0", "2.2.0"):
        assert cluster.bed.submit(request, 64, block_hashes=b"") == []
    order, last = [], "x"
    for _ in range(4):
        (plan,) = cluster.ended(last)
        last = plan.request
        order.append(last)
    assert order == ["2.2.0", "1.0.0", "2.0.0", "0.0.0"]


def test_within_a_run_the_longest_path_goes_first() -> None:
    first = Call(0, (), 0.0, 64, 8, ())
    side, main = Call(1, (0,), 0.0, 64, 8, ()), Call(2, (0,), 0.0, 64, 8, ())
    end = Call(3, (1, 2), 0.0, 64, 8, ())
    more = Call(4, (2,), 0.0, 64, 200, ())
    run = Run("r", "flow", 0.0, "r", (first, side, main, end, more))
    cluster = Cluster(run, workers=1, calls_per_worker=1)
    cluster.plan("x")
    for request in ("0.1.0", "0.2.0"):
        cluster.bed.submit(request, 64, block_hashes=b"")
    assert [plan.request for plan in cluster.ended("x")] == ["0.2.0"]


def test_exactly_what_a_call_will_need_is_reserved() -> None:
    cluster = Cluster(run_of("a", 700), run_of("b", 1), workers=1)
    cluster.plan("0.0.0", max_output_tokens=1000)
    assert cluster.bed.reserved() == [48]  # 64 + 700 tokens
    cluster.plan("1.0.0", max_output_tokens=1000)
    assert cluster.bed.reserved() == [48 + 5]


def test_without_room_for_that_a_call_waits() -> None:
    cluster = Cluster(run_of("a", 700), run_of("b", 700), run_of("c", 8), workers=1)
    cluster.plan("0.0.0")
    assert cluster.bed.submit("1.0.0", 64, block_hashes=b"") == []
    (plan,) = cluster.ended("0.0.0")
    assert plan.request == "1.0.0"


def test_a_run_stays_with_its_context() -> None:
    cluster = Cluster(run_of("a", 8, 8, prompt_tokens=1200), run_of("b", 8))
    first = cluster.bed.plan("0.0.0", 1200).decode
    cluster.ended("0.0.0")
    cluster.started(cluster.plan("1.0.0").request)
    assert cluster.bed.plan("0.1.0", 1200).decode == first


def test_runs_that_will_be_there_at_once_are_kept_apart() -> None:
    runs = [run_of(name, *[200] * 9) for name in "abc"]
    cluster = Cluster(*runs, workers=3, kv_blocks=4000)
    homes = []
    for number in range(3):
        homes.append(cluster.plan(f"{number}.0.0").decode.worker)
        cluster.ended(f"{number}.0.0")
    assert sorted(homes) == ["mixed-0", "mixed-1", "mixed-2"]


def test_a_run_goes_to_the_worker_whose_runs_have_less_to_do() -> None:
    much, little = run_of("much", *[200] * 20), run_of("little", *[200] * 2)
    cluster = Cluster(much, little, run_of("new", *[200] * 9), kv_blocks=4000)
    assert cluster.plan("0.0.0").decode.worker == "mixed-0"
    cluster.ended("0.0.0")
    assert cluster.plan("1.0.0").decode.worker == "mixed-1"
    cluster.ended("1.0.0")
    # Both hold a context of one size.
    assert cluster.plan("2.0.0").decode.worker == "mixed-1"


def test_a_run_that_is_over_leaves_no_burden() -> None:
    cluster = Cluster(run_of("a", 8), run_of("b", 8, 8))
    homes = []
    for request in ("0.0.0", "1.0.0"):
        homes.append(cluster.plan(request).decode.worker)
        cluster.ended(request)
    assert homes == ["mixed-0", "mixed-0"]


def test_a_long_prompt_is_computed_where_it_delays_nobody() -> None:
    """The context is on the worker that decodes many; what is new of the prompt is long."""
    others = [run_of(f"o{number}", 600) for number in range(20)]
    grown = run_of("grown", 4, 4, prompt_tokens=40_000)
    cluster = Cluster(grown, *others, kv_blocks=10_000)
    home = cluster.bed.plan("0.0.0", 30_000, block_hashes=hashes(30_000)).decode
    cluster.ended("0.0.0")
    # With none to delay it is computed at home, on top of what is there.
    known = hashes(30_000)
    plan = cluster.plan("0.1.0", 40_000, block_hashes=known)
    assert (plan.decode, plan.prefill) == (home, None)
    cluster.bed.say("api", Finished("api", "0.1.0", 1, "abort"))
    (other,) = {"mixed-0", "mixed-1"} - {home.worker}
    cluster.bed.wait(3.0, "api", home.worker)
    assert cluster.bed.status(other).state == "suspect"
    for number in range(1, 21):
        assert cluster.plan(f"{number}.0.0").decode == home
        cluster.started(f"{number}.0.0")
    cluster.bed.beat(other)
    plan = cluster.plan("0.1.1", 40_000, block_hashes=known)
    assert (plan.decode.worker, plan.prefill) == (other, None)


def test_while_every_worker_has_enough_to_prefill_nothing_is_sent() -> None:
    cluster = Cluster(*[run_of(str(number), 8) for number in range(40)], kv_blocks=40_000)
    told = [cluster.bed.submit(f"{n}.0.0", 8000, block_hashes=b"") for n in range(40)]
    planned = sum(bool(each) for each in told)
    assert 2 <= planned < 40
    assert not any(told[planned:])
    token_s = cluster.setup.cost().prefill_s(8192, 16384) / 8192
    workers = cluster.bed.core._state.workers.values()
    assert all(worker.prefill_tokens * token_s > HOLD_S for worker in workers)
    cluster.started("0.0.0")
    assert len(cluster.bed.heard(Plan)) == 1


def test_calls_that_are_not_of_the_workload_are_placed_as_configured() -> None:
    cluster = Cluster(run_of("a", 700))
    cluster.plan("nobody", max_output_tokens=1000)
    assert sorted(cluster.bed.reserved()) == [0, 20]  # 64 + 256 tokens
    assert cluster.bed.row("nobody").reason.startswith("local: ")


def test_a_generated_part_is_no_output_any_more() -> None:
    cluster = Cluster(run_of("a", 700), workers=2)
    plan = cluster.plan("0.0.0", max_output_tokens=1000)
    cluster.started("0.0.0")
    cluster.bed.say("api", Failed("api", "0.0.0", 1, plan.decode.worker, "gone", 100))
    again = cluster.bed.only(Plan)
    assert again.decode != plan.decode
    assert sum(cluster.bed.reserved()) == 48


@pytest.mark.parametrize("crashes", [1, 2])
def test_a_new_core_gets_a_placer_of_its_own(crashes: int) -> None:
    cluster = Cluster(run_of("a", 8, 8))
    make = core_factory(BASELINES["clairvoyant"], cluster.setup, cluster.workload)
    cores = [make(cluster.setup.limits, cluster.setup.placement, str(n)) for n in range(crashes)]
    placers = {id(core._calls._placer) for core in cores}
    assert len(placers) == crashes
    assert cluster.setup.limits.queue_s == cluster.setup.limits.call_s

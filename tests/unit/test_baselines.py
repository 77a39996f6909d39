"""What makes each baseline that baseline, in a core that runs it."""

from __future__ import annotations

import msgspec
import pytest

from cluster.hardware import hardware
from cluster.simulator.baselines import (
    BASELINES,
    UNBOUNDED,
    Baseline,
    BaselineError,
    applied,
    core_factory,
    prefill_workers,
)
from cluster.simulator.setup import ClusterSetup, EngineOptions, WorkerSetup
from cluster.workload.form import Workload
from coordinator.core import Core
from coordinator.limits import Limits, Placement, Ratio
from coordinator.protocol import CallContext, Finished, Plan, Prefilled, Rejected, Started
from tests.unit.test_core import Bed, hashes
from tests.unit.test_critical_path import SHAPE

NOTHING = Workload("w", "tests", "none", 64, ())
LONG = 1024
SHORT = 64


def setup_of(workers: int) -> ClusterSetup:
    return ClusterSetup(
        SHAPE,
        hardware("h200"),
        tuple(WorkerSetup(f"w{number}", "mixed") for number in range(workers)),
        options=EngineOptions(block_size=16, kv_blocks=100),
        limits=Limits(calls_per_worker=4, prefills_per_worker=2),
    )


class Cluster:
    """A core that runs a baseline, its workers warm, and an API process."""

    def __init__(self, name: str, workers: int = 4, prefill_count: int = 1) -> None:
        baseline = BASELINES[name]
        self.setup = applied(baseline, setup_of(workers), prefill_count)
        self.bed = Bed()
        make = core_factory(baseline, self.setup, NOTHING)
        self.bed.core = make(self.setup.limits, self.setup.placement, "core")
        self.roles = {worker.name: worker.role for worker in self.setup.workers}
        self.names = self.bed.cluster(*sorted(self.roles.values(), reverse=True))
        self.decoders = [name for name in self.names if not name.startswith("prefill")]

    def plan(self, request: str, prompt_tokens: int = SHORT, run: str = "") -> Plan:
        """A call of prompts that begin alike."""
        context = CallContext("w", run) if run else CallContext()
        return self.bed.plan(request, prompt_tokens, context=context)

    def other(self, request: str, prompt_tokens: int, run: str = "") -> Plan:
        """A call whose prompt is like no other."""
        context = CallContext("w", run) if run else CallContext()
        return self.bed.plan(request, prompt_tokens, context=context, block_hashes=b"")

    def end(self, plan: Plan) -> None:
        if plan.prefill is not None:
            self.bed.say("api", Prefilled("api", plan.request, 1))
        self.bed.say("api", Started("api", plan.request, 1))
        cached = 10**6
        self.bed.say("api", Finished("api", plan.request, 1, "stop", 4, cached, cached))


AGGREGATED = [name for name in BASELINES if name.startswith("aggregated-")]
DISAGGREGATED = [name for name in BASELINES if name.startswith("pd-")]
ABLATIONS = [name for name in BASELINES if name.startswith("pythia-no-")]


# --- all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_is_a_valid_configuration(name: str) -> None:
    made = applied(BASELINES[name], setup_of(4), 1)
    for part, kind in ((made.placement, Placement), (made.limits, Limits)):
        assert msgspec.convert(msgspec.to_builtins(part), kind) == part
    expected = {"mixed": ["mixed"] * 4, "split": ["decode"] * 3 + ["prefill"]}
    roles = sorted(worker.role for worker in made.workers)
    assert roles == expected[BASELINES[name].roles]
    assert [worker.name for worker in made.workers] == ["w0", "w1", "w2", "w3"]


def test_no_two_baselines_are_the_same() -> None:
    placed = {name: each for name, each in BASELINES.items() if not each.placers and not each.bound}
    assert len(placed) == len(BASELINES) - 2
    configured = [
        (each.roles, each.placement, each.ratio, each.predictions, each.future)
        for each in placed.values()
    ]
    for name, each in zip(placed, configured, strict=True):
        assert configured.count(each) == 1, name
    assert len({each.description for each in BASELINES.values()}) == len(BASELINES)


@pytest.mark.parametrize("name", [*AGGREGATED, *DISAGGREGATED])
def test_other_systems_send_at_once_what_ours_lets_wait(name: str) -> None:
    cluster, ours = Cluster(name), Cluster("pythia")
    for number in range(40):
        cluster.other(f"c{number}", LONG)
    assert cluster.setup.limits.calls_per_worker == UNBOUNDED
    planned = [ours.bed.submit(f"c{number}", LONG, block_hashes=b"") for number in range(40)]
    assert [] in planned
    assert not any(isinstance(message, Rejected) for told in planned for _, message in told)
    patience_s = cluster.setup.limits.prefill_s
    assert patience_s == ours.setup.limits.queue_s + ours.setup.limits.prefill_s


def test_ours_is_the_default() -> None:
    made = applied(BASELINES["pythia"], setup_of(4), 1)
    assert (made.placement, made.limits) == (Placement(), setup_of(4).limits)
    assert core_factory(BASELINES["pythia"], made, NOTHING) is Core


def test_the_clusters_own_settings_are_kept() -> None:
    own = msgspec.structs.replace(setup_of(4), placement=Placement(remote_prefill_min_tokens=9))
    made = applied(BASELINES["pd-sticky-conditional"], own, 2)
    assert made.placement.remote_prefill_min_tokens == 9
    assert made.limits.attempts == own.limits.attempts


# --- roles --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "prefill", "decode", "expected"),
    [(8, 1, 3, 2), (8, 1, 1, 4), (2, 1, 9, 1), (2, 9, 1, 1), (3, 1, 1, 2), (64, 1, 3, 16)],
)
def test_a_ratio_becomes_a_number(workers: int, prefill: int, decode: int, expected: int) -> None:
    assert prefill_workers(workers, prefill, decode) == expected


def test_one_worker_cannot_be_split() -> None:
    with pytest.raises(BaselineError, match="1 workers cannot be split 1:3"):
        prefill_workers(1, 1, 3)
    with pytest.raises(BaselineError, match="of 2 workers 2 prefill: both roles need"):
        applied(BASELINES["pythia"], setup_of(2), 2)


def test_prefill_workers_are_spread_over_nodes() -> None:
    made = applied(BASELINES["pythia"], setup_of(8), 2)
    assert [w.name for w in made.workers if w.role == "prefill"] == ["w3", "w7"]


# --- one by one ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AGGREGATED)
def test_aggregated_calls_stay_where_they_are(name: str) -> None:
    cluster = Cluster(name)
    for number in range(8):
        assert cluster.other(f"c{number}", LONG).prefill is None


@pytest.mark.parametrize("name", ["pd-round-robin", "pd-sticky", "pd-cost"])
def test_static_disaggregation_never_prefills_on_a_decode_worker(name: str) -> None:
    cluster = Cluster(name)
    for number, tokens in enumerate((1, SHORT, LONG, SHORT, LONG)):
        plan = cluster.plan(f"c{number}", tokens)
        assert plan.prefill is not None
        assert plan.prefill.worker == "prefill-0"
        cluster.end(plan)


@pytest.mark.parametrize("name", ["pd-sticky-conditional", "pd-reactive"])
def test_conditional_disaggregation_prefills_what_is_short_or_cached_locally(name: str) -> None:
    cluster = Cluster(name)
    assert cluster.other("short", 511).prefill is None
    plan = cluster.plan("long", LONG)
    assert plan.prefill is not None
    cluster.end(plan)
    again = cluster.plan("again", LONG)
    assert (again.prefill, again.decode) == (None, plan.decode)


def test_round_robin_visits_all_workers_in_turn_whatever_their_load() -> None:
    cluster = Cluster("aggregated-round-robin")
    visited = [
        cluster.plan(f"c{number}", LONG if number % 4 == 0 else SHORT).decode.worker
        for number in range(12)
    ]
    assert visited == cluster.names * 3


def test_round_robin_visits_prefill_and_decode_workers_in_turn() -> None:
    cluster = Cluster("pd-round-robin", workers=5, prefill_count=2)
    plans = [cluster.plan(f"c{number}", LONG) for number in range(6)]
    assert [plan.prefill and plan.prefill.worker for plan in plans] == [
        "prefill-0",
        "prefill-1",
    ] * 3
    assert [plan.decode.worker for plan in plans] == ["decode-2", "decode-3", "decode-4"] * 2


def test_least_loaded_takes_the_worker_with_the_fewest_calls_not_the_cached_one() -> None:
    cluster = Cluster("aggregated-least-loaded", workers=3)
    first = cluster.plan("first", LONG)
    cluster.end(first)
    busy = cluster.plan("busy", SHORT)
    assert busy.decode == first.decode
    assert cluster.plan("same", LONG).decode != first.decode


@pytest.mark.parametrize("name", ["aggregated-sticky", "pd-sticky", "pd-reactive"])
def test_sticky_returns_to_the_last_worker_until_its_load_exceeds_the_bound(name: str) -> None:
    cluster = Cluster(name)
    cluster.other("elsewhere", SHORT)
    home = cluster.other("first", SHORT, run="1").decode.worker
    assert home != cluster.decoders[0]
    for number in range(7):
        assert cluster.other(f"c{number}", SHORT, run="1").decode.worker == home
    # Eight calls are open there, and one elsewhere.
    assert cluster.other("spilt", SHORT, run="1").decode.worker != home


@pytest.mark.parametrize("name", ["aggregated-sticky", "pd-sticky"])
def test_cache_aware_goes_where_the_prompt_is(name: str) -> None:
    cluster = Cluster(name)
    cluster.other("elsewhere", SHORT)
    first = cluster.plan("first", 320)
    cluster.end(first)
    for number in range(3):
        assert cluster.plan(f"c{number}", 320).decode == first.decode
    assert cluster.other("new", SHORT).decode != first.decode


@pytest.mark.parametrize("name", ["aggregated-cost", "pd-cost"])
def test_the_cost_router_weighs_blocks_to_prefill_against_blocks_to_decode(name: str) -> None:
    cluster = Cluster(name, workers=3)
    a, b = cluster.decoders[:2]
    first = cluster.plan("first", 40 * 16)
    assert first.decode.worker == a
    cluster.end(first)
    # Its 40 blocks are on a. A call that keeps 30 blocks there (28 and 2 for output) costs
    # less than prefilling 40 again, one that keeps 2 more than 40 does not.
    assert cluster.bed.plan("x", 28 * 16, block_hashes=hashes(28 * 16)).decode.worker == a
    cluster.bed.say("api", Prefilled("api", "x", 1))
    cluster.bed.say("api", Started("api", "x", 1))
    assert cluster.plan("y", 40 * 16).decode.worker == a
    cluster.bed.say("api", Prefilled("api", "y", 1))
    cluster.bed.say("api", Started("api", "y", 1))
    assert cluster.plan("z", 40 * 16).decode.worker != a
    assert b in cluster.decoders


def test_reactive_flips_after_a_sustained_backlog_and_not_before() -> None:
    cluster = Cluster("pd-reactive")
    ratio = cluster.setup.placement.ratio
    prompts = -(-ratio.prefill_tokens_high // LONG)
    for number in range(prompts):
        cluster.other(f"c{number}", LONG)
    flips = cluster.bed.core.counters
    cluster.bed.wait(ratio.interval_s * (ratio.looks - 1), "api", *cluster.names)
    assert flips["role_flips"] == 0
    cluster.bed.wait(ratio.interval_s, "api", *cluster.names)
    assert flips["role_flips"] == 1
    # One decode worker is left in the end, however long it lasts.
    cluster.bed.wait(60.0, "api", *cluster.names)
    roles = [row.role for row in cluster.bed.snapshot().workers]
    assert sorted(roles) == ["decode", "decode", "prefill", "prefill"]


BY_FORECAST = ("pythia-rebalance", "pythia-rebalance-shared", "rebalance-oracle")


@pytest.mark.parametrize("name", [n for n in BASELINES if n != "pd-reactive"])
def test_only_the_reactive_baseline_flips(name: str) -> None:
    assert applied(BASELINES[name], setup_of(4), 1).placement.ratio.mode == "static"


@pytest.mark.parametrize("name", BASELINES)
def test_roles_follow_demand_where_they_are_meant_to(name: str) -> None:
    rebalance = applied(BASELINES[name], setup_of(4), 1).placement.rebalance
    assert rebalance.mode == ("auto" if name in BY_FORECAST else "off")


@pytest.mark.parametrize("name", BASELINES)
def test_a_file_that_asks_for_reactive_turns_ours_and_no_static_baseline(name: str) -> None:
    asked = Placement(ratio=Ratio(mode="reactive", dwell_s=7.0))
    made = applied(BASELINES[name], msgspec.structs.replace(setup_of(4), placement=asked), 1)
    ours = name.startswith("pythia") and name not in BY_FORECAST
    turns = name == "pd-reactive" or ours
    assert made.placement.ratio.mode == ("reactive" if turns else "static")
    assert made.placement.ratio.dwell_s == 7.0


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_differs_from_ours_in_one_thing(name: str) -> None:
    baseline: Baseline = BASELINES[name]
    things = 2 if name == "pythia-no-downstream" else 1
    assert len(baseline.placement) == things
    ours = applied(BASELINES["pythia"], setup_of(4), 1)
    theirs = applied(baseline, setup_of(4), 1)
    assert ours.placement != theirs.placement

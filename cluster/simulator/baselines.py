"""What Pythia is compared with: each the same core, configured, and two bounds.

Other systems have no admission of their own: what they have routed waits in the engine's
queue, which preempts when memory runs out. So their baselines reserve nothing, have no bound
on calls per worker, and wait as long for an engine as Pythia's calls wait in the core and on
an engine together. Everything else (engines, network, identity of runs, prefix index) is the
same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import msgspec

from cluster.simulator.clairvoyant import clairvoyants
from cluster.simulator.critical_path import CONFIGURATION, critical_path
from cluster.simulator.future import KnownFuture
from cluster.simulator.records import Result
from cluster.simulator.scrambled import Scrambled
from cluster.simulator.setup import ClusterSetup, WorkerSetup
from cluster.workload.form import Workload
from coordinator.core import Core
from coordinator.limits import Limits, Placement
from coordinator.policy.placer import Placer
from coordinator.protocol import Role
from coordinator.workflow.limits import WorkflowLimits

__all__ = ["BASELINES", "Baseline", "BaselineError", "applied", "core_factory", "prefill_workers"]

Changes = Mapping[str, object]
MakePlacers = Callable[[Workload, ClusterSetup], Callable[[], Placer]]
MakeFuture = Callable[[Workload, ClusterSetup], KnownFuture]
Bound = Callable[[Workload, ClusterSetup, int], Result]

UNBOUNDED = 1_000_000


class BaselineError(Exception):
    """A baseline cannot be had on a cluster; the text says why."""


class Baseline(msgspec.Struct, frozen=True):
    """One way to run a cluster.

    ``placement``: fields that differ from the cluster's own. ``roles``: of its
    workers; ``split`` into prefill and decode. ``ratio``: whether they turn; ``own`` is as the
    cluster's file says, which also has the thresholds for ``reactive``, and those of ``rebalance``
    for ``forecast``. ``placers``: who decide instead of the policy, one for each core of a replay;
    ``future``: what is known of demand. ``predictions``: ``random`` ones are wrong, see
    ``scrambled``.
    ``bound``: there is nothing to simulate, it says the result itself.
    """

    description: str
    roles: Literal["mixed", "split"]
    placement: Changes = {}
    ratio: Literal["own", "static", "reactive", "forecast"] = "own"
    placers: MakePlacers | None = None
    predictions: Literal["own", "random"] = "own"
    future: MakeFuture | None = None
    bound: Bound | None = None


def applied(baseline: Baseline, setup: ClusterSetup, prefill_count: int) -> ClusterSetup:
    """The cluster with the baseline's roles, placement and limits.

    ``prefill_count``: how many workers prefill where roles are split; see ``prefill_workers``.
    """
    workers = setup.workers
    if baseline.roles == "mixed":
        roles: list[Role] = ["mixed"] * len(workers)
    else:
        roles = _split(len(workers), prefill_count)
    return msgspec.structs.replace(
        setup,
        workers=tuple(map(_with_role, workers, roles)),
        placement=_placement(baseline, setup.placement),
        limits=msgspec.structs.replace(setup.limits, **_limits(baseline, setup.limits)),
    )


def core_factory(
    baseline: Baseline,
    setup: ClusterSetup,
    workload: Workload,
    seed: int = 0,
    future: KnownFuture | None = None,
) -> Callable[[Limits, Placement, str], Core]:
    """Makes the cores of one replay on a cluster that the baseline was ``applied`` to, from
    limits, placement and the core's id. ``seed``: of predictions that are random; ``future``: of
    its baseline, if it has one."""
    if baseline.predictions == "random":
        return lambda limits, placement, core_id: Core(
            limits, placement, core_id, profiles=Scrambled(WorkflowLimits(), seed)
        )
    if baseline.placers is None:
        if future is None:
            return Core
        return partial(Core, future=future)
    new_placer = baseline.placers(workload, setup)

    def core(limits: Limits, placement: Placement, core_id: str) -> Core:
        return Core(limits, placement, core_id, placer=new_placer())

    return core


def prefill_workers(workers: int, prefill: int, decode: int) -> int:
    """How many of ``workers`` prefill at a ratio of ``prefill`` to ``decode``.

    At least one, and at least one is left; BaselineError if there are too few for that.
    """
    if workers < 2 or prefill < 1 or decode < 1:
        raise BaselineError(
            f"{workers} workers cannot be split {prefill}:{decode} into prefill and decode"
        )
    share = workers * prefill / (prefill + decode)
    return min(workers - 1, max(1, round(share)))


def _split(workers: int, prefill_count: int) -> list[Role]:
    """Prefill workers spread evenly, so that every node has some if it can."""
    if not 0 < prefill_count < workers:
        raise BaselineError(
            f"of {workers} workers {prefill_count} prefill: both roles need at least one worker"
        )
    return [
        "prefill"
        if (number + 1) * prefill_count // workers > number * prefill_count // workers
        else "decode"
        for number in range(workers)
    ]


def _with_role(worker: WorkerSetup, role: Role) -> WorkerSetup:
    return msgspec.structs.replace(worker, role=role)


def _placement(baseline: Baseline, placement: Placement) -> Placement:
    ratio = placement.ratio
    rebalance = placement.rebalance
    if baseline.ratio != "own":
        mode = "reactive" if baseline.ratio == "reactive" else "static"
        ratio = msgspec.structs.replace(ratio, mode=mode)
        mode = "auto" if baseline.ratio == "forecast" else "off"
        rebalance = msgspec.structs.replace(rebalance, mode=mode)
    changes = {"ratio": ratio, "rebalance": rebalance} | dict(baseline.placement)
    return msgspec.structs.replace(placement, **changes)


def _limits(baseline: Baseline, limits: Limits) -> Changes:
    """What changes; a prefill or first token may take as long as it and the queue together.

    Who knows the future may let calls wait as long as it likes.
    """
    if baseline.placers is not None:
        return {"queue_s": limits.call_s, "queue_calls": UNBOUNDED}
    if baseline.placement.get("reserve", True):
        return {}
    return {
        "calls_per_worker": UNBOUNDED,
        "prefills_per_worker": UNBOUNDED,
        "prefill_s": limits.queue_s + limits.prefill_s,
        "first_token_s": limits.queue_s + limits.first_token_s,
    }


# Others are faster with some room that they never give away.
_HEADROOM: dict[str, object] = {"kv_headroom_fraction": 0.05}
_ROUTED: dict[str, object] = {"reserve": False, "retention": False, **_HEADROOM}
_AGGREGATED = _ROUTED | {"disaggregated": "never"}
_STATIC = _ROUTED | {"disaggregated": "always"}
_STICKY: dict[str, object] = {"policy": "cache_aware", "sticky": True}

BASELINES: Mapping[str, Baseline] = {
    "pythia": Baseline("Pythia's own placement with all its mechanisms", "split"),
    "pythia-rebalance": Baseline(
        "the same, roles are kept apart and follow the demand that is expected",
        "split",
        {"prefill_workers_decode": False},
        ratio="forecast",
    ),
    "pythia-rebalance-shared": Baseline(
        "the same, but a role is only what a worker does rather: prefill workers may decode",
        "split",
        {"prefill_workers_decode": True},
        ratio="forecast",
    ),
    "pythia-mixed": Baseline("the same, all workers may do everything", "mixed"),
    "pythia-random": Baseline(
        "the same, everything that is predicted is wrong at random", "split", predictions="random"
    ),
    # --- other systems ---
    "aggregated-round-robin": Baseline(
        "aggregated, one worker after the other",
        "mixed",
        _AGGREGATED | {"policy": "round_robin"},
        ratio="static",
    ),
    "aggregated-least-loaded": Baseline(
        "aggregated, the worker with the fewest open calls",
        "mixed",
        _AGGREGATED | {"policy": "least_loaded"},
        ratio="static",
    ),
    "aggregated-sticky": Baseline(
        "aggregated, cache-aware and session-sticky with bounded loads, chunked prefill",
        "mixed",
        _AGGREGATED | _STICKY,
        ratio="static",
    ),
    "pd-round-robin": Baseline(
        "static prefill and decode workers, each one after the other",
        "split",
        _STATIC | {"policy": "round_robin", "prefill_policy": "round_robin"},
        ratio="static",
    ),
    "pd-sticky": Baseline(
        "static prefill and decode workers, cache-aware and session-sticky",
        "split",
        _STATIC | _STICKY,
        ratio="static",
    ),
    "pd-sticky-conditional": Baseline(
        "the same, short uncached prompts are prefilled where they are decoded",
        "split",
        _ROUTED | {"disaggregated": "conditional"} | _STICKY,
        ratio="static",
    ),
    "aggregated-cost": Baseline(
        "aggregated, least cost of blocks to prefill and to decode (Dynamo's KV router)",
        "mixed",
        _AGGREGATED | {"policy": "cost"},
        ratio="static",
    ),
    "pd-cost": Baseline(
        "static prefill and decode workers, least cost of each (Dynamo's KV router)",
        "split",
        _STATIC | {"policy": "cost"},
        ratio="static",
    ),
    "pd-reactive": Baseline(
        "pd-sticky-conditional whose workers turn to the side that is overloaded",
        "split",
        _ROUTED | {"disaggregated": "conditional"} | _STICKY,
        ratio="reactive",
    ),
    # --- bounds ---
    "clairvoyant": Baseline(
        "knows every run's future; an informed policy, not proven optimal",
        "mixed",
        _HEADROOM,
        placers=clairvoyants,
        ratio="static",
    ),
    "rebalance-oracle": Baseline(
        "pythia-rebalance that knows the mix to come",
        "split",
        {"prefill_workers_decode": False},
        ratio="forecast",
        future=KnownFuture,
    ),
    CONFIGURATION: Baseline(
        "infinite resources: the longest path through each run, nothing waits",
        "mixed",
        bound=critical_path,
        ratio="static",
    ),
    # --- Pythia with one mechanism less ---
    "pythia-no-reservation": Baseline(
        "calls are sent out without free KV room for them",
        "split",
        {"reserve": False},
    ),
    "pythia-no-output-reservation": Baseline(
        "room is reserved for the prompt and one token only", "split", {"reserve_output_tokens": 1}
    ),
    "pythia-no-load": Baseline(
        "decode workers are chosen in turn, not by load and caches",
        "split",
        {"policy": "round_robin"},
    ),
    "pythia-no-choice": Baseline(
        "every prompt is prefilled by a prefill worker", "split", {"disaggregated": "always"}
    ),
    "pythia-no-joint": Baseline(
        "the decode worker by KV memory, then a prefill worker for long prompts; no times",
        "split",
        {"policy": "least_kv"},
    ),
    "pythia-no-shared-roles": Baseline(
        "prefill workers do not decode", "split", {"prefill_workers_decode": False}
    ),
    "pythia-no-pulls": Baseline(
        "what a peer has cached of a prompt is not read from it", "split", {"pulls": False}
    ),
    "pythia-prefetch": Baseline(
        "what the next call is likely to begin with is moved ahead of it",
        "split",
        {"prefetch": True},
    ),
    "pythia-no-work-price": Baseline(
        "what prompts cost calls that come later does not count", "split", {"work_price": 0.0}
    ),
    "pythia-no-forgotten": Baseline(
        "what caches forget does not count", "split", {"forgotten": 0.0}
    ),
    "pythia-no-disaggregation": Baseline(
        "all workers do both, each call on one", "mixed", {"disaggregated": "never"}
    ),
    "pythia-no-single-flight": Baseline(
        "a prompt counts as held only when it is computed", "split", {"single_flight": False}
    ),
    "pythia-run-order": Baseline(
        "waiting calls are served by what their runs have left, not as they came",
        "split",
        {"order": "runs"},
    ),
    "pythia-no-retention": Baseline(
        "engines evict what was used longest ago, whoever may ask for it",
        "split",
        {"retention": False},
    ),
    "pythia-no-downstream": Baseline(
        "nothing that comes next counts: what was used longest ago is evicted, and that is free",
        "split",
        {"retention": False, "forgotten": 0.0},
    ),
    "pythia-no-admission": Baseline(
        "new runs begin at once, however many are under way", "split", {"admission": False}
    ),
    "pythia-no-fairness": Baseline(
        "waiting calls of all tenants are served as if of one", "split", {"fairness": False}
    ),
    "pythia-no-siblings": Baseline(
        "calls of one group are placed one by one", "split", {"siblings_together": False}
    ),
}
"""By name. Those that begin with ``pythia-no-`` are ours with one mechanism switched off."""

"""Random small clusters in which everything goes wrong that can.

Whatever happens, every call has one end, no client misses a token or gets one twice, no KV is
read that is another's or not held any more, and nothing is left in the end.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import pytest

from cluster.simulator.api import Api
from cluster.simulator.faults import FaultReport, run_fault_seed, run_many
from cluster.simulator.worker import Worker
from coordinator.calls import Calls
from coordinator.core import Core
from coordinator.state import Api as RegisteredApi
from coordinator.state import CallPhase
from tests.simulation.pull_everything import pulling_core

SEEDS = 200
CHUNK = 10

NAMED_SEEDS = {
    "an API process is taken for lost and comes back while its calls are decoded": 226,
    "a call outlives two cores while it waits": 893,
    "workers that are too busy look stuck, and then there is no room": 937,
    "a call is decoded for longer than the core that planned it lived": 959,
    "plans are lost, one of each core": 1728,
}
"""Seeds that failed once, by what they bring about where calls are placed by memory alone."""
PULLING_SEEDS = 30
HOST_SEEDS = 30
BROKEN_SEEDS = 40
"""At most so many are needed until one shows that something is broken."""


@cache
def reports_from(first: int) -> list[FaultReport]:
    """The reports of some seeds, which several tests look at."""
    return run_many(range(first, first + CHUNK))


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_all_comes_to_a_good_end(first: int) -> None:
    reports = reports_from(first)
    assert not [report.error for report in reports if report.error]
    served = sum(report.outcomes.get("stop", 0) for report in reports)
    assert served > 0.8 * sum(report.calls for report in reports)


@pytest.mark.parametrize("name", NAMED_SEEDS)
def test_seeds_that_failed_once(name: str) -> None:
    assert run_fault_seed(NAMED_SEEDS[name], "least_kv", False, moves=False).calls > 0


def test_pulls_go_wrong_and_all_comes_to_a_good_end() -> None:
    """Every plan pulls that can: peers crash, hang and forget at every step of it."""
    counters: Counter[str] = Counter()
    for seed in range(PULLING_SEEDS):
        counters.update(run_fault_seed(seed, core_factory=pulling_core).counters)
    for counter in ("plans_pull", "pulls_missing", "pulls_unread", "tokens_pulled"):
        assert counters[counter] > 0, counter
    assert counters["plans_pull"] > 50 * PULLING_SEEDS
    assert counters["plans_remote"] > PULLING_SEEDS


def test_engines_with_room_on_their_hosts_go_wrong_and_all_comes_to_a_good_end() -> None:
    counters: Counter[str] = Counter()
    for seed in range(HOST_SEEDS):
        counters.update(run_fault_seed(seed, hosts=True).counters)
    assert counters["host_blocks_loaded"] > HOST_SEEDS


def test_the_seeds_do_go_wrong() -> None:
    """Each kind of trouble happens, and calls are lost in each phase, or nothing is tested."""
    reports = [*reports_from(0), *reports_from(CHUNK)]
    happened = {kind for report in reports for kind in report.happened}
    kinds = {"crash", "hang", "slow", "core restart", "partition", "API crash", "move"}
    assert happened == kinds
    for counter in (
        "workers_lost",
        "apis_lost",
        "replans",
        "checks_sent",
        "handles_read",
        "reads_failed",
        "moves_made",
        "moves_undone",
    ):
        assert sum(report.counters[counter] for report in reports) > 0, counter
    assert sum(report.counters["replans"] for report in reports) > 100


def test_a_seed_gives_the_same_history_every_time() -> None:
    first, second = (run_fault_seed(8) for _ in range(2))
    assert first.calls > 0
    for name in ("outcomes", "happened", "counters", "virtual_s"):
        assert getattr(first, name) == getattr(second, name), name


def test_several_processes_give_the_same_reports_as_one() -> None:
    told: list[int] = []
    both = run_many(range(6), processes=2, progress=lambda report: told.append(report.seed))
    alone = reports_from(0)[:6]
    assert sorted(told) == list(range(6))
    assert [(report.seed, report.counters) for report in both] == [
        (report.seed, report.counters) for report in alone
    ]


# --- what is broken is found ---------------------------------------------------------------------


def _ignores(*_arguments: object) -> None:
    """Somebody does nothing where something is to be done."""


def _asks_once(self: Api, call: object) -> None:
    """An API process asks for a plan and never again."""


def _checks_nothing(self: Calls, key: tuple[str, str], now_s: float) -> None:
    """The core ends what is over its time, and asks about nothing."""
    call = self._state.calls[key]
    if now_s >= call.deadline_s:
        self._refuse(call, 504, "the call is over its deadline", now_s)
    elif call.phase is CallPhase.QUEUED:
        self._refuse(call, 503, "no room within the longest wait", now_s)
    else:
        self._set_due(call, now_s + self._state.limits.check_s)


def _goes_on_as_before(self: Api, core: str) -> None:
    """An API process takes a core that was restarted for the one that it knew."""
    self.core, self.welcomed_s = core, self._events.now_s


def _never_lost(self: Core, api: RegisteredApi, now_s: float) -> None:
    """The core waits for an API process for ever."""
    self._state.deadlines.set(("api", api.name), now_s + 1.0)


BROKEN: dict[str, tuple[type, str, object, str]] = {
    "an API process ignores Stop": (Api, "_on_stop", _ignores, "was stopped and goes on"),
    "an API process never asks again": (Api, "_repeat", _asks_once, "the core has forgotten it"),
    "the core does not ask about what is overdue": (
        Calls,
        "due",
        _checks_nothing,
        "the core has had .*, and nobody else",
    ),
    "an API process does not catch up with another core": (
        Api,
        "_welcomed",
        _goes_on_as_before,
        "which another core had planned",
    ),
    "a worker ignores Abort": (Worker, "_abort", _ignores, "which is over"),
    "a worker goes on for an API process that is gone": (
        Worker,
        "_on_broken",
        _ignores,
        "which is over",
    ),
    "the core does not notice that an API process is gone": (
        Core,
        "_api_due",
        _never_lost,
        "the core takes .* for alive",
    ),
}
"""Class, method, what it does instead, what the oracle says."""


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, instead, words = BROKEN[name]
    assert callable(getattr(owner, method))
    monkeypatch.setattr(owner, method, instead)
    errors = (run_many([seed])[0].error for seed in range(BROKEN_SEEDS))
    found = [error for error in errors if re.search(words, error.partition("\n")[0])]
    assert found, "no seed shows it"

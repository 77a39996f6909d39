"""Random small clusters in which everything goes wrong that can.

Whatever happens, every call has one end, no client misses a token or gets one twice, no KV is
read that is another's or not held any more, and nothing is left in the end.
"""

from __future__ import annotations

from functools import cache

import pytest

from cluster.simulator.faults import FaultReport, run_fault_seed, run_many

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
    assert run_fault_seed(NAMED_SEEDS[name], "least_kv").calls > 0


def test_the_seeds_do_go_wrong() -> None:
    """Each kind of trouble happens, and calls are lost in each phase, or nothing is tested."""
    reports = [*reports_from(0), *reports_from(CHUNK)]
    happened = {kind for report in reports for kind in report.happened}
    assert happened == {"crash", "hang", "slow", "core restart", "partition"}
    for counter in ("workers_lost", "replans", "checks_sent", "handles_read", "reads_failed"):
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

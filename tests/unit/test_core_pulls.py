"""Calls that pull from a peer's cache, as the core sees them: phases, bounds, accounts, index."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.core import Core
from coordinator.protocol import (
    Check,
    Checked,
    CheckedPhase,
    Finished,
    KvChanges,
    Leaving,
    Placed,
    Plan,
    Prefilled,
    Pulled,
    Role,
    ShowFigures,
    Started,
    WorkflowAnswer,
)
from coordinator.workflow.foresight import Figures
from tests.simulation.pull_everything import pulling_core
from tests.unit.test_core import LIMITS, LONG, PLACEMENT, Bed, Told, hashes, ready

BLOCKS = (LONG - 1) // 16
NAMES = ("decode-0", "decode-1")


class PullBed(Bed):
    """A core that pulls whatever anybody has cached."""

    def __init__(self) -> None:
        super().__init__()
        placement = msgspec.structs.replace(PLACEMENT, policy="round_robin")
        self.core = pulling_core(LIMITS, placement, "core")

    def serve(self, request: str) -> Plan:
        """A call from plan to end, where it comes to be planned."""
        plan = self.plan(request, LONG)
        self.say("api", Started("api", request, plan.attempt))
        self.say("api", Finished("api", request, plan.attempt, "stop", 4))
        return plan

    def plan_on(self, decode: str) -> Plan:
        """The next call that is planned onto a worker; those before it are given up."""
        for request in ("c", "d"):
            plan = self.plan(request, LONG)
            if plan.decode.worker == decode:
                break
            self.say("api", Finished("api", request, 1, "abort"))
        assert plan.decode.worker == decode
        return plan

    def reserved(self) -> dict[str, int]:
        rows = self.core.snapshot(0, self.now_s).workers
        return {row.worker: row.kv_blocks_reserved for row in rows}

    def pulled(self, tokens: int, missing: bool = False, request: str = "b") -> None:
        self.say("api", Pulled("api", request, 1, tokens, missing))


@pytest.fixture
def bed() -> PullBed:
    """One worker has the prompt cached, and the other one is to decode the next call."""
    made = PullBed()
    made.cluster("decode", "decode")
    made.serve("a")
    return made


def planned(bed: PullBed) -> tuple[Plan, str, str]:
    """A plan that pulls; who decodes and who is pulled from."""
    plan = bed.plan("b", LONG)
    assert plan.pull_worker is not None
    return plan, plan.decode.worker, plan.pull_worker.worker


def test_a_pull_is_planned_bounded_and_accounted_for(bed: PullBed) -> None:
    plan, decode, peer = planned(bed)
    assert {decode, peer} == set(NAMES)
    assert (plan.pull_worker, plan.pull_tokens) == (Placed(peer, "1"), BLOCKS * 16)
    assert bed.row("b").phase == "pulling"
    assert bed.row("b").pull == peer
    assert bed.reserved()[peer] == BLOCKS + 1
    bed.pulled(BLOCKS * 16)
    assert bed.row("b").phase == "loading"
    assert bed.reserved()[peer] == BLOCKS + 1
    bed.say("api", Started("api", "b", 1))
    assert bed.reserved()[peer] == 0
    bed.say("api", Finished("api", "b", 1, "stop", 4, pulled_tokens=BLOCKS * 16))
    assert bed.reserved() == dict.fromkeys(NAMES, 0)
    assert bed.core.counters["plans_pull"] == 1
    assert bed.core.counters["tokens_pulled"] == BLOCKS * 16
    bed.say("api", ShowFigures(1))
    figures = msgspec.json.decode(bed.only(WorkflowAnswer).body, type=Figures)
    assert figures.moved["tokens_pulled"] == BLOCKS * 16


def test_what_is_not_pulled_is_computed(bed: PullBed) -> None:
    _, decode, peer = planned(bed)
    bed.pulled(0)
    assert bed.row("b").phase == "loading"
    assert bed.reserved()[peer] == 0
    assert bed.core.counters["pulls_unread"] == 1
    assert bed.core.counters["pulls_missing"] == 0
    bed.say("api", Finished("api", "b", 1, "abort"))
    # It was late, not gone: the next call tries again.
    assert bed.plan_on(decode).pull_tokens == BLOCKS * 16


class BusyBed(Bed):
    """Pythia's own placement; workers take one call each."""

    def __init__(self) -> None:
        limits = msgspec.structs.replace(LIMITS, calls_per_worker=1, late_peer_s=9.0)
        super().__init__(limits)
        placement = msgspec.structs.replace(PLACEMENT, policy="pythia")
        self.core = Core(limits, placement, "core")

    def pulls(self, request: str, late: bool = False) -> str:
        """From whom a call would read that finds its prompt on the other worker; then it ends."""
        plan = self.plan(request, 1400)
        if plan.pull_worker is not None:
            self.say("api", Pulled("api", request, 1, late=late))
        self.say("api", Finished("api", request, 1, "abort"))
        return plan.pull_worker.worker if plan.pull_worker is not None else ""


def test_a_late_peer_is_left_alone_for_a_while() -> None:
    bed = BusyBed()
    bed.cluster("decode", "decode")
    source = bed.plan("a", 1400).decode.worker
    bed.say("api", Started("api", "a", 1))
    assert bed.pulls("b") == source
    assert bed.pulls("c", late=True) == source
    assert bed.pulls("d") == ""
    bed.wait(9.5, "api", *NAMES)
    assert bed.pulls("e") == source


class HostBed(BusyBed):
    """Workers keep blocks on their hosts."""

    def worker(self, name: str, role: Role = "decode", incarnation: str = "1") -> Told:
        return self.say(name, ready(name, role, incarnation, kv_host_blocks=500))


@pytest.mark.parametrize(("tokens", "found"), [(0, 40), (16, 1), (60 * 16, 60)])
def test_of_what_is_not_pulled_at_all_what_the_host_has_is_not_computed(
    tokens: int, found: int
) -> None:
    bed = HostBed()
    bed.cluster("decode", "decode")
    source = bed.plan("a", 1400).decode.worker
    bed.say("api", Started("api", "a", 1))
    (target,) = set(NAMES) - {source}
    bed.say(target, KvChanges(target, "1", 0, reset=True, host_stored=[hashes(40 * 16)]))
    plan = bed.plan("b", 1400)
    assert (plan.decode.worker, plan.pull_worker) == (target, Placed(source, "1"))
    bed.say("api", Pulled("api", "b", 1, tokens))
    call = bed.core._state.calls["api", "b"]
    assert call.computing is not None
    assert call.uncached_tokens == call.computing.prefill_tokens == 1400 - found * 16


def test_nobody_finds_what_is_still_being_pulled(bed: PullBed) -> None:
    _, decode, _ = planned(bed)
    index = bed.core._index
    assert decode not in index.longest_prefix(hashes(LONG))
    bed.pulled(BLOCKS * 16)
    bed.say("api", Started("api", "b", 1))
    assert index.longest_prefix(hashes(LONG))[decode] == LONG // 16


def test_what_a_peer_has_lost_is_not_looked_for_again(bed: PullBed) -> None:
    _, decode, _ = planned(bed)
    bed.pulled(4 * 16, missing=True)
    assert bed.core.counters["pulls_missing"] == 1
    bed.say("api", Finished("api", "b", 1, "abort"))
    assert bed.plan_on(decode).pull_tokens == 4 * 16


def test_a_lost_peer_holds_nothing_and_the_call_goes_on(bed: PullBed) -> None:
    _, _, peer = planned(bed)
    bed.say(peer, Leaving(peer, "1"))
    assert bed.row("b").phase == "pulling"
    bed.pulled(0)
    bed.say("api", Started("api", "b", 1))
    bed.say("api", Finished("api", "b", 1, "stop", 4))
    assert bed.core.counters["replans"] == 0


def test_a_repeated_plan_does_not_name_a_lost_peer(bed: PullBed) -> None:
    plan, decode, peer = planned(bed)
    bed.say(peer, Leaving(peer, "1"))
    again = bed.plan("b", LONG)
    assert again == msgspec.structs.replace(plan, pull_worker=None, pull_tokens=0)
    # The first one may have arrived after all.
    bed.pulled(BLOCKS * 16)
    assert bed.row("b").phase == "loading"
    bed.say("api", Started("api", "b", 1))
    bed.say("api", Finished("api", "b", 1, "stop", 4))
    assert bed.reserved() == {decode: 0}


def test_a_lost_decode_worker_ends_the_attempt(bed: PullBed) -> None:
    _, decode, peer = planned(bed)
    bed.say(decode, Leaving(decode, "1"))
    plan = bed.only(Plan)
    assert (plan.attempt, plan.decode.worker, plan.pull_worker) == (2, peer, None)


@pytest.mark.parametrize("phase", ["loading", "decoding"])
def test_a_silent_pull_is_asked_for_and_caught_up_with(bed: PullBed, phase: CheckedPhase) -> None:
    planned(bed)
    bed.wait(LIMITS.pull_s + LIMITS.check_s + 1.0, "api", *NAMES)
    assert Check("b", 1) in bed.heard(Check)
    bed.say("api", Checked("api", "b", 1, phase))
    assert bed.row("b").phase == phase


def test_a_pull_that_gets_nowhere_is_replanned(bed: PullBed) -> None:
    _, _, peer = planned(bed)
    bed.wait(LIMITS.pull_s + LIMITS.check_s + 1.0, "api", *NAMES)
    bed.say("api", Checked("api", "b", 1, "pulling"))
    plan = bed.only(Plan)
    assert plan.attempt == 2
    assert plan.decode.worker != peer


def test_news_may_overtake_each_other(bed: PullBed) -> None:
    planned(bed)
    bed.say("api", Started("api", "b", 1))
    assert bed.row("b").phase == "decoding"
    bed.pulled(BLOCKS * 16)
    assert bed.row("b").phase == "decoding"
    assert bed.core.counters["messages_stale"] == 1


def test_a_prefill_worker_reads_before_it_computes() -> None:
    bed = PullBed()
    bed.cluster("prefill", "decode", "decode")
    # Every other call is prefilled elsewhere.
    bed.serve("a")
    plan = bed.plan("b", LONG)
    if plan.prefill is None:
        bed.say("api", Finished("api", "b", 1, "abort"))
        plan = bed.plan("c", LONG)
    assert plan.prefill is not None
    assert plan.pull_worker is not None
    request, peer = plan.request, plan.pull_worker.worker
    bed.pulled(BLOCKS * 16, request=request)
    assert bed.row(request).phase == "prefilling"
    assert bed.reserved()[peer] >= BLOCKS
    bed.say("api", Prefilled("api", request, 1))
    assert bed.row(request).phase == "loading"
    bed.say("api", Started("api", request, 1))
    assert bed.reserved()[peer] in (0, bed.reserved()[plan.decode.worker])
    bed.say("api", Finished("api", request, 1, "stop", 4))
    assert set(bed.reserved().values()) == {0}


@pytest.mark.parametrize("tokens", [-1, 7, 10**9])
def test_whatever_an_api_process_says_of_a_pull_adds_up(bed: PullBed, tokens: int) -> None:
    planned(bed)
    bed.pulled(tokens, missing=True)
    bed.say("api", Finished("api", "b", 1, "stop", 4, pulled_tokens=-5))
    assert set(bed.reserved().values()) == {0}

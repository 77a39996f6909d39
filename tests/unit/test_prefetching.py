"""Prefetches: what the core asks to be moved before a call comes, and who carries it out how."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.metrics.stats import PrefillStats

from coordinator.api.calls import Calls
from coordinator.api.contexts import CALLS_MOST, KEPT_S, Contexts
from coordinator.api.errands import Errands
from coordinator.api.metrics import page
from coordinator.core import Core
from coordinator.errands import PREFETCH_S
from coordinator.limits import Limits, Placement
from coordinator.policy.prefetching import Beginning, beginning, copies, likely
from coordinator.prefetching import LOOK_S
from coordinator.protocol import (
    Abort,
    CallContext,
    CallFailed,
    CancelRun,
    Decode,
    Discard,
    DropErrand,
    Errand,
    ErrandDone,
    Finished,
    Leaving,
    Placed,
    Plan,
    Prefill,
    PrefillDone,
    Role,
    ShowFigures,
    Started,
    Submit,
    WorkflowAnswer,
)
from coordinator.workflow.foresight import Figures
from coordinator.workflow.prediction import Kept, NextCall, Prediction, Spread
from tests.unit.recording_wire import RecordingWire, engine_request, output
from tests.unit.test_core import Bed, Told, ready
from tests.unit.test_core_retention import chain

SPREAD = Spread(1.0, 1.0, 1.0, 1.0, 1.0, 9.0)


# --- what is likely --------------------------------------------------------------------------


def next_call(probability: float = 0.9, calls: float = 1.0, *kept: Kept) -> NextCall:
    return NextCall("b", probability, calls, SPREAD, SPREAD, SPREAD, SPREAD, list(kept))


def test_only_what_is_known_and_probable_is_acted_on() -> None:
    sure, doubtful = next_call(0.9), next_call(0.4)
    assert likely(Prediction(True, 1.0, "a", [sure], 0.1, 1.0, 1.0)) is sure
    assert likely(Prediction(False, 1.0, "a", [sure], 0.1, 1.0, 1.0)) is None
    assert likely(Prediction(True, 1.0, "a", [doubtful], 0.6, 1.0, 1.0)) is None
    assert likely(Prediction(True, 1.0, "a", [], 1.0, 0.0, 0.0)) is None
    assert [copies(next_call(0.9, calls)) for calls in (0.2, 1.4, 2.8, 40.0)] == [1, 1, 3, 3]


def test_what_most_of_is_kept_is_moved_as_far_as_it_usually_is_kept() -> None:
    own = Kept("own", 0.5, 1.0, 1.0)
    previous = Kept("previous", 0.5, 0.6, 0.0)
    call = next_call(0.9, 1.0, own, previous)
    assert beginning(call, {"own": 10, "previous": 10}) == Beginning("own", 10)
    assert beginning(call, {"own": 10, "previous": 50}) == Beginning("previous", 30)
    assert beginning(call, {"first": 10}) is None
    assert beginning(next_call(), {"own": 10}) is None


# --- the core ----------------------------------------------------------------------------------

SHARED = 40
"""Blocks that all calls of a run begin with."""


class PrefetchBed(Bed):
    """Workers that have met, and a workflow that has been seen so often that it is known: a planner
    is followed by two writers at once, these by an editor."""

    def __init__(self, prefetch: bool = True, workers: int = 2, known: bool = True) -> None:
        super().__init__()
        placement = Placement(prefetch=prefetch)
        self.core = Core(Limits(), placement, "core")
        self.names = self.cluster(*["mixed"] * workers)
        for number in range(12 if known else 0):
            self.run(f"known-{number}")

    def worker(self, name: str, role: Role = "mixed", incarnation: str = "1") -> Told:
        return self.say(name, ready(name, role, incarnation, kv_blocks=1000, max_model_len=16000))

    def call(self, run: str, agent: str, what: str = "", final: bool = False) -> Plan:
        """A call is submitted and planned."""
        parent = {"planner": "", "writer": "planner", "editor": "writer"}[agent]
        told = CallContext("team", run, agent, parent, final)
        prompt = chain(f"{run}{agent}{what}", 8, chain(run, SHARED))
        tokens = len(prompt) // 8 * 16 + 1
        request = f"{run}-{agent}{what}"
        self.say("api", Submit("api", request, 1, tokens, 10, prompt, context=told))
        return self.only(Plan)

    def start(self, plan: Plan) -> None:
        self.say("api", Started("api", plan.request, 1))

    def end(self, plan: Plan) -> None:
        self.say("api", Finished("api", plan.request, 1, "stop", output_tokens=5))

    def run(self, name: str) -> None:
        """One run from its beginning to its end, at its own pace."""
        plan = self.call(name, "planner")
        self.start(plan)
        self.pause()
        self.end(plan)
        writers = [self.call(name, "writer", what) for what in "12"]
        for writer in writers:
            self.start(writer)
            self.pause()
        for writer in writers:
            self.end(writer)
        editor = self.call(name, "editor", final=True)
        self.start(editor)
        self.end(editor)
        self.pause()

    def pause(self) -> list[Any]:
        """Half a second; what the API process is asked meanwhile. What it is asked is done."""
        told = [message for peer, message in self.wait(0.5, "api", *self.names) if peer == "api"]
        asked = [message for message in told if isinstance(message, Errand)]
        for errand in asked:
            self.say("api", ErrandDone("api", errand.errand, "done", moved_tokens=errand.tokens))
        return asked

    def asked(self) -> list[Errand]:
        """What the API process is asked at once."""
        self.wait(0.01, "api", *self.names)
        return self.heard(Errand)

    def other(self, name: str) -> str:
        (other,) = set(self.names) - {name}
        return other


@pytest.fixture
def bed() -> PrefetchBed:
    return PrefetchBed()


def test_what_a_fan_out_shares_is_there_before_it_comes(bed: PrefetchBed) -> None:
    used = bed.core.counters["prefetches_used"]
    plan = bed.call("r", "planner")
    bed.start(plan)
    (errand,) = bed.asked()
    assert (errand.kind, errand.call) == ("prefetch", "r-planner")
    assert errand.source == Placed(plan.decode.worker, "1")
    assert errand.target == Placed(bed.other(plan.decode.worker), "1")
    assert SHARED * 16 * 0.8 <= errand.tokens <= SHARED * 16
    moved = bed.core.counters["tokens_prefetched"]
    bed.say("api", ErrandDone("api", errand.errand, "done", 1, 0.1, errand.tokens))
    assert bed.core.counters["tokens_prefetched"] == moved + errand.tokens
    bed.end(plan)
    writers = [bed.call("r", "writer", what) for what in "12"]
    assert {each.decode.worker for each in writers} == set(bed.names)
    assert not any(each.pull_worker for each in writers)
    assert bed.core.counters["prefetches_used"] == used + 1
    bed.say("api", ShowFigures(1))
    shown = page(msgspec.json.decode(bed.only(WorkflowAnswer).body, type=Figures)).decode()
    assert f"pythia_prefetches_used_total {used + 1}.0" in shown
    assert f"pythia_prefetched_tokens_total {float(moved + errand.tokens)}" in shown
    for name in ("prefetches", "prefetches_dropped", "prefetches_wasted"):
        assert f"pythia_{name}_total {float(bed.core.counters[name])}" in shown


def test_it_is_dropped_for_any_call_on_either_worker(bed: PrefetchBed) -> None:
    plan = bed.call("r", "planner")
    bed.start(plan)
    (errand,) = bed.asked()
    dropped = bed.core.counters["prefetches_dropped"]
    bed.say("api", Submit("api", "stranger", 1, 40, 10, chain("stranger", 2)))
    assert bed.heard(DropErrand) == [DropErrand(errand.errand)]
    assert bed.core.counters["prefetches_dropped"] == dropped + 1
    bed.say("api", ErrandDone("api", errand.errand, "done", 1, 0.1, errand.tokens))
    assert bed.core.counters["messages_stale"] == 1


def test_it_is_dropped_with_its_run_and_when_it_takes_too_long(bed: PrefetchBed) -> None:
    bed.start(bed.call("r", "planner"))
    (errand,) = bed.asked()
    bed.say("client", CancelRun(1, "team", "r"))
    assert bed.heard(DropErrand) == [DropErrand(errand.errand)]
    bed.start(bed.call("s", "planner"))
    (errand,) = bed.asked()
    bed.wait(PREFETCH_S + 2.0, "api", *bed.names)
    assert DropErrand(errand.errand) in bed.heard(DropErrand)


def test_what_nobody_asks_for_is_counted(bed: PrefetchBed) -> None:
    wasted = bed.core.counters["prefetches_wasted"]
    plan = bed.call("r", "planner")
    bed.start(plan)
    assert len(bed.pause()) == 1
    assert bed.core.counters["prefetches_wasted"] == wasted
    bed.end(plan)
    bed.say("client", CancelRun(1, "team", "r"))
    bed.wait(LOOK_S + 1.0, "api", *bed.names)
    assert bed.core.counters["prefetches_wasted"] == wasted + 1


def test_nothing_is_moved_without_the_switch_or_knowledge() -> None:
    for bed in (PrefetchBed(prefetch=False), PrefetchBed(known=False)):
        bed.start(bed.call("r", "planner"))
        assert bed.asked() == []
        assert bed.core.counters["prefetches_used"] == 0


def test_lost_workers_take_their_prefetches_with_them(bed: PrefetchBed) -> None:
    plan = bed.call("r", "planner")
    bed.start(plan)
    (errand,) = bed.asked()
    bed.say(plan.decode.worker, Leaving(plan.decode.worker, "1"))
    assert bed.heard(DropErrand) == [DropErrand(errand.errand)]
    bed = PrefetchBed()
    plan = bed.call("r", "planner")
    bed.start(plan)
    (errand,) = bed.pause()
    wasted = bed.core.counters["prefetches_wasted"]
    bed.say(errand.target.worker, Leaving(errand.target.worker, "1"))
    assert bed.core.counters["prefetches_wasted"] == wasted + 1


def test_what_follows_a_call_is_moved_away_from_a_worker_with_much_to_do(bed: PrefetchBed) -> None:
    def round_of(run: str, number: int, before: bytes) -> tuple[Plan, bytes]:
        """An agent goes on with what it said."""
        prompt = chain(f"{run}{number}", 4, before)
        told = CallContext("alone", run, "agent", "agent" if number else "", number == 3)
        tokens = len(prompt) // 8 * 16 + 1
        bed.say("api", Submit("api", f"{run}-{number}", 1, tokens, 10, prompt, context=told))
        plan = bed.only(Plan)
        bed.start(plan)
        return plan, prompt

    for run in range(12):
        before = chain(f"alone{run}", SHARED)
        for number in range(4):
            plan, before = round_of(f"alone{run}", number, before)
            bed.end(plan)
            assert bed.pause() == []
    plan, before = round_of("last", 0, chain("last", SHARED))
    stays = plan.decode.worker
    bed.end(plan)
    # Whoever begins like it is served there, however much it has of its own.
    long = chain("long", 100, before)
    bed.say("api", Submit("api", "long", 1, len(long) // 8 * 16 + 1, 10, long))
    assert bed.only(Plan).decode.worker == stays
    (errand,) = bed.asked()
    assert (errand.source.worker, errand.target.worker) == (stays, bed.other(stays))
    assert errand.tokens == (SHARED + 4) * 16


# --- the API process -----------------------------------------------------------------------------

SOURCE, TARGET = Placed("w0", "1"), Placed("w1", "2")
ASKED = Errand(7, "prefetch", TARGET, "", "", 5.0, source=SOURCE, call="r", tokens=8)
TEAM = CallContext("team", "run", "planner")


class ApiBed:
    """Errands of an API process that has served one call of a run."""

    def __init__(self) -> None:
        self.wire = RecordingWire()
        self.calls = Calls("api", self.wire, Limits())
        self.calls.on_welcome("core", 4)
        self.calls.contexts.switch(True)
        self.calls.contexts.add(engine_request("r", range(100, 113)), TEAM, 0.0)
        self.errands = Errands("api", self.wire, self.calls)

    def sent(self) -> list[tuple[Placed, Any, Any]]:
        return [(to, header, frames) for to, header, frames in self.wire.take_workers()]

    def held(self, request: str, tokens: int = 8, handle: bytes = b"handle") -> bool:
        """The source answers."""
        done = PrefillDone(request, -1, "1", handle, 9, tokens, 30.0, 1000.0, 3.0)
        return self.errands.on_prefill_done(done, SOURCE)

    def begun(self) -> str:
        self.errands.on_message(ASKED, 0.0)
        ((_, header, _),) = self.sent()
        return str(header.request)


def test_what_the_source_holds_is_read_by_the_target() -> None:
    bed = ApiBed()
    bed.errands.on_message(ASKED, 0.0)
    ((to, header, (request,)),) = bed.sent()
    assert to == SOURCE
    assert isinstance(header, Prefill)
    assert header.cached_only
    assert (header.attempt, header.incarnation) == (-1, "1")
    assert request.prompt_token_ids == list(range(100, 109))
    assert bed.held(header.request)
    ((to, decode, (request,)),) = bed.sent()
    assert (to, decode) == (TARGET, Decode(header.request, 1, "2", b"handle"))
    assert isinstance(request, EngineCoreRequest)
    assert request.prompt_token_ids == list(range(100, 109))
    assert request.sampling_params is not None
    assert request.sampling_params.max_tokens == 1
    stats = PrefillStats()
    stats.set(9, 0, 8)
    mine = output(header.request, 1, [9], FinishReason.LENGTH, stats)
    assert bed.errands.take([mine], TARGET, 2.0) == []
    assert bed.wire.take_core() == [ErrandDone("api", 7, "done", 1, 2.0, 8)]
    assert len(bed.errands) == 0


def test_less_than_was_asked_for_is_moved_and_nothing_is_no_errand() -> None:
    bed = ApiBed()
    bed.held(bed.begun(), tokens=5)
    ((_, _, (request,)),) = bed.sent()
    assert request.prompt_token_ids == list(range(100, 105))
    bed = ApiBed()
    bed.held(bed.begun(), tokens=3)
    assert [type(header) for _, header, _ in bed.sent()] == [Discard]
    assert bed.wire.take_core() == [ErrandDone("api", 7, "failed")]


def test_dropped_it_ends_where_it_is() -> None:
    bed = ApiBed()
    request = bed.begun()
    bed.errands.on_message(DropErrand(7), 1.0)
    assert bed.sent() == [(SOURCE, Abort([(request, -1)]), ())]
    # What was on its way is given back.
    assert bed.held(request)
    ((to, discard, _),) = bed.sent()
    assert (to, discard) == (SOURCE, Discard(request, -1, "1", b"handle"))
    bed = ApiBed()
    request = bed.begun()
    bed.held(request)
    bed.sent()
    bed.errands.on_message(DropErrand(7), 1.0)
    assert bed.sent() == [(TARGET, Abort([(request, 1)]), ())]
    assert bed.wire.take_core() == []


def test_however_it_fails_the_core_hears_of_it_once() -> None:
    failed = [ErrandDone("api", 7, "failed")]
    bed = ApiBed()
    assert bed.errands.on_call_failed(CallFailed(bed.begun(), -1, "1", "no"))
    assert bed.wire.take_core() == failed
    bed.begun()
    bed.errands.on_worker_gone(SOURCE)
    assert bed.wire.take_core() == failed
    request = bed.begun()
    bed.wire.reachable = lambda worker: worker != TARGET
    bed.held(request)
    assert bed.wire.take_core() == failed
    assert [type(header) for _, header, _ in bed.sent()] == [Discard]
    bed.wire.reachable = lambda worker: True
    bed.begun()
    bed.errands.tick(6.0)
    assert bed.wire.take_core() == failed


def test_a_call_that_is_not_remembered_can_not_be_moved() -> None:
    bed = ApiBed()
    bed.calls.contexts.expire(KEPT_S)
    bed.errands.on_message(ASKED, 0.0)
    assert bed.wire.take_core() == [ErrandDone("api", 7, "unknown")]
    assert not bed.errands.on_prefill_done(
        PrefillDone("r", -1, "1", b"handle", 9, 8, 30.0, 1000.0, 3.0), SOURCE
    )


def test_only_calls_of_runs_are_remembered_until_their_run_is_over() -> None:
    contexts = Contexts()
    contexts.add(engine_request("early"), TEAM, 0.0)
    assert len(contexts) == 0
    contexts.switch(True)
    contexts.add(engine_request("alone"), CallContext(), 0.0)
    contexts.add(engine_request("a"), TEAM, 0.0)
    contexts.add(engine_request("b"), CallContext("team", "other"), 0.0)
    last = CallContext("team", "run", final=True)
    contexts.add(engine_request("c"), last, 0.0)
    contexts.ended("a", TEAM)
    assert (len(contexts), contexts.of("alone")) == (3, None)
    contexts.ended("c", last)
    assert contexts.of("a") is contexts.of("c") is None
    assert contexts.of("b") is not None
    for number in range(2 * CALLS_MOST):
        contexts.add(engine_request(f"r{number}"), TEAM, 1.0)
    assert len(contexts) == CALLS_MOST
    contexts.add(engine_request("long", [1] * 2_000_000), TEAM, 1.0)
    assert len(contexts) == 0
    contexts.switch(False)
    assert len(contexts) == 0

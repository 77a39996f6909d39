"""Errands: what the core asks for before calls come, and how an API process carries it out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from vllm.v1.engine import FinishReason

from coordinator.api.calls import Calls
from coordinator.api.errands import Errands
from coordinator.core import Core
from coordinator.errands import AVOID_S, ERRAND_S, ERRANDS_MOST
from coordinator.limits import Limits, Placement
from coordinator.policy.warming import Prompt, warmed
from coordinator.protocol import (
    Abort,
    ApiBeat,
    Beat,
    CallContext,
    CallFailed,
    DeclareWorkflow,
    Decode,
    DropErrand,
    EngineFacts,
    Errand,
    ErrandDone,
    Finished,
    Hello,
    Leaving,
    Load,
    Placed,
    Plan,
    Ready,
    StartRun,
    StaticPrefix,
    StaticPrefixes,
    Submit,
    ToCore,
)
from coordinator.workflow.graph import Graph
from coordinator.workflow.registry import digest_of
from tests.unit.recording_wire import RecordingWire, output
from tests.unit.test_core_retention import chain

FACTS = EngineFacts("0.32", "model", "fingerprint", 16, 1000, 16000, 64, 2048)
TEAM = {
    "agents": {"planner": {}, "writer": {}},
    "edges": [{"kind": "next", "from": "planner", "to": "writer"}],
}
STATIC = {"planner": chain("planner", 20), "writer": chain("writer", 30)}


# --- what is chosen ------------------------------------------------------------------------


def test_the_prompt_that_most_may_ask_for_goes_where_it_is_lacking() -> None:
    one = Prompt(("w", "one"), 10, 1, {"a": 10, "b": 4})
    two = Prompt(("w", "two"), 10, 3, {"c": 10})
    assert warmed([one, two], {"a": 50, "b": 50, "c": 50}, (), 9) == [
        ("a", ("w", "two")),
        ("b", ("w", "two")),
        ("c", ("w", "one")),
    ]
    assert warmed([one, two], {"a": 50, "b": 50, "c": 50}, (), 1) == [("a", ("w", "two"))]


def test_nothing_is_forgotten_for_it_and_failures_are_not_repeated() -> None:
    prompt = Prompt(("w", "one"), 10, 1, {"b": 4})
    assert warmed([prompt], {"a": 9, "b": 5}, (), 9) == []
    assert warmed([prompt], {"a": 9, "b": 6}, (), 9) == [("b", ("w", "one"))]
    assert warmed([prompt], {"b": 6}, {("b", ("w", "one"))}, 9) == []
    assert warmed([prompt._replace(held={"b": 10})], {"b": 50}, (), 9) == []


# --- the core ------------------------------------------------------------------------------


class Bed:
    """A core with workers and an API process that has told the static prompts of a team."""

    def __init__(self, workers: int = 1, warm_up: bool = True, run: bool = True) -> None:
        self.core = Core(Limits(), Placement(warm_up=warm_up), "core")
        self.now_s = 100.0
        self.workers = [f"w{number}" for number in range(workers)]
        self.say("api", Hello("api"))
        for name in self.workers:
            self.say(name, Ready(name, "1", "mixed", f"tcp://{name}", FACTS))
        self.say("client", DeclareWorkflow(1, "team", json.dumps(TEAM).encode()))
        (graph,) = [self.core._registry.declared["team"].graph]
        assert isinstance(graph, Graph)
        self.digest = digest_of(graph)
        prefixes = [StaticPrefix(name, len(h) // 8 * 16, h) for name, h in STATIC.items()]
        self.say("api", StaticPrefixes(2, "team", self.digest, prefixes))
        if run:
            self.say("client", StartRun(3, "team", "r"))

    def say(self, peer: str, message: ToCore) -> list[Any]:
        return self._sent(self.core.handle(peer.encode(), message, self.now_s))

    def _sent(self, sends: Sequence[Any]) -> list[Any]:
        self.core.check()
        return [send.message for send in sends if send.peer == b"api"]

    def wait(self, seconds: float, load: Load | None = None) -> list[Any]:
        """Time passes; what the API process is told meanwhile."""
        ends_s, told = self.now_s + seconds, []
        while self.now_s < ends_s:
            self.now_s = min(ends_s, self.now_s + 0.5)
            told += self.say("api", ApiBeat("api"))
            for name in self.workers:
                told += self.say(name, Beat(name, "1", load or Load()))
            told += self._sent(self.core.tick(self.now_s))
        return [each for each in told if isinstance(each, Errand | DropErrand)]

    def call(self, request: str) -> list[Any]:
        context = CallContext("team", "r", "planner")
        return self.say(
            "api", Submit("api", request, 1, 400, 10, STATIC["planner"], context=context)
        )


def test_static_prompts_are_computed_on_an_idle_worker_one_after_the_other() -> None:
    bed = Bed()
    (first,) = bed.wait(3.0)
    assert (first.kind, first.target, first.agent) == ("warm", Placed("w0", "1"), "writer")
    assert first.graph_digest == bed.digest
    bed.say("api", ErrandDone("api", first.errand, "done", 480, 0.1))
    (second,) = bed.wait(3.0)
    assert second.agent == "planner"
    bed.say("api", ErrandDone("api", second.errand, "done", 320, 0.1))
    assert bed.wait(5.0) == []
    assert bed.core.counters["errands_done"] == 2


def test_not_more_at_a_time_than_the_cluster_may_have() -> None:
    bed = Bed(workers=4)
    told = bed.wait(5.0)
    assert len(told) == ERRANDS_MOST
    assert len({errand.target for errand in told}) == ERRANDS_MOST


def test_a_call_has_the_worker_at_once() -> None:
    bed = Bed()
    (errand,) = bed.wait(3.0)
    told = bed.call("r1")
    assert [type(each) for each in told] == [DropErrand, Plan]
    assert told[0].errand == errand.errand
    # While it runs nothing else is asked for.
    assert bed.wait(3.0) == []
    bed.say("api", ErrandDone("api", errand.errand, "done"))
    assert bed.core.counters["messages_stale"] == 1
    bed.say("api", Finished("api", "r1", 1, "stop"))
    assert [type(each) for each in bed.wait(3.0)] == [Errand]


@pytest.mark.parametrize("load", [Load(running=1), Load(waiting=1)])
def test_a_busy_engine_is_left_alone(load: Load) -> None:
    assert Bed().wait(3.0, load) == []


def test_without_runs_or_the_switch_nothing_is_asked_for() -> None:
    assert Bed(run=False).wait(3.0) == []
    assert Bed(warm_up=False).wait(3.0) == []


def test_what_fails_is_not_tried_again_for_a_while() -> None:
    bed = Bed()
    (first,) = bed.wait(3.0)
    bed.say("api", ErrandDone("api", first.errand, "unknown"))
    (second,) = bed.wait(3.0)
    assert second.agent != first.agent
    bed.say("api", ErrandDone("api", second.errand, "failed"))
    assert bed.wait(AVOID_S - 10.0) == []
    assert bed.wait(10.0)


def test_what_takes_too_long_is_given_up() -> None:
    bed = Bed()
    (errand,) = bed.wait(3.0)
    dropped, *_ = bed.wait(ERRAND_S)
    assert dropped == DropErrand(errand.errand)


def test_lost_workers_and_api_processes_take_their_errands_with_them() -> None:
    bed = Bed()
    bed.wait(3.0)
    bed.workers = []
    bed.say("w0", Leaving("w0", "1"))
    assert bed.core.counters["errands_dropped"] == 1
    bed = Bed()
    bed.wait(3.0)
    bed.now_s += 100.0
    bed._sent(bed.core.tick(bed.now_s))
    assert bed.core.counters["apis_lost"] == 1
    sent, dropped = bed.core.counters["errands_sent"], bed.core.counters["errands_dropped"]
    assert sent == dropped >= 1


def test_nobody_else_can_end_an_errand() -> None:
    bed = Bed()
    (errand,) = bed.wait(3.0)
    bed.say("other", Hello("other"))
    bed.say("other", ErrandDone("other", errand.errand, "done"))
    bed.say("api", ErrandDone("api", 99, "done"))
    assert bed.core.counters["errands_done"] == 0


# --- the API process -----------------------------------------------------------------------


class Known:
    """Tokens of static prompts."""

    @property
    def known(self) -> Mapping[tuple[str, str], Sequence[int]]:
        return {("digest", "planner"): [1, 2, 3]}


WORKER = Placed("w0", "1")
ASKED = Errand(7, "warm", WORKER, "digest", "planner", 30.0)


@pytest.fixture
def wire() -> RecordingWire:
    return RecordingWire()


@pytest.fixture
def errands(wire: RecordingWire) -> Errands:
    made = Errands("api", wire, Calls("api", wire, Limits()))
    made.prompts = Known()
    return made


def test_it_is_a_request_for_one_token_behind_all_others(
    errands: Errands, wire: RecordingWire
) -> None:
    errands.on_message(ASKED, 0.0)
    ((worker, header, (request,)),) = wire.take_workers()
    assert worker == WORKER
    assert isinstance(header, Decode)
    assert header.incarnation == "1"
    assert not header.handle
    assert request.prompt_token_ids == [1, 2, 3]
    assert request.sampling_params.max_tokens == 1
    assert request.priority > 1 << 40
    others = [output("r", 1, [5])]
    mine = output(header.request, 1, [9], FinishReason.LENGTH)
    assert errands.take([*others, mine], WORKER, 2.0) == others
    assert wire.take_core() == [ErrandDone("api", 7, "done", 3, 2.0)]
    assert len(errands) == 0


def test_what_can_not_be_begun_is_said(errands: Errands, wire: RecordingWire) -> None:
    errands.on_message(Errand(8, "warm", WORKER, "other", "planner", 30.0), 0.0)
    wire.reachable = lambda worker: False
    errands.on_message(ASKED, 0.0)
    assert wire.take_core() == [ErrandDone("api", 8, "unknown"), ErrandDone("api", 7, "failed")]
    errands.prompts = None
    errands.on_message(ASKED, 0.0)
    assert wire.take_core() == [ErrandDone("api", 7, "unknown")]


def test_dropped_it_is_aborted_and_nothing_is_said(errands: Errands, wire: RecordingWire) -> None:
    errands.on_message(ASKED, 0.0)
    ((_, header, _),) = wire.take_workers()
    errands.on_message(DropErrand(7), 1.0)
    errands.on_message(DropErrand(7), 1.0)
    assert wire.take_workers() == [(WORKER, Abort([(header.request, 1)]), ())]
    assert wire.take_core() == []


def test_however_it_ends_the_core_hears_of_it_once(errands: Errands, wire: RecordingWire) -> None:
    def begun() -> str:
        wire.take_workers()
        errands.on_message(ASKED, 0.0)
        ((_, header, _),) = wire.take_workers()
        assert isinstance(header, Decode)
        return header.request

    failed = [ErrandDone("api", 7, "failed")]
    request = begun()
    assert errands.on_call_failed(CallFailed(request, 1, "1", "no"))
    assert not errands.on_call_failed(CallFailed(request, 1, "1", "no"))
    assert wire.take_core() == failed
    begun()
    errands.on_worker_gone(Placed("other", "1"))
    errands.on_worker_gone(WORKER)
    assert wire.take_core() == failed
    begun()
    errands.tick(29.0)
    assert wire.take_core() == []
    errands.tick(31.0)
    assert wire.take_core() == failed
    assert [type(message) for _, message, _ in wire.take_workers()] == [Abort]
    begun()
    errands.take([output(request, 1, [], FinishReason.ABORT)], WORKER, 1.0)
    assert [done.outcome for done in wire.take_core()] == ["failed"]

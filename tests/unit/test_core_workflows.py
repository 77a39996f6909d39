"""What the core answers about workflows, and what runs do to calls."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from coordinator.core import Core
from coordinator.limits import Limits, Placement
from coordinator.protocol import (
    ApiBeat,
    Beat,
    CallContext,
    CancelRun,
    DeclareWorkflow,
    DropWorkflow,
    EndRun,
    EngineFacts,
    Finished,
    Hello,
    ImportWorkflow,
    Inspect,
    ListWorkflows,
    Load,
    Plan,
    Ready,
    Rejected,
    RunStatus,
    ShowWorkflow,
    Snapshot,
    StartRun,
    StaticPrefix,
    StaticPrefixes,
    Stop,
    Submit,
    ToCore,
    WorkflowAnswer,
)
from coordinator.workflow.graph import Graph
from coordinator.workflow.keeping import (
    DropRun,
    KeepEvents,
    KeepGraph,
    KeepProfile,
    KeepRun,
    Kept,
    Save,
)
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.registry import digest_of

FACTS = EngineFacts("0.32", "model", "fingerprint", 16, 1000, 4000, 64, 2048)
TEAM = {
    "agents": {"planner": {}, "explorer": {}, "writer": {"output_tokens": 300}},
    "edges": [
        {"kind": "fan_out", "from": "planner", "to": "explorer", "least": 2, "most": 4},
        {"kind": "join", "from": ["explorer"], "to": "writer"},
    ],
}
LIMITS = WorkflowLimits()


class Bed:
    """A core that an API process and a client speak to."""

    def __init__(
        self,
        workflow_limits: WorkflowLimits = LIMITS,
        keeps: bool = False,
        decode_workers: int = 1,
        now_s: float = 100.0,
    ) -> None:
        self.core = Core(
            Limits(), Placement(), "core", workflow_limits=workflow_limits, keeps=keeps
        )
        self.now_s = now_s
        self.decode_workers = decode_workers
        self.told: list[tuple[str, Any]] = []
        self.say("api", Hello("api"))
        for number in range(decode_workers):
            name = f"decode-{number}"
            self.say(name, Ready(name, "1", "decode", f"tcp://{name}", FACTS))

    def say(self, peer: str, message: ToCore) -> list[Any]:
        """One event; what the core said to that peer."""
        return self._sent(self.core.handle(peer.encode(), message, self.now_s), peer)

    def _sent(self, sends: Any, peer: str) -> list[Any]:
        self.core.check()
        self.told = [(send.peer.decode(), send.message) for send in sends]
        return [message for whom, message in self.told if whom == peer]

    def ask(self, message: ToCore) -> WorkflowAnswer:
        """A question and the answer that comes at once."""
        (answer,) = self.say("client", message)
        assert isinstance(answer, WorkflowAnswer)
        return answer

    def body(self, message: ToCore, status: int = 200) -> Any:
        answer = self.ask(message)
        assert (answer.status, answer.problems) == (status, [])
        return json.loads(answer.body)

    def declare(self, name: str, graph: object = TEAM) -> WorkflowAnswer:
        return self.ask(DeclareWorkflow(1, name, json.dumps(graph).encode()))

    def begin(self, request: str, run: str = "r", agent: str = "a", **more: Any) -> list[Any]:
        context = CallContext(more.pop("workflow", "team"), run, agent, **more.pop("context", {}))
        return self.say("api", Submit("api", request, 1, 100, 50, context=context, **more))

    def finish(self, request: str, outcome: str = "stop", tokens: int = 10) -> None:
        self.say("api", Finished("api", request, 1, outcome, tokens))

    def wait(self, elapsed_s: float) -> None:
        """Time passes; the API process and the workers live."""
        end_s = self.now_s + elapsed_s
        while self.now_s < end_s:
            self.now_s = min(end_s, self.now_s + 2.0)
            self.core.handle(b"api", ApiBeat("api"), self.now_s)
            for number in range(self.decode_workers):
                name = f"decode-{number}"
                self.core.handle(name.encode(), Beat(name, "1", Load()), self.now_s)
            self._sent(self.core.tick(self.now_s), "api")

    def snapshot(self) -> Snapshot:
        (snapshot,) = self.say("anyone", Inspect(1))
        assert isinstance(snapshot, Snapshot)
        return snapshot

    def runs(self) -> dict[str, RunStatus]:
        return {run.run: run for run in self.snapshot().runs}

    def saved(self, error: str = "") -> list[Any]:
        """What was to be written is, or can't be; what the core said to the client then."""
        return self._sent(self.core.saved(len(self.core.take_saves()), error, self.now_s), "client")


# --- declaring -----------------------------------------------------------------------------------


def static_of(bed: Bed, name: str = "team") -> dict[str, StaticPrefix]:
    return bed.core._registry.static.get(name, {})


def say_static(bed: Bed, *prefixes: StaticPrefix, name: str = "team", graph: object = TEAM) -> int:
    digest = digest_of(msgspec.convert(graph, Graph))
    return bed.ask(StaticPrefixes(1, name, digest, list(prefixes))).status


def test_static_prompts_are_those_of_the_graph_that_is_declared() -> None:
    bed = Bed()
    prefix = StaticPrefix("planner", 40, b"12345678" * 2)
    assert say_static(bed, prefix) == 404
    bed.declare("team")
    assert say_static(bed, prefix, graph={"agents": {"planner": {}}}) == 409
    assert static_of(bed) == {}
    assert say_static(bed, prefix, StaticPrefix("nobody", 1), prefix) == 200
    assert static_of(bed) == {"planner": prefix}
    assert bed.body(ShowWorkflow(2, "team"))["static_tokens"] == {"planner": 40}
    bed.declare("team", {"agents": {"planner": {}}})
    assert static_of(bed) == {}


def test_of_static_prompts_without_room_only_lengths_are_kept() -> None:
    bed = Bed(WorkflowLimits(static_hashes_bytes=40))
    bed.declare("team")
    prefixes = [StaticPrefix(agent, 40, b"12345678" * 3) for agent in TEAM["agents"]]
    assert say_static(bed, *prefixes) == 200
    assert [len(prefix.block_hashes) for prefix in static_of(bed).values()] == [24, 0, 0]
    assert say_static(bed, *prefixes) == 200, "room is given back"
    assert len(static_of(bed)["planner"].block_hashes) == 24


def test_what_begins_as_declared_is_known_to_be_shared_at_the_first_call() -> None:
    bed = Bed()
    bed.declare("team")
    static = b"".join(number.to_bytes(8) for number in range(1, 5))
    say_static(bed, StaticPrefix("planner", 64, static))
    hashes = static + b"".join(number.to_bytes(8) for number in (8, 9))
    bed.begin("one", agent="planner", block_hashes=hashes)
    learned = bed.body(ShowWorkflow(2, "team"))["learned"]
    (edge,) = [edge for edge in learned["edges"] if edge["target"] == "planner"]
    kept = {each["origin"]: each for each in edge["kept"]}
    assert kept.keys() == {"static"}


def test_a_declared_workflow_is_shown_as_it_was_declared_and_can_be_dropped() -> None:
    bed = Bed()
    assert bed.declare("team").status == 201
    assert bed.declare("team").status == 200
    shown = bed.body(ShowWorkflow(2, "team"))
    assert shown["declared"]["agents"]["writer"] == {"output_tokens": 300}
    assert [edge["kind"] for edge in shown["declared"]["edges"]] == ["fan_out", "join"]
    assert shown["learned"]["declared"] is True
    (row,) = bed.body(ListWorkflows(3))
    assert (row["name"], row["declared"], row["agents"]) == ("team", True, 3)
    assert bed.body(DropWorkflow(4, "team"))["deleted"] is True
    assert bed.ask(ShowWorkflow(5, "team")).status == 404
    assert bed.ask(DropWorkflow(6, "team")).status == 404


@pytest.mark.parametrize(
    ("graph", "problem"),
    [
        ({"agents": {}}, "there are none"),
        ({"agents": {"a": {}}, "edges": [{"kind": "next", "from": "a", "to": "b"}]}, "called 'b'"),
        ({"agents": {"a": {}}, "edges": [{"kind": "maybe", "from": "a", "to": "a"}]}, "maybe"),
        ([], "Expected `object`"),
    ],
)
def test_a_workflow_that_makes_no_sense_is_refused_with_reasons(graph: Any, problem: str) -> None:
    bed = Bed()
    answer = bed.declare("team", graph)
    assert answer.status == 422
    assert problem in " ".join(answer.problems)
    assert bed.body(ListWorkflows(1)) == []


@pytest.mark.parametrize(
    "graph", [b"", b"{", b"\xff", b"[" * 100_000, b'{"agents":{"\\ud800":{}}}']
)
def test_what_is_no_json_is_refused(graph: bytes) -> None:
    assert Bed().ask(DeclareWorkflow(1, "team", graph)).status == 422


@pytest.mark.parametrize("name", ["", "a/b", "x" * 300, " a", "a\n"])
def test_odd_names_are_refused(name: str) -> None:
    assert Bed().declare(name).status == 422


def test_a_graph_over_the_limit_of_bytes_is_not_even_read() -> None:
    bed = Bed(WorkflowLimits(graph_bytes=100))
    assert "longer than 100 bytes" in bed.declare("team").problems[0]


def test_no_more_workflows_than_allowed_are_declared() -> None:
    bed = Bed(WorkflowLimits(declared=2))
    assert [bed.declare(name).status for name in ("a", "b", "c", "a")] == [201, 201, 422, 200]


def test_what_the_clusters_file_declares_can_not_be_changed() -> None:
    bed = Bed()
    graph = msgspec.convert(TEAM, Graph)
    bed.core.fix_workflow("team", graph)
    assert bed.declare("team").status == 409
    assert bed.ask(DropWorkflow(1, "team")).status == 409
    assert bed.body(ShowWorkflow(1, "team"))["fixed"] is True


# --- keeping -------------------------------------------------------------------------------------


def test_a_declaration_is_answered_when_it_is_written_and_has_no_effect_before() -> None:
    bed = Bed(keeps=True)
    graph = json.dumps(TEAM).encode()
    assert bed.say("client", DeclareWorkflow(1, "team", graph)) == []
    assert bed.ask(ShowWorkflow(2, "team")).status == 404
    (answer,) = bed.saved()
    assert (answer.token, answer.status) == (1, 201)
    declared = bed.body(ShowWorkflow(3, "team"))["declared"]
    assert list(declared["agents"]) == ["planner", "explorer", "writer"]


def test_what_can_not_be_written_has_no_effect_and_is_said_so() -> None:
    bed = Bed(keeps=True)
    bed.say("client", DeclareWorkflow(1, "team", json.dumps(TEAM).encode()))
    (answer,) = bed.saved("it could not be written: disk full")
    assert (answer.status, answer.problems) == (503, ["it could not be written: disk full"])
    assert bed.ask(ShowWorkflow(2, "team")).status == 404


def test_several_declarations_wait_in_order() -> None:
    bed = Bed(keeps=True)
    graph = json.dumps(TEAM).encode()
    questions = [
        DeclareWorkflow(1, "team", graph),
        DeclareWorkflow(2, "team", graph),
        DropWorkflow(3, "team"),
        DeclareWorkflow(4, "team", graph),
    ]
    for question in questions:
        assert bed.say("client", question) == []
    answers = bed.saved()
    assert [(answer.token, answer.status) for answer in answers] == [
        (1, 201),
        (2, 200),
        (3, 200),
        (4, 201),
    ]
    assert bed.ask(ShowWorkflow(5, "team")).status == 200


def test_too_much_that_waits_is_refused() -> None:
    bed = Bed(keeps=True)
    graph = json.dumps({"agents": {"a": {}}}).encode()
    answers = [bed.say("client", DeclareWorkflow(n, "team", graph)) for n in range(1100)]
    assert [answer.status for (answer,) in answers[-76:]] == [503] * 76
    assert len(bed.saved()) == 1024


def write(saves: list[Save], kept: Kept) -> None:
    """As a store would."""
    for save in saves:
        match save:
            case KeepGraph():
                kept.graphs[:] = [one for one in kept.graphs if one.name != save.name] + [save]
            case KeepProfile():
                mine = (save.tenant, save.workflow)
                others = [one for one in kept.profiles if (one.tenant, one.workflow) != mine]
                kept.profiles[:] = [*others, save]
            case KeepEvents():
                kept.events.append(save)
            case KeepRun() | DropRun():
                key = save.tenant, save.workflow, save.run
                kept.runs[:] = [
                    one for one in kept.runs if (one.tenant, one.workflow, one.run) != key
                ]
                if isinstance(save, KeepRun):
                    kept.runs.append(save)
            case _:
                position = getattr(save, "position", 0)
                kept.events[:] = [one for one in kept.events if one.position > position]


def run_team(bed: Bed, run: str) -> None:
    """One run of a planner, two explorers and a writer."""
    for number, agent in enumerate(("planner", "explorer", "explorer", "writer")):
        bed.begin(f"{run}-{number}", run, agent, context={"final": agent == "writer"})
        bed.wait(2.0)
        bed.finish(f"{run}-{number}", tokens=100 + number)


def learned(bed: Bed) -> Any:
    """What is learned of the team, less what only time changes."""
    return bed.body(ShowWorkflow(1, "team"))["learned"]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("journal_events", [5, 1000])
def test_what_was_learned_outlives_the_core(everything: bool, journal_events: int) -> None:
    limits = WorkflowLimits(journal_events=journal_events)
    bed, kept = Bed(limits, keeps=True), Kept([], [], [])
    for number in range(8):
        run_team(bed, f"run-{number}")
        write(bed.core.take_learned(), kept)
    before = learned(bed)
    assert before["runs_ended"] == 8
    if everything:
        write(bed.core.take_learned(everything=True), kept)
        assert kept.events == []
    elif journal_events == 5:
        assert len(kept.events) < 8, "profiles have taken their place"
    else:
        assert (len(kept.events), kept.profiles) == (8, [])
    after = Bed(limits, keeps=True, now_s=bed.now_s)
    assert after.core.restore(kept, bed.now_s) == []
    found = learned(after)
    assert [agent["name"] for agent in found["agents"]] == ["planner", "explorer", "writer"]
    assert (found["runs_started"], found["runs_ended"]) == (8, 8)
    assert found["edges"] == before["edges"]


def test_an_explicit_run_outlives_the_core_on_its_terms() -> None:
    bed, kept = Bed(keeps=True), Kept([], [], [])
    assert bed.say("client", StartRun(1, "team", "r", "", 50.0, -3)) == [], "not written yet"
    bed.say("client", StartRun(2, "team", "over", "", 0.0, 1))
    write(bed.core.take_saves(), kept)
    answers = bed._sent(bed.core.saved(2, "", bed.now_s), "client")
    assert [answer.status for answer in answers] == [201, 201]
    bed.ask(CancelRun(3, "team", "over"))
    write(bed.core.take_saves(), kept)
    assert [run.run for run in kept.runs] == ["r"]
    after = Bed(keeps=True, now_s=bed.now_s + 20.0)
    after.core.restore(kept, after.now_s)
    (run,) = after.body(ShowWorkflow(1, "team"))["runs"]
    assert (run["run"], run["explicit"], run["deadline_s"], run["priority"]) == (
        "r",
        True,
        30.0,
        -3,
    )
    after.begin("c")
    after.now_s += 31.0
    after.core.tick(after.now_s)
    write(after.core.take_saves(), kept)
    assert kept.runs == []


def test_a_run_that_can_not_be_written_down_is_not_promised() -> None:
    bed = Bed(keeps=True)
    bed.say("client", StartRun(1, "team", "r"))
    bed.core.take_saves()
    (answer,) = bed._sent(bed.core.saved(1, "the disk is full", bed.now_s), "client")
    assert (answer.status, answer.problems) == (503, ["the disk is full"])


def test_what_was_forgotten_is_not_learned_again_from_events() -> None:
    bed, kept = Bed(keeps=True), Kept([], [], [])
    run_team(bed, "run")
    write(bed.core.take_learned(), kept)
    bed.say("client", DropWorkflow(1, "team"))
    write(bed.core.take_saves(), kept)
    bed.core.saved(1, "", bed.now_s)
    after = Bed(keeps=True, now_s=bed.now_s)
    after.core.restore(kept, bed.now_s)
    assert after.ask(ShowWorkflow(1, "team")).status == 404


def test_events_are_written_again_as_a_profile_when_one_was_lost() -> None:
    limits = WorkflowLimits(journal_events=1)
    bed, kept = Bed(limits, keeps=True), Kept([], [], [])
    run_team(bed, "run-0")
    lost = bed.core.take_learned()
    assert any(isinstance(save, KeepProfile) for save in lost)
    bed.core.learned_lost()
    run_team(bed, "run-1")
    write(bed.core.take_learned(), kept)
    after = Bed(keeps=True, now_s=bed.now_s)
    after.core.restore(kept, bed.now_s)
    assert learned(after)["runs_ended"] == 2


def test_damaged_records_are_told_and_do_not_matter() -> None:
    kept = Kept([KeepGraph("bad", b"{}"), KeepGraph("good", json.dumps(TEAM).encode())])
    kept.profiles.append(KeepProfile("", "bad", b"\x00", 3))
    bed = Bed(keeps=True)
    problems = bed.core.restore(kept, bed.now_s)
    assert len(problems) == 2
    assert [row["name"] for row in bed.body(ListWorkflows(1))] == ["good"]


def test_a_workflow_goes_to_another_cluster() -> None:
    bed, other = Bed(), Bed()
    bed.declare("team")
    for number in range(3):
        run_team(bed, f"run-{number}")
    record = bed.ask(ShowWorkflow(1, "team", learned=True)).body
    assert other.ask(ImportWorkflow(1, "crew", record)).status == 201
    shown = other.body(ShowWorkflow(2, "crew"))
    assert shown["declared"] == bed.body(ShowWorkflow(2, "team"))["declared"]
    assert shown["learned"]["runs_ended"] == 3
    assert shown["learned"]["edges"] == learned(bed)["edges"]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (b"{}", "missing required field `name`"),
        (b'{"name": "a"}', "nothing is declared or learned"),
        (b'{"name": "a", "format": 2}', "Invalid enum value 2"),
        (b'{"name": "a", "declared": {"agents": {}}}', "there are none"),
        (b"\xff", "no exported workflow"),
    ],
)
def test_what_is_no_exported_workflow_is_refused(record: bytes, problem: str) -> None:
    answer = Bed().ask(ImportWorkflow(1, "team", record))
    assert answer.status == 422
    assert problem in answer.problems[0]


def test_a_record_of_what_was_learned_that_can_not_be_true_is_refused() -> None:
    bed = Bed()
    run_team(bed, "run")
    record = json.loads(bed.ask(ShowWorkflow(1, "team", learned=True)).body)
    record["learned"]["version"] = 99
    answer = Bed().ask(ImportWorkflow(1, "team", json.dumps(record).encode()))
    assert answer.status == 422
    assert "version 99" in answer.problems[0]


# --- runs ----------------------------------------------------------------------------------------


def test_a_run_lives_from_its_first_call_to_its_final_one() -> None:
    bed = Bed()
    bed.begin("one", context={"thread": "t"})
    bed.begin("two")
    run = bed.runs()["r"]
    assert (run.workflow, run.calls, run.open_calls, run.explicit) == ("team", 2, 2, False)
    bed.begin("last", context={"final": True})
    bed.finish("last")
    assert bed.runs()["r"].open_calls == 2, "siblings are not cut off by a final mark"
    bed.finish("one")
    bed.finish("two")
    assert bed.runs() == {}
    assert bed.snapshot().counters["runs_final"] == 1


def test_a_run_ends_where_its_declared_graph_does() -> None:
    bed = Bed()
    bed.declare("team")
    bed.begin("one", agent="planner")
    bed.finish("one")
    assert bed.runs().keys() == {"r"}
    bed.begin("two", agent="writer")
    bed.finish("two")
    assert bed.runs() == {}
    assert bed.snapshot().counters["runs_graph"] == 1


def test_a_call_that_failed_ends_no_run() -> None:
    bed = Bed()
    bed.begin("one", context={"final": True})
    bed.finish("one", "abort")
    assert bed.runs()["r"].open_calls == 0


def test_a_silent_run_ends_after_what_its_workflow_has_taught() -> None:
    slow, quick = Bed(), Bed()
    for bed, gaps in ((slow, 0), (quick, 120)):
        for number in range(gaps):
            bed.begin(f"g{number}", f"g{number // 4}", f"a{number % 4}")
            bed.wait(1.0)
            bed.finish(f"g{number}")
            bed.wait(1.0)
        bed.begin("one")
        bed.finish("one")
        bed.wait(LIMITS.idle_least_s + 5.0)
    assert "r" not in quick.runs()
    assert slow.runs().keys() == {"r"}
    slow.wait(LIMITS.idle_most_s)
    assert slow.runs() == {}
    assert slow.snapshot().counters["runs_idle"] == 1


def test_an_open_call_keeps_its_run_alive() -> None:
    bed = Bed(WorkflowLimits(idle_least_s=10.0, idle_most_s=20.0))
    bed.begin("one")
    bed.wait(100.0)
    assert bed.runs()["r"].open_calls == 1


def test_a_call_without_a_run_is_one_of_its_own() -> None:
    bed = Bed()
    bed.begin("one", run="")
    bed.finish("one")
    assert bed.runs() == {}
    assert bed.body(ShowWorkflow(1, "team"))["learned"]["runs_ended"] == 1


def test_a_client_that_names_the_thread_above_is_in_that_threads_run() -> None:
    bed = Bed()
    bed.begin("root", run="ses-1", context={"thread": "ses-1"})
    bed.begin("child", run="ses-1", context={"thread": "ses-2", "parent": "ses-1"})
    bed.begin("grandchild", run="ses-2", context={"thread": "ses-3", "parent": "ses-2"})
    assert bed.runs().keys() == {"ses-1"}
    assert bed.runs()["ses-1"].calls == 3


def test_an_explicit_run_gives_its_calls_a_deadline_and_a_priority() -> None:
    bed = Bed(decode_workers=0)
    started = bed.body(StartRun(1, "team", "r", "", 5.0, -3), 201)
    assert (started["deadline_s"], started["priority"]) == (5.0, -3)
    bed.begin("other", run="s")
    bed.begin("mine")
    bed.begin("own", priority=4)
    queue = [call.submit.priority for call in bed.core._calls.queue]
    assert queue == [-3, 0, 4]
    bed.wait(6.0)
    assert "mine" not in {row.request for row in bed.snapshot().calls if row.phase == "queued"}
    assert bed.snapshot().counters["runs_deadline"] == 1


def test_calls_of_a_run_over_its_deadline_are_refused_until_it_starts_anew() -> None:
    bed = Bed()
    bed.body(StartRun(1, "team", "r", "", 1.0), 201)
    bed.begin("one")
    bed.told = []
    bed.now_s += 2.0
    stops = [send.message for send in bed.core.tick(bed.now_s)]
    assert [(stop.status, stop.request) for stop in stops if isinstance(stop, Stop)] == [
        (504, "one")
    ]
    (rejected,) = bed.begin("two")
    assert isinstance(rejected, Rejected)
    assert (rejected.status, rejected.reason) == (504, "the run is over its deadline")
    bed.body(StartRun(2, "team", "r"), 201)
    assert isinstance(bed.begin("three")[0], Plan)


def test_cancelling_a_run_stops_all_its_calls_and_refuses_more() -> None:
    bed = Bed()
    bed.begin("one")
    bed.begin("two")
    bed.begin("other", run="s")
    bed.say("client", CancelRun(1, "team", "r"))
    stops = [message for peer, message in bed.told if peer == "api"]
    assert [(stop.request, stop.status) for stop in stops] == [("one", 410), ("two", 410)]
    (answer,) = [message for peer, message in bed.told if peer == "client"]
    assert json.loads(answer.body) == {
        "workflow": "team",
        "run": "r",
        "ended": "cancelled",
        "stopped": 2,
    }
    (rejected,) = bed.begin("three")
    assert (rejected.status, rejected.reason) == (410, "the run was cancelled")
    assert bed.body(CancelRun(2, "team", "r"))["stopped"] == 0, "asked again, nothing is done twice"
    assert bed.runs().keys() == {"s"}
    assert bed.body(ShowWorkflow(3, "team"))["learned"]["runs_ended"] == 0


def test_cancelling_a_waiting_call_rejects_it() -> None:
    bed = Bed(decode_workers=0)
    bed.begin("one")
    bed.say("client", CancelRun(1, "team", "r"))
    assert [type(message) for peer, message in bed.told if peer == "api"] == [Rejected]


def test_a_run_that_is_said_to_be_over_ends_with_its_last_open_call() -> None:
    bed = Bed()
    bed.begin("one")
    bed.begin("two")
    answer = bed.body(EndRun(1, "team", "r"))
    assert answer == {"workflow": "team", "run": "r", "ended": "", "open_calls": 2}
    assert [peer for peer, _ in bed.told] == ["client"], "open calls go on"
    bed.finish("one")
    assert bed.runs().keys() == {"r"}
    bed.finish("two")
    assert bed.runs() == {}
    assert bed.body(EndRun(2, "team", "r"))["ended"] == "final", "asked again, it is the same"
    assert bed.body(ShowWorkflow(3, "team"))["learned"]["runs_ended"] == 1
    assert isinstance(bed.begin("three")[0], Plan), "the id may be used again"


@pytest.mark.parametrize("open_calls", [False, True])
def test_the_end_of_a_run_that_was_given_up_is_not_learned(open_calls: bool) -> None:
    bed = Bed()
    bed.begin("one")
    if not open_calls:
        bed.finish("one")
    bed.body(EndRun(1, "team", "r", completed=False))
    if open_calls:
        bed.finish("one", outcome="abort")
    assert bed.runs() == {}
    assert bed.body(ShowWorkflow(2, "team"))["learned"]["runs_ended"] == 0


def test_a_run_that_is_started_anew_after_its_end_is_a_whole_one() -> None:
    bed = Bed()
    bed.begin("one")
    bed.body(EndRun(1, "team", "r", completed=False))
    bed.body(StartRun(2, "team", "r"), 201)
    bed.finish("one")
    assert bed.runs().keys() == {"r"}
    bed.body(EndRun(3, "team", "r"))
    assert bed.body(ShowWorkflow(4, "team"))["learned"]["runs_ended"] == 1


def test_an_unknown_run_can_not_end() -> None:
    assert Bed().ask(EndRun(1, "team", "r")).status == 404


def test_an_unknown_run_can_not_be_cancelled() -> None:
    assert Bed().ask(CancelRun(1, "team", "r")).status == 404


def test_tenants_have_runs_and_workflows_of_their_own() -> None:
    bed = Bed()
    bed.begin("mine", context={"tenant": "t"})
    assert bed.ask(CancelRun(1, "team", "r")).status == 404
    assert bed.ask(ShowWorkflow(2, "team")).status == 404
    assert bed.body(ListWorkflows(3)) == []
    assert bed.body(ShowWorkflow(4, "team", "t"))["runs_live"] == 1
    assert bed.body(CancelRun(5, "team", "r", "t"))["stopped"] == 1


@pytest.mark.parametrize(
    "question",
    [
        StartRun(1, "", "r"),
        StartRun(1, "team", ""),
        StartRun(1, "team", "r" * 300),
        StartRun(1, "team", "r", "", -1.0),
        StartRun(1, "team", "r", "", float("nan")),
        StartRun(1, "team", "r", "", 1.0, 1 << 40),
    ],
)
def test_odd_runs_are_refused(question: StartRun) -> None:
    assert Bed().ask(question).status == 422


def test_identities_that_change_with_every_request_stay_within_bounds() -> None:
    limits = WorkflowLimits(
        runs_per_tenant=20, runs=30, tenants=4, ended_runs=10, workflows_per_tenant=5
    )
    bed = Bed(limits)
    for number in range(200):
        context = {"tenant": f"t{number % 7}", "thread": f"th{number}"}
        (plan,) = bed.begin(
            f"c{number}", f"r{number}", f"a{number}", workflow=f"w{number}", context=context
        )
        assert isinstance(plan, Plan), "no call fails because of its identity"
        if number % 3:
            bed.finish(f"c{number}")
        else:
            bed.finish(f"c{number}", "abort")
    assert bed.snapshot().runs_live <= 30


def test_more_runs_than_allowed_with_open_calls_are_served_untracked() -> None:
    bed = Bed(WorkflowLimits(runs_per_tenant=2))
    for number in range(4):
        assert isinstance(bed.begin(f"c{number}", f"r{number}")[0], Plan)
    counters = bed.snapshot().counters
    assert (counters["runs_begun"], counters["calls_untracked"]) == (2, 2)
    assert bed.ask(StartRun(1, "team", "more")).status == 429
    for number in range(4):
        bed.finish(f"c{number}")
    assert bed.body(StartRun(2, "team", "more"), 201)["run"] == "more"
    assert bed.snapshot().counters["runs_forgotten"] == 1

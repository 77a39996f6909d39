"""What the core answers: membership, plans, failures, silences, accounts."""

from __future__ import annotations

from typing import TypeVar

import msgspec
import pytest

from coordinator import core
from coordinator.core import Core
from coordinator.limits import Limits, Placement
from coordinator.protocol import (
    Alive,
    ApiBeat,
    Beat,
    CallContext,
    CallStatus,
    Check,
    Checked,
    CheckedPhase,
    Draining,
    EngineFacts,
    Failed,
    Finished,
    Hello,
    Inspect,
    Leaving,
    LinkLoad,
    LinkStatus,
    Load,
    Placed,
    Plan,
    Prefilled,
    Probe,
    Probed,
    ProbeFinished,
    ProbeRead,
    Ready,
    Refused,
    Rejected,
    Role,
    Snapshot,
    Started,
    Stop,
    Submit,
    ToCore,
    Unknown,
    Welcome,
    WorkerGone,
    WorkerStatus,
    WorkerUp,
)

M = TypeVar("M")
Told = list[tuple[str, object]]

LIMITS = Limits(queue_calls=3, calls_per_worker=4, attempts=3, probe_attempts=2)
PLACEMENT = Placement(
    policy="least_kv",
    remote_prefill_min_tokens=100,
    reserve_output_tokens=32,
)
FACTS = EngineFacts("0.32", "model", "fingerprint", 16, 90, 2000, 8, 2048)
LONG = 320
SHORT = 32


def hashes(prompt_tokens: int) -> bytes:
    return b"".join(block.to_bytes(8, "little") for block in range(prompt_tokens // 16))


class Bed:
    """A core, its clock, and everything it said at the last event."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.core = Core(limits, PLACEMENT, "core")
        self.now_s = 100.0
        self.told: Told = []

    def say(self, peer: str, message: ToCore) -> Told:
        """One event; what the core said to whom."""
        sends = self.core.handle(peer.encode(), message, self.now_s)
        self.told = [(send.peer.decode(), send.message) for send in sends]
        self.core.check()
        return self.told

    def wait(self, elapsed_s: float, *alive: str) -> Told:
        """Time passes; ``alive`` API processes and workers keep beating."""
        self.told = []
        end_s = self.now_s + elapsed_s
        while self.now_s < end_s:
            self.now_s = min(end_s, self.now_s + 0.5)
            for name in alive:
                self.beat(name)
            sends = self.core.tick(self.now_s)
            self.told += [(send.peer.decode(), send.message) for send in sends]
            self.core.check()
        return self.told

    def beat(self, name: str) -> None:
        beat: ToCore = ApiBeat(name) if name.startswith("api") else Beat(name, "1", Load())
        self.core.handle(name.encode(), beat, self.now_s)

    def heard(self, kind: type[M]) -> list[M]:
        """What of a kind the core said at the last event."""
        return [message for _, message in self.told if isinstance(message, kind)]

    def api(self, name: str = "api") -> Told:
        return self.say(name, Hello(name))

    def worker(self, name: str, role: Role = "decode", incarnation: str = "1") -> Told:
        return self.say(name, ready(name, role, incarnation))

    def cluster(self, *roles: Role) -> list[str]:
        """An API process and workers, their pairs warm."""
        self.api()
        names = [f"{role}-{number}" for number, role in enumerate(roles)]
        probes: Told = []
        for name, role in zip(names, roles, strict=True):
            probes += self.worker(name, role)
        while probes:
            peer, message = probes.pop(0)
            if isinstance(message, Probe):
                probes += self.say(peer, Probed(peer, "1", message.probe, b"handle"))
            elif isinstance(message, ProbeRead):
                probes += self.say(peer, ProbeFinished(peer, "1", message.probe, 0.1, 16))
        return names

    def submit(self, request: str, prompt_tokens: int = SHORT, **more: object) -> Told:
        return self.say("api", submit(request, prompt_tokens, **more))

    def plan(self, request: str, prompt_tokens: int = SHORT, **more: object) -> Plan:
        """Submit a call that is planned at once."""
        self.submit(request, prompt_tokens, **more)
        return self.only(Plan)

    def only(self, kind: type[M]) -> M:
        """The one message of a kind at the last event."""
        (message,) = self.heard(kind)
        return message

    def fill(self, worker: str) -> None:
        """One call that leaves no room on a worker."""
        plan = self.plan(f"fill-{worker}", 1400, aggregated=True)
        assert plan.decode.worker == worker

    def snapshot(self) -> Snapshot:
        return self.core.snapshot(0, self.now_s)

    def row(self, request: str) -> CallStatus:
        (row,) = (row for row in self.snapshot().calls if row.request == request)
        return row

    def reserved(self) -> list[int]:
        return [row.kv_blocks_reserved for row in self.snapshot().workers]

    def link(self, source: str, target: str) -> LinkStatus:
        (row,) = (r for r in self.snapshot().links if (r.source, r.target) == (source, target))
        return row

    def status(self, worker: str) -> WorkerStatus:
        (row,) = (row for row in self.snapshot().workers if row.worker == worker)
        return row


def ready(name: str, role: Role = "decode", incarnation: str = "1", **facts: object) -> Ready:
    its_facts = msgspec.structs.replace(FACTS, **facts)
    return Ready(name, incarnation, role, f"tcp://{name}", its_facts)


def submit(request: str, prompt_tokens: int = SHORT, **more: object) -> Submit:
    known = hashes(prompt_tokens)
    basic = Submit("api", request, 1, prompt_tokens, 32, known)
    return msgspec.structs.replace(basic, **more)


# --- workers --------------------------------------------------------------------------------


def test_a_worker_is_welcomed_and_every_api_process_hears_of_it() -> None:
    bed = Bed()
    bed.api("api-1")
    bed.api("api-2")
    told = bed.worker("w")
    assert ("w", Welcome(1.0, "core", 16)) in told
    assert [(peer, message.worker) for peer, message in told if isinstance(message, WorkerUp)] == [
        ("api-1", "w"),
        ("api-2", "w"),
    ]
    assert bed.worker("w") == [("w", Welcome(1.0, "core", 16))]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (ready("x", vllm_version="0.31"), "vLLM version is 0.32, not 0.31"),
        (ready("x", model_fingerprint="other"), "model fingerprint"),
        (ready("x", block_size=32), "block size is 16, not 32"),
        (ready("x", kv_blocks=0), "positive"),
        (ready("x" * 300), "name"),
        (msgspec.structs.replace(ready("x"), protocol_version=99), "protocol version is 1, not 99"),
        (ready("y"), "2 workers already"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(message: Ready, reason: str) -> None:
    bed = Bed(msgspec.structs.replace(LIMITS, workers=2))
    bed.worker("w")
    if message.worker == "y":
        bed.worker("z")
    bed.say("x", message)
    assert reason in bed.only(Refused).reason
    assert bed.core.counters["peers_refused"] == 1


def test_the_configured_model_binds_the_first_worker_too() -> None:
    core = Core(LIMITS, PLACEMENT, "core", "model", "fingerprint", "0.31")
    (send,) = core.handle(b"w", ready("w"), 0.0)
    assert isinstance(send.message, Refused)


def test_a_new_incarnation_replaces_the_old_one_which_may_not_return() -> None:
    bed = Bed()
    bed.api()
    bed.worker("w", incarnation="1")
    bed.worker("w", incarnation="2")
    assert bed.only(WorkerGone).incarnation == "1"
    assert bed.only(WorkerUp).incarnation == "2"
    bed.worker("w", incarnation="1")
    assert "newer incarnation" in bed.only(Refused).reason
    assert bed.status("w").incarnation == "2"


def test_an_unknown_worker_that_beats_is_asked_to_introduce_itself() -> None:
    bed = Bed()
    assert bed.say("w", Beat("w", "1", Load())) == [("w", Unknown("core"))]
    bed.worker("w")
    assert bed.say("w", Beat("w", "2", Load())) == [("w", Unknown("core"))]
    assert bed.say("elsewhere", Beat("w", "1", Load())) == [("elsewhere", Unknown("core"))]
    assert bed.say("elsewhere", ready("w")) == [("elsewhere", Welcome(1.0, "core", 16))]
    assert bed.say("elsewhere", Beat("w", "1", Load())) == []


def test_a_silent_worker_gets_no_calls_and_is_lost_in_the_end() -> None:
    bed = Bed()
    bed.api()
    bed.worker("w")
    bed.wait(2.0, "api")
    assert bed.status("w").state == "up"
    bed.wait(0.5, "api")
    assert bed.status("w").state == "suspect"
    assert bed.submit("r") == []
    bed.say("w", Beat("w", "1", Load()))
    assert bed.only(Plan).decode.worker == "w"
    bed.wait(5.5, "api")
    assert bed.only(WorkerGone) == WorkerGone("w", "1", "missed 5 beats")
    assert bed.snapshot().workers == []


def test_a_worker_that_leaves_is_gone_at_once() -> None:
    bed = Bed()
    bed.api()
    bed.worker("w")
    bed.say("elsewhere", Leaving("w", "1"))
    assert bed.snapshot().workers
    bed.say("w", Leaving("w", "1", "stopped"))
    assert bed.only(WorkerGone).reason == "stopped"
    bed.worker("w")
    assert "leaving" in bed.only(Refused).reason


def test_a_worker_that_drains_keeps_its_calls_gets_no_new_ones_and_leaves() -> None:
    bed = Bed()
    bed.cluster("decode", "decode")
    first = bed.plan("first").decode.worker
    other = next(name for name in ("decode-0", "decode-1") if name != first)
    assert bed.say(first, Draining(first, "1")) == []
    assert bed.status(first).state == "draining"
    assert {bed.plan(f"r{number}").decode.worker for number in range(4)} == {other}
    bed.say(first, Draining(first, "1"))
    assert bed.wait(20.0, "api", "decode-0", "decode-1") == [], "nobody asks after its calls"
    assert bed.status(first).state == "draining", "beats do not bring it back"
    bed.say("api", Started("api", "first", 1))
    bed.say("api", Finished("api", "first", 1, "stop", 3))
    bed.say(first, Leaving(first, "1", "stopped"))
    assert bed.only(WorkerGone).worker == first


def test_a_worker_that_falls_silent_while_it_drains_is_lost() -> None:
    bed = Bed()
    bed.cluster("decode", "decode")
    bed.say("decode-0", Draining("decode-0", "1"))
    bed.wait(20.0, "api", "decode-1")
    assert [row.worker for row in bed.snapshot().workers] == ["decode-1"]


# --- API processes ----------------------------------------------------------------------------


def test_an_api_process_hears_of_every_worker() -> None:
    bed = Bed()
    bed.worker("b")
    bed.worker("a")
    told = bed.api()
    assert told[0] == ("api", Welcome(1.0, "core", 16))
    assert [message.worker for message in bed.heard(WorkerUp)] == ["a", "b"]


def test_a_lost_api_process_takes_its_calls_with_it() -> None:
    bed = Bed()
    (worker,) = bed.cluster("decode")
    bed.plan("r")
    assert bed.reserved() == [4]
    bed.wait(5.5, worker)
    assert bed.reserved() == [0]
    assert bed.snapshot().apis == 0
    assert bed.say("api", ApiBeat("api")) == [("api", Unknown("core"))]
    bed.api()
    assert bed.plan("r").attempt == 1


def test_unknown_api_processes_are_asked_to_introduce_themselves() -> None:
    bed = Bed()
    assert bed.submit("r") == [("api", Unknown("core"))]
    assert bed.say("api", Finished("api", "r", 1, "stop")) == []
    assert bed.core.counters["messages_unknown_sender"] == 2
    assert "protocol" in str(bed.say("api", Hello("api", protocol_version=9)))


def test_an_api_processs_beat_is_answered() -> None:
    bed = Bed()
    bed.cluster("decode")
    assert bed.say("api", ApiBeat("api")) == [("api", Alive("core"))]
    assert bed.say("decode-0", Beat("decode-0", "1", Load())) == []


def test_an_api_process_may_come_back_over_another_connection() -> None:
    bed = Bed()
    bed.cluster("decode")
    bed.say("elsewhere", ApiBeat("api"))
    assert bed.told == [("elsewhere", Unknown("core"))]
    bed.say("elsewhere", Hello("api"))
    told = bed.say("elsewhere", submit("r"))
    assert [peer for peer, message in told if isinstance(message, Plan)] == ["elsewhere"]


@pytest.mark.parametrize(
    "message",
    [
        Prefilled("api", "r", 1),
        Started("api", "r", 1),
        Finished("api", "r", 1, "stop"),
        Failed("api", "r", 1, "decode-1", "bad"),
        Checked("api", "r", 1, "gone"),
    ],
)
def test_nobody_speaks_for_another_api_process(message: ToCore) -> None:
    bed = Bed()
    bed.cluster("prefill", "decode")
    bed.plan("r", LONG)
    before = bed.row("r")
    bed.say("api-2", Hello("api-2"))
    bed.say("api-2", message)
    assert bed.row("r") == before
    own = msgspec.structs.replace(message, api="api-2")
    bed.say("api-2", own)
    assert bed.row("r") == before


# --- pairs --------------------------------------------------------------------------------------


def test_useful_pairs_are_probed_first_and_one_at_a_time() -> None:
    bed = Bed()
    bed.worker("d", "decode")
    bed.worker("p", "prefill")
    (peer, probe) = bed.told[-2]
    assert peer == "p"
    assert isinstance(probe, Probe)
    assert probe.prompt_tokens == 33
    assert bed.worker("q", "prefill") == [("q", Welcome(1.0, "core", 16))]
    bed.say("p", Probed("p", "1", probe.probe, b"secret"))
    read = bed.only(ProbeRead)
    assert bed.told[0][0] == "d"
    assert (read.handle, read.source, read.seed) == (b"secret", "p", probe.seed)
    told = bed.say("d", ProbeFinished("d", "1", probe.probe, 0.1, 32))
    assert bed.status("d").warm_peers == 1
    assert [(peer, type(message)) for peer, message in told] == [("q", Probe)]


def test_a_probe_is_answered_only_by_whom_it_was_asked() -> None:
    bed = Bed()
    bed.worker("d", "decode")
    bed.worker("p", "prefill")
    number = bed.only(Probe).probe
    for peer, message in (
        ("d", Probed("d", "1", number, b"h")),
        ("d", Probed("p", "1", number, b"h")),
        ("p", Probed("p", "1", number + 1, b"h")),
        ("p", ProbeFinished("p", "1", number, 0.1, 32)),
        ("d", ProbeFinished("d", "1", number, 0.1, 32)),
    ):
        assert bed.say(peer, message) == []
    assert bed.say("p", Probed("p", "1", number, b"h")) != []
    for peer, message in (
        ("p", Probed("p", "1", number, b"again")),
        ("p", ProbeFinished("p", "1", number, 0.1, 32)),
        ("d", ProbeFinished("d", "1", number + 1, 0.1, 32)),
    ):
        assert bed.say(peer, message) == []
    bed.say("d", ProbeFinished("d", "1", number, 0.1, 32))
    assert bed.status("d").warm_peers == 1


def test_links_are_shown_as_their_readers_tell_them() -> None:
    bed = Bed()
    bed.cluster("prefill", "decode", "decode")
    told = LinkLoad("prefill-0", 3, 4096, 0.5, 1024, 2e9, 0.001)
    bed.say("decode-1", Beat("decode-1", "1", Load(), [told, LinkLoad("nobody", 9)]))
    rows = bed.snapshot().links
    assert [row.source for row in rows] == sorted(row.source for row in rows)
    assert len(rows) == 6, "every ordered pair"
    assert {row.state for row in rows} == {"warm"}
    assert sum(row.transfers for row in rows) == 3
    row = bed.link("prefill-0", "decode-1")
    assert (row.transfers, row.bytes_total, row.elapsed_s) == (3, 4096, 0.5)
    assert (row.in_flight_bytes, row.bytes_per_s, row.fixed_s) == (1024, 2e9, 0.001)
    bed.say("decode-1", Beat("decode-1", "1", Load()))
    assert bed.link("prefill-0", "decode-1").transfers == 0


def test_what_was_read_of_a_former_incarnation_is_not_shown() -> None:
    bed = Bed()
    bed.cluster("prefill", "decode")
    beat = Beat("decode-1", "1", Load(), [LinkLoad("prefill-0", 3, 4096)])
    bed.say("decode-1", beat)
    bed.worker("prefill-0", "prefill", "2")
    bed.say("decode-1", beat)
    row = bed.link("prefill-0", "decode-1")
    assert (row.state, row.transfers) == ("probing the source", 0)


def test_only_so_many_links_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "LINKS_SHOWN", 5)
    bed = Bed()
    bed.cluster("prefill", "decode", "decode")
    assert len(bed.snapshot().links) == 5


def test_handles_count_from_the_end_of_a_prefill_to_the_first_token() -> None:
    bed = Bed()
    bed.cluster("prefill", "decode")
    bed.plan("r", LONG)
    assert bed.status("prefill-0").handles == 0
    bed.say("api", Prefilled("api", "r", 1))
    assert bed.status("prefill-0").handles == 1
    assert bed.status("decode-1").handles == 0
    bed.say("api", Started("api", "r", 1))
    assert bed.status("prefill-0").handles == 0


@pytest.mark.parametrize("how", ["error", "nothing moved", "silence"])
def test_a_pair_that_fails_is_tried_again_and_then_left_cold(how: str) -> None:
    bed = Bed()
    bed.api()
    bed.worker("p", "prefill")
    questions = list(bed.worker("d", "decode"))
    for _ in range(200):
        while questions:
            peer, message = questions.pop(0)
            if isinstance(message, Probe) and how != "silence":
                error = "broken" if how == "error" else ""
                questions += bed.say(peer, Probed(peer, "1", message.probe, b"h", error))
            elif isinstance(message, ProbeRead):
                questions += bed.say(peer, ProbeFinished(peer, "1", message.probe, 0.1, 0))
        questions = list(bed.wait(1.0, "api", "p", "d"))
    assert bed.core.counters["probes_sent"] == 4
    assert bed.core.counters["pairs_failed"] == 2
    assert bed.plan("r", LONG).prefill is None


# --- plans --------------------------------------------------------------------------------------


def test_a_short_call_is_planned_locally_and_gives_everything_back() -> None:
    bed = Bed()
    bed.cluster("decode")
    plan = bed.plan("r")
    assert plan == Plan("r", 1, Placed("decode-0", "1"), None, "local: few uncached tokens")
    assert bed.reserved() == [4]
    bed.say("api", Started("api", "r", 1))
    assert bed.row("r").phase == "decoding"
    bed.say("api", Finished("api", "r", 1, "stop", 9, moved_tokens=0, ttft_s=0.5))
    row = bed.row("r")
    assert (row.phase, row.output_tokens, row.ttft_s, row.outcome) == ("finished", 9, 0.5, "stop")
    assert bed.reserved() == [0]


def test_a_call_that_is_over_with_its_first_token_leaves_no_kv_on_its_decode_worker() -> None:
    bed = Bed()
    bed.cluster("prefill", "decode")
    bed.plan("r", LONG)
    over = Finished("api", "r", 1, "stop", 1, ttft_s=0.5, undecoded=True)
    bed.say("api", over)
    assert bed.row("r").phase == "finished"
    assert bed.reserved() == [0, 0]
    again = bed.plan("r2", LONG)
    assert again.prefill == Placed("prefill-0", "1"), "only the prefill worker has its KV"
    bed.core.check()


def test_a_long_call_holds_room_on_its_prefill_worker_until_the_first_token() -> None:
    bed = Bed()
    bed.cluster("prefill", "decode")
    plan = bed.plan("r", LONG)
    assert plan.prefill == Placed("prefill-0", "1")
    assert bed.reserved() == [22, 20]
    bed.say("api", Prefilled("api", "r", 1))
    assert bed.row("r").phase == "loading"
    assert bed.reserved() == [22, 20]
    bed.say("api", Started("api", "r", 1))
    assert bed.reserved() == [22, 0]
    bed.say("api", Finished("api", "r", 1, "length"))
    assert bed.reserved() == [0, 0]


def test_a_lost_prefilled_changes_nothing_but_time() -> None:
    bed = Bed()
    bed.cluster("prefill", "decode")
    bed.plan("r", LONG)
    bed.say("api", Started("api", "r", 1))
    assert bed.row("r").phase == "decoding"
    assert bed.reserved() == [22, 0]
    bed.say("api", Prefilled("api", "r", 1))
    assert bed.row("r").phase == "decoding"


def test_asking_again_gives_the_same_plan() -> None:
    bed = Bed()
    bed.cluster("decode", "decode")
    plan = bed.plan("r")
    assert bed.submit("r") == [("api", plan)]
    assert bed.submit("r", attempt=2) == []
    bed.say("api", Started("api", "r", 1))
    assert bed.submit("r") == []
    bed.say("api", Finished("api", "r", 1, "stop"))
    assert bed.submit("r") == []
    assert bed.reserved() == [0, 0]


def test_request_ids_are_private_to_an_api_process() -> None:
    bed = Bed()
    bed.cluster("decode")
    bed.api("api-2")
    bed.plan("r")
    bed.say("api-2", submit("r", api="api-2"))
    assert bed.only(Plan).request == "r"
    bed.say("api-2", Finished("api-2", "r", 1, "abort"))
    assert bed.reserved() == [4]


def test_siblings_go_to_one_worker() -> None:
    bed = Bed()
    bed.cluster("decode", "decode")
    plans = [bed.plan(f"r{number}", group="g", aggregated=True) for number in range(3)]
    assert {plan.decode.worker for plan in plans} == {"decode-0"}
    assert bed.plan("other", block_hashes=b"").decode.worker == "decode-1"


def test_what_was_computed_is_known_to_be_cached() -> None:
    bed = Bed()
    bed.cluster("prefill", "decode")
    bed.plan("a", LONG)
    bed.say("api", Prefilled("api", "a", 1))
    bed.say("api", Started("api", "a", 1))
    bed.say("api", Finished("api", "a", 1, "stop"))
    assert bed.plan("b", LONG).prefill is None
    bed.say("api", Started("api", "b", 1))
    bed.say("api", Finished("api", "b", 1, "stop", local_cached_tokens=LONG))
    assert bed.plan("c", LONG).prefill is None


def test_an_engine_that_lacked_what_it_should_have_had_is_not_believed() -> None:
    bed = Bed()
    bed.cluster("prefill", "decode")
    for request in ("a", "b"):
        bed.plan(request, LONG)
        bed.say("api", Started("api", request, 1))
        bed.say("api", Finished("api", request, 1, "stop", local_cached_tokens=16))
    assert bed.plan("c", LONG).prefill is not None


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"request": "x" * 300}, 400),
        ({"request": ""}, 400),
        ({"block_hashes": b"1234567"}, 400),
        ({"block_hashes": bytes(8 * 3)}, 400),
        ({"prompt_tokens": 0, "block_hashes": b""}, 400),
        ({"max_output_tokens": 0}, 400),
        ({"attempt": 0}, 400),
        ({"deadline_s": -1.0}, 400),
        ({"deadline_s": float("nan")}, 400),
        ({"prompt_tokens": 1600}, 503),
    ],
)
def test_what_cannot_be_served_is_rejected_at_once(changes: dict[str, object], status: int) -> None:
    bed = Bed()
    bed.cluster("decode")
    bed.say("api", msgspec.structs.replace(submit("r"), **changes))
    assert bed.only(Rejected).status == status
    assert bed.snapshot().active == 0


def test_a_full_queue_answers_429_and_says_when_to_come_back() -> None:
    bed = Bed()
    bed.cluster("decode")
    bed.fill("decode-0")
    for number in range(3):
        assert bed.submit(f"r{number}", LONG) == []
    bed.submit("r3")
    rejected = bed.only(Rejected)
    assert (rejected.status, rejected.retry_after_s) == (429, 60.0)
    bed.say("api", Finished("api", "fill-decode-0", 1, "stop"))
    assert [plan.request for plan in bed.heard(Plan)] == ["r0", "r1", "r2"]


def test_retry_after_follows_the_rate_of_completions() -> None:
    bed = Bed()
    bed.cluster("decode")
    for number in range(10):
        bed.plan(f"r{number}")
        bed.now_s += 10.0
        bed.beat("api")
        bed.beat("decode-0")
        bed.say("api", Finished("api", f"r{number}", 1, "stop"))
    bed.fill("decode-0")
    for number in range(3):
        bed.submit(f"q{number}", LONG)
    bed.submit("late")
    assert bed.only(Rejected).retry_after_s == pytest.approx(27.0)


def test_the_queue_is_served_strictly_in_order() -> None:
    bed = Bed()
    bed.cluster("decode")
    bed.plan("small")
    bed.plan("filler", 1200, aggregated=True)
    assert bed.submit("big", 400) == []
    assert bed.submit("tiny") == []
    assert bed.submit("urgent", 400, priority=-1) == []
    bed.say("api", Finished("api", "small", 1, "stop"))
    assert bed.heard(Plan) == []
    bed.say("api", Finished("api", "filler", 1, "stop"))
    assert [plan.request for plan in bed.heard(Plan)] == ["urgent", "big", "tiny"]


def test_the_number_of_calls_per_worker_is_bounded() -> None:
    bed = Bed()
    bed.cluster("decode")
    for number in range(4):
        bed.plan(f"r{number}")
    assert bed.submit("one too many") == []
    bed.say("api", Started("api", "r0", 1))
    assert bed.heard(Plan) == []
    bed.say("api", Finished("api", "r0", 1, "abort"))
    assert bed.only(Plan).request == "one too many"


def test_what_an_engine_says_is_in_use_counts_against_it() -> None:
    bed = Bed()
    bed.cluster("decode")
    bed.plan("r")
    bed.say("decode-0", Beat("decode-0", "1", Load(kv_blocks_used=89)))
    assert bed.submit("s") == []
    bed.say("decode-0", Beat("decode-0", "1", Load(kv_blocks_used=8)))
    assert bed.only(Plan).request == "s"


def test_calls_wait_for_a_cluster_that_is_starting() -> None:
    bed = Bed()
    bed.api()
    assert bed.submit("r") == []
    assert bed.submit("r") == []
    bed.worker("w")
    assert bed.only(Plan).decode.worker == "w"


def test_waiting_too_long_ends_in_503() -> None:
    bed = Bed()
    bed.api()
    bed.submit("r")
    bed.wait(119.5, "api")
    assert bed.told == []
    bed.wait(0.5, "api")
    rejected = bed.only(Rejected)
    assert (rejected.status, rejected.retry_after_s) == (503, 60.0)
    assert bed.submit("r") == [("api", rejected)]


def test_a_queued_call_that_nobody_can_hold_any_more_does_not_block_the_others() -> None:
    bed = Bed()
    bed.api()
    bed.say("small", ready("small", max_model_len=100))
    bed.say("large", ready("large"))
    bed.plan("fill", 1400)
    assert bed.submit("long", 1000) == []
    assert bed.submit("short") == []
    bed.say("large", Leaving("large", "1"))
    assert [(r.request, r.status) for r in bed.heard(Rejected)] == [("long", 503)]
    assert [stop.request for stop in bed.heard(Stop)] == ["fill"]
    assert [plan.request for plan in bed.heard(Plan)] == ["short"]


# --- failures -----------------------------------------------------------------------------------


def test_a_failed_attempt_is_planned_again_elsewhere() -> None:
    bed = Bed()
    bed.cluster("decode", "decode")
    assert bed.plan("r").decode.worker == "decode-0"
    bed.say("api", Started("api", "r", 1))
    failed = Failed("api", "r", 1, "decode-0", "broken", generated_tokens=8)
    bed.say("api", failed)
    plan = bed.only(Plan)
    assert (plan.attempt, plan.decode.worker) == (2, "decode-1")
    assert bed.reserved() == [0, 4]
    assert bed.say("api", failed) == [("api", plan)]
    bed.say("api", Started("api", "r", 2))
    assert bed.say("api", failed) == []
    assert bed.row("r").output_tokens == 8


def test_what_the_client_has_got_becomes_part_of_the_prompt() -> None:
    bed = Bed(msgspec.structs.replace(LIMITS, attempts=9))
    bed.cluster("decode", "decode")
    bed.plan("r", max_output_tokens=1000)
    assert sum(bed.reserved()) == 4
    bed.say("api", Failed("api", "r", 1, "decode-0", "broken", generated_tokens=160))
    assert sum(bed.reserved()) == 14
    bed.say("api", Failed("api", "r", 2, "decode-1", "broken", generated_tokens=176))
    assert sum(bed.reserved()) == 15


def test_who_is_blamed_is_introduced_again() -> None:
    bed = Bed()
    bed.cluster("decode")
    bed.plan("r")
    told = bed.say("api", Failed("api", "r", 1, "decode-0", "never heard of"))
    assert [type(message) for _, message in told] == [WorkerUp, Plan]


def test_a_call_that_failed_goes_before_those_that_wait() -> None:
    bed = Bed()
    bed.cluster("decode")
    bed.fill("decode-0")
    bed.submit("waiting", LONG, priority=-5)
    bed.say("api", Failed("api", "fill-decode-0", 1, "", "broken"))
    assert [plan.request for plan in bed.heard(Plan)] == ["fill-decode-0"]


def test_after_the_last_attempt_the_call_is_stopped() -> None:
    bed = Bed()
    bed.cluster("decode", "decode")
    bed.plan("r")
    for attempt in (1, 2):
        bed.say("api", Failed("api", "r", attempt, "", "broken"))
        assert bed.only(Plan).attempt == attempt + 1
    failed = Failed("api", "r", 3, "", "broken")
    bed.say("api", failed)
    stop = bed.only(Stop)
    assert (stop.status, stop.attempt) == (503, 3)
    assert "3 attempts" in stop.reason
    assert bed.reserved() == [0, 0]
    assert bed.say("api", failed) == [("api", stop)]


def test_the_failure_of_an_unknown_call_ends_it_unless_the_core_is_new() -> None:
    bed = Bed()
    bed.cluster("decode")
    failed = Failed("api", "r", 2, "decode-0", "broken", 5)
    assert bed.say("api", failed) == []
    bed.wait(2.0, "api", "decode-0")
    bed.say("api", failed)
    assert (bed.only(Stop).status, bed.only(Stop).attempt) == (503, 2)


def test_late_messages_of_an_old_attempt_change_nothing() -> None:
    bed = Bed()
    bed.cluster("prefill", "decode", "decode")
    bed.plan("r", LONG)
    bed.say("api", Failed("api", "r", 1, "", "broken"))
    plan = bed.only(Plan)
    for late in (Prefilled("api", "r", 1), Started("api", "r", 1)):
        assert bed.say("api", late) == [("api", plan)]
        assert bed.row("r").phase == "prefilling"
    told = bed.say("api", Finished("api", "r", 1, "stop"))
    assert told == [("api", plan), ("api", Check("r", 2))]
    assert bed.row("r").phase == "prefilling"
    bed.say("api", Checked("api", "r", 2, "prefilling"))
    assert (bed.row("r").phase, bed.row("r").attempt) == ("prefilling", 2)
    bed.say("api", Checked("api", "r", 2, "gone"))
    assert bed.reserved() == [0, 0, 0]


@pytest.mark.parametrize("prefilled", [False, True])
def test_a_lost_decode_worker_before_the_first_token_means_another_plan(prefilled: bool) -> None:
    bed = Bed()
    bed.cluster("prefill", "decode", "decode")
    plan = bed.plan("r", LONG)
    if prefilled:
        bed.say("api", Prefilled("api", "r", 1))
    name = plan.decode.worker
    bed.say(name, Leaving(name, "1"))
    again = bed.only(Plan)
    assert again.attempt == 2
    assert again.decode.worker != name
    assert bed.snapshot().counters["replans"] == 1


def test_a_lost_prefill_worker_means_another_plan_while_it_computes() -> None:
    bed = Bed()
    bed.cluster("prefill", "decode")
    bed.plan("r", LONG)
    bed.say("prefill-0", Leaving("prefill-0", "1"))
    plan = bed.only(Plan)
    assert (plan.attempt, plan.prefill) == (2, None)


def test_a_lost_prefill_worker_is_not_missed_once_it_is_done() -> None:
    bed = Bed()
    bed.cluster("prefill", "decode")
    bed.plan("r", LONG)
    bed.say("api", Prefilled("api", "r", 1))
    bed.say("prefill-0", Leaving("prefill-0", "1"))
    assert bed.heard(Plan) == []
    assert bed.submit("r", LONG) == []
    bed.say("api", Started("api", "r", 1))
    assert bed.row("r").phase == "decoding"


def test_a_lost_decode_worker_after_the_first_token_waits_for_the_api_process() -> None:
    bed = Bed()
    bed.cluster("decode", "decode")
    bed.plan("r")
    bed.say("api", Started("api", "r", 1))
    bed.say("decode-0", Leaving("decode-0", "1"))
    assert [type(message) for _, message in bed.told if not isinstance(message, Probe)] == [
        WorkerGone
    ]
    assert bed.row("r").phase == "resuming"
    assert bed.reserved() == [0]
    bed.say("api", Failed("api", "r", 1, "decode-0", "lost", 4))
    assert (bed.only(Plan).attempt, bed.only(Plan).decode.worker) == (2, "decode-1")


def test_an_api_process_that_missed_the_loss_is_told_again() -> None:
    bed = Bed()
    bed.cluster("decode", "decode")
    bed.plan("r")
    bed.say("api", Started("api", "r", 1))
    bed.say("decode-0", Leaving("decode-0", "1"))
    bed.wait(10.0, "api", "decode-1")
    assert bed.only(WorkerGone).worker == "decode-0"
    assert bed.only(Check) == Check("r", 1)
    bed.say("api", Checked("api", "r", 1, "decoding"))
    assert bed.row("r").phase == "resuming"
    bed.wait(10.0, "api", "decode-1")
    assert bed.only(Check) == Check("r", 1)
    bed.wait(11.0, "api", "decode-1")
    assert bed.only(Stop).status == 503
    assert bed.snapshot().active == 0


# --- silences -----------------------------------------------------------------------------------


def planned(phase: str) -> Bed:
    """A call that has reached a phase."""
    bed = Bed()
    bed.cluster("prefill", "prefill", "decode", "decode")
    bed.plan("r", LONG)
    if phase != "prefilling":
        bed.say("api", Prefilled("api", "r", 1))
    if phase == "decoding":
        bed.say("api", Started("api", "r", 1))
    assert bed.row("r").phase == phase
    return bed


EVERYBODY = ("api", "prefill-0", "prefill-1", "decode-2", "decode-3")


@pytest.mark.parametrize(
    ("phase", "limit_s"), [("prefilling", 120.0), ("loading", 120.0), ("decoding", 60.0)]
)
def test_a_silent_phase_is_asked_about_and_ended_without_an_answer(
    phase: str, limit_s: float
) -> None:
    bed = planned(phase)
    bed.wait(limit_s - 0.5, *EVERYBODY)
    assert bed.heard(Check) == []
    bed.wait(0.5, *EVERYBODY)
    assert bed.only(Check) == Check("r", 1)
    bed.wait(9.5, *EVERYBODY)
    assert len(bed.heard(Check)) == 2
    assert bed.heard(Stop) == []
    bed.wait(1.0, *EVERYBODY)
    assert bed.only(Stop).status == 503
    assert bed.row("r").phase == "gone"
    assert bed.reserved() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("phase", "limit_s", "answer", "expected"),
    [
        ("prefilling", 120.0, "prefilling", ("prefilling", 2)),
        ("prefilling", 120.0, "loading", ("loading", 1)),
        ("prefilling", 120.0, "decoding", ("decoding", 1)),
        ("loading", 120.0, "prefilling", ("prefilling", 2)),
        ("loading", 120.0, "loading", ("prefilling", 2)),
        ("loading", 120.0, "decoding", ("decoding", 1)),
        ("decoding", 60.0, "decoding", ("decoding", 1)),
        ("decoding", 60.0, "gone", ("gone", 1)),
    ],
)
def test_the_answer_to_a_check_is_believed(
    phase: str, limit_s: float, answer: CheckedPhase, expected: tuple[str, int]
) -> None:
    bed = planned(phase)
    before = bed.row("r")
    bed.wait(limit_s, *EVERYBODY)
    bed.say("api", Checked("api", "r", 1, answer))
    row = bed.row("r")
    assert (row.phase, row.attempt) == expected
    if row.attempt == 2:
        stuck = (
            (row.prefill, before.prefill) if phase == "prefilling" else (row.decode, before.decode)
        )
        assert stuck[0] != stuck[1]
    if row.phase == "decoding":
        bed.wait(59.5, *EVERYBODY)
        assert bed.heard(Check) == []
        bed.wait(0.5, *EVERYBODY)
        assert bed.heard(Check) == [Check("r", 1)]


class Stuck(Bed):
    """A call that gets nowhere on one worker, and another worker that has no room."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = "api", *self.cluster("decode", "decode")
        assert self.plan("r").decode.worker == "decode-0"
        self.fill("decode-1")
        self.say("api", Started("api", "fill-decode-1", 1))
        self.pass_by(120.0)

    def pass_by(self, elapsed_s: float) -> list[object]:
        """Time passes, and the other call is decoded; what the core said meanwhile."""
        told: Told = []
        for _ in range(round(elapsed_s / 2)):
            told += self.wait(2.0, *self.alive)
            told += self.say("api", Checked("api", "fill-decode-1", 1, "decoding"))
        return [message for _, message in told]

    def answer(self, phase: CheckedPhase) -> tuple[str, int]:
        """Phase and attempt of the call after this answer to a check."""
        self.say("api", Checked("api", "r", 1, phase))
        row = self.row("r")
        return row.phase, row.attempt


def test_a_stuck_call_stays_where_it_is_while_there_is_no_room_elsewhere() -> None:
    bed = Stuck()
    assert bed.answer("loading") == ("loading", 1)
    # It is asked about again, and served at last: that is no former attempt's affair.
    assert Check("r", 1) in bed.pass_by(12.0)
    bed.say("api", Started("api", "r", 1))
    assert (bed.row("r").phase, bed.row("r").attempt) == ("decoding", 1)
    for _ in range(4):
        assert not [each for each in bed.pass_by(62.0) if isinstance(each, Stop)]
        assert bed.answer("decoding") == ("decoding", 1)


def test_a_stuck_call_goes_where_room_becomes_free() -> None:
    bed = Stuck()
    assert bed.answer("loading") == ("loading", 1)
    bed.say("api", Finished("api", "fill-decode-1", 1, "stop", 3))
    bed.pass_by(12.0)
    assert bed.answer("loading") == ("loading", 2)
    assert (bed.only(Plan).attempt, bed.only(Plan).decode.worker) == (2, "decode-1")
    assert bed.reserved() == [0, 4]


def test_a_stuck_call_does_not_hold_its_room_for_ever() -> None:
    bed = Stuck()
    for _ in range(10):
        assert bed.answer("loading") == ("loading", 1)
        bed.pass_by(12.0)
    assert bed.answer("loading") == ("queued", 2)
    (stop,) = (each for each in bed.pass_by(122.0) if isinstance(each, Stop))
    assert (stop.request, stop.status, stop.attempt) == ("r", 503, 2)


def test_an_answer_that_nobody_asked_for_ends_no_attempt() -> None:
    bed = planned("prefilling")
    bed.say("api", Checked("api", "r", 1, "prefilling"))
    assert (bed.row("r").phase, bed.row("r").attempt) == ("prefilling", 1)


def test_asking_for_the_plan_again_answers_a_check() -> None:
    bed = planned("prefilling")
    bed.wait(120.0, *EVERYBODY)
    bed.submit("r", LONG)
    assert bed.only(Plan).attempt == 1
    bed.wait(20.0, *EVERYBODY)
    assert bed.told == []


def test_no_call_outlives_its_deadline() -> None:
    bed = Bed()
    (worker,) = bed.cluster("decode")
    bed.plan("short", deadline_s=20.0)
    bed.say("api", Started("api", "short", 1))
    bed.wait(19.5, "api", worker)
    assert bed.heard(Stop) == []
    bed.wait(0.5, "api", worker)
    assert (bed.only(Stop).request, bed.only(Stop).status) == ("short", 504)
    assert bed.reserved() == [0]


def test_a_deadline_in_the_queue_is_a_rejection() -> None:
    bed = Bed()
    bed.api()
    bed.submit("r", deadline_s=5.0)
    bed.wait(5.0, "api")
    assert bed.only(Rejected).status == 504


def test_no_call_lives_longer_than_the_cluster_allows() -> None:
    bed = Bed(msgspec.structs.replace(LIMITS, call_s=30.0))
    (worker,) = bed.cluster("decode")
    bed.plan("r", deadline_s=1000.0)
    bed.say("api", Started("api", "r", 1))
    bed.wait(30.0, "api", worker)
    assert bed.only(Stop).status == 504


# --- ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "phase"),
    [
        ("stop", "finished"),
        ("length", "finished"),
        ("abort", "cancelled"),
        ("error", "failed"),
        ("gone", "gone"),
    ],
)
@pytest.mark.parametrize("started", [False, True])
def test_every_outcome_frees_everything(outcome: str, phase: str, started: bool) -> None:
    bed = Bed()
    bed.cluster("decode")
    bed.plan("r")
    if started:
        bed.say("api", Started("api", "r", 1))
    bed.say("api", Finished("api", "r", 1, outcome))
    assert bed.row("r").phase == phase
    assert bed.reserved() == [0]


def test_a_client_may_leave_while_its_call_waits() -> None:
    bed = Bed()
    bed.cluster("decode")
    bed.fill("decode-0")
    bed.submit("r", LONG)
    bed.say("api", Finished("api", "r", 1, "abort"))
    assert bed.snapshot().queued == 0


def test_a_snapshot_shows_who_speaks_and_what_happened() -> None:
    bed = Bed(msgspec.structs.replace(LIMITS, recent_calls=2))
    bed.cluster("decode")
    context = CallContext("flow", "run", "planner")
    for number in range(3):
        bed.plan(f"r{number}", context=context)
        bed.say("api", Finished("api", f"r{number}", 1, "stop"))
    bed.plan("live", context=context)
    told = bed.say("anyone", Inspect(7))
    (peer, snapshot) = told[0]
    assert peer == "anyone"
    assert isinstance(snapshot, Snapshot)
    assert (snapshot.token, snapshot.active, snapshot.queue_limit) == (7, 1, 3)
    assert [row.request for row in snapshot.calls] == ["r1", "r2", "live"]
    assert {row.context for row in snapshot.calls} == {context}
    assert snapshot.model == "model"
    assert snapshot.counters["calls_finished"] == 3

"""How a worker turns, step by step, against a real core; and what is refused."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.core import Core
from coordinator.limits import Limits, Placement, Rebalance
from coordinator.protocol import (
    DrainWorker,
    EngineFacts,
    Finished,
    Hello,
    Message,
    Plan,
    Probe,
    Probed,
    ProbeFinished,
    ProbeRead,
    Ready,
    Role,
    RoleSet,
    SetRebalance,
    SetRole,
    ShowRebalance,
    Started,
    Submit,
    TurnWorker,
    WorkflowAnswer,
)
from coordinator.rebalancer import Shown
from coordinator.state import WorkerPhase

FACTS = EngineFacts("0.32", "model", "same", 4, 40_000, 20_000, 64, 64)
HARD = Placement(prefill_workers_decode=False, remote_prefill_min_tokens=1)
ROLES: dict[str, Role] = {"p": "prefill", "d": "decode", "e": "decode"}


class Cluster:
    """Workers that answer at once, unless they are told to be silent."""

    def __init__(self, placement: Placement = HARD, roles: dict[str, Role] = ROLES) -> None:
        self.core = Core(Limits(beats_missed=1000, beat_s=100.0), placement, "core")
        self.now_s = 0.0
        self.sent: list[tuple[str, Message]] = []
        self.silent: set[type] = set()
        self.say("api", Hello("api"))
        for name, role in roles.items():
            self.say(name, Ready(name, "1", role, f"tcp://{name}", FACTS))
        self.core.check()

    def say(self, peer: str, message: object) -> None:
        """Deliver, and let workers answer whatever comes of it."""
        self._answer(self.core.handle(peer.encode(), message, self.now_s))  # type: ignore[arg-type]

    def wait(self, elapsed_s: float) -> None:
        self.now_s += elapsed_s
        self._answer(self.core.tick(self.now_s))

    def _answer(self, sends: list[object]) -> None:
        for send in sends:
            peer, message = send.peer.decode(), send.message  # type: ignore[attr-defined]
            self.sent.append((peer, message))
            if type(message) in self.silent:
                continue
            match message:
                case Probe():
                    self.say(peer, Probed(peer, "1", message.probe, b"handle"))
                case ProbeRead():
                    self.say(peer, ProbeFinished(peer, "1", message.probe, 0.1, 8))
                case SetRole():
                    self.say(peer, RoleSet(peer, "1", message.turn))
                case _:
                    pass
        self.core.check()

    def ask(self, question: object) -> WorkflowAnswer:
        self.say("operator", question)
        answers = [each for peer, each in self.sent if peer == "operator"]
        assert isinstance(answers[-1], WorkflowAnswer)
        return answers[-1]

    def shown(self) -> Shown:
        return msgspec.json.decode(self.ask(ShowRebalance(1)).body, type=Shown)

    def plan(self, request: str) -> Plan:
        self.say("api", Submit("api", request, 1, 40, 50))
        plans = [each for _, each in self.sent if isinstance(each, Plan)]
        assert plans[-1].request == request
        return plans[-1]

    def roles(self) -> dict[str, str]:
        return {one.worker: one.role for one in self.shown().workers}

    def turning(self, name: str) -> str:
        return next(one.turning for one in self.shown().workers if one.worker == name)


def test_an_idle_worker_turns_at_once_and_a_canary_goes_through_it() -> None:
    cluster = Cluster()
    answer = cluster.ask(TurnWorker(1, "d", "prefill"))
    assert answer.status == 200
    assert cluster.roles() == {"p": "prefill", "d": "prefill", "e": "decode"}
    assert cluster.turning("d") == ""
    told = [(peer, each.role) for peer, each in cluster.sent if isinstance(each, SetRole)]
    assert told == [("d", "prefill")]
    canary = [peer for peer, each in cluster.sent if isinstance(each, Probe | ProbeRead)][-2:]
    assert canary == ["d", "e"]
    assert [one.what for one in cluster.shown().decisions] == ["done"]
    assert cluster.core.counters["role_flips"] == 1


def test_a_busy_worker_ends_its_answers_first_and_gets_no_new_ones() -> None:
    cluster = Cluster()
    first = cluster.plan("a")
    busy = first.decode.worker
    cluster.say("api", Started("api", "a", 1))
    cluster.ask(TurnWorker(1, busy, "prefill"))
    assert cluster.turning(busy) == "draining"
    assert not [each for _, each in cluster.sent if isinstance(each, SetRole)]
    for number in range(4):
        assert cluster.plan(f"b{number}").decode.worker != busy
    cluster.say("api", Finished("api", "a", 1, "stop", 10))
    assert cluster.turning(busy) == ""
    assert cluster.roles()[busy] == "prefill"


def test_while_it_switches_it_gets_nothing_at_all() -> None:
    cluster = Cluster(roles={**ROLES, "q": "prefill"})
    cluster.silent = {SetRole}
    cluster.ask(TurnWorker(1, "q", "decode"))
    assert cluster.turning("q") == "switching"
    for number in range(4):
        plan = cluster.plan(f"b{number}")
        assert "q" not in (plan.decode.worker, plan.prefill.worker if plan.prefill else "")
    number = next(each.turn for _, each in cluster.sent if isinstance(each, SetRole))
    cluster.say("q", RoleSet("q", "1", number + 7))
    assert cluster.turning("q") == "switching"
    cluster.say("q", RoleSet("q", "1", number))
    assert cluster.turning("q") == ""
    assert cluster.roles()["q"] == "decode"


@pytest.mark.parametrize("silent", [SetRole, Probe, ProbeRead])
def test_what_does_not_answer_gets_its_old_role_back(silent: type) -> None:
    cluster = Cluster()
    cluster.silent = {silent}
    cluster.ask(TurnWorker(1, "d", "prefill"))
    for _ in range(Rebalance().tries):
        assert cluster.turning("d") in ("switching", "verifying")
        cluster.wait(Rebalance().step_s)
    assert cluster.turning("d") == ""
    assert cluster.roles() == dict(ROLES)
    assert cluster.core.counters["turns_undone"] == 1
    assert cluster.shown().decisions[-1].what == "undone"


def test_an_engine_that_cannot_says_so() -> None:
    cluster = Cluster()
    cluster.silent = {SetRole}
    cluster.ask(TurnWorker(1, "d", "prefill"))
    number = next(each.turn for _, each in cluster.sent if isinstance(each, SetRole))
    cluster.say("d", RoleSet("d", "1", number, "no chunks here"))
    assert cluster.roles() == dict(ROLES)
    assert cluster.shown().decisions[-1].reason == "no chunks here"


def test_a_worker_that_is_lost_while_it_turns_begins_anew() -> None:
    cluster = Cluster()
    cluster.silent = {SetRole}
    cluster.ask(TurnWorker(1, "d", "prefill"))
    cluster.silent = set()
    cluster.say("d", Ready("d", "2", "decode", "tcp://d", FACTS))
    assert cluster.roles() == dict(ROLES)
    assert cluster.turning("d") == ""
    assert cluster.shown().decisions[-1].what == "lost"


def test_a_drain_is_undone_of_a_worker_that_is_not_well_just_then() -> None:
    cluster = Cluster()
    assert cluster.ask(DrainWorker(1, "d")).status == 200
    cluster.core._state.workers["d"].move(WorkerPhase.SUSPECT, cluster.now_s, "silent")
    assert cluster.ask(DrainWorker(1, "d", undo=True)).status == 200
    assert cluster.turning("d") == ""


def test_a_drained_worker_gets_nothing_until_that_is_undone() -> None:
    cluster = Cluster()
    busy = cluster.plan("a").decode.worker
    cluster.say("api", Started("api", "a", 1))
    assert cluster.ask(DrainWorker(1, busy)).status == 200
    assert cluster.ask(DrainWorker(1, busy)).status == 200
    assert cluster.turning(busy) == "draining"
    assert cluster.plan("b").decode.worker != busy
    cluster.say("api", Finished("api", "a", 1, "stop", 10))
    assert cluster.turning(busy) == "drained"
    assert cluster.plan("c").decode.worker != busy
    cluster.ask(DrainWorker(1, busy, undo=True))
    assert cluster.turning(busy) == ""


@pytest.mark.parametrize(
    ("question", "status", "reason"),
    [
        (TurnWorker(1, "nobody", "decode"), 404, "no worker 'nobody'"),
        (DrainWorker(1, "nobody"), 404, "no worker"),
        (TurnWorker(1, "p", "decode"), 409, "no worker left for prefill"),
        (DrainWorker(1, "p"), 409, "no worker left for prefill"),
        (TurnWorker(1, "d", "mixed"), 409, "does not turn to mixed"),
        (TurnWorker(1, "d", "cook"), 422, "must be prefill or decode"),
        (SetRebalance(1, b'{"mode":"fast"}'), 422, "fast"),
        (SetRebalance(1, b'{"speed":1}'), 422, "speed"),
        (SetRebalance(1, b'{"dwell_s":-1}'), 422, "dwell_s"),
        (SetRebalance(1, b"\xff"), 422, ""),
        (SetRebalance(1, b"[" * 100_000), 422, ""),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(
    question: object, status: int, reason: str
) -> None:
    cluster = Cluster()
    answer = cluster.ask(question)
    assert answer.status == status
    assert reason in answer.problems[0]
    assert cluster.roles() == dict(ROLES)


def test_a_second_wish_during_a_turn_is_refused_and_the_same_one_is_not() -> None:
    cluster = Cluster(roles={**ROLES, "f": "decode"})
    cluster.silent = {SetRole}
    assert cluster.ask(TurnWorker(1, "d", "prefill")).status == 200
    assert cluster.ask(TurnWorker(2, "d", "prefill")).status == 200
    back = cluster.ask(TurnWorker(3, "d", "decode"))
    assert (back.status, back.problems) == (409, ["d is switching already"])
    assert cluster.ask(DrainWorker(4, "d")).status == 409


def test_a_fixed_worker_stays() -> None:
    cluster = Cluster()
    cluster.say("f", Ready("f", "1", "decode", "tcp://f", FACTS, fixed=True))
    answer = cluster.ask(TurnWorker(1, "f", "prefill"))
    assert (answer.status, answer.problems) == (409, ["the role of f is fixed"])


def test_two_who_turn_workers_are_one_too_many() -> None:
    reactive = msgspec.convert({"ratio": {"mode": "reactive"}}, Placement)
    assert Cluster(reactive).ask(SetRebalance(1, b'{"mode":"auto"}')).status == 409


def test_advice_is_given_and_not_taken() -> None:
    placement = msgspec.structs.replace(HARD, rebalance=Rebalance(mode="advisory"))
    roles: dict[str, Role] = {"p": "prefill", **{f"d{number}": "decode" for number in range(5)}}
    cluster = Cluster(placement, roles)
    for number in range(60):
        cluster.say("api", Submit("api", f"r{number}", 1, 8_000, 4, bytes([number]) * 8))
    for _ in range(4):
        cluster.wait(2.0)
    decisions = cluster.shown().decisions
    assert [one.what for one in decisions] == ["advice"]
    assert set(decisions[0].turns.values()) == {"prefill"}
    assert cluster.roles() == roles


def test_in_auto_the_same_advice_is_taken() -> None:
    placement = msgspec.structs.replace(HARD, rebalance=Rebalance(mode="auto"))
    roles: dict[str, Role] = {"p": "prefill", **{f"d{number}": "decode" for number in range(5)}}
    cluster = Cluster(placement, roles)
    for number in range(60):
        cluster.say("api", Submit("api", f"r{number}", 1, 8_000, 4, bytes([number]) * 8))
    for _ in range(4):
        cluster.wait(2.0)
    assert list(cluster.roles().values()).count("prefill") > 1
    assert cluster.shown().decisions[0].by == "policy"

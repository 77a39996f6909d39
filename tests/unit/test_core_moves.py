"""Running calls that are to go on elsewhere, as the core sees them: room, bounds, losses."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.explaining import PLANS_MOST
from coordinator.limits import Limits
from coordinator.moves import AGAIN_S
from coordinator.protocol import (
    Check,
    Checked,
    Draining,
    DrainWorker,
    Failed,
    Finished,
    Leaving,
    Move,
    MoveCalls,
    MoveDeclined,
    MoveReady,
    Placed,
    Plan,
    Rejected,
    Role,
    ShowCall,
    Started,
    Stop,
    ToCore,
    WorkflowAnswer,
)
from tests.unit.test_core import LIMITS, LONG, Bed, Told, ready

OUTPUT_TOKENS = 32
BLOCKS = (LONG + OUTPUT_TOKENS) // 16


class MoveBed(Bed):
    """A core with a call that decodes on one of two workers."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        super().__init__(limits)
        self.cluster("decode", "decode")
        self.source = self.running("r")
        self.target = {"decode-0": "decode-1", "decode-1": "decode-0"}[self.source]

    def running(self, request: str) -> str:
        """A call that decodes, and where."""
        plan = self.plan(request, LONG)
        self.say("api", Started("api", request, 1))
        return plan.decode.worker

    def move(self, worker: str = "", **more: str) -> dict[str, int]:
        """What comes of asking for it."""
        self.say("operator", MoveCalls(1, worker or self.source, **more))
        answer: dict[str, int] = msgspec.json.decode(self.only(WorkflowAnswer).body)
        return answer

    def ordered(self) -> Move:
        """A move that is under way."""
        assert self.move() == {"moving": 1, "staying": 0}
        return self.only(Move)

    def held(self) -> dict[str, int]:
        return {row.worker: row.kv_blocks_reserved for row in self.snapshot().workers}

    def is_at_rest(self) -> bool:
        """Only the call itself holds anything, where it was."""
        return self.held() == {self.source: BLOCKS, self.target: 0}


@pytest.fixture
def bed() -> MoveBed:
    return MoveBed()


def ready_for(order: Move, tokens: int = LONG, generated: int = 4, **more: int) -> MoveReady:
    message = MoveReady(
        "api", order.request, order.attempt, order.number, tokens, generated, tokens // 2
    )
    return msgspec.structs.replace(message, **more)


def test_a_running_call_goes_on_where_its_kv_was_brought(bed: MoveBed) -> None:
    order = bed.ordered()
    assert (order.request, order.attempt, order.target) == ("r", 1, Placed(bed.target, "1"))
    assert bed.row("r").phase == "decoding"
    assert bed.held() == {bed.source: BLOCKS, bed.target: BLOCKS}
    bed.say("api", ready_for(order))
    plan = bed.only(Plan)
    assert (plan.attempt, plan.decode, plan.prefill) == (2, Placed(bed.target, "1"), None)
    assert bed.row("r").phase == "loading"
    assert bed.held() == {bed.source: 0, bed.target: BLOCKS}
    bed.say("api", Started("api", "r", 2))
    assert bed.row("r").phase == "decoding"
    bed.say("api", Finished("api", "r", 2, "length", OUTPUT_TOKENS))
    assert set(bed.held().values()) == {0}
    counters = bed.core.counters
    assert (counters["moves_begun"], counters["moves_made"], counters["moves_undone"]) == (1, 1, 0)
    assert counters["move_tokens"] == LONG // 2
    assert counters["replans"] == 0


def test_it_may_be_moved_as_often_as_wanted(bed: MoveBed) -> None:
    for attempt in range(1, 2 * LIMITS.attempts):
        order = bed.ordered()
        bed.say("api", ready_for(order))
        assert bed.only(Plan).attempt == attempt + 1
        bed.say("api", Started("api", "r", attempt + 1))
        bed.source, bed.target = bed.target, bed.source


def test_a_plan_that_was_not_seen_is_sent_again(bed: MoveBed) -> None:
    order = bed.ordered()
    bed.say("api", ready_for(order))
    plan = bed.only(Plan)
    bed.say("api", ready_for(order))
    assert bed.only(Plan) == plan
    bed.say("api", MoveDeclined("api", "r", 1, order.number, "it took too long"))
    assert bed.only(Plan) == plan
    bed.say("api", Started("api", "r", 2))
    bed.say("api", ready_for(order))
    assert bed.told == []


def test_a_call_that_ends_before_it_sees_the_plan_has_ended(bed: MoveBed) -> None:
    bed.say("api", ready_for(bed.ordered()))
    bed.say("api", Finished("api", "r", 1, "stop", 6))
    assert bed.row("r").phase == "finished"
    assert set(bed.held().values()) == {0}
    assert bed.core.counters["calls_finished"] == 1


def test_a_source_that_is_lost_before_the_plan_is_seen_changes_nothing(bed: MoveBed) -> None:
    bed.say("api", ready_for(bed.ordered()))
    plan = bed.only(Plan)
    bed.say(bed.source, Leaving(bed.source, "1"))
    bed.say("api", Failed("api", "r", 1, bed.source, "lost", 6))
    assert bed.only(Plan) == plan
    assert bed.row("r").phase == "loading"


def test_a_call_that_is_declined_stays_and_is_left_alone_for_a_while(bed: MoveBed) -> None:
    order = bed.ordered()
    bed.say("api", MoveDeclined("api", "r", 1, order.number, "not now"))
    assert bed.is_at_rest()
    assert bed.move() == {"moving": 0, "staying": 1}
    bed.wait(AGAIN_S + 0.5, "api", bed.source, bed.target)
    assert bed.move() == {"moving": 1, "staying": 0}


def test_a_call_that_can_go_on_nowhere_else_is_not_asked_for_again(bed: MoveBed) -> None:
    order = bed.ordered()
    bed.say("api", MoveDeclined("api", "r", 1, order.number, "a grammar", for_good=True))
    bed.wait(AGAIN_S + 0.5, "api", bed.source, bed.target)
    assert bed.move() == {"moving": 0, "staying": 1}
    assert bed.is_at_rest()


def test_a_lost_target_gives_back_nothing_but_its_own(bed: MoveBed) -> None:
    order = bed.ordered()
    bed.say(bed.target, Leaving(bed.target, "1"))
    assert bed.row("r").phase == "decoding"
    assert bed.held() == {bed.source: BLOCKS}
    bed.say("api", ready_for(order))
    assert bed.heard(Plan) == []
    assert bed.core.counters["moves_undone"] == 1


def test_a_lost_source_makes_it_a_call_that_has_to_go_on_elsewhere(bed: MoveBed) -> None:
    order = bed.ordered()
    bed.say(bed.source, Leaving(bed.source, "1"))
    assert bed.row("r").phase == "resuming"
    assert bed.held() == {bed.target: 0}
    bed.say("api", ready_for(order))
    assert bed.heard(Plan) == []
    bed.say("api", Failed("api", "r", 1, bed.source, "lost", 6))
    assert bed.only(Plan).decode.worker == bed.target


def test_a_target_that_is_lost_after_the_plan_is_replaced(bed: MoveBed) -> None:
    bed.say("api", ready_for(bed.ordered()))
    bed.say(bed.target, Leaving(bed.target, "1"))
    plan = bed.only(Plan)
    assert (plan.attempt, plan.decode.worker) == (3, bed.source)


def test_a_target_that_can_not_after_all_is_replaced(bed: MoveBed) -> None:
    bed.say("api", ready_for(bed.ordered()))
    bed.say("api", Failed("api", "r", 2, bed.target, "no", 6))
    plan = bed.only(Plan)
    assert (plan.attempt, plan.decode.worker) == (3, bed.source)


def test_a_lost_api_process_leaves_nothing(bed: MoveBed) -> None:
    bed.ordered()
    bed.wait(7.0, bed.source, bed.target)
    assert set(bed.held().values()) == {0}
    assert bed.row("r").phase == "gone"


def test_an_api_process_that_says_nothing_of_it_has_its_call_where_it_was(bed: MoveBed) -> None:
    order = bed.ordered()
    bed.wait(LIMITS.move_s + LIMITS.check_s + 1.0, "api", bed.source, bed.target)
    assert bed.is_at_rest()
    bed.say("api", ready_for(order))
    assert bed.heard(Plan) == []


def test_a_plan_that_gets_nowhere_is_asked_about(bed: MoveBed) -> None:
    bed.say("api", ready_for(bed.ordered()))
    plan = bed.only(Plan)
    bed.wait(LIMITS.first_token_s + 0.5, "api", bed.source, bed.target)
    assert Check("r", 2) in bed.heard(Check)
    # It has never heard of it and goes on where it was.
    bed.say("api", Checked("api", "r", 1, "decoding"))
    assert bed.only(Plan) == plan


@pytest.mark.parametrize(
    "message",
    [
        Finished("api", "r", 1, "stop", 5),
        Finished("api", "r", 1, "abort"),
        Failed("api", "r", 1, "decode-0", "error", 5),
        Checked("api", "r", 1, "gone"),
    ],
)
def test_whatever_happens_to_the_call_ends_its_move(bed: MoveBed, message: ToCore) -> None:
    order = bed.ordered()
    bed.say("api", message)
    before = bed.held()
    bed.say("api", ready_for(order))
    assert bed.heard(Rejected) == bed.heard(Stop) == []
    assert bed.held() == before
    assert bed.core.counters["moves_undone"] == 1
    assert bed.core.counters["moves_made"] == 0


def test_only_the_order_that_is_under_way_counts(bed: MoveBed) -> None:
    order = bed.ordered()
    for number in (0, order.number - 1, order.number + 1):
        bed.say("api", ready_for(order, number=number))
        assert bed.told == []
        bed.say("api", MoveDeclined("api", "r", 1, number, "no"))
    assert bed.held()[bed.target] == BLOCKS


@pytest.mark.parametrize("tokens", [-1, 10**9])
@pytest.mark.parametrize("generated", [-1, 10**9])
def test_whatever_an_api_process_says_adds_up(bed: MoveBed, tokens: int, generated: int) -> None:
    bed.say("api", ready_for(bed.ordered(), tokens, generated))
    bed.say("api", Started("api", "r", 2))
    bed.say("api", Finished("api", "r", 2, "stop", 8))
    assert set(bed.held().values()) == {0}


# --- who is moved where -------------------------------------------------------------------


def test_a_call_without_a_token_is_not_moved(bed: MoveBed) -> None:
    plan = bed.plan("s", LONG)
    assert bed.move(plan.decode.worker, request="s") == {"moving": 0, "staying": 1}


def test_a_request_and_a_target_may_be_named(bed: MoveBed) -> None:
    assert bed.move(request="other") == {"moving": 0, "staying": 0}
    assert bed.move(target=bed.source) == {"moving": 0, "staying": 1}
    assert bed.move(target="nobody") == {"moving": 0, "staying": 1}
    assert bed.move(request="r", target=bed.target) == {"moving": 1, "staying": 0}


def test_an_unknown_worker_has_no_calls(bed: MoveBed) -> None:
    bed.say("operator", MoveCalls(7, "nobody"))
    answer = bed.only(WorkflowAnswer)
    assert (answer.token, answer.status) == (7, 404)


def test_only_so_many_calls_are_moved_at_a_time() -> None:
    bed = MoveBed(msgspec.structs.replace(LIMITS, moves_per_worker=1))
    running = [request for request in ("s", "t") if bed.running(request) == bed.source]
    assert running
    assert bed.move() == {"moving": 1, "staying": len(running)}


def test_a_full_worker_takes_no_call(bed: MoveBed) -> None:
    bed.fill(bed.target)
    assert bed.move() == {"moving": 0, "staying": 1}
    assert bed.heard(Move) == []


def test_a_worker_that_does_not_know_the_source_takes_no_call() -> None:
    bed = MoveBed()
    bed.worker("stranger", "decode")
    bed.say(bed.target, Leaving(bed.target, "1"))
    assert bed.move() == {"moving": 0, "staying": 1}


def test_a_prefill_worker_takes_no_call() -> None:
    bed = Bed()
    bed.cluster("prefill", "decode")
    bed.plan("r")
    bed.say("api", Started("api", "r", 1))
    bed.say("operator", MoveCalls(1, "decode-1"))
    assert bed.heard(Move) == []


def test_engines_whose_kv_can_not_be_read_in_part_exchange_no_calls() -> None:
    class WholeBed(MoveBed):
        def worker(self, name: str, role: Role = "decode", incarnation: str = "1") -> Told:
            return self.say(name, ready(name, role, incarnation, partial_reads=False))

    assert WholeBed().move() == {"moving": 0, "staying": 1}


def test_a_call_that_is_moved_has_not_waited_again(bed: MoveBed) -> None:
    bed.wait(3.0, "api", bed.source, bed.target)
    for attempt in range(1, 3 * PLANS_MOST):
        order = bed.ordered()
        bed.say("api", ready_for(order))
        bed.say("api", Started("api", "r", attempt + 1))
        bed.source, bed.target = bed.target, bed.source
    bed.say("operator", ShowCall(1, "r"))
    plans = msgspec.json.decode(bed.only(WorkflowAnswer).body)["plans"]
    assert len(plans) == PLANS_MOST
    assert plans[0]["attempt"] == 1
    assert plans[-1]["attempt"] == 3 * PLANS_MOST
    assert all(plan["turn"] is None for plan in plans[1:])


def test_a_drain_moves_what_it_can(bed: MoveBed) -> None:
    bed.say("operator", DrainWorker(1, bed.source))
    order = bed.only(Move)
    assert order.target.worker == bed.target
    bed.say("api", ready_for(order))
    assert bed.status(bed.source).turning == "drained"
    assert bed.row("r").phase == "loading"


def test_a_worker_that_will_leave_ends_sooner(bed: MoveBed) -> None:
    bed.say(bed.source, Draining(bed.source, "1"))
    order = bed.only(Move)
    # It says so again, until it leaves.
    bed.say(bed.source, Draining(bed.source, "1"))
    assert bed.heard(Move) == []
    bed.say("api", ready_for(order))
    assert bed.only(Plan).decode.worker == bed.target
    assert bed.held()[bed.source] == 0


def test_nothing_comes_to_a_worker_that_is_drained_meanwhile(bed: MoveBed) -> None:
    order = bed.ordered()
    bed.say("operator", DrainWorker(1, bed.target))
    bed.say("api", ready_for(order))
    assert bed.heard(Plan) == []
    assert bed.is_at_rest()

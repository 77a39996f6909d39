"""Policies within the core: turns, sessions, roles that change, a placer from outside."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import msgspec
import pytest

from coordinator.core import Core
from coordinator.limits import Limits, Ratio
from coordinator.policy.placement import Ask, Choice, Decision, Wait
from coordinator.policy.queue import Rank
from coordinator.protocol import (
    Beat,
    CallContext,
    Finished,
    Hello,
    Load,
    Prefilled,
    Started,
    Welcome,
    WorkerUp,
)
from coordinator.state import Call, Worker
from tests.unit.test_core import LIMITS, LONG, PLACEMENT, Bed


def bed(limits: Limits = LIMITS, **placement: object) -> Bed:
    """A core with another placement."""
    made = Bed(limits)
    made.core = Core(limits, msgspec.structs.replace(PLACEMENT, **placement), "core")
    return made


def finish(made: Bed, request: str) -> None:
    made.say("api", Started("api", request, 1))
    made.say("api", Finished("api", request, 1, "stop", 4))


def run(name: str) -> CallContext:
    return CallContext(workflow="w", run=name)


# --- prompts that are being computed ---------------------------------------------------------


def shared(made: Bed, request: str, own: int = 0) -> str:
    """Who computes the prompt of a call: 20 blocks like the others' and ``own`` ones behind."""
    blocks = [*range(1, 21), *(1000 * len(request) + number for number in range(own))]
    hashes = b"".join(block.to_bytes(8, "little") for block in blocks)
    plan = made.plan(request, 16 * len(blocks), block_hashes=hashes)
    assert plan.prefill is not None
    return plan.prefill.worker


def test_a_prefix_that_is_being_computed_is_computed_once() -> None:
    made = bed()
    made.cluster("prefill", "prefill", "decode")
    assert made.plan("other", 320).prefill.worker == "prefill-0"  # type: ignore[union-attr]
    assert shared(made, "c1") == "prefill-1"
    made.say("api", Prefilled("api", "other", 1))
    assert shared(made, "c2", 1) == "prefill-1"
    made.say("api", Prefilled("api", "c1", 1))
    assert shared(made, "c3", 1) == "prefill-1"


def test_nobody_waits_for_a_prefix_that_was_given_up() -> None:
    made = bed()
    made.cluster("prefill", "prefill", "decode")
    made.plan("other", 320)
    assert shared(made, "c1") == "prefill-1"
    made.say("api", Prefilled("api", "other", 1))
    made.say("api", Finished("api", "c1", 1, "abort", 0))
    assert shared(made, "c2", 1) == "prefill-0"


def test_what_was_there_before_a_promise_stays_when_it_is_broken() -> None:
    made = bed()
    made.cluster("prefill", "prefill", "decode", "decode")
    made.plan("other", 320)
    assert shared(made, "c1") == "prefill-1"
    for message in (Prefilled("api", "other", 1), Prefilled("api", "c1", 1)):
        made.say("api", message)
    assert shared(made, "c2", 1) == "prefill-1"
    made.say("api", Finished("api", "c2", 1, "abort", 0))
    assert shared(made, "c3", 1) == "prefill-1"


def test_without_single_flight_a_prefix_counts_when_it_is_computed() -> None:
    made = bed(single_flight=False)
    made.cluster("prefill", "prefill", "decode")
    made.plan("other", 320)
    assert shared(made, "c1") == "prefill-1"
    made.say("api", Prefilled("api", "other", 1))
    assert shared(made, "c2", 1) == "prefill-0"


# --- turns and sessions -----------------------------------------------------------------------


def test_consecutive_calls_have_consecutive_turns_and_another_attempt_the_next_one() -> None:
    made = bed(policy="round_robin", disaggregated="never")
    names = made.cluster("mixed", "mixed", "mixed")
    planned = [made.plan(f"c{number}").decode.worker for number in range(4)]
    assert planned == [names[number % 3] for number in range(4)]


def test_a_session_is_an_agent_of_a_run_that_follows_itself() -> None:
    made = bed(policy="cache_aware", sticky=True)
    made.cluster("decode", "decode")

    def goes_to(request: str, agent: str, parent: str) -> str:
        context = CallContext("w", "1", agent, parent)
        worker = made.plan(request, context=context, block_hashes=b"").decode.worker
        finish(made, request)
        return worker

    made.plan("other", aggregated=True)
    assert goes_to("a", "coder", "planner") == "decode-1"
    finish(made, "other")
    assert goes_to("b", "coder", "coder") == "decode-1"
    # Another that works in parallel, the answer of one that was called, another agent.
    assert goes_to("c", "coder", "") == "decode-0"
    assert goes_to("d", "reviewer", "coder") == "decode-0"
    assert goes_to("e", "reviewer", "reviewer") == "decode-0"


def test_a_run_is_remembered_by_workflow_and_run() -> None:
    made = bed(policy="cache_aware", sticky=True)
    made.cluster("decode", "decode")
    # The first worker is taken by another call, so the run begins on the second.
    assert made.plan("other", aggregated=True).decode.worker == "decode-0"
    assert made.plan("a", context=run("1"), block_hashes=b"").decode.worker == "decode-1"
    finish(made, "other")
    finish(made, "a")
    assert made.plan("b", context=run("1"), block_hashes=b"").decode.worker == "decode-1"
    assert made.plan("c", context=run("2"), block_hashes=b"").decode.worker == "decode-0"
    finish(made, "b")
    finish(made, "c")
    nobody = CallContext(workflow="w")
    assert made.plan("d", context=nobody, block_hashes=b"").decode.worker == "decode-0"


def test_only_so_many_runs_are_remembered_the_latest_ones() -> None:
    made = bed(msgspec.structs.replace(LIMITS, sessions=2), policy="cache_aware", sticky=True)
    made.cluster("decode", "decode")
    for number, name in enumerate(("1", "2", "1", "3")):
        made.plan(f"c{number}", context=run(name), block_hashes=b"")
        finish(made, f"c{number}")
    made.fill("decode-0")
    plan = made.plan("d", context=run("2"), block_hashes=b"")
    assert plan.decode.worker == "decode-1"
    finish(made, "d")
    finish(made, "fill-decode-0")
    # Runs 3 and 2 are remembered; 2 went to the other worker at last.
    assert made.plan("e", context=run("2"), block_hashes=b"").decode.worker == "decode-1"
    assert made.plan("f", context=run("1"), block_hashes=b"").decode.worker == "decode-0"


def test_siblings_may_be_told_apart() -> None:
    together, apart = bed(), bed(siblings_together=False)
    for made in (together, apart):
        made.cluster("decode", "decode")
    hashes = {"block_hashes": b"", "group": "g"}
    for made, second in ((together, "decode-0"), (apart, "decode-1")):
        assert made.plan("a", **hashes).decode.worker == "decode-0"
        assert made.plan("b", **hashes).decode.worker == second


def test_unreserved_calls_may_fill_a_worker_beyond_its_memory() -> None:
    made = bed(reserve=False)
    made.cluster("decode")
    for number in range(3):
        assert made.plan(f"c{number}", 1400).decode.worker == "decode-0"
    assert made.status("decode-0").kv_blocks_reserved == 87 + 3 * 3


# --- roles ------------------------------------------------------------------------------------

RATIO = Ratio(
    mode="reactive",
    interval_s=1.0,
    looks=2,
    dwell_s=5.0,
    prefill_tokens_high=LONG,
    decode_kv_high=0.9,
)


def who_turned(made: Bed) -> str:
    """The one worker that prefills now and was not started for it."""
    prefilling = [row.worker for row in made.snapshot().workers if row.role == "prefill"]
    (turned,) = [name for name in prefilling if name != "prefill-0"]
    return turned


def overloaded() -> tuple[Bed, list[str]]:
    """One prefill worker with a prompt to compute, and three decode workers."""
    made = bed(ratio=RATIO)
    names = made.cluster("prefill", "decode", "decode", "decode")
    assert made.plan("a", LONG).prefill is not None
    return made, names


def test_a_backlog_turns_a_decode_worker_whose_calls_go_on() -> None:
    made, names = overloaded()
    made.plan("b", context=run("1"))
    used = {made.row("a").decode, made.row("b").decode}
    for _ in range(5):
        for name in names:
            made.say(name, Beat(name, "1", Load(kv_blocks_used=22 if name in used else 0)))
        made.wait(0.5, "api")
    turned = who_turned(made)
    assert made.core.counters["role_flips"] == 1
    assert turned not in used
    assert made.heard(WorkerUp) == []
    assert [made.row(request).phase for request in "ab"] == ["prefilling", "loading"]
    # The next long prompt is computed there, the next short one is not decoded there.
    plan = made.plan("c", LONG, block_hashes=b"")
    assert plan.prefill is not None
    assert plan.prefill.worker == turned
    assert plan.decode.worker != turned
    finish(made, "b")
    made.say("api", Prefilled("api", "a", 1))
    finish(made, "a")
    assert made.row("a").outcome == made.row("b").outcome == "stop"


def test_a_ready_that_is_sent_again_does_not_undo_a_turn() -> None:
    made, names = overloaded()
    made.wait(2.5, "api", *names)
    turned = who_turned(made)
    assert made.worker(turned, "decode") == [(turned, Welcome(1.0, "core", 16))]
    assert made.status(turned).role == "prefill"
    made.worker(turned, "decode", "2")
    assert made.status(turned).role == "decode"


def test_an_api_process_that_comes_later_hears_of_the_role_that_is() -> None:
    made, names = overloaded()
    made.wait(2.5, "api", *names)
    told = made.say("api-2", Hello("api-2"))
    roles = [message.role for _, message in told if isinstance(message, WorkerUp)]
    assert roles.count("prefill") == 2


def test_static_roles_stay() -> None:
    made = bed()
    names = made.cluster("prefill", "decode", "decode")
    made.plan("a", LONG)
    made.wait(30.0, "api", *names)
    assert made.core.counters["role_flips"] == 0
    assert [row.role for row in made.snapshot().workers] == ["decode", "decode", "prefill"]


def test_the_core_sleeps_when_nobody_is_there() -> None:
    made = bed(ratio=RATIO)
    made.worker("w")
    assert made.core.next_deadline_s() == made.now_s + RATIO.interval_s
    made.wait(30.0)
    assert made.core.next_deadline_s() is None


def test_pairs_of_a_turned_worker_become_urgent() -> None:
    """The pairs that only a new role makes useful come before all that were there before."""
    made = bed(ratio=msgspec.structs.replace(RATIO, looks=1))
    made.cluster("prefill", "decode", "decode")
    # Nobody answers the probes of these two, so nearly all their pairs are cold.
    made.worker("x")
    made.worker("y")
    assert made.plan("a", LONG).decode.worker == "decode-1"
    for name in ("decode-1", "x", "y"):
        made.say(name, Beat(name, "1", Load(running=1, kv_blocks_used=22)))
    made.wait(1.5, "api")
    assert who_turned(made) == "decode-2"
    urgent = {
        (pair.source.name, pair.target.name)
        for pair in made.core._pairs.pairs.values()
        if pair.urgent
    }
    sources, targets = ("decode-2", "prefill-0"), ("decode-1", "x", "y")
    assert urgent == {(source, target) for source in sources for target in targets}


# --- a placer from outside ----------------------------------------------------------------------


class Backwards:
    """Last come, first served; always the last worker by name, one call at a time on each."""

    def __init__(self) -> None:
        self.seen_s: list[float] = []

    def place(
        self,
        call: Call,
        ask: Ask,
        workers: Collection[Worker],
        cached: Callable[[], Mapping[str, int]],
        now_s: float,
    ) -> Decision:
        self.seen_s.append(now_s)
        assert ask.prompt_tokens == call.prompt_tokens
        free = [worker for worker in workers if not worker.prefill_tokens]
        if not free:
            return Wait("all compute")
        worker = max(free, key=lambda each: each.name)
        blocks = 1 + ask.prompt_tokens // 16
        cached_blocks = cached().get(worker.name, 0)
        return Choice(worker.name, "", blocks, 0, cached_blocks, ask.prompt_tokens, "backwards")

    def rank(self, call: Call) -> Rank:
        return call.plans == 0, 0, -call.arrival


def test_a_placer_decides_where_and_in_which_order() -> None:
    made = Bed()
    placer = Backwards()
    made.core = Core(LIMITS, PLACEMENT, "core", placer=placer)
    made.cluster("decode", "decode")
    assert made.plan("a").decode.worker == "decode-1"
    assert made.plan("b").decode.worker == "decode-0"
    assert made.submit("c") == []
    assert made.submit("d") == []
    # Its waiting ends when a prompt has been computed, though no room is given back.
    made.say("api", Started("api", "a", 1))
    (plan,) = [message for _, message in made.told]
    assert (plan.request, plan.decode.worker) == ("d", "decode-1")
    assert placer.seen_s[-1] == made.now_s


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded", "cache_aware", "cost"])
def test_every_policy_serves_a_cluster(policy: str) -> None:
    made = bed(policy=policy, sticky=True, disaggregated="always", reserve=False)
    made.cluster("prefill", "decode", "decode")
    for number in range(3):
        request = f"c{number}"
        plan = made.plan(request, context=run("1"))
        assert plan.prefill is not None
        assert plan.decode.worker.startswith("decode")
        made.say("api", Prefilled("api", request, 1))
        finish(made, request)
    assert made.reserved() == [0, 0, 0]

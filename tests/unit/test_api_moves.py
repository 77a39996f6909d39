"""A running call that is to go on elsewhere, in an API process: its client has every token once,
whatever becomes of the move, and no handle is read twice or kept."""

from __future__ import annotations

import msgspec
import pytest
from vllm.v1.engine import FinishReason

from coordinator.api.moving import READY_AGAIN_S
from coordinator.limits import Limits
from coordinator.protocol import (
    Abort,
    CallFailed,
    Decode,
    Discard,
    Failed,
    Finished,
    Message,
    Move,
    MoveDeclined,
    MoveReady,
    Placed,
    Plan,
    Prefill,
    PrefillDone,
    Started,
    move_attempt,
)
from tests.unit.calls_bench import UNIX_S, Bench
from tests.unit.recording_wire import DECODER, OTHER_DECODER, prefill_done

PROMPT = tuple(range(1, 8))
SAID = [11, 12, 13]
SIDE = move_attempt(1)
LIMITS = Limits(move_s=5.0)
ORDER = Move("r", 1, 1, OTHER_DECODER, "a drain")
NEXT = Plan("r", 2, OTHER_DECODER, None, "moved")

HOLD = (DECODER, Prefill("r", SIDE, DECODER.incarnation, cached_only=True))
READ = (OTHER_DECODER, Prefill("r", SIDE, OTHER_DECODER.incarnation, handle=b"held"))
HELD_BACK = (DECODER, Discard("r", SIDE, DECODER.incarnation, b"held"))
READ_BACK = (OTHER_DECODER, Discard("r", SIDE, OTHER_DECODER.incarnation, b"read"))
READY = MoveReady("api", "r", 1, 1, 8, 3)


def running(**params: object) -> Bench:
    """A call that is decoded and has said three tokens."""
    made = Bench(LIMITS)
    made.submit(prompt=PROMPT, max_tokens=40, **params)
    made.plan(prefill=None)
    made.tokens(SAID)
    made.forget()
    return made


@pytest.fixture
def bench() -> Bench:
    return running()


def sent(bench: Bench) -> list[tuple[Placed, Message]]:
    return [(to, message) for to, message, _ in bench.wire.take_workers()]


def order(bench: Bench, message: Move = ORDER) -> None:
    bench.calls.on_move(message, bench.now_s)


def done(bench: Bench, worker: Placed, handle: bytes, cached: int = 8, **terms: float) -> None:
    made = prefill_done(attempt=SIDE, worker=worker, handle=handle, **terms)  # type: ignore[arg-type]
    made = msgspec.structs.replace(made, prompt_tokens=9, cached_tokens=cached)
    bench.calls.on_prefill_done(made, None, worker, bench.now_s, UNIX_S)


def held(bench: Bench, **terms: float) -> None:
    done(bench, DECODER, b"held", **terms)  # type: ignore[arg-type]


def read(bench: Bench) -> None:
    done(bench, OTHER_DECODER, b"read")


def declined(bench: Bench) -> MoveDeclined:
    (message,) = bench.wire.take_core()
    assert isinstance(message, MoveDeclined)
    assert (message.request, message.attempt, message.number) == ("r", 1, 1)
    return message


def goes_on_where_it_is(bench: Bench) -> None:
    """The source's tokens are the client's, to the end."""
    bench.tokens([14], finish=FinishReason.LENGTH)
    assert bench.wire.tokens("r") == [*SAID, 14]
    (finished,) = bench.wire.take_core()
    assert isinstance(finished, Finished)
    assert finished.attempt == 1


def test_the_kv_is_brought_while_tokens_come_and_then_the_call(bench: Bench) -> None:
    order(bench)
    ((to, message, frames),) = bench.wire.take_workers()
    assert (to, message) == HOLD
    # Whole blocks of all ten, and a token.
    assert frames[0].prompt_token_ids == [*PROMPT, 11, 12]
    bench.tokens([14])
    held(bench)
    ((to, message, frames),) = bench.wire.take_workers()
    assert (to, message) == READ
    assert frames[0].prompt_token_ids == [*PROMPT, 11, 12]
    bench.tokens([15])
    read(bench)
    assert sent(bench) == [READ_BACK]
    assert bench.wire.take_core() == [msgspec.structs.replace(READY, generated_tokens=5)]
    bench.tokens([16])
    bench.calls.on_plan(NEXT, bench.now_s)
    abort, (to, message, frames) = bench.wire.take_workers()
    assert abort[:2] == (DECODER, Abort([("r", 1)]))
    assert (to, message) == (OTHER_DECODER, Decode("r", 2, OTHER_DECODER.incarnation))
    assert frames[0].prompt_token_ids == [*PROMPT, *SAID, 14, 15, 16]
    assert frames[0].sampling_params.max_tokens == 34
    # The source has gone on for a moment.
    bench.tokens([17])
    bench.tokens([17], worker=OTHER_DECODER, attempt=2)
    assert bench.wire.tokens("r") == [*SAID, 14, 15, 16, 17]
    assert bench.wire.take_core() == [Started("api", "r", 2)]
    record = bench.calls.calls["r"].record
    assert [mark.text(", ") for mark in record.continuations] == [
        "decode-1 after 6 tokens, sampling restarted"
    ]


def test_it_may_be_moved_back(bench: Bench) -> None:
    order(bench)
    held(bench)
    read(bench)
    bench.calls.on_plan(NEXT, bench.now_s)
    bench.tokens([14], worker=OTHER_DECODER, attempt=2)
    bench.forget()
    order(bench, Move("r", 2, 2, DECODER))
    ((to, message, frames),) = bench.wire.take_workers()
    assert to == OTHER_DECODER
    assert message.attempt == move_attempt(2)
    assert frames[0].prompt_token_ids == [*PROMPT, 11, 12]


@pytest.mark.parametrize(
    "params",
    [{"presence_penalty": 0.5}, {"seed": 3, "temperature": 1.0}, {"prompt_logprobs": 1}],
)
def test_an_answer_that_would_be_another_one_stays(params: dict[str, object]) -> None:
    bench = running(**params)
    order(bench)
    assert sent(bench) == []
    assert declined(bench).for_good
    goes_on_where_it_is(bench)


def test_a_call_that_is_nearly_over_stays(bench: Bench) -> None:
    bench.tokens(list(range(30)))
    order(bench)
    assert sent(bench) == []
    assert not declined(bench).for_good


def test_a_call_whose_tokens_have_not_begun_stays() -> None:
    bench = Bench(LIMITS)
    bench.submit(prompt=PROMPT)
    bench.plan(prefill=None)
    bench.forget()
    order(bench)
    assert sent(bench) == []
    assert not declined(bench).for_good


def test_orders_are_carried_out_once_and_only_for_what_runs(bench: Bench) -> None:
    order(bench)
    bench.forget()
    order(bench)
    order(bench, Move("r", 2, 9, OTHER_DECODER))
    order(bench, Move("other", 1, 9, OTHER_DECODER))
    assert (sent(bench), bench.wire.take_core()) == ([], [])
    # A newer order takes the place of an older one.
    order(bench, Move("r", 1, 2, Placed("decode-2", "d2")))
    assert [type(message) for _, message in sent(bench)] == [Abort, Prefill]


def test_a_call_is_not_moved_to_where_it_is(bench: Bench) -> None:
    order(bench, Move("r", 1, 1, DECODER))
    assert sent(bench) == []
    declined(bench)


@pytest.mark.parametrize("step", ["holding", "warming", "ready"])
def test_a_lost_target_ends_the_move_only(bench: Bench, step: str) -> None:
    come_to(bench, step)
    bench.lose(OTHER_DECODER)
    ended = sent(bench)
    assert declined(bench).reason == "decode-1 is lost"
    if step == "holding":
        assert ended == [(DECODER, Abort([("r", SIDE)]))]
        held(bench)
        assert sent(bench) == [HELD_BACK]
        held(bench)
        assert sent(bench) == []
    goes_on_where_it_is(bench)


def come_to(bench: Bench, step: str) -> None:
    """As far as ``step``."""
    order(bench)
    if step != "holding":
        held(bench)
    if step == "ready":
        read(bench)
    bench.forget()


@pytest.mark.parametrize("step", ["holding", "warming", "ready"])
def test_a_lost_source_makes_it_a_continuation(bench: Bench, step: str) -> None:
    come_to(bench, step)
    bench.lose(DECODER)
    (failed,) = bench.wire.take_core()
    assert isinstance(failed, Failed)
    assert (failed.worker, failed.generated_tokens) == ("decode-0", 3)
    aborts = {to for to, message in sent(bench) if message == Abort([("r", SIDE)])}
    assert aborts == {"holding": {DECODER}, "warming": {OTHER_DECODER}, "ready": set()}[step]
    if step == "warming":
        read(bench)
        assert sent(bench) == [READ_BACK]
    bench.calls.on_plan(NEXT, bench.now_s)
    ((to, message, frames),) = bench.wire.take_workers()
    assert (to, message) == (OTHER_DECODER, Decode("r", 2, OTHER_DECODER.incarnation))
    assert frames[0].prompt_token_ids == [*PROMPT, *SAID]


@pytest.mark.parametrize("step", ["holding", "warming", "ready"])
def test_what_takes_too_long_ends_the_move_only(bench: Bench, step: str) -> None:
    come_to(bench, step)
    bench.now_s += LIMITS.move_s
    bench.calls.tick(bench.now_s)
    busy = {"holding": [DECODER], "warming": [OTHER_DECODER], "ready": []}[step]
    assert sent(bench) == [(worker, Abort([("r", SIDE)])) for worker in busy]
    declined(bench)
    bench.calls.tick(bench.now_s + LIMITS.move_s)
    assert bench.wire.take_core() == []
    goes_on_where_it_is(bench)


@pytest.mark.parametrize("step", ["holding", "warming", "ready"])
def test_another_core_knows_of_no_move(bench: Bench, step: str) -> None:
    come_to(bench, step)
    bench.calls.on_welcome("core-2", 4)
    bench.calls.tick(bench.now_s)
    declined(bench)
    bench.forget()
    order(bench)
    assert [type(message) for _, message in sent(bench)] == [Prefill]


@pytest.mark.parametrize("step", ["holding", "warming", "ready"])
@pytest.mark.parametrize("how", ["client", "last token"])
def test_a_call_that_ends_ends_its_move(bench: Bench, step: str, how: str) -> None:
    come_to(bench, step)
    if how == "client":
        bench.calls.end(["r"], "abort", bench.now_s)
    else:
        bench.tokens([14], finish=FinishReason.STOP)
    busy = {"holding": [DECODER], "warming": [OTHER_DECODER], "ready": []}[step]
    aborts = [to for to, message in sent(bench) if message == Abort([("r", SIDE)])]
    assert aborts == busy
    assert [type(message) for message in bench.wire.take_core()] == [Finished]
    if step != "ready":
        (held if step == "holding" else read)(bench)
        assert sent(bench) == [HELD_BACK if step == "holding" else READ_BACK]
    bench.calls.tick(bench.now_s + LIMITS.move_s)
    assert bench.wire.take_core() == []


def test_what_the_source_has_not_cached_is_not_computed_elsewhere(bench: Bench) -> None:
    order(bench)
    bench.forget()
    held(bench, cached=4)
    assert sent(bench) == [HELD_BACK]
    assert declined(bench).reason == "only 4 of 9 tokens are cached"


def test_a_handle_whose_lease_may_end_is_not_read(bench: Bench) -> None:
    order(bench)
    bench.forget()
    bench.now_s += 2.0
    held(bench, lease_s=4.0, held_at_unix_s=UNIX_S - 2.0)
    assert sent(bench) == [HELD_BACK]
    declined(bench)


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("step", ["holding", "warming"])
def test_a_worker_that_can_not_ends_the_move_only(bench: Bench, step: str, refused: bool) -> None:
    come_to(bench, step)
    worker, other = (DECODER, OTHER_DECODER) if step == "holding" else (OTHER_DECODER, DECODER)
    failed = CallFailed("r", SIDE, worker.incarnation, "no", handle_refused=refused)
    bench.calls.on_call_failed(failed, other, bench.now_s)
    assert bench.wire.take_core() == []
    bench.calls.on_call_failed(failed, worker, bench.now_s)
    assert sent(bench) == ([HELD_BACK] if refused and step == "warming" else [])
    assert declined(bench).reason == "no"
    bench.calls.on_call_failed(failed, worker, bench.now_s)
    assert bench.wire.take_core() == []
    goes_on_where_it_is(bench)


@pytest.mark.parametrize("unreachable", [DECODER, OTHER_DECODER])
def test_workers_that_can_not_be_reached_end_the_move_only(
    bench: Bench, unreachable: Placed
) -> None:
    bench.wire.reachable = lambda worker: worker != unreachable
    order(bench)
    if unreachable == OTHER_DECODER:
        held(bench)
        assert sent(bench) == [HOLD, HELD_BACK]
    assert declined(bench).reason == f"{unreachable.worker} can't be reached"
    goes_on_where_it_is(bench)


def test_the_core_is_told_again_until_the_plan_comes(bench: Bench) -> None:
    come_to(bench, "ready")
    bench.now_s += READY_AGAIN_S
    bench.calls.tick(bench.now_s)
    assert bench.wire.take_core() == [READY]
    bench.calls.on_plan(NEXT, bench.now_s)
    bench.now_s += READY_AGAIN_S
    bench.calls.tick(bench.now_s)
    assert bench.wire.take_core() == []


def test_a_plan_that_comes_when_the_move_was_given_up_counts(bench: Bench) -> None:
    come_to(bench, "ready")
    bench.now_s += LIMITS.move_s
    bench.calls.tick(bench.now_s)
    bench.forget()
    bench.calls.on_plan(NEXT, bench.now_s)
    assert [type(message) for _, message in sent(bench)] == [Abort, Decode]


def test_a_target_that_fails_after_the_plan_is_a_failed_attempt(bench: Bench) -> None:
    come_to(bench, "ready")
    bench.calls.on_plan(NEXT, bench.now_s)
    bench.forget()
    failed = CallFailed("r", 2, OTHER_DECODER.incarnation, "no")
    bench.calls.on_call_failed(failed, OTHER_DECODER, bench.now_s)
    (message,) = bench.wire.take_core()
    assert isinstance(message, Failed)
    assert (message.attempt, message.generated_tokens) == (2, 3)


def test_handles_of_moves_long_over_are_given_back_once(bench: Bench) -> None:
    come_to(bench, "warming")
    bench.calls.on_plan(Plan("r", 2, Placed("decode-2", "d2"), None), bench.now_s)
    assert (OTHER_DECODER, Abort([("r", SIDE)])) in sent(bench)
    late: PrefillDone = prefill_done(attempt=SIDE, worker=OTHER_DECODER, handle=b"read")
    for expected in ([READ_BACK], []):
        bench.calls.on_prefill_done(late, None, OTHER_DECODER, bench.now_s, UNIX_S)
        assert sent(bench) == expected

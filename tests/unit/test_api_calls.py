"""A call in an API process, step by step, with everything that may go wrong on the way."""

from __future__ import annotations

import pytest
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.stats import PrefillStats

from coordinator import protocol
from coordinator.api import calls as subject
from coordinator.api.continuing import needs_one_worker, resume_request
from coordinator.api.exchange import Continuation, Failure
from coordinator.limits import Limits
from coordinator.protocol import (
    Abort,
    CallFailed,
    Check,
    Checked,
    Decode,
    Discard,
    Failed,
    Finished,
    Placed,
    Prefill,
    Prefilled,
    Rejected,
    Started,
    Stop,
    Submit,
)
from tests.unit.calls_bench import UNIX_S, Bench
from tests.unit.recording_wire import (
    DECODER,
    OTHER_DECODER,
    PREFILLER,
    engine_request,
    output,
)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def names(messages: list[protocol.Message]) -> list[str]:
    return [type(message).__name__ for message in messages]


def to_workers(bench: Bench) -> list[tuple[str, str]]:
    return [(to.worker, type(message).__name__) for to, message, _ in bench.wire.take_workers()]


def test_a_request_that_reads_no_cache_has_no_hashes(bench: Bench) -> None:
    bench.submit(prompt_logprobs=1)
    (submit,) = bench.wire.take_core()
    assert isinstance(submit, Submit)
    assert submit.block_hashes == b""


# --- the ways a call goes when nothing fails ---------------------------------------------


def test_local_call_goes_from_submit_to_the_last_token(bench: Bench) -> None:
    record = bench.submit()
    (submit,) = bench.wire.take_core()
    assert isinstance(submit, Submit)
    assert (submit.prompt_tokens, submit.max_output_tokens, submit.aggregated) == (4, 10, False)
    assert len(submit.block_hashes) == protocol.BLOCK_HASH_BYTES
    assert submit.context.run == "run"

    bench.plan(prefill=None)
    ((to, message, frames),) = bench.wire.take_workers()
    assert to == DECODER
    assert message == Decode("r", 1, DECODER.incarnation)
    assert frames[0].prompt_token_ids == [1, 2, 3, 4]

    bench.now_s += 1.0
    stats = PrefillStats(num_cached_tokens=3, num_local_cached_tokens=3)
    bench.tokens([7], stats=stats)
    bench.tokens([8, 9], FinishReason.LENGTH)
    started, finished = bench.wire.take_core()
    assert started == Started("api", "r", 1)
    assert isinstance(finished, Finished)
    assert (finished.outcome, finished.output_tokens, finished.ttft_s) == ("length", 3, 1.0)
    assert (finished.prefill_cached_tokens, finished.moved_tokens) == (3, 0)
    assert bench.wire.tokens("r") == [7, 8, 9]
    assert [out.request_id for out in bench.wire.delivered] == ["r", "r"]
    assert not bench.calls.calls
    assert (record.decode, record.prefill, record.started) == ("decode-0", "", True)


def test_remote_call_sends_the_handle_on_and_tells_what_was_cached(bench: Bench) -> None:
    record = bench.submit()
    bench.plan()
    ((to, message, _),) = bench.wire.take_workers()
    assert (to, message) == (PREFILLER, Prefill("r", 1, PREFILLER.incarnation, True))
    bench.forget()

    bench.prefilled()
    ((to, message, _),) = bench.wire.take_workers()
    assert (to, message) == (DECODER, Decode("r", 1, DECODER.incarnation, b"r/1"))
    assert bench.wire.take_core() == [Prefilled("api", "r", 1)]

    # The decode engine counts what it pulled as cached; for the client it was computed.
    stats = PrefillStats(num_cached_tokens=3, num_external_cached_tokens=3)
    bench.tokens([7], FinishReason.STOP, stats=stats)
    assert record.moved_tokens == 3
    assert record.prefill_cached_tokens == 2
    seen = bench.wire.delivered[0].prefill_stats
    assert seen is not None
    assert seen.num_cached_tokens == 2


def test_children_of_one_request_are_a_group_on_one_worker(bench: Bench) -> None:
    bench.submit("0_r", group="r")
    bench.submit("1_r", group="r")
    submits = bench.wire.take_core()
    assert [(submit.group, submit.aggregated) for submit in submits if isinstance(submit, Submit)]
    assert all(submit.aggregated for submit in submits if isinstance(submit, Submit))


def test_what_can_not_be_split_is_served_on_one_worker() -> None:
    assert needs_one_worker(engine_request(prompt_logprobs=1))
    assert not needs_one_worker(engine_request(logprobs=1))


def test_a_request_that_can_not_be_encoded_begins_nothing(bench: Bench) -> None:
    def encode(request: object) -> object:
        raise TypeError("no bytes for that")

    bench.wire.encode = encode  # type: ignore[assignment]
    with pytest.raises(TypeError):
        bench.submit()
    assert not bench.calls.calls
    assert not bench.wire.core


# --- answers that do not come ---------------------------------------------------------------


def test_a_plan_that_does_not_come_is_asked_for_again(bench: Bench) -> None:
    bench.submit()
    first = bench.wire.take_core()
    bench.calls.tick(bench.now_s + 0.5)
    assert not bench.wire.core
    bench.calls.tick(bench.now_s + 1.0)
    assert bench.wire.take_core() == first
    bench.calls.tick(bench.now_s + 1.5)
    assert not bench.wire.core


def test_nothing_is_asked_once_there_is_a_plan(bench: Bench) -> None:
    bench.submit()
    bench.plan()
    bench.forget()
    bench.calls.tick(bench.now_s + 50.0)
    assert not bench.wire.core


def test_a_core_that_stays_away_ends_the_wait() -> None:
    bench = Bench(Limits(queue_s=5.0, admission_s=3.0))
    bench.submit()
    bench.calls.tick(bench.now_s + 8.0 + subject.CORE_AWAY_S - 0.1)
    assert bench.calls.calls
    bench.calls.tick(bench.now_s + 8.0 + subject.CORE_AWAY_S)
    assert not bench.calls.calls
    assert bench.wire.failures["r"].status == 503


def test_a_call_that_nobody_ends_is_ended_at_last() -> None:
    bench = Bench(Limits(call_s=60.0))
    bench.submit()
    bench.plan(prefill=None)
    bench.tokens([7])
    bench.forget()
    bench.now_s += 60.0 + subject.CORE_AWAY_S
    bench.calls.tick(bench.now_s)
    assert bench.wire.failures["r"].status == 504
    assert to_workers(bench) == [("decode-0", "Abort")]
    assert names(bench.wire.take_core()) == ["Finished"]


# --- attempts that fail -------------------------------------------------------------------


def test_a_failed_prefill_is_planned_anew(bench: Bench) -> None:
    bench.submit()
    bench.plan()
    bench.forget()
    bench.calls.on_call_failed(CallFailed("r", 1, "p0", "full"), PREFILLER, bench.now_s)
    assert bench.wire.take_core() == [Failed("api", "r", 1, "prefill-0", "full", 0)]
    assert to_workers(bench) == [("prefill-0", "Abort")]

    bench.calls.tick(bench.now_s + 1.0)
    assert names(bench.wire.take_core()) == ["Failed"], "asked again until there is a plan"

    bench.plan(attempt=2, prefill=None, decode=OTHER_DECODER)
    ((to, message, _),) = bench.wire.take_workers()
    assert (to, message) == (OTHER_DECODER, Decode("r", 2, "d1"))


def test_a_request_that_no_worker_can_serve_is_told_so(bench: Bench) -> None:
    bench.submit()
    bench.plan(prefill=None)
    failed = CallFailed("r", 1, "d0", "no such adapter", retryable=False)
    bench.calls.on_call_failed(failed, DECODER, bench.now_s)
    assert bench.wire.failures["r"].status == 500
    assert not bench.calls.calls


@pytest.mark.parametrize("reached", ["prefilling", "loading", "decoding"])
def test_a_lost_worker_costs_an_attempt_in_every_phase(bench: Bench, reached: str) -> None:
    bench.submit()
    bench.plan()
    if reached != "prefilling":
        bench.prefilled()
    if reached == "decoding":
        bench.tokens([7, 8])
    bench.forget()
    lost = PREFILLER if reached == "prefilling" else DECODER
    bench.lose(lost)
    (failed,) = bench.wire.take_core()
    assert isinstance(failed, Failed)
    assert failed.worker == lost.worker
    assert failed.generated_tokens == (2 if reached == "decoding" else 0)
    bench.lose(lost)
    assert not bench.wire.core, "told twice, asked once"


def test_a_lost_decode_worker_stops_the_prefill_for_it(bench: Bench) -> None:
    bench.submit()
    bench.plan()
    bench.forget()
    bench.lose(DECODER)
    assert to_workers(bench) == [("prefill-0", "Abort")]
    assert names(bench.wire.take_core()) == ["Failed"]


def test_a_lost_prefill_worker_matters_only_until_its_handle_is_sent_on(bench: Bench) -> None:
    bench.submit()
    bench.plan()
    bench.prefilled()
    bench.forget()
    bench.lose(PREFILLER)
    assert not bench.wire.core
    assert not bench.wire.workers


@pytest.mark.parametrize("prefill", [PREFILLER, None])
def test_a_worker_that_is_not_connected_costs_an_attempt(
    bench: Bench, prefill: Placed | None
) -> None:
    bench.submit()
    bench.wire.reachable = lambda worker: False
    bench.forget()
    bench.plan(prefill=prefill)
    (failed,) = bench.wire.take_core()
    assert isinstance(failed, Failed)
    assert failed.worker == (prefill or DECODER).worker


def test_an_engine_that_ends_it_by_itself_costs_an_attempt(bench: Bench) -> None:
    bench.submit()
    bench.plan(prefill=None)
    bench.tokens([7])
    bench.forget()
    bench.tokens([], FinishReason.ERROR)
    assert bench.wire.tokens("r") == [7]
    assert all(out.finish_reason is None for out in bench.wire.delivered)
    (failed,) = bench.wire.take_core()
    assert isinstance(failed, Failed)


# --- going on where another worker stopped -------------------------------------------------


def test_the_stream_goes_on_behind_what_the_client_has(bench: Bench) -> None:
    bench.submit(max_tokens=10, min_tokens=4)
    bench.plan(prefill=None)
    bench.tokens([7, 8], stats=PrefillStats())
    bench.lose(DECODER)
    bench.forget()

    bench.plan(attempt=2, prefill=None, decode=OTHER_DECODER)
    ((_, _, (request,)),) = bench.wire.take_workers()
    assert request.prompt_token_ids == [1, 2, 3, 4, 7, 8]
    assert (request.sampling_params.max_tokens, request.sampling_params.min_tokens) == (8, 2)

    bench.tokens([9], worker=OTHER_DECODER, attempt=2, stats=PrefillStats())
    bench.lose(OTHER_DECODER)
    (started, failed) = bench.wire.take_core()
    assert isinstance(failed, Failed)
    assert failed.generated_tokens == 3

    bench.plan(attempt=3, prefill=None)
    ((_, _, (request,)),) = [sent for sent in bench.wire.take_workers() if sent[2]]
    assert request.prompt_token_ids == [1, 2, 3, 4, 7, 8, 9]
    assert (request.sampling_params.max_tokens, request.sampling_params.min_tokens) == (7, 1)
    bench.tokens([10], FinishReason.STOP, attempt=3, stats=PrefillStats())
    assert bench.wire.tokens("r") == [7, 8, 9, 10]
    assert [out.prefill_stats is not None for out in bench.wire.delivered] == [
        True,
        False,
        False,
    ], "the prompt is counted once"
    assert started == Started("api", "r", 2)


@pytest.mark.parametrize(
    ("params", "restarted"),
    [
        ({"temperature": 0.0}, False),
        ({"temperature": 0.0, "seed": 7}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 0.7, "seed": 7}, True),
    ],
)
def test_a_call_that_goes_on_elsewhere_says_so(
    bench: Bench, params: dict[str, object], restarted: bool
) -> None:
    record = bench.submit(max_tokens=10, **params)
    bench.plan(prefill=None)
    bench.lose(DECODER)
    bench.plan(attempt=2, prefill=None)
    bench.tokens([7, 8], attempt=2)
    assert not record.continuations, "nothing had been said"
    bench.lose(DECODER)
    bench.plan(attempt=3, prefill=None)
    bench.lose(DECODER)
    bench.plan(attempt=4, prefill=None, decode=OTHER_DECODER)
    assert not record.continuations, "it does not go on yet"
    bench.tokens([9], worker=OTHER_DECODER, attempt=4)
    bench.tokens([10], worker=OTHER_DECODER, attempt=4)
    assert record.continuations == [Continuation("decode-1", 2, restarted)]
    bench.lose(OTHER_DECODER)
    bench.plan(attempt=5, prefill=None)
    bench.tokens([11], FinishReason.STOP, attempt=5)
    assert record.continuations[1:] == [Continuation("decode-0", 4, restarted)]


def test_late_tokens_of_the_former_attempt_are_not_seen(bench: Bench) -> None:
    bench.submit()
    bench.plan(prefill=None)
    bench.tokens([7])
    bench.lose(DECODER)
    bench.tokens([8])
    bench.plan(attempt=2, prefill=None)
    bench.tokens([8])
    bench.tokens([8], worker=OTHER_DECODER, attempt=2)
    assert bench.wire.tokens("r") == [7]
    bench.tokens([8], attempt=2)
    assert bench.wire.tokens("r") == [7, 8]


@pytest.mark.parametrize(
    "params",
    [
        {"structured_outputs": StructuredOutputsParams(json={"type": "object"})},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"prompt_logprobs": 1},
        {"repetition_detection": RepetitionDetectionParams(max_pattern_size=4, min_count=2)},
    ],
)
def test_what_counts_generated_tokens_is_not_continued(
    bench: Bench, params: dict[str, object]
) -> None:
    assert resume_request(engine_request(**params), [7]) is None
    bench.submit(**params)
    bench.plan(prefill=None)
    bench.tokens([7])
    bench.forget()
    bench.lose(DECODER)
    assert bench.wire.failures["r"].status == 503
    (finished,) = bench.wire.take_core()
    assert isinstance(finished, Finished)
    assert finished.outcome == "error"


def test_what_counts_generated_tokens_is_begun_anew_before_the_first(bench: Bench) -> None:
    bench.submit(presence_penalty=0.5)
    bench.plan(prefill=None)
    bench.lose(DECODER)
    assert not bench.wire.failures
    assert bench.calls.calls["r"].failed is not None


# --- plans that are late, doubled or newer ---------------------------------------------------


def test_a_second_copy_of_a_plan_changes_nothing(bench: Bench) -> None:
    bench.submit()
    bench.plan()
    bench.forget()
    bench.plan()
    assert not bench.wire.workers
    bench.prefilled()
    bench.forget()
    bench.plan()
    assert not bench.wire.workers


def test_the_plan_of_a_failed_attempt_is_not_carried_out_again(bench: Bench) -> None:
    bench.submit()
    bench.plan()
    bench.lose(PREFILLER)
    bench.forget()
    bench.plan()
    assert not bench.wire.workers
    assert bench.calls.calls["r"].phase == "waiting"


def test_a_plan_for_a_call_that_has_ended_begins_nothing(bench: Bench) -> None:
    bench.submit()
    bench.calls.end(["r"], "abort", bench.now_s)
    bench.forget()
    bench.plan()
    assert not bench.wire.workers


def test_a_newer_plan_replaces_a_running_attempt(bench: Bench) -> None:
    bench.submit()
    bench.plan(prefill=None)
    bench.tokens([7])
    bench.forget()
    bench.plan(attempt=2, prefill=None, decode=OTHER_DECODER)
    (abort_to, abort, _), (to, decode, (request,)) = bench.wire.take_workers()
    assert (abort_to, abort) == (DECODER, Abort([("r", 1)]))
    assert (to, decode) == (OTHER_DECODER, Decode("r", 2, "d1"))
    assert request.prompt_token_ids == [1, 2, 3, 4, 7]
    bench.tokens([8])
    bench.tokens([8], worker=OTHER_DECODER, attempt=2)
    assert bench.wire.tokens("r") == [7, 8]


# --- handles ---------------------------------------------------------------------------------


def test_a_handle_that_arrives_twice_is_sent_on_once_and_not_given_back(bench: Bench) -> None:
    bench.submit()
    bench.plan()
    bench.prefilled()
    bench.forget()
    bench.prefilled()
    assert not bench.wire.workers, "the decode worker may be reading"
    bench.tokens([7])
    bench.prefilled()
    assert not bench.wire.workers


def test_a_handle_for_a_call_that_was_given_up_goes_back_to_its_holder(bench: Bench) -> None:
    bench.submit()
    bench.plan()
    bench.calls.end(["r"], "abort", bench.now_s)
    assert to_workers(bench) == [("prefill-0", "Prefill"), ("prefill-0", "Abort")]
    bench.prefilled()
    ((to, message, _),) = bench.wire.take_workers()
    assert (to, message) == (PREFILLER, Discard("r", 1, "p0", b"r/1"))
    bench.prefilled()
    assert not bench.wire.workers, "once"


def test_a_handle_of_a_former_attempt_goes_back_while_the_next_one_runs(bench: Bench) -> None:
    bench.submit()
    bench.plan()
    bench.lose(DECODER)
    bench.plan(attempt=2, decode=OTHER_DECODER)
    bench.forget()
    bench.prefilled(attempt=1)
    assert to_workers(bench) == [("prefill-0", "Discard")]
    bench.prefilled(attempt=2)
    ((to, message, _),) = bench.wire.take_workers()
    assert (to, message) == (OTHER_DECODER, Decode("r", 2, "d1", b"r/2"))


def test_a_handle_from_a_worker_that_was_not_asked_is_left_alone(bench: Bench) -> None:
    bench.submit()
    bench.plan()
    bench.forget()
    bench.prefilled(worker=OTHER_DECODER)
    assert not bench.wire.workers
    assert bench.calls.calls["r"].phase == "prefilling"


def test_a_handle_whose_decode_worker_is_not_connected_goes_back(bench: Bench) -> None:
    bench.submit()
    bench.plan()
    bench.wire.reachable = lambda worker: worker != DECODER
    bench.forget()
    bench.prefilled()
    assert to_workers(bench) == [("prefill-0", "Discard")]
    assert names(bench.wire.take_core()) == ["Failed"]


@pytest.mark.parametrize(
    ("sent_ago_s", "held_ago_s", "margin_s", "dispatched"),
    [
        (5.0, 5.0, 3.0, True),
        (60.0, 20.0, 3.0, True),  # a long prefill, a short hold: the holder's clock knows
        (20.0, 900.0, 3.0, True),  # the holder's clock is wrong: ours knows
        (28.0, 27.0, 3.0, False),
        (60.0, 26.5, 3.0, False),
        (60.0, 25.5, 3.0, True),
        (60.0, 25.5, 10.0, False),  # the holder says what margin its reader needs
        (60.0, 18.5, 10.0, True),
    ],
)
def test_a_handle_is_not_dispatched_when_its_lease_might_run_out(
    bench: Bench, sent_ago_s: float, held_ago_s: float, margin_s: float, dispatched: bool
) -> None:
    bench.submit()
    bench.plan()
    bench.forget()
    bench.now_s += sent_ago_s
    bench.prefilled(lease_s=30.0, held_at_unix_s=UNIX_S - held_ago_s, margin_s=margin_s)
    sent = to_workers(bench)
    if dispatched:
        assert sent == [("decode-0", "Decode")]
    else:
        assert sent == [("prefill-0", "Abort"), ("prefill-0", "Discard")]
        assert names(bench.wire.take_core()) == ["Failed"]


def test_tombstones_are_bounded_in_time_and_number(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "TOMBSTONES_MAX", 3)
    for number in range(5):
        bench.submit(f"r{number}")
        bench.plan(f"r{number}")
    bench.calls.end([f"r{number}" for number in range(5)], "abort", bench.now_s)
    bench.calls.tick(bench.now_s)
    assert list(bench.calls.tombstones) == [("r2", 1), ("r3", 1), ("r4", 1)]
    bench.calls.tick(bench.now_s + subject.TOMBSTONE_S)
    assert not bench.calls.tombstones


# --- the client goes away ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reached", "aborted_on"),
    [
        ("waiting", []),
        ("prefilling", ["prefill-0"]),
        ("loading", ["decode-0"]),
        ("decoding", ["decode-0"]),
    ],
)
def test_an_abort_reaches_whoever_works_on_the_call(
    bench: Bench, reached: str, aborted_on: list[str]
) -> None:
    bench.submit()
    if reached != "waiting":
        bench.plan()
    if reached in ("loading", "decoding"):
        bench.prefilled()
    if reached == "decoding":
        bench.tokens([7])
    bench.forget()
    bench.calls.end(["r", "unknown"], "abort", bench.now_s)
    assert to_workers(bench) == [(worker, "Abort") for worker in aborted_on]
    (finished,) = bench.wire.take_core()
    assert isinstance(finished, Finished)
    assert finished.outcome == "abort"
    bench.calls.end(["r"], "abort", bench.now_s)
    bench.tokens([8])
    bench.calls.tick(bench.now_s + 100.0)
    assert not bench.wire.core
    assert not bench.calls.calls
    assert 8 not in bench.wire.tokens("r")


def test_a_stop_string_ends_the_call_as_stopped(bench: Bench) -> None:
    bench.submit()
    bench.plan(prefill=None)
    bench.tokens([7])
    bench.forget()
    bench.calls.end(["r"], "stop", bench.now_s)
    (finished,) = bench.wire.take_core()
    assert isinstance(finished, Finished)
    assert (finished.outcome, finished.output_tokens) == ("stop", 1)
    assert to_workers(bench) == [("decode-0", "Abort")]


# --- the core says no, asks, or restarts -----------------------------------------------------


def test_a_rejection_becomes_the_clients_status(bench: Bench) -> None:
    bench.submit()
    bench.calls.on_rejected(Rejected("r", 1, 429, "the queue is full", 7.0), bench.now_s)
    assert bench.wire.failures == {"r": Failure(429, "the queue is full", 7.0)}
    assert not bench.calls.calls


def test_a_rejection_of_what_runs_by_now_is_late(bench: Bench) -> None:
    bench.submit()
    bench.plan(prefill=None)
    bench.calls.on_rejected(Rejected("r", 1, 429, "the queue is full"), bench.now_s)
    assert not bench.wire.failures


def test_a_stop_ends_a_running_call_with_its_status(bench: Bench) -> None:
    bench.submit()
    bench.plan(prefill=None)
    bench.forget()
    bench.calls.on_stop(Stop("r", 1, 504, "over its deadline"), bench.now_s)
    assert bench.wire.failures == {"r": Failure(504, "over its deadline")}
    assert to_workers(bench) == [("decode-0", "Abort")]
    bench.calls.on_stop(Stop("r", 1, 504, "over its deadline"), bench.now_s)


def test_what_is_being_said_is_not_stopped_for_want_of_another_attempt(bench: Bench) -> None:
    bench.submit()
    bench.plan(prefill=None)
    no_room = Stop("r", 2, 503, "no room within the longest wait")
    bench.tokens([7])
    bench.forget()
    bench.calls.on_stop(no_room, bench.now_s)
    assert not bench.wire.failures
    assert not bench.wire.workers
    # Other reasons count, and so does this one for the attempt that is under way.
    bench.calls.on_stop(Stop("r", 2, 504, "over its deadline"), bench.now_s)
    assert bench.wire.failures == {"r": Failure(504, "over its deadline")}


def test_a_call_that_waits_or_loads_is_stopped_for_want_of_another_attempt(bench: Bench) -> None:
    bench.submit()
    bench.plan(prefill=None)
    bench.calls.on_stop(Stop("r", 2, 503, "no room within the longest wait"), bench.now_s)
    assert bench.wire.failures["r"].status == 503
    assert not bench.calls.calls


@pytest.mark.parametrize("reached", ["prefilling", "loading", "decoding", "gone"])
def test_a_check_is_answered_with_the_phase(bench: Bench, reached: str) -> None:
    if reached != "gone":
        bench.submit()
        bench.plan()
    if reached in ("loading", "decoding"):
        bench.prefilled()
    if reached == "decoding":
        bench.tokens([7])
    bench.forget()
    bench.calls.on_check(Check("r", 1))
    (checked,) = bench.wire.take_core()
    assert checked == Checked("api", "r", 1, reached)  # type: ignore[arg-type]


def test_a_check_of_what_waits_is_answered_with_what_it_waits_for(bench: Bench) -> None:
    bench.submit()
    bench.forget()
    bench.calls.on_check(Check("r", 1))
    assert names(bench.wire.take_core()) == ["Submit"]
    bench.plan(prefill=None)
    bench.lose(DECODER)
    bench.forget()
    bench.calls.on_check(Check("r", 1))
    assert names(bench.wire.take_core()) == ["Failed"]


def test_a_restarted_core_is_asked_as_if_for_the_first_time(bench: Bench) -> None:
    bench.submit()
    bench.plan(prefill=None)
    bench.tokens([7, 8])
    bench.lose(DECODER)
    bench.forget()
    bench.calls.on_welcome("core-2", 4)
    bench.calls.tick(bench.now_s + 1.0)
    (submit,) = bench.wire.take_core()
    assert isinstance(submit, Submit)
    assert (submit.attempt, submit.prompt_tokens) == (2, 6)
    # It did not know the call that it was told had failed; that is answered late.
    bench.calls.on_stop(Stop("r", 1, 503, "the core does not know this call"), bench.now_s)
    assert not bench.wire.failures
    bench.plan(attempt=2, prefill=None)
    bench.tokens([9], FinishReason.STOP, attempt=2)
    assert bench.wire.tokens("r") == [7, 8, 9]


def test_a_call_that_outlived_a_core_survives_the_loss_of_its_worker(bench: Bench) -> None:
    bench.submit()
    bench.plan(prefill=None)
    bench.tokens([7])
    bench.calls.on_welcome("core-2", 4)
    bench.forget()
    bench.lose(DECODER)
    (submit,) = bench.wire.take_core()
    assert isinstance(submit, Submit)
    assert (submit.attempt, submit.prompt_tokens) == (2, 5)


def test_the_same_core_again_changes_nothing(bench: Bench) -> None:
    bench.submit()
    bench.plan(prefill=None)
    bench.lose(DECODER)
    bench.calls.on_welcome("core-1", 4)
    call = bench.calls.calls["r"]
    assert (call.attempt, call.failed is not None) == (1, True)


def test_siblings_that_fail_together_are_asked_for_no_more(bench: Bench) -> None:
    """The first one's failure ends the second in the middle of the news of a lost worker."""
    siblings = ["0_r", "1_r"]
    bench.wire.on_fail = lambda request: bench.calls.end(siblings, "error", bench.now_s)
    for request in siblings:
        bench.submit(request, group="r", presence_penalty=0.5)
        bench.plan(request, prefill=None)
        bench.tokens([7], request=request)
    bench.forget()
    bench.lose(DECODER)
    assert names(bench.wire.take_core()) == ["Finished", "Finished"]
    assert list(bench.wire.failures) == ["0_r"]
    assert not bench.calls.calls


def test_outputs_with_a_strange_id_are_dropped_and_the_others_are_not(bench: Bench) -> None:
    bench.submit()
    bench.plan(prefill=None)
    good, strange = output("r", 1, [7]), output("r", 1, [8])
    for name in ("no-attempt", "r~x", "~1", "other~1"):
        strange.request_id = name
        bench.calls.on_outputs([strange], DECODER, 0.0, bench.now_s)
    bench.calls.on_outputs([strange, good], DECODER, 0.0, bench.now_s)
    assert bench.wire.tokens("r") == [7]
    assert bench.calls.stale == 5

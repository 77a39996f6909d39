"""The first token of a call that is prefilled on one worker and decoded on another."""

from __future__ import annotations

import pytest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.metrics.stats import PrefillStats

from coordinator.api.continuing import may_begin_elsewhere
from coordinator.api.exchange import Continuation
from coordinator.protocol import (
    Abort,
    CallFailed,
    Decode,
    Discard,
    Failed,
    Finished,
    Prefill,
    Prefilled,
    Started,
)
from tests.unit.calls_bench import Bench
from tests.unit.recording_wire import (
    DECODER,
    OTHER_DECODER,
    PREFILLER,
    engine_request,
    output,
)


def first_token(
    finish: FinishReason | None = None, attempt: int = 1, token: int = 7
) -> EngineCoreOutput:
    stats = PrefillStats(num_cached_tokens=2, num_local_cached_tokens=2)
    return output("r", attempt, [token], finish, stats)


def begun(**params: object) -> Bench:
    """A call that waits for its prefill worker."""
    bench = Bench()
    bench.submit(**params)
    bench.plan()
    return bench


def test_the_client_has_the_first_token_before_its_kv_has_moved() -> None:
    bench = begun(max_tokens=10, min_tokens=3)
    record = bench.calls.calls["r"].record
    ((_, asked, _),) = bench.wire.take_workers()
    assert asked == Prefill("r", 1, PREFILLER.incarnation, first_token=True)
    bench.forget()

    bench.now_s += 1.0
    bench.prefilled(first=first_token())
    assert bench.wire.tokens("r") == [7]
    assert bench.wire.delivered[0].finish_reason is None
    assert (record.started, record.prefill_cached_tokens) == (True, 2)
    ((to, message, frames),) = bench.wire.take_workers()
    assert (to, message) == (DECODER, Decode("r", 1, DECODER.incarnation, b"r/1"))
    assert frames[0].prompt_token_ids == [1, 2, 3, 4, 7]
    assert (frames[0].sampling_params.max_tokens, frames[0].sampling_params.min_tokens) == (9, 2)
    assert bench.wire.take_core() == [Prefilled("api", "r", 1)]

    bench.now_s += 1.0
    stats = PrefillStats(num_cached_tokens=4, num_external_cached_tokens=4)
    bench.tokens([8], stats=stats)
    assert bench.wire.take_core() == [Started("api", "r", 1)]
    assert bench.wire.delivered[1].prefill_stats is None, "the client was told with the first"
    bench.tokens([9], FinishReason.STOP)
    (finished,) = bench.wire.take_core()
    assert isinstance(finished, Finished)
    assert (finished.output_tokens, finished.ttft_s, finished.elapsed_s) == (3, 1.0, 2.0)
    assert (finished.prefill_cached_tokens, finished.moved_tokens) == (2, 4)
    assert not finished.undecoded
    assert bench.wire.tokens("r") == [7, 8, 9]
    assert not record.continuations, "nothing was lost"


@pytest.mark.parametrize(
    ("params", "finish"),
    [({"max_tokens": 1}, FinishReason.LENGTH), ({"max_tokens": 5}, FinishReason.STOP)],
)
def test_a_call_that_is_over_with_its_first_token_is_not_decoded(
    params: dict[str, object], finish: FinishReason
) -> None:
    bench = begun(**params)
    record = bench.calls.calls["r"].record
    bench.forget()
    bench.prefilled(first=first_token(finish))
    assert bench.wire.tokens("r") == [7]
    assert bench.wire.delivered[0].finish_reason is finish
    assert not bench.calls.calls
    (finished,) = bench.wire.take_core()
    assert isinstance(finished, Finished)
    assert (finished.outcome, finished.output_tokens) == (str(finish), 1)
    assert finished.undecoded
    assert record.decode == PREFILLER.worker, "who generated it"
    ((to, message, _),) = bench.wire.take_workers()
    assert to == PREFILLER
    assert isinstance(message, Discard), "what was held is freed"


def test_nothing_is_given_back_where_nothing_was_held() -> None:
    bench = begun(max_tokens=1)
    bench.forget()
    bench.prefilled(first=first_token(FinishReason.LENGTH), handle=b"")
    assert not bench.wire.take_workers()


def test_nothing_is_given_back_for_a_call_that_is_over_before_it_hears_so() -> None:
    bench = begun(max_tokens=1)
    bench.calls.end(["r"], "abort", bench.now_s)
    bench.forget()
    bench.prefilled(first=first_token(FinishReason.LENGTH), handle=b"")
    assert not bench.wire.take_workers()


def test_a_decode_worker_lost_after_the_first_token_is_replaced() -> None:
    bench = begun()
    bench.prefilled(first=first_token())
    bench.forget()
    bench.lose(DECODER)
    (failed,) = bench.wire.take_core()
    assert failed == Failed("api", "r", 1, "decode-0", "decode-0 is lost: test", 1)

    bench.plan(attempt=2, decode=OTHER_DECODER, prefill=None)
    ((_, message, frames),) = bench.wire.take_workers()[-1:]
    assert message == Decode("r", 2, OTHER_DECODER.incarnation)
    assert frames[0].prompt_token_ids == [1, 2, 3, 4, 7]
    bench.tokens([8], FinishReason.STOP, worker=OTHER_DECODER, attempt=2)
    assert bench.wire.tokens("r") == [7, 8]


def test_a_continuation_may_begin_on_a_prefill_worker_and_is_marked_once() -> None:
    bench = begun(temperature=0.0)
    record = bench.calls.calls["r"].record
    bench.prefilled(first=first_token())
    bench.tokens([8])
    bench.lose(DECODER)
    bench.plan(attempt=2, decode=OTHER_DECODER)
    bench.prefilled(attempt=2, first=first_token(attempt=2, token=9))
    assert bench.wire.delivered[-1].prefill_stats is None
    bench.tokens([10], worker=OTHER_DECODER, attempt=2, stats=PrefillStats())
    assert bench.wire.tokens("r") == [7, 8, 9, 10]
    assert record.continuations == [Continuation("decode-1", 2, sampling_restarted=False)]
    assert bench.calls.calls["r"].engine_request.prompt_token_ids == [1, 2, 3, 4, 7, 8, 9]


def test_a_first_token_that_comes_too_late_is_no_ones() -> None:
    bench = begun()
    bench.forget()
    bench.now_s += 28.0
    bench.prefilled(first=first_token(), unix_s=1028.0)
    assert not bench.wire.delivered, "its KV may be gone before it is read: prefilled anew"
    assert [type(message) for message in bench.wire.take_core()] == [Failed]


def test_a_stop_string_in_the_first_token_ends_the_decode() -> None:
    bench = begun()
    bench.prefilled(first=first_token())
    bench.forget()
    bench.calls.end(["r"], "stop", bench.now_s)
    assert [type(message) for _, message, _ in bench.wire.take_workers()] == [Abort]


def test_a_prefill_worker_that_could_not_has_given_no_token() -> None:
    bench = begun()
    bench.forget()
    bench.calls.on_call_failed(CallFailed("r", 1, "p0", "full"), PREFILLER, bench.now_s)
    (failed,) = bench.wire.take_core()
    assert isinstance(failed, Failed)
    assert failed.generated_tokens == 0


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.8, "seed": 3},
        {"presence_penalty": 0.5},
        {"structured_outputs": StructuredOutputsParams(regex="a+")},
        {"bad_words": ["x"]},
    ],
)
def test_what_would_change_the_answer_is_sampled_by_one_engine(params: dict[str, object]) -> None:
    assert not may_begin_elsewhere(engine_request(**params))
    bench = begun(**params)
    ((_, asked, _),) = bench.wire.take_workers()
    assert asked == Prefill("r", 1, PREFILLER.incarnation)
    bench.prefilled()
    ((_, _, frames),) = bench.wire.take_workers()
    assert frames[0].prompt_token_ids == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0, "seed": 3},
        {"temperature": 0.8},
        {"logprobs": 2, "stop": ["x"], "min_tokens": 2, "logit_bias": {5: 1.0}},
    ],
)
def test_what_any_engine_would_do_alike_is_begun_by_the_prefill_worker(
    params: dict[str, object],
) -> None:
    assert may_begin_elsewhere(engine_request(**params))

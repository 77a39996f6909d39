"""What becomes of a request on its way into an engine, for prefilling and for decoding."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from coordinator.protocol import CallFailed, PrefillDone, split_engine_request_id
from decode.worker import decode_request, discard_request
from prefill.worker import HOLD, first_output, prefill_request, prefill_result
from tests.unit.recording_wire import engine_request
from transfer import handle as handles
from transfer.settings import CACHED_ONLY

PARAMS: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[3, 4]],
    "remote_engine_id": "engine-0",
    "remote_request_id": "r~1",
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "remote_num_tokens": 40,
    "tp_size": 1,
}
HANDLE = handles.from_params(PARAMS)


def demanding_request() -> EngineCoreRequest:
    request = engine_request(
        prompt=range(40),
        max_tokens=50,
        min_tokens=5,
        temperature=0.7,
        top_p=0.9,
        seed=3,
        stop=["\n"],
        logprobs=2,
        presence_penalty=0.5,
        structured_outputs=StructuredOutputsParams(regex="a+"),
        extra_args={"kv_transfer_params": {"remote_host": "evil"}, "other": 1},
    )
    request.cache_salt = "tenant"
    request.priority = 3
    return request


def of_params(request: EngineCoreRequest) -> SamplingParams:
    assert request.sampling_params is not None
    return request.sampling_params


# --- prefilling -------------------------------------------------------------------------------


def test_a_prefill_is_one_token_whose_kv_is_held() -> None:
    request = demanding_request()
    prefill = prefill_request(request, "r", 2)
    assert (prefill.request_id, prefill.external_req_id) == ("r~2", "r~2")
    params = of_params(prefill)
    assert (params.max_tokens, params.min_tokens, params.n) == (1, 0, 1)
    assert params.extra_args == {
        "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}
    }


def test_a_prefill_keeps_what_shapes_the_kv_and_nothing_about_tokens() -> None:
    request = demanding_request()
    prefill = prefill_request(request, "r", 1)
    assert prefill.prompt_token_ids == request.prompt_token_ids
    assert prefill.cache_salt == "tenant"
    assert prefill.priority == 3
    assert prefill.lora_request is request.lora_request
    assert prefill.mm_features is request.mm_features
    params = of_params(prefill)
    assert params.structured_outputs is None
    assert not params.stop
    assert params.logprobs is None
    assert not params.presence_penalty


def test_a_prefill_that_samples_does_so_as_the_client_asked() -> None:
    request = engine_request(
        max_tokens=50, min_tokens=5, temperature=0.7, top_p=0.9, logprobs=2, stop_token_ids=[9]
    )
    of_params(request).extra_args = {"kv_transfer_params": {"remote_host": "evil"}, "other": 1}
    params = of_params(prefill_request(request, "r", 1, first_token=True))
    assert (params.max_tokens, params.min_tokens) == (1, 1)
    assert (params.temperature, params.top_p, params.logprobs) == (0.7, 0.9, 2)
    assert params.stop_token_ids == [9]
    assert params.extra_args == {
        "other": 1,
        "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False},
    }
    assert of_params(request).max_tokens == 50, "the decode worker gets it as it was"


@pytest.mark.parametrize("first_token", [False, True])
def test_a_prefill_may_read_first_and_hold_afterwards(first_token: bool) -> None:
    request = prefill_request(engine_request(), "r", 1, first_token, HANDLE)
    extra = of_params(request).extra_args
    assert extra is not None
    assert extra["kv_transfer_params"] == {**handles.to_params(HANDLE), "do_remote_decode": True}
    last = of_params(prefill_request(engine_request(max_tokens=1), "r", 1, True, HANDLE))
    assert last.extra_args == {"kv_transfer_params": handles.to_params(HANDLE)}


def test_a_peer_is_asked_for_what_it_has_cached_only() -> None:
    request = prefill_request(engine_request(), "r", -1, cached_only=True)
    assert request.request_id == "r~-1"
    assert split_engine_request_id(request.request_id) == ("r", -1)
    extra = of_params(request).extra_args
    assert extra == {"kv_transfer_params": {**HOLD, CACHED_ONLY: True}}
    assert CACHED_ONLY not in HOLD


def test_a_prefill_whose_first_token_is_the_only_one_holds_nothing() -> None:
    params = of_params(prefill_request(engine_request(max_tokens=1), "r", 1, first_token=True))
    assert params.extra_args is None
    output = EngineCoreOutput("r~1", [5], finish_reason=FinishReason.LENGTH)
    done = prefill_result(output, "r", 1, "p0", 40, 16, 30.0, 1234.5, last=True)
    assert isinstance(done, PrefillDone)
    assert done.handle == b""
    assert first_output(output, last=True).finish_reason == FinishReason.LENGTH


@pytest.mark.parametrize(
    ("engine_says", "client_gets"),
    [(FinishReason.LENGTH, None), (FinishReason.STOP, FinishReason.STOP)],
)
def test_only_a_stop_ends_a_call_that_wants_more_tokens(
    engine_says: FinishReason, client_gets: FinishReason | None
) -> None:
    output = EngineCoreOutput("r~1", [5], finish_reason=engine_says, kv_transfer_params=PARAMS)
    first = first_output(output, last=False)
    assert (first.finish_reason, first.new_token_ids) == (client_gets, [5])
    assert first.kv_transfer_params is None, "handles are not the client's"


def test_a_prefill_leaves_the_request_as_it_was() -> None:
    """The same request is sent to the decode worker afterwards."""
    request = demanding_request()
    before = MsgpackEncoder().encode(request)
    prefill_request(request, "r", 1)
    decode_request(request, "r", 1, HANDLE)
    assert MsgpackEncoder().encode(request) == before


def test_two_prefills_do_not_share_what_an_engine_writes_into() -> None:
    one, other = (prefill_request(demanding_request(), name, 1) for name in ("a", "b"))
    extra, others = of_params(one).extra_args, of_params(other).extra_args
    assert extra is not None
    assert others is not None
    extra["kv_transfer_params"]["do_remote_decode"] = False
    assert others["kv_transfer_params"]["do_remote_decode"] is True


def result(
    finish: FinishReason | None, params: dict[str, Any] | None = None
) -> PrefillDone | CallFailed | None:
    output = EngineCoreOutput("r~1", [5], finish_reason=finish, kv_transfer_params=params)
    return prefill_result(output, "r", 1, "p0", 40, 16, 30.0, 1234.5)


@pytest.mark.parametrize("finish", [FinishReason.LENGTH, FinishReason.STOP])
def test_a_finished_prefill_is_a_handle_with_its_lease(finish: FinishReason) -> None:
    done = result(finish, PARAMS)
    assert isinstance(done, PrefillDone)
    assert handles.decode(done.handle) == HANDLE
    assert (done.request, done.attempt, done.incarnation) == ("r", 1, "p0")
    assert (done.prompt_tokens, done.cached_tokens) == (40, 16)
    assert (done.lease_s, done.margin_s, done.held_at_unix_s) == (30.0, 10.0, 1234.5)


def test_a_prefill_that_goes_on_says_nothing() -> None:
    assert result(None) is None


@pytest.mark.parametrize(
    "finish", [FinishReason.ABORT, FinishReason.ERROR, FinishReason.REPETITION]
)
def test_a_prefill_that_failed_may_be_tried_elsewhere(finish: FinishReason) -> None:
    failed = result(finish, PARAMS)
    assert isinstance(failed, CallFailed)
    assert failed.retryable
    assert str(finish) in failed.reason


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (None, "missing"),
        ({}, "missing"),
        ({**PARAMS, "remote_block_ids": [[]]}, "remote_block_ids"),
        ({**PARAMS, "remote_port": None}, "remote_port"),
        ({**PARAMS, "do_remote_prefill": False}, "do_remote_prefill"),
    ],
)
def test_a_prefill_without_a_usable_handle_failed(
    params: dict[str, Any] | None, reason: str
) -> None:
    failed = result(FinishReason.LENGTH, params)
    assert isinstance(failed, CallFailed)
    assert reason in failed.reason
    assert failed.retryable


# --- decoding -------------------------------------------------------------------------------------


def test_a_decode_reads_by_its_handle_and_by_nothing_a_client_sent() -> None:
    decode = decode_request(demanding_request(), "r", 2, HANDLE)
    assert (decode.request_id, decode.external_req_id) == ("r~2", "r~2")
    extra = of_params(decode).extra_args
    assert extra is not None
    assert extra["other"] == 1
    assert handles.from_params(extra["kv_transfer_params"]) == HANDLE


def test_a_local_decode_reads_nothing() -> None:
    decode = decode_request(demanding_request(), "r", 1, None)
    assert of_params(decode).extra_args == {"other": 1}


def test_a_decode_keeps_every_sampling_option() -> None:
    request = demanding_request()
    before, after = of_params(request), of_params(decode_request(request, "r", 1, HANDLE))
    for name in ("max_tokens", "min_tokens", "temperature", "top_p", "seed", "stop", "logprobs"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.structured_outputs == before.structured_outputs


@pytest.mark.parametrize("extra", [None, {}, {"kv_transfer_params": {"do_remote_decode": True}}])
def test_a_plain_request_has_no_extra_arguments(extra: dict[str, Any] | None) -> None:
    assert not of_params(decode_request(engine_request(extra_args=extra), "r", 1, None)).extra_args


def test_a_discarded_handle_is_a_request_that_ends_at_once() -> None:
    request = discard_request([0], "discard-r", 2, HANDLE)
    assert request.abort_immediately
    assert request.request_id == "discard-r~2"
    extra = of_params(request).extra_args
    assert extra is not None
    assert handles.from_params(extra["kv_transfer_params"]) == HANDLE


@pytest.mark.parametrize("make", [prefill_request, decode_request])
def test_requests_survive_the_wire(make: Any) -> None:
    """Encoded by the API process, decoded by the worker, then made into the engine's."""
    request = demanding_request()
    received = MsgpackDecoder(EngineCoreRequest).decode(MsgpackEncoder().encode(request))
    arguments = (HANDLE,) if make is decode_request else ()
    direct, over_the_wire = make(request, "r", 1, *arguments), make(received, "r", 1, *arguments)
    encode = MsgpackEncoder().encode
    assert encode(over_the_wire) == encode(direct)

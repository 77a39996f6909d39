"""What a worker does when it decodes: fetch a prompt's KV by its handle, or compute it.

Pure: requests and handles in, engine requests out. A handle is read at most once.
"""

from __future__ import annotations

from typing import Any

import msgspec
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from coordinator.protocol import Retain, engine_request_id
from transfer import handle as handles
from transfer.pins import order_params


def decode_request(
    request: EngineCoreRequest, call: str, attempt: int, handle: handles.Handle | None
) -> EngineCoreRequest:
    """The engine request that generates; with a handle, the engine pulls the prompt's KV.

    Nothing of a client's own ``kv_transfer_params`` survives.
    """
    params = request.sampling_params
    assert params is not None, "only generation requests are decoded"
    extra_args = {k: v for k, v in (params.extra_args or {}).items() if k != "kv_transfer_params"}
    if handle is not None:
        extra_args["kv_transfer_params"] = handles.to_params(handle)
    return _with_id(request, call, attempt, _with_extra_args(params, extra_args))


def discard_request(
    prompt_tokens: list[int], call: str, attempt: int, handle: handles.Handle
) -> EngineCoreRequest:
    """A request that is over at once: its only effect is that the handle's owner is told
    to free the blocks (vLLM's own way for requests refused after their prefill)."""
    return _order(prompt_tokens, call, attempt, handles.to_params(handle))


def retain_request(order: Retain, number: int) -> EngineCoreRequest:
    """A request that is over at once: its only effect is that the engine's connector keeps, or
    keeps no longer, what ended requests have left in the cache."""
    return _order([0], "retain", number, order_params(order))


def _order(
    prompt_tokens: list[int], call: str, attempt: int, params: dict[str, Any]
) -> EngineCoreRequest:
    request = EngineCoreRequest(
        request_id="",
        prompt_token_ids=prompt_tokens,
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": params}),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        abort_immediately=True,
    )
    assert request.sampling_params is not None
    return _with_id(request, call, attempt, request.sampling_params)


def _with_id(
    request: EngineCoreRequest, call: str, attempt: int, params: SamplingParams
) -> EngineCoreRequest:
    engine_id = engine_request_id(call, attempt)
    return msgspec.structs.replace(
        request, request_id=engine_id, external_req_id=engine_id, sampling_params=params
    )


def _with_extra_args(params: SamplingParams, extra_args: dict[str, object]) -> SamplingParams:
    if not extra_args and params.extra_args is None:
        return params
    changed = params.clone()
    changed.extra_args = extra_args or None
    return changed

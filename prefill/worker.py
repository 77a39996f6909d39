"""What a worker does when it prefills: compute a prompt's KV, hold it, name it.

The prompt runs through the engine as a request for one token whose KV is kept for
someone else to read (vLLM's ``do_remote_decode``). Where that token may be the client's
first one, it is sampled as the client asked and sent along; else it is thrown away and the
decode worker samples the first one. Where a peer has cached how the prompt begins, its handle comes
along, and that much is read before the rest is computed. That peer, for its part, is asked to
compute nothing, and to hold what it has. Pure: requests in, requests or messages out.
"""

from __future__ import annotations

from typing import Any

import msgspec
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from coordinator.protocol import CallFailed, PrefillDone, engine_request_id
from transfer import handle as handles
from transfer.settings import CACHED_ONLY, dispatch_margin_s

HOLD = {"do_remote_decode": True, "do_remote_prefill": False}


def prefill_request(
    request: EngineCoreRequest,
    call: str,
    attempt: int,
    first_token: bool = False,
    handle: handles.Handle | None = None,
    cached_only: bool = False,
) -> EngineCoreRequest:
    """The engine request that computes ``request``'s prompt and holds its KV.

    ``handle``: what is read of it first; ``cached_only``: nothing is computed, what is cached is
    held (see ``transfer.connector``). With ``first_token`` it samples as ``request`` says.
    Otherwise sampling options, stops and grammars stay behind: they concern tokens, and no token
    is wanted. What shapes the KV stays: prompt, adapter, salt, images.
    """
    transfer: dict[str, Any] = dict(HOLD)
    if handle is not None:
        transfer = {**handles.to_params(handle), "do_remote_decode": True}
    if cached_only:
        transfer[CACHED_ONLY] = True
    params = _first_token_params(request, transfer) if first_token else _no_token_params(transfer)
    return msgspec.structs.replace(
        request,
        request_id=engine_request_id(call, attempt),
        external_req_id=engine_request_id(call, attempt),
        sampling_params=params,
    )


def _no_token_params(transfer: dict[str, Any]) -> SamplingParams:
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={"kv_transfer_params": transfer},
    )


def _first_token_params(request: EngineCoreRequest, transfer: dict[str, Any]) -> SamplingParams:
    """One token, as the client wants it. KV is held only if more are to come."""
    params = request.sampling_params
    assert params is not None, "only generation requests are prefilled"
    changed = params.clone()
    extra: dict[str, Any] = dict(params.extra_args or {})
    extra.pop("kv_transfer_params", None)
    if params.max_tokens == 1:
        transfer = {**transfer, "do_remote_decode": False}
    if transfer["do_remote_decode"] or transfer["do_remote_prefill"]:
        extra["kv_transfer_params"] = transfer
    changed.extra_args = extra or None
    changed.max_tokens = 1
    changed.min_tokens = min(1, params.min_tokens)
    return changed


def prefill_result(
    output: EngineCoreOutput,
    call: str,
    attempt: int,
    incarnation: str,
    prompt_tokens: int,
    cached_tokens: int,
    lease_s: float,
    unix_s: float,
    last: bool = False,
    moved_tokens: int = 0,
) -> PrefillDone | CallFailed | None:
    """What to answer the API process after a step, or None if the prefill goes on.

    ``cached_tokens`` is what the engine did not compute of the prompt, ``moved_tokens`` of these
    what it has read from another one; ``unix_s``
    is the wall clock, from which the lease counts. ``last``: nothing is held, as the first
    token is the only one.
    """
    if output.finish_reason is None:
        return None
    if output.finish_reason not in (FinishReason.LENGTH, FinishReason.STOP):
        return CallFailed(call, attempt, incarnation, f"prefill ended with {output.finish_reason}")
    frame = b""
    if not last:
        try:
            frame = handles.encode(handles.from_params(output.kv_transfer_params or {}))
        except handles.HandleError as error:
            reason = f"prefill gave no usable handle: {error}"
            return CallFailed(call, attempt, incarnation, reason)
    return PrefillDone(
        call,
        attempt,
        incarnation,
        handle=frame,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        lease_s=lease_s,
        held_at_unix_s=unix_s,
        margin_s=dispatch_margin_s(lease_s),
        moved_tokens=moved_tokens,
    )


def first_output(output: EngineCoreOutput, last: bool) -> EngineCoreOutput:
    """What the client is to get of a prefill that sampled the first token.

    The engine ended for length, one token being all that it was asked for; only if it is also
    the ``last`` one the client was to get, is that the client's end.
    """
    reason = output.finish_reason
    if reason == FinishReason.LENGTH and not last:
        reason = None
    return msgspec.structs.replace(output, finish_reason=reason, kv_transfer_params=None)

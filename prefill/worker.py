"""What a worker does when it prefills: compute a prompt's KV, hold it, name it.

The prompt runs through the engine as a request for one token whose KV is kept for
someone else to read (vLLM's ``do_remote_decode``). The token itself is thrown away:
the decode worker samples the first one. Pure: requests in, requests or messages out.
"""

from __future__ import annotations

import msgspec
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from coordinator.protocol import CallFailed, PrefillDone, engine_request_id
from transfer import handle as handles
from transfer.settings import dispatch_margin_s

HOLD = {"do_remote_decode": True, "do_remote_prefill": False}


def prefill_request(request: EngineCoreRequest, call: str, attempt: int) -> EngineCoreRequest:
    """The engine request that computes ``request``'s prompt and holds its KV.

    Sampling options, stops and grammars stay behind: they concern tokens, and no token
    is wanted. What shapes the KV stays: prompt, adapter, salt, images.
    """
    return msgspec.structs.replace(
        request,
        request_id=engine_request_id(call, attempt),
        external_req_id=engine_request_id(call, attempt),
        sampling_params=SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"kv_transfer_params": dict(HOLD)},
        ),
    )


def prefill_result(
    output: EngineCoreOutput,
    call: str,
    attempt: int,
    incarnation: str,
    prompt_tokens: int,
    cached_tokens: int,
    lease_s: float,
    unix_s: float,
) -> PrefillDone | CallFailed | None:
    """What to answer the API process after a step, or None if the prefill goes on.

    ``cached_tokens`` is what the engine's own prefix cache held of the prompt; ``unix_s``
    is the wall clock, from which the lease counts.
    """
    if output.finish_reason is None:
        return None
    if output.finish_reason not in (FinishReason.LENGTH, FinishReason.STOP):
        return CallFailed(call, attempt, incarnation, f"prefill ended with {output.finish_reason}")
    try:
        handle = handles.from_params(output.kv_transfer_params or {})
    except handles.HandleError as error:
        return CallFailed(call, attempt, incarnation, f"prefill gave no usable handle: {error}")
    return PrefillDone(
        call,
        attempt,
        incarnation,
        handle=handles.encode(handle),
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        lease_s=lease_s,
        held_at_unix_s=unix_s,
        margin_s=dispatch_margin_s(lease_s),
    )

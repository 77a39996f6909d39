"""What of a request may go on, or begin, on another engine than the one that began it.

An engine knows generated tokens as such: it counts and constrains them, and draws them from
the request's own generator. Behind a prompt on another engine they are prompt. Where that
would change the answer, a request is kept whole. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from vllm.sampling_params import SamplingParams, SamplingType
from vllm.v1.engine import EngineCoreRequest


def needs_one_worker(request: EngineCoreRequest) -> bool:
    """Whether the prompt has to be computed where the answer is generated.

    Prompt logprobs are a by-product of computing the prompt, so KV from elsewhere would
    lose them; embeddings given instead of tokens do not name a prefix.
    """
    params = request.sampling_params
    assert params is not None
    return (
        params.prompt_logprobs is not None
        or getattr(params, "prompt_logprob_token_ids", None) is not None
        or request.prompt_embeds is not None
        or request.resumable
    )


def resume_request(request: EngineCoreRequest, tokens: Sequence[int]) -> EngineCoreRequest | None:
    """The request that goes on behind ``tokens``; None where that would change the answer.

    What counts or constrains generated tokens as such starts afresh on another engine:
    grammars and output penalties. Those calls can't go on.
    """
    params = request.sampling_params
    assert params is not None
    if not _is_resumable(params) or request.prompt_token_ids is None:
        return None
    changed = params.clone()
    if changed.max_tokens is not None:
        changed.max_tokens -= len(tokens)
    changed.min_tokens = max(0, changed.min_tokens - len(tokens))
    return msgspec.structs.replace(
        request,
        prompt_token_ids=[*request.prompt_token_ids, *tokens],
        sampling_params=changed,
    )


def may_begin_elsewhere(request: EngineCoreRequest) -> bool:
    """Whether whoever prefills may sample the first token, the rest coming from another engine.

    As a request that goes on; and a seed's draws would begin anew with the second token.
    """
    params = request.sampling_params
    assert params is not None
    return _is_resumable(params) and params.sampling_type != SamplingType.RANDOM_SEED


def _is_resumable(params: SamplingParams) -> bool:
    return (
        params.structured_outputs is None
        and not params.presence_penalty
        and not params.frequency_penalty
        and params.repetition_penalty in (0.0, 1.0)
        and params.prompt_logprobs is None
        and getattr(params, "repetition_detection", None) is None
        and not getattr(params, "thinking_token_budget", None)
        and not params.bad_words
    )

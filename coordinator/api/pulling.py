"""What a peer is asked when its cache is to be read from, and what its answer is good for. Pure."""

from __future__ import annotations

from typing import Any

import msgspec
from vllm.v1.engine import EngineCoreRequest

from coordinator.protocol import PrefillDone


def pull_request(
    request: EngineCoreRequest, tokens: int, block_size: int
) -> EngineCoreRequest | None:
    """The request whose cached beginning a peer is to hold: ``tokens`` of the prompt and one more.

    What shapes its KV stays: adapter, salt, images. An image is taken whole or not at all.
    None where nothing is left to ask for.
    """
    prompt = request.prompt_token_ids
    if prompt is None or request.prompt_embeds is not None or not block_size:
        return None
    features: list[Any] = list(request.mm_features or ())
    tokens = _before_images(features, min(tokens, len(prompt) - 1), block_size)
    if tokens <= 0:
        return None
    whole = [each for each in features if each.mm_position.offset <= tokens]
    return msgspec.structs.replace(
        request,
        prompt_token_ids=prompt[: tokens + 1],
        mm_features=whole if request.mm_features is not None else None,
    )


def _before_images(features: list[Any], tokens: int, block_size: int) -> int:
    """Whole blocks of at most so many tokens, behind which, and a token more, no image goes on."""
    while tokens > 0:
        tokens -= tokens % block_size
        cut = [
            place.offset
            for place in (feature.mm_position for feature in features)
            if place.offset <= tokens < place.offset + place.length - 1
        ]
        if not cut:
            break
        tokens = min(cut) - 1
    return tokens


def tokens_held(done: PrefillDone, block_size: int) -> int:
    """How much of what was asked for a peer had cached and holds: whole blocks."""
    if not done.handle or not block_size:
        return 0
    tokens = min(done.cached_tokens, done.prompt_tokens - 1)
    return max(0, tokens - tokens % block_size)

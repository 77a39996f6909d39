"""What engines have in their prefix caches is what the core goes by."""

from __future__ import annotations

import uuid

import httpx

from tests.e2e.harness import (
    BLOCK_TOKENS,
    MODEL,
    REMOTE_MIN_TOKENS,
    Control,
    wait_for,
)

PROMPT_TOKENS = 2 * BLOCK_TOKENS + 10
OUTPUT_TOKENS = 2 * BLOCK_TOKENS + 10
KNOWN_S = 10.0
MORE_TOKENS = REMOTE_MIN_TOKENS + 2 * BLOCK_TOKENS


def fresh_tokens(count: int) -> list[int]:
    """Tokens that no cache has seen."""
    found: list[int] = []
    while len(found) < count:
        found += [300 + byte for byte in uuid.uuid4().bytes]
    return found[:count]


def test_what_an_engine_has_generated_is_known_to_be_there(
    control: Control, http: httpx.Client
) -> None:
    prompt = fresh_tokens(PROMPT_TOKENS)
    body = {"model": MODEL, "return_token_ids": True, "temperature": 0.0}
    first = http.post(
        "/v1/completions",
        json={**body, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True},
    )
    worker = first.headers["X-Pythia-Decode"]
    whole = prompt + first.json()["choices"][0]["token_ids"]
    # The last token was never an input: it has no KV.
    known = (len(whole) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert known > PROMPT_TOKENS
    expected = f"remote: {len(whole) + MORE_TOKENS - known} tokens not cached on {worker}"

    def is_known() -> bool:
        """Another call goes on behind the answer; what does the core count on?"""
        request = f"known-{uuid.uuid4().hex}"
        more = whole + fresh_tokens(MORE_TOKENS)
        http.post(
            "/v1/completions",
            json={**body, "prompt": more, "max_tokens": 1},
            headers={"X-Request-Id": request},
        ).raise_for_status()
        return control.find_call(request).reason == expected

    wait_for(is_known, KNOWN_S, f"a plan that says {expected!r}")


def test_what_engines_say_of_their_caches_is_heard_in_order(control: Control) -> None:
    counters = control.snapshot().counters
    assert counters["kv_changes"] > 0
    assert counters["kv_resyncs"] == 0

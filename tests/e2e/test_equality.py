"""The cluster says what one plain engine says, token for token, wherever it prefilled.

Every case goes to the cluster and to the oracle, a plain vLLM server with the same model
and engine arguments. Compared are token ids, text, finish reason and log probabilities.
Cases with ``remote_tokens`` must have moved exactly that many tokens by NIXL. That they were
not computed again on the decode worker is proved with vLLM's own counters.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

import httpx
import pytest

from tests.e2e.cases import CASES, Case, completion, random_prompt
from tests.e2e.harness import (
    BEATS_S,
    BLOCK_TOKENS,
    MODEL,
    Control,
    Server,
    decode_totals,
    prompt_tokens_by_source,
    wait_for,
)

LOGPROB_TOLERANCE = 2e-3


def ask(server: Server, case: Case, headers: dict[str, str] | None = None) -> httpx.Response:
    body = {"model": MODEL, "return_token_ids": True, **case.body}
    with server.http() as client:
        response = client.post(case.path, json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response


def said(response: httpx.Response) -> dict[str, Any]:
    """Everything in an answer that must be equal."""
    answer = response.json()
    choice = answer["choices"][0]
    return {
        "prompt_token_ids": choice.get("prompt_token_ids") or answer.get("prompt_token_ids"),
        "token_ids": choice["token_ids"],
        "text": choice.get("text", choice.get("message", {}).get("content")),
        "tool_calls": [
            call["function"] for call in choice.get("message", {}).get("tool_calls", [])
        ],
        "finish_reason": choice["finish_reason"],
        "stop_reason": choice["stop_reason"],
        "prompt_tokens": answer["usage"]["prompt_tokens"],
        "completion_tokens": answer["usage"]["completion_tokens"],
    }


def scores(response: httpx.Response) -> list[float]:
    """The log probability of every token of the answer and of its best alternatives."""
    logprobs = response.json()["choices"][0]["logprobs"]
    if "token_logprobs" in logprobs:
        tops = [value for top in logprobs["top_logprobs"] for value in sorted(top.values())]
        return [*logprobs["token_logprobs"], *tops]
    found = []
    for entry in logprobs["content"]:
        found += [entry["logprob"], *sorted(top["logprob"] for top in entry["top_logprobs"])]
    return found


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60
    assert sum(bool(case.remote_tokens) for case in CASES) >= 30


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cluster_says_what_one_engine_says(cluster: Server, oracle: Server, case: Case) -> None:
    ours, theirs = ask(cluster, case), ask(oracle, case)
    assert said(ours) == said(theirs)
    pairs = list(zip(scores(ours), scores(theirs), strict=True))
    assert max(abs(one - other) for one, other in pairs) < LOGPROB_TOLERANCE
    if case.remote_tokens is not None and cluster.control_address:
        assert ours.headers["X-Pythia-Moved-Tokens"] == str(case.remote_tokens)
        split = ours.headers["X-Pythia-Prefill"] != ours.headers["X-Pythia-Decode"]
        assert split == bool(case.remote_tokens)


@pytest.mark.parametrize("tokens", [100, 128, 129, 1000, 2000])
def test_moved_tokens_are_not_computed_again(
    cluster: Server, control: Control, decode_metrics: list[str], tokens: int
) -> None:
    """Counted three ways: by vLLM's own metrics, by the workers' beats, and by the call."""
    mine = f"moved-{uuid.uuid4().hex}"
    case = completion(mine, random_prompt(uuid.uuid4().int, tokens))
    control.wait_until_quiet()
    time.sleep(BEATS_S)
    moved_before, computed_before = decode_totals(control.snapshot())
    metrics_before = prompt_tokens_by_source(decode_metrics)
    response = ask(cluster, case, {"X-Request-Id": mine})
    call = control.find_call(mine)
    metrics = prompt_tokens_by_source(decode_metrics)
    moved, computed = wait_for(
        lambda: _totals_after(control, moved_before), BEATS_S, "a beat that tells of moved tokens"
    )
    assert (call.prefill, call.prompt_tokens, call.local_cached_tokens) == ("prefill-0", tokens, 0)
    assert call.decode == response.headers["X-Pythia-Decode"]
    # The first output token needs the last prompt token's activations, not only its KV.
    assert tokens - 1 <= call.moved_tokens <= tokens
    assert moved - moved_before == call.moved_tokens
    # The decode worker's own part of a moved prompt is its last token at most.
    assert computed - computed_before <= 1
    source = "external_kv_transfer"
    assert metrics[source] - metrics_before[source] == call.moved_tokens
    assert metrics["local_compute"] - metrics_before["local_compute"] <= 1


def _totals_after(control: Control, moved_before: int) -> tuple[int, int] | None:
    totals = decode_totals(control.wait_until_quiet())
    return totals if totals[0] > moved_before else None


def test_what_the_decode_worker_has_does_not_move_again(cluster: Server, control: Control) -> None:
    """A conversation that grows: a turn pulls only what its decode worker has not got."""
    history = random_prompt(uuid.uuid4().int, 20 * BLOCK_TOKENS)
    grown = history + random_prompt(uuid.uuid4().int, 5 * BLOCK_TOKENS)
    calls = []
    for prompt in (history, grown, grown, grown):
        mine = f"grown-{uuid.uuid4().hex}"
        ask(cluster, completion(mine, prompt), {"X-Request-Id": mine})
        call = control.find_call(mine)
        assert call.local_cached_tokens % BLOCK_TOKENS == 0
        if call.prefill:
            assert len(prompt) - 1 <= call.moved_tokens + call.local_cached_tokens <= len(prompt)
        calls.append(call)
    assert calls[0].moved_tokens >= len(history) - 1
    # Two decode workers: one of the last two turns went where the whole prompt was.
    assert min(call.moved_tokens for call in calls[2:]) == 0
    assert max(call.local_cached_tokens for call in calls[2:]) >= len(grown) - BLOCK_TOKENS

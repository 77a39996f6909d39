"""What surrounds the answers: health, versions, metrics, identities, and who served a call."""

from __future__ import annotations

import json
import uuid

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.harness import MODEL, REMOTE_MIN_TOKENS, Control, Server

KV_FREED_S = 8.0
"""Less than any lease: what is not needed is given back, not waited for."""
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


def fresh_prompt(tokens: int) -> list[int]:
    """A prompt that no worker has in its cache."""
    return [300 + byte for byte in (uuid.uuid4().bytes * (tokens // 16 + 1))[:tokens]]


@pytest.mark.parametrize("path", ["/health", "/live", "/ready", "/ping", "/version", "/metrics"])
def test_open_to_everybody(cluster: Server, path: str) -> None:
    assert httpx.get(f"{cluster.base_url}{path}").status_code == 200


def test_version_is_the_engines(cluster: Server, oracle: Server) -> None:
    answers = [httpx.get(f"{server.base_url}/version").json() for server in (cluster, oracle)]
    assert answers[0]["version"] == answers[1]["version"]


def test_metrics_count_requests(cluster: Server, http: httpx.Client) -> None:
    def served() -> float:
        page = httpx.get(f"{cluster.base_url}/metrics").text
        return sum(
            float(sample.value)
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == "vllm:request_success_total"
        )

    before = served()
    body = {"model": MODEL, "prompt": "Once.", "max_tokens": 1}
    http.post("/v1/completions", json=body).raise_for_status()
    assert served() >= before + 1


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_request_id_and_trace_are_echoed(http: httpx.Client, path: str, stream: bool) -> None:
    mine = f"mine-{uuid.uuid4().hex}"
    body = {"model": MODEL, "max_tokens": 1, "stream": stream}
    body |= {"prompt": "x"} if path == "/v1/completions" else {"messages": [_user("x")]}
    response = http.post(
        path, json=body, headers={"X-Request-Id": mine, "traceparent": TRACEPARENT}
    )
    response.raise_for_status()
    assert response.headers["X-Request-Id"] == mine
    assert TRACE_ID in response.headers["traceparent"]
    if not stream:
        assert mine in response.json()["id"]


def test_request_id_is_made_where_there_is_none(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    answers = [http.post("/v1/completions", json=body) for _ in range(2)]
    ids = {answer.headers["X-Request-Id"] for answer in answers}
    assert len(ids) == 2
    assert all(ids)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_long_prompt_names_both_workers(http: httpx.Client, control: Control, stream: bool) -> None:
    mine = f"mine-{uuid.uuid4().hex}"
    body = {
        "model": MODEL,
        "prompt": fresh_prompt(400),
        "max_tokens": 2,
        "temperature": 0,
        "stream": stream,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    response = http.post("/v1/completions", json=body, headers={"X-Request-Id": mine})
    response.raise_for_status()
    assert response.headers["X-Pythia-Prefill"] == "prefill-0"
    assert response.headers["X-Pythia-Decode"] in {"decode-0", "decode-1"}
    assert response.headers["X-Pythia-Cached-Tokens"] == "0"
    if stream:
        # The head left with the first token, before the KV had moved.
        assert "X-Pythia-Moved-Tokens" not in response.headers
        usage = json.loads(response.text.split("\n\n")[-3].removeprefix("data: "))["usage"]
        assert usage["prompt_tokens_details"]["moved_tokens"] == 400
    else:
        assert response.headers["X-Pythia-Moved-Tokens"] == "400"
    call = control.find_call(mine)
    assert call.prefill == "prefill-0"
    assert call.decode == response.headers["X-Pythia-Decode"]
    assert (call.prompt_tokens, call.output_tokens, call.moved_tokens) == (400, 2, 400)


def test_an_answer_of_one_token_needs_no_decode_worker(
    http: httpx.Client, control: Control
) -> None:
    """As classifiers and routers ask: the prefill worker says it, and no KV is moved or held."""
    mine = f"mine-{uuid.uuid4().hex}"
    prompt = fresh_prompt(400)
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1}
    response = http.post("/v1/completions", json=body, headers={"X-Request-Id": mine})
    response.raise_for_status()
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == 1
    for header in ("X-Pythia-Prefill", "X-Pythia-Decode"):
        assert response.headers[header] == "prefill-0"
    assert response.headers["X-Pythia-Moved-Tokens"] == "0"
    call = control.find_call(mine)
    assert (call.output_tokens, call.moved_tokens, call.outcome) == (1, 0, "length")
    control.wait_until_quiet(KV_FREED_S)

    # Nothing of the prompt is believed to be on a decode worker now.
    again = http.post("/v1/completions", json={**body, "max_tokens": 2})
    assert again.headers["X-Pythia-Moved-Tokens"] == "400"
    assert again.json()["choices"][0]["text"].startswith(choice["text"])


def test_an_answer_that_stops_with_its_first_token_is_over(
    http: httpx.Client, control: Control
) -> None:
    prompt = fresh_prompt(400)
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 3, "temperature": 0}
    asked = {**body, "return_token_ids": True}
    first, *_ = http.post("/v1/completions", json=asked).json()["choices"][0]["token_ids"]
    mine = f"mine-{uuid.uuid4().hex}"
    stopped = http.post(
        "/v1/completions",
        json={**asked, "stop_token_ids": [first], "cache_salt": mine},
        headers={"X-Request-Id": mine},
    ).json()["choices"][0]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", first)
    call = control.find_call(mine)
    assert (call.prefill, call.output_tokens, call.moved_tokens) == ("prefill-0", 1, 0)
    control.wait_until_quiet(KV_FREED_S)


def test_short_prompt_is_served_by_one_worker(http: httpx.Client, control: Control) -> None:
    mine = f"mine-{uuid.uuid4().hex}"
    prompt = fresh_prompt(REMOTE_MIN_TOKENS // 2)
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 2}
    response = http.post("/v1/completions", json=body, headers={"X-Request-Id": mine})
    assert response.headers["X-Pythia-Decode"] in {"decode-0", "decode-1"}
    assert response.headers["X-Pythia-Prefill"] == response.headers["X-Pythia-Decode"]
    assert response.headers["X-Pythia-Moved-Tokens"] == "0"
    call = control.find_call(mine)
    assert call.prefill == ""
    assert call.moved_tokens == 0


@pytest.mark.parametrize(
    "extra",
    [{"n": 2, "seed": 1}, {"prompt_logprobs": 1}, {"echo": True, "logprobs": 1}],
    ids=str,
)
def test_what_cannot_be_split_is_served_by_one_worker(
    http: httpx.Client, control: Control, extra: dict[str, int]
) -> None:
    mine = f"mine-{uuid.uuid4().hex}"
    body = {"model": MODEL, "prompt": fresh_prompt(400), "max_tokens": 2, **extra}
    response = http.post("/v1/completions", json=body, headers={"X-Request-Id": mine})
    response.raise_for_status()
    assert response.headers["X-Pythia-Prefill"] == response.headers["X-Pythia-Decode"]
    assert len(set(response.headers["X-Pythia-Decode"].split(","))) == 1
    assert control.find_call(mine).prefill == ""


def test_identity_is_recorded_from_the_body(client: openai.OpenAI, control: Control) -> None:
    mine = f"mine-{uuid.uuid4().hex}"
    who = {"name": "research", "run": "run-7", "agent": "engineer", "parent": "planner"}
    client.chat.completions.create(
        model=MODEL,
        messages=[_user("x")],
        max_tokens=1,
        extra_headers={"X-Request-Id": mine},
        extra_body={"workflow": {**who, "final": True}},
    )
    context = control.find_call(mine).context
    assert (context.workflow, context.run, context.agent, context.parent, context.final) == (
        *who.values(),
        True,
    )


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages"])
def test_identity_is_recorded_from_headers(http: httpx.Client, control: Control, path: str) -> None:
    mine = f"mine-{uuid.uuid4().hex}"
    body = {"model": MODEL, "max_tokens": 1}
    body |= {"prompt": "x"} if path == "/v1/completions" else {"messages": [_user("x")]}
    headers = {
        "X-Request-Id": mine,
        "X-Workflow": "research",
        "X-Workflow-Run": "run-8",
        "X-Workflow-Agent": "explorer",
        "X-Workflow-Parent": "planner",
    }
    http.post(path, json=body, headers=headers).raise_for_status()
    context = control.find_call(mine).context
    assert (context.workflow, context.run, context.agent, context.parent, context.final) == (
        "research",
        "run-8",
        "explorer",
        "planner",
        False,
    )


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}

"""Bad input: a 4xx in OpenAI's error shape (Anthropic's for messages), and nothing started."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.e2e.harness import BEATS_S, BODY_BYTES_MAX, MAX_MODEL_LEN, MODEL, Control, Server

HELLO = [{"role": "user", "content": "Who goes first?"}]
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": MODEL, "messages": HELLO, "max_tokens": 2},
    "/v1/completions": {"model": MODEL, "prompt": "Who goes first?", "max_tokens": 2},
    "/v1/responses": {"model": MODEL, "input": "Who goes first?", "max_output_tokens": 2},
    "/v1/messages": {"model": MODEL, "messages": HELLO, "max_tokens": 2},
}
JSON = {"Content-Type": "application/json"}
EMPTY_ANSWER = {
    "type": "message",
    "role": "assistant",
    "status": "in_progress",
    "content": [],
    "id": "message-1",
}
HANDLE = {
    "do_remote_prefill": True,
    "remote_engine_id": "someone-elses",
    "remote_block_ids": [[1, 2, 3]],
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
}


def assert_error(response: httpx.Response, status: int) -> dict[str, Any]:
    """Checks status and shape; returns the error object."""
    assert response.status_code == status, response.text
    body = response.json()
    error = body["error"]
    assert isinstance(error, dict), body
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    if body.get("type") != "error":
        assert {"message", "type", "param", "code"} <= set(error), error
        assert str(error["code"]) == str(status) or isinstance(error["code"], str)
    return dict(error)


@pytest.fixture(scope="module", autouse=True)
def _nothing_started(request: pytest.FixtureRequest, cluster: Server) -> Iterator[None]:
    """After all of the bad input no worker has computed a token for it, and no call is left."""
    if not cluster.control_address:
        yield
        return
    control: Control = request.getfixturevalue("control")
    before = _work_done(control)
    yield
    assert _work_done(control) == before


def _work_done(control: Control) -> dict[str, tuple[int, int, int]]:
    control.wait_until_quiet()
    time.sleep(BEATS_S)
    return {
        worker.worker: (
            worker.load.prefill_tokens_total,
            worker.load.external_tokens_total,
            worker.load.decode_tokens_total,
        )
        for worker in control.snapshot().workers
    }


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(
    "content",
    [b'{"model": ', b"[1]", b"", b"null", b'{"model": "\xff"}', b'"' * 3, b"{" * 2000],
    ids=["cut", "array", "empty", "null", "not-utf8", "quotes", "deep"],
)
def test_malformed_json(http: httpx.Client, path: str, content: bytes) -> None:
    assert_error(http.post(path, content=content, headers=JSON), 400)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_wrong_content_type(http: httpx.Client, path: str) -> None:
    content = json.dumps(ENDPOINTS[path]).encode()
    assert_error(http.post(path, content=content, headers={"Content-Type": "text/plain"}), 400)


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("model", ["gpt-9", "tiny-llama-lora", "../../etc/passwd"])
def test_unknown_model_or_adapter(http: httpx.Client, path: str, model: str) -> None:
    assert_error(http.post(path, json={**ENDPOINTS[path], "model": model}), 404)


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1},
        {"temperature": 1e9},
        {"top_p": 7},
        {"top_p": "a lot"},
        {"stream": "perhaps"},
    ],
    ids=str,
)
def test_absurd_sampling(http: httpx.Client, path: str, change: dict[str, Any]) -> None:
    assert_error(http.post(path, json={**ENDPOINTS[path], **change}), 400)


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("limit", [-1, 0, 10**9, "ten"])
def test_absurd_output_limit(http: httpx.Client, path: str, limit: int | str) -> None:
    field = "max_output_tokens" if "responses" in path else "max_tokens"
    assert_error(http.post(path, json={**ENDPOINTS[path], field: limit}), 400)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_not_a_number(http: httpx.Client, path: str) -> None:
    body = json.dumps({**ENDPOINTS[path], "temperature": float("nan")}).encode()
    assert_error(http.post(path, content=body, headers=JSON), 400)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    "change",
    [{"n": 0}, {"n": -2}, {"n": 10**6}, {"seed": 2**70}, {"min_tokens": -1}, {"stop": [""]}],
    ids=str,
)
def test_absurd_parameters(http: httpx.Client, path: str, change: dict[str, Any]) -> None:
    assert_error(http.post(path, json={**ENDPOINTS[path], **change}), 400)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": []},
        {"prompt": ""},
        {"prompt": [10**8]},
        {"prompt": [-1]},
        {"logprobs": 10_000},
        {"structured_outputs": {"regex": "(((("}},
        {"structured_outputs": {"json": {"type": "nonsense"}}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
    ],
    ids=str,
)
def test_absurd_completion(http: httpx.Client, change: dict[str, Any]) -> None:
    assert_error(http.post("/v1/completions", json={**ENDPOINTS["/v1/completions"], **change}), 400)


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": [{"role": 5}]},
        {"messages": "hello"},
        {"top_logprobs": 3},
        {"tool_choice": "required"},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}}],
                }
            ]
        },
    ],
    ids=str,
)
def test_absurd_chat(http: httpx.Client, change: dict[str, Any]) -> None:
    path = "/v1/chat/completions"
    assert_error(http.post(path, json={**ENDPOINTS[path], **change}), 400)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_prompt_longer_than_the_model(http: httpx.Client, path: str) -> None:
    words = "word " * (2 * MAX_MODEL_LEN)
    body = dict(ENDPOINTS[path])
    field = next(name for name in ("messages", "prompt", "input") if name in body)
    body[field] = [{"role": "user", "content": words}] if field == "messages" else words
    assert_error(http.post(path, json=body), 400)


@pytest.mark.parametrize("path", [*ENDPOINTS, "/v1/chat/completions/batch"])
@pytest.mark.parametrize("handle", [HANDLE, {"do_remote_decode": True}], ids=["read", "hold"])
def test_clients_may_not_send_handles(
    http: httpx.Client, path: str, handle: dict[str, Any]
) -> None:
    body = dict(ENDPOINTS.get(path, ENDPOINTS["/v1/chat/completions"]))
    if path.endswith("batch"):
        body["messages"] = [HELLO, HELLO]
    error = assert_error(http.post(path, json={**body, "kv_transfer_params": handle}), 400)
    assert "kv_transfer_params" in error["message"]


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("value", ["x", ["do_remote_prefill", 1], HANDLE], ids=["s", "list", "map"])
def test_clients_may_not_smuggle_handles(http: httpx.Client, path: str, value: Any) -> None:
    body = {**ENDPOINTS[path], "vllm_xargs": {"kv_transfer_params": value}}
    assert_error(http.post(path, json=body), 400)


@pytest.mark.parametrize("path", [*ENDPOINTS, "/tokenize"])
@pytest.mark.parametrize("declared", [True, False], ids=["with-length", "chunked"])
def test_oversized_body(http: httpx.Client, path: str, declared: bool) -> None:
    body = json.dumps({**ENDPOINTS.get(path, {}), "user": "x" * BODY_BYTES_MAX}).encode()
    pieces = (body[start : start + 65536] for start in range(0, len(body), 65536))
    response = http.post(path, content=body if declared else pieces, headers=JSON)
    assert_error(response, 413)


@pytest.mark.parametrize("path", [*ENDPOINTS, "/v1/models"])
@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Basic c2VjcmV0", "Bearer"], ids=["none", "wrong", "b", "e"]
)
def test_wrong_api_key(cluster: Server, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    if path in ENDPOINTS:
        response = httpx.post(f"{cluster.base_url}{path}", json=ENDPOINTS[path], headers=headers)
    else:
        response = httpx.get(f"{cluster.base_url}{path}", headers=headers)
    assert_error(response, 401)


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/v1/completions", {"structured_outputs": True}),
        ("/v1/responses", {"input": [EMPTY_ANSWER]}),
        ("/v1/responses", {"stream": True, "background": None}),
    ],
    ids=["constraint", "answer", "background"],
)
def test_what_a_plain_server_stumbles_over(
    http: httpx.Client, path: str, change: dict[str, Any]
) -> None:
    """Found by fuzzing: 500 or a broken connection in vLLM 0.32."""
    assert_error(http.post(path, json={**ENDPOINTS[path], **change}), 400)


def test_unknown_path_and_method(http: httpx.Client) -> None:
    assert_error(http.get("/v1/oracles"), 404)
    assert_error(http.get("/v1/completions"), 405)
    assert_error(http.get("/v1/responses/resp_of_nobody"), 404)


def test_streams_refuse_before_they_start(http: httpx.Client) -> None:
    for path, body in ENDPOINTS.items():
        assert_error(http.post(path, json={**body, "stream": True, "temperature": -1}), 400)


@pytest.mark.parametrize(
    ("provoke", "expected"),
    [
        (lambda c: c.completions.create(model="gpt-9", prompt="x"), openai.NotFoundError),
        (
            lambda c: c.completions.create(model=MODEL, prompt="x", temperature=-1),
            openai.BadRequestError,
        ),
        (
            lambda c: c.with_options(api_key="wrong").models.list(),
            openai.AuthenticationError,
        ),
    ],
    ids=["404", "400", "401"],
)
def test_openai_client_raises_its_own_errors(
    client: openai.OpenAI,
    provoke: Callable[[openai.OpenAI], Any],
    expected: type[openai.APIStatusError],
) -> None:
    with pytest.raises(expected) as caught:
        provoke(client)
    assert caught.value.type


def test_anthropic_client_raises_its_own_errors(claude_client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        claude_client.messages.create(
            model="claude-9", max_tokens=2, messages=[{"role": "user", "content": "x"}]
        )
    with pytest.raises(anthropic.AuthenticationError):
        claude_client.with_options(auth_token="wrong").messages.create(
            model=MODEL, max_tokens=2, messages=[{"role": "user", "content": "x"}]
        )

"""The outermost HTTP layer, around small apps that behave like vLLM's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from openai.types.responses import ResponseErrorEvent

from coordinator.api.exchange import (
    CallRecord,
    Continuation,
    Exchange,
    Failure,
    current_exchange,
)
from coordinator.api.front import HELD_CHUNKS_MAX, Front

BODY_MAX = 1000
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]


def started_call(name: str = "r") -> CallRecord:
    record = CallRecord(name, prefill="prefill-0", decode="decode-0", started=True)
    record.prefill_cached_tokens, record.moved_tokens, record.moved = 32, 64, True
    return record


def exchange_now() -> Exchange:
    exchange = current_exchange.get()
    assert exchange is not None
    return exchange


async def start(send: Send, status: int = 200, **headers: str) -> None:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def chunk(send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


class Conversation:
    """One request against a ``Front``, message by message."""

    def __init__(
        self, app: App, method: str = "POST", path: str = "/v1/completions", **headers: str
    ) -> None:
        self.sent: list[dict[str, Any]] = []
        self.incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        self.scope = {"type": "http", "method": method, "path": path, "headers": raw}
        self.front = Front(app, BODY_MAX)

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    def body(self, body: bytes, more: bool = False) -> None:
        self.incoming.put_nowait({"type": "http.request", "body": body, "more_body": more})

    async def run(self) -> None:
        await asyncio.wait_for(self.front(self.scope, self.incoming.get, self.send), 5.0)

    @property
    def status(self) -> int:
        status: int = self.sent[0]["status"]
        return status

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode().lower(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def content(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])


# --- holding back ---------------------------------------------------------------------------


async def test_headers_wait_until_it_is_known_who_serves_then_nothing_waits() -> None:
    seen: list[int] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        call = CallRecord("r")
        exchange_now().calls.append(call)
        await start(send, content_type="text/event-stream")
        await chunk(send, b"role ")
        seen.append(len(conversation.sent))
        call.prefill, call.decode, call.started = "prefill-0", "decode-1", True
        for number in range(5):
            await chunk(send, f"{number} ".encode())
            seen.append(len(conversation.sent))
        await chunk(send, b"end", more=False)

    conversation = Conversation(app)
    conversation.body(b"{}")
    await conversation.run()
    assert seen == [0, 2, 3, 4, 5, 6], "held, then start and both chunks in one, then each at once"
    assert conversation.content == b"role 0 1 2 3 4 end"
    assert conversation.headers["x-pythia-prefill"] == "prefill-0"
    assert conversation.headers["x-pythia-decode"] == "decode-1"
    assert conversation.headers["content-type"] == "text/event-stream"


async def test_no_more_than_a_bounded_number_of_chunks_is_held() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        exchange_now().calls.append(CallRecord("r"))
        await start(send)
        for _ in range(HELD_CHUNKS_MAX):
            assert not conversation.sent
            await chunk(send, b"x")
        assert conversation.content == b"x" * HELD_CHUNKS_MAX
        await chunk(send, b"", more=False)

    conversation = Conversation(app)
    conversation.body(b"{}")
    await conversation.run()
    assert conversation.content == b"x" * HELD_CHUNKS_MAX


async def test_streams_of_requests_that_make_no_calls_are_not_held() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await start(send)
        await chunk(send, b"first")
        assert len(conversation.sent) == 2
        await chunk(send, b"", more=False)

    conversation = Conversation(app, method="GET", path="/events")
    await conversation.run()
    assert conversation.content == b"first"


async def test_a_whole_response_tells_what_was_cached_and_moved() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        exchange_now().calls.extend([started_call("a"), started_call("b")])
        await start(send)
        await chunk(send, b"{}", more=False)

    conversation = Conversation(app)
    conversation.body(b"{}")
    await conversation.run()
    assert conversation.headers["x-pythia-decode"] == "decode-0,decode-0"
    assert conversation.headers["x-pythia-cached-tokens"] == "64"
    assert conversation.headers["x-pythia-moved-tokens"] == "128"


# --- refusals -----------------------------------------------------------------------------------


def refusing(failure: Failure, stream: bool) -> App:
    """As vLLM does when ``generate`` raises behind the start of a stream."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        exchange = exchange_now()
        exchange.calls.append(CallRecord("r"))
        await start(
            send,
            content_type="text/event-stream",
            x_request_id="id-1",
            access_control_allow_origin="*",
        )
        if stream:
            await chunk(send, b"data: role\n\n")
        exchange.failure = failure
        await chunk(send, b'data: {"error": {}}\n\n', more=stream)
        if stream:
            await chunk(send, b"data: [DONE]\n\n", more=False)

    return app


@pytest.mark.parametrize("stream", [True, False])
async def test_a_refusal_behind_a_begun_stream_is_a_real_status(stream: bool) -> None:
    conversation = Conversation(refusing(Failure(429, "the queue is full", 2.6), stream))
    conversation.body(b"{}")
    await conversation.run()
    assert conversation.status == 429
    assert conversation.headers["retry-after"] == "3"
    assert conversation.headers["x-request-id"] == "id-1"
    assert conversation.headers["access-control-allow-origin"] == "*"
    assert conversation.headers["content-type"] == "application/json"
    assert int(conversation.headers["content-length"]) == len(conversation.content)
    assert len(conversation.sent) == 2, "nothing of the stream is left"
    assert "x-pythia-decode" not in conversation.headers, "nobody was asked"
    error = json.loads(conversation.content)["error"]
    assert error == {
        "message": "the queue is full",
        "type": "Too Many Requests",
        "param": None,
        "code": 429,
    }


@pytest.mark.parametrize(
    ("status", "kind"),
    [(429, "rate_limit_error"), (503, "overloaded_error"), (504, "api_error")],
)
async def test_anthropics_clients_get_anthropics_errors(status: int, kind: str) -> None:
    conversation = Conversation(refusing(Failure(status, "no"), True), path="/v1/messages")
    conversation.body(b"{}")
    await conversation.run()
    assert conversation.status == status
    expected = {"type": "error", "error": {"type": kind, "message": "no"}}
    assert json.loads(conversation.content) == expected


async def test_a_failure_after_the_first_tokens_is_the_streams_own_matter() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        exchange_now().calls.append(started_call())
        await start(send)
        await chunk(send, b"token ")
        exchange_now().failure = Failure(503, "lost")
        await chunk(send, b"error event", more=False)

    conversation = Conversation(app)
    conversation.body(b"{}")
    await conversation.run()
    assert conversation.status == 200
    assert conversation.content == b"token error event"


async def test_vllms_own_errors_keep_their_shape_and_get_retry_after() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        exchange_now().failure = Failure(503, "ours", 0.2)
        await start(send, 503)
        await chunk(send, b'{"error": {"message": "vLLM says"}}', more=False)

    conversation = Conversation(app)
    conversation.body(b"{}")
    await conversation.run()
    assert (conversation.status, conversation.headers["retry-after"]) == (503, "1")
    assert b"vLLM says" in conversation.content


@pytest.mark.parametrize(("path", "field"), [("/v1/models", "code"), ("/v1/messages", "type")])
async def test_a_bare_401_gets_the_apis_shape(path: str, field: str) -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await start(send, 401)
        await chunk(send, b'{"error": "Unauthorized"}', more=False)

    conversation = Conversation(app, method="GET", path=path)
    await conversation.run()
    assert conversation.status == 401
    error = json.loads(conversation.content)["error"]
    assert error[field] in (401, "authentication_error")
    assert "API key" in error["message"]


@pytest.mark.parametrize(("calls", "status"), [(0, 400), (1, 500)])
async def test_an_app_that_raises_gets_an_answer_before_the_client_has_one(
    calls: int, status: int
) -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        exchange_now().calls.extend(CallRecord("r") for _ in range(calls))
        await start(send)
        await chunk(send, b"half")
        raise RuntimeError("a secret of ours")

    conversation = Conversation(app)
    conversation.body(b"{}")
    await conversation.run()
    assert conversation.status == status
    assert json.loads(conversation.content)["error"]["code"] == status
    assert b"secret" not in conversation.content
    assert current_exchange.get() is None


async def test_an_answer_of_another_kind_that_is_cut_short_ends_the_connection() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        exchange_now().calls.append(started_call())
        await start(send, content_type="application/octet-stream")
        await chunk(send, b"token")
        raise RuntimeError("ours")

    conversation = Conversation(app)
    conversation.body(b"{}")
    with pytest.raises(RuntimeError):
        await conversation.run()
    assert conversation.content == b"token"
    assert current_exchange.get() is None


def raising(*events: bytes, failure: Failure | None = None) -> App:
    """As vLLM does when something raises behind the first events of a stream."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        exchange_now().calls.append(started_call())
        await start(send, content_type="text/event-stream; charset=utf-8")
        for event in events:
            await chunk(send, event)
        exchange_now().failure = failure
        raise RuntimeError("a secret of ours")

    return app


async def end_of_stream(app: App, path: str) -> bytes:
    """What is added to the events of a stream into which something raises."""
    conversation = Conversation(app, path=path)
    conversation.body(b"{}")
    await conversation.run()
    assert conversation.status == 200
    assert [message.get("more_body", False) for message in conversation.sent[1:]][-1] is False
    assert b"secret" not in conversation.content
    assert current_exchange.get() is None
    (_, last) = conversation.content.split(b"token\n\n")
    return last


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_stream_into_which_something_raises_ends_with_openais_error(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    end = await end_of_stream(raising(b"data: token\n\n"), path)
    error, done, rest = end.split(b"\n\n")
    assert json.loads(error.removeprefix(b"data: "))["error"] == {
        "message": "internal error",
        "type": "Internal Server Error",
        "param": None,
        "code": 500,
    }
    assert (done, rest) == (b"data: [DONE]", b"")
    assert "a secret of ours" in caplog.text, "we are told the whole story"


async def test_a_stream_into_which_something_raises_ends_with_anthropics_error() -> None:
    app = raising(b"event: x\ndata: token\n\n", failure=Failure(503, "the worker was lost"))
    end = await end_of_stream(app, "/v1/messages")
    name, data = end.removesuffix(b"\n\n").split(b"\n")
    assert name == b"event: error"
    assert json.loads(data.removeprefix(b"data: ")) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "the worker was lost"},
    }


async def test_a_responses_stream_into_which_something_raises_ends_with_its_error() -> None:
    app = raising(b"data: a\n\n", b"data: b\n\ndata: token\n\n", failure=Failure(503, "lost"))
    end = await end_of_stream(app, "/v1/responses")
    name, data = end.removesuffix(b"\n\n").split(b"\n")
    assert name == b"event: error"
    event = ResponseErrorEvent.model_validate_json(data.removeprefix(b"data: "))
    assert (event.type, event.message, event.sequence_number) == ("error", "lost", 3)


async def test_an_error_in_the_middle_of_an_event_is_an_event_of_its_own() -> None:
    conversation = Conversation(raising(b'data: {"half'))
    conversation.body(b"{}")
    await conversation.run()
    half, error, done, _ = conversation.content.split(b"\n\n")
    assert half == b'data: {"half'
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == 500
    assert done == b"data: [DONE]"


async def test_a_stream_of_something_else_than_a_call_ends_with_an_error_too() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await start(send, content_type="text/event-stream")
        await chunk(send, b"data: token\n\n")
        raise RuntimeError("ours")

    conversation = Conversation(app, method="GET", path="/v1/responses/r")
    await conversation.run()
    assert b"internal error" in conversation.content


async def test_a_whole_stream_stays_one_whatever_raises_behind_it() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        exchange_now().calls.append(started_call())
        await start(send, content_type="text/event-stream")
        await chunk(send, b"data: [DONE]\n\n", more=False)
        raise RuntimeError("ours")

    conversation = Conversation(app)
    conversation.body(b"{}")
    await conversation.run()
    assert conversation.content == b"data: [DONE]\n\n"


async def test_what_vllm_can_not_process_before_any_call_is_the_requests_fault() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await start(send, 500)
        await chunk(send, b'{"error": {"message": "KeyError: x"}}', more=False)

    conversation = Conversation(app)
    conversation.body(b"{}")
    await conversation.run()
    assert conversation.status == 400
    assert b"KeyError" not in conversation.content


async def test_an_unknown_path_gets_the_apis_shape() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await start(send, 404)
        await chunk(send, b'{"detail":"Not Found"}', more=False)

    conversation = Conversation(app, method="GET", path="/v1/nothing")
    await conversation.run()
    assert conversation.status == 404
    assert json.loads(conversation.content)["error"]["code"] == 404


# --- calls that go on elsewhere -------------------------------------------------------------------


def continuing(content_type: str, *pieces: bytes) -> App:
    """A call that goes on on another worker behind its first piece, and again behind the second."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        exchange_now().calls.append(started_call())
        await start(send, content_type=content_type)
        for number, piece in enumerate(pieces):
            await chunk(send, piece, more=number + 1 < len(pieces))
            continuation = Continuation(f"decode-{number}", 57 + number, not number)
            exchange_now().continuations.append(continuation)

    return app


async def test_a_stream_says_where_it_went_on_in_comments_between_its_events() -> None:
    app = continuing("text/event-stream", b"data: a\n\n", b"data: b\n\n", b"data: c\n\n")
    conversation = Conversation(app)
    conversation.body(b"{}")
    await conversation.run()
    assert conversation.content == (
        b"data: a\n\n"
        b": pythia continued on decode-0 after 57 tokens, sampling restarted\n\n"
        b"data: b\n\n"
        b": pythia continued on decode-1 after 58 tokens\n\n"
        b"data: c\n\n"
    )


@pytest.mark.parametrize("details", ["prompt_tokens_details", "input_tokens_details"])
async def test_a_streams_usage_says_how_many_tokens_were_moved(details: str) -> None:
    text = json.dumps({"text": f'"{details}":{{'})

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        call = started_call()
        call.moved = False
        exchange_now().calls.append(call)
        await start(send, content_type="text/event-stream")
        await chunk(send, f"data: {text}\n\n".encode(), more=True)
        call.moved_tokens, call.moved = 598, True
        await chunk(send, f'data: {{"usage":{{"{details}":{{"cached_tokens":3}}}}}}\n\n'.encode())

    conversation = Conversation(app)
    conversation.body(b"{}")
    await conversation.run()
    assert "x-pythia-moved-tokens" not in conversation.headers, "unknown when the head left"
    said, usage = conversation.content.decode().split("\n\n")[:2]
    assert said == f"data: {text}", "what the model says is left alone"
    assert json.loads(usage.removeprefix("data: ")) == {
        "usage": {details: {"moved_tokens": 598, "cached_tokens": 3}}
    }


async def test_a_comment_waits_for_the_end_of_an_event() -> None:
    app = continuing("text/event-stream", b"data: a\n", b"\n", b"data: c\n\n")
    conversation = Conversation(app)
    conversation.body(b"{}")
    await conversation.run()
    parts = conversation.content.split(b"\n\n")
    assert [part[:8] for part in parts] == [b"data: a", b": pythia", b": pythia", b"data: c", b""]


async def test_a_whole_answer_says_where_it_went_on_in_its_head() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        exchange = exchange_now()
        exchange.calls.append(started_call())
        exchange.continuations += [
            Continuation("decode-1", 57, True),
            Continuation("decode-2", 80, False),
        ]
        await start(send, content_type="application/json")
        await chunk(send, b"{}", more=False)

    conversation = Conversation(app)
    conversation.body(b"{}")
    await conversation.run()
    assert conversation.headers["x-pythia-continued"] == (
        "decode-1 after 57 tokens; sampling restarted, decode-2 after 80 tokens"
    )
    assert conversation.content == b"{}"


# --- the request's body ---------------------------------------------------------------------------


async def echo(scope: Any, receive: Receive, send: Send) -> None:
    body = (await receive())["body"]
    await start(send)
    await chunk(send, body, more=False)


@pytest.mark.parametrize("length", ["1001", "9" * 30, "9" * 5000])
async def test_a_body_that_says_it_is_too_long_is_not_read(length: str) -> None:
    conversation = Conversation(echo, content_length=length, x_request_id="id-7")
    await conversation.run()
    assert conversation.status == 413
    assert conversation.headers["x-request-id"] == "id-7"
    assert json.loads(conversation.content)["error"]["code"] == 413


async def test_a_body_that_grows_too_long_is_not_read_to_its_end() -> None:
    conversation = Conversation(echo)
    for _ in range(10):
        conversation.body(b"x" * 300, more=True)
    await conversation.run()
    assert conversation.status == 413
    assert conversation.incoming.qsize() == 6


async def test_a_body_of_just_the_limit_arrives_whole() -> None:
    conversation = Conversation(echo, content_length="1000")
    conversation.body(b"x" * 600, more=True)
    conversation.body(b"y" * 400)
    await conversation.run()
    assert conversation.content == b"x" * 600 + b"y" * 400


@pytest.mark.parametrize("length", ["-1", "ten", "\xb2", "1.5"])
async def test_a_length_that_is_no_number_is_refused(length: str) -> None:
    conversation = Conversation(echo)
    conversation.scope["headers"] = [(b"content-length", length.encode("latin-1"))]
    await conversation.run()
    assert conversation.status == 400


async def test_a_client_that_leaves_within_its_body_reaches_nobody() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        raise AssertionError("nothing was to be called")

    conversation = Conversation(app)
    conversation.body(b"{", more=True)
    conversation.incoming.put_nowait({"type": "http.disconnect"})
    await conversation.run()
    assert conversation.status == 400


async def test_a_client_that_leaves_later_is_noticed() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        assert (await receive())["body"] == b"{}"
        leaving = asyncio.create_task(receive())
        await asyncio.sleep(0)
        assert not leaving.done()
        conversation.incoming.put_nowait({"type": "http.disconnect"})
        assert (await leaving)["type"] == "http.disconnect"

    conversation = Conversation(app)
    conversation.body(b"{}")
    await conversation.run()


# --- who speaks, and what is echoed --------------------------------------------------------


async def test_the_exchange_knows_who_speaks_also_in_tasks_begun_for_it() -> None:
    found: list[Exchange | None] = []

    async def background() -> None:
        found.append(current_exchange.get())

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        found.append(exchange_now())
        await asyncio.create_task(background())
        await start(send)
        await chunk(send, b"", more=False)

    conversation = Conversation(app, x_workflow_run="run-1")
    conversation.body(b'{"workflow": {"name": "team", "agent": "planner"}}')
    await conversation.run()
    first, second = found
    assert first is second
    assert first is not None
    context = first.context
    assert (context.workflow, context.run, context.agent) == ("team", "run-1", "planner")
    assert current_exchange.get() is None


async def test_traceparent_is_echoed_and_the_request_id_kept() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await start(send, x_request_id="id-1")
        await chunk(send, b"", more=False)

    conversation = Conversation(app, method="GET", traceparent="00-aa-bb-01")
    await conversation.run()
    assert conversation.headers["traceparent"] == "00-aa-bb-01"
    assert conversation.headers["x-request-id"] == "id-1"


@pytest.mark.parametrize(
    ("path", "given", "expected"),
    [
        ("/v1/messages", {"x_api_key": "k"}, "Bearer k"),
        ("/v1/messages", {"x_api_key": "k", "authorization": "Bearer other"}, "Bearer other"),
        ("/v1/completions", {"x_api_key": "k"}, None),
    ],
)
async def test_anthropics_key_header_counts_on_its_path(
    path: str, given: dict[str, str], expected: str | None
) -> None:
    seen: dict[bytes, bytes] = {}

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        seen.update(scope["headers"])
        await start(send)
        await chunk(send, b"", more=False)

    conversation = Conversation(app, path=path, **given)
    conversation.body(b"{}")
    await conversation.run()
    assert seen.get(b"authorization") == (expected.encode() if expected else None)


async def test_other_scopes_pass_untouched() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        seen.append((scope["type"], receive, send))

    conversation = Conversation(app)
    for kind in ("lifespan", "websocket"):
        await conversation.front({"type": kind}, conversation.incoming.get, conversation.send)
    assert [kind for kind, _, _ in seen] == ["lifespan", "websocket"]


async def test_a_real_client_reads_it() -> None:
    transport = httpx.ASGITransport(refusing(Failure(503, "no core", 4.0), True))
    transport.app = Front(transport.app, BODY_MAX)
    async with httpx.AsyncClient(transport=transport, base_url="http://pythia") as client:
        response = await client.post("/v1/chat/completions", json={"stream": True})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "4"
    assert response.json()["error"]["message"] == "no core"

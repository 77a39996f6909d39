"""The outermost layer of the HTTP server: what every request passes before vLLM's app.

Bounds and reads the body, finds out who speaks, and holds the start of the response back
until it is known who serves the call. So the response's headers can name the workers,
and a call that is refused after vLLM has begun a stream still gets a real HTTP status.
A stream of events is never just cut: if something raises behind its start, the front ends
it with an error event.
"""

from __future__ import annotations

import json
import logging

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.api.errors import ANTHROPIC_PATH, error_body
from coordinator.api.events import CONTENT_TYPE, EventStream
from coordinator.api.exchange import Exchange, Failure, current_exchange
from coordinator.api.identity import who_speaks

logger = logging.getLogger("pythia.api")

HELD_CHUNKS_MAX = 64
CONTENT_LENGTH_DIGITS_MAX = 18
KEPT_HEADERS = ("access-control-", "vary", "x-request-id")
"""Headers of a response that also belong to the error put in its place; by their beginning."""


class Front:
    """ASGI middleware. ``body_bytes_max``: longest request body taken."""

    def __init__(self, app: ASGIApp, body_bytes_max: int) -> None:
        self.app = app
        self.body_bytes_max = body_bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        exchange = Exchange()
        response = Response(exchange, scope, headers, send)
        body = b""
        has_body = scope["method"] in ("POST", "PUT", "PATCH")
        if has_body:
            taken = await self._body(headers, receive)
            if isinstance(taken, Failure):
                exchange.failure = taken
                await response.refuse(taken)
                return
            body = taken
        exchange.context, served = who_speaks(headers, body)
        if has_body:
            receive = _replay(served, receive)
        _accept_anthropic_key(scope, headers)
        token = current_exchange.set(exchange)
        try:
            await self.app(scope, receive, response.send)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if not await response.fail():
                # Makes the server close the connection.
                raise
        finally:
            current_exchange.reset(token)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | Failure:
        too_large = Failure(413, f"the request body is larger than {self.body_bytes_max} bytes")
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return Failure(400, "Content-Length is not a number")
        if len(length) > CONTENT_LENGTH_DIGITS_MAX or int(length) > self.body_bytes_max:
            return too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return Failure(400, "the request body is incomplete")
            body += message.get("body", b"")
            if len(body) > self.body_bytes_max:
                return too_large
            if not message.get("more_body", False):
                return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body once and then whatever the client does."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _accept_anthropic_key(scope: Scope, headers: Headers) -> None:
    """Anthropic's clients send their key in a header of its own."""
    key = headers.get("x-api-key")
    if key and "authorization" not in headers and scope["path"].startswith(ANTHROPIC_PATH):
        scope["headers"] = [*scope["headers"], (b"authorization", b"Bearer " + key.encode())]


class Response:
    """Holds the start of one response back until its headers are known."""

    def __init__(self, exchange: Exchange, scope: Scope, headers: Headers, send: Send) -> None:
        self.exchange = exchange
        self.path: str = scope["path"]
        # Only these make calls; what else streams is not held up.
        self.may_call = scope["method"] == "POST"
        self.traceparent = headers.get("traceparent")
        self.request_id = headers.get("x-request-id")
        self._send = send
        self._start: Message | None = None
        self._held: list[Message] = []
        self._events: EventStream | None = None
        self._released = False
        self._refused = False
        self.complete = False

    async def send(self, message: Message) -> None:
        """ASGI's ``send``."""
        if self._refused:
            return
        if message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
            body = message.get("body", b"")
            if self._events is not None and (sent := self._events.passing(body)) != body:
                message = {**message, "body": sent}
        if self._released:
            await self._send(message)
            return
        if message["type"] == "http.response.start":
            self._start = message
            content_type = Headers(raw=list(message["headers"])).get("content-type", "")
            if content_type.startswith(CONTENT_TYPE):
                self._events = EventStream(self.exchange, self.path)
            return
        self._held.append(message)
        if self._must_wait(message):
            return
        failure = self._failure()
        if failure is not None:
            await self.refuse(failure)
        else:
            await self._release()

    def _must_wait(self, message: Message) -> bool:
        return (
            self.may_call
            and message.get("more_body", False)
            and not self.exchange.decided
            and len(self._held) < HELD_CHUNKS_MAX
        )

    @property
    def begun(self) -> bool:
        """Whether the client has been sent anything."""
        return self._released or self._refused

    def _failure(self) -> Failure | None:
        """Why the response that vLLM began is not to be sent as it is."""
        assert self._start is not None
        status = self._start["status"]
        if status < 400:
            return self.exchange.failure
        if status == 500 and self.may_call and not self.exchange.calls:
            logger.error("%s: refused, vLLM could not process the request", self.path)
            return _blame(self.exchange)
        body = b"".join(message.get("body", b"") for message in self._held)
        if status == 401 and b'"message"' not in body:
            return Failure(401, "the API key is missing or wrong")
        if body.startswith(b'{"detail"'):
            # Starlette's own shape: no such path or method, a body that is no text.
            return Failure(status, f"{self.path}: {json.loads(body)['detail']}")
        return None

    async def _release(self) -> None:
        assert self._start is not None
        self._released = True
        headers = MutableHeaders(raw=list(self._start["headers"]))
        for name, value in self._headers().items():
            headers[name] = value
        await self._send({**self._start, "headers": headers.raw})
        # In one piece: every write of its own would wake the client on the way to its token.
        body = b"".join(message.get("body", b"") for message in self._held)
        await self._send({**self._held[-1], "body": body})
        self._held.clear()

    def _headers(self) -> dict[str, str]:
        headers = self.exchange.headers()
        if self.traceparent:
            headers["traceparent"] = self.traceparent
        failure = self.exchange.failure
        if failure is not None and failure.retry_after_s:
            headers["Retry-After"] = str(max(1, round(failure.retry_after_s)))
        return headers

    async def fail(self) -> bool:
        """Something raised: tell the client, where it stands, that this is not the answer.

        False if only a connection that is cut can tell it, behind half of something else than
        events. An answer that the client has got whole stays one.
        """
        failure = self.exchange.failure
        if not self.begun:
            await self.refuse(failure or _blame(self.exchange))
        elif not self.complete:
            if self._events is None:
                return False
            self.complete = True
            body = self._events.error(failure or Failure(500, "internal error"))
            await self._send({"type": "http.response.body", "body": body})
        return True

    async def refuse(self, failure: Failure) -> None:
        """Answer with an error in the shape of the API that was asked."""
        self._refused = True
        self.complete = True
        body = json.dumps(error_body(self.path, failure)).encode()
        headers = MutableHeaders(raw=[])
        if self._start is not None:
            for name, value in Headers(raw=list(self._start["headers"])).items():
                if name.startswith(KEPT_HEADERS):
                    headers.append(name, value)
        elif self.request_id:
            headers["x-request-id"] = self.request_id
        for name, value in self._headers().items():
            headers[name] = value
        headers["content-type"] = "application/json"
        headers["content-length"] = str(len(body))
        await self._send(
            {"type": "http.response.start", "status": failure.status, "headers": headers.raw}
        )
        await self._send({"type": "http.response.body", "body": body})


def _blame(exchange: Exchange) -> Failure:
    """Whose fault an unexpected exception of vLLM's is: before there is a call, nothing but
    the request itself has been looked at."""
    if exchange.calls:
        return Failure(500, "internal error")
    return Failure(400, "the request could not be processed: a part of it is not as it should be")

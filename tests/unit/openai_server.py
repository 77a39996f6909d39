"""A server that answers as OpenAI's does and remembers what it was asked.

It knows chat completions, streamed or not, and, unless it is told otherwise, the
endpoints for workflows. What a model says is a function of the request: its text, or names
and arguments of tools.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Says = Callable[[dict[str, Any]], str | list[tuple[str, dict[str, Any]]]]


@dataclass(frozen=True)
class Asked:
    """One request. ``headers`` with lower-case names."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any

    @property
    def agent(self) -> str:
        return self.headers.get("x-workflow-agent", "")

    @property
    def parent(self) -> str:
        return self.headers.get("x-workflow-parent", "")

    @property
    def run(self) -> str:
        return self.headers.get("x-workflow-run", "")

    def said(self) -> str:
        """The text of the last message."""
        return str(self.body["messages"][-1]["content"])


@dataclass
class Seen:
    """What a server was asked, in order; ``url`` is its address with ``/v1``."""

    url: str
    says: Says
    knows_workflows: bool
    asked: list[Asked] = field(default_factory=list)
    delay_s: float = 0.0

    @property
    def calls(self) -> list[Asked]:
        """Chat completions."""
        return [one for one in self.asked if one.path.endswith("/chat/completions")]

    @property
    def reports(self) -> list[Asked]:
        """All about workflows."""
        return [one for one in self.asked if "/workflows/" in one.path]

    def ended(self) -> dict[str, bool]:
        """Runs that were said to be over, and whether they came to their own end."""
        ends = [one for one in self.reports if one.path.endswith("/end")]
        return {one.path.split("/")[-2]: one.body["completed"] for one in ends}


@contextmanager
def openai_server(says: Says = lambda body: "fine", knows_workflows: bool = True) -> Iterator[Seen]:
    """A server on a port of its own."""
    seen = Seen("", says, knows_workflows)
    handler = type("Handler", (_Handler,), {"seen": seen})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    seen.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    seen: Seen
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"null")
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.seen.asked.append(Asked(self.command, self.path, headers, body))
        if self.path.endswith("/chat/completions"):
            time.sleep(self.seen.delay_s)
            self._complete(body)
        elif self.seen.knows_workflows and "/workflows/" in self.path:
            self._send(200, "application/json", b"{}")
        else:
            self._send(404, "application/json", b'{"error": {"message": "Not Found"}}')

    do_PUT = do_POST

    def _complete(self, body: dict[str, Any]) -> None:
        message = _message(self.seen.says(body))
        if body.get("stream"):
            events = [_chunk(_delta(message), None), _chunk({}, _reason(message))]
            data = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
            self._send(200, "text/event-stream", f"{data}data: [DONE]\n\n".encode())
            return
        choice = {"index": 0, "message": message, "finish_reason": _reason(message)}
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        answer = {**_HEAD, "object": "chat.completion", "choices": [choice], "usage": usage}
        self._send(200, "application/json", json.dumps(answer).encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        with contextlib.suppress(ConnectionError):  # whoever asked may have gone
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: the tests look at what was seen."""


_numbers = itertools.count()
_HEAD = {"id": "chatcmpl-1", "created": 1, "model": "m"}


def _message(said: str | list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    if isinstance(said, str):
        return {"role": "assistant", "content": said}
    calls = [
        {
            "id": f"call_{next(_numbers)}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        for name, arguments in said
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def _delta(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls", [])
    return message | {"tool_calls": [{"index": at, **call} for at, call in enumerate(calls)]}


def _reason(message: dict[str, Any]) -> str:
    return "tool_calls" if message.get("tool_calls") else "stop"


def _chunk(delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {**_HEAD, "object": "chat.completion.chunk", "choices": [choice]}

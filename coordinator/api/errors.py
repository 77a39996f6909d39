"""Failures in the shape of the API that was asked: OpenAI's, or Anthropic's for its path.

Before an answer has begun they are a response of their own, behind its beginning the last
event of the stream.
"""

from __future__ import annotations

import json
from typing import Any

from coordinator.api.exchange import Failure

ANTHROPIC_PATH = "/v1/messages"
RESPONSES_PATH = "/v1/responses"
ANTHROPIC_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(path: str, failure: Failure) -> dict[str, Any]:
    """The JSON object of a response that is an error."""
    if path.startswith(ANTHROPIC_PATH):
        kind = ANTHROPIC_ERRORS.get(failure.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": failure.message}}
    return {
        "error": {
            "message": failure.message,
            "type": failure.kind,
            "param": None,
            "code": failure.status,
        }
    }


def error_events(path: str, failure: Failure, sequence_number: int) -> bytes:
    """What ends an event stream that fails. ``sequence_number``: events sent before it."""
    if path.startswith(RESPONSES_PATH):
        return _event(
            "error",
            {
                "type": "error",
                "code": "server_error",
                "message": failure.message,
                "param": None,
                "sequence_number": sequence_number,
            },
        )
    if path.startswith(ANTHROPIC_PATH):
        return _event("error", error_body(path, failure))
    return _event("", error_body(path, failure)) + b"data: [DONE]\n\n"


def _event(name: str, data: dict[str, Any]) -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()

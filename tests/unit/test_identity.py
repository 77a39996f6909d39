"""Who speaks for a request, from whatever clients send."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from coordinator.api.identity import TEXT_MAX, call_context
from coordinator.protocol import CallContext, Submit, encode

HEADERS = {
    "X-Workflow": "h-team",
    "X-Workflow-Run": "h-run",
    "X-Workflow-Agent": "h-agent",
    "X-Workflow-Parent": "h-parent",
    "X-Workflow-Final": "True",
}
NOBODY = CallContext()


def body(workflow: object) -> bytes:
    return json.dumps({"model": "m", "workflow": workflow}).encode()


def test_headers_alone() -> None:
    context = call_context(Headers(HEADERS), b"")
    assert context == CallContext("h-team", "h-run", "h-agent", "h-parent", final=True)


def test_the_body_goes_before_the_headers_field_by_field() -> None:
    context = call_context(Headers(HEADERS), body({"name": "b-team", "agent": "b-agent"}))
    assert context == CallContext("b-team", "h-run", "b-agent", "h-parent", final=True)


def test_the_body_alone() -> None:
    given_fields = {"name": "t", "run": "r", "agent": "a", "parent": "p", "final": True}
    assert call_context(Headers({}), body(given_fields)) == CallContext("t", "r", "a", "p", True)


@pytest.mark.parametrize(
    "odd",
    [
        b"",
        b"no json",
        b'{"workflow": ',
        b'{"workflow": "a string"}',
        b'{"workflow": {"name": 5}}',
        b'{"workflow": null}',
        b'["workflow"]',
        b'\xff\xfe{"workflow": {}}',
        b'{"workflow": {"name": "\xff"}}',
        b'{"workflow": {"name": "\\ud800"}}',
        b'{"workflow": ' + b"[" * 100_000,
        b"{" + b'"workflow": {"a": ' * 50_000,
    ],
)
def test_what_is_odd_is_nobody_and_no_error(odd: bytes) -> None:
    assert call_context(Headers({}), odd) == NOBODY


def test_texts_are_bounded() -> None:
    context = call_context(Headers({"x-workflow": "w" * 10_000}), body({"run": "r" * 10_000}))
    assert (len(context.workflow), len(context.run)) == (TEXT_MAX, TEXT_MAX)


@pytest.mark.parametrize(
    ("text", "final"), [("1", True), ("YES", True), ("0", False), ("", False), ("no", False)]
)
def test_the_final_header(text: str, final: bool) -> None:
    assert call_context(Headers({"x-workflow-final": text}), b"").final is final


@given(st.binary() | st.text().map(lambda name: body({"name": name})))
def test_anything_gives_a_context_that_can_be_sent(anything: bytes) -> None:
    encode(Submit("api", "r", 1, 1, 1, context=call_context(Headers({}), anything)))

"""Who speaks for a request, from whatever clients send."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from coordinator.api.claims import Hints
from coordinator.api.identity import (
    KNOWN_HEADERS,
    TEXT_MAX,
    call_context,
    who_speaks,
)
from coordinator.protocol import CallContext, Submit, encode
from coordinator.tenant import tenant_of

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
        b'{"workflow": {"name": [5]}}',
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


def test_the_forms_go_in_order_field_by_field() -> None:
    headers = {
        "baggage": "workflow=bag,workflow.run=bag-run,workflow.agent=bag-agent, workflow.parent=p",
        "x-workflow-agent": "header-agent",
        "x-workflow-run": "header-run",
        "x-session-id": "session",
    }
    context = call_context(Headers(headers), body({"run": "body-run"}))
    assert context == CallContext("bag", "body-run", "header-agent", "p", thread="session")


def test_baggage_is_decoded_and_bounded() -> None:
    text = "a=b,,=, workflow = caf%C3%A9%2C%20two ;property=1 , workflow.final=true"
    context = call_context(Headers({"baggage": text}), b"")
    assert (context.workflow, context.final) == ("café, two", True)
    late = "x=y," * 64 + "workflow=late"
    assert call_context(Headers({"baggage": late}), b"") == NOBODY


def test_several_headers_of_baggage_are_one() -> None:
    raw = [(b"baggage", b"a=b"), (b"baggage", b"workflow=team")]
    assert call_context(Headers(raw=raw), b"").workflow == "team"


def test_the_first_of_several_headers_counts() -> None:
    raw = [(b"x-workflow", b"one"), (b"x-workflow", b"two")]
    assert call_context(Headers(raw=raw), b"").workflow == "one"


@pytest.mark.parametrize("name", ["équipe", "研究チーム", "команда", "🤖"])
def test_names_in_any_script_are_the_same_in_header_and_body(name: str) -> None:
    raw = [(b"x-workflow", name.encode())]
    assert call_context(Headers(raw=raw), b"").workflow == name
    assert call_context(Headers({}), body({"name": name})).workflow == name


def test_latin_1_in_a_header_is_read_as_such() -> None:
    assert call_context(Headers(raw=[(b"x-workflow", b"\xe9quipe")]), b"").workflow == "équipe"


def test_what_cannot_be_printed_does_not_reach_a_terminal() -> None:
    assert call_context(Headers({}), body({"name": "a\x1b[31m\nb"})).workflow == "a [31m b"


def test_long_texts_that_differ_stay_different() -> None:
    one, two = (call_context(Headers({}), body({"run": "r" * 9000 + end})) for end in "12")
    assert one.run != two.run
    assert len(one.run) == len(two.run) == TEXT_MAX


def test_a_field_too_long_to_be_a_name_says_nothing() -> None:
    assert call_context(Headers({}), body({"run": "r" * 100_000})) == NOBODY


def test_numbers_are_ids_and_other_kinds_are_nothing() -> None:
    assert call_context(Headers({}), body({"run": 7, "agent": True, "parent": [1]})).run == "7"
    assert call_context(Headers({}), body({"agent": True, "parent": [1]})) == NOBODY


def test_a_tenant_is_known_by_a_digest_of_its_salt() -> None:
    one, two, none = (
        call_context(Headers({}), json.dumps({"cache_salt": salt}).encode())
        for salt in ("secret-1", "secret-2", "")
    )
    assert one.tenant == tenant_of("secret-1")
    assert one.tenant != two.tenant
    assert "secret" not in one.tenant
    assert none == NOBODY


def test_one_odd_form_does_not_hide_the_others() -> None:
    sent = {"workflow": "no object", "nvext": 5, "vllm_xargs": [], "workflow_id": "run-1"}
    assert call_context(Headers({}), json.dumps(sent).encode()) == CallContext(run="run-1")


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
field_names = st.sampled_from(
    [
        "name",
        "run",
        "agent",
        "agent_context",
        "agentic_context",
        "user_id",
        "session_id",
        "program_id",
    ]
)
odd_objects = st.dictionaries(field_names, json_values | st.dictionaries(field_names, json_values))
odd_headers = st.dictionaries(
    st.sampled_from(sorted(KNOWN_HEADERS)),
    st.text(st.characters(max_codepoint=255), max_size=40) | st.just('{"session_id": []}'),
)


@given(
    odd_headers,
    st.dictionaries(st.sampled_from(Hints.__struct_fields__), json_values | odd_objects),
)
def test_nothing_that_a_client_can_say_is_an_error(
    headers: dict[str, str], fields: dict[str, object]
) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    sent = json.dumps(fields).encode()
    context, served = who_speaks(Headers(raw=raw), sent)
    encode(Submit("api", "r", 1, 1, 1, context=context))
    assert all(len(each) <= TEXT_MAX for each in (context.workflow, context.run, context.thread))
    assert isinstance(json.loads(served), dict)

"""Who speaks for a request: one ``CallContext`` from whatever clients send.

Each field comes from the first of these forms that has it:

1. the ``workflow`` object in the body (OpenAI's ``extra_body``): name, run, agent, parent,
   thread, final;
2. headers ``X-Workflow``, ``X-Workflow-Run``, ``-Agent``, ``-Parent``, ``-Thread``, ``-Final``;
3. W3C ``baggage``: the same names with dots, or those of OpenTelemetry's conventions;
4. what agent tools send by themselves, in the order of ``aliases.ALIASES``.

``final`` is true if any form says so. The tenant is whoever shares a ``cache_salt``, by a digest
that does not give the salt away. A hint only: whatever is missing or odd makes the call a
workflow of one, never an error. Texts are bounded; of one that is too long its digest is part,
so that two long ones stay different.

The body is not decoded for this: one pass picks the few fields that matter as they stand and
skips the rest unread, which costs less than searching it for their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from hashlib import blake2b
from typing import Any
from urllib.parse import unquote

import msgspec

from coordinator.api.aliases import ALIAS_HEADERS, ALIASES
from coordinator.api.claims import Claim, Hints, Said, fields_of, flag, text
from coordinator.link import BAD_FRAME
from coordinator.protocol import CallContext
from coordinator.tenant import tenant_of

TEXT_MAX = 256
DIGEST_CHARACTERS = 16
HEADERS = {
    "workflow": "x-workflow",
    "run": "x-workflow-run",
    "agent": "x-workflow-agent",
    "parent": "x-workflow-parent",
    "thread": "x-workflow-thread",
}
FINAL_HEADER = "x-workflow-final"
BAGGAGE_HEADER = "baggage"
BAGGAGE = {
    "workflow": "workflow",
    "workflow.name": "workflow",
    "gen_ai.workflow.name": "workflow",
    "workflow.run": "run",
    "gen_ai.conversation.id": "run",
    "session.id": "run",
    "workflow.agent": "agent",
    "gen_ai.agent.name": "agent",
    "workflow.parent": "parent",
    "workflow.thread": "thread",
    "workflow.final": "final",
}
"""Keys of baggage and our fields; earlier keys go first. ``gen_ai.*`` and ``session.id`` are
OpenTelemetry's (semantic conventions for generative AI)."""
BAGGAGE_BYTES_MAX = 8192
BAGGAGE_MEMBERS_MAX = 64
"""Both are what W3C Baggage (section 3.3.2) requires a platform to keep."""
KNOWN_HEADERS = frozenset({*HEADERS.values(), FINAL_HEADER, BAGGAGE_HEADER}) | ALIAS_HEADERS
FOREIGN_ARGUMENTS = ("agentic_context",)
"""Of ``vllm_xargs``: vLLM has no such arguments and refuses those that are objects."""

_decode_hints = msgspec.json.Decoder(Hints).decode
_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def call_context(headers: Mapping[str, str], body: bytes) -> CallContext:
    """Who speaks. ``headers`` with lower-case names; ``body`` is JSON or anything else."""
    return _context(_said(headers, body))


def who_speaks(headers: Mapping[str, str], body: bytes) -> tuple[CallContext, bytes]:
    """Who speaks, and the body as vLLM is to have it: without what only says who speaks and
    would make vLLM refuse the request."""
    said = _said(headers, body)
    return _context(said), _served(body, said.hints)


def bounded(value: str) -> str:
    """A text of at most ``TEXT_MAX`` printable characters, different for different texts."""
    value = value.strip()
    if not value.isprintable():
        value = "".join(each if each.isprintable() else " " for each in value).strip()
    if len(value) <= TEXT_MAX:
        return value
    digest = blake2b(value.encode(errors="replace"), digest_size=DIGEST_CHARACTERS // 2)
    return f"{value[: TEXT_MAX - DIGEST_CHARACTERS - 1]}~{digest.hexdigest()}"


def _said(headers: Mapping[str, str], body: bytes) -> Said:
    hints = Hints()
    if body:
        with suppress(*BAD_FRAME):  # vLLM tells the client what is wrong with the body
            hints = _decode_hints(body)
    return Said(_known(headers), hints)


def _known(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that may say something. Baggage may come in several."""
    found: dict[str, str] = {}
    for name, value in headers.items():
        if name not in KNOWN_HEADERS:
            continue
        if not value.isascii():
            value = _as_utf8(value)
        if name in found:
            if name == BAGGAGE_HEADER:
                found[name] += f",{value}"
        else:
            found[name] = value.strip()
    return found


def _as_utf8(value: str) -> str:
    """HTTP servers read headers as Latin-1; people write UTF-8."""
    try:
        return value.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return value


def _context(said: Said) -> CallContext:
    tenant = tenant_of(text(said.hints.cache_salt))
    claims = [claim for claim in _claims(said) if claim is not None]
    if not claims:
        return CallContext(tenant=tenant)
    values = {
        name: bounded(next(filter(None, (getattr(claim, name) for claim in claims)), ""))
        for name in HEADERS
    }
    final = any(claim.final for claim in claims)
    return CallContext(**values, final=final, tenant=tenant)


def _claims(said: Said) -> Iterator[Claim | None]:
    """What each form says, in order of precedence."""
    yield _of_body(said.hints)
    if said.headers:
        yield _of_headers(said.headers)
        yield _of_baggage(said.headers.get(BAGGAGE_HEADER, ""))
    for alias in ALIASES:
        yield alias(said)


def _of_body(hints: Hints) -> Claim | None:
    if not hints.workflow:
        return None
    fields = fields_of(hints.workflow)
    return Claim(
        workflow=text(fields.get("name")),
        run=text(fields.get("run")),
        agent=text(fields.get("agent")),
        parent=text(fields.get("parent")),
        thread=text(fields.get("thread")),
        final=flag(fields.get("final")),
    )


def _of_headers(headers: Mapping[str, str]) -> Claim:
    values = {name: headers.get(header, "") for name, header in HEADERS.items()}
    return Claim(**values, final=flag(headers.get(FINAL_HEADER)))


def _of_baggage(baggage: str) -> Claim | None:
    """W3C Baggage: ``key=value;property, ...`` with values percent-encoded."""
    if not baggage:
        return None
    members: dict[str, str] = {}
    for member in baggage[:BAGGAGE_BYTES_MAX].split(",", BAGGAGE_MEMBERS_MAX)[:BAGGAGE_MEMBERS_MAX]:
        key, found, value = member.partition("=")
        if found:
            members.setdefault(key.strip(), unquote(value.partition(";")[0].strip()))
    values: dict[str, Any] = {}
    for key, name in BAGGAGE.items():
        if members.get(key):
            values.setdefault(name, members[key])
    final = flag(values.pop("final", ""))
    return Claim(**values, final=final)


def _served(body: bytes, hints: Hints) -> bytes:
    """The body without arguments of other routers that vLLM would refuse."""
    if not hints.vllm_xargs or not any(name in bytes(hints.vllm_xargs) for name in _QUOTED):
        return body
    try:
        members = _decode_members(body)
        arguments = _decode_members(members["vllm_xargs"])
    except (*BAD_FRAME, KeyError):
        return body  # vLLM tells the client what is wrong with the body
    for name in FOREIGN_ARGUMENTS:
        arguments.pop(name, None)
    members["vllm_xargs"] = msgspec.Raw(msgspec.json.encode(arguments))
    return msgspec.json.encode(members)


_QUOTED = tuple(f'"{name}"'.encode() for name in FOREIGN_ARGUMENTS)

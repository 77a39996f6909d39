"""What a form of identity says, and what it may be read from.

A request body is looked at without being decoded: the fields that may matter are kept as they
stand in it (``msgspec.Raw``) and read only by the form that they belong to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from coordinator.link import BAD_FRAME

FIELD_BYTES_MAX = 64 * 1024
"""A field of the body that is longer says nothing about who speaks."""
TRUE = frozenset({"1", "true", "yes"})


class Claim(msgspec.Struct, frozen=True, gc=False):
    """What one form says; empty where it says nothing. See ``protocol.CallContext``."""

    workflow: str = ""
    run: str = ""
    agent: str = ""
    parent: str = ""
    thread: str = ""
    final: bool = False


class Hints(msgspec.Struct, frozen=True):
    """The fields of a request body that may say who speaks, unread."""

    workflow: msgspec.Raw = msgspec.Raw()
    workflow_type_id: msgspec.Raw = msgspec.Raw()
    workflow_id: msgspec.Raw = msgspec.Raw()
    agent_id: msgspec.Raw = msgspec.Raw()
    nvext: msgspec.Raw = msgspec.Raw()
    vllm_xargs: msgspec.Raw = msgspec.Raw()
    agent_hint: msgspec.Raw = msgspec.Raw()
    metadata: msgspec.Raw = msgspec.Raw()
    client_metadata: msgspec.Raw = msgspec.Raw()
    prompt_cache_key: msgspec.Raw = msgspec.Raw()
    session_id: msgspec.Raw = msgspec.Raw()
    cache_salt: msgspec.Raw = msgspec.Raw()


class Said(msgspec.Struct, frozen=True):
    """All that a request says: the headers that may matter, lower-case, and the body's fields."""

    headers: Mapping[str, str]
    hints: Hints


def text(value: object) -> str:
    """A name or an id; empty for what is neither text nor a whole number."""
    if isinstance(value, msgspec.Raw):
        value = _read(value)
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return ""


def flag(value: object) -> bool:
    """Whether it says yes."""
    return value is True or (isinstance(value, str) and value.strip().lower() in TRUE)


def fields_of(value: object) -> dict[str, Any]:
    """The fields of an object, written as JSON or as JSON in a string; empty for all else."""
    if isinstance(value, msgspec.Raw):
        value = _read(value)
    if isinstance(value, str) and len(value) <= FIELD_BYTES_MAX:
        try:
            value = msgspec.json.decode(value)
        except BAD_FRAME:
            return {}
    return value if isinstance(value, dict) else {}


def _read(raw: msgspec.Raw) -> object:
    if not raw or len(raw) > FIELD_BYTES_MAX:
        return None
    try:
        return msgspec.json.decode(raw)
    except BAD_FRAME:
        return None

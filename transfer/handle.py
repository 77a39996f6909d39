"""A handle: where one request's KV is held, and how a decode engine reads it.

A handle is the typed form of vLLM's ``kv_transfer_params`` of a finished prefill.
A wrong one is dangerous: an engine that is told to pull from nowhere parks the request
for ever or stops altogether, and one that pulls another request's blocks answers with
another's text. So a handle is checked whenever it crosses a boundary: when the prefill
engine returns it, and again when the decode worker receives it as bytes.

    prefill engine --params--> from_params --Handle--> encode --bytes--+
    decode engine <--params--- to_params <--Handle--- decode <---------+

It refuses to guess: anything missing, empty, of the wrong type or absurdly large is a
``HandleError`` that names the field. Keys that vLLM adds and that no engine reads are
dropped.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

ENCODED_BYTES_MAX = 16 * 1024 * 1024
"""Longest encoded handle that is looked at."""
BLOCKS_MAX = 1 << 20
"""Most blocks one handle may name, over all KV cache groups."""

Identifier = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
Host = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Size = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Tokens = Annotated[int, msgspec.Meta(ge=1, le=1 << 28)]
Block = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Group = Annotated[list[Block], msgspec.Meta(max_length=BLOCKS_MAX)]
Groups = Annotated[list[Group], msgspec.Meta(min_length=1, max_length=256)]


class HandleError(ValueError):
    """Not a usable handle; the message names the field."""


class Handle(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """KV of ``remote_num_tokens`` tokens, held by one engine for one request.

    Field names are vLLM's. ``remote_block_ids`` has one list per KV cache group.
    ``remote_blocks_expiry_time`` is on the holding engine's own clock (seconds);
    ``remote_prefill_cached_tokens`` is what its prefill found in its own cache.
    """

    remote_engine_id: Identifier
    remote_request_id: Identifier
    remote_host: Host
    remote_port: Port
    remote_block_ids: Groups
    tp_size: Size
    remote_num_tokens: Tokens
    do_remote_prefill: bool
    do_remote_decode: bool = False
    dcp_size: Size = 1
    pp_size: Size = 1
    transfer_mode: Literal["pull"] = "pull"
    remote_blocks_expiry_time: float | None = None
    remote_registration_generation: int | None = None
    remote_prefill_cached_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None


_REQUIRED = tuple(
    field.name for field in msgspec.structs.fields(Handle) if field.default is msgspec.NODEFAULT
)
_OPTIONAL = tuple(name for name in Handle.__struct_fields__ if name not in _REQUIRED)
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Handle).decode


def from_params(params: object) -> Handle:
    """The handle in an engine's ``kv_transfer_params``; HandleError if there is none."""
    if not isinstance(params, dict):
        raise HandleError(f"kv_transfer_params is {type(params).__name__}, not a dict")
    for name in _REQUIRED:
        if params.get(name) is None:
            raise HandleError(f"{name} is missing")
    known = {name: params[name] for name in _REQUIRED}
    known |= {name: params[name] for name in _OPTIONAL if params.get(name) is not None}
    try:
        handle = msgspec.convert(known, Handle)
    except msgspec.ValidationError as error:
        raise HandleError(_explain(error)) from error
    return _checked(handle)


def to_params(handle: Handle) -> dict[str, Any]:
    """The ``kv_transfer_params`` a decode engine wants, as the prefill engine gave them."""
    values = ((name, getattr(handle, name)) for name in Handle.__struct_fields__)
    return {name: value for name, value in values if value is not None}


def encode(handle: Handle) -> bytes:
    """The handle as bytes for the wire."""
    return _encode(handle)


def decode(frame: bytes) -> Handle:
    """The handle in bytes from the wire; HandleError for anything else."""
    if len(frame) > ENCODED_BYTES_MAX:
        raise HandleError(f"handle of {len(frame)} bytes, at most {ENCODED_BYTES_MAX} are read")
    try:
        handle = _decode(frame)
    except msgspec.ValidationError as error:
        raise HandleError(_explain(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HandleError(f"not a handle: {error}") from error
    return _checked(handle)


def owner(handle: Handle) -> str:
    """The engine request id whose KV this is (``engine_request_id(request, attempt)``)."""
    return handle.remote_request_id


def source(handle: Handle) -> tuple[str, int]:
    """Host and port of the engine that holds the KV."""
    return handle.remote_host, handle.remote_port


def blocks_held(handle: Handle) -> int:
    """How many blocks the handle pins on its source, over all groups."""
    return sum(len(group) for group in handle.remote_block_ids)


def _checked(handle: Handle) -> Handle:
    """``handle`` if its fields fit each other; HandleError otherwise."""
    blocks = blocks_held(handle)
    if not blocks:
        raise HandleError("remote_block_ids is empty")
    if blocks > BLOCKS_MAX:
        raise HandleError(f"remote_block_ids names {blocks} blocks, more than {BLOCKS_MAX}")
    if not handle.do_remote_prefill:
        raise HandleError("do_remote_prefill is false: nothing may be read")
    if handle.do_remote_decode:
        raise HandleError("do_remote_decode is true: the KV was asked for, not held")
    if "," in handle.remote_request_id:
        # Engines renew leases with a comma-separated list of request ids.
        raise HandleError("remote_request_id contains a comma")
    return handle


def _explain(error: msgspec.ValidationError) -> str:
    """The error with the name of the field in front."""
    reason, _, path = str(error).rpartition(" - at `$")
    field = path.strip("`.").partition("[")[0]
    return f"{field}: {reason}" if reason and field else str(error)

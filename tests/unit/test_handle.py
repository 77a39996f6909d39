"""Handles: only what can be used gets through, whatever comes in."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer import handle as handles
from transfer.handle import Handle, HandleError

GOOD: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2, 3]],
    "remote_engine_id": "prefill-0-1f2e",
    "remote_request_id": "chatcmpl-7~1",
    "remote_host": "10.0.0.7",
    "remote_port": 5600,
    "tp_size": 2,
    "dcp_size": 1,
    "pp_size": 1,
    "remote_num_tokens": 90,
    "remote_blocks_expiry_time": 1756.5,
    "transfer_mode": "pull",
    "remote_prefill_cached_tokens": 32,
}
REQUIRED = (
    "do_remote_prefill",
    "remote_block_ids",
    "remote_engine_id",
    "remote_request_id",
    "remote_host",
    "remote_port",
    "tp_size",
    "remote_num_tokens",
)


def changed(**fields: Any) -> dict[str, Any]:
    return {**GOOD, **fields}


def test_the_decode_engine_gets_what_the_prefill_engine_gave() -> None:
    handle = handles.decode(handles.encode(handles.from_params(GOOD)))
    assert handles.to_params(handle) == GOOD


def test_blocks_may_come_as_tuples_and_unknown_keys_are_dropped() -> None:
    params = changed(remote_block_ids=([1, 2, 3],), something_new={"x": 1}, _private=1)
    assert handles.to_params(handles.from_params(params)) == GOOD


def test_optional_fields_may_be_absent_or_none() -> None:
    params = {name: GOOD[name] for name in REQUIRED} | {"remote_blocks_expiry_time": None}
    handle = handles.from_params(params)
    assert (handle.dcp_size, handle.pp_size, handle.transfer_mode) == (1, 1, "pull")
    assert "remote_blocks_expiry_time" not in handles.to_params(handle)


def test_a_caller_can_tell_whose_handle_it_is_and_where_it_leads() -> None:
    handle = handles.from_params(GOOD)
    assert handles.owner(handle) == "chatcmpl-7~1"
    assert handles.source(handle) == ("10.0.0.7", 5600)
    assert handles.blocks_held(handle) == 3


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("how", ["absent", "none"])
def test_what_is_missing_is_named(name: str, how: str) -> None:
    params = changed(**{name: None})
    if how == "absent":
        del params[name]
    with pytest.raises(HandleError, match=f"^{name} "):
        handles.from_params(params)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("remote_block_ids", []),
        ("remote_block_ids", [[]]),
        ("remote_block_ids", [1, 2]),
        ("remote_block_ids", [["1"]]),
        ("remote_block_ids", [[-1]]),
        ("remote_block_ids", [[1 << 40]]),
        ("remote_block_ids", [[1]] * 257),
        ("remote_block_ids", "1,2"),
        ("remote_engine_id", ""),
        ("remote_engine_id", 7),
        ("remote_request_id", "x" * 2000),
        ("remote_request_id", "a,b"),
        ("remote_host", ""),
        ("remote_host", ["h"]),
        ("remote_port", 0),
        ("remote_port", 65536),
        ("remote_port", "5600"),
        ("remote_port", 5600.5),
        ("tp_size", 0),
        ("tp_size", 1 << 20),
        ("tp_size", True),
        ("dcp_size", -1),
        ("remote_num_tokens", 0),
        ("remote_num_tokens", 1 << 60),
        ("remote_blocks_expiry_time", "soon"),
        ("remote_prefill_cached_tokens", -1),
        ("transfer_mode", "push"),
        ("do_remote_prefill", False),
        ("do_remote_prefill", "yes"),
        ("do_remote_decode", True),
    ],
)
def test_what_is_wrong_is_named(name: str, value: object) -> None:
    with pytest.raises(HandleError, match=f"^{name}"):
        handles.from_params(changed(**{name: value}))
    with pytest.raises(HandleError, match=f"^{name}"):
        handles.decode(msgspec.msgpack.encode(changed(**{name: value})))


@pytest.mark.parametrize("params", [None, [], "handle", 7, b"x"])
def test_only_a_dict_is_looked_at(params: object) -> None:
    with pytest.raises(HandleError, match="kv_transfer_params"):
        handles.from_params(params)


def test_too_many_blocks_over_all_groups() -> None:
    half = list(range(handles.BLOCKS_MAX // 2 + 1))
    with pytest.raises(HandleError, match=r"^remote_block_ids"):
        handles.from_params(changed(remote_block_ids=[half, half]))


def test_an_oversized_frame_is_not_even_parsed() -> None:
    with pytest.raises(HandleError, match="bytes"):
        handles.decode(b"\x00" * (handles.ENCODED_BYTES_MAX + 1))


@given(st.binary(max_size=400))
def test_garbage_is_a_handle_error(frame: bytes) -> None:
    try:
        handle = handles.decode(frame)
    except HandleError:
        return
    assert handles.decode(handles.encode(handle)) == handle


@given(st.data())
def test_one_damaged_byte_is_a_handle_error_or_another_valid_handle(data: st.DataObject) -> None:
    frame = bytearray(handles.encode(handles.from_params(GOOD)))
    place = data.draw(st.integers(0, len(frame) - 1))
    frame[place] = data.draw(st.integers(0, 255))
    try:
        handle = handles.decode(bytes(frame))
    except HandleError:
        return
    assert 1 <= handle.remote_port <= 65535
    assert handles.blocks_held(handle) > 0


@given(
    st.dictionaries(
        st.sampled_from([*GOOD, "extra"]),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(),
            st.text(),
            st.lists(st.lists(st.integers())),
        ),
    )
)
def test_any_params_are_a_handle_or_a_handle_error(fields: dict[str, Any]) -> None:
    try:
        handle = handles.from_params({**GOOD, **fields})
    except HandleError:
        return
    assert isinstance(handle, Handle)
    assert handles.from_params(handles.to_params(handle)) == handle

"""The official Anthropic client against the running cluster."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from anthropic.types import MessageParam, ToolParam

from tests.e2e.harness import MODEL, Server

PROSE = "The slowest sibling decides. "
HELLO: list[MessageParam] = [{"role": "user", "content": "Who goes first?"}]
GREEDY = {"temperature": 0.0}
CLOCK: ToolParam = {
    "name": "clock",
    "description": "What time it is.",
    "strict": True,
    "input_schema": {
        "type": "object",
        "properties": {"zone": {"type": "string", "enum": ["UTC", "EET"]}},
        "required": ["zone"],
        "additionalProperties": False,
    },
}


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def input_of(usage: anthropic.types.Usage) -> int:
    cached = usage.cache_read_input_tokens or 0
    return int(usage.input_tokens + cached + (usage.cache_creation_input_tokens or 0))


@pytest.mark.parametrize("repeats", [1, 60], ids=["short", "long"])
def test_message_and_its_stream_agree(claude_client: anthropic.Anthropic, repeats: int) -> None:
    arguments: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 12,
        "extra_body": GREEDY,
        "system": PROSE * repeats,
        "messages": [
            {"role": "user", "content": "Ποιος; 🏺"},
            {"role": "assistant", "content": "Nobody."},
            {"role": "user", "content": [{"type": "text", "text": "And then?"}]},
        ],
    }
    whole = claude_client.messages.create(**arguments)
    assert whole.role == "assistant"
    assert whole.stop_reason in {"end_turn", "max_tokens"}
    assert 0 < whole.usage.output_tokens <= 12
    with claude_client.messages.stream(**arguments) as stream:
        pieces = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert pieces == text_of(final) == text_of(whole)
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_stream_events_come_in_order(claude_client: anthropic.Anthropic) -> None:
    events = list(
        claude_client.messages.create(model=MODEL, max_tokens=6, messages=HELLO, stream=True)
    )
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop")
    assert "message_delta" in kinds


def test_stop_sequences(claude_client: anthropic.Anthropic) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "messages": HELLO, "extra_body": GREEDY}
    free = text_of(claude_client.messages.create(**arguments, max_tokens=24))
    stop = free[8:11]
    cut = claude_client.messages.create(**arguments, max_tokens=24, stop_sequences=[stop])
    assert text_of(cut) == free[: free.index(stop)]
    assert cut.stop_reason == "stop_sequence"


@pytest.mark.parametrize("padding", [0, 60], ids=["short", "long"])
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "clock"}], ids=str)
def test_tool_use(claude_client: anthropic.Anthropic, choice: dict[str, Any], padding: int) -> None:
    answer = claude_client.messages.create(
        model=MODEL,
        max_tokens=900,
        messages=[{"role": "user", "content": PROSE * padding + "What time is it?"}],
        tools=[CLOCK],
        tool_choice={**choice, "disable_parallel_tool_use": True},
        extra_body=GREEDY,
    )
    assert answer.stop_reason == "tool_use"
    (use,) = [block for block in answer.content if block.type == "tool_use"]
    assert use.name == "clock"
    assert use.input["zone"] in {"UTC", "EET"}


def test_tool_results_are_understood(claude_client: anthropic.Anthropic) -> None:
    answer = claude_client.messages.create(
        model=MODEL,
        max_tokens=8,
        tools=[CLOCK],
        messages=[
            *HELLO,
            {
                "role": "assistant",
                "content": [
                    {"type": "tool_use", "id": "use-1", "name": "clock", "input": {"zone": "UTC"}}
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "use-1", "content": "noon"}],
            },
        ],
    )
    assert answer.usage.output_tokens > 0


def test_count_tokens(claude_client: anthropic.Anthropic) -> None:
    counted = claude_client.messages.count_tokens(model=MODEL, messages=HELLO)
    answer = claude_client.messages.create(model=MODEL, max_tokens=1, messages=HELLO)
    assert counted.input_tokens == answer.usage.input_tokens


def test_cached_input_is_counted_apart(claude_client: anthropic.Anthropic) -> None:
    arguments: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 1,
        "messages": HELLO,
        "system": "Cached once and for all. " * 60,
    }
    first = claude_client.messages.create(**arguments).usage
    again = [claude_client.messages.create(**arguments).usage for _ in range(2)]
    assert all((usage.cache_read_input_tokens or 0) > 96 for usage in again)
    assert {input_of(usage) for usage in again} == {input_of(first)}


def test_key_in_anthropics_own_header(cluster: Server) -> None:
    with anthropic.Anthropic(
        base_url=cluster.base_url, api_key=cluster.api_key, max_retries=0
    ) as made:
        answer = made.messages.create(model=MODEL, max_tokens=1, messages=HELLO)
    assert answer.usage.output_tokens == 1

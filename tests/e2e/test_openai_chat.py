"""The official OpenAI client: chat, tools, constrained output, responses, tokens.

The model is random, so nothing here is about sense: counts, shapes, constraints and
equalities that hold for any model.
"""

from __future__ import annotations

import enum
import json
import math
import re
from typing import Any

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from tests.e2e.harness import MODEL

PROSE = "A queue without a limit is a promise that can't be kept. "
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Who goes first?"}]

WHITESPACE_PENALTY = 2.0
"""Tool calls may contain any white space, of which a random model is fond: not for ever."""

WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Delphi", "Athens", "Corinth"]},
                "metric": {"type": "boolean"},
            },
            "required": ["city", "metric"],
            "additionalProperties": False,
        },
    },
}
CLOCK: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "What time it is.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string", "enum": ["UTC", "EET"]}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}


class Colour(enum.StrEnum):
    RED = "red"
    GREEN = "green"


class Answer(pydantic.BaseModel):
    colour: Colour
    sure: bool


@pytest.mark.parametrize("repeats", [1, 40], ids=["short", "long"])
def test_chat_and_its_stream_agree(client: openai.OpenAI, repeats: int) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": PROSE * repeats},
        {"role": "user", "content": "Γνῶθι σεαυτόν 🏛️ — say it in English."},
        {"role": "assistant", "content": "Know thyself."},
        {"role": "user", "content": "And who said it?"},
    ]
    whole = client.chat.completions.create(
        model=MODEL, messages=messages, max_completion_tokens=16, temperature=0
    )
    with client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_completion_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == (whole.choices[0].message.content or "")
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_chat_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, n=3, max_tokens=8, temperature=1.0, seed=4
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: openai.OpenAI, stream: bool) -> None:
    arguments: dict[str, Any] = {
        "model": MODEL,
        "messages": HELLO,
        "max_tokens": 5,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    if stream:
        chunks = client.chat.completions.create(**arguments, stream=True)
        scored = [c.choices[0].logprobs for c in chunks if c.choices and c.choices[0].logprobs]
    else:
        scored = [client.chat.completions.create(**arguments).choices[0].logprobs]
    tokens = [token for part in scored for token in (part.content or [])]
    assert len(tokens) == 5
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert math.isclose(token.logprob, token.top_logprobs[0].logprob, abs_tol=1e-4)


@pytest.mark.parametrize("padding", [0, 40], ids=["short", "long"])
@pytest.mark.parametrize("choice", ["required", "named"])
def test_tool_call(client: openai.OpenAI, choice: str, padding: int) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": PROSE * padding + "What is the weather?"}],
        tools=[WEATHER, CLOCK],
        tool_choice="required" if choice == "required" else named,
        max_tokens=300,
        temperature=0,
        frequency_penalty=WHITESPACE_PENALTY,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls
    for call in calls:
        assert call.type == "function"
        arguments = json.loads(call.function.arguments)
        if call.function.name == "weather":
            assert arguments["city"] in {"Delphi", "Athens", "Corinth"}
            assert isinstance(arguments["metric"], bool)
        else:
            assert choice == "required"
            assert arguments["zone"] in {"UTC", "EET"}


def test_streamed_tool_call(client: openai.OpenAI) -> None:
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for chunk in client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=300,
        temperature=0,
        frequency_penalty=WHITESPACE_PENALTY,
        stream=True,
    ):
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or []:
                assert call.function is not None
                names.setdefault(call.index, call.function.name or "")
                arguments[call.index] = arguments.get(call.index, "") + (
                    call.function.arguments or ""
                )
    assert names == {0: "weather"}
    assert set(json.loads(arguments[0])) == {"city", "metric"}


def test_tools_left_to_the_model_and_their_results(client: openai.OpenAI) -> None:
    asked = client.chat.completions.create(
        model=MODEL, messages=HELLO, tools=[WEATHER], tool_choice="auto", max_tokens=16
    )
    assert asked.choices[0].finish_reason in {"length", "stop", "tool_calls"}
    told = client.chat.completions.create(
        model=MODEL,
        messages=[
            *HELLO,
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": "call-1",
                        "type": "function",
                        "function": {"name": "clock", "arguments": '{"zone": "UTC"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call-1", "content": "noon"},
        ],
        tools=[CLOCK],
        tool_choice="none",
        max_tokens=16,
    )
    assert told.choices[0].message.role == "assistant"
    assert not told.choices[0].message.tool_calls


@pytest.mark.parametrize("padding", [0, 40], ids=["short", "long"])
def test_json_schema(client: openai.OpenAI, padding: int) -> None:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": PROSE * padding + "Which colour?"}],
        response_format=Answer,
        max_tokens=100,
        temperature=0,
    )
    assert isinstance(answer.choices[0].message.parsed, Answer)


def test_json_schema_streamed(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, response_format=Answer, max_tokens=100, temperature=0
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Answer)


@pytest.mark.parametrize("padding", [0, 40], ids=["short", "long"])
def test_regex_and_choice(client: openai.OpenAI, padding: int) -> None:
    def constrained(by: dict[str, Any]) -> str:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": PROSE * padding + "Well?"}],
            max_tokens=40,
            temperature=1.0,
            seed=2,
            extra_body={"structured_outputs": by},
        )
        return answer.choices[0].message.content or ""

    assert re.fullmatch(r"\d{3}-[a-f]{4}", constrained({"regex": r"\d{3}-[a-f]{4}"}))
    assert constrained({"choice": ["yes", "no", "perhaps"]}) in {"yes", "no", "perhaps"}


# --- responses, tokens, priority --------------------------------------------------


@pytest.mark.parametrize("padding", [1, 40], ids=["short", "long"])
def test_responses(client: openai.OpenAI, padding: int) -> None:
    answer = client.responses.create(
        model=MODEL,
        instructions="Be brief.",
        input=PROSE * padding,
        max_output_tokens=12,
        temperature=0,
    )
    assert answer.usage is not None
    assert 0 < answer.usage.output_tokens <= 12
    events = list(
        client.responses.create(
            model=MODEL,
            instructions="Be brief.",
            input=PROSE * padding,
            max_output_tokens=12,
            temperature=0,
            stream=True,
        )
    )
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created"
    assert kinds[-1] in {"response.completed", "response.incomplete"}
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == answer.output_text


def test_responses_json_schema(client: openai.OpenAI) -> None:
    answer = client.responses.parse(
        model=MODEL, input="Which colour?", text_format=Answer, max_output_tokens=100
    )
    assert isinstance(answer.output_parsed, Answer)


def test_tokens_there_and_back(client: openai.OpenAI) -> None:
    text = "Ancient Δελφοί, 3 tripods & 🏺"
    tokens = client.post("/../tokenize", body={"model": MODEL, "prompt": text}, cast_to=object)
    assert isinstance(tokens, dict)
    assert tokens["count"] == len(tokens["tokens"])
    back = client.post(
        "/../detokenize", body={"model": MODEL, "tokens": tokens["tokens"]}, cast_to=object
    )
    assert isinstance(back, dict)
    assert back["prompt"] == text
    chat = client.post("/../tokenize", body={"model": MODEL, "messages": HELLO}, cast_to=object)
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
    assert isinstance(chat, dict)
    assert answer.usage is not None
    assert chat["count"] == answer.usage.prompt_tokens


@pytest.mark.parametrize("priority", [-3, 0, 7])
def test_priority_is_accepted(client: openai.OpenAI, priority: int) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=2, extra_body={"priority": priority}
    )
    assert answer.choices[0].finish_reason in {"length", "stop"}


def test_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [MODEL]

"""The official OpenAI client against the running cluster: what a program sees.

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

from tests.e2e.harness import BLOCK_TOKENS, MODEL

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


# --- completions ----------------------------------------------------------------


@pytest.mark.parametrize("repeats", [1, 40], ids=["short", "long"])
def test_completion_reports_what_it_used(client: openai.OpenAI, repeats: int) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt=PROSE * repeats,
        max_tokens=7,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    choice = answer.choices[0]
    extra: Any = choice.model_extra
    assert choice.finish_reason == "length"
    assert len(extra["token_ids"]) == 7
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    assert answer.usage.prompt_tokens == len(extra["prompt_token_ids"])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7


@pytest.mark.parametrize("repeats", [1, 40], ids=["short", "long"])
def test_streamed_completion_is_the_same_text(client: openai.OpenAI, repeats: int) -> None:
    prompt = PROSE * repeats
    whole = client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0)
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == (
        whole.choices[0].text
    )
    ends = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert ends == [whole.choices[0].finish_reason]
    usage = chunks[-1].usage
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("repeats", [1, 40], ids=["short", "long"])
def test_several_choices(client: openai.OpenAI, count: int, repeats: int) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=PROSE * repeats, n=count, max_tokens=8, temperature=1.0, seed=5
    )
    assert sorted(choice.index for choice in answer.choices) == list(range(count))
    assert len({choice.text for choice in answer.choices}) == count
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 8 * count


def test_several_choices_streamed(client: openai.OpenAI) -> None:
    texts = {0: "", 1: "", 2: ""}
    ends: dict[int, str] = {}
    for chunk in client.completions.create(
        model=MODEL, prompt=PROSE, n=3, max_tokens=8, temperature=1.0, seed=6, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert set(ends) == {0, 1, 2}
    assert len(set(texts.values())) == 3


def test_several_prompts_answer_in_order(client: openai.OpenAI) -> None:
    prompts = [PROSE, PROSE * 20, "Say no.", PROSE * 21]
    together = client.completions.create(model=MODEL, prompt=prompts, max_tokens=6, temperature=0)
    alone = [
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=6, temperature=0)
        for prompt in prompts
    ]
    by_index = sorted(together.choices, key=lambda choice: choice.index)
    assert [choice.text for choice in by_index] == [answer.choices[0].text for answer in alone]


@pytest.mark.parametrize("repeats", [1, 40], ids=["short", "long"])
def test_echo_repeats_the_prompt(client: openai.OpenAI, repeats: int) -> None:
    prompt = PROSE * repeats
    arguments: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 5}
    plain = client.completions.create(**arguments, temperature=0)
    echoed = client.completions.create(**arguments, temperature=0, echo=True)
    assert echoed.choices[0].text == prompt + plain.choices[0].text


def test_echo_with_logprobs_scores_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=PROSE, max_tokens=0, echo=True, logprobs=2, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert answer.usage is not None
    assert len(logprobs.token_logprobs) >= answer.usage.prompt_tokens
    assert logprobs.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])


@pytest.mark.parametrize("repeats", [1, 40], ids=["short", "long"])
def test_completion_logprobs(client: openai.OpenAI, repeats: int) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=PROSE * repeats, max_tokens=6, logprobs=3, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert answer.usage is not None
    assert logprobs.tokens is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.tokens) == answer.usage.completion_tokens
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen is not None
        assert math.isclose(chosen, max(top.values()), abs_tol=1e-4)
        assert sum(math.exp(value) for value in top.values()) <= 1.0001


@pytest.mark.parametrize("repeats", [1, 40], ids=["short", "long"])
def test_prompt_logprobs(client: openai.OpenAI, repeats: int) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt=PROSE * repeats,
        max_tokens=2,
        temperature=0,
        extra_body={"prompt_logprobs": 1},
    )
    extra: Any = answer.choices[0].model_extra
    assert answer.usage is not None
    assert len(extra["prompt_logprobs"]) == answer.usage.prompt_tokens
    assert extra["prompt_logprobs"][0] is None
    assert all(entry for entry in extra["prompt_logprobs"][1:])


@pytest.mark.parametrize("repeats", [1, 40], ids=["short", "long"])
def test_stop_string_ends_the_answer(client: openai.OpenAI, repeats: int) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "prompt": PROSE * repeats, "max_tokens": 24}
    free = client.completions.create(**arguments, temperature=1.0, seed=9).choices[0].text
    stop = free[10:13]
    first = free.index(stop)
    cut = client.completions.create(**arguments, temperature=1.0, seed=9, stop=[stop])
    assert cut.choices[0].text == free[:first]
    assert cut.choices[0].finish_reason == "stop"
    kept = client.completions.create(
        **arguments,
        temperature=1.0,
        seed=9,
        stop=[stop],
        extra_body={"include_stop_str_in_output": True},
    )
    assert kept.choices[0].text == free[: first + len(stop)]


def test_min_tokens_holds_back_the_stop_token(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "prompt": PROSE * 10, "max_tokens": 12}
    biased = {"stop_token_ids": [300], "logit_bias": {"300": 100}}
    at_once = client.completions.create(**arguments, temperature=0, extra_body=biased)
    later = client.completions.create(
        **arguments, temperature=0, extra_body={**biased, "min_tokens": 6}
    )
    assert at_once.usage is not None
    assert later.usage is not None
    assert at_once.usage.completion_tokens == 1
    assert at_once.choices[0].finish_reason == "stop"
    assert later.usage.completion_tokens == 7


@pytest.mark.parametrize("repeats", [1, 40], ids=["short", "long"])
def test_seed_decides(client: openai.OpenAI, repeats: int) -> None:
    def sampled(seed: int) -> str:
        answer = client.completions.create(
            model=MODEL, prompt=PROSE * repeats, max_tokens=16, temperature=1.0, seed=seed
        )
        return answer.choices[0].text

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


@pytest.mark.parametrize("tokens", [70, 400], ids=["local", "remote"])
def test_cached_tokens_tell_the_truth(client: openai.OpenAI, tokens: int) -> None:
    prompt = [300 + (index * 37 + tokens) % 200 for index in range(tokens)]

    def cached(stream: bool) -> int:
        if not stream:
            answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=2)
            usage = answer.usage
        else:
            chunks = client.completions.create(
                model=MODEL,
                prompt=prompt,
                max_tokens=2,
                stream=True,
                stream_options={"include_usage": True},
            )
            usage = list(chunks)[-1].usage
        assert usage is not None
        details = usage.prompt_tokens_details
        return (details.cached_tokens or 0) if details else 0

    assert cached(stream=False) == 0
    # One of the decode workers may see the prompt for the first time.
    again = [cached(stream=bool(turn % 2)) for turn in range(4)]
    full_blocks = tokens // BLOCK_TOKENS * BLOCK_TOKENS
    assert all(value % BLOCK_TOKENS == 0 for value in again)
    assert max(again) == full_blocks
    if tokens > 96:
        assert min(again) == full_blocks, "the prefill worker had it"


# --- chat -----------------------------------------------------------------------


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

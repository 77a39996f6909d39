"""The official OpenAI client: completions.

The model is random, so nothing here is about sense: counts, shapes and equalities that
hold for any model.
"""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest

from tests.e2e.harness import BLOCK_TOKENS, MODEL

PROSE = "A queue without a limit is a promise that can't be kept. "


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
        return str(answer.choices[0].text)

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

"""The requests on which the cluster and a plain engine must agree.

Lengths around block boundaries and at the limits, sampling with seeds, shared prefixes,
scripts of all kinds, conversations with and without tools.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.harness import BLOCK_TOKENS, MAX_MODEL_LEN, REMOTE_MIN_TOKENS

OUTPUT_TOKENS = 12
PROSE = (Path(__file__).parents[2] / "examples/documents/queues-and-waiting.md").read_text()
BOUNDARIES = [
    blocks * BLOCK_TOKENS + offset
    for blocks in (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 33, 48)
    for offset in (-1, 0, 1)
]
EXTREMES = [1, 2, 5, MAX_MODEL_LEN - 100, MAX_MODEL_LEN - 13, MAX_MODEL_LEN - OUTPUT_TOKENS]
UNICODE = [
    "γνῶθι σεαυτόν",
    "火星の南極にはドライアイスがある。",
    "🏛️🏺👩‍👩‍👧‍👦 \U0001f3fb",
    "لا إله إلا الله ‏־ עברית",
    "zero\u0000width\u200bjoin\u200der and \ufeff marks \u202e backwards",
    "é vs e\u0301, ﬁ vs fi, ß vs ẞ",
]
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "What time it is in a zone of the world, to the minute.",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string"}, "seconds": {"type": "boolean"}},
            "required": ["zone"],
        },
    },
}


@dataclass(frozen=True)
class Case:
    """A request; ``remote_tokens``: prompt tokens that must come by NIXL, None if unknown."""

    name: str
    path: str
    body: dict[str, Any]
    remote_tokens: int | None = None


def random_prompt(seed: int, tokens: int) -> list[int]:
    """Token ids that no other case begins with."""
    dice = random.Random(seed)
    return [dice.randrange(300, 3000) for _ in range(tokens)]


def completion(name: str, prompt: Any, **extra: Any) -> Case:
    remote = None
    if isinstance(prompt, list):
        remote = len(prompt) if len(prompt) >= REMOTE_MIN_TOKENS else 0
    body = {
        "prompt": prompt,
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "logprobs": 2,
        "ignore_eos": True,
        **extra,
    }
    return Case(name, "/v1/completions", body, remote)


def chat(name: str, messages: list[dict[str, Any]], **extra: Any) -> Case:
    body = {
        "messages": messages,
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        **extra,
    }
    return Case(name, "/v1/chat/completions", body)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def length_cases() -> list[Case]:
    return [
        completion(f"length-{tokens}", random_prompt(tokens, tokens))
        for tokens in BOUNDARIES + EXTREMES
    ]


def sampling_cases() -> list[Case]:
    options: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 40},
        {"temperature": 1.0, "min_p": 0.02, "repetition_penalty": 1.2},
        {"temperature": 0.9, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"temperature": 1.0, "logit_bias": {"400": 3.0}, "min_tokens": 4},
    ]
    return [
        completion(
            f"sampled-{number}-{tokens}",
            random_prompt(1000 + 10 * number + tokens, tokens),
            seed=number,
            **option,
        )
        for number, option in enumerate(options)
        for tokens in (60, 333)
    ]


def shared_prefix_cases() -> list[Case]:
    """Siblings over one prefix: what a decode worker has of it need not move again."""
    prefix = random_prompt(77, 10 * BLOCK_TOKENS)
    cases = []
    for number, suffix in enumerate([1, 31, 32, 33, 96, 200]):
        case = completion(f"prefix-{suffix}", prefix + random_prompt(5000 + number, suffix))
        cases.append(Case(case.name, case.path, case.body))
    return cases


def unicode_cases() -> list[Case]:
    return [
        completion(f"unicode-{number}-{repeats}", f"{text} " * repeats)
        for number, text in enumerate(UNICODE)
        for repeats in (1, 25)
    ]


def chat_cases() -> list[Case]:
    words = PROSE.split()
    long = " ".join(words[:300])
    told = [
        {"role": "system", "content": " ".join(words[300:420])},
        user("What explodes?"),
        {"role": "assistant", "content": "Waiting."},
        user("Why?"),
    ]
    called = [
        user("What time is it?"),
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
    ]
    schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
    strict = {"name": "answer", "schema": {**schema, "additionalProperties": False}}
    return [
        chat("chat-short", [user("Who goes first?")]),
        chat("chat-long", [user(long)]),
        chat("chat-turns", told),
        chat("chat-tools-auto", [user("Time?")], tools=[CLOCK]),
        chat("chat-tools-long", [user(long)], tools=[CLOCK], tool_choice="auto"),
        chat("chat-tool-result", called, tools=[CLOCK]),
        chat("chat-schema", [user(long)], response_format=_schema_format(strict)),
        chat("chat-stop", [user(" ".join(words[420:640]))], stop=["e", "a"]),
        chat("chat-sampled", [user(" ".join(words[640:900]))], temperature=1.0, seed=3),
    ]


def _schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {**schema, "strict": True}}


CASES = [
    *length_cases(),
    *sampling_cases(),
    *shared_prefix_cases(),
    *unicode_cases(),
    *chat_cases(),
]

"""Child of ``pythia bench overhead``: a load generator, a process of its own.

Streams chat completions, each over a connection of its own, and reads no more of the answers
than it has to: when the first token's event came, how many events there were and what the
usage says. It knows nothing of who serves them; both sides get the same prompts.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import re
import time
import urllib.parse
from typing import Any, cast

import msgspec
import uvloop

from cluster.bench.child import Parent
from cluster.process import die_with_parent

EVENT = b"\ndata: {"
"""Starts an event; can't be part of one, whose line feeds are escaped."""
EVENTS_BEFORE_TOKENS = 1
"""A stream begins with an event that names the role and carries no token."""
LAST_CHUNK = b"0\r\n\r\n"
STATUS_OK = b"HTTP/1.1 200"
TAIL_BYTES = 4096
ANSWER_S = 300.0
_USAGE = re.compile(rb'"prompt_tokens":\s*(\d+).*?"completion_tokens":\s*(\d+)')


class LoadError(RuntimeError):
    """The server did not answer as it should."""


class Load(msgspec.Struct, frozen=True):
    """What to send: ``calls`` chats, ``concurrency`` at a time, each of ``prompt_words``
    random words and ``output_tokens`` tokens of answer. ``extra`` is added to every body."""

    base_url: str
    model: str
    calls: int
    concurrency: int
    prompt_words: int
    output_tokens: int
    seed: int
    extra: dict[str, Any] = {}


class Outcome(msgspec.Struct, frozen=True):
    """What came back. ``ttft_s``: of each call; ``second_s``: the same for its second token,
    0 if it came with the first; ``events``: those that carried tokens."""

    elapsed_s: float
    ttft_s: list[float]
    second_s: list[float]
    prompt_tokens: int
    output_tokens: int
    events: int


class _Stream(asyncio.Protocol):
    """One chat on a connection of its own."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sent_s = 0.0
        self._tail = b""
        self.ttft_s = 0.0
        self.second_s = 0.0
        self.events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(LoadError(f"cut off ({exc}) behind {self._tail[-500:]!r}"))

    def data_received(self, data: bytes) -> None:
        kept = self._tail[-len(EVENT) + 1 :]
        self._tail += data
        self.events += (kept + data).count(EVENT)
        if not self.ttft_s and self.events > EVENTS_BEFORE_TOKENS:
            self.ttft_s = time.perf_counter() - self._sent_s
        elif not self.second_s and self.events > EVENTS_BEFORE_TOKENS + 1:
            self.second_s = time.perf_counter() - self._sent_s
        if self._done.done():
            return
        if self.events:
            if self._tail.endswith(LAST_CHUNK):
                self._done.set_result(None)
            self._tail = self._tail[-TAIL_BYTES:]
        elif not self._tail.startswith(STATUS_OK[: len(self._tail)]):
            self._done.set_exception(LoadError(f"the server refused: {self._tail!r}"))

    async def ask(self, head: bytes, body: bytes) -> tuple[int, int]:
        """The chat. Its prompt's and its answer's tokens."""
        assert self._transport is not None
        self._sent_s = time.perf_counter()
        self._transport.write(head % len(body) + body)
        try:
            await asyncio.wait_for(self._done, ANSWER_S)
        finally:
            self._transport.close()
        usage = _USAGE.search(self._tail)
        if usage is None:
            raise LoadError(f"no usage at the end of the answer: {self._tail[-500:]!r}")
        return int(usage[1]), int(usage[2])


def prompt(rng: random.Random, words: int) -> str:
    """Random words: hardly any two prompts share a block of tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(rng.choices(letters, k=rng.randint(2, 7))) for _ in range(words))


async def generate(load: Load) -> Outcome:
    """Send the load and wait for all answers. LoadError for any that is not as asked."""
    url = urllib.parse.urlsplit(load.base_url)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {url.netloc}\r\n"
        "Content-Type: application/json\r\nContent-Length: %d\r\n"
        "Connection: close\r\n\r\n"
    ).encode()
    rng = random.Random(load.seed)
    bodies = [_body(load, rng) for _ in range(load.calls)]
    loop = asyncio.get_running_loop()
    host, port = url.hostname or "", url.port or 80
    results: list[tuple[_Stream, int, int]] = []

    async def work() -> None:
        while bodies:
            body = bodies.pop()
            _, stream = await loop.create_connection(_Stream, host, port)
            tokens = await stream.ask(head, body)
            results.append((stream, *tokens))

    started_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(load.concurrency):
            group.create_task(work())
    elapsed_s = time.perf_counter() - started_s
    if any(output != load.output_tokens for _, _, output in results):
        raise LoadError(f"answers are not all of {load.output_tokens} tokens")
    return Outcome(
        elapsed_s=elapsed_s,
        ttft_s=[stream.ttft_s for stream, _, _ in results],
        second_s=[stream.second_s for stream, _, _ in results],
        prompt_tokens=sum(prompt_tokens for _, prompt_tokens, _ in results),
        output_tokens=sum(output for _, _, output in results),
        # The role comes before the tokens, the usage behind them.
        events=sum(stream.events - EVENTS_BEFORE_TOKENS - 1 for stream, _, _ in results),
    )


def _body(load: Load, rng: random.Random) -> bytes:
    return json.dumps(
        {
            "model": load.model,
            "messages": [{"role": "user", "content": prompt(rng, load.prompt_words)}],
            "max_tokens": load.output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **load.extra,
        }
    ).encode()


async def _answer(question: dict[str, Any]) -> dict[str, Any]:
    gc.collect()
    answer: dict[str, Any] = {}
    try:
        answer = msgspec.to_builtins(await generate(msgspec.convert(question, Load)))
    except* (LoadError, OSError, TimeoutError) as errors:
        answer["error"] = "; ".join(repr(error) for error in errors.exceptions)
    return answer


async def _run() -> None:
    parent = Parent()
    gc.disable()
    parent.say({"ready": True})
    await parent.serve(_answer)


if __name__ == "__main__":
    die_with_parent(os.getppid())
    uvloop.run(_run())

"""Pins in real engines: a cluster of one worker whose KV cache is soon full.

What is pinned of a run survives traffic that evicts the same of a call without a run; answers are
those of a plain engine; and nothing is pinned when runs are over, however they ended.
"""

from __future__ import annotations

import random
import re
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import msgspec
import openai
import pytest

from cluster.config import parse
from cluster.launch import LocalCluster
from cluster.process import free_port
from coordinator.protocol import Load
from tests.e2e.harness import API_KEY, BLOCK_TOKENS, MODEL, Control, wait_for

KV_BLOCKS = 192
CLUSTER = f"""\
model: {MODEL}
name: e2e-retention
engine:
  dtype: float32
  enforce_eager: true
  block_size: {BLOCK_TOKENS}
  max_model_len: 2048
  max_num_seqs: 16
  kv_cache_memory_bytes: 268435456
  num_gpu_blocks_override: {KV_BLOCKS}
workers:
  - {{name: worker-0, role: mixed}}
api:
  port: 0
  keys: [{API_KEY}]
  arguments: {{enable_prompt_tokens_details: true}}
coordinator:
  port: 0
placement:
  retention: true
  admission: false # runs that pause would keep others from beginning
"""
ROUNDS = 6
PROMPT_TOKENS = 20 * BLOCK_TOKENS
PAUSE_S = 8.0
"""Longer than it takes to fill the cache with something else."""
SETTLED_S = 10.0


class Small:
    """The cluster, and what is known of its only engine."""

    def __init__(self, running: LocalCluster, metrics: str, control: Control) -> None:
        self.http = httpx.Client(
            base_url=running.base_url,
            headers={"Authorization": f"Bearer {API_KEY}"},
            timeout=300.0,
        )
        self.metrics = metrics
        self.control = control

    def complete(
        self, prompt: list[int], run: str = "", max_tokens: int = 8, **headers: str
    ) -> tuple[list[int], int]:
        """The tokens of an answer, and how many of the prompt's were cached."""
        if run:
            headers |= {"X-Workflow": "team", "X-Workflow-Run": run, "X-Workflow-Agent": "a"}
        response = self.http.post(
            "/v1/completions",
            json={
                "model": MODEL,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "temperature": 0.0,
                "return_token_ids": True,
            },
            headers=headers,
        )
        response.raise_for_status()
        body = response.json()
        details = body["usage"].get("prompt_tokens_details") or {}
        return body["choices"][0]["token_ids"], details.get("cached_tokens") or 0

    def load(self) -> Load:
        (worker,) = self.control.snapshot().workers
        return worker.load

    def pins_are_released(self) -> bool:
        """The core keeps nothing pinned, as far as it knows."""
        counters = self.control.snapshot().counters
        return counters["pins_released"] == counters["pins"]

    def usage(self) -> float:
        """What share of its blocks the engine itself says are in use."""
        page = httpx.get(self.metrics).text
        found = re.search(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", page, re.MULTILINE)
        assert found is not None
        return float(found[1])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    config = parse(CLUSTER, "retention.yaml")
    port = free_port("127.0.0.1")
    workers = [msgspec.structs.replace(each, metrics_port=port) for each in config.workers]
    config = msgspec.structs.replace(config, workers=workers)
    log_dir: Path = tmp_path_factory.mktemp("retention")
    with (
        LocalCluster(config, log_dir=log_dir) as running,
        closing(Control(running.control_address)) as control,
    ):
        yield Small(running, f"http://127.0.0.1:{port}/metrics", control)


def fresh(count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        found += [300 + byte for byte in uuid.uuid4().bytes]
    return found[:count]


def going_on(small: Small, run: str, rounds: int, pause_s: float = 0.3) -> list[int]:
    """An agent that goes on with what it said; its last prompt and answer."""
    text = fresh(PROMPT_TOKENS)
    for _ in range(rounds):
        answer, _ = small.complete(text, run)
        text = [*text, *answer, *fresh(BLOCK_TOKENS)]
        time.sleep(pause_s)
    return text


def test_what_is_pinned_survives_what_evicts_everything_else(
    small: Small, oracle_client: openai.OpenAI
) -> None:
    # One such pause is enough to expect another.
    going_on(small, "before", 2, PAUSE_S)
    single = fresh(PROMPT_TOKENS)
    small.complete(single)
    text = going_on(small, "kept", 1)
    wait_for(lambda: small.load().kv_blocks_pinned > 0, SETTLED_S, "a pin")
    for _ in range(3 * KV_BLOCKS * BLOCK_TOKENS // PROMPT_TOKENS // 2):
        small.complete(fresh(PROMPT_TOKENS), max_tokens=1)
    _, cached_single = small.complete(single)
    answer, cached = small.complete(text, "kept")
    assert cached_single == 0
    assert cached >= PROMPT_TOKENS
    plain = oracle_client.completions.create(
        model=MODEL,
        prompt=text,
        max_tokens=8,
        temperature=0.0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    assert answer == plain.choices[0].model_extra["token_ids"]  # type: ignore[index]


def test_a_request_that_needs_all_of_the_memory_is_served(small: Small) -> None:
    going_on(small, "pinned", ROUNDS)
    wait_for(lambda: small.load().kv_blocks_pinned > 0, SETTLED_S, "a pin")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: small.complete(fresh(1800)), range(4)))
    assert all(len(tokens) == 8 for tokens, _ in answers)


def test_a_hundred_runs_cancelled_at_random_leave_no_pinned_block(small: Small) -> None:
    rng = random.Random(5)

    def one(number: int) -> None:
        run = f"cancelled-{number}"
        text = fresh(rng.randint(2, 8) * BLOCK_TOKENS)
        for _ in range(rng.randint(0, 2)):
            answer, _ = small.complete(text, run, max_tokens=2)
            text = [*text, *answer, *fresh(BLOCK_TOKENS)]
        small.http.delete(f"/v1/workflows/team/runs/{run}")

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(one, range(100)))
    for run in ("before", "kept", "pinned"):
        small.http.delete(f"/v1/workflows/team/runs/{run}")

    def is_empty() -> bool:
        load = small.load()
        return (load.kv_blocks_used, load.kv_blocks_pinned, small.usage()) == (0, 0, 0.0)

    wait_for(is_empty, 2 * SETTLED_S, "an engine without a block in use")
    # An engine may have given up a pin before the core takes it back.
    wait_for(small.pins_are_released, SETTLED_S, "a core that keeps nothing")
    assert small.control.snapshot().counters["pins"] > 0

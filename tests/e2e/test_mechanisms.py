"""The example workflow shows the mechanisms, counted by the engines themselves.

One prefill worker and two decode workers. What the core says that it had moved, in pulls between
workers and ahead of calls, is what vLLM counts as having come from elsewhere, to the token; what
runs side by side share is computed once; what is static is there before anybody asks; and every
answer is a plain engine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import Counter
from collections.abc import Iterator

import pytest
from openai import AsyncOpenAI

from cluster.config import ClusterConfig
from coordinator.protocol import CallStatus
from examples.research_team import RunReport, run_workflow
from tests.e2e.harness import (
    BLOCK_TOKENS,
    MODEL,
    Control,
    Server,
    prompt_tokens_by_source,
    wait_for,
)
from tests.e2e.test_pulls import config_of, running

WORKERS = """\
  - {name: prefill-0, role: prefill}
  - {name: decode-0, role: decode}
  - {name: decode-1, role: decode}
"""
ROUNDS_MOST = 30
DOCUMENT_WORDS = 200
ANSWER_TOKENS = 16
SIDE_BY_SIDE = 3


@pytest.fixture(scope="module", autouse=True)
def quiet_afterwards() -> None:
    """Instead of the shared cluster's: it is not needed here."""


class Demo:
    """The cluster, and what is counted of it."""

    def __init__(self, server: Server, config: ClusterConfig, control: Control) -> None:
        self.server = server
        self.control = control
        self._pages = [
            f"http://127.0.0.1:{worker.metrics_port}/metrics" for worker in config.workers
        ]

    def core(self) -> Counter[str]:
        """What the core has counted, when nothing runs any more."""
        return Counter(self.control.wait_until_quiet().counters)

    def engines(self) -> Counter[str]:
        """What the engines have counted of prompt tokens, by where their KV came from."""
        return prompt_tokens_by_source(self._pages)

    def calls(self, reports: list[RunReport]) -> list[CallStatus]:
        """What the core tells of the calls of runs."""
        runs = {report.run for report in reports}
        return [call for call in self.control.snapshot().calls if call.context.run in runs]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    # Decoding where the prompts of others are computed would leave less to move.
    placement = "{prefetch: true, warm_up: true, prefill_workers_decode: false}"
    config = config_of(WORKERS, placement, "{queue_s: 60, pull_s: 20}")
    with (
        running(config, tmp_path_factory.mktemp("mechanisms")) as server,
        contextlib.closing(Control(server.control_address)) as control,
    ):
        yield Demo(server, config, control)


def run(server: Server, *questions: str) -> list[RunReport]:
    """The workflow, once for each question, side by side."""

    async def all_of_them() -> list[RunReport]:
        async with AsyncOpenAI(
            base_url=f"{server.base_url}/v1", api_key=server.api_key, timeout=120.0
        ) as client:
            each = (
                run_workflow(
                    client,
                    MODEL,
                    question=question,
                    document_words=DOCUMENT_WORDS,
                    max_tokens=ANSWER_TOKENS,
                )
                for question in questions
            )
            return list(await asyncio.gather(*each))

    return asyncio.run(all_of_them())


def answers(report: RunReport) -> list[tuple[str, str]]:
    """What was said, in an order of its own."""
    return sorted((call.label, call.answer) for call in report.calls)


def test_contexts_are_pulled_between_decode_workers_and_moved_ahead(
    demo: Demo, oracle: Server
) -> None:
    pulls = used = 0
    questions: list[str] = []
    said: list[list[tuple[str, str]]] = []
    for number in range(ROUNDS_MOST):
        # Every third time runs are in each other's way, and contexts have to move.
        fresh = [uuid.uuid4().hex for _ in range(SIDE_BY_SIDE if number % 3 == 2 else 1)]
        core, engines = demo.core(), demo.engines()
        reports = run(demo.server, *fresh)
        core_told, engines_told = demo.core() - core, demo.engines() - engines
        moved = core_told["tokens_moved"] + core_told["tokens_prefetched"]
        calls = demo.calls(reports)
        to_prefill = sum(call.pulled_tokens for call in calls if call.pull and call.prefill)
        if core_told["prefetches_dropped"]:
            # Some of what nobody waited for may have come all the same.
            assert engines_told["external_kv_transfer"] >= moved + to_prefill
        else:
            assert engines_told["external_kv_transfer"] == moved + to_prefill
        pulls += sum(
            call.pull.startswith("decode-") and call.pulled_tokens > 0 and not call.prefill
            for call in calls
        )
        used += core_told["prefetches_used"]
        questions += fresh
        said += [answers(report) for report in reports]
        if pulls and used >= 2 and core_told["tokens_prefetched"]:
            break
    assert pulls > 0
    assert used >= 2
    theirs = [answers(report) for report in run_each(oracle, questions)]
    assert said == theirs


def run_each(server: Server, questions: list[str]) -> list[RunReport]:
    """One after the other."""
    return [report for question in questions for report in run(server, question)]


def test_what_runs_side_by_side_share_is_computed_once(demo: Demo) -> None:
    engines = demo.engines()
    run(demo.server, uuid.uuid4().hex)
    alone = demo.engines() - engines
    engines = demo.engines()
    question = uuid.uuid4().hex
    reports = run(demo.server, *[question] * SIDE_BY_SIDE)
    together = demo.engines() - engines
    assert all(answers(report) == answers(reports[0]) for report in reports)
    # As many prompt tokens again for each, and much less of them computed.
    prompts = sum(call.prompt_tokens or 0 for report in reports for call in report.calls)
    assert prompts == SIDE_BY_SIDE * sum(call.prompt_tokens or 0 for call in reports[0].calls)
    assert together["local_compute"] < (SIDE_BY_SIDE - 0.5) * alone["local_compute"]
    assert together["local_cache_hit"] > 2 * alone["local_cache_hit"]


def test_what_is_static_is_there_before_anybody_asks(demo: Demo) -> None:
    static = " ".join(uuid.uuid4().hex for _ in range(12))
    graph = {
        "agents": {"greeter": {"static_prompt": static}, "closer": {}},
        "edges": [{"kind": "next", "from": "greeter", "to": "closer"}],
    }
    core, engines = demo.core(), demo.engines()
    with demo.server.http() as http:
        assert http.put("/v1/workflows/warmed", json=graph).status_code == 201
        assert http.post("/v1/workflows/warmed/runs", json={"id": "r"}).status_code == 201

        def is_everywhere() -> bool:
            return demo.control.snapshot().counters["errands_done"] == core["errands_done"] + 3

        wait_for(is_everywhere, 30.0, "a static prompt on all workers")
        tokens = http.get("/v1/workflows/warmed").json()["static_tokens"]["greeter"]
        computed = (demo.engines() - engines)["local_compute"]
        assert 3 * tokens <= computed <= 3 * (tokens + BLOCK_TOKENS)
        engines = demo.engines()
        who = {"X-Workflow": "warmed", "X-Workflow-Run": "r", "X-Workflow-Agent": "greeter"}
        body = {"model": MODEL, "prompt": f"{static} So?", "max_tokens": 2}
        answer = http.post("/v1/completions", json=body, headers=who | {"X-Workflow-Final": "true"})
    assert answer.status_code == 200, answer.text
    told = demo.engines() - engines
    assert told["local_cache_hit"] >= tokens - BLOCK_TOKENS
    assert told["local_compute"] <= 2 * BLOCK_TOKENS

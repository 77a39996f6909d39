"""What one engine has cached is read from it by another one, and nothing else changes.

Two clusters of two engines each, in which there is one way for a call to go: to the decode
worker that is free, from the one that is busy and holds its prompt; and to the prefill worker,
from the decode worker that holds the answer before. What was read is proved with vLLM's own
counters.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest

from cluster.config import ClusterConfig, parse
from cluster.process import free_port
from tests.e2e.conftest import CLUSTER
from tests.e2e.harness import (
    API_KEY,
    BEATS_S,
    BLOCK_TOKENS,
    MODEL,
    Control,
    Server,
    prompt_tokens_by_source,
    wait_for,
)
from tests.e2e.test_equality import LOGPROB_TOLERANCE, said, scores

SHARED_TOKENS = 40 * BLOCK_TOKENS
MORE_TOKENS = 20
LONG_ANSWER = 600
KNOWN_S = 20.0

Cluster = tuple[Server, ClusterConfig]


def config_of(workers: str, placement: str, limits: str) -> ClusterConfig:
    """The suite's cluster with other workers, which Pythia places calls on."""
    before, _, rest = CLUSTER.partition("workers:\n")
    _, _, behind = rest.partition("api:\n")
    behind = behind.partition("limits:\n")[0]
    text = f"{before}workers:\n{workers}api:\n{behind}limits: {limits}\nplacement: {placement}\n"
    config = parse(text, "pulls.yaml")
    ported = [
        msgspec.structs.replace(worker, metrics_port=free_port("127.0.0.1"))
        for worker in config.workers
    ]
    return msgspec.structs.replace(config, workers=ported)


@contextlib.contextmanager
def running(config: ClusterConfig, log_dir: Any) -> Iterator[Server]:
    """A cluster that serves, all of whose pairs have met; quiet when it is left."""
    from cluster.launch import LocalCluster

    with LocalCluster(config, log_dir=log_dir) as launched:
        server = Server(launched.base_url, API_KEY, MODEL, launched.control_address, log_dir)
        with contextlib.closing(Control(server.control_address)) as control:

            def warm() -> bool:
                return all(link.state == "warm" for link in control.snapshot().links)

            wait_for(warm, 60.0, "the warm-up of all pairs")
            yield server
            control.wait_until_quiet()


@pytest.fixture(scope="module", autouse=True)
def quiet_afterwards() -> None:
    """Instead of the shared cluster's: it is not needed here."""


def fresh_tokens(count: int) -> list[int]:
    """Tokens that no cache has seen."""
    found: list[int] = []
    while len(found) < count:
        found += [300 + byte for byte in uuid.uuid4().bytes]
    return found[:count]


def completion(prompt: list[int], max_tokens: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
        "logprobs": 2,
    }


def ask(server: Server, body: dict[str, Any]) -> httpx.Response:
    with server.http() as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response


def external(config: ClusterConfig, worker: str) -> int:
    """vLLM's own count of a worker's prompt tokens that came from elsewhere."""
    (port,) = (each.metrics_port for each in config.workers if each.name == worker)
    return prompt_tokens_by_source([f"http://127.0.0.1:{port}/metrics"])["external_kv_transfer"]


def assert_same(ours: httpx.Response, oracle: Server, body: dict[str, Any]) -> None:
    theirs = ask(oracle, body)
    assert said(ours) == said(theirs)
    pairs = zip(scores(ours), scores(theirs), strict=True)
    assert all(abs(one - other) <= LOGPROB_TOLERANCE for one, other in pairs)


def test_a_free_decode_worker_pulls_from_the_busy_one(
    oracle: Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = config_of(
        "  - {name: decode-0, role: decode}\n  - {name: decode-1, role: decode}\n",
        "{}",
        "{queue_s: 60, calls_per_worker: 1, pull_s: 20}",
    )
    with running(config, tmp_path_factory.mktemp("pulls")) as server:
        shared = fresh_tokens(SHARED_TOKENS)
        with server.http() as client:
            body = completion(shared, LONG_ANSWER) | {"stream": True}
            with client.stream("POST", "/v1/completions", json=body) as busy:
                assert busy.status_code == 200
                lines = busy.iter_lines()
                assert next(lines).startswith("data:")
                source = busy.headers["X-Pythia-Decode"]
                target = {"decode-0": "decode-1", "decode-1": "decode-0"}[source]
                before = external(config, target)
                longer = completion(shared + fresh_tokens(MORE_TOKENS), 12)
                ours = ask(server, longer)
                assert ours.headers["X-Pythia-Decode"] == target
                assert ours.headers["X-Pythia-Pulled-From"] == source
                assert (
                    ours.headers["X-Pythia-Pulled-Tokens"] == ours.headers["X-Pythia-Moved-Tokens"]
                )
                pulled = int(ours.headers["X-Pythia-Pulled-Tokens"])
                assert SHARED_TOKENS <= pulled <= SHARED_TOKENS + 1
                assert external(config, target) - before == pulled
                assert sum(line.startswith("data:") for line in lines) >= LONG_ANSWER - 2
        assert_same(ours, oracle, longer)
        with contextlib.closing(Control(server.control_address)) as control:
            counters = control.wait_until_quiet().counters
        assert counters["plans_pull"] == 1
        assert counters["tokens_pulled"] == pulled
        assert counters["pulls_missing"] == counters["pulls_unread"] == counters["replans"] == 0


def test_the_prefill_worker_pulls_the_answer_before(
    oracle: Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = config_of(
        "  - {name: prefill-0, role: prefill}\n  - {name: decode-0, role: decode}\n",
        "{disaggregated: always}",
        "{queue_s: 60, pull_s: 20}",
    )
    with running(config, tmp_path_factory.mktemp("pulls")) as server:
        for _ in range(3):
            # What takes how long is learned from what was computed.
            ask(server, completion(fresh_tokens(SHARED_TOKENS), 4))
        prompt = fresh_tokens(MORE_TOKENS)
        first = ask(server, completion(prompt, LONG_ANSWER))
        history = prompt + first.json()["choices"][0]["token_ids"]
        with contextlib.closing(Control(server.control_address)) as control:
            control.wait_until_quiet()
            # Until the core has heard what was generated into the decode worker's cache.
            time.sleep(BEATS_S)
            before = external(config, "prefill-0")
            longer = completion(history + fresh_tokens(MORE_TOKENS), 12)
            ours = ask(server, longer)
            assert ours.headers["X-Pythia-Prefill"] == "prefill-0"
            assert ours.headers["X-Pythia-Pulled-From"] == "decode-0"
            pulled = int(ours.headers["X-Pythia-Pulled-Tokens"])
            assert pulled >= LONG_ANSWER - 2 * BLOCK_TOKENS
            assert external(config, "prefill-0") - before == pulled
            moved = int(ours.headers["X-Pythia-Moved-Tokens"])
            assert 0 < moved <= MORE_TOKENS + 2 * BLOCK_TOKENS
            assert_same(ours, oracle, longer)
            counters = control.wait_until_quiet().counters
        assert counters["plans_pull"] == 1
        assert counters["tokens_pulled"] == pulled
        assert counters["pulls_missing"] == counters["pulls_unread"] == counters["replans"] == 0

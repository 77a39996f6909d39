"""Five hundred requests that the API's own description allows, or just not: no 5xx.

schemathesis generates them from ``/openapi.json``, deterministically. What is generated is
changed only where it would never get past the door or never end: the model's name is the
served one, and the work that a request may ask for is bounded.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode

from tests.e2e.harness import MODEL, Control, Server

OUTPUT_TOKENS_MAX = 8
CHOICES_MAX = 3
ITEMS_MAX = 6
TIMEOUT_S = 120.0

POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
PLAN: dict[tuple[str, str], dict[GenerationMode, int]] = {
    ("POST", "/v1/chat/completions"): {POSITIVE: 60, NEGATIVE: 30},
    ("POST", "/v1/completions"): {POSITIVE: 60, NEGATIVE: 30},
    ("POST", "/v1/responses"): {POSITIVE: 50, NEGATIVE: 25},
    ("POST", "/v1/messages"): {POSITIVE: 50, NEGATIVE: 25},
    ("POST", "/v1/messages/count_tokens"): {POSITIVE: 25, NEGATIVE: 15},
    ("POST", "/v1/chat/completions/batch"): {POSITIVE: 30, NEGATIVE: 15},
    ("POST", "/tokenize"): {POSITIVE: 25, NEGATIVE: 15},
    ("POST", "/detokenize"): {POSITIVE: 20, NEGATIVE: 15},
    ("GET", "/v1/responses/{response_id}"): {POSITIVE: 10, NEGATIVE: 10},
    ("POST", "/v1/responses/{response_id}/cancel"): {POSITIVE: 10},
    ("POST", "/generative_scoring"): {POSITIVE: 10, NEGATIVE: 5},
    ("GET", "/v1/models"): {POSITIVE: 1},
    ("GET", "/version"): {POSITIVE: 1},
    ("GET", "/health"): {POSITIVE: 1},
    ("GET", "/live"): {POSITIVE: 1},
    ("GET", "/ready"): {POSITIVE: 1},
    ("GET", "/ping"): {POSITIVE: 1},
    ("GET", "/kv_event_sources"): {POSITIVE: 1},
    ("GET", "/v1/cluster"): {POSITIVE: 1},
    ("GET", "/load"): {POSITIVE: 1},
    ("GET", "/metrics"): {POSITIVE: 1},
}
"""How many cases of which kind each operation of the public API gets.

Left out, and why: ``/invocations`` is the same handlers again under SageMaker's name.
``/scale_elastic_ep`` resizes a data-parallel engine; a plain vLLM server without one answers
500 to valid requests ("Scale failed"). ``/is_scaling_elastic_ep`` is its companion.
``/v1/systemone`` needs a model with a head for decisions; a plain server without one
answers 501 to valid requests.
"""


@pytest.fixture(scope="module")
def described(cluster: Server) -> Any:
    """The API as the cluster describes it."""
    return schemathesis.openapi.from_url(f"{cluster.base_url}/openapi.json", timeout=120)


@pytest.fixture(scope="module")
def sent() -> Iterator[Counter[int]]:
    """Answers by status, over all operations."""
    counts: Counter[int] = Counter()
    yield counts
    print("answers by status:", dict(counts))


def bounded(body: Any, dice: int) -> Any:
    """The same body, asking for little work."""
    if not isinstance(body, dict):
        return body
    if isinstance(body.get("model"), str | None):
        body["model"] = MODEL
    for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if isinstance(body.get(field), int | float) and body[field] > OUTPUT_TOKENS_MAX:
            body[field] = 1 + dice % OUTPUT_TOKENS_MAX
    if not any(body.get(field) for field in ("max_completion_tokens", "max_tokens")):
        body["max_output_tokens" if "input" in body else "max_tokens"] = OUTPUT_TOKENS_MAX
    for field in ("n", "min_tokens"):
        if isinstance(body.get(field), int | float) and body[field] > CHOICES_MAX:
            body[field] = 1 + dice % CHOICES_MAX
    for field in ("prompt", "messages", "input"):
        if isinstance(body.get(field), list):
            body[field] = body[field][:ITEMS_MAX]
    return body


def request_of(case: Any, dice: int) -> dict[str, Any]:
    """Keyword arguments of httpx for a generated case."""
    arguments: dict[str, Any] = case.as_transport_kwargs()
    for unwanted in ("url", "method"):
        arguments.pop(unwanted, None)
    if "json" in arguments:
        arguments["json"] = bounded(arguments["json"], dice)
    return arguments


@pytest.mark.parametrize(
    ("operation", "mode", "cases"),
    [
        (operation, mode, count)
        for operation, modes in PLAN.items()
        for mode, count in modes.items()
    ],
    ids=lambda value: (
        " ".join(value) if isinstance(value, tuple) else str(getattr(value, "value", value))
    ),
)
def test_no_server_error(
    described: Any,
    cluster: Server,
    sent: Counter[int],
    operation: tuple[str, str],
    mode: GenerationMode,
    cases: int,
) -> None:
    method, path = operation
    endpoint = described[path][method]
    failures: list[str] = []
    count = 0

    @hypothesis.seed(20_250_731)
    @hypothesis.settings(
        max_examples=cases,
        phases=[hypothesis.Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=endpoint.as_strategy(generation_mode=mode))
    def send_all(case: Any) -> None:
        nonlocal count
        count += 1
        with cluster.http(TIMEOUT_S) as client:
            response = client.request(method, case.formatted_path, **request_of(case, count))
        sent[response.status_code] += 1
        if response.status_code >= 500:
            failures.append(
                f"{response.status_code} {response.text[:300]}\n{case.as_curl_command()}"
            )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        send_all()
    assert not failures, "\n\n".join(failures[:5])


def test_it_was_five_hundred(sent: Counter[int]) -> None:
    assert sum(sent.values()) >= 500


def test_nothing_is_left_of_it(control: Control, http: httpx.Client) -> None:
    control.wait_until_quiet()
    body = {"model": MODEL, "prompt": "Still there?", "max_tokens": 1}
    assert http.post("/v1/completions", json=body).status_code == 200

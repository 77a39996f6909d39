"""The first calls of agents whose static prompts nobody has asked for yet.

Each call is of a workflow of its own, which is declared with the agent's static prompt and has a
live run. Where static prompts are computed ahead (``Placement.warm_up``), the call comes when that
is done on all workers.
"""

from __future__ import annotations

import time
import uuid

import httpx

from cluster.launch import LocalCluster

CALL_S = 300.0
WARMED_S = 60.0
POLL_S = 0.1
AGENT = "greeter"


def first_calls(cluster: LocalCluster, calls: int, words: int, answer_tokens: int) -> list[float]:
    """Seconds until the first token of so many calls, one after another. ``words``: of each static
    prompt.

    httpx.HTTPError if the API fails, TimeoutError if static prompts are not computed: it is done
    only where a cache forgets nothing for it, which a few hundred such prompts fill.
    """
    with httpx.Client(base_url=cluster.base_url, timeout=CALL_S) as http:
        return [_first_call(http, cluster, words, answer_tokens) for _ in range(calls)]


def _first_call(http: httpx.Client, cluster: LocalCluster, words: int, answer_tokens: int) -> float:
    # Words of four hexadecimal digits take much the same number of tokens.
    digits = "".join(uuid.uuid4().hex for _ in range(words // 8 + 1))
    static = " ".join(digits[4 * at : 4 * at + 4] for at in range(words))
    name = f"warming-{uuid.uuid4().hex}"
    before = cluster.snapshot().counters["errands_done"]
    graph = {"agents": {AGENT: {"static_prompt": static}}, "edges": []}
    http.put(f"/v1/workflows/{name}", json=graph).raise_for_status()
    http.post(f"/v1/workflows/{name}/runs", json={"id": "run"}).raise_for_status()
    if cluster.config.placement.warm_up:
        _wait(cluster, before + len(cluster.config.workers))
    seconds = _first_token_s(http, cluster, name, f"{static} So?", answer_tokens)
    http.delete(f"/v1/workflows/{name}").raise_for_status()
    return seconds


def _wait(cluster: LocalCluster, errands: int) -> None:
    ends_s = time.monotonic() + WARMED_S
    while cluster.snapshot().counters["errands_done"] < errands:
        if time.monotonic() > ends_s:
            raise TimeoutError(f"a static prompt is not everywhere after {WARMED_S:.0f} s")
        time.sleep(POLL_S)


def _first_token_s(
    http: httpx.Client, cluster: LocalCluster, workflow: str, prompt: str, answer_tokens: int
) -> float:
    headers = {
        "X-Workflow": workflow,
        "X-Workflow-Run": "run",
        "X-Workflow-Agent": AGENT,
        "X-Workflow-Final": "true",
    }
    body = {
        "model": cluster.config.served_name,
        "prompt": prompt,
        "max_tokens": answer_tokens,
        "stream": True,
    }
    seconds = None
    began_s = time.monotonic()
    with http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith('data: {"error"'):
                raise httpx.RemoteProtocolError(line)
            if seconds is None and line.startswith("data: {"):
                seconds = time.monotonic() - began_s
    if seconds is None:
        raise httpx.RemoteProtocolError("the answer has no token")
    return seconds

"""The servers that all end-to-end suites share, started once per session.

``cluster`` is one prefill worker and two decode workers around a tiny random model,
with an API key; ``oracle`` is one plain vLLM server around the same model with the same
engine arguments. Both are real.

To run the suites against servers that are up already, set ``PYTHIA_E2E_BASE_URL`` (the
cluster's address without ``/v1``) and, if they differ from the suite's own,
``PYTHIA_E2E_API_KEY``, ``PYTHIA_E2E_CONTROL`` (the core's address; without it what needs
the core is skipped) and ``PYTHIA_E2E_ORACLE_URL`` (the plain server's address).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import anthropic
import httpx
import msgspec
import openai
import pytest

from cluster.config import ClusterConfig, parse, worker_config
from cluster.process import free_port
from tests.e2e.harness import (
    API_KEY,
    BLOCK_TOKENS,
    BODY_BYTES_MAX,
    MAX_MODEL_LEN,
    MODEL,
    QUEUE_S,
    REMOTE_MIN_TOKENS,
    Control,
    Server,
    command_line,
    started,
    wait_healthy,
)

CLUSTER = f"""\
model: {MODEL}
name: e2e
engine:
  dtype: float32
  enforce_eager: true
  block_size: {BLOCK_TOKENS}
  max_model_len: {MAX_MODEL_LEN}
  max_num_seqs: 32
  kv_cache_memory_bytes: 268435456
  structured_outputs_config: {{disable_any_whitespace: true, backend: xgrammar}}
workers:
  - {{name: prefill-0, role: prefill}}
  - {{name: decode-0, role: decode}}
  - {{name: decode-1, role: decode}}
api:
  port: 0
  keys: [{API_KEY}]
  body_bytes_max: {BODY_BYTES_MAX}
  arguments:
    enable_auto_tool_choice: true
    tool_call_parser: hermes
    enable_prompt_tokens_details: true
coordinator:
  port: 0
limits:
  queue_s: {QUEUE_S}
placement:
  policy: least_kv # what it does does not depend on how fast this machine is
  remote_prefill_min_tokens: {REMOTE_MIN_TOKENS}
"""

DESTRUCTIVE = "test_cluster_failures"
"""The suite that kills workers of the shared cluster: it runs last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.engine)
    items.sort(key=lambda item: item.path.stem == DESTRUCTIVE)


@pytest.fixture(scope="session")
def cluster_config() -> ClusterConfig:
    """The cluster's file, with a port for the metrics of every engine."""
    config = parse(CLUSTER, "e2e.yaml")
    workers = [
        msgspec.structs.replace(worker, metrics_port=free_port("127.0.0.1"))
        for worker in config.workers
    ]
    return msgspec.structs.replace(config, workers=workers)


@pytest.fixture(scope="session")
def cluster(
    cluster_config: ClusterConfig, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The cluster under test."""
    if url := os.environ.get("PYTHIA_E2E_BASE_URL"):
        key = os.environ.get("PYTHIA_E2E_API_KEY", API_KEY)
        yield Server(url, key, MODEL, os.environ.get("PYTHIA_E2E_CONTROL", ""))
        return
    from cluster.launch import LocalCluster

    log_dir = tmp_path_factory.mktemp("cluster")
    with LocalCluster(cluster_config, log_dir=log_dir) as running:
        yield Server(
            base_url=running.base_url,
            api_key=API_KEY,
            model=MODEL,
            control_address=running.control_address,
            log_dir=log_dir,
            pids=running.workers,
        )


@pytest.fixture(scope="session")
def oracle(
    cluster_config: ClusterConfig, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One plain vLLM server with the engine arguments of the cluster's workers."""
    if url := os.environ.get("PYTHIA_E2E_ORACLE_URL"):
        yield Server(url, os.environ.get("PYTHIA_E2E_API_KEY", API_KEY), MODEL)
        return
    from cluster.model import prepare

    worker = worker_config(cluster_config, "decode-0", str(prepare(MODEL)))
    port = free_port("127.0.0.1")
    arguments = {
        "model": worker.model,
        "served_model_name": MODEL,
        "host": "127.0.0.1",
        "port": port,
        "api_key": API_KEY,
        **worker.engine,
        **cluster_config.api.arguments,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    log = tmp_path_factory.mktemp("oracle") / "server.log"
    with started([*command, *command_line(arguments)], worker.environment, log) as pid:
        server = Server(f"http://127.0.0.1:{port}", API_KEY, MODEL)
        wait_healthy(server.base_url, pid, log)
        yield server


@pytest.fixture(scope="session")
def control(cluster: Server) -> Iterator[Control]:
    """The cluster's core, to look at."""
    if not cluster.control_address:
        pytest.skip("PYTHIA_E2E_CONTROL does not say where the core is")
    with contextlib.closing(Control(cluster.control_address)) as peer:
        yield peer


@pytest.fixture(scope="session")
def decode_metrics(cluster: Server, cluster_config: ClusterConfig) -> list[str]:
    """The pages of vLLM's own metrics of the decode workers."""
    if cluster.log_dir is None:
        pytest.skip("nobody said where this cluster's engines serve their metrics")
    ports = [worker.metrics_port for worker in cluster_config.workers if worker.role == "decode"]
    return [f"http://127.0.0.1:{port}/metrics" for port in ports]


@pytest.fixture(scope="module", autouse=True)
def quiet_afterwards(cluster: Server) -> Iterator[None]:
    """Whatever a suite did, nothing of it may be left when it is over."""
    yield
    if cluster.control_address:
        with contextlib.closing(Control(cluster.control_address)) as peer:
            peer.wait_until_quiet()


@pytest.fixture(scope="session")
def client(cluster: Server) -> Iterator[openai.OpenAI]:
    """The official OpenAI client, without retries, so that every error shows."""
    with openai.OpenAI(
        base_url=f"{cluster.base_url}/v1", api_key=cluster.api_key, max_retries=0, timeout=120.0
    ) as made:
        yield made


@pytest.fixture(scope="session")
def oracle_client(oracle: Server) -> Iterator[openai.OpenAI]:
    """The same client in front of the plain server."""
    with openai.OpenAI(
        base_url=f"{oracle.base_url}/v1", api_key=oracle.api_key, max_retries=0, timeout=120.0
    ) as made:
        yield made


@pytest.fixture(scope="session")
def claude_client(cluster: Server) -> Iterator[anthropic.Anthropic]:
    """The official Anthropic client; the key goes as a bearer token, as vLLM wants it."""
    with anthropic.Anthropic(
        base_url=cluster.base_url, auth_token=cluster.api_key, max_retries=0, timeout=120.0
    ) as made:
        yield made


@pytest.fixture(scope="session")
def http(cluster: Server) -> Iterator[httpx.Client]:
    """Plain HTTP with the right key."""
    with cluster.http() as made:
        yield made

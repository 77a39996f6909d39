"""A cluster over four hosts that are network namespaces, with real engines: KV goes over TCP
from host to host, one link is slowed, one is cut, one side channel leads nowhere.

Root only; without it these tests are skipped and say so. CI runs them as root.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from cluster.child import child_environment
from cluster.config import ClusterConfig, parse, worker_config
from cluster.document import dump
from cluster.launch import COORDINATOR, LocalCluster, process_command
from cluster.process import free_port
from cluster.template import TEMPLATE
from coordinator.protocol import Snapshot
from tests.deploy.net_site import Network, running_network
from tests.e2e.harness import command_line, started, wait_for, wait_healthy

pytestmark = pytest.mark.engine

HOSTS = ("core", "one", "two", "three")
PROMPTS = [
    [(seed * 7919 + place * 31) % 2700 + 300 for place in range(600 + 40 * seed)]
    for seed in range(4)
]
TOKEN_BYTES = 4096
"""KV of one token of the tiny Llama: 4 layers, 2 heads of 64, keys and values, float32."""
OUTPUT_TOKENS = 48
LONG_TOKENS = 400
DOCTOR_S = 180.0
NOTICED_S = 40.0
"""Five missed beats, and what a busy machine adds."""
BACK_S = 60.0
RATE = "64mbit"


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Four hosts."""
    with running_network(HOSTS) as made:
        yield made


def cluster_of(network: Network, model: Path) -> ClusterConfig:
    """The cluster, with a worker per host and the coordinator on one of its own."""
    core, one, two, three = (network.address[name] for name in HOSTS)
    return parse(
        f"model: {model}\nserved_model_name: tiny-llama\nname: net\n"
        "engine:\n"
        "  {dtype: float32, enforce_eager: true, block_size: 32, max_model_len: 2048,\n"
        "   max_num_seqs: 16, kv_cache_memory_bytes: 134217728}\n"
        "environment: {OMP_NUM_THREADS: 1}\n"
        "workers:\n"
        f"  - {{name: prefill-0, role: prefill, host: {one}}}\n"
        f"  - {{name: decode-0, role: decode, host: {two}}}\n"
        f"  - {{name: decode-1, role: decode, host: {three}}}\n"
        f"coordinator: {{host: {core}, port: 5570, store: ''}}\n"
        f"api: {{host: {core}, port: 8000}}\n"
        # These hosts share one kernel, whose memory UCX would rather use.
        "network: {ucx_tls: 'tcp,self'}\n"
        "placement: {policy: least_kv, remote_prefill_min_tokens: 96}\n"
        "stop: {drain_s: 60}\n",
        "net.yaml",
    )


@pytest.fixture(scope="module")
def config(network: Network, tiny_model: Path) -> ClusterConfig:
    """The cluster's file."""
    return cluster_of(network, tiny_model)


@pytest.fixture(scope="module")
def expected(config: ClusterConfig, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What one plain vLLM server says to every prompt, ``LONG_TOKENS`` of it. It is gone again."""
    worker = worker_config(config, "decode-0", config.model)
    port = free_port("127.0.0.1")
    arguments: dict[str, Any] = {
        "model": worker.model,
        "served_model_name": "tiny-llama",
        "host": "127.0.0.1",
        "port": port,
        **worker.engine,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    log = tmp_path_factory.mktemp("plain") / "server.log"
    with started([*command, *command_line(arguments)], worker.environment, log) as pid:
        base_url = f"http://127.0.0.1:{port}"
        wait_healthy(base_url, pid, log)
        with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none") as client:
            return [answer_to(client, prompt, LONG_TOKENS) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def cluster(
    network: Network,
    config: ClusterConfig,
    expected: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LocalCluster]:
    """The cluster, every process on its host."""
    host_of = {entry.name: entry.host for entry in config.workers}
    host_of[COORDINATOR] = config.coordinator.host
    name_of = {address: name for name, address in network.address.items()}

    def command_of(name: str, path: Path) -> list[str]:
        if name == TEMPLATE:
            return []  # one process can't be on several hosts
        return network.command(name_of[host_of[name]], process_command(name, path))

    made = LocalCluster(
        config,
        tmp_path_factory.mktemp("cluster"),
        command_of=command_of,
        fits=lambda _: None,  # its addresses are not this machine's
    )
    with made:
        yield made


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[openai.OpenAI]:
    """The official client, without retries."""
    with openai.OpenAI(
        base_url=f"{cluster.base_url}/v1", api_key="none", max_retries=0, timeout=120.0
    ) as made:
        yield made


def answer_to(client: openai.OpenAI, prompt: list[int], tokens: int = OUTPUT_TOKENS) -> str:
    """A greedy completion."""
    answer = client.completions.create(
        model="tiny-llama",
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    return answer.choices[0].text


def doctor(network: Network, file: Path) -> tuple[int, dict[str, Any]]:
    """``pythia doctor FILE --json`` on the coordinator's host: its exit code, and what it says."""
    command = [sys.executable, "-m", "cluster", "doctor", str(file), "--json"]
    done = subprocess.run(
        network.command("core", command),
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=DOCTOR_S,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def problems(report: dict[str, Any], check: str = "") -> dict[str, str]:
    """Message by whom it is about."""
    return {
        each["about"]: each["message"]
        for each in report["findings"]
        if each["severity"] == "problem" and check in ("", each["check"])
    }


def state_of(snapshot: Snapshot, worker: str) -> str:
    """As ``pythia status`` shows it; empty if the core does not know it."""
    return next((row.state for row in snapshot.workers if row.worker == worker), "")


def test_kv_goes_from_host_to_host_and_answers_are_those_of_a_plain_engine(
    network: Network, cluster: LocalCluster, client: openai.OpenAI, expected: list[str]
) -> None:
    received = _received_bytes(network)
    for prompt, text in zip(PROMPTS, expected, strict=True):
        assert text.startswith(answer_to(client, prompt))
    kv_bytes = TOKEN_BYTES * sum(len(prompt) for prompt in PROMPTS)
    # The tail of a prompt that fills no block is computed where it is decoded.
    wait_for(lambda: _moved_bytes(cluster) >= 0.9 * kv_bytes, 10.0, "the prompts' KV, moved")
    received = _received_bytes(network) - received
    assert received >= 0.9 * kv_bytes, "KV went another way than over the hosts' links"


def _received_bytes(network: Network) -> int:
    return sum(network.received_bytes(host) for host in ("two", "three"))


def _moved_bytes(cluster: LocalCluster) -> int:
    return sum(link.bytes_total for link in cluster.snapshot().links if link.source == "prefill-0")


def test_doctor_finds_nothing_wrong_with_what_is_well(
    network: Network, cluster: LocalCluster
) -> None:
    code, report = doctor(network, cluster.log_dir / "cluster.yaml")
    assert problems(report) == {}
    assert code == 0
    assert len(report["measures"]) == 6
    assert all(each["bytes_per_s"] > 0 for each in report["measures"])


def test_doctor_finds_a_link_that_is_slow_and_calls_go_on(
    network: Network, cluster: LocalCluster, client: openai.OpenAI, expected: list[str]
) -> None:
    network.slow("three", RATE)
    try:
        code, report = doctor(network, cluster.log_dir / "cluster.yaml")
        assert expected[0].startswith(answer_to(client, PROMPTS[0]))
    finally:
        network.quicken("three")
    assert code == 1
    slow = problems(report, "links")
    assert set(slow) == {
        "prefill-0 -> decode-1",
        "decode-0 -> decode-1",
        "decode-1 -> prefill-0",
        "decode-1 -> decode-0",
    }
    assert problems(report).keys() == slow.keys(), "nothing else is wrong"


def test_a_cut_link_is_noticed_and_its_calls_go_on_elsewhere(
    network: Network, cluster: LocalCluster, client: openai.OpenAI, expected: list[str]
) -> None:
    texts: dict[int, str] = {}

    def talk(number: int) -> None:
        texts[number] = answer_to(client, PROMPTS[number % len(PROMPTS)], LONG_TOKENS)

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: _decoding_on(cluster, "decode-1"), 30.0, "a call on decode-1")
    network.cut("three")
    cut_s = time.monotonic()
    try:
        wait_for(
            lambda: state_of(cluster.snapshot(), "decode-1") != "up", NOTICED_S, "the cut link"
        )
        assert time.monotonic() - cut_s < NOTICED_S
        for thread in threads:
            thread.join(timeout=120.0)
        assert expected[1].startswith(answer_to(client, PROMPTS[1]))
    finally:
        network.mend("three")
    assert texts == {number: expected[number % len(PROMPTS)] for number in range(8)}
    wait_for(lambda: state_of(cluster.snapshot(), "decode-1") == "up", BACK_S, "decode-1")


def _decoding_on(cluster: LocalCluster, worker: str) -> bool:
    return any(
        call.decode == worker and call.phase == "decoding" and not call.outcome
        for call in cluster.snapshot().calls
    )


def test_doctor_names_a_side_channel_that_leads_nowhere(
    network: Network, cluster: LocalCluster, client: openai.OpenAI, expected: list[str]
) -> None:
    """Last: it puts another worker in the place of decode-1."""
    wrong = msgspec.structs.replace(
        cluster.config.worker("decode-1"),
        name="decode-2",
        environment={"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1"},
    )
    keep = [entry for entry in cluster.config.workers if entry.name != "decode-1"]
    file = cluster.log_dir / "wrong.yaml"
    file.write_text(dump(msgspec.structs.replace(cluster.config, workers=[*keep, wrong])))
    # Its id is kept until the cluster is stopped, so this can hit nobody else.
    os.kill(cluster.workers["decode-1"], signal.SIGTERM)
    wait_for(lambda: state_of(cluster.snapshot(), "decode-1") == "", 30.0, "decode-1's end")
    command = network.command("three", process_command("decode-2", file))
    with started(command, child_environment(), cluster.log_dir / "decode-2.log"):
        wait_for(lambda: state_of(cluster.snapshot(), "decode-2") == "up", 120.0, "decode-2")
        wait_for(lambda: _reads_from_all(cluster, "decode-2"), 60.0, "decode-2's tries to read")
        code, report = doctor(network, file)
        assert expected[2].startswith(answer_to(client, PROMPTS[2])), "it harms nobody"
    assert code == 1
    address = problems(report, "addresses")
    assert set(address) == {"decode-2"}
    assert "side-channel address 127.0.0.1:" in address["decode-2"]
    assert f"its own is {network.address['three']}" in address["decode-2"]
    assert "from any other (Connection refused)" in address["decode-2"]
    links = problems(report, "links")
    assert set(links) == {"decode-2 -> prefill-0", "decode-2 -> decode-0"}, links


def _reads_from_all(cluster: LocalCluster, worker: str) -> bool:
    """Whether every pair in which it reads has been tried with success."""
    links = [link for link in cluster.snapshot().links if link.target == worker]
    return len(links) == 2 and all(link.state == "warm" for link in links)

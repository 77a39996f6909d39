"""KV that engines keep in host memory, with vLLM's own offloading beside our connector.

Two engines whose caches are soon full: what has been evicted comes back from the host instead of
being computed, answers are those of a plain engine, and KV still goes from engine to engine and is
pinned as before.

One thing is made up: vLLM copies only between a GPU and its host. A plugin puts another spec in
the place of vLLM's, whose copies are torch's; managers, connectors and events are vLLM's.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import ClusterConfig
from cluster.launch import LaunchError, LocalCluster
from tests.e2e.harness import BEATS_S, BLOCK_TOKENS, Control, Server, wait_for
from tests.e2e.test_pulls import (
    ask,
    assert_same,
    completion,
    config_of,
    external,
    fresh_tokens,
    quiet_afterwards,
    running,
)

__all__ = ["quiet_afterwards"]

PLUGIN = {
    "host_copies.py": '''
import time

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.kv_offload.factory import OffloadingSpecFactory

class Copies(OffloadingWorker):
    """Copies at once, and says so when it is asked."""

    def __init__(self, caches, chunks):
        self.engine = [each.tensor for each in caches.tensors]
        self.host = [torch.zeros((chunks, each.shape[1]), dtype=torch.int8) for each in self.engine]
        self.done = []

    def submit_store(self, job_id, src_spec, dst_spec):
        return self.copied(job_id, self.engine, src_spec, self.host, dst_spec)

    def submit_load(self, job_id, src_spec, dst_spec):
        return self.copied(job_id, self.host, src_spec, self.engine, dst_spec)

    def copied(self, job_id, sources, source, targets, target):
        began_s = time.perf_counter()
        begin, end = torch.from_numpy(source.block_ids), torch.from_numpy(target.block_ids)
        assert len(begin) == len(end)
        for here, there in zip(sources, targets):
            there[end.long()] = here[begin.long()]
        size = len(begin) * sum(each.shape[1] for each in sources)
        self.done.append(TransferResult(job_id, True, size, time.perf_counter() - began_s))
        return True

    def get_finished(self):
        done, self.done = self.done, []
        return done

    def wait(self, job_ids):
        pass

class HostCopies(CPUOffloadingSpec):
    def get_worker(self, kv_caches):
        self._worker = self._worker or Copies(kv_caches, self.num_chunks)
        return self._worker

def register():
    OffloadingSpecFactory._registry["CPUOffloadingSpec"] = lambda: HostCopies
''',
    "host_copies-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: host-copies\nVersion: 1\n",
    "host_copies-1.dist-info/entry_points.txt": (
        "[vllm.general_plugins]\nhost_copies = host_copies:register\n"
    ),
}
KV_BLOCKS = 96
PROMPT_BLOCKS = 20
PROMPT_TOKENS = PROMPT_BLOCKS * BLOCK_TOKENS
ANSWER_TOKENS = 4 * BLOCK_TOKENS
"""Of the last one there is no KV, so that the last block is not full."""
HOST_GIB = 0.125
PAUSE_S = 8.0
"""Longer than it takes to fill the caches with something else."""
HITS = "vllm:external_prefix_cache_hits_total"
WORKERS = "".join(
    f"  - {{name: {role}-0, role: {role}, kv_host_gib: {HOST_GIB},"
    f" engine: {{num_gpu_blocks_override: {KV_BLOCKS}}}}}\n"
    for role in ("prefill", "decode")
)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The spec, as an installed package for all processes that are started."""
    folder = tmp_path_factory.mktemp("plugin")
    for name, text in PLUGIN.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
        yield


class Small:
    """A prefill and a decode worker with little KV, and what is known of them."""

    def __init__(self, server: Server, config: ClusterConfig, control: Control) -> None:
        self.server = server
        self.config = config
        self.control = control

    def metric(self, worker: str, name: str) -> float:
        """A sum that vLLM keeps of an engine."""
        (port,) = (each.metrics_port for each in self.config.workers if each.name == worker)
        page = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30.0).text
        samples = [
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == name
        ]
        return sum(samples)

    def loaded(self, worker: str) -> float:
        """Bytes that have come from its host's memory."""
        return self.metric(worker, "vllm:kv_offload_load_bytes_total")

    def from_host(self, body: dict[str, Any], tokens: int) -> httpx.Response:
        """Ask, and so many tokens of the prompt are loaded by the decode worker's engine."""
        hits = self.metric("decode-0", HITS)
        loaded = self.loaded("decode-0")
        response = ask(self.server, body)
        wait_for(lambda: self.loaded("decode-0") > loaded, BEATS_S, "a load from the host")
        assert self.metric("decode-0", HITS) - hits == tokens
        return response

    def go_on(self, run: str, pause_s: float) -> list[int]:
        """An agent of a run goes on once with what it was answered; its last prompt and answer."""
        headers = {"X-Workflow": "team", "X-Workflow-Run": run, "X-Workflow-Agent": "a"}
        text = fresh_tokens(2 * BLOCK_TOKENS)
        with self.server.http() as client:
            for wait_s in (pause_s, 0.0):
                body = completion(text, BLOCK_TOKENS)
                response = client.post("/v1/completions", json=body, headers=headers)
                text = [*text, *response.json()["choices"][0]["token_ids"]]
                time.sleep(wait_s)
        return text

    def pinned(self) -> int:
        """Blocks that only pins hold where calls are decoded."""
        workers = self.control.snapshot().workers
        (load,) = (each.load for each in workers if each.worker == "decode-0")
        return load.kv_blocks_pinned

    def fill(self) -> None:
        """Traffic that evicts whatever is not pinned."""
        for _ in range(2 * KV_BLOCKS // PROMPT_BLOCKS):
            ask(self.server, completion(fresh_tokens(PROMPT_TOKENS), 2))
        self.control.wait_until_quiet()
        # Until the core has heard of it.
        time.sleep(BEATS_S)


@pytest.fixture(scope="module")
def small(plugin: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    config = config_of(
        WORKERS, "{policy: least_kv, remote_prefill_min_tokens: 96, admission: false}", "{}"
    )
    log_dir = tmp_path_factory.mktemp("host")
    with (
        running(config, log_dir) as server,
        contextlib.closing(Control(server.control_address)) as control,
    ):
        yield Small(server, config, control)


def test_what_was_evicted_comes_back_from_the_host_prompts_and_answers(
    small: Small, oracle: Server
) -> None:
    prompt = completion(fresh_tokens(PROMPT_TOKENS + 5), 12)
    before = external(small.config, "decode-0")
    first = ask(small.server, prompt)
    assert first.headers["X-Pythia-Prefill"] == "prefill-0"
    assert int(first.headers["X-Pythia-Moved-Tokens"]) == PROMPT_TOKENS + 5
    assert external(small.config, "decode-0") - before == PROMPT_TOKENS + 5
    question = fresh_tokens(BLOCK_TOKENS)
    answer = ask(small.server, completion(question, ANSWER_TOKENS)).json()["choices"][0][
        "token_ids"
    ]
    longer = completion([*question, *answer, *fresh_tokens(9)], 8)
    small.fill()
    again = small.from_host(prompt, PROMPT_TOKENS)
    further = small.from_host(longer, ANSWER_TOKENS)
    # What came from the host was cached, and has not moved from anywhere.
    assert int(further.headers["X-Pythia-Moved-Tokens"]) == 0
    assert int(further.headers["X-Pythia-Cached-Tokens"]) == ANSWER_TOKENS
    for ours, body in ((first, prompt), (again, prompt), (further, longer)):
        assert_same(ours, oracle, body)


def test_pins_hold_as_without_a_host(small: Small, oracle: Server) -> None:
    # One such pause is enough to expect another.
    small.go_on("before", PAUSE_S)
    text = small.go_on("kept", 0.0)
    wait_for(small.pinned, 10.0, "a pin")
    small.fill()
    assert small.pinned()
    loaded = small.loaded("decode-0")
    longer = completion([*text, *fresh_tokens(9)], 8)
    ours = ask(small.server, longer)
    assert int(ours.headers["X-Pythia-Cached-Tokens"]) >= len(text) - BLOCK_TOKENS
    time.sleep(BEATS_S)
    assert small.loaded("decode-0") == loaded
    assert_same(ours, oracle, longer)


def test_without_a_gpu_and_a_plugin_it_is_the_user_s_mistake(tmp_path: Path) -> None:
    config = config_of("  - {name: one, role: mixed, kv_host_gib: 1}\n", "{}", "{}")
    environment = config.environment | {"VLLM_PLUGINS": ""}
    config = msgspec.structs.replace(config, environment=environment)
    with pytest.raises(LaunchError), LocalCluster(config, log_dir=tmp_path):
        pass
    assert "this engine runs on the CPU" in (tmp_path / "one.log").read_text()

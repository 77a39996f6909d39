"""What the cluster says of its links is what the engines themselves say has moved."""

from __future__ import annotations

import contextlib
import uuid

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import ClusterConfig
from coordinator import protocol
from coordinator.protocol import LinkStatus
from tests.e2e.harness import BEATS_S, BLOCK_TOKENS, MODEL, Control, Server, wait_for

PROMPT_TOKENS = 400
PROMPT_BLOCKS = -(-PROMPT_TOKENS // BLOCK_TOKENS)


def link(control: Control, source: str, target: str) -> LinkStatus:
    (found,) = (
        link for link in control.snapshot().links if (link.source, link.target) == (source, target)
    )
    return found


def block_bytes(cluster: Server) -> int:
    """What one block weighs on the wire, as an API process is told."""
    with contextlib.closing(Control(cluster.control_address)) as api:
        api.send(protocol.encode(protocol.Hello(api=f"facts-{uuid.uuid4().hex}")))
        while (frame := api.receive(10.0)) is not None:
            message = protocol.decode_core_to_api(frame)
            if isinstance(message, protocol.WorkerUp):
                return message.facts.kv_bytes_per_block
    raise AssertionError("the core named no worker")


def nixl_totals(metrics_url: str) -> tuple[int, int]:
    """vLLM's own count of one engine's finished reads and their bytes."""
    samples = {
        sample.name: int(sample.value)
        for family in text_string_to_metric_families(httpx.get(metrics_url, timeout=30.0).text)
        for sample in family.samples
    }
    return (
        samples["vllm:nixl_bytes_transferred_count"],
        samples["vllm:nixl_bytes_transferred_sum"],
    )


@pytest.fixture(autouse=True)
def warm(control: Control) -> None:
    """Every pair has met, and the core has heard what that moved."""

    def told() -> bool:
        links = control.snapshot().links
        return all(row.state == "warm" and row.transfers for row in links)

    wait_for(told, 60.0, "the warm-up of all pairs")


@pytest.fixture
def metrics(cluster: Server, cluster_config: ClusterConfig) -> dict[str, str]:
    """Where each engine serves its metrics."""
    if cluster.log_dir is None:
        pytest.skip("nobody said where this cluster's engines serve their metrics")
    return {
        worker.name: f"http://127.0.0.1:{worker.metrics_port}/metrics"
        for worker in cluster_config.workers
    }


def test_a_remote_prefill_is_counted_on_its_link(
    cluster: Server, control: Control, http: httpx.Client
) -> None:
    targets = ("decode-0", "decode-1")
    before = {target: link(control, "prefill-0", target) for target in targets}
    prompt = [300 + byte for byte in (uuid.uuid4().bytes * 25)[:PROMPT_TOKENS]]
    response = http.post(
        "/v1/completions", json={"model": MODEL, "prompt": prompt, "max_tokens": 2}
    )
    assert response.headers["X-Pythia-Moved-Tokens"] == str(PROMPT_TOKENS)
    target = response.headers["X-Pythia-Decode"]
    old = before[target]

    def counted() -> LinkStatus | None:
        now = link(control, "prefill-0", target)
        return now if now.transfers > old.transfers and not now.in_flight_bytes else None

    new = wait_for(counted, BEATS_S, f"the transfer to {target}")
    assert new.state == "warm"
    assert new.transfers == old.transfers + 1
    assert new.bytes_total - old.bytes_total == PROMPT_BLOCKS * block_bytes(cluster)
    assert new.elapsed_s > old.elapsed_s


def test_all_links_to_a_worker_are_what_its_engine_has_read(
    control: Control, metrics: dict[str, str]
) -> None:
    def by_links() -> dict[str, tuple[int, int]]:
        to = {target: [row for row in links() if row.target == target] for target in metrics}
        return {
            target: (sum(row.transfers for row in rows), sum(row.bytes_total for row in rows))
            for target, rows in to.items()
        }

    def by_engines() -> dict[str, tuple[int, int]]:
        return {target: nixl_totals(url) for target, url in metrics.items()}

    def links() -> list[LinkStatus]:
        return control.snapshot().links

    control.wait_until_quiet()
    with contextlib.suppress(TimeoutError):
        wait_for(lambda: by_links() == by_engines(), BEATS_S, "the beats")
    assert by_links() == by_engines()
    assert len(links()) == len(metrics) * (len(metrics) - 1)

"""What engines keep on their hosts: vLLM's own scheduler with both connectors, and the simulated.

Everything beside vLLM's scheduler is real: ours and vLLM's offloading in vLLM's MultiConnector,
its manager of host memory, its events. Only what moves bytes is missing: it is done at once.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("vllm")
pytest.importorskip("nixl")

from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import (
    MultiKVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingWorkerMetadata,
)
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.kv_offload.base import get_offload_block_hash
from vllm.v1.outputs import KVConnectorOutput

from cluster.hardware import hardware
from cluster.model_shape import model_shape
from cluster.simulator.engine import Engine
from cluster.simulator.engine_types import FirstToken, HostLoad
from cluster.simulator.host_memory import HostMemory
from cluster.simulator.records import Gaps
from cluster.simulator.setup import EngineOptions
from coordinator.cost import StepCost
from tests.unit.test_simulator_vllm import (
    BLOCK,
    BUDGET,
    CONFIG,
    MODEL_LEN,
    SEATS,
    Real,
    Text,
    model_folder,
)
from transfer.kv_events import Translation, decode_batch
from transfer.settings import CACHED_ONLY

__all__ = ["model_folder"]

CHUNK_BYTES = 4096
"""vLLM fills up what a block takes on the host to a page."""


class Hosted(Real):
    """vLLM's scheduler with so many blocks, and so many on its host; who hears its events."""

    def __init__(self, folder: Path, blocks: int, host_blocks: int) -> None:
        super().__init__(folder, "fcfs", blocks, host_blocks * CHUNK_BYTES)
        self.translation = Translation(host=True)
        self.scheduler.kv_event_publisher.publish = self.hear
        self.loads = 0

    def hear(self, batch: Any) -> None:
        self.translation.take(decode_batch(msgspec.msgpack.encode(batch)).events)

    def _transfers(self) -> KVConnectorOutput:
        """All that was to be copied has been."""
        output = super()._transfers()
        _, offloading = self.output.kv_connector_metadata.metadata
        done = OffloadingWorkerMetadata()
        for job in [*offloading.store_jobs, *offloading.load_jobs]:
            done.mark_completed(job)
        self.loads += len(offloading.load_jobs)
        output.finished_recving |= {job.req_id for job in offloading.load_jobs.values()}
        output.kv_connector_worker_meta = MultiKVConnectorWorkerMetadata((None, done))
        return output

    def serve(self, text: Text, **params: object) -> tuple[int, int]:
        """A request, alone, to its end; what of its prompt was found here, and came otherwise."""
        self.texts[text.id] = text
        request = text.vllm()
        if params:
            request.kv_transfer_params = {**(request.kv_transfer_params or {}), **params}
        self.scheduler.add_request(request)
        for _ in range(1000):
            if text.id in self.ended and not self.scheduler.has_requests():
                return self.first[text.id]
            self.schedule()
            self.finish()
        raise AssertionError("it does not end")

    @property
    def told(self) -> set[object]:
        """What whoever is told all counts on."""
        tier = self.translation.host
        assert tier is not None
        return {node.key for node in tier.nodes.values() if node.chain(told=True)}

    @property
    def on_host(self) -> set[object]:
        """vLLM's own hashes, as in events, of what its manager of host memory has."""
        connectors = self.scheduler.connector.sub_connectors
        policy = connectors[1].connector_scheduler.manager._policy
        return {maybe_convert_block_hash(get_offload_block_hash(key)) for key in policy.chunks}


def text_of(number: int, prompt: int, outputs: int = 2, seed: int | None = None) -> Text:
    rng = random.Random(number if seed is None else seed)
    return Text(number, [rng.randrange(1000) for _ in range(prompt + outputs)], prompt)


def test_what_was_evicted_is_loaded_and_its_events_are_understood(model_folder: Path) -> None:
    real = Hosted(model_folder, blocks=32, host_blocks=400)
    first = text_of(1, 80)
    assert real.serve(first) == (0, 0)
    for number in range(2, 6):
        real.serve(text_of(number, 80))
    again = Text(9, [*first.tokens[:80], 7, 8, 9, 10, 11], 83)
    local, external = real.serve(again)
    assert local + external == 80
    assert external > 0
    assert real.loads == 1
    assert real.translation.strays == 0
    assert real.told == real.on_host


def test_what_a_peer_holds_is_read_though_the_host_has_it(model_folder: Path) -> None:
    real = Hosted(model_folder, blocks=32, host_blocks=400)
    first = text_of(1, 80)
    real.serve(first)
    for number in range(2, 6):
        real.serve(text_of(number, 80))
    pull = Text(9, [*first.tokens[:80], 7, 8], 80, pull_tokens=80)
    real.arrived = {pull.id}
    local, external = real.serve(pull)
    assert (local + external, real.loads) == (80, 0)


def test_of_what_is_cached_only_nothing_is_loaded(model_folder: Path) -> None:
    real = Hosted(model_folder, blocks=32, host_blocks=400)
    first = text_of(1, 80)
    real.serve(first)
    for number in range(2, 6):
        real.serve(text_of(number, 80))
    only = Text(9, [*first.tokens[:80], 7], 80)
    params = {"do_remote_prefill": False, "do_remote_decode": False, CACHED_ONLY: True}
    local, external = real.serve(only, **params)
    assert local < 80
    assert (external, real.loads) == (0, 0)


def texts_of(rng: random.Random, blocks: int) -> Iterator[Text]:
    """Requests of which most begin as an earlier one did; none needs more than so many blocks."""
    texts: list[Text] = []
    for number in range(40):
        tokens: list[int] = []
        if texts and rng.random() < 0.7:
            base = rng.choice(texts[-12:])
            tokens = base.tokens[: rng.randint(1, len(base.tokens))]
        tokens += [rng.randrange(1000) for _ in range(rng.randint(1, 30))]
        tokens = tokens[: min(BLOCK * (blocks - 1) - 10, 150)]
        answer = [rng.randrange(1000) for _ in range(rng.randint(1, 9))]
        text = Text(number, [*tokens, *answer], len(tokens))
        texts.append(text)
        yield text


@pytest.mark.parametrize("seed", range(12))
def test_one_request_after_the_other_finds_as_much_as_in_the_simulated_engine(
    model_folder: Path, seed: int
) -> None:
    rng = random.Random(seed)
    blocks = rng.randint(20, 60)
    real, simulated = Hosted(model_folder, blocks, 2000), Simulated(blocks, 2000)
    for text in texts_of(rng, blocks):
        assert sum(real.serve(text)) == simulated.serve(text), text.number
    assert real.loads > 0
    assert real.translation.strays == 0
    assert real.told == real.on_host


@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_told_of_a_small_host_that_is_not_there(model_folder: Path, seed: int) -> None:
    """vLLM evicts the beginning of a text before its end if only its end was loaded lately: what is
    behind a gap is not told."""
    rng = random.Random(seed)
    blocks = rng.randint(20, 60)
    real = Hosted(model_folder, blocks, rng.choice((15, 60, 90)))
    for text in texts_of(rng, blocks):
        real.serve(text)
        assert real.told <= real.on_host
    assert real.told


class Simulated:
    """The simulated engine, driven in the same way."""

    def __init__(self, blocks: int, host_blocks: int) -> None:
        shape = model_shape(json.loads(CONFIG.read_text("utf-8")), "llama")
        options = EngineOptions(
            block_size=BLOCK,
            max_num_seqs=SEATS,
            max_num_batched_tokens=BUDGET,
            max_model_len=MODEL_LEN,
        )
        host = HostMemory(host_blocks, 1e-6)
        self.engine = Engine(StepCost(shape, hardware("h200")), options, blocks, Gaps(), host)
        self.now_s = 0.0

    def serve(self, text: Text) -> int:
        """A request, alone, to its end; how much of its prompt was found."""
        self.now_s += 1.0
        self.engine.submit(text.simulated(), self.now_s)
        found = -1
        while (next_s := self.engine.next_s) is not None:
            self.now_s = max(self.now_s, next_s)
            for output in self.engine.advance(self.now_s):
                if isinstance(output, HostLoad):
                    self.now_s = output.ready_s
                    self.engine.pulled(output.id, True, self.now_s)
                if isinstance(output, FirstToken):
                    found = output.local_cached_tokens
        return found

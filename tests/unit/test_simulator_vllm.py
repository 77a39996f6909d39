"""The simulated engine beside vLLM's own scheduler: the same decisions, step by step.

vLLM's scheduler and KV cache manager are the real ones, and so is the scheduler half of our
connector; only the model is missing. Random traffic over a small KV cache goes into both:
shared prefixes, pulls that come or fail, holds, aborts, priorities. After each step they must
agree on who computes how many tokens, who runs and waits, and on every free block: how many
have no hash, and which hashes the others have, in the order in which they will be evicted.

Many steps that the simulated engine takes at once are so many steps here.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Iterator
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("nixl")

import torch
from vllm.config import (
    CacheConfig,
    KVEventsConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from cluster.hardware import hardware
from cluster.model_shape import model_shape
from cluster.simulator.engine import Engine
from cluster.simulator.engine_types import Ended, EngineRequest, FirstToken, Pull
from cluster.simulator.records import Gaps
from cluster.simulator.setup import EngineOptions
from coordinator.cost import StepCost
from transfer.settings import kv_transfer_config

CONFIG = Path(__file__).with_name("model_configs") / "llama-3.1-8b.json"
BLOCK = 4
SEATS = 6
BUDGET = 40
MODEL_LEN = 300
LEASE_S = 0.4


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(CONFIG.read_text("utf-8"), "utf-8")
    init_none_hash(sha256)
    return folder


def vllm_scheduler(folder: Path, policy: str, blocks: int, host_bytes: int = 0) -> Scheduler:
    config = VllmConfig(
        model_config=ModelConfig(
            model=str(folder), skip_tokenizer_init=True, dtype="float16", max_model_len=MODEL_LEN
        ),
        scheduler_config=SchedulerConfig(
            max_num_seqs=SEATS,
            max_num_batched_tokens=BUDGET,
            max_model_len=MODEL_LEN,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            async_scheduling=False,
            policy=policy,
        ),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
        kv_transfer_config=KVTransferConfig(**kv_transfer_config("engine", host_bytes=host_bytes)),
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    )
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    return Scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=True,
    )


class Text:
    """A request as both engines get it. ``tokens``: its prompt and all that it will generate."""

    def __init__(self, number: int, tokens: list[int], prompt: int, **fields: Any) -> None:
        self.id = f"r{number}~1"
        self.tokens = tokens
        self.prompt = prompt
        self.fields = fields
        self.number = number

    def vllm(self) -> Request:
        params: dict[str, Any] | None = None
        pull = self.fields.get("pull_tokens", 0)
        if pull:
            params = {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_block_ids": [list(range(1, 1 - (-pull // BLOCK)))],
                "remote_engine_id": "elsewhere",
                "remote_request_id": self.id,
                "remote_host": "127.0.0.1",
                "remote_port": 5600,
                "tp_size": 1,
                "remote_num_tokens": pull,
            }
        if self.fields.get("hold"):
            params = {"do_remote_decode": True, "do_remote_prefill": False}
        return Request(
            request_id=self.id,
            prompt_token_ids=self.tokens[: self.prompt],
            sampling_params=SamplingParams(
                max_tokens=len(self.tokens) - self.prompt,
                ignore_eos=True,
                extra_args={"kv_transfer_params": params},
            ),
            pooling_params=None,
            arrival_time=float(self.number),
            priority=self.fields.get("priority", 0),
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )

    def simulated(self) -> EngineRequest:
        whole = Request(
            request_id="x",
            prompt_token_ids=self.tokens[:-1],
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )
        chain = b"".join(bytes(block[:8]) for block in whole.block_hashes)
        outputs = len(self.tokens) - self.prompt
        return EngineRequest(self.id, chain, self.prompt, outputs, **self.fields)


class Real:
    """vLLM's scheduler, and what the world around an engine would tell it."""

    def __init__(self, folder: Path, policy: str, blocks: int, host_bytes: int = 0) -> None:
        self.scheduler = vllm_scheduler(folder, policy, blocks, host_bytes)
        self.texts: dict[str, Text] = {}
        self.output: Any = None
        self.aborts: list[str] = []
        self.arrived: set[str] = set()
        self.failed: set[str] = set()
        self.ended: list[str] = []
        self.first: dict[str, tuple[int, int]] = {}
        """Tokens found here and moved, of those that had their first token."""

    def schedule(self) -> dict[str, int]:
        """Begin a step; its tokens by request. Empty ones end at once."""
        while True:
            self.output = self.scheduler.schedule()
            scheduled: dict[str, int] = self.output.num_scheduled_tokens
            if scheduled or not self.output.preempted_req_ids:
                return dict(scheduled)
            self.finish()

    def finish(self) -> None:
        """The step is over: aborts first, then tokens, then what came of transfers."""
        for request in self.aborts:
            self.scheduler.finish_requests(request, RequestStatus.FINISHED_ABORTED)
        self.aborts = []
        sampled: list[list[int]] = []
        ids = list(self.output.num_scheduled_tokens)
        for request_id in ids:
            request = self.scheduler.requests.get(request_id)
            done = request is not None and request.num_computed_tokens >= request.num_tokens
            text = self.texts[request_id].tokens
            sampled.append([text[request.num_tokens]] if request and done else [])
        outputs = self.scheduler.update_from_output(
            self.output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={request: i for i, request in enumerate(ids)},
                sampled_token_ids=sampled,
                kv_connector_output=self._transfers(),
            ),
        )
        self.output = None
        for output in outputs[0].outputs if 0 in outputs else []:
            if output.prefill_stats is not None:
                stats = output.prefill_stats
                cached = (stats.num_local_cached_tokens, stats.num_external_cached_tokens)
                self.first[output.request_id] = cached
            if output.finish_reason is not None:
                self.ended.append(output.request_id)

    def _transfers(self) -> KVConnectorOutput:
        arrived = {request for request in self.arrived if request in self.scheduler.requests}
        failed = self.failed & arrived
        self.arrived, self.failed = set(), set()
        return KVConnectorOutput(finished_recving=arrived, failed_recving=failed)

    def free(self, request_id: str) -> None:
        """A held or no longer wanted request's blocks are free."""
        self.scheduler._update_from_kv_xfer_finished(
            KVConnectorOutput(finished_sending={request_id})
        )

    def abort(self, request_id: str) -> None:
        request = self.scheduler.requests.get(request_id)
        if request is None or request.is_finished():
            return
        if request.status == RequestStatus.RUNNING:
            self.aborts.append(request_id)
            return
        parked = request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
        parked &= request_id not in self.scheduler.finished_recving_kv_req_ids
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self.arrived.discard(request_id)
        if parked:
            self.free(request_id)

    def free_blocks(self) -> tuple[int, list[bytes]]:
        queue = self.scheduler.kv_cache_manager.block_pool.free_block_queue
        hashes = [block.block_hash for block in queue.get_all_free_blocks()]
        plain = hashes.count(None)
        assert hashes[:plain] == [None] * plain
        return plain, [bytes(block[:8]) for block in hashes[plain:] if block is not None]


class Both:
    """The simulated engine and the real scheduler, kept side by side."""

    def __init__(self, folder: Path, policy: str, blocks: int) -> None:
        shape = model_shape(json.loads(CONFIG.read_text("utf-8")), "llama")
        options = EngineOptions(
            block_size=BLOCK,
            max_num_seqs=SEATS,
            max_num_batched_tokens=BUDGET,
            max_model_len=MODEL_LEN,
            kv_lease_s=LEASE_S,
        )
        self.engine = Engine(StepCost(shape, hardware("h200")), options, blocks, Gaps())
        self.real = Real(folder, policy, blocks)
        self.leases: deque[tuple[float, str]] = deque()
        self.scheduled: dict[str, int] = {}
        self.steps = 0
        self.hits = 0
        self.outputs: list[Any] = []

    # The planned steps and their batch are not part of the engine's interface.

    def begun(self, now_s: float) -> int:
        """How many of the planned steps have begun by now."""
        steps = self.engine._steps
        return 0 if steps is None else min(steps.count, steps.ended_by(now_s) + 1)

    def batch(self) -> dict[str, int]:
        if self.engine._steps is None:
            return {}
        schedule, batch = self.engine._schedule, self.engine._batch
        tokens = {s.id: 1 for s in schedule.decodes if s not in batch.stalled}
        return {**tokens, **{sequence.id: new for sequence, new in batch.chunks}}

    def catch_up(self, now_s: float) -> None:
        """Let the real one take the steps that the simulated one has begun."""
        while self.steps < self.begun(now_s):
            tokens = self.scheduled
            self.real.finish()
            self.scheduled = self.real.schedule()
            assert self.scheduled == tokens, "only the same decodes, while nothing happens"
            self.steps += 1

    def at(self, event: tuple[str, Any], now_s: float) -> None:
        """Something comes from outside."""
        kind, what = event
        self.happen_here(kind, what, now_s)
        self.catch_up(now_s)
        real = self.real
        if kind == "submit":
            real.texts[what.id] = what
            real.scheduler.add_request(what.vllm())
        elif kind == "abort":
            real.abort(what)
        elif kind == "pulled":
            request = real.scheduler.requests.get(what[0])
            if request is not None and request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
                real.arrived.add(what[0])
                real.failed |= set() if what[1] else {what[0]}
        elif any(name == what for _, name in self.leases):
            self.leases = deque(entry for entry in self.leases if entry[1] != what)
            real.free(what)
        self.engine.check()

    def happen_here(self, kind: str, what: Any, now_s: float) -> None:
        match kind:
            case "submit":
                self.engine.submit(what.simulated(), now_s)
            case "abort":
                self.engine.abort(what, now_s)
            case "pulled":
                self.engine.pulled(what[0], what[1], now_s)
            case _:
                self.engine.release(what, now_s)

    def advance(self) -> list[Any]:
        """On to the next step of the simulated engine, and as far with the real one."""
        now_s = self.engine.next_s
        assert now_s is not None
        self.catch_up(now_s)
        outputs = self.engine.advance(now_s)
        self.outputs += outputs
        if self.scheduled or self.real.arrived:
            if self.real.output is None:
                self.real.output = self.real.scheduler.schedule()
            self.real.finish()
        while self.leases and self.leases[0][0] <= now_s:
            self.real.free(self.leases.popleft()[1])
        for output in outputs:
            if isinstance(output, Ended) and output.held:
                self.leases.append((output.expires_s, output.id))
        self.scheduled = self.real.schedule()
        self.steps = min(1, len(self.scheduled))
        self.compare(outputs, now_s)
        return outputs

    def compare(self, outputs: list[Any], now_s: float) -> None:
        schedule = self.engine._schedule
        scheduler = self.real.scheduler
        assert self.batch() == self.scheduled
        assert list(self.batch()) == list(self.scheduled)
        plain, cached = self.real.free_blocks()
        assert schedule.pool.cached_hashes() == cached
        assert schedule.pool.free == plain + len(cached)
        assert set(schedule.parked) == {r.request_id for r in scheduler.kv_holding_waiting}
        running, waiting = scheduler.get_request_counts()
        load = self.engine.load(now_s)
        assert (load.running, load.waiting) == (running, waiting)
        for output in outputs:
            if isinstance(output, Pull):
                request = scheduler.requests[output.id]
                assert request.prefill_stats.num_external_cached_tokens == output.tokens
            if isinstance(output, FirstToken):
                self.hits += output.local_cached_tokens
        for sequence in schedule.decodes:
            request = scheduler.requests[sequence.id]
            assert schedule.decodes.generated(sequence) == request.num_output_tokens
            assert sequence.preemptions == request.num_preemptions
        ended = [output.id for output in outputs if isinstance(output, Ended)]
        assert ended == self.real.ended
        first = {o.id: first_token(o) for o in outputs if isinstance(o, FirstToken)}
        assert first == self.real.first
        self.real.ended, self.real.first = [], {}


def first_token(output: FirstToken) -> tuple[int, int]:
    return output.local_cached_tokens, output.moved_tokens


def traffic(seed: int, priorities: bool) -> Iterator[tuple[float, Text]]:
    """Arrivals: new texts, and texts that go on from a part of an earlier one."""
    rng = random.Random(seed)
    earlier: list[list[int]] = []
    now_s, fresh = 0.0, 0
    pauses_s = rng.choice([[0.0, 0.001, 0.02, 0.1, 0.5], [0.0, 0.02], [0.02, 0.1]])
    for number in range(rng.randint(30, 60)):
        tokens: list[int] = []
        if earlier and rng.random() < 0.7:
            base = rng.choice(earlier[-6:])
            tokens = base[: rng.choice([len(base), len(base), rng.randint(1, len(base))])]
        prompt = min(len(tokens) + rng.choice([0, 1, 5, 30, 90]), 200) or 1
        outputs = rng.choice([1, 2, 9, 40, 90])
        while len(tokens) < prompt + outputs:
            fresh += 1
            tokens.append(fresh)
        # What is generated is new each time, though it may be the like of a part of a prompt.
        tokens = tokens[:prompt] + [fresh + i for i in range(1, outputs + 1)]
        fresh += outputs
        fields: dict[str, Any] = {}
        kind = rng.random()
        if kind < 0.2:
            fields["hold"] = True
            tokens = tokens[: prompt + 1]
        elif kind < 0.45 and prompt > 1:
            # Of a prompt of one token vLLM forgets that it was moved, as it computes it again.
            fields["pull_tokens"] = rng.choice([prompt, rng.randint(1, prompt)])
        if priorities:
            fields["priority"] = number if number < 2 else rng.randint(0, 3)
        earlier.append(tokens)
        yield now_s, Text(number, tokens, prompt, **fields)
        if not (priorities and number == 0):
            now_s += rng.choice(pauses_s)


def follow_up(output: Any, rng: random.Random) -> Iterator[tuple[float, str, Any]]:
    """What happens after an output, when, in the world."""
    later_s: float = output.at_s + rng.choice([0.0, 0.003, 0.05, 0.3])
    if isinstance(output, Pull):
        yield later_s, "pulled", (output.id, rng.random() < 0.8)
    if isinstance(output, Ended) and output.held and rng.random() < 0.6:
        yield later_s, "release", output.id
    if isinstance(output, Pull | FirstToken) and rng.random() < 0.1:
        yield later_s + 0.001, "abort", output.id


def replay(folder: Path, seed: int, priorities: bool) -> Both:
    rng = random.Random(seed + 1)
    both = Both(folder, "priority" if priorities else "fcfs", rng.choice([80, 100, 120]))
    events: list[tuple[float, int, str, Any]] = []
    count = 0
    for at_s, text in traffic(seed, priorities):
        heappush(events, (at_s, count, "submit", text))
        count += 1
        if rng.random() < 0.1:
            heappush(events, (at_s + rng.choice([0.0, 0.05]), count, "abort", text.id))
            count += 1
    while events or both.engine.next_s is not None:
        next_s = both.engine.next_s
        if events and (next_s is None or events[0][0] <= next_s):
            at_s, _, kind, what = heappop(events)
            both.at((kind, what), at_s)
            continue
        for output in both.advance():
            for at_s, kind, what in follow_up(output, rng):
                heappush(events, (at_s, count, kind, what))
                count += 1
    both.engine.check()
    assert not both.real.scheduler.get_num_unfinished_requests()
    return both


@pytest.mark.parametrize("priorities", [False, True])
def test_it_decides_as_vllm_does(model_folder: Path, priorities: bool) -> None:
    hits = preemptions = ended = pulls = 0
    for seed in range(12):
        both = replay(model_folder, seed, priorities)
        hits += both.hits
        preemptions += both.engine.preemptions
        ended += sum(isinstance(output, Ended) for output in both.outputs)
        pulls += sum(isinstance(output, Pull) for output in both.outputs)
    # The traffic is such that everything happens.
    assert hits > 1000
    assert preemptions > 20
    assert ended > 300
    assert pulls > 50

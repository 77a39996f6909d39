"""Child of ``pythia calibrate``: one real engine, and how long its steps take.

A step's time is the time between the engine's own stamps on two steps that follow each
other without a pause: decodes keep the engine busy, and a prompt that is given to it then
makes exactly one of the steps a mixed one. A prompt alone follows the step of another one,
during which it is handed over; so no step includes the engine's waking up.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import statistics
import time
from typing import Any

import uvloop

from cluster.bench.child import Parent
from cluster.process import die_with_parent
from cluster.reaper import protect_group

DECODE_STEPS = 6
"""Steps of a decode batch that are timed; the middle one counts."""
STEP_S_MAX = 120.0
ENGINE_STOP_S = 5.0
OUTPUTS_MAX = 512
"""Of a sequence in a batch: more than are generated while it is measured."""
FIRST_TOKEN_ID = 16
LEAD_TOKENS = 128
LEAD_S = 0.002
LEAD_TRIES = 8
"""A prompt alone is handed over this long after another one, with that many tokens."""


class _Engine:
    """The engine's steps as they come: when, and which requests got a token."""

    def __init__(self, engine: Any, vocabulary: int) -> None:
        self._engine = engine
        self._vocabulary = vocabulary
        self._random = random.Random(0)
        self._requests = 0
        self._step = asyncio.Event()
        self.steps: list[tuple[float, dict[str, Any]]] = []
        engine.on_step = self._on_step

    def _on_step(self, outputs: list[Any], timestamp_s: float) -> None:
        self.steps.append((timestamp_s, {output.request_id: output for output in outputs}))
        self._step.set()

    def prompt(self, tokens: int) -> list[int]:
        """One that no cache has seen."""
        return self._random.choices(range(FIRST_TOKEN_ID, self._vocabulary), k=tokens)

    async def submit(self, prompt: list[int], outputs: int) -> str:
        """Give the engine a request; its id."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        self._requests += 1
        name = f"c{self._requests}~1"
        sampling = SamplingParams(
            max_tokens=outputs,
            min_tokens=outputs,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        await self._engine.submit(
            EngineCoreRequest(
                request_id=name,
                external_req_id=name,
                prompt_token_ids=prompt,
                mm_features=None,
                sampling_params=sampling,
                pooling_params=None,
                arrival_time=time.time(),
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            )
        )
        return name

    async def token_of(self, name: str, since: int) -> int:
        """The index of the first step after ``since`` steps that gave ``name`` a token."""
        while True:
            for index in range(since, len(self.steps)):
                if name in self.steps[index][1]:
                    return index
            since = len(self.steps)
            await self.next_step()

    async def next_step(self) -> None:
        """Wait for one more. TimeoutError if none comes."""
        self._step.clear()
        await asyncio.wait_for(self._step.wait(), STEP_S_MAX)

    async def forget(self, names: list[str]) -> None:
        """Abort what is still running."""
        await self._engine.forget(names)


async def measure(engine: _Engine, new: int, cached: int, batch: int, context: int) -> Any:
    """A step's seconds, and what it really was: a ``Point`` without its kind."""
    engine.steps.clear()
    prefix = engine.prompt(cached)
    if cached:
        await engine.token_of(await engine.submit(prefix, 1), 0)
    running = [await engine.submit(engine.prompt(context), OUTPUTS_MAX) for _ in range(batch)]
    for name in running:
        await engine.token_of(name, 0)
    point: dict[str, Any] = {"batch": batch}
    if new:
        name, index = await _chunk_step(engine, prefix, new, alone=not batch)
        stats = engine.steps[index][1][name].prefill_stats
        point["seconds"] = engine.steps[index][0] - engine.steps[index - 1][0]
        point["context_tokens"] = stats.num_cached_tokens
        point["new_tokens"] = new + cached - stats.num_cached_tokens
    else:
        first = len(engine.steps) - 1
        while (index := len(engine.steps) - 1) < first + DECODE_STEPS:
            await engine.next_step()
        stamps = [stamp for stamp, _ in engine.steps[first : index + 1]]
        gaps = [later - earlier for earlier, later in itertools.pairwise(stamps)]
        point["seconds"] = statistics.median(gaps)
    if any(len(outputs.keys() & set(running)) != batch for _, outputs in engine.steps[index:]):
        raise RuntimeError(f"a batch of {batch} has not stayed together while it was measured")
    decoded = sum(len(outputs.keys() & set(running)) for _, outputs in engine.steps)
    point["batch_context_tokens"] = batch * context + decoded
    await engine.forget(running)
    return point


async def _chunk_step(engine: _Engine, prefix: list[int], new: int, alone: bool) -> tuple[str, int]:
    """Runs ``new`` tokens behind ``prefix`` right after another step; their request and step.

    ``alone``: no decode keeps the engine busy, so another prompt has to.
    """
    delay_s = LEAD_S
    for _ in range(LEAD_TRIES):
        before = len(engine.steps)
        lead = await engine.submit(engine.prompt(LEAD_TOKENS), 1) if alone else ""
        if alone:
            await asyncio.sleep(delay_s)
        given_s = time.monotonic()
        name = await engine.submit(prefix + engine.prompt(new), 1)
        index = await engine.token_of(name, before)
        if not alone:
            return name, index
        led = await engine.token_of(lead, before)
        if led == index - 1 and given_s < engine.steps[led][0]:
            return name, index
        # Too early, and both were one step; or too late, and the engine was idle.
        delay_s *= 2.0 if led == index else 0.5
    raise RuntimeError(f"no prompt could be put right behind another in {LEAD_TRIES} tries")


def main() -> None:
    """Start the engine and answer. It starts before there is a loop, as in a worker."""
    parent = Parent()
    from cluster.engine import start_engine

    engine = start_engine(parent.settings["engine"], metrics=False)
    try:
        uvloop.run(_serve(parent, engine))
    finally:
        engine.shutdown(timeout=ENGINE_STOP_S)


async def _serve(parent: Parent, started: Any) -> None:
    config = started.vllm_config
    engine = _Engine(started, config.model_config.get_vocab_size())

    async def answer(question: dict[str, Any]) -> dict[str, Any]:
        point: dict[str, Any] = await measure(engine, **question)
        return point

    parent.say(_facts(config, parent.settings["model"]))
    await parent.serve(answer)


def _facts(config: Any, model: str) -> dict[str, Any]:
    """What the parent has to know of the engine: its limits, its model, its device."""
    from cluster.engine import engine_facts

    facts = engine_facts(config, model, 0.0)
    return {
        "block_size": facts.block_size,
        "kv_blocks": facts.kv_blocks,
        "max_model_len": facts.max_model_len,
        "max_num_seqs": facts.max_num_seqs,
        "max_num_batched_tokens": facts.max_num_batched_tokens,
        "vllm_version": facts.vllm_version,
        "config": json.loads(config.model_config.hf_config.to_json_string(use_diff=False)),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "tp": config.parallel_config.tensor_parallel_size,
        "device": _device(),
    }


def _device() -> str:
    """What vLLM calls it; ``cpu`` for processors."""
    from vllm.platforms import current_platform

    return "cpu" if current_platform.is_cpu() else str(current_platform.get_device_name())


if __name__ == "__main__":
    die_with_parent(os.getppid())
    protect_group()
    main()

"""Child of ``pythia bench transfer``: a bare vLLM engine with Pythia's connector.

No worker, no API: what is measured is the transfer as the engine does it.
"""

from __future__ import annotations

import os
import time
from typing import Any

import uvloop

from cluster.bench.child import Parent
from cluster.process import die_with_parent
from cluster.reaper import protect_group

_NIXL = {
    "vllm:nixl_xfer_time_seconds_sum": "xfer_s",
    "vllm:nixl_post_time_seconds_sum": "post_s",
    "vllm:nixl_bytes_transferred_sum": "bytes",
    "vllm:nixl_num_descriptors_sum": "descriptors",
    "vllm:nixl_xfer_time_seconds_count": "transfers",
}


async def _run() -> None:
    parent = Parent()
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.inputs import TokensPrompt
    from vllm.v1.engine.async_llm import AsyncLLM

    transfer = KVTransferConfig(**parent.settings.pop("kv_transfer_config"))
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(**parent.settings, kv_transfer_config=transfer)
    )

    async def answer(question: dict[str, Any]) -> dict[str, Any]:
        if "prompt" not in question:
            return _nixl_totals()
        sampling = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            extra_args={"kv_transfer_params": question["kv_transfer_params"]},
        )
        prompt = TokensPrompt(prompt_token_ids=question["prompt"])
        started_s = time.perf_counter()
        final = None
        async for output in engine.generate(prompt, sampling, request_id=question["request"]):
            final = output
        assert final is not None
        return {
            "elapsed_s": time.perf_counter() - started_s,
            "token": final.outputs[0].token_ids[0],
            "kv_transfer_params": final.kv_transfer_params,
        }

    parent.say({"ready": True})
    await parent.serve(answer)
    engine.shutdown()


def _nixl_totals() -> dict[str, float]:
    """vLLM's own counters of this engine's reads, since it started."""
    from prometheus_client import REGISTRY

    totals = dict.fromkeys(_NIXL.values(), 0.0)
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name in _NIXL:
                totals[_NIXL[sample.name]] += sample.value
    return totals


if __name__ == "__main__":
    die_with_parent(os.getppid())
    protect_group()
    uvloop.run(_run())

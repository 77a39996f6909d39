"""What ``pythia calibrate`` takes for a step, against an engine whose steps are known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import calibrate_engine


class _Stepping:
    """Stands for a worker's engine: ``STEP_S`` a step, and ``TOKEN_S`` a prompt token.

    Its stamps are exact whatever the machine does meanwhile; they start anew when it was idle.
    """

    STEP_S, TOKEN_S = 0.004, 0.00005

    def __init__(self) -> None:
        self.on_step: Callable[[list[Any], float], None] = lambda outputs, stamp: None
        self.waiting: list[Any] = []
        self.running: dict[str, int] = {}
        self.seen: list[list[int]] = []
        self.work = asyncio.Event()

    async def submit(self, request: Any) -> None:
        self.waiting.append(request)
        self.work.set()

    async def forget(self, names: list[str]) -> None:
        for name in names:
            self.running.pop(name, None)

    def cached(self, prompt: list[int]) -> int:
        return max((len(old) for old in self.seen if prompt[: len(old)] == old), default=0)

    async def serve(self) -> None:
        now_s = 0.0
        while True:
            if not self.work.is_set():
                await self.work.wait()
                now_s = time.monotonic()
            new, self.waiting = self.waiting, []
            cached = {request.request_id: self.cached(request.prompt_token_ids) for request in new}
            tokens = sum(len(r.prompt_token_ids) - cached[r.request_id] for r in new)
            step_s = self.STEP_S + tokens * self.TOKEN_S
            now_s += step_s
            await asyncio.sleep(step_s)
            self.running |= {r.request_id: r.sampling_params.max_tokens for r in new}
            self.seen += [r.prompt_token_ids for r in new]
            outputs = [
                SimpleNamespace(
                    request_id=name,
                    prefill_stats=SimpleNamespace(num_cached_tokens=cached.get(name, 0)),
                )
                for name in self.running
            ]
            self.running = {name: left - 1 for name, left in self.running.items() if left > 1}
            self.on_step(outputs, now_s)
            if not self.running and not self.waiting:
                self.work.clear()


async def test_a_step_is_told_from_its_neighbours() -> None:
    stepping = _Stepping()
    engine = calibrate_engine._Engine(stepping, vocabulary=1000)
    serving = asyncio.create_task(stepping.serve())
    try:
        chunk = await calibrate_engine.measure(engine, 400, 0, 0, 0)
        behind = await calibrate_engine.measure(engine, 400, 256, 0, 0)
        decode = await calibrate_engine.measure(engine, 0, 0, 3, 16)
        mixed = await calibrate_engine.measure(engine, 800, 0, 2, 16)
    finally:
        serving.cancel()
    for point, step_s in ((chunk, 0.024), (behind, 0.024), (decode, 0.004), (mixed, 0.044)):
        assert point["seconds"] == pytest.approx(step_s)
    assert (behind["context_tokens"], behind["new_tokens"]) == (256, 400)
    assert decode["batch"] == 3
    assert 3 * 16 < decode["batch_context_tokens"] < 3 * 60
    assert (mixed["new_tokens"], mixed["batch"]) == (800, 2)
    assert not stepping.running

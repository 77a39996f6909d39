"""The simulated engine beside one that is written plainly, under any traffic.

Both get the same requests, aborts, releases and pulls. All that comes out must be the same, at
the same times; so must what can be asked in the middle of many steps that are taken at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from heapq import heappop, heappush
from math import ceil
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from cluster.hardware import hardware
from cluster.model_shape import model_shape
from cluster.simulator.engine import Engine
from cluster.simulator.engine_types import Ended, EngineRequest, FirstToken, Output, Pull
from cluster.simulator.records import Gaps
from cluster.simulator.setup import EngineOptions
from coordinator.cost import StepCost
from tests.properties.slow_engine import SlowEngine

CONFIG = Path(__file__).parent.parent / "unit" / "model_configs" / "llama-3.1-8b.json"
COST = StepCost(model_shape(json.loads(CONFIG.read_text("utf-8")), "llama"), hardware("h200"))
OPTIONS = EngineOptions(
    block_size=4,
    max_num_seqs=4,
    max_num_batched_tokens=24,
    kv_lease_s=0.3,
    step_overhead_s=1e-4,
)
KV_BLOCKS = 45
TOKENS_MAX = (KV_BLOCKS - 1) * OPTIONS.block_size


class Arrival(msgspec.Struct, frozen=True):
    """A request: goes on from ``cut`` blocks of the text of request number ``base``."""

    after_s: float
    base: int
    cut: int
    new_tokens: int
    output_tokens: int
    priority: int
    hold: bool
    cached: bool
    pull: float
    pull_s: float
    pull_ok: bool
    abort_s: float
    release_s: float


# Sums of these never meet the end of a step exactly: which comes first would be chance.
pauses = st.sampled_from([0.0, 0.0003137, 0.0021371, 0.0171373, 0.1137137])
arrivals = st.builds(
    Arrival,
    after_s=pauses,
    base=st.integers(0, 5),
    cut=st.integers(0, 40),
    new_tokens=st.integers(1, 60),
    output_tokens=st.sampled_from([1, 2, 7, 30, 80]),
    priority=st.sampled_from([0, 0, 0, 0, 1]),
    hold=st.sampled_from([False, False, False, True]),
    cached=st.sampled_from([True, True, True, True, False]),
    pull=st.sampled_from([0.0, 0.0, 0.4, 1.0]),
    pull_s=pauses.map(lambda pause_s: pause_s + 0.0001171),
    pull_ok=st.sampled_from([True, True, False]),
    abort_s=st.sampled_from([0.0, 0.0, 0.0, 0.0, 0.0011717, 0.0517113]),
    release_s=st.sampled_from([0.0, 0.0, 0.0117171]),
)


def requests(plan: list[Arrival], priorities: bool) -> list[tuple[float, EngineRequest]]:
    """The plan's requests. What each generates is in no other text before it."""
    made: list[tuple[float, EngineRequest]] = []
    chains: list[bytes] = []
    now_s = 0.0
    for number, arrival in enumerate(plan):
        base = chains[-1 - arrival.base % len(chains)] if chains else b""
        known = base[: 8 * arrival.cut]
        outputs = arrival.output_tokens
        prompt = 4 * (len(known) // 8) + arrival.new_tokens
        prompt = min(prompt, TOKENS_MAX - outputs)
        known = known[: 8 * (prompt // 4)]
        chain = known
        while len(chain) < 8 * ((prompt + outputs - 1) // 4):
            block = f"{number}".encode() + chain[-8:]
            chain += blake2b(block, digest_size=8).digest()
        chains.append(chain)
        now_s += arrival.after_s
        request = EngineRequest(
            f"r{number}",
            chain,
            prompt,
            outputs,
            hold=arrival.hold,
            pull_tokens=round(arrival.pull * prompt),
            priority=arrival.priority if priorities else 0,
            cached=arrival.cached,
        )
        made.append((now_s, request))
    return made


class Pair:
    """Both engines, and the world around them."""

    def __init__(self, plan: list[Arrival], priorities: bool) -> None:
        self.gaps = Gaps()
        self.fast = Engine(COST, OPTIONS, KV_BLOCKS, self.gaps)
        self.slow = SlowEngine(COST, OPTIONS, KV_BLOCKS)
        self.plan = {f"r{number}": arrival for number, arrival in enumerate(plan)}
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.outputs: list[Output] = []
        self.calls = 0
        for at_s, request in requests(plan, priorities):
            self.later(at_s, partial(self.submit, request))

    def later(self, at_s: float, call: Callable[[float], None]) -> None:
        self.calls += 1
        heappush(self.events, (at_s, self.calls, call))

    def submit(self, request: EngineRequest, now_s: float) -> None:
        self.fast.submit(request, now_s)
        self.slow.submit(request, now_s)
        abort_s = self.plan[request.id].abort_s
        if abort_s:
            self.later(now_s + abort_s, partial(self.abort, request.id))

    def abort(self, request_id: str, now_s: float) -> None:
        self.fast.abort(request_id, now_s)
        self.slow.abort(request_id, now_s)

    def pulled(self, request_id: str, now_s: float) -> None:
        self.fast.pulled(request_id, self.plan[request_id].pull_ok, now_s)
        self.slow.pulled(request_id, self.plan[request_id].pull_ok, now_s)

    def release(self, request_id: str, now_s: float) -> None:
        self.fast.release(request_id, now_s)
        self.slow.release(request_id, now_s)

    def run(self) -> None:
        while self.events or self.fast.next_s is not None:
            next_s = self.fast.next_s
            if self.events and (next_s is None or self.events[0][0] <= next_s):
                now_s, _, call = heappop(self.events)
                self.advance(now_s)
                call(now_s)
            else:
                assert next_s is not None
                # A little later, so that rounding decides nothing.
                self.advance(next_s + 1e-9)
            self.fast.check()
        self.same_at_the_end()

    def advance(self, now_s: float) -> None:
        fast, slow = self.fast.advance(now_s), self.slow.advance(now_s)
        assert [rounded(output) for output in fast] == [rounded(output) for output in slow]
        self.outputs += fast
        for output in fast:
            arrival = self.plan[output.id]
            if isinstance(output, Pull):
                at_s = output.at_s + arrival.pull_s
                self.later(at_s, partial(self.pulled, output.id))
            if isinstance(output, Ended) and output.held and arrival.release_s:
                at_s = output.at_s + arrival.release_s
                self.later(at_s, partial(self.release, output.id))
        self.same_now(now_s)

    def same_now(self, now_s: float) -> None:
        fast, slow = self.fast, self.slow
        load = fast.load(now_s)
        used = KV_BLOCKS - 1 - len(slow.free)
        expired = any(held[1] <= now_s for held in slow.held.values())
        assert load.kv_blocks_used == used or expired
        assert load.running == len(slow.running)
        assert load.waiting == len(slow.waiting) + len(slow.parked)
        assert load.preemptions_total == fast.preemptions == slow.preemptions
        assert load.decode_tokens_total == slow.decoded
        for name in self.plan:
            assert fast.generated(name, now_s) == slow.generated(name)
            held = slow.held.get(name)
            assert fast.holds(name, now_s) == (held is not None and held[1] > now_s)

    def same_at_the_end(self) -> None:
        slow = self.slow
        assert not [*slow.waiting, *slow.parked, *slow.running]
        assert self.gaps.count == len(slow.gaps_s)
        assert self.gaps.sum_s == pytest.approx(sum(slow.gaps_s))
        for share in (0.5, 0.9, 1.0) if slow.gaps_s else ():
            exact_s = sorted(slow.gaps_s)[ceil(share * len(slow.gaps_s)) - 1]
            assert self.gaps.quantile(share) == pytest.approx(exact_s, rel=0.03)


def rounded(output: Output) -> tuple[object, ...]:
    fields = msgspec.structs.astuple(output)
    return type(output), *(round(f, 8) if isinstance(f, float) else f for f in fields)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(arrivals, min_size=1, max_size=25), st.booleans())
def test_many_steps_at_once_are_as_many_single_ones(plan: list[Arrival], priorities: bool) -> None:
    pair = Pair(plan, priorities)
    pair.run()
    hits = sum(o.local_cached_tokens for o in pair.outputs if isinstance(o, FirstToken))
    event(f"preempted: {pair.fast.preemptions > 0}")
    event(f"hits: {hits > 0}")
    event(f"pulls: {any(isinstance(output, Pull) for output in pair.outputs)}")

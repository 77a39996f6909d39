"""Seeded clusters in virtual time that lose one message in a hundred.

Every call must end, and nothing of it may be left, whatever was lost. A failing seed is
a test case of its own.
"""

from __future__ import annotations

import random

import pytest

from coordinator.limits import Limits, Placement
from coordinator.protocol import Role
from tests.simulation.fakes import Letter, World

LIMITS = Limits(
    queue_calls=64,
    calls_per_worker=8,
    prefills_per_worker=3,
    queue_s=20.0,
    prefill_s=5.0,
    first_token_s=5.0,
    decode_check_s=5.0,
    check_s=2.0,
    call_s=60.0,
    probe_s=3.0,
)
PLACEMENT = Placement(policy="least_kv", remote_prefill_min_tokens=16, reserve_output_tokens=16)
WORKERS: tuple[tuple[str, Role], ...] = (
    ("p0", "prefill"),
    ("d0", "decode"),
    ("d1", "decode"),
    ("m0", "mixed"),
)
STEP_S = 0.1
LATENCY_STEPS_MAX = 3


class LossyPost:
    """Delivers letters late, out of order, or not at all."""

    def __init__(self, world: World, rng: random.Random, loss: float) -> None:
        self.world, self.rng, self.loss = world, rng, loss
        self.under_way: list[tuple[int, Letter]] = []
        self.steps = 0

    def step(self) -> None:
        """Let a tenth of a second pass."""
        for letter in self.world.letters:
            if self.rng.random() >= self.loss:
                arrives = self.steps + self.rng.randint(0, LATENCY_STEPS_MAX)
                self.under_way.append((arrives, letter))
        self.world.letters = []
        now = [letter for arrives, letter in self.under_way if arrives <= self.steps]
        self.under_way = [each for each in self.under_way if each[0] > self.steps]
        for letter in now:
            self.world.deliver(letter)
        self.world.advance(STEP_S)
        self.steps += 1


def run_cluster(seed: int, loss: float, crashes: bool = False) -> World:
    """Calls for eighteen seconds; then no more loss until all is quiet."""
    rng = random.Random(seed)
    world = World(LIMITS, PLACEMENT)
    for name, role in WORKERS:
        world.start_worker(name, role)
    apis = [world.start_api() for _ in range(2)]
    post = LossyPost(world, rng, loss)
    for step in range(200):
        if step >= 20 and step % 4 == 0:
            group = f"group-{step // 20}" if rng.random() < 0.2 else ""
            world.submit(rng.choice(apis), rng.randint(1, 60), rng.randint(1, 20), group)
        if crashes and step % 50 == 49:
            world.start_worker(*rng.choice(WORKERS))
        post.step()
        if step % 20 == 0:
            world.check()
    world.letters = [letter for _, letter in post.under_way] + world.letters
    world.settle()
    return world


@pytest.mark.parametrize("seed", range(50))
def test_every_call_ends_when_messages_get_lost(seed: int) -> None:
    world = run_cluster(seed, loss=0.01)
    world.assert_quiet()
    assert sum(end == "finished" for end in world.ends()) >= 40
    assert "timeout" not in set(world.ends())


@pytest.mark.parametrize("seed", range(10))
def test_every_call_ends_when_workers_crash_and_much_is_lost(seed: int) -> None:
    run_cluster(seed, loss=0.1, crashes=True).assert_quiet()


def test_every_call_finishes_when_nothing_is_lost() -> None:
    world = run_cluster(0, loss=0.0)
    world.assert_quiet()
    assert set(world.ends()) == {"finished"}
    for api in world.apis.values():
        assert world.now_s - api.heard_s <= 2 * LIMITS.beat_s, "its beats are answered"
    assert world.core.counters["plans_remote"] > 0
    assert world.core.counters["pairs_warmed"] == len(WORKERS) * (len(WORKERS) - 1)


def test_equal_seeds_give_equal_histories() -> None:
    first, second = run_cluster(7, loss=0.05), run_cluster(7, loss=0.05)
    assert first.core.snapshot(0, first.now_s) == second.core.snapshot(0, second.now_s)

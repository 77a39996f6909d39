"""What engines take is learned: from nothing, in spite of noise, without being led astray."""

from __future__ import annotations

from math import inf, isfinite, nan
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.speeds import Law, Speeds


def shown(speeds: Speeds, rng: Random, values: int, scale: float, noise: float = 0.0) -> None:
    """Prompts and steps of an engine that is ``scale`` times as slow as some GPU."""
    for _ in range(values):
        new, cached = rng.randrange(100, 20_000), rng.randrange(0, 50_000)
        pairs = new * (cached + 0.5 * new)
        seconds = scale * (2e-3 + 2e-5 * new + 1e-9 * pairs)
        speeds.prefilled(1, new, pairs, seconds * (1.0 + rng.uniform(-noise, noise)))
        batch = rng.randrange(1, 64)
        context = batch * rng.randrange(1000, 30_000)
        seconds = scale * (8e-3 + 1e-4 * batch + 3e-8 * context)
        speeds.stepped(batch, context, seconds * (1.0 + rng.uniform(-noise, noise)))


@pytest.mark.parametrize("scale", [1.0, 200.0, 0.02])
def test_both_laws_are_found_whatever_the_engine(scale: float) -> None:
    speeds = Speeds()
    shown(speeds, Random(1), 400, scale, noise=0.2)
    true_s = scale * (2e-3 + 2e-5 * 8000 + 1e-9 * 8000 * 24_000)
    assert speeds.prefill_s(8000, 20_000) == pytest.approx(true_s, rel=0.1)
    true_s = scale * (8e-3 + 1e-4 * 16 + 3e-8 * 16 * 8000)
    assert speeds.step_s(16, 16 * 8000) == pytest.approx(true_s, rel=0.1)


def test_one_prompt_tells_a_slow_engine_from_a_fast_one() -> None:
    speeds = Speeds()
    before_s = speeds.prefill_s(4000)
    speeds.prefilled(1, 1000, 1000 * 500.0, 5.0)
    assert speeds.prefill_s(4000) > 20.0 * before_s


def test_an_engine_that_becomes_slower_is_known_to_be() -> None:
    speeds, rng = Speeds(), Random(2)
    shown(speeds, rng, 300, 1.0)
    fast_s = speeds.prefill_s(8000)
    shown(speeds, rng, 300, 3.0)
    assert speeds.prefill_s(8000) == pytest.approx(3.0 * fast_s, rel=0.15)


def test_a_hang_moves_a_law_little() -> None:
    speeds = Speeds()
    shown(speeds, Random(3), 300, 1.0)
    before_s = speeds.step_s(16, 100_000)
    speeds.stepped(16, 100_000, 60.0)
    assert speeds.step_s(16, 100_000) < 1.2 * before_s


@pytest.mark.parametrize("seconds", [0.0, -1.0, nan, inf])
def test_what_cannot_be_true_is_ignored(seconds: float) -> None:
    law = Law((1e-3, 1e-4))
    law.learn((1.0, 50.0), seconds)
    law.learn((-1.0, 50.0), 1.0)
    law.learn((nan, 50.0), 1.0)
    law.learn((0.0, 0.0), 1.0)
    assert law.coefficients == [1e-3, 1e-4]
    assert law.samples == 0.0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0.0, 1e6), st.floats(0.0, 1e12), st.floats(1e-9, 1e5, exclude_min=True)
        ),
        max_size=60,
    )
)
def test_coefficients_stay_finite_and_positive(values: list[tuple[float, float, float]]) -> None:
    law = Law((5e-3, 5e-5, 1e-9))
    for tokens, pairs, seconds in values:
        law.learn((1.0, tokens, pairs), seconds)
        assert all(isfinite(each) and each > 0.0 for each in law.coefficients)
        assert isfinite(law.seconds((1.0, 100.0, 1e4)))


def test_parts_that_never_vary_lean_on_the_guess() -> None:
    law = Law((1e-3, 1e-4))
    for _ in range(100):
        law.learn((1.0, 10.0), 4e-3)
    assert law.seconds((1.0, 10.0)) == pytest.approx(4e-3, rel=0.05)
    assert law.coefficients == pytest.approx([2e-3, 2e-4], rel=0.05)

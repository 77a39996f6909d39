"""The pieces that learning is made of, against numbers worked out by hand."""

from __future__ import annotations

import random

import pytest

from coordinator.workflow.automaton import COUNT_MOST, Automaton
from coordinator.workflow.blend import CALIBRATED, FITTED, LAST, MODEL, Blend
from coordinator.workflow.histogram import Histogram
from coordinator.workflow.lengths import GUESS, Lengths
from coordinator.workflow.regression import Regression
from coordinator.workflow.scores import Scores
from coordinator.workflow.sharing import Sketch, hashes_of

A, B, C = 3, 4, 5


def test_a_histogram_knows_quantiles_to_a_few_percent() -> None:
    values = Histogram(1e9)
    for value in range(1, 10_001):
        values.add(value)
    assert values.samples == pytest.approx(10_000, rel=1e-3)
    for share in (0.05, 0.25, 0.5, 0.75, 0.95, 0.99):
        assert values.quantile(share) == pytest.approx(10_000 * share, rel=0.05)
    assert values.quantiles((0.05, 0.5, 0.95)) == pytest.approx([500, 5000, 9500], rel=0.05)
    assert values.mean() == pytest.approx(5000.5, rel=0.02)


def test_after_a_half_life_a_value_weighs_half() -> None:
    values = Histogram(10.0)
    values.add(1000)
    for _ in range(10):
        values.add(2)
    bins, total = values.weights()
    assert max(bins.values()) == pytest.approx(total - 0.5)
    assert bins[max(bins)] == pytest.approx(0.5)


def test_a_histogram_stays_small_and_finite_for_ever() -> None:
    values = Histogram(5.0)
    rng = random.Random(0)
    for _ in range(20_000):
        values.add(rng.choice([0, 1, 1e9, 1e200, -5]))
    bins, total = values.weights()
    assert len(bins) < 10
    assert 0 < total < 100


def test_witten_bell_by_hand() -> None:
    automaton = Automaton(100)
    for _ in range(3):
        automaton.observe((A,), B)
    automaton.observe((A,), C)
    # Empty path: b 3, c 1 of 4. After a: 2 different followers of 4, so 2/6 go to the back-off.
    found = automaton.probabilities((A,))
    assert found[B] == pytest.approx(3 / 6 + 2 / 6 * 3 / 4)
    assert found[C] == pytest.approx(1 / 6 + 2 / 6 * 1 / 4)
    assert automaton.probabilities((B,)) == pytest.approx({B: 3 / 4, C: 1 / 4})
    assert Automaton(1).probabilities((A,)) == {}


def test_a_longer_path_outweighs_its_back_off() -> None:
    automaton = Automaton(100)
    for _ in range(20):
        automaton.observe((A, A), B)
        automaton.observe((C, A), C)
    assert automaton.probabilities((A, A))[B] > 0.9
    assert automaton.probabilities((C, A))[C] > 0.9


def test_what_is_seen_after_others_says_nothing_against_a_declared_agent() -> None:
    automaton = Automaton(100)
    automaton.declare({A: {B: 0.9, C: 0.1}})
    for _ in range(100):
        automaton.observe((B,), A)
    assert automaton.probabilities((A,)) == pytest.approx({B: 0.9, C: 0.1})


def test_a_declared_graph_is_believed_until_it_is_refuted() -> None:
    automaton = Automaton(100)
    automaton.declare({A: {B: 0.9, C: 0.1}})
    assert automaton.probabilities((A,)) == pytest.approx({B: 0.9, C: 0.1})
    for _ in range(100):
        automaton.observe((A,), C)
    assert automaton.probabilities((A,))[C] > 0.9


def test_what_followed_lately_counts_more() -> None:
    automaton = Automaton(100)
    for _ in range(10_000):
        automaton.observe((A,), B)
    for _ in range(int(COUNT_MOST)):
        automaton.observe((A,), C)
    assert automaton.probabilities((A,))[C] > 0.5


def test_no_more_paths_are_counted_than_allowed() -> None:
    automaton = Automaton(50)
    for number in range(1000):
        automaton.observe((number, number + 1), number + 2)
    assert len(automaton) == 50


def test_what_is_forgotten_is_in_no_count() -> None:
    automaton = Automaton(50)
    automaton.observe((A,), B)
    automaton.observe((A,), C)
    automaton.forget({B})
    assert automaton.probabilities((A,)) == pytest.approx({C: 1.0})


@pytest.mark.parametrize("blocks", [1, 2, 3, 17, 100, 6250])
def test_a_prompt_that_goes_on_is_recognised_exactly(blocks: int) -> None:
    rng = random.Random(blocks)
    prompt = rng.randbytes(8 * blocks)
    sketch = Sketch(hashes_of(prompt))
    assert sketch.shared_blocks(hashes_of(prompt)) == blocks
    assert sketch.shared_blocks(hashes_of(prompt + rng.randbytes(800))) == blocks
    assert sketch.shared_blocks(hashes_of(rng.randbytes(8 * blocks))) == 0
    assert sketch.shared_blocks(hashes_of(b"")) == 0


def test_a_part_is_recognised_and_never_overstated() -> None:
    rng = random.Random(0)
    prompt = rng.randbytes(8 * 1000)
    sketch = Sketch(hashes_of(prompt))
    for shared in range(1001):
        other = prompt[: 8 * shared] + rng.randbytes(8 * (1000 - shared))
        found = sketch.shared_blocks(hashes_of(other))
        assert shared / 2 <= found <= shared, shared
        # The end is what agents rewrite: there it is exact to as much as lies behind.
        assert shared - found <= max(1000 - shared, 1)


def test_half_a_hash_is_ignored() -> None:
    assert len(hashes_of(b"12345678123")) == 1
    assert Sketch(hashes_of(b"123")).blocks == 0


def test_the_bound_is_exceeded_as_often_as_it_should_be_also_after_a_change() -> None:
    rng = random.Random(1)
    lengths = Lengths()
    over = 0
    for number in range(6000):
        scale = 1.0 if number < 3000 else 4.0
        value = scale * rng.lognormvariate(5, 1)
        bound = lengths.upper()
        over += number >= 200 and value > bound
        lengths.add(value, bound)
    assert 0.93 < 1 - over / 5800 < 0.97


def test_what_is_rare_leans_on_all_and_what_is_unknown_is_a_wide_guess() -> None:
    everything, one = Lengths(), Lengths()
    assert one.spread(everything) == GUESS
    for value in range(100, 200):
        everything.add(value)
    assert 100 < one.spread(everything).p50 < 200
    assert one.spread(everything).samples == 0
    for _ in range(30):
        one.add(5000)
    assert one.spread(everything).p50 == pytest.approx(5000, rel=0.1)


def test_scores_by_hand() -> None:
    scores = Scores(fading=1.0)
    scores.next_agent({A: 0.5, B: 0.5 - 1e-9}, A)
    scores.next_agent({A: 0.75, B: 0.25}, B)
    assert scores.top1 == 0.5
    assert scores.log_loss == pytest.approx((0.6931 + 1.3863) / 2, abs=1e-3)
    scores.length(100, 200, 400)
    scores.length(300, 200, 400)
    assert scores.length_coverage == 0.5
    assert scores.length_width_ratio == 0.5


def test_gaps_that_fall_everywhere_alike_are_calibrated() -> None:
    right, wrong, constant = (Scores(fading=1.0) for _ in range(3))
    for number in range(1000):
        right.gap(number / 1000, (number + 1) / 1000)
        wrong.gap(0.0, 0.05)
        constant.gap(0.0, 1.0)
    assert right.gap_error < 0.01
    assert constant.gap_error < 0.01
    assert wrong.gap_error == pytest.approx(0.5)


def test_predictions_that_claim_too_much_are_distrusted() -> None:
    honest, boastful = Scores(), Scores()
    for number in range(100):
        honest.next_agent({A: 0.5, B: 0.4}, A if number % 2 else B)
        boastful.next_agent({A: 0.99, B: 0.01}, A if number % 2 else B)
    assert honest.trusted
    assert not boastful.trusted
    assert not Scores().trusted


def test_a_blend_follows_whoever_is_right() -> None:
    rng = random.Random(2)
    knowing, ignorant = Blend(), Blend()
    value = 100.0
    for _ in range(500):
        last, value = value, rng.uniform(50, 150)
        for blend, model in ((knowing, value * 1.01), (ignorant, rng.uniform(0, 10_000))):
            said = blend.say(model, last, 10.0)
            blend.passed(last, 5.0)
            blend.judge(said, value)
    assert knowing.judgement().ratio < 0.3
    assert knowing.weights[MODEL] + knowing.weights[CALIBRATED] > 0.9
    assert ignorant.judgement().ratio < 0.95
    assert Blend().say(1e9, 5.0, 0.0).interval.likely == 5.0
    assert ignorant.weights[MODEL] < 0.05


def test_a_blend_sees_that_much_now_means_little_next() -> None:
    rng = random.Random(5)
    alternating, values = Blend(), [10.0, 90.0, 10.0, 90.0]
    for _ in range(400):
        value = (10.0 if values[0] > 50 else 90.0) * rng.uniform(0.9, 1.1)
        said = alternating.say(50.0, values[0], 40.0, (values[1], values[2], values[3]))
        alternating.passed(values[0], 30.0)
        alternating.judge(said, value)
        values = [value, *values[:3]]
    # No mean can tell the two apart, and the last value is always wrong.
    assert alternating.weights[FITTED] > 0.9
    assert alternating.judgement().ratio < 0.2


def test_a_regression_stays_finite_whatever_it_is_told() -> None:
    wild, tame = Regression(2), Regression(2)
    assert wild.say((1.0, 2.0)) == 0.0
    for came in [0.0] * 3000 + [1e12] * 10 + [0.0] * 3000 + [5.0] * 3000:
        wild.learn((came, came), came)
    assert 0.0 <= wild.say((5.0, 5.0)) < float("inf")
    assert 0.0 <= wild.say((0.0, 1e12)) < float("inf")
    first = Regression(2)
    for came in (0.0, 1e-9, 0.0):
        first.learn((1e15, 1e200), came)
    assert 0.0 <= first.say((1e15, 1e200)) < float("inf")
    for came in [0.0] * 30 + [5.0, 7.0] * 1000:
        tame.learn((came, came), came)
    # Inputs that always move together say no more than one of them.
    assert tame.say((5.0, 5.0)) == pytest.approx(5.0, rel=0.02)


def test_a_blend_keeps_to_the_last_value_where_nothing_else_is_right() -> None:
    blend, value = Blend(), 1e6
    rng = random.Random(3)
    for _ in range(500):
        last, value = value, value * rng.choice([0.9, 1.1])
        blend.judge(blend.say(1.0, last, 0.0), value)
        blend.passed(value, 5.0)
    assert blend.weights[LAST] + blend.weights[3] > 0.5
    assert blend.judgement().ratio < 1.2


def test_nine_of_ten_values_are_within_the_interval() -> None:
    rng = random.Random(4)
    blend = Blend()
    for _ in range(3000):
        value = rng.lognormvariate(4, 0.5)
        blend.judge(blend.say(60.0, 60.0, 30.0), value)
        blend.passed(value, 5.0)
    assert 0.86 < blend.judgement().coverage < 0.94

"""What a worker has to do, in seconds, and in what company calls are decoded."""

from __future__ import annotations

import pytest

from coordinator.gauge import FADING_S, Gauge, Prompt


def prompt(seconds: float, planned_s: float = 0.0, new: int = 1000, cached: int = 0) -> Prompt:
    return Prompt(seconds, planned_s, new, cached)


def waiting_s(gauge: Gauge, now_s: float) -> float:
    return gauge.reading(now_s)[0]


def prefilling_share(gauge: Gauge, now_s: float) -> float:
    return gauge.reading(now_s)[1]


def test_prompts_wait_for_each_other_and_time_passes() -> None:
    gauge = Gauge()
    assert waiting_s(gauge, 5.0) == 0.0
    gauge.queue("a", prompt(2.0, 5.0))
    gauge.queue("b", prompt(3.0, 5.0))
    assert waiting_s(gauge, 5.0) == pytest.approx(5.0)
    assert waiting_s(gauge, 6.0) == pytest.approx(4.0)
    assert waiting_s(gauge, 60.0) == pytest.approx(3.0), "what is behind has not begun"
    gauge.computed("a", 7.0)
    assert waiting_s(gauge, 7.0) == pytest.approx(3.0)
    assert waiting_s(gauge, 8.5) == pytest.approx(1.5)


def test_a_prompt_that_is_given_up_is_nobodys() -> None:
    gauge = Gauge()
    gauge.queue("a", prompt(2.0))
    gauge.drop("a")
    gauge.drop("a")
    assert waiting_s(gauge, 0.0) == 0.0
    assert gauge.computed("a", 1.0) is None
    assert prefilling_share(gauge, 1.0) == 0.0


def test_what_a_prompt_took_is_counted_from_the_one_before_it() -> None:
    gauge = Gauge()
    gauge.queue("a", prompt(1.0, 10.0, new=100))
    gauge.queue("b", prompt(1.0, 10.0, new=200, cached=50))
    gauge.queue("c", prompt(1.0, 13.0, new=300))
    assert gauge.computed("a", 11.0) is None, "another might end with it"
    first = gauge.computed("b", 12.5)
    assert first is not None
    assert (first.prompts, first.new_tokens, first.seconds) == (1, 100, pytest.approx(1.0))
    second = gauge.computed("c", 15.0)
    assert second is not None
    assert second.seconds == pytest.approx(1.5)
    assert second.pairs == pytest.approx(200 * 150.0)


def test_prompts_that_end_in_one_step_are_one_value() -> None:
    gauge = Gauge()
    for name in ("a", "b", "c"):
        gauge.queue(name, prompt(1.0, 0.0, new=100))
    assert gauge.computed("a", 2.0) is None
    assert gauge.computed("b", 2.0) is None
    both = gauge.computed("c", 5.0)
    assert both is not None
    assert (both.prompts, both.new_tokens, both.seconds) == (2, 200, pytest.approx(2.0))


def test_a_call_is_told_its_mean_company() -> None:
    gauge = Gauge()
    one = gauge.begin(1000.0, 0.0)
    other = gauge.begin(3000.0, 5.0)
    gauge.queue("p", prompt(0.5, 5.0))
    gauge.computed("p", 6.0)
    decoded = gauge.end(one, 10.0)
    assert decoded.seconds == pytest.approx(10.0)
    assert decoded.batch == pytest.approx(1.5)
    assert decoded.context_tokens == pytest.approx(2500.0)
    assert decoded.prefilling_s == pytest.approx(0.5)
    assert gauge.decoding == 1
    assert gauge.end(other, 10.0).batch == pytest.approx(2.0)
    assert (gauge.decoding, gauge.decoding_tokens) == (0, 0.0)


def test_no_time_is_no_division() -> None:
    gauge = Gauge()
    mark = gauge.begin(1000.0, 3.0)
    assert gauge.end(mark, 3.0).seconds == 0.0


def test_how_busy_it_has_been_fades() -> None:
    gauge = Gauge()
    gauge.queue("a", prompt(6.0, 0.0))
    gauge.computed("a", 6.0)
    assert prefilling_share(gauge, 6.0) == pytest.approx(6.0 / FADING_S)
    assert prefilling_share(gauge, 6.0 + FADING_S) == pytest.approx(
        6.0 / FADING_S / 2.71828, rel=1e-3
    )
    assert prefilling_share(gauge, 1e6) == pytest.approx(0.0)


def test_sums_are_exactly_nothing_when_nobody_is_left() -> None:
    gauge = Gauge()
    for number in range(10):
        gauge.plan(0.1 * number, 0.3)
    for number in range(10):
        gauge.unplan(0.1 * number, 0.3, last=number == 9)
    assert (gauge.context_tokens, gauge.left_tokens) == (0.0, 0.0)

"""Forecasts against what the made-up application of ``workflow_runs`` then does."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from coordinator.workflow.demand import DECODE, PREFILL, RESIDENT, Outlook
from coordinator.workflow.forecast import HORIZON_MOST_S, TICK_S, Forecaster
from coordinator.workflow.histogram import Histogram
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.prediction import RunKey
from coordinator.workflow.profile import Profile
from coordinator.workflow.profiles import Profiles
from coordinator.workflow.projection import Projection
from coordinator.workflow.stages import stages_of
from coordinator.workflow.units import Units
from tests.unit.workflow_runs import BLOCK_TOKENS, Application, World

LIMITS = WorkflowLimits()
RATE = 0.4


class Watched(World):
    """A world with arrivals, a forecaster that is ticked, and a record of what it said."""

    def begin(self, applications: list[Application], end_s: float) -> None:
        self.forecaster = Forecaster(self.profiles, LIMITS)
        self.said: list[tuple[float, float, float]] = []
        self.prefilled: list[tuple[float, float]] = []
        at_s = 0.0
        while at_s < end_s:
            at_s += self.rng.expovariate(RATE)
            application = self.rng.choice(applications)
            self.at(at_s, lambda application=application: self.run(application))
        for number in range(1, int(end_s / TICK_S)):
            self.at(number * TICK_S, self.tick)

    def tick(self) -> None:
        self.forecaster.tick(self.now_s)
        self.prefilled.append((self.now_s, self.profiles.demand.prefill_tokens))

    def decoded(self, from_s: float, to_s: float) -> float:
        """Output tokens of a time, each answer spread evenly over its own."""
        return sum(
            tokens * max(0.0, min(to_s, ends_s) - max(from_s, began_s)) / (ends_s - began_s)
            for began_s, ends_s, tokens in self.answers
        )


@pytest.fixture(scope="module")
def watched() -> Watched:
    world = Watched(Profiles(LIMITS, BLOCK_TOKENS), seed=1)
    world.begin([Application("one"), Application("two", again=0.2, gap_s=20.0)], 3000.0)
    world.until(2000.0)
    return world


def test_the_model_is_right_on_average_for_every_horizon(watched: Watched) -> None:
    world = Watched(Profiles(LIMITS, BLOCK_TOKENS), seed=2)
    world.begin([Application("one"), Application("two", again=0.2, gap_s=20.0)], 2600.0)
    horizons = (2.0, 10.0, 30.0, 120.0, 300.0)
    expected = {h: np.zeros(2) for h in horizons}
    moments = [1000.0 + 40.0 * number for number in range(30)]
    outlook = Outlook(world.profiles, LIMITS)
    prefilled: list[float] = []
    for moment in moments:
        world.until(moment)
        outlook.refresh(10)
        for h in horizons:
            look = outlook.look(h, moment, world.forecaster.rates())
            expected[h] += look.expected[:RESIDENT] / h
    world.until(2600.0)
    times = np.array([at for at, _ in world.prefilled])
    totals = np.array([total for _, total in world.prefilled])
    for h in horizons:
        decoded = sum(world.decoded(at, at + h) / h for at in moments)
        assert expected[h][DECODE] == pytest.approx(decoded, rel=0.12), h
        if h >= 10.0:
            prefilled = [
                float(np.interp(at + h, times, totals) - np.interp(at, times, totals)) / h
                for at in moments
            ]
            assert expected[h][PREFILL] == pytest.approx(sum(prefilled), rel=0.15), h


def test_forecasts_are_better_than_the_last_value_and_intervals_hold(watched: Watched) -> None:
    scores = {(one.quantity, one.horizon_s): one for one in watched.forecaster.scores()}
    for quantity in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        score = scores[quantity, 30.0]
        assert score.judgement.samples > 200
        assert score.ratio_to_last_value < 0.85
        assert 0.82 < score.judgement.coverage <= 0.99


def test_shares_add_up_to_the_means_and_have_names(watched: Watched) -> None:
    found = watched.forecaster.forecast(30.0, watched.now_s)
    assert {share.workflow for share in found.shares} == {"one", "two"}
    assert {share.agent for share in found.shares} >= {"planner", "explorer", "engineer"}
    for field in ("prefill_tokens_per_s", "decode_tokens_per_s", "resident_kv_tokens"):
        total = sum(getattr(share, field) for share in found.shares)
        interval = getattr(found, field)
        assert total == pytest.approx(interval.expected, rel=1e-6)
        assert 0 <= interval.low <= interval.likely <= interval.high


def test_horizons_are_brought_within_bounds(watched: Watched) -> None:
    now_s = watched.now_s
    assert watched.forecaster.forecast(0.0, now_s).horizon_s == 1.0
    assert watched.forecaster.forecast(1e9, now_s).horizon_s == HORIZON_MOST_S


def test_without_anything_alive_nothing_is_expected() -> None:
    profiles = Profiles(LIMITS, BLOCK_TOKENS)
    forecaster = Forecaster(profiles, LIMITS)
    for number in range(20):
        forecaster.tick(number * TICK_S)
    found = forecaster.forecast(30.0, 100.0)
    assert found.prefill_tokens_per_s.expected == 0
    assert found.prefill_tokens_per_s.high == 0
    assert found.shares == []


def test_a_pause_between_ticks_teaches_nothing(watched: Watched) -> None:
    profiles = Profiles(LIMITS, BLOCK_TOKENS)
    forecaster = Forecaster(profiles, LIMITS)
    for at_s in (0.0, 5.0, 10.0, 5000.0, 5005.0):
        forecaster.tick(at_s)
    assert all(one.judgement.samples <= 1 for one in forecaster.scores())


def test_a_workflow_is_not_taken_for_another_one_that_had_its_number() -> None:
    profiles = Profiles(LIMITS, BLOCK_TOKENS)
    forecaster = Forecaster(profiles, LIMITS)
    for number in range(3):
        profiles.observe_start(RunKey("", "old", str(number)), str(number), "a", 100, b"", number)
    profiles.observe_end("0", 50, 4.0)
    forecaster.tick(5.0)
    assert [one.workflow for one in forecaster.forecast(30.0, 5.0).shares] == ["old"]
    profiles.forget("", "old")
    profiles.observe_start(RunKey("", "new", "0"), "3", "b", 100, b"", 6.0)
    assert forecaster.forecast(30.0, 6.0).shares == []


def test_a_call_that_runs_is_expected_to_go_on_as_calls_of_its_agent_do() -> None:
    profile = Profile(0, "", "flow", LIMITS)
    symbol = profile.symbol("a")
    counts = profile.agent(symbol)
    for _ in range(100):
        counts.output_tokens.add(100)
        counts.duration_s.add(10.0)
        counts.prompt_tokens.add(1000)
        counts.resolve(ended_run=True, final=True)
    projection = Projection(profile)
    place = projection.agents.index(symbol)
    size = len(projection.agents)
    row = projection.row(symbol, 0)
    # Horizons of 1, 2 and 5 s are at 0, 1, 2; 30 s is at 5. Calls take 10 s at 10 tokens/s.
    for at, seconds in enumerate((1.0, 2.0, 5.0)):
        tokens = projection.ahead[at][row, size + place]
        assert tokens == pytest.approx(10 * seconds, rel=0.15)
    assert projection.ahead[5][row, size + place] == pytest.approx(100, rel=0.1)
    assert projection.held[0][row] == pytest.approx(1.0)
    assert projection.held[5][row] < 0.02


def test_stages_by_hand() -> None:
    """Half of the runs make 2 calls, half make 10: the mean is 6 calls, 3 in each of two stages.

    All pass the first call and the second; a half is left for the third on."""
    calls = Histogram(1e9)
    for number in range(1000):
        calls.add(2 if number % 2 else 10)
    first, second = stages_of(calls, 2)
    # The first stage is of calls 1 to 4: 2 + 2 * 0.5 = 3 calls, after which a half has ended.
    assert (first.calls, second.calls) == (0.0, pytest.approx(4.5, abs=0.1))
    # One call of 6 is the last of a run, odds 1 to 5; here one of 6 as well, there one of 6.
    assert first.odds == pytest.approx((0.5 / 3) / (1 - 0.5 / 3) * 5, rel=0.03)
    assert second.odds == pytest.approx(1.0, rel=0.03)
    assert first.onward == pytest.approx(0.5 / 2.5, rel=0.03)
    assert second.onward == 0.0


def test_a_loop_of_known_length_is_expected_to_end_when_others_did() -> None:
    profiles = Profiles(LIMITS, BLOCK_TOKENS)
    outlook = Outlook(profiles, LIMITS)

    def run(name: str, calls: int, from_s: float) -> None:
        """Calls of 100 tokens in 1 s each, one a second; the last one of twelve says so."""
        for number in range(calls):
            key, at_s = RunKey("", "loop", name), from_s + number
            call, last = f"{name}-{number}", number == 11
            profiles.observe_start(key, call, "a", 10, b"", at_s, final=last)
            profiles.observe_end(call, 100, at_s + 0.9)

    def left(calls: int) -> float:
        """Calls that are expected of a run that has made so many, within a minute."""
        run(f"live-{calls}", calls, 1000.0)
        outlook.refresh(10)
        now_s = 1000.0 + calls
        tokens = outlook.look(60.0, now_s, {}).expected[DECODE]
        profiles.end_run(RunKey("", "loop", f"live-{calls}"), now_s, completed=False)
        return float(tokens) / 100

    for number in range(40):
        run(f"past-{number}", 12, 12.0 * number)
    assert left(2) == pytest.approx(10, rel=0.25)
    assert left(7) == pytest.approx(5, rel=0.35)
    # The last stage is of three calls; without stages it would be eleven more.
    assert left(11) < 4


def test_rows_of_units_are_used_again() -> None:
    units = Units()
    rows = [units.take() for _ in range(3000)]
    assert rows == list(range(3000))
    for row in rows:
        units.set(row, 1, 3, 1, float(row), 5.0, 1)
    assert units.since_s[2999] == 2999
    units.give_back(7)
    assert len(units) == 2999
    assert units.workflow[7] == -1
    assert units.take() == 7


def test_a_forecast_with_ten_thousand_runs_is_quick() -> None:
    """The figure is measured by ``pythia bench predict``; this only finds a wrong order of it."""
    profiles = Profiles(LIMITS, BLOCK_TOKENS)
    forecaster = Forecaster(profiles, LIMITS)
    rng = random.Random(0)
    for number in range(10_400):
        key = RunKey("", f"flow-{number % 20}", str(number))
        agent = rng.choice("abc")
        # The first ones take a minute; the others have just begun, or have just ended.
        begins_s = number * 0.1 if number < 400 else 1000.0
        profiles.observe_start(key, str(number), agent, 100, b"", begins_s)
        if number == 399:
            for other in range(400):
                profiles.observe_end(str(other), 50, 100.0)
    for number in range(20):
        forecaster.tick(1000.0 + number * TICK_S)
    assert profiles.live_runs > 10_000
    times_s: list[float] = []
    for _ in range(30):
        began_s = time.perf_counter()
        found = forecaster.forecast(30.0, 1030.0)
        times_s.append(time.perf_counter() - began_s)
    assert found.decode_tokens_per_s.expected > 0
    assert sorted(times_s)[15] < 0.02

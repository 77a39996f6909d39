"""Figures of a replay, against values that were worked out by hand."""

from __future__ import annotations

import math
import random
from statistics import NormalDist

import pytest

from cluster.simulator.estimates import difference, estimate, student_t
from cluster.simulator.measures import figures, is_good
from cluster.simulator.outcome import POINTS_MAX, SLICES_MAX, outcome_of, picture_of, thinned
from cluster.simulator.records import (
    CallRecord,
    Gaps,
    Result,
    RunRecord,
    Sample,
    Totals,
)
from cluster.simulator.setup import Slo


def call(run: int, number: int, ttft_s: float, itl_s: float, **fields: object) -> CallRecord:
    """A served call of 11 tokens that is due at 10 s."""
    made = CallRecord(
        run=run,
        call=number,
        due_s=10.0,
        first_token_s=10.0 + ttft_s,
        ended_s=10.0 + ttft_s + 10 * itl_s,
        prompt_tokens=1000,
        output_tokens=11,
        outcome="stop",
    )
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def replay(calls: list[CallRecord], runs: list[RunRecord], **totals: object) -> Result:
    samples = [
        Sample(0.0, "a", "prefill", 1, 0, 0.9, 0),
        Sample(0.0, "b", "decode", 1, 0, 0.2, 0),
        Sample(1.0, "b", "decode", 1, 0, 0.4, 0),
        Sample(99.0, "b", "decode", 1, 0, 0.0, 0),
    ]
    everything = Totals(duration_s=100.0, gpus=4, **totals)  # type: ignore[arg-type]
    return Result("pythia", "made", 0, "simulator", calls, runs, samples, Gaps({}), everything)


def run(number: int, completion_s: float, think_s: float, finished: bool = True) -> RunRecord:
    return RunRecord(
        run=number,
        id=f"run-{number}",
        workflow="w",
        arrival_s=5.0,
        ended_s=5.0 + completion_s,
        calls=1,
        think_s=think_s,
        finished=finished,
    )


def test_latencies_are_of_what_was_served() -> None:
    calls = [
        call(0, 0, 1.0, 0.010),
        call(1, 0, 3.0, 0.030),
        call(2, 0, 500.0, 9.0, outcome="error"),
        call(3, 0, 0.0, 0.0, outcome="rejected", status=429),
        call(4, 0, 0.0, 0.0, outcome=""),
    ]
    runs = [run(0, 10.0, 4.0), run(1, 20.0, 8.0), *(run(n, 1e6, 0.0, False) for n in (2, 3, 4))]
    found = figures(replay(calls, runs), Slo(ttft_s=2.0, itl_s=0.05))
    assert found["ttft_s_mean"] == 2.0
    assert found["ttft_s_p50"] == 2.0
    assert found["ttft_s_p95"] == pytest.approx(2.9)
    assert found["itl_s_mean"] == pytest.approx(0.020)
    assert found["completion_s_mean"] == 15.0
    assert found["completion_s_p99"] == pytest.approx(19.9)
    assert found["serving_s_mean"] == 9.0  # 10 - 4 and 20 - 8
    assert found["runs_served_share"] == pytest.approx(0.4)
    assert (found["rejected_calls"], found["failed_calls"], found["unfinished_calls"]) == (1, 1, 1)


def test_goodput_counts_calls_within_both_limits() -> None:
    slo = Slo(ttft_s=2.0, itl_s=0.02)
    late, slow, good = call(0, 0, 2.1, 0.01), call(1, 0, 1.0, 0.021), call(1, 1, 2.0, 0.02)
    other = call(2, 0, 0.5, 0.01)
    assert [is_good(each, slo) for each in (late, slow, good)] == [False, False, True]
    runs = [run(0, 10.0, 0.0), run(1, 10.0, 0.0), run(2, 10.0, 0.0)]
    found = figures(replay([late, slow, good, other], runs), slo)
    assert found["goodput_calls_share"] == 0.5
    assert found["goodput_runs_share"] == pytest.approx(1 / 3)  # one call of run 1 was slow


def test_rates_leave_the_last_runs_pauses_out() -> None:
    calls = [call(0, number, 1.0, 0.01, ended_s=20.0 + number) for number in range(9)]
    calls.append(call(0, 9, 1.0, 0.01, ended_s=9000.0))
    calls[0].outcome = "error"
    calls[1].first_token_s = 19.0
    found = figures(replay(calls, []), Slo(itl_s=100.0))
    assert found["window_s"] == 28.0
    # Eight calls of 11 tokens were served in 28 s on 4 GPUs, one of them too late to be good.
    assert found["goodput_calls_per_s"] == pytest.approx(7 / 28)
    assert found["tokens_per_s_per_gpu"] == 8 * 11 / 28 / 4


def test_a_call_of_one_token_has_no_time_between_tokens() -> None:
    one = call(0, 0, 1.0, 0.0, output_tokens=1)
    assert is_good(one, Slo())
    assert "itl_s_mean" not in figures(replay([one], [run(0, 2.0, 0.0)]), Slo())


def test_hits_are_counted_where_the_prompt_was_computed() -> None:
    remote = call(0, 0, 1.0, 0.01, prefill="a", prefill_cached_tokens=600, local_cached_tokens=100)
    local = call(0, 1, 1.0, 0.01, local_cached_tokens=300)
    lost = call(1, 0, 1.0, 0.01, local_cached_tokens=999, outcome="error")
    result = replay([remote, local, lost], [], moved_bytes={"rdma": 5, "nvlink": 7})
    found = figures(result, Slo())
    assert found["prefix_hit_tokens"] == 900
    assert found["prefix_hit_share"] == 900 / 2000
    assert (found["moved_bytes_rdma"], found["moved_bytes_nvlink"]) == (5, 7)
    assert found["moved_bytes_tcp"] == 0
    probed = figures(replay([remote], [], probe_bytes={"rdma": 3, "tcp": 4}), Slo())
    assert (probed["probe_bytes"], probed["moved_bytes_rdma"]) == (7, 0)


def test_warm_ups_are_wasted_only_where_there_were_some() -> None:
    assert figures(replay([], [], warmups=4, wasted_warmups=0), Slo())["wasted_warmups"] == 0
    assert figures(replay([], [], warmups=4, wasted_warmups=3), Slo())["wasted_warmups"] == 3


def test_kv_use_is_of_workers_that_decode() -> None:
    found = figures(replay([call(0, 0, 1.0, 0.01)], []), Slo())
    assert found["decode_kv_mean"] == pytest.approx(0.3)
    assert found["decode_kv_p95"] == pytest.approx(0.39)


def test_what_can_not_be_measured_is_left_out() -> None:
    found = figures(replay([], []), Slo())
    for name in (
        "completion_s_mean",
        "ttft_s_p50",
        "gap_s_p50",
        "core_us_per_message",
        "wasted_warmups",
    ):
        assert name not in found
    assert all(math.isfinite(value) for value in found.values())
    measured = figures(replay([], [], core_s=0.01, core_messages=100), Slo())
    assert measured["core_us_per_message"] == pytest.approx(100.0)


def test_gaps_are_all_there_are() -> None:
    result = replay([], [])
    result.gaps.add(0.010, 90)
    result.gaps.add(0.200, 10)
    found = figures(result, Slo())
    assert found["gap_s_mean"] == pytest.approx(0.029)
    assert found["gap_s_p50"] == pytest.approx(0.010, rel=0.03)
    assert found["gap_s_p95"] == pytest.approx(0.200, rel=0.03)


# --- seeds ------------------------------------------------------------------------


def test_an_interval_is_students() -> None:
    # 4, 6, 8: deviation 2, error 2 / sqrt(3), and t of 2 degrees is 4.3027.
    found = estimate([4.0, 6.0, 8.0])
    assert found.mean == 6.0
    assert found.half == pytest.approx(4.3027 * 2 / math.sqrt(3))
    assert found.settled
    assert not estimate([-1.0, 2.0]).settled


def test_one_seed_says_nothing_of_chance() -> None:
    found = estimate([3.0])
    assert math.isinf(found.half)
    assert not found.settled


def test_students_t_goes_over_into_the_normal_distribution() -> None:
    # 40, 60 and 120 degrees from the usual table.
    assert student_t(40) == pytest.approx(2.0211, abs=1e-4)
    assert student_t(60) == pytest.approx(2.0003, abs=1e-4)
    assert student_t(120) == pytest.approx(1.9799, abs=1e-4)
    assert student_t(10**9) == pytest.approx(NormalDist().inv_cdf(0.975), abs=1e-5)
    assert all(student_t(n) > student_t(n + 1) for n in range(1, 60))


def test_a_difference_is_of_the_same_seeds() -> None:
    reference = {0: 10.0, 1: 100.0, 2: 1000.0}
    # Always a tenth less: the seeds differ wildly, the difference is known all the same.
    found = difference({seed: 0.9 * value for seed, value in reference.items()}, reference)
    assert found is not None
    assert found.mean == pytest.approx(-0.1)
    other = difference({1: 110.0, 7: 1.0}, reference)
    assert other is not None
    assert (other.mean, other.seeds) == (pytest.approx(0.1), 1)
    assert difference({7: 1.0}, reference) is None
    assert difference({0: 1.0}, {0: 0.0}) is None


# --- what is kept -----------------------------------------------------------------


def test_a_thinned_distribution_keeps_its_shape() -> None:
    values = [float(number) for number in range(100_000)]
    random.Random(0).shuffle(values)
    few = thinned(values)
    assert len(few) == POINTS_MAX
    assert few == sorted(few)
    assert few[POINTS_MAX // 2] == pytest.approx(50_000, rel=0.01)
    assert thinned([3.0, 1.0, 2.0]) == [1.0, 2.0, 3.0]


def test_loads_are_sums_over_the_workers_of_a_role() -> None:
    samples = [
        Sample(float(second), f"w{number}", "decode" if number else "prefill", 2, number, 0.5, 0)
        for second in range(1000)
        for number in range(4)
    ]
    result = replay([], [])
    result.samples = samples
    picture = picture_of(result)
    assert len(picture.at_s) == SLICES_MAX
    assert set(picture.roles) == {"prefill", "decode"}
    decode = picture.roles["decode"]
    assert set(decode.running) == {6.0}
    assert set(decode.waiting) == {6.0}
    assert set(decode.workers) == {3.0}
    assert set(decode.kv_used) == {0.5}


def test_a_worker_that_turns_counts_for_its_share_of_the_time() -> None:
    result = replay([], [])
    result.samples = [
        Sample(float(at), "w", "prefill" if at < 500 else "decode", 4, 0, 0.5, 0)
        for at in range(1000)
    ]
    picture = picture_of(result)
    turns = [
        (prefill, decode)
        for prefill, decode in zip(
            picture.roles["prefill"].workers, picture.roles["decode"].workers, strict=True
        )
    ]
    assert all(prefill + decode == pytest.approx(1.0) for prefill, decode in turns)
    assert turns[0] == (1.0, 0.0)
    assert turns[-1] == (0.0, 1.0)


def test_the_run_to_show_does_not_depend_on_the_configuration() -> None:
    def story(completion_s: float) -> str:
        runs = [run(number, completion_s * number, 0.0) for number in range(30)]
        for record in runs:
            record.calls = record.run
        picture = outcome_of(replay([], runs), Slo(), 1.0, pictured=True).picture
        assert picture is not None
        assert picture.run is not None
        return picture.run.id

    assert story(1.0) == story(7.0) == "run-24"

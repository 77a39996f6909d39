"""Leases, renewals and links: books about time and blocks, kept without a clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.lease import Spent
from transfer.links import Link, Links
from transfer.renewal import Renewals
from transfer.settings import (
    dispatch_margin_s,
    kv_transfer_config,
    own_statistics,
    progress_delay_us,
    transfer_environment,
)

# --- handles a decode worker has used ------------------------------------------------


def test_a_handle_is_used_once() -> None:
    spent = Spent()
    assert spent.use("engine", "r~1", 0.0)
    assert not spent.use("engine", "r~1", 1.0)
    assert spent.use("engine", "r~2", 1.0)
    assert spent.use("other", "r~1", 1.0)


def test_used_handles_are_remembered_for_a_time_and_a_number() -> None:
    spent = Spent(entries=3, keep_s=100.0)
    for index in range(4):
        assert spent.use("engine", f"r~{index}", float(index))
    assert len(spent) == 3
    assert not spent.use("engine", "r~3", 50.0)
    assert spent.use("engine", "r~3", 103.0)
    assert len(spent) == 1


# --- a reader's renewals --------------------------------------------------------------

LEASE_S = 20.0
MARGIN_S = 5.0


def renewals() -> Renewals:
    return Renewals(lease_s=LEASE_S, margin_s=MARGIN_S)


def test_without_a_renewal_a_lease_holds_until_its_end_less_the_margin() -> None:
    book = renewals()
    assert book.holds("e", "r", ends_s=30.0, now_s=24.9)
    assert not book.holds("e", "r", ends_s=30.0, now_s=25.1)


def test_renewals_in_time_carry_a_lease_on() -> None:
    book = renewals()
    for now_s in range(5, 100, 5):
        book.renewed("e", ["r"], float(now_s))
    assert book.holds("e", "r", ends_s=30.0, now_s=109.0)
    assert not book.holds("e", "r", ends_s=30.0, now_s=111.0)
    assert not book.holds("other", "r", ends_s=30.0, now_s=60.0)


def test_a_first_renewal_that_came_too_late_is_worth_nothing() -> None:
    book = renewals()
    book.renewed("e", ["r"], 26.0)
    assert not book.holds("e", "r", ends_s=30.0, now_s=27.0)


def test_a_gap_between_renewals_is_never_closed_again() -> None:
    book = renewals()
    book.renewed("e", ["r"], 10.0)
    book.renewed("e", ["r"], 26.0)
    book.renewed("e", ["r"], 27.0)
    assert not book.holds("e", "r", ends_s=15.0, now_s=28.0)


def test_requests_that_are_not_renewed_any_more_are_forgotten() -> None:
    book = renewals()
    book.renewed("e", [f"r{index}" for index in range(100)], 0.0)
    book.renewed("e", ["new"], 200.0)
    assert len(book) == 1


@given(
    st.lists(st.floats(0.0, 30.0), max_size=12),
    st.floats(0.0, 40.0),
    st.floats(0.0, 4.9),
    st.floats(0.0, 30.0),
)
def test_whatever_holds_has_never_run_out_at_the_holder(
    pauses_s: list[float], granted_s: float, way_s: float, then_s: float
) -> None:
    """The holder, played beside the book: each renewal arrives ``way_s`` after it was sent."""
    book = renewals()
    now_s, holder_end_s, over = 0.0, granted_s, False
    for pause_s in pauses_s:
        now_s += pause_s
        book.renewed("e", ["r"], now_s)
        over = over or now_s + way_s >= holder_end_s
        if not over:
            holder_end_s = max(holder_end_s, now_s + way_s + LEASE_S)
    now_s += then_s
    if book.holds("e", "r", granted_s, now_s):
        assert not over
        assert now_s < holder_end_s


# --- links --------------------------------------------------------------------------

MEBIBYTE = 1 << 20


def link(links: Links, source: str) -> Link:
    return dict(links.latest()).get(source, Link())


def test_what_was_read_is_summed_exactly() -> None:
    links = Links(4)
    for number in range(50):
        links.observe("p", 1000 + number, 0.5)
    book = link(links, "p")
    assert (book.transfers, book.bytes_total, book.elapsed_s) == (50, 51_225, 25.0)


def test_bandwidth_follows_what_is_observed_after_the_first_read() -> None:
    links = Links(4)
    links.observe("p", 100 * MEBIBYTE, 30.0)
    assert link(links, "p").bytes_per_s == 0.0
    for _ in range(20):
        links.observe("p", 100 * 10**6, 0.05)
    assert link(links, "p").bytes_per_s == pytest.approx(2e9)
    for _ in range(60):
        links.observe("p", 100 * 10**6, 0.5)
    assert link(links, "p").bytes_per_s == pytest.approx(2e8, rel=0.05)


def test_small_reads_tell_the_fixed_part_only() -> None:
    links = Links(4)
    for _ in range(3):
        links.observe("p", 1000, 0.02)
    assert link(links, "p").fixed_s == pytest.approx(0.02)
    assert link(links, "p").bytes_per_s == 0.0


def test_bytes_in_flight_are_never_negative() -> None:
    links = Links(4)
    links.started("p", 10**9)
    assert link(links, "p").in_flight_bytes == 10**9
    links.ended("p", 10**9)
    links.ended("p", 10**9)
    links.ended("unknown", 10**9)
    assert link(links, "p").in_flight_bytes == 0
    assert [source for source, _ in links.latest()] == ["p"]


def test_links_are_bounded_forgotten_and_the_latest_comes_first() -> None:
    links = Links(2)
    for source in ("a", "b", "c", "b"):
        links.observe(source, MEBIBYTE, 1.0)
    assert [source for source, _ in links.latest()] == ["b", "c"]
    links.forget("b")
    assert [source for source, _ in links.latest()] == ["c"]


# --- settings ---------------------------------------------------------------------------


def test_every_engine_may_hold_and_read() -> None:
    config = kv_transfer_config("prefill-0-1f2e", lease_s=12, nixl_progress_delay_us=100)
    assert config["kv_role"] == "kv_both"
    assert config["engine_id"] == "prefill-0-1f2e"
    assert config["kv_load_failure_policy"] == "recompute"
    assert config["kv_connector_extra_config"]["kv_lease_duration"] == 12
    assert config["kv_connector_extra_config"]["nixl_progress_delay_us"] == 100


def test_with_room_on_its_host_an_engine_has_vllm_s_offloading_behind_our_connector() -> None:
    alone = kv_transfer_config("e", lease_s=12, pins=True)
    config = kv_transfer_config("e", lease_s=12, pins=True, host_bytes=3 << 30)
    assert (config["kv_connector"], config["engine_id"]) == ("MultiConnector", "e")
    assert (config["kv_role"], config["kv_load_failure_policy"]) == ("kv_both", "recompute")
    ours, host = config["kv_connector_extra_config"]["connectors"]
    # vLLM gives the engine's id to each of them itself.
    assert ours | {"engine_id": "e"} == alone
    assert host["kv_connector"] == "OffloadingConnector"
    assert host["kv_connector_extra_config"]["cpu_bytes_to_use"] == 3 << 30


def test_of_several_connectors_statistics_ours_are_found() -> None:
    ours: dict[str, object] = {"source_engine": [], "pinned_blocks": [3]}
    assert own_statistics(ours) == ours
    assert own_statistics({"PythiaConnector": ours, "OffloadingConnector": {"data": {}}}) == ours
    assert own_statistics({"OffloadingConnector": {"data": {}}}) == {}
    assert own_statistics({}) == {}


@pytest.mark.parametrize("wrong", [{"lease_s": 5}, {"lease_s": 0}, {"nixl_progress_delay_us": -1}])
def test_settings_that_can_not_work_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        kv_transfer_config("e", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("lease_s", [6, 30, 300])
def test_a_handle_sent_on_at_the_last_moment_is_renewed_in_time(lease_s: int) -> None:
    """With the engine's own figures: a renewal every sixth, good for two thirds of a lease."""
    extension_s = lease_s * 2 // 3
    book = Renewals(lease_s=extension_s, margin_s=extension_s / 4)
    sent_on_s = lease_s - dispatch_margin_s(lease_s)
    book.renewed("e", ["r"], sent_on_s + lease_s // 6 - 0.01)
    assert book.holds("e", "r", ends_s=lease_s, now_s=lease_s)


def test_progress_is_polled_only_where_cores_are_to_spare() -> None:
    assert progress_delay_us(0) > 0
    assert progress_delay_us(-3) > 0
    assert progress_delay_us(64) == 0


def test_only_loopback_limits_the_transports() -> None:
    assert "UCX_TLS" not in transfer_environment("10.0.0.7", 5600)
    assert transfer_environment("127.0.0.1", 5600, loopback=True)["UCX_TLS"]

"""Decode worker and way chosen together: what each cost is for, one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
import pytest

from coordinator.gauge import Gauge, Prompt
from coordinator.limits import Limits, Placement, Rebalance
from coordinator.policy.joint import NO_HOST, Host, Hosts, Outlook, options
from coordinator.policy.placement import Ask, Choice, place
from coordinator.protocol import LinkLoad
from coordinator.speeds import Speeds
from tests.unit.seen import Seen

BLOCK_SIZE = 16
LIMITS = Limits(calls_per_worker=100, prefills_per_worker=2)
ASK = Ask(
    prompt_tokens=8000,
    output_tokens=1000,
    aggregated=False,
    avoid=(),
    sibling="",
    expected_tokens=100.0,
)
PROMPT_BLOCKS = 500
SPEEDS = Speeds((5e-3, 5e-5, 1e-9), (6e-3, 5e-5, 4e-8))


def worker(name: str, role: str = "decode", **terms: object) -> Seen:
    """With room for a dozen such calls."""
    made = {"tokens_max": 100_000, "usable_blocks": 10_000, "batch_slots": 256} | terms
    return Seen(name, role, **made)  # type: ignore[arg-type]


def busy(seconds: float) -> Gauge:
    """Somebody has so much to compute, from now on."""
    gauge = Gauge()
    gauge.queue("other", Prompt(seconds, 0.0, 1000, 0))
    return gauge


def decoding(calls: int, context_tokens: float = 2000.0, left_tokens: float = 500.0) -> Gauge:
    """Somebody decodes so many calls."""
    gauge = Gauge()
    for _ in range(calls):
        gauge.plan(context_tokens, left_tokens)
        gauge.begin(context_tokens, 0.0)
    return gauge


def chosen(
    *workers: Seen,
    held: Mapping[str, int] | None = None,
    ask: Ask = ASK,
    room: Callable[[str], int] = lambda name: 10**9,
    reuse: float = 0.5,
    **placement: object,
) -> Choice:
    decision = place(
        ask,
        workers,
        lambda: held or {},
        LIMITS,
        Placement(**placement),  # type: ignore[arg-type]
        BLOCK_SIZE,
        Outlook(SPEEDS, 0.0, room, reuse),
    )
    assert isinstance(decision, Choice), decision
    return decision


def way(choice: Choice) -> tuple[str, str]:
    return choice.decode, choice.prefill


def but(**changes: object) -> Ask:
    return msgspec.structs.replace(ASK, **changes)


# --- local or remote ----------------------------------------------------------------------------


def test_an_idle_worker_computes_its_own_prompts() -> None:
    assert way(chosen(worker("d", warm_sources={"p"}), worker("p", "prefill"))) == ("d", "")


def test_decodes_are_spared_by_computing_elsewhere() -> None:
    d = worker("d", warm_sources={"p"}, decodes=["c"] * 8, gauge=decoding(8))
    terms = {"prefill_workers_decode": False}
    assert way(chosen(d, worker("p", "prefill"), **terms)) == ("d", "p")
    assert way(chosen(d, worker("p", "prefill"), held={"d": 490}, **terms)) == ("d", "")


def test_what_a_prefill_worker_holds_makes_it_cheap() -> None:
    p, q = worker("p", "prefill"), worker("q", "prefill")
    d = worker("d", warm_sources={"p", "q"}, decodes=["c"] * 8, gauge=decoding(8))
    choice = chosen(d, p, q, held={"q": 400}, prefill_workers_decode=False)
    assert way(choice) == ("d", "q")
    assert choice.uncached_tokens == 8000 - 400 * BLOCK_SIZE


def test_rather_here_than_behind_a_long_queue() -> None:
    d = worker("d", warm_sources={"p"}, decodes=["c"] * 2, gauge=decoding(2))
    quick, slow = worker("p", "prefill"), worker("p", "prefill", gauge=busy(30.0))
    assert way(chosen(d, quick, prefill_workers_decode=False)) == ("d", "p")
    assert way(chosen(d, slow, prefill_workers_decode=False)) == ("d", "")


def test_a_full_prefill_worker_does_not_make_a_call_wait() -> None:
    d = worker("d", warm_sources={"p"}, decodes=["c"] * 8, gauge=decoding(8))
    full = worker("p", "prefill", prefilling=2)
    assert way(chosen(d, full, prefill_workers_decode=False)) == ("d", "")


def test_a_slow_link_is_no_way() -> None:
    p = worker("p", "prefill")
    for bytes_per_s, prefill in ((50e9, "p"), (50e6, "")):
        link = LinkLoad("p", bytes_per_s=bytes_per_s, fixed_s=1e-3)
        d = worker("d", warm_sources={"p"}, decodes=["c"] * 8, gauge=decoding(8), links={"p": link})
        assert way(chosen(d, p, prefill_workers_decode=False)) == ("d", prefill)


def test_what_is_in_flight_is_waited_for() -> None:
    p = worker("p", "prefill")
    link = LinkLoad("p", bytes_per_s=50e9, fixed_s=1e-3, in_flight_bytes=10**12)
    d = worker("d", warm_sources={"p"}, decodes=["c"] * 8, gauge=decoding(8), links={"p": link})
    assert way(chosen(d, p, prefill_workers_decode=False)) == ("d", "")


@pytest.mark.parametrize("ask", [but(aggregated=True), ASK])
def test_aggregated_calls_and_clusters_stay_together(ask: Ask) -> None:
    d = worker("d", warm_sources={"p"}, decodes=["c"] * 8, gauge=decoding(8))
    terms = {} if ask.aggregated else {"disaggregated": "never"}
    choice = chosen(d, worker("p", "prefill"), ask=ask, prefill_workers_decode=False, **terms)
    assert way(choice) == ("d", "")


def test_always_means_elsewhere_if_there_is_anybody() -> None:
    assert way(
        chosen(worker("d", warm_sources={"p"}), worker("p", "prefill"), disaggregated="always")
    ) == ("d", "p")
    assert way(chosen(worker("d"), worker("p", "prefill"), disaggregated="always")) == ("d", "")


def test_cold_pairs_and_decode_workers_are_no_way() -> None:
    d = worker("d", warm_sources={"e"}, decodes=["c"] * 8, gauge=decoding(8))
    e = worker("e", decodes=["c"] * 9, gauge=decoding(9))
    p = worker("p", "prefill", gauge=busy(60.0))
    assert chosen(d, e, p).prefill == ""


# --- who decodes --------------------------------------------------------------------------------


def test_the_prompts_cache_draws_and_a_backlog_drives_away() -> None:
    a, b = worker("a"), worker("b")
    assert chosen(a, b, held={"b": 400}).decode == "b"
    assert chosen(a, worker("b", gauge=busy(0.05)), held={"b": 400}).decode == "b"
    assert chosen(a, worker("b", gauge=busy(5.0)), held={"b": 400}).decode == "a"


def test_a_smaller_batch_with_less_context_decodes_faster() -> None:
    few = worker("b", decodes=["c"] * 2, gauge=decoding(2))
    many = worker("a", decodes=["c"] * 20, gauge=decoding(20))
    assert chosen(many, few, held={"a": 500, "b": 500}).decode == "b"
    long = worker("a", decodes=["c"] * 2, gauge=decoding(2, context_tokens=60_000.0))
    assert chosen(long, few, held={"a": 500, "b": 500}).decode == "b"


def test_long_answers_weigh_batches_more_than_caches() -> None:
    few = worker("b", decodes=["c"] * 2, gauge=decoding(2))
    many = worker("a", decodes=["c"] * 12, gauge=decoding(12, left_tokens=2000.0))
    held = {"a": 200}
    assert chosen(many, few, held=held, ask=but(expected_tokens=2000.0)).decode == "b"
    calm = worker("a", decodes=["c"] * 3, gauge=decoding(3))
    assert chosen(calm, few, held={"a": 490}, ask=but(expected_tokens=5.0)).decode == "a"


def test_prefill_workers_decode_unless_they_may_not() -> None:
    d = worker("d", decodes=["c"] * 30, gauge=decoding(30))
    p = worker("p", "prefill")
    assert chosen(d, p).decode == "p"
    assert chosen(d, p, prefill_workers_decode=False).decode == "d"
    assert chosen(d, p, disaggregated="always").decode == "d"


def test_where_roles_are_preferences_tokens_are_promised_on_prefill_workers_too() -> None:
    prefilling = Gauge()
    prefilling.queue("p", Prompt(20.0, -20.0, 1000, 0))
    prefilling.computed("p", 0.0)
    d = worker("d", decodes=["c"] * 60, gauge=decoding(60))
    p = worker("p", "prefill", gauge=prefilling)
    # It computes prompts two thirds of its time: tokens would come every 18 ms at least.
    assert chosen(d, p).decode == "p"
    assert chosen(d, p, token_gap_s=0.015).decode == "d"
    assert chosen(d, p, token_gap_s=0.03).decode == "p"
    # Rather too slow than not at all.
    assert chosen(p, token_gap_s=0.015).decode == "p"


def test_a_prefill_worker_computes_for_others_only_what_its_own_decodes_allow() -> None:
    d = worker("d", decodes=["c"] * 60, gauge=decoding(60), warm_sources={"o", "p"})
    owing = worker("p", "prefill", decodes=["c"], gauge=decoding(1))
    other = worker("o", "prefill", usable_blocks=10_000, gauge=busy(9.0))
    ask = but(prompt_tokens=16_000)

    def computing(gap_s: float) -> str:
        choice = chosen(d, owing, other, ask=ask, token_gap_s=gap_s)
        return choice.prefill or choice.decode

    assert computing(0.0) == "p"
    assert computing(0.0062) == "o"


def test_roles_that_follow_demand_imply_a_promise() -> None:
    assert Placement().gap_s == 0.0
    assert Placement(rebalance=Rebalance(mode="advisory")).gap_s == 0.0
    assert Placement(rebalance=Rebalance(mode="auto", itl_s=0.02)).gap_s == 0.02
    assert Placement(token_gap_s=0.05, rebalance=Rebalance(mode="auto")).gap_s == 0.05


def test_roles_that_follow_demand_are_kept_apart_unless_asked_for() -> None:
    auto = Rebalance(mode="auto")
    assert Placement().roles_shared
    assert Placement(rebalance=Rebalance(mode="advisory")).roles_shared
    assert not Placement(rebalance=auto).roles_shared
    assert Placement(rebalance=auto, prefill_workers_decode=True).roles_shared
    assert not Placement(prefill_workers_decode=False).roles_shared
    assert not Placement(disaggregated="always").roles_shared
    assert not Placement(policy="least_kv").roles_shared


def test_a_full_cache_is_worth_something() -> None:
    room = {"a": 0, "b": 1000}.__getitem__
    workers = worker("a"), worker("b")
    assert chosen(*workers, room=room).decode == "b"
    assert chosen(*workers, room=room, reuse=0.0).decode == "a"
    assert chosen(*workers, room=room, forgotten=0.0).decode == "a"


ROOMY = Host(10**9, 0.1)


def on_host(*workers: Seen, **hosted: int) -> Choice:
    """Of workers of which some have a part of the prompt on their hosts only."""
    decision = place(
        ASK,
        workers,
        lambda: {"f": 10},
        LIMITS,
        Placement(),
        BLOCK_SIZE,
        Outlook(SPEEDS, 0.0, lambda name: 10**9, 0.5, Hosts(hosted, lambda name: ROOMY)),
    )
    assert isinstance(decision, Choice), decision
    return decision


def test_what_a_host_has_is_loaded_and_not_computed() -> None:
    plain = on_host(worker("d"), worker("e"))
    choice = on_host(worker("d"), worker("e"), e=400)
    assert (way(plain), way(choice)) == (("d", ""), ("e", ""))
    assert choice.uncached_tokens == 8000 - 400 * BLOCK_SIZE
    # Not more than the prompt without its last token, and not what the cache has, too.
    assert on_host(worker("e"), e=900).uncached_tokens == BLOCK_SIZE
    assert on_host(worker("f"), f=4).uncached_tokens == 8000 - 10 * BLOCK_SIZE
    (option,) = options(choice.seen)[:1]  # type: ignore[arg-type]
    load_s = 400 * (1 << 20) / Placement().host_bytes_per_s
    start_s, token_s, pair_s = SPEEDS.prefill.coefficients
    new_tokens = 8000 - 6400
    own_s = start_s + new_tokens * (token_s + pair_s * (6400 + 0.5 * new_tokens))
    assert option.decode == "e"
    assert (option.cached_tokens, option.loaded_tokens) == (0, 6400)
    assert option.first_token_s == pytest.approx(load_s + own_s)


def test_loading_takes_its_time_where_blocks_are_large() -> None:
    heavy = worker("e", kv_bytes_per_block=1 << 30)
    assert way(on_host(worker("d"), heavy, e=400)) == ("d", "")
    assert way(on_host(worker("d"), heavy, e=4)) == ("d", "")


@pytest.mark.parametrize(
    ("host", "computed_blocks"),
    [
        (NO_HOST, PROMPT_BLOCKS + 7),  # nothing is kept
        (ROOMY, 0),  # all is
        (Host(0, 0.25), (PROMPT_BLOCKS + 7) / 4),  # for four times as long
        (Host(PROMPT_BLOCKS, 1.0), 7),  # as far as there is room
    ],
)
def test_what_a_cache_forgets_is_computed_again_as_far_as_the_host_forgets_it(
    host: Host, computed_blocks: float
) -> None:
    """All 507 blocks of the call push something out, the prompt's and those of 112 tokens."""
    d = worker("d")
    found = place(
        but(expected_tokens=112.0),
        [d],
        lambda: {},
        LIMITS,
        Placement(),
        BLOCK_SIZE,
        Outlook(SPEEDS, 0.0, lambda name: 0, 1.0, Hosts({}, lambda name: host)),
    )
    assert isinstance(found, Choice)
    assert found.seen is not None
    (option,) = options(found.seen)
    _, token_s, pair_s = SPEEDS.prefill.coefficients
    block_s = (token_s + pair_s * 0.5 * 8000) * BLOCK_SIZE
    load_s = d.kv_bytes_per_block / Placement().host_bytes_per_s
    again_s = computed_blocks * block_s + (PROMPT_BLOCKS + 7 - computed_blocks) * load_s
    assert option.forgotten_s == pytest.approx(Placement().forgotten * again_s)


def test_a_prefill_worker_loads_what_its_host_has() -> None:
    d = worker("d", warm_sources={"p"}, decodes=["c"] * 8, gauge=decoding(8))
    choice = place(
        ASK,
        [d, worker("p", "prefill")],
        lambda: {},
        LIMITS,
        Placement(prefill_workers_decode=False),
        BLOCK_SIZE,
        Outlook(SPEEDS, 0.0, lambda name: 10**9, 0.5, Hosts({"p": 300}, lambda name: ROOMY)),
    )
    assert isinstance(choice, Choice)
    assert way(choice) == ("d", "p")
    assert choice.uncached_tokens == 8000 - 300 * BLOCK_SIZE


def test_work_is_dear_while_prompts_wait() -> None:
    def queueing() -> Gauge:
        gauge = Gauge()
        for number in range(30):
            gauge.queue(number, Prompt(0.9, -30.0, 1000, 0))
            gauge.computed(number, -29.0 + number)
        gauge.queue("other", Prompt(4.0, 0.0, 1000, 0))
        return gauge

    # Whoever holds half of the prompt has a little more to do than who holds nothing of it.
    a, b = worker("a", gauge=queueing()), worker("b", gauge=queueing())
    b.gauge.queue("more", Prompt(0.35, 0.0, 1000, 0))
    assert chosen(a, b, held={"b": 250}, work_price=0.0).decode == "a"
    assert chosen(a, b, held={"b": 250}).decode == "b"


def test_kv_beyond_what_there_is_would_be_preempted() -> None:
    tight = worker("a", usable_blocks=1300, gauge=decoding(1, context_tokens=19_000.0))
    wide = worker("b", gauge=decoding(1, context_tokens=22_000.0))
    assert chosen(tight, wide, reserve=False).decode == "b"


# --- ties ---------------------------------------------------------------------------------------


def test_ties_go_to_the_smallest_name() -> None:
    workers = [worker(name) for name in ("c", "a", "b")]
    assert {chosen(*workers, ask=but(turn=turn)).decode for turn in range(9)} == {"a"}


def test_siblings_stay_together_and_who_failed_is_avoided() -> None:
    workers = worker("a"), worker("b", gauge=busy(9.0))
    assert chosen(*workers, ask=but(sibling="b")).decode == "b"
    assert chosen(*workers, ask=but(avoid={("a", "1")})).decode == "b"


# --- from a peer's cache ------------------------------------------------------------------------


def crowd(name: str, **terms: object) -> Seen:
    """Somebody who decodes so many calls that nobody joins them."""
    return worker(name, decodes=["c"] * 60, gauge=decoding(60), **terms)


def test_what_a_busy_peer_has_cached_is_pulled() -> None:
    free = worker("b", warm_sources={"a"})
    choice = chosen(crowd("a"), free, held={"a": 400, "b": 10})
    assert way(choice) == ("b", "")
    assert (choice.pull, choice.pull_tokens) == ("a", 400 * BLOCK_SIZE)
    assert (choice.cached_blocks, choice.pulled_blocks) == (10, 390)
    assert choice.uncached_tokens == 8000 - 400 * BLOCK_SIZE
    assert "6400 tokens from a" in choice.reason


def test_never_more_than_all_but_the_last_token_is_pulled() -> None:
    choice = chosen(crowd("a"), worker("b", warm_sources={"a"}), held={"a": PROMPT_BLOCKS})
    assert choice.pull_tokens == (PROMPT_BLOCKS - 1) * BLOCK_SIZE


@pytest.mark.parametrize(
    ("ask", "terms"),
    [
        (ASK, {"pulls": False}),
        (ASK, {"disaggregated": "never"}),
        (but(aggregated=True), {}),
        (but(avoid={("a", "1")}), {}),
    ],
)
def test_nothing_is_pulled_where_it_may_not_be(ask: Ask, terms: dict[str, object]) -> None:
    free = worker("b", warm_sources={"a"})
    choice = chosen(crowd("a"), free, held={"a": 400}, ask=ask, **terms)
    assert (choice.decode, choice.pull) == ("b", "")
    assert choice.uncached_tokens == 8000


def test_nothing_is_pulled_over_a_pair_that_has_not_met() -> None:
    assert chosen(crowd("a"), worker("b"), held={"a": 400}).pull == ""


def test_a_slow_link_or_a_peer_that_is_long_busy_is_no_way_either() -> None:
    slow = LinkLoad("a", bytes_per_s=50e6, fixed_s=1e-3)
    for link, peer, pull in (
        (None, crowd("a"), "a"),
        (slow, crowd("a"), ""),
        (None, worker("a", decodes=["c"] * 60, gauge=busy(1.0)), ""),
        (None, worker("a", gauge=busy(60.0)), ""),
    ):
        free = worker("b", warm_sources={"a"}, links={"a": link} if link else {})
        assert chosen(peer, free, held={"a": 400}).pull == pull


@pytest.mark.parametrize(
    ("terms", "pull"),
    [
        ({"up": False}, ""),
        ({"partial_reads": False}, ""),
        ({"readable_from_s": 1e-3}, ""),
        ({"readable_from_s": 0.0}, "a"),
    ],
)
def test_a_peer_that_can_not_answer_now_is_not_asked(terms: dict[str, object], pull: str) -> None:
    free = worker("b", warm_sources={"a"})
    assert chosen(crowd("a", **terms), free, held={"a": 400}).pull == pull


def test_of_peers_with_as_much_the_one_with_less_to_do_is_asked() -> None:
    free = worker("d", warm_sources={"a", "b", "c"})
    waits = worker("a", decodes=["c"] * 60, gauge=decoding(60))
    waits.gauge.queue("other", Prompt(0.2, 0.0, 1000, 0))
    held = {"a": 400, "b": 400, "c": 200}
    assert chosen(waits, crowd("b"), crowd("c"), free, held=held).pull == "b"


@pytest.mark.parametrize(
    "workers",
    [
        (crowd("a"), worker("b", warm_sources={"a"})),
        (crowd("a"), worker("b", warm_sources={"a", "p"}), worker("p", "prefill")),
        (
            crowd("a", warm_sources={"p"}),
            worker("b", warm_sources={"p"}),
            worker("p", "prefill", warm_sources={"a"}),
        ),
    ],
)
def test_what_is_told_of_a_pull_is_what_was_reckoned(workers: tuple[Seen, ...]) -> None:
    choice = chosen(*workers, held={"a": 400, "b": 10})
    assert choice.seen is not None
    told = {(one.decode, one.prefill, one.pull): one.total_s for one in options(choice.seen)}
    seconds = float(choice.reason.split(" s")[0].split()[-1])
    assert told[choice.decode, choice.prefill, choice.pull] == pytest.approx(seconds, abs=0.002)
    assert any(pull == "a" for _, _, pull in told)


def test_what_is_told_later_is_what_was_then() -> None:
    d = crowd("d", usable_blocks=5000, kv_blocks_shared=9000)
    choice = chosen(d)
    assert choice.seen is not None
    (told,) = options(choice.seen)
    d.kv_blocks_shared = 0
    assert options(choice.seen) == [told]
    # It would have been too much.
    assert options(chosen(d).seen)[0].forgotten_s > told.forgotten_s  # type: ignore[arg-type]


def test_what_anybody_has_of_a_prompt_is_told() -> None:
    choice = chosen(crowd("a"), worker("b"), held={"a": 400, "b": 10})
    assert (choice.decode, choice.pull, choice.held_blocks) == ("b", "", 400)
    d, p = worker("d", warm_sources={"p"}), worker("p", "prefill")
    remote = chosen(d, p, worker("e", up=False), held={"e": 7}, disaggregated="always")
    assert (remote.prefill, remote.held_blocks) == ("p", 7)
    assert on_host(crowd("e"), worker("d"), e=300).held_blocks == 300
    assert chosen(d).held_blocks == 0


def test_a_few_blocks_are_computed_rather_than_pulled() -> None:
    free = worker("b", warm_sources={"a"})
    assert chosen(crowd("a"), free, held={"a": 400, "b": 399}).pull == ""


def test_a_prefill_worker_pulls_what_it_lacks() -> None:
    d = crowd("d", warm_sources={"p"})
    p = worker("p", "prefill", warm_sources={"d"})
    choice = chosen(d, p, held={"d": 400}, disaggregated="always")
    assert way(choice) == ("d", "p")
    assert (choice.pull, choice.pull_tokens, choice.pulled_blocks) == ("d", 6400, 400)
    assert choice.cached_blocks == 400
    assert choice.uncached_tokens == 8000 - 6400
    assert chosen(d, p, held={"d": 400}, disaggregated="always", pulls=False).pull == ""

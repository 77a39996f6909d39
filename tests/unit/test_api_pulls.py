"""A call whose prompt begins in a peer's cache, in an API process: whatever the peer does, it goes
on at once, and no handle is read twice or kept."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.stats import PrefillStats

from coordinator.api.pulling import pull_request, tokens_held
from coordinator.limits import Limits
from coordinator.protocol import (
    Abort,
    CallFailed,
    Check,
    Checked,
    Decode,
    Discard,
    Failed,
    Finished,
    Message,
    Placed,
    Plan,
    Prefill,
    PrefillDone,
    Prefilled,
    Pulled,
    Started,
)
from tests.unit.calls_bench import UNIX_S, Bench
from tests.unit.recording_wire import (
    DECODER,
    OTHER_DECODER,
    PREFILLER,
    engine_request,
    output,
    prefill_done,
)

PROMPT = tuple(range(1, 12))
PULL = Plan("r", 1, DECODER, None, pull_worker=OTHER_DECODER, pull_tokens=8)
REMOTE = msgspec.structs.replace(PULL, prefill=PREFILLER)
LIMITS = Limits(pull_s=3.0)


@pytest.fixture
def bench() -> Bench:
    made = Bench(LIMITS)
    made.submit(prompt=PROMPT)
    made.forget()
    return made


def held(cached: int = 8, handle: bytes = b"held", **terms: float) -> PrefillDone:
    done = prefill_done(attempt=-1, worker=OTHER_DECODER, handle=handle, **terms)  # type: ignore[arg-type]
    return msgspec.structs.replace(done, prompt_tokens=9, cached_tokens=cached)


def sent(bench: Bench) -> list[tuple[Placed, Message]]:
    return [(to, message) for to, message, _ in bench.wire.take_workers()]


def answer(bench: Bench, done: PrefillDone, worker: Placed = OTHER_DECODER) -> None:
    bench.calls.on_prefill_done(done, None, worker, bench.now_s, UNIX_S)


def asked(bench: Bench, plan: Plan = PULL) -> None:
    bench.calls.on_plan(plan, bench.now_s)
    bench.forget()


DECODED = (DECODER, Decode("r", 1, DECODER.incarnation, b"held"))
COMPUTED = (DECODER, Decode("r", 1, DECODER.incarnation))
GIVEN_BACK = (OTHER_DECODER, Discard("r", -1, OTHER_DECODER.incarnation, b"held"))


def test_what_the_peer_holds_goes_to_the_decode_worker(bench: Bench) -> None:
    bench.calls.on_plan(PULL, bench.now_s)
    ((to, message, frames),) = bench.wire.take_workers()
    assert (to, message) == (
        OTHER_DECODER,
        Prefill("r", -1, OTHER_DECODER.incarnation, cached_only=True),
    )
    assert frames[0].prompt_token_ids == list(PROMPT[:9])
    bench.calls.on_check(Check("r", 1))
    assert bench.wire.take_core() == [Checked("api", "r", 1, "pulling")]
    answer(bench, held())
    assert sent(bench) == [DECODED]
    assert bench.wire.take_core() == [Pulled("api", "r", 1, 8, False)]
    stats = PrefillStats(num_cached_tokens=8, num_external_cached_tokens=8)
    bench.tokens([7] * 10, finish=FinishReason.LENGTH, stats=stats)
    started, finished = bench.wire.take_core()
    assert started == Started("api", "r", 1)
    assert isinstance(finished, Finished)
    assert (finished.pulled_tokens, finished.moved_tokens) == (8, 8)
    assert finished.prefill_cached_tokens == 8


def test_what_the_peer_holds_goes_to_the_prefill_worker(bench: Bench) -> None:
    asked(bench, REMOTE)
    answer(bench, held())
    assert sent(bench) == [(PREFILLER, Prefill("r", 1, PREFILLER.incarnation, True, b"held"))]
    assert bench.wire.take_core() == [Pulled("api", "r", 1, 8, False)]
    done = msgspec.structs.replace(prefill_done(), moved_tokens=8, cached_tokens=8)
    bench.calls.on_prefill_done(done, output("r", 1, [5]), PREFILLER, bench.now_s, UNIX_S)
    assert sent(bench) == [(DECODER, Decode("r", 1, DECODER.incarnation, b"r/1"))]
    assert bench.wire.take_core() == [Prefilled("api", "r", 1)]
    bench.tokens(
        [7] * 9, finish=FinishReason.LENGTH, stats=PrefillStats(num_external_cached_tokens=11)
    )
    finished = bench.wire.take_core()[-1]
    assert isinstance(finished, Finished)
    assert (finished.pulled_tokens, finished.moved_tokens) == (8, 11)


def test_a_late_peer_is_not_waited_for_and_gets_its_handle_back(bench: Bench) -> None:
    asked(bench)
    bench.now_s += 2.9
    bench.calls.tick(bench.now_s)
    assert sent(bench) == []
    bench.now_s += 0.2
    bench.calls.tick(bench.now_s)
    assert sent(bench) == [(OTHER_DECODER, Abort([("r", -1)])), COMPUTED]
    assert bench.wire.take_core() == [Pulled("api", "r", 1, late=True)]
    answer(bench, held())
    assert sent(bench) == [GIVEN_BACK]
    answer(bench, held())
    assert sent(bench) == []


def test_a_lost_peer_costs_nothing(bench: Bench) -> None:
    asked(bench)
    bench.lose(OTHER_DECODER)
    assert sent(bench) == [COMPUTED]
    assert bench.wire.take_core() == [Pulled("api", "r", 1, late=True)]


def test_a_peer_that_can_not_costs_nothing(bench: Bench) -> None:
    asked(bench)
    failed = CallFailed("r", -1, OTHER_DECODER.incarnation, "no", retryable=False)
    bench.calls.on_call_failed(failed, OTHER_DECODER, bench.now_s)
    assert sent(bench) == [COMPUTED]
    assert bench.wire.take_core() == [Pulled("api", "r", 1, late=True)]
    bench.calls.on_call_failed(failed, OTHER_DECODER, bench.now_s)
    assert sent(bench) == []
    assert bench.calls.stale == 1


def test_a_peer_that_can_not_be_reached_costs_nothing(bench: Bench) -> None:
    bench.wire.reachable = lambda worker: worker != OTHER_DECODER
    bench.calls.on_plan(PULL, bench.now_s)
    assert [each for each in sent(bench) if each[0] == DECODER] == [COMPUTED]
    assert bench.wire.take_core() == [Pulled("api", "r", 1)]


def test_a_peer_that_has_lost_it_says_so(bench: Bench) -> None:
    asked(bench)
    answer(bench, held(cached=0))
    assert sent(bench) == [GIVEN_BACK, COMPUTED]
    assert bench.wire.take_core() == [Pulled("api", "r", 1, 0, True)]


def test_less_is_read_too(bench: Bench) -> None:
    asked(bench)
    answer(bench, held(cached=4))
    assert sent(bench) == [DECODED]
    assert bench.wire.take_core() == [Pulled("api", "r", 1, 4, True)]


def test_a_handle_whose_lease_may_end_is_not_sent_on(bench: Bench) -> None:
    asked(bench)
    bench.now_s += 2.0
    done = held(lease_s=4.0, held_at_unix_s=UNIX_S - 2.0)
    answer(bench, done)
    assert sent(bench) == [GIVEN_BACK, COMPUTED]
    assert bench.wire.take_core() == [Pulled("api", "r", 1, late=True)]


@pytest.mark.parametrize("plan", [PULL, REMOTE], ids=["decode", "prefill"])
def test_a_refused_handle_is_done_without_at_once(bench: Bench, plan: Plan) -> None:
    asked(bench, plan)
    answer(bench, held())
    bench.forget()
    worker = PREFILLER if plan.prefill else DECODER
    refused = CallFailed("r", 1, worker.incarnation, "handle refused", handle_refused=True)
    bench.calls.on_call_failed(refused, worker, bench.now_s)
    again = (PREFILLER, Prefill("r", 1, PREFILLER.incarnation, True)) if plan.prefill else COMPUTED
    assert sent(bench) == [GIVEN_BACK, again]
    assert bench.wire.take_core() == []
    # A second time it is the worker's own doing.
    bench.calls.on_call_failed(refused, worker, bench.now_s)
    assert isinstance(bench.wire.take_core()[0], Failed)


def test_a_refused_prefill_is_not_taken_for_the_pull(bench: Bench) -> None:
    asked(bench, REMOTE)
    answer(bench, held())
    bench.prefilled()
    bench.forget()
    refused = CallFailed("r", 1, DECODER.incarnation, "handle refused", handle_refused=True)
    bench.calls.on_call_failed(refused, DECODER, bench.now_s)
    assert [type(message) for message in bench.wire.take_core()] == [Failed]


def test_whoever_decodes_is_lost_meanwhile(bench: Bench) -> None:
    asked(bench)
    bench.lose(DECODER)
    assert sent(bench) == [(OTHER_DECODER, Abort([("r", -1)]))]
    assert [type(message) for message in bench.wire.take_core()] == [Failed]
    answer(bench, held())
    assert sent(bench) == [GIVEN_BACK]


def test_the_client_goes_away_meanwhile(bench: Bench) -> None:
    asked(bench)
    bench.calls.end(["r"], "abort", bench.now_s)
    assert sent(bench) == [(OTHER_DECODER, Abort([("r", -1)]))]
    answer(bench, held())
    assert sent(bench) == [GIVEN_BACK]


def test_a_former_attempts_handle_is_given_back(bench: Bench) -> None:
    asked(bench)
    again = Plan("r", 2, OTHER_DECODER, None)
    bench.calls.on_plan(again, bench.now_s)
    bench.forget()
    answer(bench, held())
    assert sent(bench) == [GIVEN_BACK]


def test_the_decode_worker_can_not_be_reached_with_the_handle(bench: Bench) -> None:
    asked(bench)
    bench.wire.reachable = lambda worker: worker != DECODER
    answer(bench, held())
    assert sent(bench)[-1] == GIVEN_BACK
    assert [type(message) for message in bench.wire.take_core()] == [Failed]


# --- what is asked for --------------------------------------------------------------------


def feature(offset: int, length: int) -> SimpleNamespace:
    return SimpleNamespace(mm_position=SimpleNamespace(offset=offset, length=length))


def test_a_pull_asks_for_whole_blocks_and_a_token() -> None:
    request = engine_request(prompt=PROMPT)
    request.cache_salt = "tenant"
    pull = pull_request(request, 8, 4)
    assert pull is not None
    assert (pull.prompt_token_ids, pull.cache_salt) == (list(PROMPT[:9]), "tenant")
    assert pull_request(request, 100, 4) == pull_request(request, 8, 4)
    assert pull_request(request, 3, 4) is None
    assert pull_request(request, 8, 0) is None
    assert request.prompt_token_ids == list(PROMPT)


@pytest.mark.parametrize(
    ("place", "tokens", "images"),
    [
        ((1, 3), 8, 1),
        ((1, 6), 8, 1),
        ((6, 4), 4, 0),
        ((8, 2), 4, 0),
        ((10, 1), 8, 0),
        ((0, 9), 8, 1),
    ],
)
def test_images_are_taken_whole_or_not_at_all(
    place: tuple[int, int], tokens: int, images: int
) -> None:
    request = engine_request(prompt=PROMPT)
    request.mm_features = [feature(*place)]
    pull = pull_request(request, 8, 4)
    assert pull is not None
    assert len(pull.prompt_token_ids or ()) == tokens + 1
    assert len(pull.mm_features or ()) == images


def test_an_image_before_the_one_that_is_cut_stays_whole_too() -> None:
    request = engine_request(prompt=PROMPT)
    request.mm_features = [feature(2, 4), feature(7, 4)]
    assert pull_request(request, 8, 4) is None


def test_whole_blocks_are_held_and_only_with_a_handle() -> None:
    assert tokens_held(held(), 4) == 8
    assert tokens_held(held(cached=7), 4) == 4
    assert tokens_held(held(cached=100), 4) == 8
    assert tokens_held(held(handle=b""), 4) == 0

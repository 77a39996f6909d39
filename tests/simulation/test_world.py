"""A simulated cluster: what it takes, what it records, that it is the same every time."""

from __future__ import annotations

import msgspec
import pytest

from cluster.simulator.network import peer_address
from cluster.simulator.oracle import OracleError
from cluster.simulator.records import CallRecord, Result
from cluster.simulator.setup import EngineOptions, NetworkSetup
from cluster.simulator.world import World, simulate
from cluster.workload.form import Run, Workload
from cluster.workload.source import open_workload
from coordinator.core import Core
from coordinator.limits import Limits, Placement
from coordinator.protocol import Placed, Submit
from tests.simulation.cluster import BLOCK, cluster, run, workload
from tests.simulation.cluster import call as make_call

NETWORK = NetworkSetup(message_s=1e-3, api_s=5e-3, transfer_fixed_s=3e-3)
STEP_S = 1e-3
OPTIONS = EngineOptions(kv_blocks=4096, max_model_len=16384, step_overhead_s=STEP_S)


def only(result: Result) -> CallRecord:
    """The only call of a result."""
    (record,) = result.calls
    return record


def generated_workload(seed: int = 1) -> Workload:
    return open_workload(f"generator:review?runs=6&seed={seed}&rate=1&scale=16&pace=16")


# --- times ---------------------------------------------------------------------------------


def test_a_call_alone_takes_what_its_parts_take() -> None:
    """Prefill here, first token at once, KV over the link, decode there."""
    setup = cluster("prefill", "decode", options=OPTIONS, network=NETWORK)
    result = simulate(setup, workload(run(0, make_call(0, 1000, 5))))
    record, cost, message_s = only(result), setup.cost(), NETWORK.message_s
    assert (record.prefill, record.decode, record.outcome) == ("w0", "w1", "stop")
    assert record.planned_s == pytest.approx(NETWORK.api_s + 2 * message_s)
    prefill_s = cost.step_s(((1000, 0),)) + STEP_S
    first_s = NETWORK.api_s + 4 * message_s + prefill_s
    assert record.first_token_s == pytest.approx(first_s, abs=1e-9)
    link = setup.hardware.links["rdma"]
    size = 1000 * cost.kv_bytes_per_token
    read_s = link.latency_s + NETWORK.transfer_fixed_s + size / link.bytes_per_s
    steps_s = cost.step_s(((1, 1000),)) + STEP_S
    steps_s += sum(cost.step_s((), 1, 1001 + step) + STEP_S for step in range(3))
    ended_s = first_s + message_s + read_s + steps_s + message_s
    assert record.ended_s == pytest.approx(ended_s, abs=1e-6)
    assert (record.prompt_tokens, record.output_tokens) == (1000, 5)
    assert (record.moved_tokens, record.local_cached_tokens) == (1000, 0)
    assert record.computed_tokens == 1001, "the first token's own KV is computed where it goes on"
    assert result.totals.moved_bytes == {"rdma": round(size)}
    assert result.gaps.count == 4, "one from each token to the next"
    assert result.gaps.sum_s == pytest.approx(ended_s - first_s, abs=2e-3)


def test_a_short_prompt_stays_where_it_is_decoded() -> None:
    setup = cluster("prefill", "decode", options=OPTIONS, network=NETWORK)
    result = simulate(setup, workload(run(0, make_call(0, BLOCK - 1, 3))))
    record, cost = only(result), setup.cost()
    assert (record.prefill, record.decode) == ("", "w1")
    first_s = NETWORK.api_s + 4 * NETWORK.message_s + cost.step_s(((BLOCK - 1, 0),)) + STEP_S
    assert record.first_token_s == pytest.approx(first_s, abs=1e-9)
    assert result.totals.moved_bytes.get("rdma", 0) == 0
    assert record.computed_tokens == BLOCK - 1


def test_a_call_for_one_token_ends_where_its_prompt_is_computed() -> None:
    """Nobody reads its KV, and nothing waits for the end of its lease."""
    result = simulate(cluster("prefill", "decode"), workload(run(0, make_call(0, 1000, 1))))
    record = only(result)
    assert (record.outcome, record.output_tokens, record.prefill) == ("stop", 1, "w0")
    assert record.ended_s == record.first_token_s
    assert result.totals.moved_bytes.get("rdma", 0) == 0


def test_a_call_is_sent_its_think_time_after_its_parents_ended() -> None:
    calls = (
        make_call(0, 64, 4),
        make_call(1, 640, 40, parents=(0,), think_s=2.0),
        make_call(2, 64, 4, first_block=50, parents=(0,), think_s=1.0),
        make_call(3, 64, 4, parents=(1, 2), think_s=0.5),
    )
    result = simulate(cluster("mixed"), workload(run(0, *calls, arrival_s=3.0)))
    by_call = {record.call: record for record in result.calls}
    assert by_call[0].due_s == pytest.approx(3.0)
    assert by_call[1].due_s == pytest.approx(by_call[0].ended_s + 2.0)
    assert by_call[3].due_s == pytest.approx(by_call[1].ended_s + 0.5)
    (row,) = result.runs
    assert (row.finished, row.calls, row.think_s) == (True, 4, 2.5)
    assert row.ended_s == by_call[3].ended_s
    assert result.totals.duration_s == row.ended_s


def test_in_a_closed_loop_a_run_counts_from_the_end_of_the_one_before() -> None:
    setup = cluster("mixed")
    one = make_call(0, 4 * BLOCK, 8)
    runs = [run(number, one, arrival_s=100.0 * number) for number in range(3)]
    runs[1] = run(1, make_call(0, 4 * BLOCK, 8, think_s=2.0))
    closed = msgspec.structs.replace(workload(*runs), concurrency=1)
    first, second, third = simulate(setup, closed).runs
    assert first.arrival_s == 0.0
    assert second.arrival_s == pytest.approx(first.ended_s)
    assert third.arrival_s == pytest.approx(second.ended_s)
    # Its client's pause before the first call is the run's own, as everywhere.
    assert second.completion_s == pytest.approx(2.0 + third.completion_s, rel=0.01)
    alone = msgspec.structs.replace(workload(*runs), concurrency=0)
    assert [each.arrival_s for each in simulate(setup, alone).runs] == [0.0, 0.0, 200.0]


def test_what_a_run_had_before_is_found_again_or_counted_as_recomputed() -> None:
    calls = (make_call(0, 3200, 2), make_call(1, 3264, 2, parents=(0,)))
    mixed = simulate(cluster("mixed"), workload(run(0, *calls)))
    assert mixed.calls[1].prefill_cached_tokens == 3200
    assert mixed.calls[1].computed_tokens == 64
    assert mixed.totals.recomputed_tokens == 0
    options = EngineOptions(kv_blocks=256, max_model_len=4000)
    others = run(1, make_call(0, 3200, 2, first_block=9000), arrival_s=0.5)
    calls = (calls[0], make_call(1, 3264, 2, parents=(0,), think_s=2.0))
    small = simulate(cluster("mixed", options=options), workload(run(0, *calls), others))
    assert small.totals.recomputed_tokens > 1500, "the other prompt has taken its blocks"


# --- the same every time -----------------------------------------------------------------------


def test_equal_seeds_give_equal_results() -> None:
    network = NetworkSetup(message_jitter_s=1e-3)
    setup = cluster("prefill", "decode", "mixed", network=network)
    first, second = (simulate(setup, generated_workload(), seed=7) for _ in range(2))
    assert first == second
    assert len(first.calls) > 100
    measured = simulate(setup, generated_workload(), seed=7, measured=True)
    assert measured.totals.core_messages > 1000
    assert measured.totals.core_s > 0.0
    measured.totals.core_messages, measured.totals.core_s = 0, 0.0
    assert measured == first
    assert simulate(setup, generated_workload(), seed=8).calls != first.calls


def test_a_result_can_be_written_and_read() -> None:
    result = simulate(cluster("prefill", "decode"), generated_workload())
    assert msgspec.json.decode(msgspec.json.encode(result), type=Result) == result


def test_progress_is_told_and_comes_to_its_end() -> None:
    told: list[tuple[int, int, float]] = []
    result = simulate(
        cluster("mixed"), generated_workload(), progress=lambda *each: told.append(each)
    )
    assert [done for done, _, _ in told] == sorted({done for done, _, _ in told})
    assert told[-1][:2] == (len(result.calls), len(result.calls))
    assert told[-1][2] == pytest.approx(result.totals.duration_s)


# --- accounts ------------------------------------------------------------------------------------


def test_bytes_on_the_links_are_those_of_the_tokens_moved() -> None:
    setup = cluster("prefill", "decode", "prefill", "decode", nodes=False)
    result = simulate(setup, generated_workload())
    moved_tokens = sum(record.moved_tokens for record in result.calls)
    assert moved_tokens > 0
    assert result.totals.moved_bytes == {
        "nvlink": round(moved_tokens * setup.cost().kv_bytes_per_token)
    }
    counters = result.totals.counters
    assert counters["reads_failed"] == 0
    assert counters["calls_finished"] == len(result.calls)
    for record in result.calls:
        known = record.local_cached_tokens + record.moved_tokens
        assert known <= record.prompt_tokens
        assert record.computed_tokens >= 1
        assert record.due_s < record.planned_s < record.first_token_s <= record.ended_s


def test_what_probes_move_is_not_the_calls() -> None:
    setup = cluster("prefill", "decode")
    world = World(setup, generated_workload())
    world.start()
    world.warm_up()
    assert not world.links.moved_bytes
    assert sum(world.links.probe_bytes.values()) > 0
    world.run()
    totals = world.result("x").totals
    assert sum(totals.moved_bytes.values()) > 0
    # All pairs were tried before the replay began.
    assert not any(totals.probe_bytes.values())
    cold = World(setup, generated_workload())
    cold.start()
    cold.run()
    assert sum(cold.result("x").totals.probe_bytes.values()) > 0


def test_samples_are_bounded_however_long_it_takes() -> None:
    pause_s = 30_000.0
    calls = (make_call(0, 64, 2), make_call(1, 64, 2, parents=(0,), think_s=pause_s))
    limits = Limits(beat_s=100.0)
    result = simulate(cluster("mixed", limits=limits), workload(run(0, *calls)))
    assert 5_000 < len(result.samples) <= 20_001
    times_s = [sample.at_s for sample in result.samples]
    assert times_s == sorted(times_s)
    assert times_s[-1] > 0.99 * pause_s


def test_the_limit_of_time_leaves_calls_unfinished() -> None:
    calls = (make_call(0, 64, 2), make_call(1, 64, 2, parents=(0,), think_s=20.0))
    other = run(1, make_call(0, 64, 5000), arrival_s=9.5)
    result = simulate(cluster("mixed"), workload(run(0, *calls), other), limit_s=10.0)
    assert [(record.run, record.outcome) for record in result.calls] == [(0, "stop"), (1, "")]
    assert [row.finished for row in result.runs] == [False, False]


# --- refusals ------------------------------------------------------------------------------------


def test_a_refused_call_is_sent_again_when_the_server_says() -> None:
    limits = Limits(queue_calls=1, calls_per_worker=1)
    runs = [run(number, make_call(0, 64, 50)) for number in range(4)]
    result = simulate(cluster("mixed", limits=limits), workload(*runs))
    assert [record.outcome for record in result.calls] == ["stop"] * 4
    assert result.totals.counters["calls_rejected"] >= 2
    late = max(result.calls, key=lambda record: record.planned_s)
    assert late.planned_s - late.due_s >= 0.5
    assert late.ttft_s > late.planned_s - late.due_s, "the client has waited since it was due"


def test_a_client_gives_its_run_up_after_some_refusals() -> None:
    limits = Limits(queue_calls=1, calls_per_worker=1, queue_s=1500.0)
    options = EngineOptions(kv_blocks=4096, max_model_len=16384, step_overhead_s=0.05)
    runs = [run(0, make_call(0, 64, 15_000)), run(1, make_call(0, 64, 15_000))]
    runs.append(run(2, make_call(0, 64, 5), make_call(1, 64, 5, parents=(0,)), arrival_s=1.0))
    result = simulate(cluster("mixed", limits=limits, options=options), workload(*runs))
    refused = next(record for record in result.calls if record.run == 2)
    assert (refused.outcome, refused.status) == ("rejected", 429)
    assert sum(record.run == 2 for record in result.calls) == 1, "its second call never came"
    assert [row.finished for row in result.runs] == [True, True, False]
    assert result.totals.counters["calls_rejected"] == 4


def test_a_prompt_beyond_the_models_context_is_refused_before_anybody_is_asked() -> None:
    result = simulate(cluster("mixed"), workload(run(0, make_call(0, 16_384, 5))))
    record = only(result)
    assert (record.outcome, record.status) == ("rejected", 400)
    assert result.totals.counters["calls_submitted"] == 0


def test_an_output_ends_with_the_models_context() -> None:
    result = simulate(cluster("mixed"), workload(run(0, make_call(0, 16_380, 50))))
    record = only(result)
    assert (record.outcome, record.output_tokens) == ("length", 4)


# --- the core ------------------------------------------------------------------------------------


def test_the_core_can_be_another_and_is_told_no_length_of_an_answer() -> None:
    seen: list[Submit] = []

    class Watching(Core):
        def handle(self, peer, message, now_s):  # type: ignore[no-untyped-def]
            if isinstance(message, Submit):
                seen.append(message)
            return super().handle(peer, message, now_s)

    def make(limits: Limits, placement: Placement, core_id: str) -> Core:
        return Watching(limits, placement, core_id)

    setup = cluster("mixed")
    simulate(setup, workload(run(0, make_call(0, 64, 7))), core_factory=make)
    (submit,) = seen
    assert submit.request == "0.0.0"
    assert submit.max_output_tokens == 16_384 - 64
    assert len(submit.block_hashes) == 4 * 8


# --- the oracle ----------------------------------------------------------------------------------


def world_with_a_handle_on_its_way() -> tuple[World, str]:
    """A cluster in the moment in which a prompt is held for the decode worker."""
    network = NetworkSetup(message_s=0.01)
    setup = cluster("prefill", "decode", network=network)
    world = World(setup, workload(run(0, make_call(0, 1000, 5))))
    world.start()
    world.warm_up()
    holder = world.hosts["w0"].current
    assert holder is not None
    world.clients.start(world.apis)
    for _ in range(10_000):
        world.events.run(world.events.now_s + 1e-3)
        if holder.engine.holds("0.0.0~1", world.events.now_s):
            return world, "0.0.0~1"
    raise AssertionError("nothing was ever held")


def test_the_oracle_sees_kv_that_is_not_held_any_more() -> None:
    world, engine_id = world_with_a_handle_on_its_way()
    holder = world.hosts["w0"].current
    assert holder is not None
    holder.engine.release(engine_id, world.events.now_s)
    with pytest.raises(OracleError, match=r"(?s)seed 0 at .*its lease is over.*PrefillDone"):
        world.run()


def test_the_oracle_sees_kv_of_another_prompt() -> None:
    world, engine_id = world_with_a_handle_on_its_way()
    holder = world.hosts["w0"].current
    assert holder is not None
    world.oracle.made(holder, engine_id, b"another.")
    with pytest.raises(OracleError, match="other blocks"):
        world.run()


def test_the_oracle_sees_what_is_left_of_a_call() -> None:
    world, _ = world_with_a_handle_on_its_way()
    world.run()
    world.settle(5.0)
    world.oracle.quiet(world.brain.core, world.workers(), world.apis)
    world.oracle.opened("0.0.1")
    with pytest.raises(OracleError, match=r"the client of 0\.0\.1 still waits"):
        world.oracle.quiet(world.brain.core, world.workers(), world.apis)


def test_the_oracle_counts_what_clients_get() -> None:
    world = World(cluster("mixed"), workload())
    oracle = world.oracle
    oracle.opened("a")
    oracle.delivered("a", 0, 3)
    with pytest.raises(OracleError, match="got token 4 after 3"):
        oracle.delivered("a", 4, 1)
    with pytest.raises(OracleError, match="got token 2 after 3"):
        oracle.delivered("a", 2, 1)
    with pytest.raises(OracleError, match="ended with 3 of 5"):
        oracle.ended("a", "stop", 5)
    with pytest.raises(OracleError, match="ended twice"):
        oracle.ended("a", "stop", 3)
    with pytest.raises(OracleError, match="after its end"):
        oracle.delivered("a", 3, 1)


def test_a_workers_incarnations_have_addresses_of_their_own() -> None:
    world = World(cluster("mixed"), workload())
    world.start()
    world.events.run(5.0)
    host = world.hosts["w0"]
    world.crash(host, machine=True)
    assert host.current is None
    world.events.run(200.0)
    again = world.worker(Placed("w0", "w0.2"))
    assert again is not None
    assert again.address == peer_address(Placed("w0", "w0.2"))
    assert world.worker(Placed("w0", "w0.1")) is None
    (status,) = world.brain.core.snapshot(0, world.events.now_s).workers
    assert status.incarnation == "w0.2"


# --- the hosts' memory ---------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["pythia", "cache_aware"])
def test_what_caches_have_no_room_for_comes_back_from_the_hosts(policy: str) -> None:
    options = EngineOptions(kv_blocks=150, max_model_len=2000)
    placement = Placement(policy=policy, disaggregated="never", retention=False)  # type: ignore[arg-type]
    first = run(0, make_call(0, 1600, 4))
    others = [run(number, make_call(0, 1600, 4), arrival_s=3.0 * number) for number in (1, 2, 3)]
    again = Run("again", "flow", 60.0, first.scope, first.calls)
    replayed = workload(first, *others, again)
    ttft_s, computed = {}, {}
    for host_blocks in (0, 1000):
        setup = cluster("mixed", options=options, placement=placement, host_blocks=host_blocks)
        world = World(setup, replayed)
        world.start()
        world.warm_up()
        world.run()
        world.check()
        result = world.result("x")
        (record,) = (call for call in result.calls if call.run == 4)
        ttft_s[host_blocks] = record.first_token_s - record.planned_s
        computed[host_blocks] = record.computed_tokens
        hosted = world.brain.core._hosts
        assert hosted.blocks("w0") == (min(host_blocks, 4 * 100))
    assert computed == {0: 1600, 1000: 16}
    assert ttft_s[1000] < ttft_s[0]


def test_with_room_on_hosts_the_same_seed_gives_the_same_result() -> None:
    setup = cluster("prefill", "decode", "decode", options=OPTIONS, host_blocks=9000)
    first, second = (simulate(setup, generated_workload(), seed=3) for _ in range(2))
    assert [call.ended_s for call in first.calls] == [call.ended_s for call in second.calls]

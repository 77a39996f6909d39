"""Running calls that go on elsewhere, in a simulated cluster in which nothing goes wrong."""

from __future__ import annotations

import pytest

from cluster.simulator.records import Result
from cluster.simulator.setup import EngineOptions, NetworkSetup
from cluster.simulator.world import World
from cluster.workload.form import Workload
from coordinator.protocol import DrainWorker, MoveCalls, ToCore
from tests.simulation.cluster import call, cluster, run, workload

NETWORK = NetworkSetup(message_s=1e-3, api_s=5e-3, transfer_fixed_s=3e-3)
STEP_S = 5e-3
OPTIONS = EngineOptions(kv_blocks=4096, max_model_len=16384, step_overhead_s=STEP_S)
PROMPT_TOKENS = 4000


def replayed(work: Workload, *asked: tuple[float, ToCore]) -> tuple[Result, dict[str, int]]:
    """What comes of a workload on two decode workers if that is said to the core meanwhile, at
    seconds from its begin; and what the core counted."""
    world = World(cluster("decode", "decode", options=OPTIONS, network=NETWORK), work)
    world.start()
    world.warm_up()
    for after_s, message in asked:
        world.events.after(after_s, world.brain.hear, "operator", message)
    world.run()
    # No lease has to end for that.
    world.settle(OPTIONS.kv_lease_s / 2)
    return world.result("moves"), world.brain.totals()


def one_long_call() -> Workload:
    return workload(run(0, call(0, PROMPT_TOKENS, 400)))


@pytest.mark.parametrize("message", [MoveCalls(1, "w0"), DrainWorker(1, "w0")])
def test_a_call_goes_on_elsewhere_without_a_pause(message: ToCore) -> None:
    (alone,) = replayed(one_long_call())[0].calls
    result, counters = replayed(one_long_call(), (1.0, message))
    (record,) = result.calls
    assert alone.decode == "w0"
    assert (record.decode, record.outcome, record.output_tokens) == ("w1", "stop", 400)
    assert counters["moves_made"] == counters["moves_begun"] == 1
    assert PROMPT_TOKENS <= counters["move_tokens"] <= PROMPT_TOKENS + 200
    # Less than the transfer, and far less than the prompt.
    assert 0.0 < record.ended_s - alone.ended_s < 0.1


def test_it_may_go_to_and_fro() -> None:
    asked = [(0.5 * turn, MoveCalls(1, f"w{(turn - 1) % 2}")) for turn in range(1, 4)]
    result, counters = replayed(one_long_call(), *asked)
    (record,) = result.calls
    assert (record.decode, record.outcome, record.output_tokens) == ("w1", "stop", 400)
    assert counters["moves_made"] == 3
    # What is cached there by then need not be brought again.
    assert PROMPT_TOKENS <= counters["move_tokens"] < PROMPT_TOKENS + 400


def test_many_calls_are_moved_a_few_at_a_time() -> None:
    runs = [run(number, call(0, 640, 300, first_block=50 * number)) for number in range(24)]
    asked = [(1.0 + 0.1 * turn, MoveCalls(1, "w0")) for turn in range(5)]
    result, counters = replayed(workload(*runs), *asked)
    assert {record.outcome for record in result.calls} == {"stop"}
    assert {record.decode for record in result.calls} == {"w1"}
    assert counters["moves_made"] == counters["moves_begun"] >= 12
    assert counters["replans"] == 0

"""What the simulator is told of a running cluster, and what is made of both sides' records."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cluster.bench.sides import cluster_config
from cluster.calibration import Calibration
from cluster.hardware import cpu
from cluster.schema import ClusterConfig
from cluster.simulator.compare import compared, figures
from cluster.simulator.compare_plot import draw
from cluster.simulator.likeness import (
    KINDS,
    Constants,
    Kind,
    LikenessError,
    constants_of,
    probe,
    setup_like,
)
from cluster.simulator.records import CallRecord, Gaps, Result, RunRecord, Totals
from cluster.simulator.setup import ClusterSetup
from cluster.simulator.world import simulate
from coordinator.cost import Efficiency, ModelShape
from coordinator.limits import Placement
from coordinator.protocol import EngineFacts

TINY = ModelShape(
    name="tiny",
    layers=4,
    hidden=256,
    ffn=512,
    heads=4,
    kv_heads=2,
    head_dim=64,
    vocab=4096,
    dtype_bytes=4.0,
    weight_bytes=4.0,
    kv_bytes=4.0,
    compute="fp32",
    plain_compute="fp32",
)
CALIBRATION = Calibration(
    source="tests",
    model="tiny",
    shape=TINY,
    hardware=cpu(16 * 2.0**30),
    efficiency=Efficiency(
        gemm=0.0063, attention=0.0035, weights=0.0029, kv=0.0082, unhidden=1.0, layer_s=0.0
    ),
    points=[],
)
FACTS = EngineFacts("0", "tiny", "f", 32, 4096, 4096, 32, 2048, kv_bytes_per_block=131072)
TRUE = Constants(
    compute_slower=1.3,
    memory_slower=0.9,
    api_s=7e-3,
    api_token_s=4e-6,
    transfer_fixed_s=9e-3,
    bytes_per_s=1e9,
    contention=(1.0, 1.25),
)


def config_of(*roles: str) -> ClusterConfig:
    # As ``--validate`` has it: which way calls go does not depend on how fast engines are.
    return cluster_config("like", "tiny-llama", roles, placement=Placement(policy="least_kv"))


def made(config: ClusterConfig, constants: Constants) -> ClusterSetup:
    return setup_like(config, FACTS, CALIBRATION, constants)


def measured(config: ClusterConfig, constants: Constants) -> dict[Kind, list[Result]]:
    """The probes on a cluster about which everything is known: a simulated one."""
    setup = made(config, constants)
    return {kind: [simulate(setup, probe(kind, config), limited=True)] for kind in KINDS}


# --- finding out what a cluster is like ---------------------------------------------


def test_a_cluster_is_found_to_be_what_it_is() -> None:
    config = config_of("prefill", "decode")
    real = measured(config, TRUE)
    found = constants_of(config, real, TRUE.bytes_per_s, lambda each: made(config, each))
    assert found.compute_slower == pytest.approx(TRUE.compute_slower, rel=0.02)
    assert found.memory_slower == pytest.approx(TRUE.memory_slower, rel=0.02)
    assert found.api_s == pytest.approx(TRUE.api_s, rel=0.05)
    assert found.api_token_s == pytest.approx(TRUE.api_token_s, rel=0.05)
    assert found.transfer_fixed_s == pytest.approx(TRUE.transfer_fixed_s, rel=0.1)
    assert found.contention == pytest.approx(TRUE.contention, rel=0.03)


def test_where_nothing_is_prefilled_elsewhere_there_is_no_transfer_to_find() -> None:
    config = config_of("mixed")
    known = msgspec.structs.replace(TRUE, contention=())
    real = measured(config, known)
    found = constants_of(config, real, 0.0, lambda each: made(config, each))
    assert found.api_s == pytest.approx(TRUE.api_s, rel=0.05)
    assert (found.transfer_fixed_s, found.contention) == (0.0, ())


def test_probes_that_went_another_way_are_not_believed() -> None:
    config = config_of("prefill", "decode")
    real = measured(config, TRUE)
    for call in real["long"][0].calls:
        call.moved_tokens = 0
    with pytest.raises(LikenessError, match="prefilled elsewhere"):
        constants_of(config, real, 1e9, lambda each: made(config, each))
    real["alone"][0].calls[3].outcome = "error"
    with pytest.raises(LikenessError, match="alone"):
        constants_of(config, real, 1e9, lambda each: made(config, each))


def test_the_simulated_cluster_has_what_the_real_one_has() -> None:
    config = config_of("prefill", "decode", "decode")
    setup = made(config, TRUE)
    assert [(worker.name, worker.role) for worker in setup.workers] == [
        ("prefill-0", "prefill"),
        ("decode-1", "decode"),
        ("decode-2", "decode"),
    ]
    assert setup.kv_blocks() == FACTS.kv_blocks
    assert setup.options.max_num_batched_tokens == FACTS.max_num_batched_tokens
    assert setup.options.max_model_len == FACTS.max_model_len
    assert (setup.limits, setup.placement) == (config.limits, config.placement)
    same = made(config, Constants()).cost()
    assert same.decode_step_s(1, 100) == CALIBRATION.cost().decode_step_s(1, 100)


def test_a_slower_machine_takes_so_much_longer_for_everything() -> None:
    config = config_of("mixed")
    slow = made(config, Constants(compute_slower=1.5, memory_slower=1.5)).cost()
    for step in (((), 4, 2000), (((700, 300),), 3, 900)):
        assert slow.step_s(*step) == pytest.approx(1.5 * CALIBRATION.cost().step_s(*step))


# --- comparing ------------------------------------------------------------------------


def result_of(
    calls: list[CallRecord], completions_s: tuple[float, ...] = (1.0,), where: str = "live"
) -> Result:
    runs = [
        RunRecord(index, str(index), "w", 0.5, 0.5 + took_s, 1, finished=True)
        for index, took_s in enumerate(completions_s)
    ]
    return Result("c", "w", 0, where, calls, runs, [], Gaps(), Totals())


def record(
    index: int, ttft_s: float, itl_s: float, prefill: str = "", hits: int = 0, moved: int = 0
) -> CallRecord:
    return CallRecord(
        run=index,
        call=0,
        due_s=1.0,
        first_token_s=1.0 + ttft_s,
        ended_s=1.0 + ttft_s + 10 * itl_s,
        prompt_tokens=1000,
        output_tokens=11,
        prefill=prefill,
        prefill_cached_tokens=hits if prefill else 0,
        local_cached_tokens=0 if prefill else hits,
        moved_tokens=moved,
        outcome="length",
    )


def test_errors_are_of_the_means_over_replays_and_relative_to_what_is_real() -> None:
    real = [
        result_of([record(0, 0.10, 0.01, "p", 320, 1000), record(1, 0.30, 0.03, "", 64)]),
        result_of([record(0, 0.20, 0.01, "p", 320, 1000), record(1, 0.40, 0.03, "", 64)]),
    ]
    simulated = [result_of([record(0, 0.1, 0.01, "p", 320, 800), record(1, 0.2, 0.02, "", 0)])]
    rows = {row.name: row for row in compared(real, simulated)}
    assert rows["ttft_mean"].real == pytest.approx(250.0)
    assert rows["ttft_mean"].spread == pytest.approx(0.1 / 0.25)
    assert rows["ttft_mean"].error == pytest.approx(-0.4)
    assert rows["itl_mean"].error == pytest.approx(0.015 / 0.02 - 1)
    assert rows["hit_tokens"].error == pytest.approx(320 / 384 - 1)
    assert rows["moved_tokens"].error == pytest.approx(-0.2)
    assert rows["completion_mean"].error == pytest.approx(0.0)
    found = figures(list(rows.values()))
    assert found["real_vs_sim_error_ttft_mean"] == pytest.approx(0.4)
    assert set(found) == {f"real_vs_sim_error_{name}" for name in rows}


def test_calls_and_runs_that_were_not_served_are_left_out() -> None:
    broken = record(1, 50.0, 5.0, hits=500)
    broken.outcome = "error"
    real = result_of([record(0, 0.1, 0.01), broken], (2.0, 90.0))
    real.runs[1].finished = False
    rows = {row.name: row for row in compared([real], [real])}
    assert rows["ttft_mean"].real == pytest.approx(100.0)
    assert rows["completion_p95"].real == pytest.approx(2.0)
    assert rows["hit_tokens"].real == 0


def test_what_was_nothing_and_should_not_have_been_has_no_relative_error() -> None:
    nothing, something = (
        result_of([record(0, 0.1, 0.01)]),
        result_of([record(0, 0.1, 0.01, "p", 9)]),
    )
    rows = {row.name: row for row in compared([nothing], [something])}
    assert rows["hit_tokens"].error is None
    assert "real_vs_sim_error_hit_tokens" not in figures(list(rows.values()))
    assert {row.name: row for row in compared([nothing], [nothing])}["hit_tokens"].error == 0.0


def test_the_picture_is_drawn_of_what_both_sides_have(tmp_path: Path) -> None:
    real = [result_of([record(0, 0.1, 0.01), record(1, 5.0, 0.02)], (1.0, 3.0)) for _ in range(2)]
    simulated = [result_of([record(0, 0.2, 0.01)], (2.0,))]
    path = tmp_path / "compared.png"
    draw(path, real, simulated, "a title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000

"""Estimates of step times: limits they must keep whatever the model and the batch."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.hardware import HARDWARE, hardware
from cluster.model_shape import model_shape
from coordinator.cost import Chunk, Efficiency, ModelShape, StepCost, kv_shards

CONFIGS = Path(__file__).with_name("model_configs")
SHAPES = {
    path.stem: model_shape(json.loads(path.read_text("utf-8")), path.stem)
    for path in sorted(CONFIGS.glob("*.json"))
}
H200 = hardware("h200")
IDEAL = Efficiency(gemm=1, expert=1, attention=1, weights=1, kv=1, link=1, layer_s=0, allreduce_s=0)

shapes = st.sampled_from(sorted(SHAPES)).map(SHAPES.__getitem__)
chunks = st.lists(st.tuples(st.integers(1, 4096), st.integers(0, 65536)), max_size=4)
shares = st.floats(0.05, 1.0)
efficiencies = st.builds(
    Efficiency,
    gemm=shares,
    expert=shares,
    attention=shares,
    weights=shares,
    kv=shares,
    link=shares,
    unhidden=st.floats(0, 1),
    step_s=st.floats(0, 0.01),
    sequence_s=st.floats(0, 1e-4),
)
batches = st.tuples(st.integers(0, 256), st.integers(1, 32768))


def cost(shape: ModelShape, efficiency: Efficiency, tp: int = 1) -> StepCost:
    return StepCost(shape, H200, efficiency, tp)


def step_s(subject: StepCost, prefills: list[Chunk], batch: tuple[int, int]) -> float:
    return subject.step_s(prefills, batch[0], batch[0] * batch[1])


@settings(deadline=None)
@given(shapes, efficiencies, st.sampled_from([1, 2, 8]), chunks, batches, st.data())
def test_more_work_is_never_faster(
    shape: ModelShape,
    efficiency: Efficiency,
    tp: int,
    prefills: list[Chunk],
    batch: tuple[int, int],
    data: st.DataObject,
) -> None:
    subject = cost(shape, efficiency, tp)
    before_s = step_s(subject, prefills, batch) * (1 - 1e-12)
    more = data.draw(st.integers(1, 4096))
    assert step_s(subject, [*prefills, (more, 0)], batch) >= before_s
    if prefills:
        (new, context), *rest = prefills
        assert step_s(subject, [(new + more, context), *rest], batch) >= before_s
        assert step_s(subject, [(new, context + more), *rest], batch) >= before_s
    count, context = batch
    assert subject.step_s(prefills, count + more, count * context) >= before_s
    if count:
        assert subject.step_s(prefills, count, count * context + more) >= before_s


@given(shapes, efficiencies, chunks, batches)
@settings(deadline=None)
def test_more_devices_never_compute_slower(
    shape: ModelShape, efficiency: Efficiency, prefills: list[Chunk], batch: tuple[int, int]
) -> None:
    """All but the collectives, which are what tensor parallelism costs."""
    free = msgspec.structs.replace(efficiency, allreduce_s=0.0)
    tokens = sum(new for new, _ in prefills) + batch[0]
    times = []
    for tp in (1, 2, 4, 8):
        subject = cost(shape, free, tp)
        collectives_s = subject.peak.link * tokens / free.link
        times.append(step_s(subject, prefills, batch) - collectives_s)
    for fewer_s, more_s in itertools.pairwise(times):
        assert more_s <= fewer_s * (1 + 1e-9)


@given(shapes, efficiencies, st.integers(1, 8192), st.integers(0, 65536), st.integers(1, 4096))
@settings(deadline=None)
def test_a_cached_prefix_helps_and_chunks_do_not(
    shape: ModelShape, efficiency: Efficiency, new: int, cached: int, chunk: int
) -> None:
    # What MLA has to unpack of a cached prefix costs less than computing that prefix, but for
    # prompts so short that reading the weights takes longer than computing either.
    subject = cost(shape, efficiency)
    whole_s = subject.prefill_s(new, cached)
    slack = 1e-3 if shape.attention == "mla" else 1e-9
    assert whole_s <= subject.prefill_s(new + cached) * (1 + slack)
    assert subject.prefill_s(new, cached, chunk) >= whole_s * (1 - 1e-9)


@pytest.mark.parametrize("name", sorted(HARDWARE))
def test_a_batch_of_one_is_bound_by_memory(name: str) -> None:
    shape = SHAPES["llama-3.1-8b"]
    subject = StepCost(shape, hardware(name), IDEAL)
    # All weights but the embeddings' table, of which a token reads a row, and the norms.
    table = shape.vocab * shape.hidden * 2 + (2 * shape.layers + 1) * shape.hidden * 2
    read_s = (shape.weights_bytes - table) / subject.hardware.memory_bytes_per_s
    assert subject.decode_step_s(1, 0) == pytest.approx(read_s, rel=1e-4)


def test_a_long_prefill_is_bound_by_arithmetic() -> None:
    shape = SHAPES["llama-3.1-8b"]
    subject = StepCost(shape, H200, IDEAL)
    linear_flops = 2 * shape.dense_parameters * 8192
    attention_flops = shape.layers * shape.pair_flops * 8192 * 8193 / 2
    compute_s = (linear_flops + attention_flops) / 989e12
    assert subject.prefill_s(8192) == pytest.approx(compute_s, rel=1e-2)


def test_experts_are_read_as_tokens_touch_them() -> None:
    shape = SHAPES["qwen3-30b-a3b"]
    subject = StepCost(shape, H200, IDEAL)
    routed_s = shape.routed_parameters * 2 / H200.memory_bytes_per_s
    rest_s = subject.decode_step_s(1, 0) - routed_s * 8 / 128
    few_s = subject.decode_step_s(16, 0) - rest_s
    # 16 tokens touch 1 - (1 - 8/128)^16 = 64 % of the experts, not 16 * 8 = all 128.
    assert few_s / routed_s == pytest.approx(0.64, abs=0.02)
    assert subject.decode_step_s(200, 0) - rest_s <= routed_s * 1.05


def test_compressed_kv_stays_whole_on_each_device() -> None:
    deepseek, llama = SHAPES["deepseek-v3"], SHAPES["llama-3.1-70b"]
    assert [kv_shards(deepseek, 8), kv_shards(llama, 8), kv_shards(llama, 16)] == [1, 8, 8]
    room = [StepCost(llama, H200, tp=tp).kv_capacity_tokens() for tp in (2, 4, 8)]
    assert room[1] > 2 * room[0]
    assert room[2] > 2 * room[1]


def test_windows_bound_attention() -> None:
    oss = SHAPES["gpt-oss-120b"]
    windowed = msgspec.structs.replace(oss, window_layers=36)
    full = msgspec.structs.replace(oss, window=0, window_layers=0)
    far, near = cost(windowed, IDEAL), cost(full, IDEAL)
    assert far.decode_step_s(8, 8 * 32768) == far.decode_step_s(8, 8 * 128)
    assert near.decode_step_s(8, 8 * 32768) > near.decode_step_s(8, 8 * 128)
    assert far.chunk_seen(256, 0)[0] == 128 * 129 / 2 + 128 * 128
    assert far.chunk_seen(64, 32)[0] == near.chunk_seen(64, 32)[0] == 64 * 32 + 64 * 65 / 2


def test_no_work_takes_no_time() -> None:
    assert cost(SHAPES["llama-3.1-8b"], Efficiency(step_s=1.0)).step_s() == 0.0


def test_transfers_share_a_link() -> None:
    subject = StepCost(SHAPES["llama-3.1-8b"], H200)
    size_bytes = 8192 * subject.kv_bytes_per_token  # 1.07 GB
    assert subject.transfer_s(size_bytes, "rdma") == pytest.approx(0.0215, rel=0.01)
    assert subject.transfer_s(size_bytes, "rdma", 4) == pytest.approx(0.0859, rel=0.01)
    assert subject.transfer_s(size_bytes, "nvlink") < subject.transfer_s(size_bytes, "pcie")
    bare = msgspec.structs.replace(H200, links={})
    with pytest.raises(ValueError, match="h200 has no tcp link"):
        StepCost(SHAPES["llama-3.1-8b"], bare).transfer_s(1, "tcp")
    with pytest.raises(ValueError, match="names no link for tensor parallelism"):
        StepCost(SHAPES["llama-3.1-8b"], bare, tp=2)

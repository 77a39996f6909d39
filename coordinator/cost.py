"""How long an engine step, a prefill, a decode step or a transfer takes: estimates, no clock.

A roofline whose factors are fitted. A step of a chunked-prefill batch takes

    linear layers      the larger of computing (FLOPs / peak) and reading the weights
                       (bytes / bandwidth), separately for dense layers, experts and head
    attention          per prefill chunk, and for all decodes together, the larger of
                       computing the scores and reading the KV
    collectives        two all-reduces per layer with tensor parallelism
    overhead           a fixed part, a part per layer, a part per sequence

each divided by the share of the peak that kernels reach (``Efficiency``). ``StepCost.step_s``
takes a few microseconds: the simulator and the placement ask it all the time. Sizes are in
bytes, times in seconds, rates per second.

What it leaves out: pipeline parallelism, expert parallelism (experts are cut like everything
else), speculative decoding, and what the host does between steps beyond the fitted overhead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from coordinator.shape import GATED_MATRICES, ModelShape

__all__ = [
    "PUBLISHED",
    "RUNTIME_BYTES",
    "Chunk",
    "DoesNotFit",
    "Efficiency",
    "Hardware",
    "Link",
    "ModelShape",
    "PeakCost",
    "StepCost",
    "Tier",
    "kv_shards",
    "peak_cost",
]

Tier = Literal["nvlink", "pcie", "rdma", "tcp"]
Chunk = tuple[int, int]
"""A prefill chunk: new tokens, and tokens before them whose KV is there already."""

RUNTIME_BYTES = 551 * 2**20
"""CUDA context and libraries on a GPU. AIConfigurator 0.12.0, systems/*.yaml, names 551 MB
as measured before it adds a margin."""


class DoesNotFit(ValueError):
    """A model and its KV do not fit the memory they are given; says why in numbers."""


class Link(msgspec.Struct, frozen=True):
    """A way for bytes: ``latency_s`` once, then ``bytes_per_s`` in one direction."""

    latency_s: float
    bytes_per_s: float


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """One accelerator at its published peak: dense FLOP/s per dtype, memory, links by tier."""

    name: str
    flops_per_s: dict[str, float]
    memory_bytes_per_s: float
    memory_bytes: float
    links: dict[Tier, Link] = {}

    def peak(self, dtype: str) -> float:
        """FLOP/s of ``dtype``. ValueError if this hardware has none."""
        if dtype not in self.flops_per_s:
            known = ", ".join(sorted(self.flops_per_s))
            raise ValueError(f"{self.name} has no {dtype} arithmetic (it has {known})")
        return self.flops_per_s[dtype]


class Efficiency(msgspec.Struct, frozen=True, kw_only=True):
    """What kernels make of the peak, and what a step costs besides. ``source``: where from.

    Shares of the peak: ``gemm``, ``expert`` (grouped products of routed experts),
    ``attention`` of FLOP/s; ``weights`` and ``kv`` of memory bandwidth; ``link`` of the
    bandwidth between devices of one engine. ``unhidden``: how much of the smaller of
    computing and reading adds to the larger one in linear layers (0 is the ideal roofline).
    Seconds: ``step_s`` per step, ``layer_s`` per step and layer, ``sequence_s`` per sequence
    of a step, ``allreduce_s`` per collective.

    The defaults are published figures, none of them a measurement of Pythia:

    * ``gemm``, ``expert`` 0.80: best BF16 matmul on H100/H200 SXM, 794.5 of 989 TFLOP/s
      (ml-engineering, "Maximum Achievable Matmul FLOPS"; B200 78 %, A100 86 %). Experts'
      grouped products have no figure of their own there.
    * ``attention`` 0.60: FlashAttention-3 forward on H100, head dimension 128, 590 to 621
      TFLOP/s at 4k to 16k tokens (pytorch/benchmark, pull request 2391).
    * ``weights``, ``kv`` 0.80: ``mem_bw_empirical_scaling_factor`` of AIConfigurator 0.12.0,
      systems/*.yaml, there called a non-official correction from observation.
    * ``layer_s``: 9 kernels of a layer (2 norms, 4 products, rotation, attention,
      activation) at 3 us, ``mem_empirical_constant_latency`` of the same files.
    * ``allreduce_s`` 10 us: ``p2p_latency`` of the same files. ``link`` 0.80: no figure was
      found; taken to be as memory's.
    * ``unhidden``, ``step_s``, ``sequence_s`` 0: known only by calibration.
    """

    gemm: float = 0.80
    expert: float = 0.80
    attention: float = 0.60
    weights: float = 0.80
    kv: float = 0.80
    link: float = 0.80
    unhidden: float = 0.0
    step_s: float = 0.0
    layer_s: float = 9 * 3e-6
    sequence_s: float = 0.0
    allreduce_s: float = 10e-6
    source: str = "published figures"


PUBLISHED = Efficiency()


class PeakCost(NamedTuple):
    """Seconds of one engine at its hardware's peak: what efficiencies are applied to.

    ``dense`` and ``expert`` per token, ``head`` per sequence, ``*_read`` once per step (experts:
    all of them); ``untouched``: how probable it is that a token leaves an expert alone;
    ``pair`` per query and key of a chunk, ``expand`` per token before a chunk (MLA unpacks
    its KV), ``decode`` per token of a decode's context, ``kv_read`` per token of KV, ``link``
    per token; ``allreduces`` is a count.
    """

    dense: float
    dense_read: float
    expert: float
    expert_read: float
    untouched: float
    head: float
    head_read: float
    pair: float
    expand: float
    decode: float
    kv_read: float
    link: float
    allreduces: int


def kv_shards(shape: ModelShape, tp: int) -> int:
    """Over how many of ``tp`` devices a token's KV is spread; MLA's is on all of them."""
    return 1 if shape.attention == "mla" else min(tp, shape.kv_heads)


def peak_cost(shape: ModelShape, hardware: Hardware, tp: int) -> PeakCost:
    """``shape`` on ``tp`` devices. ValueError for a dtype or link the hardware lacks."""
    flop_s = 1.0 / (hardware.peak(shape.compute) * tp)
    plain_flop_s = 1.0 / (hardware.peak(shape.plain_compute) * tp)
    byte_s = 1.0 / hardware.memory_bytes_per_s
    dense, routed = shape.dense_parameters, shape.routed_parameters
    head = shape.hidden * shape.vocab
    used = shape.experts_per_token / shape.experts if shape.experts else 0.0
    expanded = shape.kv_rank * shape.heads * (shape.head_dim + shape.value_dim)
    allreduces, link_s = 0, 0.0
    if tp > 1:
        if "nvlink" not in hardware.links and "pcie" not in hardware.links:
            raise ValueError(f"{hardware.name} names no link for tensor parallelism")
        link = hardware.links.get("nvlink") or hardware.links["pcie"]
        # A ring's all-reduce sends every byte out and back, less what stays at home.
        allreduces = 2 * shape.layers + 1
        sent_bytes = 2.0 * (tp - 1) / tp * allreduces * shape.hidden * shape.dtype_bytes
        link_s = sent_bytes / link.bytes_per_s
    return PeakCost(
        dense=2.0 * dense * flop_s,
        dense_read=dense * shape.weight_bytes * byte_s / tp,
        expert=2.0 * routed * used * flop_s,
        expert_read=routed * (shape.expert_bytes or shape.weight_bytes) * byte_s / tp,
        untouched=1.0 - used,
        head=2.0 * head * plain_flop_s,
        head_read=head * shape.dtype_bytes * byte_s / tp,
        pair=shape.layers * shape.pair_flops * plain_flop_s,
        expand=2.0 * shape.layers * expanded * flop_s,
        decode=shape.layers * shape.decode_pair_flops * plain_flop_s,
        kv_read=shape.kv_bytes_per_token * byte_s / kv_shards(shape, tp),
        link=link_s,
        allreduces=allreduces,
    )


class StepCost:
    """What one engine with ``tp`` devices takes. All methods are pure and cheap."""

    __slots__ = (
        "_decode",
        "_dense",
        "_dense_read",
        "_expand",
        "_expert",
        "_expert_read",
        "_fixed_s",
        "_full",
        "_head",
        "_head_read",
        "_kv_read",
        "_link",
        "_pair",
        "_sequence_s",
        "_unhidden",
        "_untouched",
        "_window",
        "_windowed",
        "efficiency",
        "hardware",
        "peak",
        "shape",
        "tp",
    )

    def __init__(
        self,
        shape: ModelShape,
        hardware: Hardware,
        efficiency: Efficiency = PUBLISHED,
        tp: int = 1,
    ) -> None:
        self.shape, self.hardware, self.efficiency, self.tp = shape, hardware, efficiency, tp
        self.peak = peak = peak_cost(shape, hardware, tp)
        self._dense = peak.dense / efficiency.gemm
        self._dense_read = peak.dense_read / efficiency.weights
        self._expert = peak.expert / efficiency.expert
        self._expert_read = peak.expert_read / efficiency.weights
        self._untouched = peak.untouched
        self._head = peak.head / efficiency.gemm
        self._head_read = peak.head_read / efficiency.weights
        self._pair = peak.pair / efficiency.attention
        self._expand = peak.expand / efficiency.gemm
        self._decode = peak.decode / efficiency.attention
        self._kv_read = peak.kv_read / efficiency.kv
        self._link = peak.link / efficiency.link
        self._unhidden = efficiency.unhidden
        self._sequence_s = efficiency.sequence_s
        self._fixed_s = (
            efficiency.step_s
            + efficiency.layer_s * shape.layers
            + efficiency.allreduce_s * peak.allreduces
        )
        self._window = shape.window
        self._windowed = shape.window_layers / shape.layers if shape.window else 0.0
        self._full = 1.0 - self._windowed

    @property
    def kv_bytes_per_token(self) -> float:
        """KV of one token in all layers; what has to be moved for it."""
        return self.shape.kv_bytes_per_token

    @property
    def weights_bytes(self) -> float:
        """Weights of the whole model, on all devices together."""
        return self.shape.weights_bytes

    def step_s(
        self,
        prefill_chunks: Sequence[Chunk] = (),
        decode_count: int = 0,
        decode_context_tokens: int = 0,
    ) -> float:
        """One engine step: prefill chunks, and a token for each of ``decode_count`` sequences.

        ``decode_context_tokens``: the KV of all those sequences together. 0 without work.
        """
        tokens = sequences = decode_count
        attention_s = 0.0
        if decode_count:
            attention_s = self._decode_attention_s(decode_count, decode_context_tokens)
        for new_tokens, context_tokens in prefill_chunks:
            tokens += new_tokens
            sequences += 1
            attention_s += self._chunk_attention_s(new_tokens, context_tokens)
        if not tokens:
            return 0.0
        compute, read, unhidden = self._dense * tokens, self._dense_read, self._unhidden
        linear_s = compute + unhidden * read if compute > read else read + unhidden * compute
        compute, read = self._head * sequences, self._head_read
        linear_s += compute + unhidden * read if compute > read else read + unhidden * compute
        if self._expert:
            compute = self._expert * tokens
            read = self._expert_read * (1.0 - self._untouched**tokens)
            linear_s += compute + unhidden * read if compute > read else read + unhidden * compute
        return (
            linear_s
            + attention_s
            + self._link * tokens
            + self._sequence_s * sequences
            + self._fixed_s
        )

    def prefill_s(self, new_tokens: int, cached_tokens: int = 0, chunk_tokens: int = 0) -> float:
        """A prompt alone on the engine: ``new_tokens`` behind ``cached_tokens`` of KV.

        ``chunk_tokens``: the most new tokens of one step (vLLM's ``max_num_batched_tokens``);
        0 for any number.
        """
        chunk = chunk_tokens or new_tokens
        total_s, done = 0.0, 0
        while done < new_tokens:
            size = min(chunk, new_tokens - done)
            total_s += self.step_s(((size, cached_tokens + done),))
            done += size
        return total_s

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        """One token for each of ``batch`` sequences that have ``context_tokens`` together."""
        return self.step_s((), batch, context_tokens)

    def kv_capacity_tokens(
        self,
        gpu_memory_utilization: float = 0.9,
        batched_tokens: int = 8192,
        reserved_bytes: float | None = None,
    ) -> int:
        """Tokens of KV that fit beside the weights. DoesNotFit, with numbers, if none do.

        ``reserved_bytes`` per device is what the runtime and activations take; by default
        ``RUNTIME_BYTES`` and the activations of ``batched_tokens``.
        """
        shape, tp = self.shape, self.tp
        if reserved_bytes is None:
            widest = max(shape.ffn, shape.experts_per_token * shape.moe_ffn)
            values = 4 * shape.hidden + GATED_MATRICES * widest / tp
            reserved_bytes = RUNTIME_BYTES + batched_tokens * values * shape.dtype_bytes
        weights = shape.weights_bytes / tp
        usable = self.hardware.memory_bytes * gpu_memory_utilization
        per_token = shape.kv_bytes_per_token / kv_shards(shape, tp)
        tokens = int((usable - weights - reserved_bytes) // per_token)
        if tokens < 1:
            raise DoesNotFit(
                f"{shape.name or 'the model'} does not fit {tp} x {self.hardware.name}: each of "
                f"{tp} has {usable / 1e9:.1f} GB to use ({gpu_memory_utilization:.0%} of "
                f"{self.hardware.memory_bytes / 1e9:.1f} GB), its share of the weights is "
                f"{weights / 1e9:.1f} GB (of {shape.weights_bytes / 1e9:.1f} GB), runtime and "
                f"activations take {reserved_bytes / 1e9:.1f} GB: nothing is left for KV"
            )
        return tokens

    def transfer_s(self, size_bytes: float, tier: Tier, shared_by: int = 1) -> float:
        """``size_bytes`` over a link that ``shared_by`` transfers use at a time.

        Engines with tensor parallelism move their shards over as many links at once: ask for
        the bytes of one shard. ValueError for a link this hardware lacks.
        """
        if tier not in self.hardware.links:
            raise ValueError(f"{self.hardware.name} has no {tier} link")
        link = self.hardware.links[tier]
        return link.latency_s + size_bytes * shared_by / link.bytes_per_s

    def decode_seen(self, count: int, context_tokens: int) -> float:
        """Tokens of KV that ``count`` decodes read in a layer, averaged over layers."""
        seen: float = context_tokens + count
        if self._windowed:
            inside = min(seen, count * self._window)
            seen = self._full * seen + self._windowed * inside
        return seen

    def chunk_seen(self, new_tokens: int, context_tokens: int) -> tuple[float, float]:
        """Query-key pairs of a chunk in a layer, and tokens of KV it reads and writes."""
        pairs = new_tokens * (context_tokens + (new_tokens + 1) * 0.5)
        seen: float = context_tokens
        if self._windowed:
            window = self._window
            # Queries that are not a whole window in see all before them, the others a window.
            early = min(max(window - context_tokens, 0), new_tokens)
            inside = early * (context_tokens + (early + 1) * 0.5) + (new_tokens - early) * window
            pairs = self._full * pairs + self._windowed * inside
            seen = self._full * seen + self._windowed * min(context_tokens, window)
        # The context's KV is read once, the chunk's own is written and read.
        return pairs, seen + 2 * new_tokens

    def _decode_attention_s(self, count: int, context_tokens: int) -> float:
        seen = self.decode_seen(count, context_tokens)
        compute, read = self._decode * seen, self._kv_read * seen
        return compute if compute > read else read

    def _chunk_attention_s(self, new_tokens: int, context_tokens: int) -> float:
        pairs, seen = self.chunk_seen(new_tokens, context_tokens)
        compute, read = self._pair * pairs, self._kv_read * seen
        return (compute if compute > read else read) + self._expand * context_tokens

"""The shape of a model: what its parameters, KV and arithmetic per token are. Pure arithmetic."""

from __future__ import annotations

from typing import Literal

import msgspec

GATED_MATRICES = 3
"""Of a gated feed-forward layer: gate, up and down."""


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """What decides a model's costs.

    ``attention``: ``gqa`` or ``mla`` (DeepSeek's compressed KV: ``query_rank`` 0 means
    uncompressed queries; ``head_dim`` is then a key's part without position, ``rope_dim`` the
    part with it and ``value_dim`` a value's). ``moe_layers`` of the layers have ``experts``
    of width ``moe_ffn``, of which a token uses ``experts_per_token`` and all
    ``shared_experts``; the others are dense, of width ``ffn``. ``window_layers`` see the last
    ``window`` tokens only. Bytes per value: ``dtype_bytes`` of activations, embeddings and
    head, ``weight_bytes`` of linear layers, ``expert_bytes`` of experts (0: as others),
    ``kv_bytes`` of the KV cache. ``compute``: the dtype of the linear layers' products, a key
    of ``Hardware.flops_per_s``; ``plain_compute``: that of what is not quantised, attention
    and head.
    """

    name: str = ""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    attention: Literal["gqa", "mla"] = "gqa"
    query_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    value_dim: int = 0
    experts: int = 0
    experts_per_token: int = 0
    shared_experts: int = 0
    moe_ffn: int = 0
    moe_layers: int = 0
    window: int = 0
    window_layers: int = 0
    tied_embeddings: bool = False
    dtype_bytes: float = 2.0
    weight_bytes: float = 2.0
    expert_bytes: float = 0.0
    kv_bytes: float = 2.0
    compute: str = "bf16"
    plain_compute: str = "bf16"

    @property
    def attention_parameters(self) -> int:
        """Of one layer's projections."""
        if self.attention == "gqa":
            return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        query = self.heads * (self.head_dim + self.rope_dim)
        queries = self.hidden * query
        if self.query_rank:
            queries = self.query_rank * (self.hidden + query)
        keys = self.hidden * (self.kv_rank + self.rope_dim)
        expanded = self.kv_rank * self.heads * (self.head_dim + self.value_dim)
        return queries + keys + expanded + self.heads * self.value_dim * self.hidden

    @property
    def expert_parameters(self) -> int:
        """Of one routed or shared expert."""
        return GATED_MATRICES * self.hidden * self.moe_ffn

    @property
    def dense_parameters(self) -> int:
        """Of all linear layers that every token passes: no routed experts, no embeddings."""
        dense_layers = self.layers - self.moe_layers
        every = self.shared_experts * self.expert_parameters + self.hidden * self.experts
        return (
            self.layers * self.attention_parameters
            + dense_layers * GATED_MATRICES * self.hidden * self.ffn
            + self.moe_layers * every
        )

    @property
    def routed_parameters(self) -> int:
        """Of all routed experts."""
        return self.moe_layers * self.experts * self.expert_parameters

    @property
    def parameters(self) -> int:
        """All of them: what the model's name promises. Biases are left out."""
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab * self.hidden
        norms = (2 * self.layers + 1) * self.hidden
        return self.dense_parameters + self.routed_parameters + embeddings + norms

    @property
    def weights_bytes(self) -> float:
        """What the weights take in memory, on all devices together."""
        linear = self.dense_parameters + self.routed_parameters
        rest = self.parameters - linear
        routed = self.routed_parameters * (self.expert_bytes or self.weight_bytes)
        return self.dense_parameters * self.weight_bytes + routed + rest * self.dtype_bytes

    @property
    def kv_layer_bytes(self) -> float:
        """KV of one token in one layer."""
        if self.attention == "mla":
            return (self.kv_rank + self.rope_dim) * self.kv_bytes
        return 2 * self.kv_heads * self.head_dim * self.kv_bytes

    @property
    def kv_bytes_per_token(self) -> float:
        """KV of one token in all layers, as long as it is inside every window."""
        return self.layers * self.kv_layer_bytes

    @property
    def pair_flops(self) -> float:
        """Attention of one query token to one key token in one layer, at prefill."""
        if self.attention == "mla":
            return 2.0 * self.heads * (self.head_dim + self.rope_dim + self.value_dim)
        return 4.0 * self.heads * self.head_dim

    @property
    def decode_pair_flops(self) -> float:
        """The same at decode, where MLA attends to the compressed KV itself."""
        if self.attention == "mla":
            return 2.0 * self.heads * (2 * self.kv_rank + self.rope_dim)
        return self.pair_flops

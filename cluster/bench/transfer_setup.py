"""What ``pythia bench transfer`` measures, and the model it makes up for it."""

from __future__ import annotations

from typing import Any

import msgspec

from cluster.process import usable_cores
from transfer.settings import progress_delay_us

VOCABULARY = 512
BLOCK_TOKENS = 32
POOL_PROMPTS = 4
"""Prompts that fit an engine's KV at a time. Once it has been full, blocks are handed out in
no order that NIXL could merge, as in an engine that has run for a while."""


class Setup(msgspec.Struct, frozen=True):
    """What is measured. ``heads``, ``head_dim`` and ``layers`` shape the KV."""

    mebibytes: int = 64
    pairs: int = 10
    warm_up_pairs: int = POOL_PROMPTS + 1
    device: str = "cpu"
    nixl_threads: int = 0
    progress_delay_us: int | None = None
    layers: int = 8
    heads: int = 4
    head_dim: int = 128

    @property
    def token_bytes(self) -> int:
        """KV of one token: keys and values of all layers in float32."""
        return 2 * self.layers * self.heads * self.head_dim * 4

    @property
    def blocks(self) -> int:
        """Blocks that hold ``mebibytes`` or a little more."""
        return -(-self.mebibytes * 2**20 // (self.token_bytes * BLOCK_TOKENS))

    @property
    def size_bytes(self) -> int:
        """What these blocks weigh."""
        return self.blocks * BLOCK_TOKENS * self.token_bytes

    @property
    def prompt_tokens(self) -> int:
        """Tokens whose KV takes ``blocks``, only one of them in the last."""
        return (self.blocks - 1) * BLOCK_TOKENS + 1

    @property
    def delay_us(self) -> int:
        """The progress threads' sleep, chosen by cores unless given."""
        if self.progress_delay_us is not None:
            return self.progress_delay_us
        return progress_delay_us((usable_cores() - 2) // 2)


def model_config(setup: Setup) -> dict[str, Any]:
    """A Llama that computes little and keeps much."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": setup.layers,
        "num_attention_heads": setup.heads,
        "num_key_value_heads": setup.heads,
        "head_dim": setup.head_dim,
        "max_position_embeddings": setup.prompt_tokens + BLOCK_TOKENS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }

"""A model's shape from its Hugging Face ``config.json``.

Known architectures: Llama (and Mistral), Qwen2, Qwen3, Qwen3-MoE, Mixtral, DeepSeek V2/V3
(MLA), gpt-oss, Gemma 1 to 3. Anything else, and any key that is missing, is an error that
names it: a guessed shape would make every estimate wrong without a sign.

Multi-token-prediction layers and vision towers are left out: they take no part in a plain
decode step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coordinator.cost import ModelShape

MXFP4_BYTES = 0.5 + 1 / 32
"""4 bits a weight and one 8-bit scale for 32 (OCP Microscaling Formats, version 1.0)."""
_DTYPES = {
    "float32": ("fp32", 4.0),
    "bfloat16": ("bf16", 2.0),
    "float16": ("bf16", 2.0),
}

Fields = dict[str, Any]


class ModelShapeError(ValueError):
    """A configuration that can't be read; names what is missing or unknown."""


class _Config:
    """A configuration's keys, which must be there when they are asked for."""

    def __init__(self, values: Mapping[str, Any], kind: str) -> None:
        self._values = values
        self._kind = kind

    def need(self, *names: str) -> int:
        """The first of ``names`` that is there, a positive integer."""
        for name in names:
            value = self._values.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ModelShapeError(f"{self._kind}: {name} must be a positive integer")
            return value
        raise ModelShapeError(f"{self._kind}: config.json lacks {' or '.join(names)}")

    def get(self, name: str, default: Any = None) -> Any:
        """The value of ``name``, or ``default`` for none and null."""
        value = self._values.get(name)
        return default if value is None else value


def read_model_shape(folder: Path, name: str = "") -> ModelShape:
    """The shape of the model in ``folder``. ModelShapeError if that can't be told."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelShapeError(f"{path} can't be read: {error}") from error
    return model_shape(config, name or folder.name)


def model_shape(
    config: Mapping[str, Any],
    name: str = "",
    *,
    dtype: str | None = None,
    kv_bytes: float | None = None,
) -> ModelShape:
    """The shape that ``config`` describes.

    ``dtype``: what the model is run in if not as its file says; ``kv_bytes``: of one value in
    the KV cache if not the dtype's. ModelShapeError names what is missing or unknown.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = {"torch_dtype": config.get("torch_dtype"), **config, **text}
    kind = str(config.get("model_type", "")).removesuffix("_text")
    if kind not in _READERS:
        raise ModelShapeError(
            f"model_type {kind or 'is missing'!r}: known are {', '.join(sorted(_READERS))}"
        )
    source = _Config(config, kind)
    fields = _dense(source) | _READERS[kind](source) | _precision(source, dtype)
    if kv_bytes is not None:
        fields["kv_bytes"] = kv_bytes
    return ModelShape(name=name, **fields)


# --- architectures ------------------------------------------------------------


def _dense(config: _Config) -> Fields:
    heads = config.need("num_attention_heads")
    hidden = config.need("hidden_size")
    return {
        "layers": config.need("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads", heads),
        "head_dim": config.get("head_dim", hidden // heads),
        "ffn": config.need("intermediate_size"),
        "vocab": config.need("vocab_size"),
        "tied_embeddings": config.get("tie_word_embeddings", False),
    }


def _plain(config: _Config) -> Fields:
    """Dense; with windows if the file has them (Mistral) and switches them on (Qwen2)."""
    if not config.get("sliding_window") or not config.get("use_sliding_window", True):
        return {}
    layers = config.need("num_hidden_layers")
    full = min(config.get("max_window_layers", 0), layers)
    return _windows(config, ["full_attention"] * full + ["sliding_attention"] * (layers - full))


def _windows(config: _Config, default: list[str]) -> Fields:
    """How many layers see a window only: by ``layer_types``, or by ``default``."""
    windows = config.get("layer_types", default).count("sliding_attention")
    return {"window": config.need("sliding_window") if windows else 0, "window_layers": windows}


def _alternating(config: _Config, every: int) -> list[str]:
    """Kinds of layers when each ``every``-th sees everything, as Transformers has it."""
    every = config.get("sliding_window_pattern", every)
    layers = range(config.need("num_hidden_layers"))
    return ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in layers]


def _gemma(every: int) -> Callable[[_Config], Fields]:
    """Embeddings are tied unless the file says otherwise; ``every``: see ``_alternating``."""

    def read(config: _Config) -> Fields:
        fields: Fields = {
            "tied_embeddings": config.get("tie_word_embeddings", True),
            "head_dim": config.need("head_dim"),
        }
        if every and config.get("sliding_window"):
            fields |= _windows(config, _alternating(config, every))
        return fields

    return read


def _moe(config: _Config) -> Fields:
    """Qwen3-MoE: ``decoder_sparse_step`` and ``mlp_only_layers`` say which layers."""
    layers = config.need("num_hidden_layers")
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers", [])
    sparse = sum((layer + 1) % step == 0 and layer not in dense for layer in range(layers))
    return {
        "experts": config.need("num_experts"),
        "experts_per_token": config.need("num_experts_per_tok"),
        "moe_ffn": config.need("moe_intermediate_size"),
        "moe_layers": sparse,
    }


def _mixtral(config: _Config) -> Fields:
    return {
        "experts": config.need("num_local_experts"),
        "experts_per_token": config.need("num_experts_per_tok"),
        "moe_ffn": config.need("intermediate_size"),
        "moe_layers": config.need("num_hidden_layers"),
    }


def _gpt_oss(config: _Config) -> Fields:
    experts = _mixtral(config) | {"head_dim": config.need("head_dim")}
    return experts | _windows(config, _alternating(config, 2))


def _deepseek(config: _Config) -> Fields:
    layers = config.need("num_hidden_layers")
    first = config.get("first_k_dense_replace", 0)
    every = config.get("moe_layer_freq", 1)
    sparse = sum(layer >= first and layer % every == 0 for layer in range(layers))
    return {
        "attention": "mla",
        "query_rank": config.get("q_lora_rank", 0),
        "kv_rank": config.need("kv_lora_rank"),
        "rope_dim": config.need("qk_rope_head_dim"),
        "head_dim": config.need("qk_nope_head_dim"),
        "value_dim": config.need("v_head_dim"),
        "experts": config.need("n_routed_experts"),
        "experts_per_token": config.need("num_experts_per_tok"),
        "shared_experts": config.get("n_shared_experts", 0),
        "moe_ffn": config.need("moe_intermediate_size"),
        "moe_layers": sparse,
    }


_READERS: dict[str, Callable[[_Config], Fields]] = {
    "llama": _plain,
    "mistral": _plain,
    "qwen2": _plain,
    "qwen3": _plain,
    "qwen3_moe": _moe,
    "mixtral": _mixtral,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "gpt_oss": _gpt_oss,
    "gemma": _gemma(0),
    "gemma2": _gemma(2),
    "gemma3": _gemma(6),
}


# --- precision ----------------------------------------------------------------


def _precision(config: _Config, dtype: str | None) -> Fields:
    """Bytes per value and the dtype of products."""
    wanted = dtype or config.get("dtype") or config.get("torch_dtype", "bfloat16")
    if wanted not in _DTYPES:
        raise ModelShapeError(f"dtype {wanted!r}: known are {', '.join(sorted(_DTYPES))}")
    compute, size = _DTYPES[wanted]
    fields: Fields = {
        "dtype_bytes": size,
        "weight_bytes": size,
        "kv_bytes": size,
        "compute": compute,
        "plain_compute": compute,
    }
    quantization = config.get("quantization_config")
    if not quantization:
        return fields
    method = quantization.get("quant_method")
    if method == "fp8":
        return fields | {"weight_bytes": 1.0, "compute": "fp8"}
    if method == "mxfp4":  # experts only; Hopper has no FP4, so products are in BF16
        return fields | {"expert_bytes": MXFP4_BYTES}
    if method in ("awq", "gptq"):
        group = quantization.get("group_size", 128)
        bits = quantization.get("bits", 4)
        return fields | {"weight_bytes": bits / 8 + (2.0 / group if group > 0 else 0.0)}
    raise ModelShapeError(
        f"quantization_config.quant_method {method!r}: known are awq, fp8, gptq, mxfp4"
    )

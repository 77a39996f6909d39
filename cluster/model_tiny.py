"""A random, seeded Llama of a few million parameters, for tests that need speed, not sense.

Its greedy output varies and depends on every token of the prompt, near or far, so equal
output from two engines means equal KV. The tokenizer is a real byte-level BPE.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.model_folder import ModelError, Report, save_configuration, save_tokenizer

SEED = 20260425
VOCABULARY = 4096
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOOL_TOKENS = ("<tool_call>", "</tool_call>")


def build(folder: Path, report: Report) -> None:
    report("training a tokenizer", 0, 0)
    tokens = {
        "bos_token": SPECIAL_TOKENS[1],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "unk_token": SPECIAL_TOKENS[0],
    }
    save_tokenizer(folder, _train_tokenizer(), system="", context_tokens=8192, tokens=tokens)
    report("drawing weights", 0, 0)
    configuration = save_configuration(
        folder,
        "float32",
        10_000.0,
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    _save_random_weights(folder, configuration)


def _train_tokenizer() -> Any:
    """A byte-level BPE over Python's own help texts: English and code, always at hand."""
    from pydoc_data.topics import topics

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(TOOL_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((topics[name] for name in sorted(topics)), trainer)
    # Tokens of their own but not special, so that a tool call stays visible in the text.
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in TOOL_TOKENS])
    if backend.get_vocab_size() != VOCABULARY:
        raise ModelError(f"the tokenizer came out with {backend.get_vocab_size()} tokens")
    return backend


def _save_random_weights(folder: Path, configuration: Any) -> None:
    """Draws weights whose greedy output varies and depends on all of the context.

    With the usual small initial weights attention is flat and the output soon repeats one
    token. Here the attention scores have a standard deviation of about 4, so that each
    position looks at a few others wherever they are, and logits one of about 4. The control
    tokens' logits are 0, far below the greatest: random text never ends by chance.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    inner = configuration.hidden_size**-0.5
    deviations = {
        "embed_tokens": 1.0,
        "q_proj": 2.0 * inner,
        "k_proj": 2.0 * inner,
        "v_proj": inner,
        "o_proj": 0.5 * inner,
        "gate_proj": inner,
        "up_proj": inner,
        "down_proj": configuration.intermediate_size**-0.5,
        "lm_head": 4.0 * inner,
    }
    generator = torch.Generator().manual_seed(SEED)
    with torch.device("meta"):
        shapes = LlamaForCausalLM(configuration)
    weights = {}
    for name, shape in shapes.named_parameters():
        layer = name.split(".")[-2]
        weight = torch.ones(shape.shape, dtype=torch.float32, device="cpu")
        if layer in deviations:
            weight.normal_(0.0, deviations[layer], generator=generator)
        weights[name] = weight
    weights["lm_head.weight"][: len(SPECIAL_TOKENS)] = 0.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

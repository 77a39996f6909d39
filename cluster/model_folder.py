"""What every model folder made here has in common: chat template, tokenizer, configuration.

The template is ChatML with tools in the ``hermes`` format, which vLLM's tool parser of
that name reads. Written are the generic classes of transformers, never a model's own
tokenizer class: those rebuild the pre-tokenizer their own way.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

HASH_CHUNK_BYTES = 1 << 20

CHAT_TEMPLATE = """\
{%- if messages and messages[0].role == 'system' -%}
  {%- set system = messages[0].content or '' -%}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = @SYSTEM@ -%}
  {%- set turns = messages -%}
{%- endif -%}
{%- if system or tools or turns | length < messages | length -%}
  {{- '<|im_start|>system\\n' + system -}}
  {%- if tools -%}
    {{- '\\n\\nYou may call these functions:\\n<tools>' -}}
    {%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
    {{- '\\n</tools>\\n\\nTo call one, write its name and arguments as JSON:\\n<tool_call>\\n' -}}
    {{- '{"name": <function name>, "arguments": <arguments object>}\\n</tool_call>' -}}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for turn in turns -%}
  {{- '<|im_start|>' + turn.role + '\\n' -}}
  {%- if turn.role == 'tool' -%}
    {{- '<tool_response>\\n' + (turn.content or '') + '\\n</tool_response>' -}}
  {%- else -%}
    {{- turn.content or '' -}}
    {%- for call in turn.tool_calls or [] -%}
      {%- if turn.content or not loop.first -%}{{- '\\n' -}}{%- endif -%}
      {{- '<tool_call>\\n{"name": ' + (call.function.name | tojson) + ', "arguments": ' -}}
      {%- if call.function.arguments is string -%}{{- call.function.arguments -}}
      {%- else -%}{{- call.function.arguments | tojson -}}{%- endif -%}
      {{- '}\\n</tool_call>' -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


class ModelError(Exception):
    """A model could not be made: its input is missing, wrong or unreachable."""


class Report(Protocol):
    """Is told how far a build is: the step, and units done of a total (0: unknown)."""

    def __call__(self, step: str, done: int, total: int) -> None: ...


def silent(step: str, done: int, total: int) -> None:
    """The report for callers that do not watch."""


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def save_tokenizer(
    folder: Path, backend: Any, *, system: str, context_tokens: int, tokens: dict[str, str]
) -> None:
    """Writes tokenizer.json, its configuration and the chat template.

    ``tokens`` names the bos, eos, pad and unk tokens.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=context_tokens,
        **tokens,
    )
    tokenizer.chat_template = CHAT_TEMPLATE.replace("@SYSTEM@", json.dumps(system))
    tokenizer.save_pretrained(folder)


def save_configuration(folder: Path, dtype: str, rope_theta: float, **settings: Any) -> Any:
    """Writes config.json and generation_config.json of a Llama; returns the configuration."""
    from transformers import GenerationConfig, LlamaConfig

    configuration = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        **settings,
    )
    configuration.save_pretrained(folder)
    ids = {key: settings[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)
    return configuration

"""vLLM's server arguments as an API process makes them of a cluster's configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.api.process import server_arguments
from coordinator.server import CoordinatorConfig


def config(model: Path, **engine: object) -> CoordinatorConfig:
    return CoordinatorConfig(
        "tcp://127.0.0.1:1", "127.0.0.1", 1, str(model), api_keys=["key"], engine=engine
    )


def test_groups_written_as_mappings_become_vllms_own(tiny_model: Path) -> None:
    arguments = server_arguments(
        config(
            tiny_model,
            structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
        )
    )
    assert arguments.structured_outputs_config.disable_any_whitespace is True
    assert not arguments.structured_outputs_config.reasoning_parser


def test_what_clients_need_is_on_unless_said_otherwise(tiny_model: Path) -> None:
    arguments = server_arguments(config(tiny_model))
    assert arguments.enable_prompt_tokens_details
    assert arguments.api_key == ["key"]
    assert not server_arguments(
        config(tiny_model, enable_prompt_tokens_details=False)
    ).enable_prompt_tokens_details


def test_an_unknown_argument_is_named(tiny_model: Path) -> None:
    with pytest.raises(SystemExit, match="no argument 'colour'"):
        server_arguments(config(tiny_model, colour="red"))

"""Which arguments the installed vLLM knows, without importing it, and which are ours.

Importing vLLM takes ten seconds, so the names are read from its source text. Where vLLM
is not installed nothing is known and every name passes; the engine then decides.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path

_NOT_PER_ENGINE = "a worker is one engine: add entries to 'workers' instead"
_KV_IS_OURS = "Pythia sets up KV transfer between workers itself"
_HTTP_IS_OURS = "set it under 'api' (host, port, keys)"

RESERVED_ENGINE_ARGUMENTS = {
    "model": "set 'model' at the top level",
    "served_model_name": "set 'served_model_name' at the top level",
    "kv_transfer_config": _KV_IS_OURS,
    "kv_events_config": _KV_IS_OURS,
    "node_rank": "say it to each node's 'pythia worker', with --node-rank",
    "master_addr": "say it to each node's 'pythia worker', with --leader",
    "device_ids": "set 'devices' of the worker",
    "disable_log_stats": "Pythia needs the engine's statistics",
    "data_parallel_size": _NOT_PER_ENGINE,
    "data_parallel_rank": _NOT_PER_ENGINE,
    "data_parallel_start_rank": _NOT_PER_ENGINE,
    "data_parallel_size_local": _NOT_PER_ENGINE,
    "data_parallel_address": _NOT_PER_ENGINE,
    "data_parallel_rpc_port": _NOT_PER_ENGINE,
    "data_parallel_hybrid_lb": _NOT_PER_ENGINE,
    "data_parallel_external_lb": _NOT_PER_ENGINE,
    "data_parallel_multi_port_external_lb": _NOT_PER_ENGINE,
    "data_parallel_backend": _NOT_PER_ENGINE,
}
"""Engine arguments that a cluster file may not give, and what to do instead."""

RESERVED_API_ARGUMENTS = {
    "host": _HTTP_IS_OURS,
    "port": _HTTP_IS_OURS,
    "api_key": _HTTP_IS_OURS,
    "uds": "Pythia listens on 'api.host' and 'api.port'",
    "grpc_port": "Pythia speaks HTTP only",
    "tokens_only": "Pythia's API takes text",
    "enable_scale_out": "set 'api.servers'",
    "data_parallel_supervisor_port": _NOT_PER_ENGINE,
    "dp_supervisor_probe_interval_s": _NOT_PER_ENGINE,
    "dp_supervisor_probe_timeout_s": _NOT_PER_ENGINE,
    "dp_supervisor_probe_failure_threshold": _NOT_PER_ENGINE,
}
"""API server options that a cluster file may not give, and what to do instead."""


@functools.cache
def engine_argument_names() -> frozenset[str] | None:
    """Fields of vLLM's ``AsyncEngineArgs``; None when vLLM is not installed."""
    return _class_fields("engine/arg_utils.py", ("EngineArgs", "AsyncEngineArgs"))


@functools.cache
def api_argument_names() -> frozenset[str] | None:
    """Options of vLLM's OpenAI server; None when vLLM is not installed."""
    return _class_fields("entrypoints/launchers/cli_args.py", ("BaseFrontendArgs", "FrontendArgs"))


def _class_fields(relative: str, classes: tuple[str, ...]) -> frozenset[str] | None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    source = Path(spec.submodule_search_locations[0], relative)
    if not source.is_file():
        return None
    names = set()
    for statement in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.ClassDef) and statement.name in classes:
            names.update(_annotated_names(statement))
    return frozenset(names) or None


def _annotated_names(definition: ast.ClassDef) -> set[str]:
    return {
        statement.target.id
        for statement in definition.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }

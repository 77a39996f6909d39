"""vLLM's own HTTP server in an API process, over the cluster instead of an engine."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import uuid
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import is_dataclass
from multiprocessing import resource_tracker, shared_memory

import uvloop
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import serve_http, validate_api_server_args
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from coordinator.api import explain, roles, workflows
from coordinator.api.client import ClusterClient, ClusterEngineCore
from coordinator.api.front import Front
from coordinator.api.metrics import include_metrics
from coordinator.api.routes import router
from coordinator.api.static import StaticPrompts
from coordinator.api.templating import prompt_tokens
from coordinator.server import ApiStart, CoordinatorConfig

logger = logging.getLogger("pythia.api")

DEFAULTS: Mapping[str, object] = {
    "enable_prompt_tokens_details": True,
    "enable_request_id_headers": True,
    "disable_uvicorn_access_log": True,
}


def run(start: ApiStart) -> int:
    """Serve until SIGTERM. Returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    code: int = uvloop.run(_serve(start))
    return code


def server_arguments(config: CoordinatorConfig) -> Namespace:
    """vLLM's parsed server arguments. SystemExit with a message for one it does not have."""
    parser = make_arg_parser(FlexibleArgumentParser(prog="pythia"))
    arguments: Namespace = parser.parse_args([])
    given = {
        **DEFAULTS,
        **config.engine,
        **config.api_arguments,
        "model": config.model,
        "served_model_name": list(config.served_model_name) or [config.model],
        "host": config.api_host,
        "port": config.api_port,
        # Who may do more may do this, too; without API keys everybody may.
        "api_key": [*config.api_keys, *config.admin_keys] if config.api_keys else None,
    }
    for name, value in given.items():
        if not hasattr(arguments, name):
            raise SystemExit(f"vLLM's server has no argument {name!r}")
        default = getattr(arguments, name)
        if isinstance(value, dict) and is_dataclass(default) and not isinstance(default, type):
            # One of vLLM's configuration groups, written as a mapping in the cluster file.
            value = type(default)(**value)
        setattr(arguments, name, value)
    validate_parsed_serve_args(arguments)
    return arguments


async def _serve(start: ApiStart) -> int:
    config = start.config
    arguments = server_arguments(config)
    validate_api_server_args(arguments)
    vllm_config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config(
        usage_context=UsageContext.OPENAI_API_SERVER
    )
    name = f"api-{start.index}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    core = ClusterEngineCore(
        name,
        config.control_address,
        config.model,
        vllm_config,
        config.limits,
        config.workflow_limits,
    )
    client = ClusterClient(vllm_config, core)
    app = build_app(arguments, ("generate",), vllm_config.model_config)
    app.include_router(router)
    app.include_router(workflows.router)
    app.include_router(explain.router)
    app.include_router(roles.router)
    include_metrics(app)
    # vLLM's bootstrap has built the stack already; the front goes around all of it.
    app.middleware_stack = Front(
        app.middleware_stack or app.build_middleware_stack(), config.body_bytes_max
    )
    await init_app_state(client, app.state, arguments, ("generate",))
    app.state.admin_keys = tuple(config.admin_keys)
    prompts = StaticPrompts(core, prompt_tokens(app.state.serving_tokenization))
    app.state.static_prompts = core.errands.prompts = prompts
    telling = asyncio.create_task(prompts.keep_told(), name="static prompts")
    running = asyncio.create_task(core.run(), name="core link")
    serving = asyncio.create_task(_serve_http(app, arguments, start), name="HTTP server")
    # Told to stop, the server ends the link first, then itself.
    await asyncio.wait({running, serving, telling}, return_when=asyncio.FIRST_COMPLETED)
    if telling.done():
        telling.result()  # it never ends by itself but by an error of ours
    telling.cancel()
    failed = running.done() and (running.exception() is not None or bool(core.link.refused))
    if core.link.refused:
        logger.error("the core refused this API process: %s", core.link.refused)
    client.shutdown()
    if failed:
        serving.cancel()
    await asyncio.wait({running, serving})
    await running
    if not failed:
        await serving
    return 1 if failed else 0


async def _serve_http(app: object, arguments: Namespace, start: ApiStart) -> None:
    listener = socket.socket(fileno=start.listen_fd)
    loads = shared_memory.SharedMemory(name=start.loads_name)
    # The coordinator owns the segment; this process must not remove it at its end.
    resource_tracker.unregister(loads._name, "shared_memory")  # type: ignore[attr-defined]
    assert loads.buf is not None
    several = start.config.api_servers > 1
    options = {}
    if (log_config := get_uvicorn_log_config(arguments)) is not None:
        options["log_config"] = log_config
    # Views of the memory have to be gone before it can be let go.
    with loads.buf.cast("i") as slots, slots[: start.config.api_servers] as shares:
        if not several:
            # vLLM's server says that it serves only where there are others to know.
            shares[start.index] = 0
        await _serve_until_stopped(
            app, arguments, listener, (shares, start.index) if several else None, options
        )
    loads.close()


async def _serve_until_stopped(
    app: object,
    arguments: Namespace,
    listener: socket.socket,
    peer_loads: tuple[memoryview[int], int] | None,
    options: dict[str, object],
) -> None:
    shutdown = await serve_http(
        app,
        sock=listener,
        peer_loads=peer_loads,
        host=arguments.host,
        port=arguments.port,
        log_level=arguments.uvicorn_log_level,
        access_log=not arguments.disable_uvicorn_access_log,
        timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        ssl_keyfile=arguments.ssl_keyfile,
        ssl_certfile=arguments.ssl_certfile,
        ssl_ca_certs=arguments.ssl_ca_certs,
        ssl_cert_reqs=arguments.ssl_cert_reqs,
        ssl_ciphers=arguments.ssl_ciphers,
        h11_max_incomplete_event_size=arguments.h11_max_incomplete_event_size,
        h11_max_header_count=arguments.h11_max_header_count,
        **options,
    )
    await shutdown

"""A worker's process: protects its children, sets its environment, starts the engine, serves.

The environment has to be right before vLLM is imported, so nothing here imports it early.
"""

from __future__ import annotations

import gc
import logging
import time

import uvloop

from cluster.config import WorkerConfig
from cluster.follower import begin_process, engine_named
from cluster.process import announce

logger = logging.getLogger("pythia.worker")

ENGINE_STOP_S = 5.0


def main(config: WorkerConfig) -> int:
    """Start the engine, serve, stop. Returns the process's exit code."""
    begin_process(config)
    announce("importing vLLM")
    from cluster.engine import start_engine
    from cluster.kv_listener import Endpoints
    from cluster.serving import serve

    announce(f"loading {config.model}")
    started_s = time.monotonic()
    endpoints = Endpoints()
    arguments = config.engine_arguments() | {"kv_events_config": endpoints.config()}
    with engine_named(config, arguments):
        engine = start_engine(arguments, metrics=config.metrics_port > 0)
        announce(f"engine is up after {time.monotonic() - started_s:.0f} s")
        # All that vLLM's import has made stays for good: a look at it takes a tenth of a second,
        # in the middle of somebody's answer.
        gc.collect()
        gc.freeze()
        try:
            code: int = uvloop.run(serve(config, engine, endpoints))
            return code
        finally:
            engine.shutdown(timeout=ENGINE_STOP_S)
            endpoints.close()

"""The further nodes of an engine that spans several: vLLM's executor without an engine.

The engine runs with the first node, its leader, which is a worker like any other
(``cluster.worker``). Each further node runs this: as many of the engine's processes as it
has GPUs. They meet at the leader's address, where vLLM's own meeting point is, and a store
of torch's that says which engine this is: its peers know it by that name, all its ranks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from cluster import node_place, reaper
from cluster.config import WorkerConfig
from cluster.process import announce
from coordinator.link import refuse_pickle

logger = logging.getLogger("pythia.follower")

ENGINE_ID = "engine_id"
NAME_PORT = 29_502
"""Of the leader: where the others ask for the engine's id. vLLM meets on the one before."""
MEET_S = 600.0
WATCH_S = 2.0


@contextlib.contextmanager
def engine_named(config: WorkerConfig, arguments: dict[str, Any]) -> Iterator[None]:
    """While its block runs, a leader tells its followers which engine this is.

    They end when it does not answer any more.
    """
    if not config.leader:
        yield
        return
    store = _store(config)
    store.set(ENGINE_ID, arguments["kv_transfer_config"]["engine_id"])
    yield
    del store


def _store(config: WorkerConfig) -> Any:
    from torch.distributed import TCPStore

    return TCPStore(
        config.leader,
        NAME_PORT,
        world_size=config.engine.get("nnodes", 1),
        is_master=config.node_rank == 0,
        timeout=timedelta(seconds=MEET_S),
        wait_for_workers=False,
    )


def _end_with_leader(store: Any) -> None:
    """Waits for the leader's end, then ends this process. vLLM's own would wait for ever."""
    try:
        while store.check([ENGINE_ID]):
            time.sleep(WATCH_S)
    except RuntimeError as error:
        logger.warning("the leader is gone: %s", error)
    os.kill(os.getpid(), signal.SIGTERM)


def begin_process(config: WorkerConfig) -> None:
    """What every process of an engine does before it imports vLLM or starts threads."""
    reaper.protect_group()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    os.environ.update(config.process_environment())
    node_place.apply(config)
    refuse_pickle(os.environ)


def main(config: WorkerConfig) -> int:
    """Runs this node's part until the leader is gone. Returns the process's exit code."""
    begin_process(config)
    announce("asking the leader which engine this is")
    store = _store(config)
    engine_id = store.get(ENGINE_ID).decode()
    threading.Thread(target=_end_with_leader, args=(store,), name="leader", daemon=True).start()
    announce("importing vLLM")
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    arguments = config.engine_arguments()
    transfer = arguments["kv_transfer_config"] | {"engine_id": engine_id}
    arguments["kv_transfer_config"] = KVTransferConfig(**transfer)
    announce(f"loading {config.model}")
    vllm_config = AsyncEngineArgs(**arguments).create_engine_config(
        UsageContext.ENGINE_CONTEXT, headless=True
    )
    executor = MultiprocExecutor(vllm_config, monitor_workers=False)
    announce(f"part of {engine_id}")
    # Returns when a process of this node has ended.
    executor.start_worker_monitor(inline=True)
    return 1

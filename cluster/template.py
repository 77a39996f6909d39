"""The process that imports vLLM once for a whole cluster on this machine's CPU.

Importing vLLM takes longer than all the rest of a worker's start. The launcher starts one
template, and forks from it (``cluster.fork``) the coordinator, which forks its API process,
and the workers. It ends as soon as they are started.

Which processes those are: all whose environment is the same where it matters when vLLM and
its libraries are loaded. Whatever differs, and everything that has a GPU, starts as a fresh
interpreter: a process that may have touched CUDA can't be forked.

As a program, ``python -m cluster.template MODEL`` is that process; standard input is its
connection. It never imports NIXL, which reads a worker's own variables and starts threads.
"""

from __future__ import annotations

import logging
import os
import select
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import fork
from cluster.child import Child, ChildProcess, start_guarded
from cluster.config import coordinator_config, worker_config
from cluster.process import announce
from cluster.schema import ClusterConfig

if TYPE_CHECKING:
    from coordinator.server import ApiProcess, StartProcess

logger = logging.getLogger("pythia.coordinator")

TEMPLATE = "vllm_template"
"""Its name among the processes, which no worker can have."""
READY = b"ready"
SINGLE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
"""OpenBLAS starts its threads when it is loaded, and a template must have none."""
SHARERS_MIN = 2
"""For fewer processes than these, a template saves nothing."""


class Template:
    """A running template as the launcher sees it."""

    def __init__(
        self, command: Sequence[str], log_path: Path, environment: Mapping[str, str]
    ) -> None:
        """Starts ``command``. To be called from a thread that lives as long as the launcher."""
        connection, theirs = fork.pair()
        with theirs:
            start = partial(start_guarded, stdin=theirs.fileno(), environment=environment)
            self.child = Child(TEMPLATE, command, log_path, start)
        self._original = fork.Original(connection, own_session=True)
        self._ready = False

    def is_ready(self) -> bool:
        """True once all is imported. False for ever if it has died: look at ``child``."""
        waiting = select.poll()
        waiting.register(self._original.connection, select.POLLIN)
        if not self._ready and waiting.poll(0):
            self._ready = self._original.connection.recv(len(READY)) == READY
        return self._ready

    def start(self, command: Sequence[str], log: int) -> ChildProcess:
        """Forks a process that does what ``command`` would; a fresh one if that can't be."""
        with open(os.devnull) as nothing:
            try:
                return self._original.start(command, {0: nothing.fileno(), 1: log, 2: log})
            except fork.CanNotFork as error:
                os.write(log, f"starting from nothing: {error}\n".encode())
                return start_guarded(command, log)

    def stop(self) -> None:
        """Ends it; what was forked from it stays."""
        self._original.close()
        self.child.finish()


def shared_environment(
    config: ClusterConfig, model: str, coordinator: str
) -> tuple[dict[str, str], list[str]]:
    """The environment for a template, and who may be forked from it; nobody without reason.

    ``coordinator`` is its name among the processes. ``model``: folder or id.
    """
    if any(entry.devices for entry in config.workers):
        return {}, []
    wanted = {
        entry.name: worker_config(config, entry.name, model).environment for entry in config.workers
    }
    # With several API processes their metrics are kept in files, which is decided at import.
    if config.api.servers == 1:
        wanted[coordinator] = coordinator_config(config, model).environment
    sharers = max(
        ([name for name in wanted if wanted[name] == each] for each in wanted.values()),
        key=len,
        default=[],
    )
    if len(sharers) < SHARERS_MIN:
        return {}, []
    return SINGLE_THREAD | wanted[sharers[0]], sharers


def api_starter() -> StartProcess:
    """How a coordinator starts its API processes: by forks of itself if it was forked.

    To be called while it has a single thread. If that fails later, by fresh interpreters.
    """
    from coordinator.server import start_fresh

    if "coordinator.api.process" not in sys.modules:
        return start_fresh
    original = fork.split_off()

    def start(command: Sequence[str], stdin: int, inherited: int) -> ApiProcess:
        try:
            return original.start(command, {0: stdin, inherited: inherited})
        except fork.CanNotFork as error:
            logger.warning("starting an API process from nothing: %s", error)
            return start_fresh(command, stdin, inherited)

    return start


def main(model: str) -> None:
    """Imports, says so, forks on request; ends with the launcher's interest."""
    connection = fork.connection_on_stdin()
    announce("importing vLLM")
    import cluster.serving  # noqa: F401
    import coordinator.api.process  # noqa: F401
    from cluster.engine import import_model

    import_model(model)
    connection.send(READY)
    fork.serve(connection)


if __name__ == "__main__":
    main(sys.argv[1])

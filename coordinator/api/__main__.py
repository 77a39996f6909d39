"""An API process: reads its start from standard input, then serves until it is told to stop."""

from __future__ import annotations

import os
import sys

import msgspec

from coordinator.link import refuse_pickle
from coordinator.server import ApiStart


def main() -> int:
    """Set the environment, then import vLLM, then serve."""
    start = msgspec.json.decode(sys.stdin.buffer.read(), type=ApiStart)
    os.environ.update(start.config.environment)
    refuse_pickle(os.environ)
    if start.metrics_dir:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = start.metrics_dir
    from coordinator.api.process import run

    return run(start)


if __name__ == "__main__":
    sys.exit(main())

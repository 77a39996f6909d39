"""A worker process without a model: all of a worker but its engine, which is a fake.

``python -m cluster.fake_worker --config cluster.yaml --name decode-0 [--step-s 0.02]`` takes
the place of ``pythia worker``; it registers, beats, answers probes, gives and takes handles,
and says tokens at will or at a set rate. Nothing it says means anything.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import msgspec
import uvloop

from cluster.config import load, worker_config
from cluster.process import announce


def main(arguments: list[str] | None = None) -> int:
    """Serve until told to stop. Returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m cluster.fake_worker")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--name", required=True)
    for option in ("--step-s", "--prefill-s-per-token", "--transfer-s"):
        parser.add_argument(option, type=float, default=0.0)
    given = vars(parser.parse_args(arguments))
    cluster = load(given.pop("config"))
    config = worker_config(cluster, given.pop("name"), cluster.model)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    os.environ.update(config.process_environment())
    announce("importing vLLM")
    from cluster.fake_engine import Behaviour, fake_engine
    from cluster.serving import serve

    engine = fake_engine(
        {**config.engine, "model": config.model}, config.name, msgspec.convert(given, Behaviour)
    )
    announce("fake engine is up")
    try:
        code: int = uvloop.run(serve(config, engine))
        return code
    finally:
        engine.shutdown()


def command(config_path: Path, name: str, *options: str) -> list[str]:
    """The command line that starts one, in a ``LocalCluster``'s ``command_of`` for instance."""
    import sys

    python = [sys.executable, "-m", "cluster.fake_worker"]
    return [*python, "--config", str(config_path), "--name", name, *options]


if __name__ == "__main__":
    raise SystemExit(main())

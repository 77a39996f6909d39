"""A Slurm job's program with the product's own coordinator and workers without a model.

``python -m tests.deploy.fake_workers FILE NODES [THEN]``, inside of a job.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from cluster import fake_worker
from cluster.config import load
from cluster.launch import COORDINATOR, process_command
from cluster.slurm import JobRequest
from cluster.slurm_job import run


def command_of(name: str, config_path: Path) -> list[str]:
    """The coordinator's own command; a fake worker's for the others."""
    if name == COORDINATOR:
        return process_command(name, config_path)
    return fake_worker.command(config_path, name, "--step-s", "0.005")


if __name__ == "__main__":
    file, nodes, *then = sys.argv[1:]
    request = JobRequest(nodes=int(nodes), then=then[0] if then else None)
    raise SystemExit(run(load(Path(file)), request, Console(), command_of))

"""``pythia demo``: a cluster on this machine, the example workflow through it, and the end.

The workflow is the repository's own example, run as the separate program that it is.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
from rich.console import Console

from cluster.launch import LaunchError, LocalCluster
from cluster.schema import ClusterConfig
from cluster.supervise import run, say

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "research_team.py"


def demo(config: ClusterConfig, console: Console, json_path: Path | None) -> int:
    """Starts ``config`` on free ports, runs the example, stops. Returns the example's exit code.

    LaunchError if there is no example here or the cluster does not start.
    """
    if not EXAMPLE.is_file():
        raise LaunchError(f"{EXAMPLE} is missing: the demo needs the repository, not only a wheel")
    config = msgspec.structs.replace(
        config,
        name="demo",
        coordinator=msgspec.structs.replace(config.coordinator, port=0),
        api=msgspec.structs.replace(config.api, port=0),
    )
    return run(config, console, lambda cluster: _run_example(cluster, console, json_path))


def _run_example(cluster: LocalCluster, console: Console, json_path: Path | None) -> int:
    say(console, f"the cluster is ready at {cluster.base_url}; running {EXAMPLE.name}")
    command = [sys.executable, str(EXAMPLE), "--base-url", f"{cluster.base_url}/v1"]
    if cluster.config.api.keys:
        command += ["--api-key", cluster.config.api.keys[0]]
    if json_path is not None:
        command += ["--json", str(json_path)]
    return subprocess.run(command, check=False).returncode

"""Engines on vLLM's Ray executor, which spans nodes too: asked for by an engine argument.

A real Ray runs here, and the decode engine of a cluster has its model in an actor of it. One thing
is made up: that the CPU is a device of Ray's. vLLM knows no Ray on CPUs (its platform's
``ray_device_key`` is empty), so a platform of vLLM's plugin interface names Ray's GPUs instead;
nothing else of the platform changes.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.e2e.harness import Control, Server, wait_for
from tests.e2e.test_pulls import (
    SHARED_TOKENS,
    ask,
    assert_same,
    completion,
    config_of,
    external,
    fresh_tokens,
    running,
)

PLUGIN = {
    "ray_on_cpu.py": """
from vllm.platforms.cpu import CpuPlatform

class RayOnCpu(CpuPlatform):
    ray_device_key = "GPU"

def name():
    return "ray_on_cpu.RayOnCpu"
""",
    "ray_on_cpu-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: ray-on-cpu\nVersion: 1\n",
    "ray_on_cpu-1.dist-info/entry_points.txt": "[vllm.platform_plugins]\nray = ray_on_cpu:name\n",
}
START_S = 60.0
AUTHENTICATION = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The platform, as an installed package for all processes that are started."""
    for name, text in PLUGIN.items():
        path = tmp_path / "plugin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    paths = [str(tmp_path / "plugin"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))


@pytest.fixture
def ray_address(plugin: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a Ray of one node with one device."""
    # Its sockets lie there, and their paths may not be long.
    directory = tmp_path_factory.mktemp("r")
    command = "start --head --block --port 0 --min-worker-port 0 --max-worker-port 0 "
    command += "--dashboard-agent-listen-port 0 "
    command += "--num-cpus 2 --num-gpus 1 --include-dashboard false --object-store-memory 80000000 "
    command += f"--disable-usage-stats --temp-dir {directory}"
    with (directory / "log").open("w") as log:
        ray = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *command.split()],
            env=os.environ | AUTHENTICATION,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        text = (directory / "log").read_text
        wait_for(lambda: "Ray runtime started" in text() or ray.poll() is not None, START_S, "Ray")
        started = re.search(r"--address='(.+)'", text())
        assert started is not None, text()
        yield started[1]
    finally:
        ray.send_signal(signal.SIGTERM)
        try:
            ray.wait(30.0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ray.pid, signal.SIGKILL)


def test_an_engine_in_an_actor_reads_and_decodes(
    ray_address: str, oracle: Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = config_of(
        "  - {name: prefill-0, role: prefill}\n"
        "  - {name: decode-0, role: decode, engine: {distributed_executor_backend: ray}}\n",
        "{disaggregated: always}",
        "{queue_s: 60}",
    )
    config = msgspec.structs.replace(
        config,
        environment=config.environment | {"RAY_ADDRESS": ray_address} | AUTHENTICATION,
    )
    with running(config, tmp_path_factory.mktemp("ray")) as server:
        before = external(config, "decode-0")
        prompt = completion(fresh_tokens(SHARED_TOKENS), 12)
        ours = ask(server, prompt)
        assert ours.headers["X-Pythia-Prefill"] == "prefill-0"
        assert int(ours.headers["X-Pythia-Moved-Tokens"]) == SHARED_TOKENS
        assert external(config, "decode-0") - before == SHARED_TOKENS
        assert_same(ours, oracle, prompt)
        with contextlib.closing(Control(server.control_address)) as control:
            assert control.wait_until_quiet().counters["replans"] == 0

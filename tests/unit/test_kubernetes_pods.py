"""What the manifests' pods run, run: each on a loopback address of its own, as pods have theirs.

One engine spans two nodes, that is two processes with half of the model each; it reads KV that
an engine of one process holds, and says what that one says.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from cluster.kubernetes.command import options_of, render
from cluster.process import free_port
from cluster.status import Unreachable, inspect

START_S = 400.0
END_S = 60.0
KEY = "sk-of-the-test"
FILE = """\
model: tiny-llama
engine: {{dtype: float32, enforce_eager: true, block_size: 32, max_model_len: 1024,
  max_num_seqs: 8}}
environment: {{VLLM_CPU_KVCACHE_SPACE: 1}}
workers:
  - {{name: prefill-0, role: prefill}}
  - {{name: decode-0, role: decode}}
coordinator: {{port: {control}, store: ""}}
api: {{port: {api}, keys: [{key}]}}
placement: {{remote_prefill_min_tokens: 16, disaggregated: always}}
"""
SPANNING = {"tensor_parallel_size": 2, "nnodes": 2, "distributed_executor_backend": "mp"}


def wait_for(question: Callable[[], bool], processes: list[subprocess.Popen[bytes]]) -> None:
    deadline_s = time.monotonic() + START_S
    while not question():
        assert time.monotonic() < deadline_s, "not in time"
        assert [process.poll() for process in processes] == [None] * len(processes)
        time.sleep(0.5)


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@contextmanager
def pod(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "cluster", *arguments]
    environment = os.environ | {"PYTHIA_RUN_DIR": str(log.parent)}
    root = Path(__file__).parents[2]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=root, env=environment
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_the_manifests_commands_are_a_cluster_also_with_an_engine_on_two_nodes(
    tiny_model: Path, tmp_path: Path
) -> None:
    control, api = free_port("127.0.0.1"), free_port("127.0.0.1")
    path = tmp_path / "team.yaml"
    path.write_text(FILE.format(control=control, api=api, key=KEY))
    objects = [each for group in render(path, options_of({})).values() for each in group]
    named = {(each["kind"], each["metadata"]["name"]): each for each in objects}
    folder = tmp_path / "pythia"
    folder.mkdir()
    text = named["ConfigMap", "team-config"]["data"]["cluster.yaml"]
    (folder / "cluster.yaml").write_text(text)
    keys = named["Secret", "team-keys"]["stringData"]["api-keys"]
    (tmp_path / "pythia-keys").mkdir()
    (tmp_path / "pythia-keys/api-keys").write_text(keys)

    def arguments(kind: str, name: str, address: str = "") -> list[str]:
        (container,) = named[kind, name]["spec"]["template"]["spec"]["containers"]
        variables = {"POD_INDEX": "0", "POD_IP": address}
        words = [
            re.sub(r"\$\(([A-Z_]+)\)", lambda found: variables[found[1]], word)
            for word in container["args"]
        ]
        # Nothing is called so here, and nothing is mounted there.
        words = [word.replace("team-core", "127.0.0.1") for word in words]
        return [word.replace("/etc/", f"{tmp_path}/") for word in words]

    spanning = yaml.safe_load(text)
    spanning["workers"][1] |= {"engine": SPANNING}
    (folder / "spanning.yaml").write_text(yaml.safe_dump(spanning))

    def node(rank: int) -> list[str]:
        words = arguments("StatefulSet", "team-decode", f"127.0.0.{4 + rank}")
        words = [word.replace("cluster.yaml", "spanning.yaml") for word in words]
        return [*words, "--name", "decode-1", "--node-rank", str(rank), "--leader", "127.0.0.4"]

    def ask(words: str) -> tuple[str, dict[str, str]]:
        body = {"model": "tiny-llama", "prompt": words, "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{api}/v1/completions",
            msgspec.json.encode(body),
            {"content-type": "application/json", "authorization": f"Bearer {KEY}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = msgspec.json.decode(answer.read())
            return found["choices"][0]["text"], {k.lower(): v for k, v in answer.headers.items()}

    def warm(workers: int) -> bool:
        try:
            rows = inspect(f"tcp://127.0.0.1:{control}").workers
        except Unreachable:
            return False
        up = [row for row in rows if row.state == "up" and row.warm_peers == workers - 1]
        return len(up) == workers

    with ExitStack() as stack:

        def run(words: list[str], log: str) -> subprocess.Popen[bytes]:
            return stack.enter_context(pod(words, tmp_path / log))

        coordinator = run(arguments("Deployment", "team-coordinator"), "coordinator.log")
        prefill = run(arguments("StatefulSet", "team-prefill", "127.0.0.2"), "prefill.log")
        decode = run(arguments("StatefulSet", "team-decode", "127.0.0.3"), "decode.log")
        wait_for(lambda: warm(2), [coordinator, prefill, decode])
        wait_for(lambda: status_of(f"http://127.0.0.1:{api}/ready") == 200, [coordinator])
        assert status_of("http://127.0.0.2:5572/ready") == 200
        assert status_of("http://127.0.0.3:5572/live") == 200
        assert status_of(f"http://127.0.0.1:{api}/v1/models") == 401
        prompt = " ".join(str(number) for number in range(120))
        expected, headers = ask(prompt)
        assert (headers["x-pythia-prefill"], headers["x-pythia-decode"]) == (
            "prefill-0",
            "decode-0",
        )

        leader, follower = run(node(0), "leader.log"), run(node(1), "follower.log")
        wait_for(lambda: warm(3), [coordinator, prefill, leader, follower])
        decode.send_signal(signal.SIGTERM)
        assert decode.wait(END_S) == 0
        text, headers = ask(prompt)
        assert headers["x-pythia-decode"] == "decode-1"
        assert int(headers["x-pythia-moved-tokens"]) > 64
        assert text == expected

        leader.send_signal(signal.SIGTERM)
        assert leader.wait(END_S) == 0
        assert follower.wait(END_S) != 0
        coordinator.send_signal(signal.SIGTERM)
        assert coordinator.wait(END_S) == 0

"""Processes that are forked from one that has imported everything, with stand-ins for them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.child import Child, stop_all
from cluster.config import parse
from cluster.launch import COORDINATOR, LaunchError, LocalCluster
from cluster.process import identify, kill_session, session_members
from cluster.progress import Row
from cluster.schema import ClusterConfig
from cluster.template import TEMPLATE, Template, shared_environment
from tests.unit.standin import forking_command_of

ROOT = Path(__file__).parents[2]
STANDIN = Path(__file__).with_name("standin.py")
WAIT_S = 60.0
READY_PROGRAM = (
    "import threading, time; from cluster import fork, template;"
    "connection = fork.connection_on_stdin(); connection.send(template.READY)"
)


def text_of(*workers: str, more: str = "") -> str:
    lines = "\n".join(f"  - {{role: mixed, {worker}}}" for worker in workers)
    return (
        f"model: {ROOT}\nserved_model_name: nothing\nname: standin\nworkers:\n{lines}\n"
        f"coordinator: {{port: 0}}\nstart: {{timeout_s: 30}}\n{more}"
    )


def config_of(*workers: str, more: str = "api: {port: 0}\n") -> ClusterConfig:
    return parse(text_of(*workers, more=more), "standin.yaml")


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not within {WAIT_S} s"
        time.sleep(0.02)


def said_by(cluster: LocalCluster, name: str) -> dict[str, Any]:
    """What a stand-in worker has noted about itself."""
    log = cluster.log_path(name)
    wait_until(lambda: "waiting" in log.read_text(), f"{name}'s start")
    return noted(log)


def noted(log: Path) -> dict[str, Any]:
    (line,) = (line for line in log.read_text().splitlines() if line.startswith("{"))
    found: dict[str, Any] = json.loads(line)
    return found


class Recorder:
    """Notes what is shown."""

    def __init__(self) -> None:
        self.shown: set[tuple[str, str]] = set()

    def show(self, rows: list[Row], elapsed_s: float) -> None:
        self.shown |= {(row.label, row.phase) for row in rows}

    def close(self) -> None:
        pass


class TestLocalCluster:
    def test_processes_are_forked_and_are_the_launchers_own(self, tmp_path: Path) -> None:
        config = config_of("name: one", "name: two, environment: {LATE: 1}", "name: three")
        recorder = Recorder()
        cluster = LocalCluster(
            config, log_dir=tmp_path, progress=recorder, command_of=forking_command_of
        )
        with cluster:
            assert set(cluster.processes) == {COORDINATOR, "one", "two", "three"}
            for name in ("one", "three"):
                about, pid = said_by(cluster, name), cluster.workers[name]
                assert about["forked"]
                assert about["session"] == pid
                assert about["parent"] == os.getpid()
                assert about["stdin"] == "/dev/null"
                assert about["files"] <= 4, "it has open what is not its own"
                assert about["environment"]["OPENBLAS_NUM_THREADS"] == "1"
                assert f"standin {name}" in command_line(pid)
            os.kill(cluster.workers["one"], signal.SIGKILL)
            wait_until(cluster.dead, "death of the worker")
            assert "one was killed by SIGKILL" in cluster.dead()[0].obituary()
            pids = list(cluster.processes.values())
        assert not any(session_members(pid) for pid in pids)
        assert ("worker three", "importing the heavy module") in recorder.shown

    def test_another_environment_at_load_is_no_fork(self, tmp_path: Path) -> None:
        config = config_of("name: one", "name: two, environment: {LATE: 1}", "name: three")
        with LocalCluster(config, log_dir=tmp_path, command_of=forking_command_of) as cluster:
            assert said_by(cluster, "one")["forked"]
            assert not said_by(cluster, "two")["forked"]

    def test_the_template_does_not_stay(self, tmp_path: Path) -> None:
        config = config_of("name: one", "name: two")
        with LocalCluster(config, log_dir=tmp_path, command_of=forking_command_of) as cluster:
            assert said_by(cluster, "one")["forked"]
            assert TEMPLATE not in " ".join(map(command_line, children_of(os.getpid())))

    def test_a_crash_is_seen_with_its_code(self, tmp_path: Path) -> None:
        cluster = LocalCluster(
            config_of("name: crash", "name: one"), log_dir=tmp_path, command_of=forking_command_of
        )
        with pytest.raises(
            LaunchError, match=r"(?s)crash exited with code 1.*tell the user.*that was all"
        ):
            cluster.start()
        cluster.stop()

    def test_a_template_that_fails_is_reported_with_its_log(self, tmp_path: Path) -> None:
        def command_of(name: str, path: Path) -> list[str]:
            if name == TEMPLATE:
                return [sys.executable, "-c", "raise SystemExit('there is no such module')"]
            return forking_command_of(name, path)

        others = children_of(os.getpid())
        cluster = LocalCluster(
            config_of("name: one", "name: two"), log_dir=tmp_path, command_of=command_of
        )
        with pytest.raises(LaunchError, match=r"(?s)exited with code 1.*there is no such module"):
            cluster.start()
        cluster.stop()
        assert children_of(os.getpid()) == others

    @pytest.mark.parametrize(
        "then",
        [
            "del connection; time.sleep(60)",
            "threading.Thread(target=time.sleep, args=(60,)).start(); fork.serve(connection)",
        ],
        ids=["gone", "threads"],
    )
    def test_what_can_not_be_forked_is_started_fresh(self, tmp_path: Path, then: str) -> None:
        def command_of(name: str, path: Path) -> list[str]:
            if name == TEMPLATE:
                return [sys.executable, "-c", f"{READY_PROGRAM}; {then}"]
            return forking_command_of(name, path)

        config = config_of("name: one", "name: two")
        with LocalCluster(config, log_dir=tmp_path, command_of=command_of) as cluster:
            assert not said_by(cluster, "one")["forked"]
            assert "starting from nothing: " in cluster.log_path("one").read_text()


def test_forked_processes_die_with_a_killed_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHIA_RUN_DIR", str(tmp_path / "run"))
    path = tmp_path / "standin.yaml"
    path.write_text(text_of("name: one", "name: stubborn", more="api: {port: 0}\n"))
    launcher = subprocess.Popen(
        [sys.executable, str(STANDIN), "up-forking", str(path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stdout=(tmp_path / "out").open("wb"),
    )
    try:
        wait_until(lambda: "is ready" in (tmp_path / "out").read_text(), "the cluster")
        family = children_of(launcher.pid)
        assert len(family) == 3
        launcher.kill()
        launcher.wait()
        wait_until(lambda: not any(session_members(pid) for pid in family), "their end")
    finally:
        kill_session(launcher.pid)
        launcher.wait()


@pytest.mark.engine
def test_the_real_template_can_be_forked_and_leaves_nixl_alone(
    tmp_path: Path, tiny_model: Path
) -> None:
    """A thread that vLLM starts at import would make every fork a fresh interpreter."""
    config = config_of("name: one", "name: two")
    environment, _ = shared_environment(config, str(tiny_model), COORDINATOR)
    command = [sys.executable, "-m", "cluster.template", str(tiny_model)]
    template = Template(command, tmp_path / "template.log", environment)
    try:
        wait_until(lambda: template.is_ready() or template.child.exit_code(), "vLLM")
        assert template.is_ready(), template.child.obituary()
        log = tmp_path / "one.log"
        child = Child("one", forking_command_of("one", tmp_path), log, template.start)
        wait_until(lambda: "waiting" in log.read_text(), "start")
        stop_all([child])
    finally:
        template.stop()
    about = noted(log)
    assert "vllm" in about["modules"], log.read_text()
    assert "nixl" not in about["modules"]


class TestWhoShares:
    def test_all_of_a_plain_cluster(self) -> None:
        config = config_of("name: one", "name: two")
        environment, names = shared_environment(config, "model", COORDINATOR)
        assert {"one", "two"} <= set(names)
        assert environment["OMP_NUM_THREADS"].isdecimal()
        assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"

    def test_nobody_where_there_is_a_gpu(self) -> None:
        config = config_of("name: one", "name: two", "name: three, devices: [0]")
        assert shared_environment(config, "model", COORDINATOR) == ({}, [])

    def test_several_api_processes_are_not_forked(self) -> None:
        config = config_of("name: one", "name: two", more="api: {port: 0, servers: 2}\n")
        assert shared_environment(config, "model", COORDINATOR)[1] == ["one", "two"]

    def test_nobody_if_no_two_are_alike(self) -> None:
        config = config_of("name: one, environment: {OMP_NUM_THREADS: 7}")
        assert shared_environment(config, "model", COORDINATOR) == ({}, [])


# --- API processes -----------------------------------------------------------------------------

# A coordinator that has "imported" what an API process needs. It starts one, another when that
# has died, and a third when there is nothing left to fork.
COORDINATING = """
import os, signal, socket, subprocess, sys, time, types
from pathlib import Path

def run(start):
    listener = socket.socket(fileno=start.listen_fd)
    Path(sys.path[0], "started").write_text(f"{os.getpid()} {listener.getsockname()[1]}.")
    time.sleep(60)

process = sys.modules["coordinator.api.process"] = types.ModuleType("coordinator.api.process")
process.run = run

from cluster import fork, template
from coordinator.server import ApiProcesses, CoordinatorConfig

starter = template.api_starter()
(original,) = map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
apis = ApiProcesses(CoordinatorConfig("tcp://127.0.0.1:*", "127.0.0.1", 0, "model"), starter)

def end():
    api = apis.processes[0]
    note = Path(sys.path[0], "started")
    while not (note.exists() and note.read_text().endswith('.')):
        assert api.poll() is None
        time.sleep(0.02)
    assert note.read_text() == f"{api.pid} {apis.listener.getsockname()[1]}."
    assert os.getsid(api.pid) == os.getsid(0)
    assert isinstance(api, fork.Forked)
    assert api.poll() is None
    note.unlink()
    api.terminate()
    assert api.wait(10) == -signal.SIGTERM == api.poll()

apis.start()
end()
apis._start(0)
end()
os.kill(original, signal.SIGKILL)
os.waitpid(original, 0)
apis._start(0)
assert isinstance(apis.processes[0], subprocess.Popen)
apis.processes[0].kill()
apis.stop()
print("done")
"""


def test_api_processes_of_a_forked_coordinator(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(COORDINATING)
    done = subprocess.run(
        [sys.executable, str(program)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert "starting an API process from nothing" in done.stderr
    assert "Error" not in done.stderr


def test_an_ordinary_coordinator_starts_fresh_ones() -> None:
    code = (
        "from cluster import template; from coordinator import server;"
        "assert template.api_starter() is server.start_fresh"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def children_of(pid: int) -> list[int]:
    """Its children that live."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [child for child in map(int, found) if identify(child)]

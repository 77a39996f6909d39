"""Starting, watching and stopping real processes, with stand-ins for the engines."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from cluster import process
from cluster.config import load, parse
from cluster.launch import COORDINATOR, LaunchError, LocalCluster, PreflightError
from cluster.process import (
    free_port,
    identify,
    is_running,
    kill_session,
    port_is_free,
    session_members,
)
from cluster.progress import PlainProgress, Row
from cluster.schema import ClusterConfig
from cluster.supervise import down, running, up_detached
from tests.unit.standin import command_of

STANDIN = Path(__file__).with_name("standin.py")
ROOT = Path(__file__).parents[2]
WAIT_S = 30.0


@pytest.fixture(autouse=True)
def _own_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHIA_RUN_DIR", str(tmp_path / "run"))
    yield
    down(None, True, Console(quiet=True))


def text_of(*names: str, api_port: int = 0) -> str:
    workers = "\n".join(f"  - {{name: {name}, role: mixed}}" for name in names)
    return (
        f"model: {ROOT}\nserved_model_name: nothing\nname: standin\nworkers:\n{workers}\n"
        f"api: {{port: {api_port}, keys: [secret]}}\ncoordinator: {{port: 0}}\n"
        "start: {timeout_s: 30}\n"
    )


def config_of(*names: str, api_port: int = 0) -> ClusterConfig:
    return parse(text_of(*names, api_port=api_port), "standin.yaml")


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not within {WAIT_S} s"
        time.sleep(0.05)


class Launcher:
    """``up`` in a process of its own, and its children."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        path = folder / "standin.yaml"
        path.write_text(text_of(*names))
        self.output = folder / "up.txt"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(STANDIN), "up", str(path)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )

    def said(self, text: str) -> bool:
        return text in self.output.read_text()

    def wait_for(self, text: str) -> None:
        wait_until(lambda: self.said(text) or self.process.poll() is not None, text)
        assert self.said(text), self.output.read_text()

    def children(self) -> dict[str, int]:
        record = json.loads((self.folder / "run/standin/owner.json").read_text())
        return {name: process["pid"] for name, process in record["processes"].items()}


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    started: list[Launcher] = []

    def start(*names: str) -> Launcher:
        started.append(Launcher(tmp_path, *names))
        return started[-1]

    yield start
    for each in started:
        kill_session(each.process.pid)
        each.process.wait()


def nobody_left(pids: list[int]) -> bool:
    return not any(session_members(pid) for pid in pids)


class TestLocalCluster:
    def test_is_ready_inside_and_gone_outside(self, tmp_path: Path) -> None:
        config = config_of("one", "parent-two")
        with LocalCluster(config, log_dir=tmp_path, command_of=command_of) as cluster:
            pids = list(cluster.processes.values())
            assert set(cluster.processes) == {COORDINATOR, "one", "parent-two"}
            assert set(cluster.workers) == {"one", "parent-two"}
            assert [row.worker for row in cluster.snapshot().workers] == ["one", "parent-two"]
            assert cluster.base_url.startswith("http://127.0.0.1:")
            parent = cluster.workers["parent-two"]
            wait_until(lambda: len(session_members(parent)) == 2, "the worker's own child")
            assert not cluster.dead()
        assert nobody_left(pids)

    def test_what_the_processes_read_is_private_and_complete(self, tmp_path: Path) -> None:
        with LocalCluster(config_of("one"), log_dir=tmp_path, command_of=command_of) as cluster:
            path = tmp_path / "cluster.yaml"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert load(path) == cluster.config

    def test_a_crash_names_the_process_shows_its_log_and_stops_the_rest(
        self, tmp_path: Path
    ) -> None:
        cluster = LocalCluster(
            config_of("crash-two", "one"), log_dir=tmp_path, command_of=command_of
        )
        with pytest.raises(LaunchError) as caught:
            cluster.start()
        pids = list(cluster.processes.values())
        cluster.stop()
        message = str(caught.value)
        assert "crash-two exited with code 1" in message
        assert "tell the user" in message
        assert "line 99" in message
        assert "line 5\n" not in message
        assert len(pids) == 3
        assert nobody_left(pids)

    def test_a_death_by_signal_is_named(self, tmp_path: Path) -> None:
        with LocalCluster(config_of("one"), log_dir=tmp_path, command_of=command_of) as cluster:
            os.kill(cluster.workers["one"], signal.SIGKILL)
            wait_until(cluster.dead, "death of the worker")
            assert "one was killed by SIGKILL" in cluster.dead()[0].obituary()

    def test_what_a_dead_worker_left_behind_is_ended(self, tmp_path: Path) -> None:
        config = config_of("parent-one")
        with LocalCluster(config, log_dir=tmp_path, command_of=command_of) as cluster:
            pid = cluster.workers["parent-one"]
            wait_until(lambda: len(session_members(pid)) == 2, "the worker's own child")
            os.kill(pid, signal.SIGKILL)
            wait_until(cluster.dead, "death of the worker")
            assert len(session_members(pid)) == 1
        assert nobody_left([pid])

    def test_who_ignores_sigterm_is_killed_at_once_in_a_hurry(self, tmp_path: Path) -> None:
        cluster = LocalCluster(config_of("stubborn"), log_dir=tmp_path, command_of=command_of)
        cluster.start()
        pids = list(cluster.processes.values())
        log = cluster.log_path("stubborn")
        wait_until(lambda: "waiting" in log.read_text(), "the worker")
        started_s = time.monotonic()
        cluster.stop(hurry=lambda: time.monotonic() > started_s + 0.5)
        assert 0.5 <= time.monotonic() - started_s < 15
        assert nobody_left(pids)

    def test_says_who_is_late(self, tmp_path: Path) -> None:
        text = text_of("one").replace("timeout_s: 30", "timeout_s: 1")
        cluster = LocalCluster(
            parse(text, "x.yaml"),
            log_dir=tmp_path,
            command_of=lambda name, path: command_of("worker", path),
        )
        with (
            pytest.raises(LaunchError, match=r"not ready within 1 s .*worker one: "),
            cluster,
        ):
            pass


class TestPreflight:
    def test_a_port_in_use_is_named_before_anything_starts(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            cluster = LocalCluster(
                config_of("one", api_port=port), log_dir=tmp_path, command_of=command_of
            )
            with pytest.raises(PreflightError, match=rf"api\.port: port {port} on 127\.0\.0\.1"):
                cluster.start()
        assert not cluster.processes
        assert list(tmp_path.iterdir()) == []

    def test_a_worker_of_another_host_is_refused(self, tmp_path: Path) -> None:
        text = text_of("one").replace("role: mixed", "role: mixed, host: 192.0.2.7")
        cluster = LocalCluster(parse(text, "x.yaml"), log_dir=tmp_path, command_of=command_of)
        with pytest.raises(PreflightError, match=r"workers\[0\]\.data_port.*pythia worker"):
            cluster.start()


class TestUp:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_stops_everything(
        self, launcher: Callable[..., Launcher], number: signal.Signals
    ) -> None:
        up = launcher("one", "parent-two")
        up.wait_for("is ready")
        pids = list(up.children().values())
        assert len(pids) == 3
        assert all(session_members(pid) for pid in pids)
        up.process.send_signal(number)
        assert up.process.wait(WAIT_S) == 0
        assert up.said("standin is stopped")
        assert nobody_left(pids)
        assert running() == []

    def test_a_signal_while_starting_stops_what_there_is(
        self, launcher: Callable[..., Launcher], tmp_path: Path
    ) -> None:
        up = launcher("one")
        wait_until((tmp_path / "run/standin/one.log").exists, "start of the worker")
        up.process.send_signal(signal.SIGTERM)
        assert up.process.wait(WAIT_S) in (0, 130)
        assert up.said("standin is stopped")

    def test_the_second_signal_does_not_wait(self, launcher: Callable[..., Launcher]) -> None:
        up = launcher("stubborn")
        up.wait_for("is ready")
        pids = list(up.children().values())
        up.process.send_signal(signal.SIGINT)
        up.wait_for("stopping standin")
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(15) == 0, "SIGTERM alone takes 20 s"
        assert nobody_left(pids)

    def test_sigkill_takes_the_processes_along(self, launcher: Callable[..., Launcher]) -> None:
        up = launcher("one", "stubborn-two")
        up.wait_for("is ready")
        pids = list(up.children().values())
        up.process.kill()
        wait_until(lambda: nobody_left(pids), "end of the processes")
        assert running() == []

    def test_a_lost_worker_is_reported_and_the_rest_stays(
        self, launcher: Callable[..., Launcher]
    ) -> None:
        up = launcher("one", "two")
        up.wait_for("is ready")
        children = up.children()
        os.kill(children["one"], signal.SIGKILL)
        up.wait_for("one was killed by SIGKILL")
        assert up.process.poll() is None
        os.kill(children["two"], signal.SIGKILL)
        assert up.process.wait(WAIT_S) == 1
        assert up.said("no worker that decodes is left")
        assert nobody_left(list(children.values()))

    def test_without_its_coordinator_it_ends(self, launcher: Callable[..., Launcher]) -> None:
        up = launcher("one")
        up.wait_for("is ready")
        children = up.children()
        os.kill(children[COORDINATOR], signal.SIGKILL)
        assert up.process.wait(WAIT_S) == 1
        assert up.said("the coordinator is gone")
        assert nobody_left(list(children.values()))

    def test_one_cluster_of_a_name_at_a_time_and_down_stops_it(
        self, launcher: Callable[..., Launcher]
    ) -> None:
        first = launcher("one")
        first.wait_for("is ready")
        pids = list(first.children().values())
        record = running()[0]
        assert record.owner == identify(first.process.pid)
        with pytest.raises(LaunchError, match=f"process {first.process.pid}"):
            up_detached("standin", ["false"], Console(quiet=True))
        assert down(None, False, Console(quiet=True)) == 0
        assert first.process.wait(WAIT_S) == 0
        assert nobody_left(pids)
        assert not is_running(record.owner)

    def test_down_with_nothing_up_is_fine(self) -> None:
        assert down(None, False, Console(quiet=True)) == 0

    def test_detached_returns_when_ready_and_down_ends_it(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "standin.yaml"
        path.write_text(text_of("one"))
        command = [sys.executable, str(STANDIN), "up", str(path)]
        assert up_detached("standin", command, Console()) == 0
        assert "standin is ready" in capsys.readouterr().out
        record = running()[0]
        assert is_running(record.owner)
        assert down("standin", False, Console(quiet=True)) == 0
        wait_until(
            lambda: nobody_left([p.pid for p in record.processes.values()]), "end of the processes"
        )

    def test_detached_says_why_it_failed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "standin.yaml"
        path.write_text(text_of("crash"))
        command = [sys.executable, str(STANDIN), "up", str(path)]
        assert up_detached("standin", command, Console()) == 1
        assert "tell the user" in capsys.readouterr().out
        assert running() == []


def test_plain_progress_speaks_at_changes_and_every_ten_seconds() -> None:
    lines: list[str] = []
    progress = PlainProgress(lines.append)
    for second in range(25):
        phase = "importing vLLM" if second < 12 else "ready"
        progress.show([Row("worker one", phase, float(second))], float(second))
    assert lines == [
        "worker one: importing vLLM (0 s)",
        "worker one: importing vLLM (10 s)",
        "worker one: ready (12 s)",
    ]


def test_another_process_with_the_same_id_is_not_taken_for_it() -> None:
    me = identify(os.getpid())
    assert me is not None
    assert is_running(me)
    assert not is_running(type(me)(me.pid, me.start_ticks + 1))


def test_port_is_free_tells_taken_from_free() -> None:
    port = free_port("127.0.0.1")
    assert port_is_free("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", port)):
        assert not port_is_free("127.0.0.1", port)


def test_no_port_is_handed_out_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "FREE_PORTS_TO", process.FREE_PORTS_FROM + 8)
    monkeypatch.setattr(process, "FREE_PORT_TRIES", 1000)
    named = process.FREE_PORTS_FROM + 3
    found = {process.free_port("127.0.0.1", {named}) for _ in range(5)}
    assert len(found) == 5
    assert named not in found

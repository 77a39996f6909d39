"""Who runs where over SSH, what is refused beforehand, and who may be signalled."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import load, parse
from cluster.hosts import CoreState, ProcessState, requests
from cluster.launch import COORDINATOR
from cluster.process import ProcessIdentity, identify
from cluster.progress import READY
from cluster.remote import TOKEN, Record, boot_id, stop
from cluster.schema import ClusterConfig, ConfigError
from cluster.ssh import Way, destinations
from cluster.ssh_command import process_phase

WORKFLOW = (Path(__file__).parents[2] / "examples/workflows/research-team.yaml").read_text()
WAY = Way(python="/opt/py thon", root="/opt/pythia")


def config_of(
    *hosts: str, coordinator: str = "10.0.0.1", core_port: int = 5570, more: str = ""
) -> ClusterConfig:
    """A worker on each of the ``hosts``, with one GPU."""
    devices: dict[str, int] = {}
    lines = []
    for index, host in enumerate(hosts):
        devices[host] = devices.get(host, -1) + 1
        lines.append(
            f"  - {{name: w{index}, role: mixed, host: '{host}', devices: [{devices[host]}],"
            " data_port: 7000}\n".replace("7000", str(7000 + index))
        )
    return parse(
        f"model: tiny-llama\nworkers:\n{''.join(lines)}"
        f"coordinator: {{host: '{coordinator}', port: {core_port}}}\n{more}",
        "team.yaml",
    )


def test_every_host_is_told_its_own_part() -> None:
    config = config_of("10.0.0.2", "10.0.0.1", "10.0.0.2")
    home, other = requests(config, "up", run_dir="/runs", workflows={"workflow-0.yaml": WORKFLOW})
    assert (home.host, list(home.processes)) == ("10.0.0.1", [COORDINATOR, "w1"])
    assert (other.host, list(other.processes)) == ("10.0.0.2", ["w0", "w2"])
    words = ["-m", "cluster", "worker", "--config", "cluster.yaml", "--name", "w2"]
    assert other.processes["w2"] == words
    assert (home.gpus, other.gpus) == (1, 2)
    assert (home.control_address, other.control_address) == ("tcp://10.0.0.1:5570", "")
    assert home.api == ("127.0.0.1", 8000)
    assert [(each.key, each.port) for each in home.ports] == [
        ("coordinator.port", 5570),
        ("api.port", 8000),
        ("workers[1].data_port", 7001),
    ]
    assert [each.key for each in other.ports] == ["workers[0].data_port", "workers[2].data_port"]
    assert set(home.files) == {"cluster.yaml", "workflow-0.yaml"}
    assert set(other.files) == {"cluster.yaml"}


def test_the_file_that_hosts_get_reads_as_the_original(tmp_path: Path) -> None:
    config = config_of("10.0.0.2")
    for request in requests(config, "up"):
        path = tmp_path / request.host
        path.write_text(request.files["cluster.yaml"])
        assert load(path).workers == config.workers
        assert load(path).name == "team"


def test_workflow_files_go_with_the_coordinator(tmp_path: Path) -> None:
    home, other = requests(config_of("10.0.0.2"), "up", workflows={"workflow-0.yaml": WORKFLOW})
    for request in (home, other):
        folder = tmp_path / request.host
        folder.mkdir()
        for name, text in request.files.items():
            (folder / name).write_text(text)
    assert load(tmp_path / home.host / "cluster.yaml").workflows == [
        str(tmp_path / home.host / "workflow-0.yaml")
    ]
    assert load(tmp_path / other.host / "cluster.yaml").workflows == []


def test_a_run_directory_means_the_same_everywhere() -> None:
    with pytest.raises(ConfigError, match="--run-dir: must be an absolute path"):
        requests(config_of("10.0.0.2"), "up", run_dir="run")


def test_only_up_takes_files_and_ports_along() -> None:
    for request in requests(config_of("10.0.0.2"), "down"):
        assert (request.files, request.ports) == ({}, [])


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (config_of("10.0.0.2", coordinator="127.0.0.1"), "127.0.0.1: means another machine"),
        (config_of("10.0.0.2", "localhost"), "localhost: means another machine"),
        (config_of("10.0.0.2", coordinator="0.0.0.0"), "coordinator.host: 0.0.0.0 is no address"),
        (config_of("10.0.0.2", core_port=0), "coordinator.port: must be a fixed port"),
        (config_of("10.0.0.2", more="api: {port: 0}\n"), "api.port: must be a fixed port"),
        (
            config_of("10.0.0.2", "10.0.0.3", more="network: {nixl_host: 10.0.0.2}\n"),
            "network.nixl_host: is one address for all",
        ),
    ],
)
def test_a_file_that_can_only_mean_one_machine_is_refused(
    config: ClusterConfig, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        requests(config, "up")


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        requests(config_of("10.0.0.2", coordinator="0.0.0.0", core_port=0), "up")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("10.0.0.1", "is not HOST=DESTINATION"),
        ("10.0.0.1=", "is not HOST=DESTINATION"),
        ("10.0.0.1=-oProxyCommand=x", "is not HOST=DESTINATION"),
        ("10.0.0.1=a b", "is not HOST=DESTINATION"),
        ("10.0.0.9=a", "'10.0.0.9' is no host of the file"),
        ("10.0.0.1=a,10.0.0.1=b", "is given twice"),
    ],
)
def test_bad_destinations_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        destinations(text, ["10.0.0.1", "10.0.0.2"])


def test_the_command_line_of_ssh_never_asks_and_quotes() -> None:
    way = msgspec.structs.replace(WAY, destinations=destinations("h=me@node-1", ["h"]))
    command = way.command("h")
    assert command[0] == "ssh"
    assert {"-oBatchMode=yes", "-oConnectTimeout=10"} <= set(command)
    assert command[-3:-1] == ["--", "me@node-1"]
    assert shlex.split(command[-1])[-3:] == ["/opt/py thon", "-m", "cluster.remote"]


def test_dry_run_shows_everything_and_connects_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    file = tmp_path / "team.yaml"
    file.write_text(
        "model: tiny-llama\nworkers:\n  - {name: w0, role: mixed, host: 10.0.0.2}\n"
        "coordinator: {host: 10.0.0.1}\n"
    )
    shown = CliRunner().invoke(
        app, ["ssh", "up", str(file), "--dry-run", "--hosts", "10.0.0.2=me@b"]
    )
    assert shown.exit_code == 0, shown.output
    assert "10.0.0.1: ssh -T -oBatchMode=yes" in shown.output
    assert "-- me@b 'cd " in shown.output
    assert "needs port 5570 of 10.0.0.1 (coordinator.port)" in shown.output
    assert "cluster worker --config cluster.yaml --name w0" in shown.output
    for action in ("down", "status", "logs"):
        assert CliRunner().invoke(app, ["ssh", action, str(file), "--dry-run"]).exit_code == 0


def test_a_file_that_does_not_fit_is_refused_with_code_2(tmp_path: Path) -> None:
    file = tmp_path / "team.yaml"
    file.write_text("model: tiny-llama\nworkers:\n  - {name: w0, role: mixed, host: 10.0.0.2}\n")
    answer = CliRunner().invoke(app, ["ssh", "up", str(file)])
    assert answer.exit_code == 2
    assert "127.0.0.1: means another machine" in answer.output


def test_phases_end_with_ready() -> None:
    process = ProcessState(COORDINATOR, 1, "importing vLLM")
    assert process_phase(COORDINATOR, None, None, 1) == "starting"
    assert process_phase(COORDINATOR, process, None, 1) == "importing vLLM"
    assert "API" in process_phase(COORDINATOR, process, CoreState([], False), 1)
    assert process_phase(COORDINATOR, process, CoreState([], True), 1) == READY
    assert process_phase("w0", ProcessState("w0", 2), CoreState([], True), 1) == "starting"


# --- who may be signalled -----------------------------------------------------


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that nobody here may touch."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def write(folder: Path, record: Record) -> None:
    (folder / "worker.json").write_bytes(msgspec.json.encode(record))


def test_a_process_that_got_the_id_since_is_left_alone(
    tmp_path: Path, stranger: subprocess.Popen[bytes]
) -> None:
    known = identify(stranger.pid)
    assert known is not None
    older = ProcessIdentity(known.pid, known.start_ticks - 1)
    write(tmp_path, Record(older, boot_id(), "0" * 32))
    assert stop(tmp_path, grace_s=0.2).ended == []
    assert stranger.poll() is None
    assert not (tmp_path / "worker.json").exists()


def test_a_process_of_another_boot_is_left_alone(
    tmp_path: Path, stranger: subprocess.Popen[bytes]
) -> None:
    known = identify(stranger.pid)
    assert known is not None
    write(tmp_path, Record(known, "another", "0" * 32))
    assert stop(tmp_path, grace_s=0.2).ended == []
    assert stranger.poll() is None


def test_what_a_dead_process_left_behind_is_killed_by_its_mark(tmp_path: Path) -> None:
    token = "a1" * 16
    orphan = subprocess.Popen(
        [sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(60)"],
        env={**os.environ, TOKEN: token},
        start_new_session=True,
    )
    try:
        write(tmp_path, Record(ProcessIdentity(orphan.pid, 0), boot_id(), token))
        assert stop(tmp_path, grace_s=0.2).survivors == []
        assert orphan.wait(10) == -signal.SIGKILL
    finally:
        orphan.kill()
        orphan.wait()

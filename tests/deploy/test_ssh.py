"""Clusters over two hosts, which a real sshd makes of this machine's loopback addresses."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import openai
import psutil
import pytest
from rich.console import Console

from cluster import doctor_hosts, fake_worker, ssh_command
from cluster.config import parse
from cluster.hosts import Action, requests
from cluster.launch import COORDINATOR, LaunchError, PreflightError, process_command
from cluster.process import free_port
from cluster.schema import ClusterConfig, Start
from cluster.ssh import SshError, Way, destinations, this_installation
from tests.deploy.packages import need
from tests.deploy.ssh_site import running_sshd
from tests.unit import standin

HERE, THERE, NOWHERE = "127.0.0.1", "127.0.0.2", "127.0.0.9"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Way]:
    """How the hosts are reached."""
    need(["sshd", "ssh", "ssh-keygen"], ["openssh-server", "openssh-client"])
    with running_sshd(tmp_path_factory.mktemp("sshd"), [HERE, THERE]) as config:
        python, root = this_installation()
        yield Way(python=python, root=root, config=str(config))


class Deployment:
    """A cluster file, and the commands with it."""

    def __init__(
        self, config: ClusterConfig, run_dir: Path, way: Way, command_of: Callable[..., list[str]]
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.way = way
        self.command_of = command_of
        self.output = io.StringIO()

    def do(self, action: Action, grace_s: float = 20.0) -> int:
        """Does it; what it says is in ``output``."""
        self.output = io.StringIO()
        console = Console(file=self.output, width=200)
        asked = [
            msgspec.structs.replace(each, grace_s=grace_s)
            for each in requests(
                self.config,
                action,
                run_dir=str(self.run_dir),
                lines=5,
                command_of=self.command_of,
            )
        ]
        if action == "up":
            return ssh_command.up(self.config, asked, self.way, console)
        act = {
            "down": ssh_command.down,
            "status": ssh_command.status,
            "logs": ssh_command.logs,
        }
        return act[action](asked, self.way, console)

    @property
    def said(self) -> str:
        """What the last command said."""
        return self.output.getvalue()

    def left(self) -> list[str]:
        """Processes and records that are still there. Marked ones know where they run."""
        found = [str(path) for path in self.run_dir.rglob("*.json")]
        for process in psutil.process_iter():
            try:
                if process.environ().get("PYTHIA_RUN_DIR") == str(self.run_dir):
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found


@pytest.fixture
def deploy(way: Way, tmp_path: Path) -> Iterator[Callable[..., Deployment]]:
    """Makes deployments of stand-ins; whatever is up at the end is stopped."""
    made: list[Deployment] = []

    def make(*workers: tuple[str, str], config: ClusterConfig | None = None) -> Deployment:
        run_dir = tmp_path / f"run-{len(made)}"
        made.append(Deployment(config or standins(*workers), run_dir, way, standin.command_of))
        return made[-1]

    yield make
    for each in made:
        each.do("down", grace_s=1.0)
        assert each.left() == []


def standins(*workers: tuple[str, str]) -> ClusterConfig:
    """Workers by name and host; the coordinator is here."""
    lines = "".join(f"  - {{name: {name}, role: mixed, host: {host}}}\n" for name, host in workers)
    return parse(
        f"model: {ROOT}\nserved_model_name: nothing\nname: standin\nworkers:\n{lines}"
        f"coordinator: {{port: {free_port(HERE)}}}\napi: {{port: {free_port(HERE)}}}\n"
        "start: {timeout_s: 30}\n",
        "standin.yaml",
    )


def test_processes_outlive_the_connection_and_are_found_again(
    deploy: Callable[..., Deployment],
) -> None:
    deployment = deploy(("one", HERE), ("parent-two", THERE))
    assert deployment.do("up") == 0
    for label in ("coordinator on 127.0.0.1", "worker parent-two on 127.0.0.2"):
        assert f"{label}: ready" in deployment.said
    assert deployment.do("status") == 0
    pids = {name: int(pid) for name, pid in re.findall(r"(\S+) \(process (\d+)\)", deployment.said)}
    assert set(pids) == {"coordinator", "one", "parent-two"}
    assert all(psutil.Process(pid).is_running() for pid in pids.values())
    with pytest.raises(PreflightError, match=r"127.0.0.2: parent-two is running already"):
        deployment.do("up")
    assert deployment.do("status") == 0, "an 'up' that is refused stops nothing"
    assert deployment.do("down") == 0
    assert "127.0.0.2: stopped parent-two" in deployment.said
    assert deployment.left() == []
    assert deployment.do("down") == 0
    assert "127.0.0.1: nothing was running" in deployment.said
    assert deployment.do("status") == 1
    assert "127.0.0.2: parent-two is not running" in deployment.said
    assert "the coordinator does not answer" in deployment.said


def test_a_process_that_dies_while_it_starts_stops_all_and_names_its_host(
    deploy: Callable[..., Deployment],
) -> None:
    deployment = deploy(("fine", HERE), ("crash-two", THERE))
    with pytest.raises(LaunchError, match=r"127.0.0.2: crash-two exited with code") as caught:
        deployment.do("up")
    assert not isinstance(caught.value, PreflightError)
    assert deployment.left() == []
    assert deployment.do("logs") == 0
    assert "==> 127.0.0.2: crash-two <==" in deployment.said


def test_a_host_out_of_reach_is_named_and_nothing_is_started(
    deploy: Callable[..., Deployment],
) -> None:
    deployment = deploy(("one", HERE), ("two", NOWHERE))
    with pytest.raises(PreflightError, match=rf"{NOWHERE}: can't be reached over ssh: .*refused"):
        deployment.do("up")
    assert deployment.left() == []
    assert deployment.do("down") == 1
    assert f"{NOWHERE}: can't be reached over ssh" in deployment.said
    assert "127.0.0.1: nothing was running" in deployment.said
    deployment.config = standins(("one", HERE))


def test_all_ports_in_use_are_named_with_their_host(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(("one", HERE), ("two", THERE))
    port = free_port(THERE)
    workers = [
        msgspec.structs.replace(entry, data_port=port) for entry in deployment.config.workers
    ]
    deployment.config = msgspec.structs.replace(deployment.config, workers=workers)
    with (
        socket.create_server((HERE, deployment.config.api.port)),
        socket.create_server((THERE, port)),
        pytest.raises(PreflightError) as caught,
    ):
        deployment.do("up")
    assert f"127.0.0.1: api.port: port {deployment.config.api.port}" in str(caught.value)
    assert f"127.0.0.2: workers[1].data_port: port {port}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2, caught.value
    assert deployment.left() == []


def test_what_ignores_sigterm_is_killed_and_said(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(("one", HERE), ("stubborn-two", THERE))
    assert deployment.do("up") == 0
    assert deployment.do("down", grace_s=1.0) == 0
    assert "127.0.0.2: killed stubborn-two" in deployment.said
    assert deployment.left() == []


def test_a_worker_that_died_since_is_seen_and_the_rest_stopped(
    deploy: Callable[..., Deployment],
) -> None:
    deployment = deploy(("one", HERE), ("two", THERE))
    assert deployment.do("up") == 0
    deployment.do("status")
    found = re.search(r"two \(process (\d+)\)", deployment.said)
    assert found
    os.kill(int(found[1]), 9)
    time.sleep(0.2)
    assert deployment.do("status") == 1
    assert f"127.0.0.2: two (process {found[1]}) is not running any more" in deployment.said
    assert deployment.do("down") == 0
    assert deployment.left() == []


def test_a_python_that_is_not_there_is_said(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(("one", HERE))
    good = deployment.way
    deployment.way = msgspec.structs.replace(good, python="/no/such/python")
    with pytest.raises(PreflightError, match=r"127.0.0.1: Pythia can't be run there: .*no/such"):
        deployment.do("up")
    deployment.way = good


@pytest.fixture
def never_ready(deploy: Callable[..., Deployment]) -> Deployment:
    """Its processes live and do nothing else."""
    deployment = deploy(("one", HERE), ("two", THERE))
    deployment.command_of = lambda name, path: ["python", "-c", "import time; time.sleep(60)"]
    return deployment


@contextlib.contextmanager
def once_started(deployment: Deployment, act: Callable[[], object]) -> Iterator[None]:
    """Does something from another thread when all three processes have been started."""

    def wait() -> None:
        deadline_s = time.monotonic() + 30.0
        while len(list(deployment.run_dir.rglob("*.json"))) < 3:
            if time.monotonic() > deadline_s:
                return
            time.sleep(0.05)
        time.sleep(0.5)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_a_start_that_takes_too_long_is_undone(never_ready: Deployment) -> None:
    config = msgspec.structs.replace(never_ready.config, start=Start(timeout_s=4.0))
    never_ready.config = config
    late = r"not ready within 4 s \(coordinator on 127.0.0.1: starting; worker one on 127.0.0.1"
    with pytest.raises(LaunchError, match=late):
        never_ready.do("up")
    assert "127.0.0.2: stopped two" in never_ready.said
    assert never_ready.left() == []


def test_an_interrupted_start_is_undone(never_ready: Deployment) -> None:
    with once_started(never_ready, lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert never_ready.do("up") == 130
    assert "SIGINT: stopping standin" in never_ready.said
    assert "127.0.0.2: stopped two" in never_ready.said
    assert never_ready.left() == []


def test_a_connection_that_breaks_while_it_starts_undoes_the_start(
    never_ready: Deployment,
) -> None:
    def break_it() -> None:
        for child in psutil.Process().children():
            if child.name() == "ssh" and THERE in child.cmdline():
                child.kill()

    with (
        once_started(never_ready, break_it),
        pytest.raises(LaunchError, match=r"127.0.0.2: the connection ended"),
    ):
        never_ready.do("up")
    assert "127.0.0.2: stopped two" in never_ready.said
    assert never_ready.left() == []


@pytest.mark.engine
def test_a_cluster_with_the_real_coordinator_serves_and_goes(
    way: Way, tmp_path: Path, tiny_model: Path
) -> None:
    config = parse(
        f"model: {tiny_model}\nserved_model_name: tiny-llama\nname: fakes\n"
        "engine: {dtype: float32, enforce_eager: true, block_size: 32, max_model_len: 512}\n"
        "workers:\n"
        f"  - {{name: prefill-0, role: prefill, host: {HERE}}}\n"
        f"  - {{name: decode-0, role: decode, host: {THERE}}}\n"
        f"coordinator: {{port: {free_port(HERE)}}}\napi: {{port: {free_port(HERE)}}}\n",
        "fakes.yaml",
    )

    def command_of(name: str, path: Path) -> list[str]:
        if name == COORDINATOR:
            return process_command(name, path)
        return fake_worker.command(path, name, "--step-s", "0.005")

    deployment = Deployment(config, tmp_path / "run", way, command_of)
    try:
        assert deployment.do("up") == 0
        with openai.OpenAI(base_url=f"{config.base_url}/v1", api_key="none") as client:
            answer = client.completions.create(model="tiny-llama", prompt="hello", max_tokens=4)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 4
        assert deployment.do("status") == 0
        assert "127.0.0.2: decode-0 (process" in deployment.said
    finally:
        assert deployment.do("down") == 0
    assert "killed" not in deployment.said
    assert deployment.left() == []


def examined(deployment: Deployment) -> dict[str, dict[str, str]]:
    """What ``pythia doctor`` finds wrong over ssh, before the start: by check, by whom."""
    report = doctor_hosts.examine(deployment.config, deployment.way, is_here=lambda host: False)
    found: dict[str, dict[str, str]] = {}
    for each in report.findings:
        if each.severity == "problem":
            found.setdefault(each.check, {})[each.about] = each.message
    return found


def test_doctor_finds_nothing_wrong_with_two_good_hosts(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(("one", HERE), ("two", THERE))
    assert examined(deployment) == {}
    assert deployment.left() == []


def test_doctor_names_hosts_out_of_reach_and_ports_in_use(
    deploy: Callable[..., Deployment],
) -> None:
    deployment = deploy(("one", HERE), ("two", THERE), ("three", NOWHERE))
    with socket.create_server((HERE, deployment.config.api.port)):
        found = examined(deployment)
    assert found.keys() == {"hosts", "ports"}
    assert set(found["hosts"]) == {NOWHERE}
    assert "can't be reached over ssh" in found["hosts"][NOWHERE]
    assert set(found["ports"]) == {HERE}
    assert f"port {deployment.config.api.port} on {HERE} is in use" in found["ports"][HERE]
    deployment.config = standins(("one", HERE), ("two", THERE))


def test_doctor_names_a_side_channel_on_another_hosts_address_before_the_start(
    deploy: Callable[..., Deployment],
) -> None:
    deployment = deploy(("one", HERE), ("two", THERE))
    good = deployment.config
    wrong = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "10.255.255.1"}
    workers = [msgspec.structs.replace(good.workers[0], environment=wrong), good.workers[1]]
    deployment.config = msgspec.structs.replace(good, workers=workers)
    found = examined(deployment)
    deployment.config = good
    assert found.keys() == {"ports"}
    assert "can't listen on 10.255.255.1:0" in found["ports"][HERE]
    assert "VLLM_NIXL_SIDE_CHANNEL_HOST" in found["ports"][HERE]


def test_destinations_reach_hosts_by_another_name(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(("one", NOWHERE))
    good = deployment.way
    named = destinations(f"{NOWHERE}={HERE}", [HERE, NOWHERE])
    deployment.way = msgspec.structs.replace(good, destinations=named)
    assert deployment.do("up") == 0
    assert f"worker one on {NOWHERE}: ready" in deployment.said


def test_no_ssh_at_all_is_said(
    deploy: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(("one", HERE))
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        with pytest.raises(SshError, match="there is no 'ssh' program"):
            deployment.do("up")

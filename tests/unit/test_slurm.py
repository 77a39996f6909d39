"""A cluster file as a batch script: who goes where, what is asked for, what is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import parse
from cluster.document import dump
from cluster.schema import ClusterConfig, ConfigError
from cluster.slurm import JobRequest, gpus_per_node, on_nodes, places, script, step_command

LOGS = Path("/logs/of a team")
PROGRAM = ["/venv/bin/python", "-m", "cluster", "slurm-job", "/a b/c.yaml"]
FOUR = [("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"), ("d1", "decode")]


def config_of(
    *hosts: str, coordinator: str = "127.0.0.1", gpus: int = 0, more: str = ""
) -> ClusterConfig:
    """Workers in turn on the ``hosts``, or four on none, with ``gpus`` each."""
    lines = []
    used: dict[str, int] = {}
    for index, (name, role) in enumerate(FOUR):
        host = hosts[index % len(hosts)] if hosts else "127.0.0.1"
        first = used.get(host, 0)
        used[host] = first + gpus
        devices = list(range(first, first + gpus))
        lines.append(f"  - {{name: {name}, role: {role}, host: {host}, devices: {devices}}}\n")
    return parse(
        f"model: tiny-llama\nworkers:\n{''.join(lines)}"
        f"coordinator: {{host: {coordinator}}}\n{more}",
        "team.yaml",
    )


@pytest.mark.parametrize(
    ("hosts", "coordinator", "nodes", "expected"),
    [
        ((), "127.0.0.1", None, [0, 0, 0, 0]),
        ((), "127.0.0.1", 2, [0, 0, 1, 1]),
        ((), "0.0.0.0", 4, [0, 1, 2, 3]),
        ((), "127.0.0.1", 3, [0, 0, 1, 2]),
        (("a", "b"), "a", None, [0, 1, 0, 1]),
        (("a", "b"), "b", 2, [1, 0, 1, 0]),
        (("a", "b"), "0.0.0.0", None, [0, 1, 0, 1]),
        (("a", "b"), "c", None, [1, 2, 1, 2]),
    ],
)
def test_every_host_of_the_file_is_a_node_and_one_host_may_be_spread(
    hosts: tuple[str, ...], coordinator: str, nodes: int | None, expected: list[int]
) -> None:
    assert places(config_of(*hosts, coordinator=coordinator), nodes) == expected


@pytest.mark.parametrize(
    ("config", "nodes", "complaint"),
    [
        (config_of(), 5, "--nodes 5: must be from 1 to 4"),
        (config_of(), 0, "--nodes 0: must be from 1 to 4"),
        (config_of("a", "b", coordinator="a"), 3, "the file names 2 hosts"),
        (config_of("a", "localhost", coordinator="a"), None, "some have a host and others none"),
    ],
)
def test_unclear_places_are_refused(
    config: ClusterConfig, nodes: int | None, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        places(config, nodes)


def test_what_is_spread_counts_its_gpus_anew_on_every_node() -> None:
    config = config_of(gpus=2)
    placed = on_nodes(config, places(config, 2), ["10.0.0.1", "10.0.0.2"])
    assert [(entry.host, entry.devices) for entry in placed.workers] == [
        ("10.0.0.1", [0, 1]),
        ("10.0.0.1", [2, 3]),
        ("10.0.0.2", [0, 1]),
        ("10.0.0.2", [2, 3]),
    ]
    assert placed.coordinator.host == "10.0.0.1"
    assert placed.api.host == "127.0.0.1"
    assert gpus_per_node(config, 2) == 4
    assert gpus_per_node(config, None) == 8
    parse(dump(placed), "team.yaml")


def test_named_hosts_keep_their_gpus() -> None:
    config = config_of("a", "b", coordinator="a", gpus=1)
    placed = on_nodes(config, places(config, None), ["10.0.0.1", "10.0.0.2"])
    assert [entry.devices for entry in placed.workers] == [[0], [0], [1], [1]]
    assert [entry.host for entry in placed.workers] == ["10.0.0.1", "10.0.0.2"] * 2


def test_one_node_stays_on_loopback() -> None:
    config = config_of("a", coordinator="a")
    placed = on_nodes(config, places(config, None), ["10.0.0.1"])
    assert {entry.host for entry in placed.workers} == {"127.0.0.1"}
    assert placed.control_address == "tcp://127.0.0.1:5570"


def test_one_address_of_nixl_does_not_fit_several_nodes() -> None:
    config = config_of(more="network: {nixl_host: 10.0.0.7}\n")
    with pytest.raises(ConfigError, match=r"network\.nixl_host"):
        on_nodes(config, places(config, 2), ["10.0.0.1", "10.0.0.2"])


def test_the_script_asks_for_what_the_cluster_needs() -> None:
    request = JobRequest(
        nodes=2, partition="gpu", time="1-00:30:00", options=("--account=me", "--no-requeue")
    )
    text = script(config_of(gpus=1), request, LOGS, PROGRAM, {"PYTHIA_RUN_DIR": "/a b"})
    options = [line.split(" ", 1)[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert options == [
        "--job-name=pythia-team",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--exclusive",
        "--mem=0",
        "--gpus-per-node=2",
        "--partition=gpu",
        "--time=1-00:30:00",
        "--signal=B:TERM@68",
        '--output="/logs/of a team/%j.log"',
        "--account=me",
        "--no-requeue",
    ]
    assert text.startswith("#!/bin/bash\n")
    assert "export PYTHIA_RUN_DIR='/a b'\n" in text
    assert text.endswith("exec /venv/bin/python -m cluster slurm-job '/a b/c.yaml'\n")


@pytest.mark.parametrize(
    "command", ["echo 'a  b' \"$HOME\"; exit 3", "echo `x` $(y) \\ !", "a\nb", "é 'EOF'"]
)
def test_a_command_reaches_the_program_as_it_was_given(command: str) -> None:
    program = ["printf", "%s", command]
    text = script(config_of(), JobRequest(then=command), LOGS, program, {})
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True, check=True)
    assert done.stdout == command


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (JobRequest(partition="a b"), "--partition 'a b'"),
        (JobRequest(partition=""), "--partition ''"),
        (JobRequest(time="soon"), "--time 'soon'"),
        (JobRequest(time="1h"), "--time '1h'"),
        (JobRequest(options=("--wrap=x y",)), "--sbatch '--wrap=x y'"),
        (JobRequest(options=("-A me",)), "--sbatch '-A me'"),
        (JobRequest(options=("--account=a\n#SBATCH --x",)), "--sbatch"),
        (JobRequest(then="  "), "--then: the command is empty"),
        (JobRequest(then="a\0b"), "no command may have"),
    ],
)
def test_what_no_job_can_have_is_refused(request_: JobRequest, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        script(config_of(), request_, LOGS, PROGRAM, {})


def test_a_log_folder_that_slurm_would_misread_is_refused() -> None:
    with pytest.raises(ConfigError, match="100%done"):
        script(config_of(), JobRequest(), Path("/logs/100%done"), PROGRAM, {})


@pytest.mark.parametrize("time", ["5", "5:30", "1:00:00", "2-0", "2-0:30", "2-00:30:00"])
def test_every_form_of_a_time_limit_is_taken(time: str) -> None:
    assert f"--time={time}\n" in script(config_of(), JobRequest(time=time), LOGS, PROGRAM, {})


def test_a_step_names_its_node() -> None:
    command = step_command("n7", 4, ["python", "-m", "cluster"])
    assert command[0] == "srun"
    assert {"--nodelist=n7", "--gpus-per-node=4", "--overlap"} <= set(command)
    assert command[-3:] == ["python", "-m", "cluster"]
    assert not any("gpus" in word for word in step_command("n7", 0, ["x"]))


def test_dry_run_prints_the_script_and_out_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHIA_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("PATH", "/nowhere")
    file = tmp_path / "team.yaml"
    file.write_text(dump(config_of()))
    arguments = ["slurm", str(file), "--then", "python team.py", "--nodes", "2"]
    shown = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert shown.exit_code == 0
    assert "--then 'python team.py'" in shown.output
    assert not (tmp_path / "run").exists()
    out = tmp_path / "job.sh"
    assert CliRunner().invoke(app, [*arguments, "--out", str(out)]).exit_code == 0
    assert out.read_text() == shown.output
    submitted = CliRunner().invoke(app, arguments)
    assert submitted.exit_code == 1
    assert "sbatch is not installed here" in submitted.output


def test_outside_of_a_job_the_jobs_program_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    file = tmp_path / "team.yaml"
    file.write_text(dump(config_of()))
    answer = CliRunner().invoke(app, ["slurm-job", str(file)])
    assert answer.exit_code == 1
    assert "this is no Slurm job" in answer.output

"""A cluster as a job of a real Slurm with two nodes, both on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import load
from cluster.slurm import JobRequest, script
from cluster.slurm_job import hand_over, job_environment, log_folder
from tests.deploy.packages import need
from tests.deploy.slurm_site import NODES, Site, running_site

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
READY_S = 90.0
END_S = 45.0
DEMO_S = 400.0
CLUSTER = """\
model: tiny-llama
name: slurm
engine: {dtype: float32, enforce_eager: true, block_size: 32, max_model_len: 512}
workers:
  - {name: prefill-0, role: prefill}
  - {name: decode-0, role: decode}
api: {port: 0}
coordinator: {port: 0}
"""
ASK = """\
python - <<'EOF'
import os, openai
client = openai.OpenAI()
answer = client.completions.create(model="tiny-llama", prompt="hello", max_tokens=3)
print("answered", answer.usage.completion_tokens, "at", os.environ["PYTHIA_BASE_URL"])
EOF
exit 7
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Slurm with two nodes."""
    need(
        ["munged", "slurmctld", "slurmd", "sbatch"],
        ["munge", "slurmctld", "slurmd", "slurm-client"],
    )
    with running_site(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture
def file(site: Site, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster file; commands of Slurm's talk to the test's own."""
    monkeypatch.setenv("SLURM_CONF", site.environment["SLURM_CONF"])
    monkeypatch.setenv("PYTHIA_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    path = tmp_path / "slurm.yaml"
    path.write_text(CLUSTER)
    return path


def submitted(file: Path, *then: str) -> str:
    """The id of a job with fake workers, one on each node."""
    program = [sys.executable, "-m", "tests.deploy.fake_workers", str(file), "2", *then]
    config = load(file)
    folder = log_folder(config.name)
    text = script(config, JobRequest(nodes=2, time="5"), folder, program, job_environment())
    return hand_over(text, folder)


def log_of(job_id: str) -> str:
    path = log_folder("slurm") / f"{job_id}.log"
    return path.read_text() if path.exists() else ""


def left(file: Path) -> list[str]:
    """Processes that still have to do with this cluster."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if any(str(file.parent) in word for word in words):
            found.append(" ".join(words))
    return found


def test_a_command_runs_when_the_cluster_is_ready_and_its_code_is_the_jobs(
    site: Site, file: Path
) -> None:
    job_id = submitted(file, ASK)
    state = site.wait_for(job_id, ("COMPLETED", "FAILED", "CANCELLED"), READY_S)
    log = log_of(job_id)
    assert "answered 3 at http://127.0.0.1:" in log, log
    assert (state, site.job(job_id)["ExitCode"]) == ("FAILED", "7:0")
    for place, node in enumerate(NODES):
        assert f"node {place}: {node} (127.0.0.1)" in log
    assert "slurm is stopped" in log
    logs = {path.name for path in (log_folder("slurm") / job_id).iterdir()}
    assert {"coordinator.log", "prefill-0.log", "decode-0.log"} <= logs
    assert left(file) == []


def test_the_example_runs_through_slurm_by_the_documented_command(site: Site, file: Path) -> None:
    """Real engines, a prefill worker on one node and two decode workers on the other."""
    file.write_text(
        "model: tiny-llama\nname: slurm\n"
        "engine:\n"
        "  {dtype: float32, enforce_eager: true, block_size: 32, max_model_len: 2048,\n"
        "   max_num_seqs: 16, kv_cache_memory_bytes: 134217728}\n"
        "workers:\n"
        "  - {name: prefill-0, role: prefill, host: one}\n"
        "  - {name: decode-0, role: decode, host: two}\n"
        "  - {name: decode-1, role: decode, host: two}\n"
        "coordinator: {host: one, port: 0}\n"
        "api: {port: 0}\n"
        "placement: {disaggregated: always}\n"
    )
    example = ROOT / "examples" / "research_team.py"
    then = f"python {example} --base-url $OPENAI_BASE_URL --max-tokens 8"
    command = [sys.executable, "-m", "cluster", "slurm", str(file), "--wait", "--then", then]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=DEMO_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for place, node in enumerate(NODES):
        assert f"node {place}: {node}" in done.stdout
    assert "completed in" in done.stdout
    assert "prefill-0" in done.stdout
    assert "the command ended with exit code 0" in done.stdout
    assert left(file) == []


def test_scancel_lets_the_workers_leave_and_leaves_nothing(site: Site, file: Path) -> None:
    job_id = submitted(file)
    site.wait_for(job_id, ("RUNNING",), END_S)
    wait_until_ready(job_id)
    steps = site.ask("squeue", "--steps", "--noheader", "--format=%i %N", f"--job={job_id}")
    placed = {line.split()[1] for line in steps.splitlines() if line.split()[0][-1].isdecimal()}
    assert placed == set(NODES)
    site.ask("scancel", job_id)
    site.wait_for(job_id, ("CANCELLED",), END_S)
    wait_for_log(job_id, "slurm is stopped")
    assert left(file) == []


def test_the_signal_before_the_time_limit_ends_a_cluster_in_order(site: Site, file: Path) -> None:
    job_id = submitted(file)
    wait_until_ready(job_id)
    # What "--signal=B:TERM@..." has Slurm send: to the batch script, not to the steps.
    site.ask("scancel", "--batch", "--signal=TERM", job_id)
    assert site.wait_for(job_id, ("COMPLETED", "FAILED", "CANCELLED"), END_S) == "COMPLETED"
    assert site.job(job_id)["ExitCode"] == "0:0"
    log = log_of(job_id)
    assert "SIGTERM: stopping slurm" in log
    assert "Killed" not in log
    assert "slurm is stopped" in log
    assert left(file) == []


def test_a_cluster_that_can_not_start_fails_its_job(site: Site, file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        file.write_text(CLUSTER.replace("api: {port: 0}", f"api: {{port: {port}}}"))
        answer = CliRunner().invoke(app, ["slurm", str(file)])
        assert answer.exit_code == 0, answer.output
        job_id = answer.output.split()[1]
        assert site.wait_for(job_id, ("COMPLETED", "FAILED"), END_S) == "FAILED"
    assert site.job(job_id)["ExitCode"] == "2:0"
    assert f"api.port: port {port} on 127.0.0.1 is in use" in log_of(job_id)
    assert left(file) == []


def test_what_slurm_refuses_is_said_in_its_words(file: Path) -> None:
    answer = CliRunner().invoke(app, ["slurm", str(file), "--partition", "no-such"])
    assert answer.exit_code == 1
    assert "sbatch refused" in answer.output
    assert "invalid partition" in answer.output


def wait_until_ready(job_id: str) -> None:
    wait_for_log(job_id, "is ready:", READY_S)


def wait_for_log(job_id: str, text: str, timeout_s: float = END_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while text not in log_of(job_id):
        assert time.monotonic() < deadline_s, log_of(job_id)
        time.sleep(0.3)

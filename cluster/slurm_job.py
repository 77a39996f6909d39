"""What runs on the first node of a Slurm job: the whole cluster, from start to end.

It takes the batch script's place. The coordinator is its child; each worker is a step of the
job, started by ``srun`` on its node. Slurm's signal before the time limit, or that of
``scancel``, lets the workers leave and ends everything in order.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from rich.console import Console

from cluster.child import POLL_S, STOP_S
from cluster.failure import CommandFailure
from cluster.launch import (
    COORDINATOR,
    CommandOf,
    LocalCluster,
    preflight,
    process_command,
    run_directory,
)
from cluster.process import kill_session
from cluster.progress import progress_for
from cluster.schema import ClusterConfig, reachable
from cluster.slurm import JobRequest, gpus_per_node, on_nodes, places, script, step_command
from cluster.slurm_wait import follow
from cluster.supervise import Signals, Stopped, say, watch
from cluster.template import TEMPLATE

ASK_S = 30.0
ENDED_BY_SIGNAL = 143
"""Exit code of a shell's command that SIGTERM ended."""


def log_folder(cluster_name: str) -> Path:
    """Where jobs of a cluster write: ``JOB.log``, and a folder ``JOB`` with every process's."""
    return run_directory(cluster_name) / "slurm"


def submit(
    config: ClusterConfig,
    file: Path,
    request: JobRequest,
    out: Path | None,
    dry_run: bool,
    console: Console,
    wait: bool = False,
) -> int:
    """Writes the batch script and hands it to ``sbatch``; says what it did. Returns 0.

    ``dry_run`` only shows the script, ``out`` keeps it in a file and does not submit. ``wait``:
    shows the job's log until the job is over, and returns its exit code.
    CommandFailure if Slurm does not take it.
    """
    folder = log_folder(config.name)
    arguments = ["slurm-job", str(file.absolute())]
    arguments += ["--nodes", str(request.nodes)] if request.nodes is not None else []
    arguments += ["--then", request.then] if request.then is not None else []
    program = [sys.executable, "-m", "cluster", *arguments]
    text = script(config, request, folder, program, job_environment())
    if dry_run:
        say(console, text.rstrip("\n"))
        return 0
    if out is not None:
        out.write_text(text, encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        say(console, f"wrote {out}; 'sbatch {out}' submits it")
        return 0
    job_id = hand_over(text, folder)
    say(console, f"job {job_id} is submitted; its log will be {folder / job_id}.log")
    say(console, f"'squeue --job {job_id}' shows it, 'scancel {job_id}' ends it")
    if not wait:
        return 0
    return follow(job_id, folder / f"{job_id}.log", lambda text: console.out(text, end=""))


def job_environment() -> dict[str, str]:
    """What a job needs to find this very program and its folder for logs."""
    root = str(Path(__file__).resolve().parent.parent)
    found = {"PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}
    if chosen := os.environ.get("PYTHIA_RUN_DIR"):
        found["PYTHIA_RUN_DIR"] = str(Path(chosen).absolute())
    return found


def hand_over(text: str, folder: Path) -> str:
    """Submits a batch script; returns the job's id. CommandFailure if that can't be done."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    answer = _ask(["sbatch", "--parsable"], stdin=text)
    return answer.strip().partition(";")[0]


def run(
    config: ClusterConfig,
    request: JobRequest,
    console: Console,
    command_of: CommandOf = process_command,
) -> int:
    """The cluster of this job, until its command is over or the job ends. Returns the exit code.

    That of ``request.then`` if there is one; 143 if a signal cut it off or came before the
    cluster was ready, else 0. LaunchError or CommandFailure if the cluster can't be started.
    """
    job_id = os.environ.get("SLURM_JOB_ID", "")
    if not job_id.isdecimal():
        raise CommandFailure("this is no Slurm job: submit one with 'pythia slurm FILE'")
    where = places(config, request.nodes)
    nodes = _node_names(os.environ)
    if max(where) >= len(nodes):
        raise CommandFailure(f"the job has {len(nodes)} nodes, the cluster needs {max(where) + 1}")
    addresses = _addresses(nodes[: max(where) + 1])
    for place, node in enumerate(nodes[: max(where) + 1]):
        say(console, f"node {place}: {node} ({addresses[place]})")
    node_of = {entry.name: nodes[where[i]] for i, entry in enumerate(config.workers)}
    cluster = LocalCluster(
        on_nodes(config, where, addresses),
        log_folder(config.name) / job_id,
        progress=progress_for(console),
        command_of=_steps(node_of, gpus_per_node(config, request.nodes), command_of),
        fits=_fits_first_node,
    )
    return _serve(cluster, request.then, console, job_id)


def _serve(cluster: LocalCluster, then: str | None, console: Console, job_id: str) -> int:
    ready = False
    with Signals() as signals:
        try:
            cluster.start()
            ready = True
            served = cluster.config.served_name
            say(console, f"{cluster.config.name} is ready: {cluster.base_url}/v1 serves {served}")
            if then is None:
                return watch(cluster, console, lambda: None)
            return _run_command(cluster, then, console)
        except Stopped as stopped:
            say(console, f"{stopped}: stopping {cluster.config.name}")
            return 0 if ready and then is None else ENDED_BY_SIGNAL
        finally:
            signals.defer()
            _let_workers_leave(cluster, job_id, signals.insistent)
            cluster.stop(hurry=signals.insistent)
            say(console, f"{cluster.config.name} is stopped")


def _run_command(cluster: LocalCluster, then: str, console: Console) -> int:
    """Runs it in the folder that the job was submitted from; ends with all that it started."""
    say(console, f"running: {then}")
    keys = cluster.config.api.keys
    environment = {
        **os.environ,
        "PYTHIA_BASE_URL": cluster.base_url,
        "PYTHIA_CONTROL": cluster.control_address,
        "OPENAI_BASE_URL": f"{cluster.base_url}/v1",
        "OPENAI_API_KEY": keys[0] if keys else "none",
    }
    command = subprocess.Popen(["bash", "-c", then], env=environment, start_new_session=True)
    try:
        code = watch(cluster, console, command.poll)
    finally:
        kill_session(command.pid)
        command.wait()
    say(console, f"the command ended with exit code {code}")
    return code if code >= 0 else 128 - code


def _let_workers_leave(cluster: LocalCluster, job_id: str, hurry: Callable[[], bool]) -> None:
    """Has the workers told to end, and waits for them.

    A signal to ``srun`` itself would kill its task; this one goes to the tasks of all steps,
    and not to this process.
    """
    workers = set(cluster.workers)
    if not workers - _gone(cluster):
        return
    subprocess.run(["scancel", "--signal=TERM", job_id], timeout=ASK_S, check=False)
    deadline_s = time.monotonic() + STOP_S + cluster.config.stop.drain_s
    while workers - _gone(cluster) and time.monotonic() < deadline_s and not hurry():
        time.sleep(POLL_S)


def _gone(cluster: LocalCluster) -> set[str]:
    return {child.name for child in cluster.dead()}


def _fits_first_node(config: ClusterConfig) -> None:
    """What is to listen here can; each worker finds out by itself on its own node."""
    preflight(msgspec.structs.replace(config, workers=[]))


def _steps(node_of: Mapping[str, str], gpus: int, command_of: CommandOf) -> CommandOf:
    def command(name: str, config_path: Path) -> list[str]:
        if name == TEMPLATE:
            return []  # what is forked from a template can't be a step
        inner = command_of(name, config_path)
        return inner if name == COORDINATOR else step_command(node_of[name], gpus, inner)

    return command


def _node_names(environment: Mapping[str, str]) -> list[str]:
    listed = environment.get("SLURM_JOB_NODELIST", "")
    return _ask(["scontrol", "show", "hostnames", listed]).split()


def _addresses(nodes: list[str]) -> list[str]:
    """Where the nodes reach each other. Slurm knows nodes by names that need not be hosts'."""
    found = [_resolved(_configured_address(node), node) for node in nodes]
    others = [address for address in found if not _is_loopback(address)]
    if others and _is_loopback(found[0]):
        found[0] = _own_address_towards(others[0])  # its name leads nowhere but to itself
    return found


def _configured_address(node: str) -> str:
    words = _ask(["scontrol", "--oneliner", "show", "node", node]).split()
    fields = dict(word.split("=", 1) for word in words if "=" in word)
    return fields.get("NodeAddr") or node


def _resolved(host: str, node: str) -> str:
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise CommandFailure(f"node {node}: {host} has no address ({error})") from error
    entries.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(entries[0][4][0])


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _own_address_towards(peer: str) -> str:
    """The address that packets from here to ``peer`` carry. Sends nothing."""
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        return reachable(str(probe.getsockname()[0]))


def _ask(command: list[str], stdin: str = "") -> str:
    """What a command of Slurm's prints; CommandFailure with what it complains about."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=ASK_S)
    except FileNotFoundError as error:
        raise CommandFailure(f"{command[0]} is not installed here: no Slurm?") from error
    except subprocess.TimeoutExpired as error:
        raise CommandFailure(f"{command[0]} did not answer within {ASK_S:.0f} s") from error
    if done.returncode:
        raise CommandFailure(f"{command[0]} refused: {done.stderr.strip() or done.returncode}")
    return done.stdout

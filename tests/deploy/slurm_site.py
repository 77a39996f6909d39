"""A Slurm of the test's own: munged, slurmctld and two slurmd on this machine, without systemd.

Everything is in one temporary folder, ports are free ones, and all daemons run in the
foreground as children, so they are ended by their own process ids.

``python -m tests.deploy.slurm_site COMMAND...`` runs a command while there is such a Slurm.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cluster.process import free_port, usable_cores

NODES = ("pythia-a", "pythia-b")
START_S = 30.0
STOP_S = 15.0
ASK_S = 20.0


class Site:
    """A running Slurm. ``environment`` makes its commands, and only them, talk to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def ask(self, *command: str) -> str:
        """What a command of Slurm's prints."""
        return subprocess.run(
            command,
            env=self.environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=ASK_S,
        ).stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job_id: str, states: Sequence[str], timeout_s: float) -> str:
        """Waits until the job is in one of the ``states``; returns it."""
        deadline_s = time.monotonic() + timeout_s
        while (state := self.job(job_id)["JobState"]) not in states:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"job {job_id} is {state} after {timeout_s:.0f} s")
            time.sleep(0.3)
        return state


def _configuration(folder: Path) -> str:
    host = socket.gethostname()
    user = getpass.getuser()
    nodes = "".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port('127.0.0.1')}"
        f" CPUs={usable_cores()} RealMemory=1000 State=UNKNOWN\n"
        for name in NODES
    )
    return f"""\
ClusterName=pythia
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port("127.0.0.1")}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=30
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SwitchType=switch/none
{nodes}PartitionName=test Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def _munge_command(folder: Path) -> list[str]:
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(64))
    key.chmod(0o600)
    return [
        "munged",
        "--foreground",
        "--force",
        f"--key-file={key}",
        f"--socket={folder}/munge.socket",
        f"--pid-file={folder}/munged.pid",
        f"--seed-file={folder}/munged.seed",
        f"--log-file={folder}/munged.log",
    ]


@contextlib.contextmanager
def running_site(folder: Path) -> Iterator[Site]:
    """A Slurm of two nodes that take jobs; ended by its own processes' ids."""
    folder.chmod(0o755)  # other users' clients ask munged, which checks the way to its socket
    (folder / "state").mkdir()
    for name in NODES:
        (folder / f"spool-{name}").mkdir()
    (folder / "slurm.conf").write_text(_configuration(folder), encoding="utf-8")
    site = Site(folder)
    with contextlib.ExitStack() as daemons:
        daemons.enter_context(_daemon(site, _munge_command(folder)))
        _wait_until(lambda: (folder / "munge.socket").exists(), "munged's socket")
        daemons.enter_context(_daemon(site, [_program("slurmctld"), "-D", "-i"]))
        for name in NODES:
            daemons.enter_context(_daemon(site, [_program("slurmd"), "-D", "-N", name]))
        _wait_until(lambda: _is_idle(site), "idle nodes")
        yield site


def _program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    assert found, f"{name} is not installed"
    return found


def _is_idle(site: Site) -> bool:
    try:
        states = site.ask("sinfo", "--noheader", "--Node", "--format=%T").split()
    except subprocess.CalledProcessError:
        return False
    return states == ["idle"] * len(NODES)


def _wait_until(done: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + START_S
    while not done():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"no {what} within {START_S:.0f} s")
        time.sleep(0.2)


@contextlib.contextmanager
def _daemon(site: Site, command: list[str]) -> Iterator[None]:
    log = site.folder / f"{Path(command[0]).name}-{command[-1].strip('-/').replace('/', '-')}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=site.environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main(command: Sequence[str]) -> int:
    """Runs a command that talks to a Slurm of its own. Returns its exit code."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, running_site(Path(folder)) as site:
        return subprocess.run(command, env=site.environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

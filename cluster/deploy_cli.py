"""The part of the command line that starts clusters on other machines: ``ssh`` and ``slurm``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from cluster.hosts import Action, Request
    from cluster.ssh import Way

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The cluster's YAML file.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
Nodes = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Spread a file of one host over N nodes."),
]
Then = Annotated[
    str | None,
    typer.Option(metavar="COMMAND", help="Run this when the cluster is ready, then end the job."),
]


def add_to(app: typer.Typer) -> None:
    """Adds the commands of this file to the program."""
    app.add_typer(ssh, name="ssh")
    app.command()(slurm)
    app.command(name="slurm-job", hidden=True)(slurm_job)


def slurm(
    file: FileArgument,
    partition: Annotated[str | None, typer.Option(metavar="P")] = None,
    time: Annotated[
        str | None, typer.Option(metavar="T", help="Time limit, as sbatch takes it.")
    ] = None,
    nodes: Nodes = None,
    then: Then = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="--NAME=VALUE", help="A further option of sbatch; repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Write the batch script there, submit nothing."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Show its log until it is over; its exit code is mine.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Submit a cluster as one Slurm job."""
    from cluster.config import load
    from cluster.slurm import JobRequest
    from cluster.slurm_job import submit

    request = JobRequest(
        nodes=nodes, partition=partition, time=time, options=tuple(sbatch or ()), then=then
    )
    raise typer.Exit(submit(load(file), file, request, out, dry_run, Console(), wait))


def slurm_job(file: FileArgument, nodes: Nodes = None, then: Then = None) -> None:
    """Run a cluster inside a Slurm job; what the batch script of 'pythia slurm' does."""
    from cluster.config import load
    from cluster.slurm import JobRequest
    from cluster.slurm_job import run

    raise typer.Exit(run(load(file), JobRequest(nodes=nodes, then=then), Console()))


ssh = typer.Typer(no_args_is_help=True, help="A cluster over several hosts, by SSH.")
Hosts = Annotated[
    str | None,
    typer.Option(metavar="HOST=DESTINATION,...", help="What ssh calls a host of the file."),
]
SshConfig = Annotated[
    Path | None, typer.Option(metavar="PATH", help="ssh's configuration; else the user's.")
]
Python = Annotated[
    str | None, typer.Option(metavar="PATH", help="Python with vLLM on every host; else this.")
]
Root = Annotated[
    str | None, typer.Option(metavar="PATH", help="Pythia's folder on every host; else this.")
]
RunDirectory = Annotated[
    str,
    typer.Option(
        metavar="PATH", envvar="PYTHIA_RUN_DIR", help="Logs, on every host; else the user's cache."
    ),
]


@ssh.command()
def up(
    file: FileArgument,
    hosts: Hosts = None,
    ssh_config: SshConfig = None,
    python: Python = None,
    root: Root = None,
    run_dir: RunDirectory = "",
    dry_run: DryRun = False,
) -> None:
    """Start coordinator and workers on their hosts, wait until all are ready."""
    from cluster import ssh_command
    from cluster.config import load

    requests = _requests(file, "up", run_dir)
    way = _way(requests, hosts, ssh_config, python, root)
    if dry_run:
        raise typer.Exit(ssh_command.describe(requests, way, Console()))
    raise typer.Exit(ssh_command.up(load(file), requests, way, Console()))


@ssh.command()
def down(
    file: FileArgument,
    hosts: Hosts = None,
    ssh_config: SshConfig = None,
    python: Python = None,
    root: Root = None,
    run_dir: RunDirectory = "",
    dry_run: DryRun = False,
) -> None:
    """Stop all that 'up' started; nothing is fine, too."""
    from cluster.ssh_command import down as act

    requests = _requests(file, "down", run_dir)
    _do(act, requests, _way(requests, hosts, ssh_config, python, root), dry_run)


@ssh.command()
def status(
    file: FileArgument,
    hosts: Hosts = None,
    ssh_config: SshConfig = None,
    python: Python = None,
    root: Root = None,
    run_dir: RunDirectory = "",
    dry_run: DryRun = False,
) -> None:
    """Show which processes run where."""
    from cluster.ssh_command import status as act

    requests = _requests(file, "status", run_dir)
    _do(act, requests, _way(requests, hosts, ssh_config, python, root), dry_run)


@ssh.command()
def logs(
    file: FileArgument,
    lines: Annotated[int, typer.Option(min=1, max=5000, metavar="N", help="Of each log.")] = 20,
    hosts: Hosts = None,
    ssh_config: SshConfig = None,
    python: Python = None,
    root: Root = None,
    run_dir: RunDirectory = "",
    dry_run: DryRun = False,
) -> None:
    """Print the end of every process's log."""
    from cluster.ssh_command import logs as act

    requests = _requests(file, "logs", run_dir, lines)
    _do(act, requests, _way(requests, hosts, ssh_config, python, root), dry_run)


def _do(
    act: Callable[[list[Request], Way, Console], int],
    requests: list[Request],
    way: Way,
    dry_run: bool,
) -> None:
    """Does it on all hosts, or only says what it would be. Exits with its code."""
    from cluster.ssh_command import describe

    raise typer.Exit((describe if dry_run else act)(requests, way, Console()))


def _requests(file: Path, action: Action, run_dir: str, lines: int = 0) -> list[Request]:
    from cluster.config import load
    from cluster.hosts import requests

    config = load(file)
    workflows = {
        f"workflow-{index}.yaml": Path(path).read_text(encoding="utf-8")
        for index, path in enumerate(config.workflows)
    }
    return requests(config, action, run_dir=run_dir, lines=lines, workflows=workflows)


def _way(
    requests: list[Request],
    hosts: str | None,
    ssh_config: Path | None,
    python: str | None,
    root: str | None,
) -> Way:
    return way_of([request.host for request in requests], hosts, ssh_config, python, root)


def way_of(
    names: list[str],
    hosts: str | None,
    ssh_config: Path | None,
    python: str | None,
    root: str | None,
) -> Way:
    """How the hosts of these names are reached. ConfigError with all problems."""
    from cluster.ssh import Way, destinations, this_installation

    here_python, here_root = this_installation()
    return Way(
        python=python or here_python,
        root=root or here_root,
        destinations=destinations(hosts, names),
        config=str(ssh_config) if ssh_config is not None else None,
    )

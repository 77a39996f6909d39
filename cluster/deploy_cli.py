"""The part of the command line that starts clusters on other machines: ``ssh`` and ``slurm``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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
    dry_run: DryRun = False,
) -> None:
    """Submit a cluster as one Slurm job."""
    from cluster.config import load
    from cluster.slurm import JobRequest
    from cluster.slurm_job import submit

    request = JobRequest(
        nodes=nodes, partition=partition, time=time, options=tuple(sbatch or ()), then=then
    )
    raise typer.Exit(submit(load(file), file, request, out, dry_run, Console()))


def slurm_job(file: FileArgument, nodes: Nodes = None, then: Then = None) -> None:
    """Run a cluster inside a Slurm job; what the batch script of 'pythia slurm' does."""
    from cluster.config import load
    from cluster.slurm import JobRequest
    from cluster.slurm_job import run

    raise typer.Exit(run(load(file), JobRequest(nodes=nodes, then=then), Console()))

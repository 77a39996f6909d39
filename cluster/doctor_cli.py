"""The part of the command line that examines clusters: ``pythia doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from cluster.deploy_cli import Hosts, Python, Root, SshConfig, way_of

if TYPE_CHECKING:
    from cluster.doctor import Report
    from cluster.doctor_checks import Finding

SIGNS = {"fine": ("ok", "green"), "warning": ("!", "yellow"), "problem": ("x", "red")}
PROBLEMS = 1
ASK_S = 2.0


def doctor(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="The cluster's YAML file, started or not."),
    ] = None,
    coordinator: Annotated[
        str | None, typer.Option(metavar="tcp://HOST:PORT", help="Else the file's, or the one up.")
    ] = None,
    links: Annotated[
        bool, typer.Option("--links/--no-links", help="Move KV between workers, too.")
    ] = True,
    hosts: Hosts = None,
    ssh_config: SshConfig = None,
    python: Python = None,
    root: Root = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all that was found.")] = False,
) -> None:
    """Look for what is wrong with a cluster and say what to do. Exit code 1 if something is."""
    report = _report(file, coordinator, links, hosts, ssh_config, python, root)
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(report)))
    else:
        show(report, Console())
    raise typer.Exit(exit_code(report))


def exit_code(report: Report) -> int:
    """0 if there is no problem; warnings are none."""
    return PROBLEMS if any(each.severity == "problem" for each in report.findings) else 0


def show(report: Report, console: Console) -> None:
    """Every finding, with what to do about it below."""
    for each in report.findings:
        console.print(_line(each), soft_wrap=True)
        if each.advice:
            console.print(Text(f"     {each.advice}", style="dim"), soft_wrap=True)
    problems = sum(each.severity == "problem" for each in report.findings)
    warnings = sum(each.severity == "warning" for each in report.findings)
    console.print(f"{problems} problems, {warnings} warnings")


def _line(finding: Finding) -> Text:
    sign, style = SIGNS[finding.severity]
    about = f"{finding.about}: " if finding.about else ""
    return Text.assemble((f"{sign:>2} ", style), f"{finding.check}: {about}{finding.message}")


def _report(
    file: Path | None,
    coordinator: str | None,
    links: bool,
    hosts: str | None,
    ssh_config: Path | None,
    python: str | None,
    root: str | None,
) -> Report:
    from cluster import doctor as running
    from cluster import doctor_hosts
    from cluster.config import load
    from cluster.status import Unreachable, inspect
    from cluster.supervise import running_address

    if file is None:
        return running.examine(coordinator or running_address(), links=links)
    config = load(file)
    expected = [entry.name for entry in config.workers]
    if coordinator is not None:
        return running.examine(coordinator, expected, links)
    try:
        inspect(config.control_address, ASK_S)
    except Unreachable:
        names = [request.host for request in doctor_hosts.look_requests(config)]
        return doctor_hosts.examine(config, way_of(names, hosts, ssh_config, python, root))
    return running.examine(config.control_address, expected, links)

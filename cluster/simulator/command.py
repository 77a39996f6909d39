"""``pythia simulate``: reads a scenario, has it simulated, and shows what came out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import to_builtins
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from cluster.bench.report import table, write
from cluster.document import suggestion
from cluster.process import usable_cores
from cluster.schema import ConfigError
from cluster.simulator import configurations
from cluster.simulator.baselines import BaselineError
from cluster.simulator.outcome import Outcome
from cluster.simulator.report import comparisons, figures_of, rows_of, show, show_summary
from cluster.simulator.results import Results
from cluster.simulator.scenario import Overrides, Scenario, load
from cluster.simulator.sweep import Task, run, tasks

COMMAND = "pythia simulate"
RESULTS_FOLDER = Path("run")
COMPARED_FILE = Path("examples/simulate/compare.yaml")
"""What ``--compare`` compares unless another file is named."""
FAILED = 1
INTERRUPTED = 130


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line asks for; None and empty leave the file's."""

    file: Path
    overrides: Overrides = Overrides()
    compare: tuple[str, ...] = ()
    seeds: int | None = None
    processes: int | None = None
    json_path: Path | None = None
    plots: Path | None = None
    resume: Path | None = None


def simulate(request: Request, console: Console) -> int:
    """Runs a comparison and returns the exit code. ConfigError before anything has started if it
    can't be run; SimulationError if a replay fails."""
    scenario = prepared(request)
    outcomes = replayed(request, scenario, tasks(scenario), console)
    if outcomes is None:
        return INTERRUPTED
    _report(request, scenario, outcomes, console)
    return 0


def replayed(
    request: Request, scenario: Scenario, wanted: list[Task], console: Console
) -> list[Outcome] | None:
    """Does what is ``wanted`` and not in the results file yet; None if it was interrupted, which
    has been said then. SimulationError if a replay fails."""
    path = request.resume or _new_file(scenario.name)
    results = Results(path, scenario, resume=request.resume is not None)
    processes = request.processes or usable_cores()
    try:
        outcomes = run(scenario, results, processes, console, wanted)
    except KeyboardInterrupt:
        console.print(
            f"interrupted; {len(results.found)} of {len(wanted)} replays are in {path}, "
            f"and --resume {path} goes on from there",
            highlight=False,
            soft_wrap=True,
        )
        return None
    finally:
        results.close()
    console.print(f"replay by replay: {path}", highlight=False, soft_wrap=True)
    return outcomes


def prepared(request: Request) -> Scenario:
    """The file's scenario with what the command line changes. ConfigError."""
    scenario = load(request.file, request.overrides)
    known = configurations.names()
    compare = request.compare or scenario.compare or ("all",)
    if "all" in compare:
        compare = tuple(known)
    problems = [
        f"no configuration {name!r}{suggestion(name, known)}; pythia simulate --list shows them"
        for name in compare
        if name not in known
    ]
    if len(set(compare)) < len(compare):
        problems.append("a configuration is compared with itself")
    if not problems:
        problems = [problem for name in compare if (problem := _impossible(name, scenario))]
    reference = scenario.reference
    if reference and reference not in known:
        problems.append(f"no configuration {reference!r}{suggestion(reference, known)}")
    if problems:
        raise ConfigError([f"{request.file}: {problem}" for problem in problems])
    return msgspec.structs.replace(
        scenario,
        compare=compare,
        reference=reference if reference in compare else compare[0],
        seeds=request.seeds or scenario.seeds,
    )


def _impossible(name: str, scenario: Scenario) -> str:
    """Why there can be no such cluster; empty if there can."""
    try:
        configurations.cluster_of(name, scenario)
    except BaselineError as error:
        return f"{name}: {error}"
    return ""


def list_configurations(console: Console) -> int:
    """What there is to compare."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("configuration", no_wrap=True)
    table.add_column("what it is")
    for name in configurations.names():
        table.add_row(name, configurations.description(name))
    console.print(table)
    return 0


def run_faults(
    seeds: Sequence[int], processes: int | None, json_path: Path | None, console: Console
) -> int:
    """Random small clusters in which much goes wrong, one for each seed; 1 if the oracle found
    anything."""
    from cluster.simulator.faults import FaultReport, run_many

    began_s = time.perf_counter()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(seeds))

        def show(report: FaultReport) -> None:
            progress.advance(bar)
            if report.error:
                text = f"seed {report.seed}: {report.error}"
                progress.console.print(text, style="red", highlight=False, markup=False)

        reports = run_many(seeds, processes or usable_cores(), show)
    failed = [report.seed for report in reports if report.error]
    figures = {
        "fault_seeds": len(reports),
        "failed_seeds": len(failed),
        "calls": sum(report.calls for report in reports),
        "virtual_s": sum(report.virtual_s for report in reports),
        "real_s": time.perf_counter() - began_s,
    }
    happened = Counter[str]()
    for report in reports:
        happened.update(report.happened)
        happened.update({f"calls ended by {end}": n for end, n in report.outcomes.items()})
    write(json_path, f"{COMMAND} --faults", figures, [to_builtins(report) for report in reports])
    table(console, "what happened", [{"what": what, "times": n} for what, n in happened.items()])
    console.print(
        f"{figures['fault_seeds']} seeds, {figures['calls']:,} calls in "
        f"{figures['virtual_s']:,.0f} virtual seconds, {figures['real_s']:.0f} s; "
        + (f"failed: {', '.join(map(str, failed))}" if failed else "all is well"),
        highlight=False,
        soft_wrap=True,
    )
    return FAILED if failed else 0


def run_validation(
    traces: Path | None, json_path: Path | None, plots: Path | None, console: Console
) -> int:
    """The same small workload on a real cluster of this machine and in the simulator."""
    from cluster.simulator import validate

    plot = plots / "validate.png" if plots else None
    return validate.main(json_path, plot, validate.Options(traces=traces), console)


def _report(
    request: Request, scenario: Scenario, outcomes: Sequence[Outcome], console: Console
) -> None:
    bounds = configurations.bounds()
    found = comparisons(outcomes, scenario.reference, bounds)
    for comparison in found:
        show(console, comparison)
    if len(found) > 1:
        show_summary(console, found)
    write(request.json_path, COMMAND, figures_of(found), rows_of(outcomes))
    if request.plots is not None:
        from cluster.simulator.plots import write_plots

        files = write_plots(request.plots, outcomes, scenario.reference, bounds)
        console.print(f"\n{len(files)} plots in {request.plots}", highlight=False, soft_wrap=True)


def _new_file(name: str) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return RESULTS_FOLDER / f"simulate-{name}-{stamp}.jsonl"

"""``pythia simulate --compare``: Pythia against other systems where these are busy."""

from __future__ import annotations

from concurrent.futures import as_completed

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.bench.report import write
from cluster.process import usable_cores
from cluster.simulator.capacity import (
    CANDIDATES,
    LOAD_SHARE,
    CapacityTask,
    find_capacity,
    rewritten,
    strongest,
)
from cluster.simulator.command import INTERRUPTED, Request, prepared, replayed
from cluster.simulator.failure import SimulationError
from cluster.simulator.scenario import Scenario
from cluster.simulator.sweep import pool
from cluster.simulator.versus import SYSTEMS, Outcomes, figures_of, overall, planned, ratios_of
from cluster.simulator.versus_report import rows_of, show, write_plot

COMMAND = "pythia simulate --compare"
SEARCH_SEEDS = 2


def compare(request: Request, ablations: bool, console: Console) -> int:
    """Replays everything, shows it and returns the exit code. ConfigError before anything has
    started if it can't be run; SimulationError if a replay fails."""
    scenario = _complete(request)
    busiest = {source.name: strongest(source) for source in scenario.workloads}
    capacities = {
        source.name: (busiest[source.name], 1.0 / source.capacity[busiest[source.name]])
        for source in scenario.workloads
    }
    whole, tasks = planned(scenario, ablations)
    outcomes = replayed(request, whole, tasks, console)
    if outcomes is None:
        return INTERRUPTED
    found = Outcomes(outcomes)
    ratios = {source.name: ratios_of(found, source.name) for source in scenario.workloads}
    systems = list(dict.fromkeys(task.configuration for task in tasks))
    rows = rows_of(found, scenario.workloads, systems)
    show(console, rows, ratios, overall(list(ratios.values())), capacities)
    figures = figures_of(ratios)
    figures |= {f"{name}.load": share for name, (_, share) in capacities.items()}
    write(request.json_path, COMMAND, figures, rows)
    if request.plots is not None:
        console.print(f"\n{write_plot(request.plots, rows)}", highlight=False, soft_wrap=True)
    return 0


def find_load(request: Request, console: Console) -> int:
    """Looks for the capacities of all workloads, and writes these and the rates that follow into
    the scenario's file."""
    scenario = _complete(request)
    tasks = [
        CapacityTask(source.name, name, min(SEARCH_SEEDS, scenario.seeds))
        for source in scenario.workloads
        for name in CANDIDATES
    ]
    try:
        found = _capacities(scenario, tasks, request.processes or usable_cores(), console)
    except KeyboardInterrupt:
        console.print("interrupted; the file is as it was")
        return INTERRUPTED
    text = request.file.read_text(encoding="utf-8")
    for source in scenario.workloads:
        capacities = {name: found[source.name, name] for name in CANDIDATES}
        factor = LOAD_SHARE * max(capacities.values())
        shares = {name: value / factor for name, value in capacities.items()}
        text = rewritten(text, source.name, factor, shares)
        console.print(
            f"{source.name}: {factor:.3g} times the rates; "
            + ", ".join(f"{name} takes {share:.2f} of that" for name, share in shares.items()),
            highlight=False,
        )
    request.file.write_text(text, encoding="utf-8")
    return 0


def _complete(request: Request) -> Scenario:
    """The scenario with all systems that the figures need."""
    scenario = prepared(request)
    names = tuple(dict.fromkeys([*SYSTEMS, *scenario.compare]))
    return prepared(msgspec.structs.replace(request, compare=names))


def _capacities(
    scenario: Scenario, tasks: list[CapacityTask], processes: int, console: Console
) -> dict[tuple[str, str], float]:
    """Of each workload and configuration. SimulationError if a search fails."""
    text = msgspec.json.encode(scenario)
    found: dict[tuple[str, str], float] = {}
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with (
        Progress(*columns, console=console, transient=True) as progress,
        pool(processes, len(tasks)) as workers,
    ):
        bar = progress.add_task("", total=len(tasks))
        futures = {
            workers.submit(find_capacity, text, msgspec.json.encode(task)): task for task in tasks
        }
        for future in as_completed(futures):
            task = futures[future]
            name = f"{task.configuration} on {task.workload}"
            try:
                found[task.workload, task.configuration] = msgspec.json.decode(
                    future.result(), type=float
                )
            except Exception as error:
                raise SimulationError(f"{name}: {type(error).__name__}: {error}") from error
            progress.update(bar, advance=1, description=name)
    return found

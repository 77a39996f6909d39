"""One YAML file says what to simulate; this is its schema and its meaning.

``load`` reports everything that is wrong at once, each with key and line (``ConfigError``):
unknown keys, wrong types, impossible values, a model that does not fit its devices, a trace
that is not there, calls that no engine of the cluster could take. What it returns is plain
data: nothing after that looks at the file again, and processes hand it to each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from cluster.document import Document, read, suggestion
from cluster.schema import ConfigError, Name, Section
from cluster.simulator.baselines import prefill_workers
from cluster.simulator.setup import (
    ClusterSetup,
    EngineOptions,
    Faults,
    NetworkSetup,
    Slo,
    WorkerSetup,
)
from cluster.simulator.source import SourceError, open_source, resolved, with_options
from cluster.simulator.subject import Subject, SubjectError, find_subject
from cluster.workload.form import Workload, WorkloadError
from coordinator.cost import DoesNotFit
from coordinator.limits import Limits, NotNegative, Placement, Positive

Text = Annotated[str, msgspec.Meta(min_length=1)]
Above0 = Annotated[float, msgspec.Meta(gt=0)]
Seeds = Annotated[int, msgspec.Meta(ge=1, le=10_000)]

DEFAULT_RATIO = (1, 3)
"""Of workers that prefill to those that decode."""


class WorkersEntry(Section, frozen=True, kw_only=True):
    """Engines, and where they are: so many that prefill and that decode, or ``count`` of them in
    the ``ratio`` of the first to the second.

    Roles are for configurations that separate the two; others use as many engines without.
    Nodes have ``gpus_per_node`` devices, racks ``nodes_per_rack`` nodes. ``kv_host_gib``: of its
    host's memory, for KV that an engine's own has no room for, at ``host_bytes_per_s``.
    """

    prefill: NotNegative = 0
    decode: NotNegative = 0
    count: Positive | None = None
    ratio: list[Positive] | None = None
    gpus_per_node: Positive = 8
    nodes_per_rack: Positive = 4
    kv_host_gib: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    host_bytes_per_s: Above0 = 20e9


class WorkloadEntry(Section, frozen=True, kw_only=True):
    """``source``: a line as ``cluster.workload.source`` reads it, or a list of them for all at
    once. ``slo``: if not the file's. ``capacity``: what configurations can take of it, in
    multiples of its rates, see ``capacity``."""

    name: Name
    source: Text | list[Text]
    slo: Slo | None = None
    capacity: Mapping[Text, Above0] = {}


class ScenarioFile(Section, frozen=True, kw_only=True):
    """The file. ``name`` is the file's, unless given; ``compare``: configurations by name, all of
    them if it is left out; ``reference``: the first compared one."""

    model: Text
    workers: WorkersEntry
    workloads: list[WorkloadEntry]
    name: Name | None = None
    hardware: Text | None = None
    tp: Positive | None = None
    dtype: Text | None = None
    engine: EngineOptions = EngineOptions()
    network: NetworkSetup = NetworkSetup()
    limits: Limits = Limits()
    placement: Placement = Placement()
    api_servers: Positive = 1
    slo: Slo = Slo()
    seeds: Seeds = 3
    compare: list[Text] | None = None
    reference: Text | None = None
    faults: Faults = Faults()


class Source(msgspec.Struct, frozen=True):
    """A workload by its resolved line or lines, what its users expect, and what of it
    configurations can take."""

    name: str
    source: str | tuple[str, ...]
    slo: Slo = Slo()
    capacity: Mapping[str, float] = {}


class Scenario(msgspec.Struct, frozen=True):
    """What a file means, with everything looked up.

    ``model``: as the file names it. ``setup`` has no roles; ``prefill_workers``: how many get
    that one where a configuration splits them. ``compare``: empty for all configurations.
    """

    name: str
    model: str
    setup: ClusterSetup
    workloads: tuple[Source, ...]
    seeds: int
    compare: tuple[str, ...]
    reference: str
    prefill_workers: int = 0
    faults: Faults = Faults()


class Overrides(msgspec.Struct, frozen=True):
    """What a command line changes. ``traces``: where trace files are, besides the YAML's folder;
    ``runs`` and ``calls`` (per run) shorten every workload."""

    traces: Path | None = None
    runs: int | None = None
    calls: int | None = None


def load(path: Path, overrides: Overrides | None = None) -> Scenario:
    """Reads a file. ConfigError with every problem found."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError([f"{path}: {reason}"]) from error
    return parse(text, path, overrides or Overrides())


def parse(text: str, path: Path, overrides: Overrides) -> Scenario:
    """Reads a scenario's YAML, which stands in ``path``. ConfigError with every problem found."""
    document = Document(text, str(path))
    file = read(document, ScenarioFile) if document.data is not None else None
    scenario = None
    if file is not None:
        scenario = _meaning(document, file, path, overrides)
    elif not document.problems():
        document.problem((), "the file is empty")
    if document.problems() or scenario is None:
        raise ConfigError(document.problems())
    return scenario


def _meaning(
    document: Document, file: ScenarioFile, path: Path, overrides: Overrides
) -> Scenario | None:
    """The file with everything looked up; reports what is wrong, and then may be None."""
    subject = _subject(document, file, path.parent)
    workers = _workers(document, file.workers, subject.tp if subject else file.tp or 1)
    prefill = _prefill_workers(document, file.workers)
    sources = _sources(document, file, path.parent, overrides)
    setup = None
    if subject is not None and workers:
        setup = ClusterSetup(
            shape=subject.shape,
            hardware=subject.hardware,
            workers=workers,
            efficiency=subject.efficiency,
            tp=subject.tp,
            options=file.engine,
            network=file.network,
            limits=file.limits,
            placement=file.placement,
            api_servers=file.api_servers,
            kv_host_gib=file.workers.kv_host_gib,
            host_bytes_per_s=file.workers.host_bytes_per_s,
        )
        _fits(document, setup)
        _links(document, setup)
    _workloads(document, sources, file.engine)
    _compared(document, file)
    if setup is None or document.problems():
        return None
    return Scenario(
        name=file.name or _name_of_file(path),
        model=file.model,
        setup=setup,
        workloads=tuple(sources),
        seeds=file.seeds,
        compare=tuple(file.compare or ()),
        reference=file.reference or "",
        prefill_workers=prefill,
        faults=file.faults,
    )


def _subject(document: Document, file: ScenarioFile, folder: Path) -> Subject | None:
    try:
        return find_subject(file.model, file.hardware, file.tp, file.dtype, folder)
    except SubjectError as error:
        document.problem((error.key,), str(error))
        return None


# --- workers --------------------------------------------------------------------


def _workers(document: Document, entry: WorkersEntry, tp: int) -> tuple[WorkerSetup, ...]:
    """The engines on their nodes, without roles: these are the configurations' affair."""
    if tp > entry.gpus_per_node:
        document.problem(
            ("workers", "gpus_per_node"),
            f"an engine of {tp} devices is larger than a node of {entry.gpus_per_node}; "
            "engines over several nodes are not simulated",
        )
        return ()
    total = entry.count or entry.prefill + entry.decode
    engines_per_node = entry.gpus_per_node // tp
    engines_per_rack = engines_per_node * entry.nodes_per_rack
    digits = len(str(total - 1))
    return tuple(
        WorkerSetup(
            name=f"worker-{number:0{digits}}",
            role="mixed",
            node=f"node-{number // engines_per_node}",
            rack=f"rack-{number // engines_per_rack}",
        )
        for number in range(total)
    )


def _prefill_workers(document: Document, entry: WorkersEntry) -> int:
    """How many prefill where roles are split; 0 if there is only one worker."""
    if entry.count is None:
        if entry.ratio is not None:
            document.problem(("workers", "ratio"), "says nothing without 'count'")
        if not entry.prefill or not entry.decode:
            document.problem(("workers",), "give count, or how many prefill and decode")
        return entry.prefill
    for key in ("prefill", "decode"):
        if getattr(entry, key):
            document.problem(("workers", key), "excludes 'count'")
    ratio = entry.ratio or DEFAULT_RATIO
    if len(ratio) != 2:
        document.problem(("workers", "ratio"), "takes two numbers: those that prefill, decode")
        return 0
    return prefill_workers(entry.count, *ratio) if entry.count > 1 else 0


def _fits(document: Document, setup: ClusterSetup) -> None:
    """The model, and one call of the longest length, have room on an engine."""
    options = setup.options
    try:
        tokens = setup.kv_blocks() * options.block_size
    except DoesNotFit as error:
        document.problem(("model",), str(error))
        return
    except ValueError as error:  # arithmetic or links that the hardware does not have
        document.problem(("hardware",) if document.has(("hardware",)) else ("model",), str(error))
        return
    if tokens < options.max_model_len:
        key = "max_model_len" if document.has(("engine", "max_model_len")) else "kv_blocks"
        document.problem(
            ("engine", key),
            f"a call may have {options.max_model_len} tokens (max_model_len), but an engine has "
            f"KV for {tokens} only: {setup.tp} x {setup.hardware.name} hold "
            f"{setup.shape.weights_bytes / 1e9:.1f} GB of weights and "
            f"{setup.shape.kv_bytes_per_token / 1e3:.1f} kB per token",
        )


def _links(document: Document, setup: ClusterSetup) -> None:
    """Every tier that is used has a rate."""
    network, known = setup.network, setup.hardware.links
    for tier, link in network.links.items():
        if link.bytes_per_s <= 0 or link.latency_s < 0:
            document.problem(
                ("network", "links", tier), "bytes_per_s must be above 0, latency_s not below"
            )
    for key in ("same_node", "same_rack", "across"):
        tier = getattr(network, key)
        if tier not in known and tier not in network.links:
            document.problem(
                ("network", key),
                f"{setup.hardware.name} has no {tier} link (it has {', '.join(known)}); "
                "choose one of these, or say what it is in network.links",
            )


# --- workloads ------------------------------------------------------------------


def _sources(
    document: Document, file: ScenarioFile, folder: Path, overrides: Overrides
) -> list[Source]:
    sources: list[Source] = []
    if not file.workloads:
        document.problem(("workloads",), "there are none")
    for index, entry in enumerate(file.workloads):
        if entry.name in [source.name for source in sources]:
            document.problem(("workloads", index, "name"), "given twice")
        several = isinstance(entry.source, list)
        given = entry.source if isinstance(entry.source, list) else [entry.source]
        lines: list[str] = []
        for number, line in enumerate(given):
            path = ("workloads", index, "source")
            try:
                line = resolved(line, folder, overrides.traces)
            except SourceError as error:
                document.problem((*path, number) if several else path, str(error))
                continue
            lines.append(with_options(line, {"runs": overrides.runs, "calls": overrides.calls}))
        if not given:
            document.problem(("workloads", index, "source"), "there is none")
        complete = lines if len(lines) == len(given) else []
        found = tuple(complete) if several else "".join(complete)
        sources.append(Source(entry.name, found, entry.slo or file.slo, entry.capacity))
    return sources


def _workloads(document: Document, sources: list[Source], options: EngineOptions) -> None:
    """They can be read, and their calls are such that an engine takes them."""
    for index, source in enumerate(sources):
        if not source.source:
            continue
        path = ("workloads", index, "source")
        try:
            workload = open_source(source.source, seed=0)
        except WorkloadError as error:
            document.problem(path, str(error))
            continue
        problem = _too_long(workload, options.max_model_len)
        if problem:
            document.problem(path, problem)


def _too_long(workload: Workload, tokens_max: int) -> str:
    """Why some calls of a workload could never be served; empty if all could."""
    lengths = [
        call.prompt_tokens + call.output_tokens for run in workload.runs for call in run.calls
    ]
    if not lengths:
        return "no run is left of it"
    long = sum(length > tokens_max for length in lengths)
    if not long:
        return ""
    return (
        f"{long} of {len(lengths)} calls are longer than an engine takes: up to {max(lengths)} "
        f"tokens, engine.max_model_len is {tokens_max}; raise it, or add prompt_max= or scale= "
        "to the source"
    )


def _compared(document: Document, file: ScenarioFile) -> None:
    names = file.compare or []
    for index, name in enumerate(names):
        if name in names[:index]:
            document.problem(("compare", index), "given twice")
    if file.reference is not None and names and file.reference not in names:
        hint = suggestion(file.reference, names)
        document.problem(("reference",), f"is not among 'compare'{hint}")


def _name_of_file(path: Path) -> str:
    letters = "".join(char if char.isalnum() else "-" for char in path.stem.lower())
    return letters.strip("-")[:63] or "scenario"

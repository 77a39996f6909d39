"""A scenario's workloads: where their files are, and the same line with another seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from cluster.workload.change import mixed
from cluster.workload.form import Workload, WorkloadError
from cluster.workload.source import FORMATS, open_workload

SUFFIXES = ("", ".jsonl.gz", ".jsonl", ".csv.gz", ".csv")
"""What may be left out of a trace's file name."""


class SourceError(ValueError):
    """A workload's file is not there; the text says where it was looked for."""


PART_SEEDS = 1_000_003
"""Between the seeds of a workload's several sources."""


def resolved(source: str, folder: Path, traces: Path | None) -> str:
    """The line with its file's whole path; a file is looked for in ``folder``, then ``traces``.

    Generators are as they are. SourceError if there is no such file.
    """
    place, mark, query = source.partition("?")
    kind, colon, name = place.partition(":")
    if colon and kind == "generator":
        return source
    if colon and kind in FORMATS:
        return f"{kind}:{_file(name, folder, traces)}{mark}{query}"
    return f"{_file(place, folder, traces)}{mark}{query}"


def _file(name: str, folder: Path, traces: Path | None) -> Path:
    folders = [folder, *([traces] if traces else [])]
    for place in folders:
        for suffix in SUFFIXES:
            path = place / f"{name}{suffix}"
            if path.is_file():
                return path.resolve()
    looked = " and ".join(str(place) or "." for place in folders)
    hint = "" if traces else "; --traces or PYTHIA_TRACES name a folder of trace files"
    raise SourceError(f"no file {name!r} in {looked}{hint}")


def with_options(source: str, options: Mapping[str, object]) -> str:
    """The line with these options in the place of its own; None changes nothing."""
    changes = {name: str(value) for name, value in options.items() if value is not None}
    if not changes:
        return source
    place, _, query = source.partition("?")
    return f"{place}?{urlencode({**dict(parse_qsl(query, keep_blank_values=True)), **changes})}"


def with_load(source: str, factor: float) -> str:
    """The line with ``factor`` times as many arrivals a second. SourceError without any."""
    _, _, query = source.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in ("rate", "speed"):
        if name in options:
            try:
                value = float(options[name]) * factor
            except ValueError:
                break
            return with_options(source, {name: f"{value:.4g}"})
    raise SourceError(f"{source}: to change its load it has to say rate= or speed=")


def open_source(source: str | tuple[str, ...], seed: int) -> Workload:
    """The workload of ``seed``, which decides what is drawn, when runs arrive and what is
    generated; a line with a seed of its own always means the same. WorkloadError.

    Several lines mean all of them at once, each with chance of its own: their runs have to
    arrive at times.
    """
    if not isinstance(source, str):
        return mixed([_part(line, seed + at * PART_SEEDS) for at, line in enumerate(source)])
    _, _, query = source.partition("?")
    if "seed" in dict(parse_qsl(query)):
        return open_workload(source)
    return open_workload(with_options(source, {"seed": seed}))


def _part(source: str, seed: int) -> Workload:
    workload = open_source(source, seed)
    if workload.concurrency:
        raise WorkloadError(f"{source}: a closed loop can't be mixed with others; say rate=")
    if not workload.arrivals_known:
        raise WorkloadError(f"{source}: its runs have no arrivals to mix them by; say rate=")
    return workload

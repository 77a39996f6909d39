"""A scenario's workloads: where their files are, and the same line with another seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from cluster.workload.form import Workload
from cluster.workload.source import READERS, open_workload

SUFFIXES = ("", ".jsonl.gz", ".jsonl")
"""What may be left out of a trace's file name."""


class SourceError(ValueError):
    """A workload's file is not there; the text says where it was looked for."""


def resolved(source: str, folder: Path, traces: Path | None) -> str:
    """The line with its file's whole path; a file is looked for in ``folder``, then ``traces``.

    Generators are as they are. SourceError if there is no such file.
    """
    place, mark, query = source.partition("?")
    kind, colon, name = place.partition(":")
    if colon and kind == "generator":
        return source
    if colon and kind in READERS:
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


def with_options(source: str, options: Mapping[str, int | None]) -> str:
    """The line with these options in the place of its own; None changes nothing."""
    changes = {name: str(value) for name, value in options.items() if value is not None}
    if not changes:
        return source
    place, _, query = source.partition("?")
    return f"{place}?{urlencode({**dict(parse_qsl(query, keep_blank_values=True)), **changes})}"


def open_source(source: str, seed: int) -> Workload:
    """The workload of ``seed``, which decides what is drawn, when runs arrive and what is
    generated; a line with a seed of its own always means the same. WorkloadError."""
    _, _, query = source.partition("?")
    if "seed" in dict(parse_qsl(query)):
        return open_workload(source)
    return open_workload(with_options(source, {"seed": seed}))

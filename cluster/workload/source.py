"""A workload from one line of text, as command lines take it.

::

    traces/weka_single.jsonl.gz                    a file; its format is found out
    mooncake:requests.jsonl?rate=2&scale=16        a file of a named format, changed
    generator:review?runs=100&seed=1&rate=0.5      generated
    servegen:windows.csv?model=m&windows=6&share=0.01     drawn from rates and mean lengths

After ``?``, joined by ``&``:

``scale`` divides lengths, ``pace`` divides pauses and arrivals, ``pause_max`` is the longest
pause (in seconds, before ``pace``); ``runs`` and ``calls`` (per run) limit, ``prompt_max`` leaves
out runs with longer prompts (in tokens, after scaling); ``sample`` of the runs that are left are
drawn; ``rate`` runs per second arrive, with ``burst`` (variation of gaps) in bursts; ``closed``
runs are kept going; ``speed`` replays recorded arrivals; ``anonymous`` clients do not say which
run or agent calls; ``tenant`` says whose runs they are; each call asks for ``samples`` answers, or
is sent ``repeats`` times at once; ``seed`` is all the chance there is.
Generators also take ``width``, ``stages`` and ``rounds``, and generate ``runs`` runs of
``calls`` calls. Of ServeGen's windows ``model``, ``first`` (number of a window), ``windows`` (how
many) and ``share`` (of the requests) say which; see ``servegen``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl

import msgspec

from cluster.workload.change import (
    Bursty,
    ClosedLoop,
    Poisson,
    Recorded,
    anonymous,
    limited,
    of_tenant,
    sampled,
    scaled,
    with_arrivals,
    with_pace,
    with_pauses_cut,
    with_samples,
)
from cluster.workload.common import read_common
from cluster.workload.dag import read_dag
from cluster.workload.form import Workload, WorkloadError
from cluster.workload.generators import GENERATORS, Options, generated
from cluster.workload.habits import load_habits
from cluster.workload.lines import lines
from cluster.workload.mooncake import read_mooncake
from cluster.workload.servegen import HEADER, Windows, read_servegen

READERS: Mapping[str, Callable[[Path], Workload]] = {
    "common": read_common,
    "mooncake": read_mooncake,
    "dag_jsonl": read_dag,
}
SERVEGEN = "servegen"
FORMATS = (*READERS, SERVEGEN)
MARKS = {"meta": "common", "hash_ids": "mooncake", "turns": "dag_jsonl", "session_id": "dag_jsonl"}
"""Keys of a file's first line that tell its format."""

T = TypeVar("T", bound=msgspec.Struct)
Above0 = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
AtMost64 = Annotated[int, msgspec.Meta(ge=1, le=64)]
AtLeast1 = Annotated[int, msgspec.Meta(ge=1, le=2**31)]


class Changes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is done to a workload after it was read or generated; see the module."""

    seed: int = 0
    scale: AtLeast1 = 1
    pace: Above0 = 1.0
    pause_max: Above0 | None = None
    runs: AtLeast1 | None = None
    calls: AtLeast1 | None = None
    prompt_max: AtLeast1 | None = None
    sample: AtLeast1 | None = None
    rate: Above0 | None = None
    burst: Above0 | None = None
    closed: AtLeast1 | None = None
    speed: Above0 | None = None
    anonymous: bool = False
    tenant: str = ""
    samples: AtMost64 = 1
    repeats: AtMost64 = 1


def open_workload(spec: str) -> Workload:
    """The workload that a line of text means; WorkloadError says what is wrong with it."""
    place, _, query = spec.partition("?")
    options = _options(spec, query)
    kind, colon, name = place.partition(":")
    if colon and kind == "generator":
        return _generated(spec, name, options)
    path = Path(name) if colon and kind in FORMATS else Path(place)
    if colon and path == Path(place) and not path.exists():
        raise WorkloadError(f"{spec}: {_unknown('format', kind, [*FORMATS, 'generator'])}")
    form = kind if colon and kind in FORMATS else detected(path)
    if form == SERVEGEN:
        return _servegen(spec, path, options)
    changes = _converted(spec, options, Changes)
    return _changed(spec, READERS[form](path), changes)


def detected(path: Path) -> str:
    """The format of a file, by its first line."""
    line = next(lines(path), None)
    if line is None:
        raise WorkloadError(f"{path}: empty")
    if line.data.strip() == HEADER:
        return SERVEGEN
    first = line.read(msgspec.json.Decoder(dict[str, Any]))
    for key, found in MARKS.items():
        if key in first:
            return found
    raise line.wrong(f"of no known format ({', '.join(FORMATS)})")


def _generated(spec: str, name: str, options: dict[str, str]) -> Workload:
    if name not in GENERATORS:
        raise WorkloadError(f"{spec}: {_unknown('generator', name, list(GENERATORS))}")
    wanted, changes = _divided(spec, options, Options)
    workload = generated(name, load_habits(), wanted, random.Random(changes.seed))
    return _changed(spec, workload, changes)


def _servegen(spec: str, path: Path, options: dict[str, str]) -> Workload:
    wanted, changes = _divided(spec, options, Windows)
    rng = random.Random(f"{changes.seed} windows")
    return _changed(spec, read_servegen(path, wanted, rng), changes)


def _divided(spec: str, options: dict[str, str], kind: type[T]) -> tuple[T, Changes]:
    """What a source is told, and what is changed of what it gives."""
    shape = kind.__struct_fields__
    for option in options:
        known = [*shape, *Changes.__struct_fields__]
        if option not in known:
            raise WorkloadError(f"{spec}: {_unknown('option', option, known)}")
    own = {key: value for key, value in options.items() if key in shape}
    rest = {key: value for key, value in options.items() if key not in shape}
    changes = _converted(spec, rest, Changes)
    return _converted(spec, own, kind), changes


def _changed(spec: str, workload: Workload, changes: Changes) -> Workload:
    if changes.scale > 1:
        workload = scaled(workload, changes.scale)
    if changes.runs or changes.calls or changes.prompt_max:
        workload = limited(workload, changes.runs, changes.calls, changes.prompt_max)
    if changes.sample is not None:
        workload = sampled(workload, changes.sample, random.Random(f"{changes.seed} sample"))
    if changes.pause_max is not None:
        workload = with_pauses_cut(workload, changes.pause_max)
    if changes.pace != 1:
        workload = with_pace(workload, changes.pace)
    if changes.anonymous:
        workload = anonymous(workload)
    if changes.tenant:
        workload = of_tenant(workload, changes.tenant)
    if changes.samples > 1:
        workload = with_samples(workload, changes.samples, together=True)
    if changes.repeats > 1:
        workload = with_samples(workload, changes.repeats, together=False)
    return _arriving(spec, workload, changes)


def _arriving(spec: str, workload: Workload, changes: Changes) -> Workload:
    # Of its own, so that the same seed gives the same runs at any rate.
    rng = random.Random(f"{changes.seed} arrivals")
    given = [name for name in ("rate", "closed", "speed") if getattr(changes, name) is not None]
    if len(given) > 1:
        raise WorkloadError(f"{spec}: {' and '.join(given)} exclude each other")
    if changes.burst is not None and changes.rate is None:
        raise WorkloadError(f"{spec}: burst needs a rate")
    if changes.rate is not None and changes.burst is not None:
        return with_arrivals(workload, Bursty(changes.rate, changes.burst), rng)
    if changes.rate is not None:
        return with_arrivals(workload, Poisson(changes.rate), rng)
    if changes.closed is not None:
        return with_arrivals(workload, ClosedLoop(changes.closed), rng)
    if changes.speed is not None:
        return with_arrivals(workload, Recorded(changes.speed), rng)
    return workload


def _options(spec: str, query: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError as error:
        raise WorkloadError(f"{spec}: options are written a=1&b=2") from error
    options = dict(pairs)
    if len(options) < len(pairs):
        raise WorkloadError(f"{spec}: an option is given twice")
    return options


def _converted(spec: str, options: dict[str, str], kind: type[T]) -> T:
    for option in options:
        if option not in kind.__struct_fields__:
            known = list(kind.__struct_fields__)
            raise WorkloadError(f"{spec}: {_unknown('option', option, known)}")
    try:
        return msgspec.convert(options, kind, strict=False)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$.")
        raise WorkloadError(f"{spec}: {path.rstrip('`')}: {what}") from error


def _unknown(what: str, given: str, known: list[str]) -> str:
    near = get_close_matches(given, known, 1)
    hint = f", did you mean {near[0]!r}?" if near else ";"
    return f"no {what} {given!r}{hint} there are: {', '.join(known)}"

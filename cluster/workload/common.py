"""The common form of traces: a line of ``meta``, then one call a line; read and written.

What a trace does not record is filled in by these rules, or refused:

* no session id: every call is a run of its own;
* no pause, but times: the pause is what is left between the calls after the answer, whose
  duration, if not recorded either, is its tokens at ``ASSUMED_TOKENS_PER_S``;
* a join: its recorded pause began when the call that forked ended, so what counts is the time
  since the last of its parents ended, if that is less;
* no times at all: no pauses, and arrivals that nobody may call recorded;
* no block ids: no prompt shares anything;
* no answer: one token, since an engine gives at least that;
* no prompt length: refused, unless the caller says what to assume.

Workloads written here are read back equal. They say the run's arrival in every ``t``
(``clock`` is ``run``), and have two fields more, ``workflow`` and ``scope``.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec.structs import replace

from cluster.workload.form import BLOCK_TOKENS, Call, Run, Workload, session_scope
from cluster.workload.lineage import linked
from cluster.workload.lines import Line, lines, workload_name
from cluster.workload.spans import Spans, cut, merged, total

ASSUMED_TOKENS_PER_S = 50.0
"""How fast an answer is thought to have come where its duration is not recorded."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e10)]
BlockId = Annotated[int, msgspec.Meta(ge=0, le=2**60)]


class Meta(msgspec.Struct, frozen=True, rename={"source": "src", "licence": "license"}):
    """What holds for the whole file. ``clock``: what ``t`` counts from."""

    source: str = ""
    licence: str = ""
    bs: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] | None = None
    scope: Literal["session", "global"] = "session"
    clock: Literal["session", "trace", "run"] | None = None
    name: str = ""
    arrivals_known: bool = True
    concurrency: Count = 0
    dropped_runs: Count = 0


class Head(msgspec.Struct, frozen=True):
    """The first line."""

    meta: Meta


class Entry(msgspec.Struct, frozen=True, rename={"prompt": "in"}):
    """One call. The names are the form's."""

    sid: str | None
    i: Count
    prompt: Count | None
    out: Count
    agent: str | None = None
    kind: str | None = None
    stage: str | None = None
    par: tuple[Count, ...] = ()
    t: Seconds | None = None
    dur: Seconds | None = None
    think: Seconds | None = None
    h: tuple[tuple[BlockId, Count], ...] | None = None
    workflow: str = ""
    scope: str = ""


_head_decoder = msgspec.json.Decoder(Head)
_entry_decoder = msgspec.json.Decoder(Entry)
_Session = list[tuple[Line, Entry]]


def read_common(path: Path, assumed_prompt_tokens: int = 0) -> Workload:
    """The workload of a file in the common form; WorkloadError if it is not one.

    ``assumed_prompt_tokens``: the length of prompts whose length is not recorded, for those who
    ask for nothing that depends on it; 0 refuses them.
    """
    source = lines(path)
    first = next(source, None)
    if first is None:
        raise Line(path, 1, b"").wrong("empty: a line with meta was expected")
    meta = first.read(_head_decoder).meta
    name = meta.name or workload_name(path)
    block_tokens = meta.bs or BLOCK_TOKENS
    runs = [
        _run(session, meta, name, block_tokens)
        for session in _sessions(source, assumed_prompt_tokens)
    ]
    known = meta.clock in ("trace", "run") and meta.arrivals_known
    if known and meta.clock == "trace":
        runs.sort(key=lambda run: run.arrival_s)
    return Workload(
        name=name,
        source=meta.source,
        licence=meta.licence,
        block_tokens=block_tokens,
        runs=linked(runs, block_tokens),
        arrivals_known=known,
        concurrency=meta.concurrency,
        dropped_runs=meta.dropped_runs,
    )


def write_common(workload: Workload, path: Path) -> None:
    """Write a workload; gzipped if the name ends in ``.gz``. Same workload, same bytes."""
    encode = msgspec.json.Encoder().encode
    with path.open("wb") as plain:
        zipped = path.suffix == ".gz"
        file: Any = gzip.GzipFile("", "wb", fileobj=plain, mtime=0) if zipped else plain
        file.write(encode(Head(_meta(workload))) + b"\n")
        for run in workload.runs:
            for call in run.calls:
                file.write(encode(_entry(run, call)) + b"\n")
        if zipped:
            file.close()


def _meta(workload: Workload) -> Meta:
    return Meta(
        source=workload.source,
        licence=workload.licence,
        bs=workload.block_tokens,
        clock="run",
        name=workload.name,
        arrivals_known=workload.arrivals_known,
        concurrency=workload.concurrency,
        dropped_runs=workload.dropped_runs,
    )


def _entry(run: Run, call: Call) -> Entry:
    return Entry(
        sid=run.id,
        i=call.index,
        prompt=call.prompt_tokens,
        out=call.output_tokens,
        agent=call.agent,
        kind=call.kind,
        stage=call.stage,
        par=call.parents,
        t=run.arrival_s,
        think=call.think_s,
        h=call.blocks,
        workflow=run.workflow,
        scope=run.scope,
    )


def _sessions(source: Iterator[Line], assumed_prompt_tokens: int) -> Iterator[_Session]:
    """The calls of one session at a time; they must stand together."""
    session: _Session = []
    closed: set[str] = set()
    for line in source:
        entry = line.read(_entry_decoder)
        if entry.prompt is None and assumed_prompt_tokens:
            entry = replace(entry, prompt=assumed_prompt_tokens)
        if session and (entry.sid is None or entry.sid != session[0][1].sid):
            yield session
            closed.add(session[0][1].sid or "")
            session = []
        if entry.sid is not None and entry.sid in closed:
            raise line.wrong(f"session {entry.sid!r} goes on after another one", "sid")
        session.append((line, entry))
    if session:
        yield session


def _run(session: _Session, meta: Meta, name: str, block_tokens: int) -> Run:
    first = session[0][1]
    run_id = first.sid if first.sid is not None else str(first.i)
    known = any(entry.h is not None for _, entry in session)
    calls: list[Call] = []
    unshared_from = 0
    for line, entry in session:
        _check(line, entry, len(calls), first.sid is None)
        prompt_tokens = entry.prompt or 0
        blocks = _blocks(line, entry, prompt_tokens // block_tokens, unshared_from)
        unshared_from += total(blocks)
        if known and entry.h is None:
            raise line.wrong("missing, though other calls of the session have it", "h")
        calls.append(
            Call(
                index=len(calls),
                parents=entry.par,
                think_s=_think_s(entry, [session[parent][1] for parent in entry.par]),
                prompt_tokens=prompt_tokens,
                output_tokens=max(1, entry.out),
                blocks=blocks,
                agent=entry.agent or "",
                kind=entry.kind or "",
                stage=entry.stage or "",
            )
        )
    own = session_scope(name, run_id)
    return Run(
        id=run_id,
        workflow=first.workflow or name,
        arrival_s=(first.t or 0.0) if meta.clock in ("trace", "run") else 0.0,
        scope=first.scope or (name if known and meta.scope == "global" else own),
        calls=tuple(calls),
    )


def _check(line: Line, entry: Entry, index: int, alone: bool) -> None:
    if entry.prompt is None:
        raise line.wrong("prompt lengths are not recorded here, so it cannot be replayed", "in")
    if not entry.prompt:
        raise line.wrong("an empty prompt", "in")
    if not alone and entry.i != index:
        raise line.wrong(f"{entry.i} where {index} is next", "i")
    if any(parent >= index for parent in entry.par):
        raise line.wrong(f"{list(entry.par)} are not all before call {index}", "par")


def _blocks(line: Line, entry: Entry, full_blocks: int, unshared_from: int) -> Spans:
    """The ids of the prompt's full blocks; some traces have one for the partial last one, too."""
    if entry.h is None:
        return merged([(unshared_from, full_blocks)])
    blocks = merged(entry.h)
    if total(blocks) < full_blocks:
        raise line.wrong(
            f"{total(blocks)} blocks where the prompt has {full_blocks} full ones", "h"
        )
    return cut(blocks, full_blocks)


def _think_s(entry: Entry, parents: list[Entry]) -> float:
    if entry.think is not None and len(parents) < 2:
        return entry.think
    passed_s = None
    if entry.t is not None and parents and all(parent.t is not None for parent in parents):
        passed_s = max(0.0, entry.t - max(_end_s(parent) for parent in parents))
    if entry.think is None:
        return passed_s or 0.0
    if passed_s is None or any(parent.dur is None for parent in parents):
        return entry.think
    return min(entry.think, passed_s)


def _end_s(entry: Entry) -> float:
    duration_s = entry.dur if entry.dur is not None else entry.out / ASSUMED_TOKENS_PER_S
    return (entry.t or 0.0) + duration_s

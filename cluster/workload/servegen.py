"""ServeGen's windows: how many requests came in ten minutes, and their mean lengths.

Lines of ``model,t_s,req_per_s,mean_in,mean_out,clients``, each a window of a model's traffic that
begins at ``t_s``, as made from the production traces of Alibaba (Xiang et al., "ServeGen: Workload
Characterization and Generation of Large Language Model Serving in Production", NSDI 26). There
are no single requests in it, so these are drawn: arrivals at random with the window's rate
(Poisson), prompts from a log-normal distribution (``PROMPT_SIGMA``) and answers from an
exponential one with the window's means. Real arrivals come in bursts and real prompts have
longer tails, of which a window does not tell. So how the mix changes from hour to hour is
production's, and what happens within seconds is made up. Every request is a run of its own,
and prompts share nothing.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from cluster.workload.form import BLOCK_TOKENS, Call, Run, Workload, WorkloadError, session_scope
from cluster.workload.lineage import linked
from cluster.workload.lines import Line, lines, workload_name

HEADER = b"model,t_s,req_per_s,mean_in,mean_out,clients"
WINDOW_S = 600.0
PROMPT_SIGMA = 1.0
"""Of the logarithms of prompt lengths; a guess: windows tell means only."""
TOKENS_MAX = 131_072
REQUESTS_MAX = 1_000_000


class Windows(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which requests: of ``model`` (may be left out if there is one), in ``windows`` windows from
    number ``first`` on (all of the rest for 0), and ``share`` of them."""

    model: str = ""
    first: Annotated[int, msgspec.Meta(ge=0)] = 0
    windows: Annotated[int, msgspec.Meta(ge=0)] = 0
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0


class _Window(NamedTuple):
    model: str
    begins_s: float
    rate_per_s: float
    prompt_tokens: float
    output_tokens: float


def read_servegen(path: Path, wanted: Windows, rng: random.Random) -> Workload:
    """Requests drawn from a file's windows; WorkloadError if that is not to be had.

    Arrivals count from the beginning of the first window that is wanted.
    """
    windows = _chosen(path, wanted)
    expected = sum(window.rate_per_s for window in windows) * WINDOW_S * wanted.share
    if expected > REQUESTS_MAX:
        raise WorkloadError(
            f"{path}: about {expected:,.0f} requests in {len(windows)} windows, more than "
            f"{REQUESTS_MAX:,}: choose fewer windows (first=, windows=) or less of them (share=)"
        )
    began_s, model = windows[0].begins_s, windows[0].model
    name = f"{workload_name(path)}-{model}"
    runs = [
        _run(number, at_s - began_s, window, name, rng)
        for number, (at_s, window) in enumerate(_arrivals(windows, wanted.share, rng))
    ]
    return Workload(
        name=name,
        source=str(path),
        licence="",
        block_tokens=BLOCK_TOKENS,
        runs=linked(runs, BLOCK_TOKENS),
        arrivals_known=True,
    )


def _chosen(path: Path, wanted: Windows) -> list[_Window]:
    found = list(_windows(path))
    models = list(dict.fromkeys(window.model for window in found))
    model = wanted.model or (models[0] if len(models) == 1 else "")
    if model not in models:
        near = get_close_matches(model, models, 1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        said = f"no model {model!r}{hint}" if model else "say which model (model=)"
        raise WorkloadError(f"{path}: {said}; there are: {', '.join(models)}")
    windows = sorted(
        (window for window in found if window.model == model), key=lambda each: each.begins_s
    )
    end = wanted.first + wanted.windows if wanted.windows else len(windows)
    chosen = windows[wanted.first : end]
    if not chosen:
        raise WorkloadError(f"{path}: {model} has {len(windows)} windows, none from {wanted.first}")
    return chosen


def _windows(path: Path) -> Iterator[_Window]:
    source = lines(path)
    first = next(source, None)
    if first is None or first.data.strip() != HEADER:
        line = first or Line(path, 1, b"")
        raise line.wrong(f"{HEADER.decode()} was expected")
    for line in source:
        yield _window(line)


def _window(line: Line) -> _Window:
    names = HEADER.decode().split(",")
    try:
        (fields,) = csv.reader([line.data.decode()])
    except (ValueError, UnicodeDecodeError) as error:
        raise line.wrong(f"not a line of values with commas: {error}") from error
    if len(fields) != len(names):
        raise line.wrong(f"{len(fields)} values, {len(names)} were expected")
    numbers = [_number(line, *each) for each in zip(names[1:5], fields[1:5], strict=True)]
    return _Window(fields[0], *numbers)


def _number(line: Line, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise line.wrong(f"{text!r} is no number", name) from error
    if not 0 <= value <= 1e9:
        raise line.wrong(f"{text} is not from 0 to 1e9", name)
    return value


def _arrivals(
    windows: list[_Window], share: float, rng: random.Random
) -> Iterator[tuple[float, _Window]]:
    """When requests come, in order; nothing comes while no window says so."""
    for window in windows:
        rate_per_s = window.rate_per_s * share
        if not rate_per_s:
            continue
        at_s, ends_s = window.begins_s, window.begins_s + WINDOW_S
        while (at_s := at_s + rng.expovariate(rate_per_s)) < ends_s:
            yield at_s, window


def _run(number: int, arrival_s: float, window: _Window, name: str, rng: random.Random) -> Run:
    mu = math.log(max(1.0, window.prompt_tokens)) - PROMPT_SIGMA**2 / 2
    prompt_tokens = _tokens(rng.lognormvariate(mu, PROMPT_SIGMA))
    run_id = str(number)
    call = Call(
        index=0,
        parents=(),
        think_s=0.0,
        prompt_tokens=prompt_tokens,
        output_tokens=_tokens(rng.expovariate(1.0 / max(1.0, window.output_tokens))),
        blocks=((0, prompt_tokens // BLOCK_TOKENS),) if prompt_tokens >= BLOCK_TOKENS else (),
    )
    return Run(run_id, window.model, arrival_s, session_scope(name, run_id), (call,))


def _tokens(drawn: float) -> int:
    return min(TOKENS_MAX, max(1, round(drawn)))

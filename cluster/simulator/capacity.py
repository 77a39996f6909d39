"""How much a configuration can take of a workload, and at what load systems are compared.

Capacity is the highest rate of arrivals at which 90 % of all calls are good, as DistServe's
goodput (Zhong et al., OSDI 2024): served, with the first token and the time between tokens within
what the workload's ``slo`` says. It is looked for by bisection of the rate's logarithm, with the
same seeds at every rate. Factors are multiples of the rates that the sources name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from statistics import fmean

import msgspec

from cluster.schema import ConfigError
from cluster.simulator.configurations import replay
from cluster.simulator.measures import is_good
from cluster.simulator.scenario import Scenario, Source
from cluster.simulator.source import open_source, with_load

GOOD_SHARE = 0.9
LOAD_SHARE = 0.9
"""Of the capacity of whoever can take most: where all are compared."""
TOLERANCE = 1.05
"""Bisection ends when the bounds are so close."""
FACTOR_MOST = 64.0
CANDIDATES = ("aggregated-sticky", "aggregated-cost", "pd-sticky-conditional", "pd-cost")
"""Who may be the strongest baseline."""


class CapacityTask(msgspec.Struct, frozen=True):
    """One search to do."""

    workload: str
    configuration: str
    seeds: int


def loaded(source: Source, factor: float) -> Source:
    """The workload with ``factor`` times as many arrivals a second."""
    lines = (source.source,) if isinstance(source.source, str) else source.source
    found = tuple(with_load(line, factor) for line in lines)
    return msgspec.structs.replace(
        source, source=found[0] if isinstance(source.source, str) else found
    )


def capacity(good_share: Callable[[float], float]) -> float:
    """The factor at which ``good_share``, which falls with it, falls below ``GOOD_SHARE``.

    ValueError if it does so neither at ``FACTOR_MOST`` nor at its inverse.
    """
    low = high = 1.0
    if good_share(1.0) >= GOOD_SHARE:
        while good_share(high := high * 2.0) >= GOOD_SHARE:
            low = high
            if high >= FACTOR_MOST:
                raise ValueError(f"more than {high:g} times the rate is served well")
    else:
        while good_share(low := low / 2.0) < GOOD_SHARE:
            high = low
            if low <= 1.0 / FACTOR_MOST:
                raise ValueError(f"not even {low:g} of the rate is served well")
    while high / low > TOLERANCE:
        middle = math.sqrt(low * high)
        if good_share(middle) >= GOOD_SHARE:
            low = middle
        else:
            high = middle
    return low


def find_capacity(scenario_text: bytes, task_text: bytes) -> bytes:
    """Runs in a process of its own: the factor, encoded."""
    scenario = msgspec.json.decode(scenario_text, type=Scenario)
    task = msgspec.json.decode(task_text, type=CapacityTask)
    source = next(each for each in scenario.workloads if each.name == task.workload)

    def good_share(factor: float) -> float:
        lines = loaded(source, factor).source
        shares = []
        for seed in range(task.seeds):
            result = replay(task.configuration, scenario, open_source(lines, seed), seed)
            shares.append(fmean(is_good(call, source.slo) for call in result.calls))
        return fmean(shares)

    return msgspec.json.encode(capacity(good_share))


def strongest(source: Source) -> str:
    """The baseline that can take most of a workload; ConfigError if nobody has looked."""
    if not source.capacity:
        raise ConfigError(
            [f"workload {source.name!r} has no 'capacity'; --find-load finds it and its rates"]
        )
    return max(source.capacity, key=lambda name: (source.capacity[name], name))


# --- in the file ----------------------------------------------------------------------------


def rewritten(text: str, name: str, factor: float, capacities: dict[str, float]) -> str:
    """A scenario's YAML with a workload's rates multiplied by ``factor`` and with what can be
    taken of it, in multiples of the new rates. Everything else stays as it is written.

    The workload's entry begins with a line ``- name: NAME``. ConfigError if there is none.
    """
    lines = text.splitlines()
    first, last = _entry(lines, name)
    body = [line for line in lines[first + 1 : last] if not line.lstrip().startswith("capacity:")]
    body = [_RATE.sub(lambda found: _scaled(found, factor), line) for line in body]
    indent = " " * (lines[first].index("-") + 2)
    known = ", ".join(f"{each}: {value:.3g}" for each, value in capacities.items())
    entry = [lines[first], f"{indent}capacity: {{{known}}}", *body]
    return "\n".join([*lines[:first], *entry, *lines[last:]]) + "\n"


_RATE = re.compile(r"(?P<name>[?&](?:rate|speed)=)(?P<value>[0-9.eE+-]+)")


def _scaled(found: re.Match[str], factor: float) -> str:
    return f"{found['name']}{float(found['value']) * factor:.4g}"


def _entry(lines: Sequence[str], name: str) -> tuple[int, int]:
    """Where a workload's lines begin and end."""
    begin = re.compile(rf"\s*- name: {re.escape(name)}\s*(#.*)?$")
    first = next((at for at, line in enumerate(lines) if begin.match(line)), None)
    if first is None:
        raise ConfigError([f"there is no line '- name: {name}' to write the capacity below"])
    indent = lines[first].index("-")
    for at in range(first + 1, len(lines)):
        line = lines[at]
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            return first, at
    return first, len(lines)

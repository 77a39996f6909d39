"""``pythia bench mechanisms``: the example workflow with Pythia's mechanisms on and off.

Parts, each with two clusters of three workers on this machine, one prefilling and two decoding, of
which one is measured at a time, taking turns in pairs:

    mechanisms  pulls, single flight, admission, retention, prefetch and warm-up, against none
    defaults    those that are on unless the file says otherwise, against none
    prefetch    the defaults and prefetch, against the defaults
    retention   the defaults, against them without retention
    warm_up     static prompts computed ahead, against the defaults (``warming``)
    placement   where a call decodes and how its KV gets there chosen together, against the
                decode worker with the most free KV; pulls and retention are off on both

A round is a few runs of the workflow side by side, with a question that no cache has seen, and what
counts is how long a run takes in the mean; of ``warm_up`` as many first calls of agents, and what
counts is the time to their first tokens. Ratios are the other side's times over ours: above 1 we
are faster. How many prompt tokens engines computed in a round is what vLLM counts.
"""

from __future__ import annotations

import asyncio
import importlib.util
import statistics
import sys
import time
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
from openai import AsyncOpenAI
from rich.console import Console
from rich.progress import Progress

from cluster.bench.report import show_parts, write
from cluster.bench.sides import HOST, cluster_config, progress_bar, scratch
from cluster.bench.warming import first_calls
from cluster.demo import EXAMPLE
from cluster.launch import LaunchError, LocalCluster
from cluster.progress import progress_for
from cluster.schema import ClusterConfig
from cluster.terminal import table_console
from coordinator.limits import Placement

COMMAND = "pythia bench mechanisms"
ROLES = ("prefill", "decode", "decode")
CALL_S = 300.0
QUIET_S = 60.0
POLL_S = 0.1
COMPUTED = "vllm:prompt_tokens_by_source_total{"
COUNTERS = ("plans_pull", "tokens_pulled", "prefetches", "prefetches_used", "tokens_prefetched")
"""Of the core, that rows tell."""
OFF = Placement(pulls=False, single_flight=False, admission=False, retention=False)
WARM_UP = "warm_up"
PARTS: dict[str, dict[str, Placement]] = {
    "mechanisms": {
        "on": Placement(prefetch=True, warm_up=True),
        "off": OFF,
    },
    "defaults": {"default": Placement(), "off": OFF},
    "prefetch": {"prefetch": Placement(prefetch=True), "default": Placement()},
    "retention": {"default": Placement(), "without": Placement(retention=False)},
    WARM_UP: {"warmed": Placement(warm_up=True), "default": Placement()},
    "placement": {
        "joint": Placement(pulls=False, retention=False),
        "least_kv": Placement(policy="least_kv", retention=False),
    },
}
"""Ours first."""


class Setup(msgspec.Struct, frozen=True):
    """What is measured: ``pairs`` of rounds of ``runs`` side by side, behind ``warm_rounds`` of
    each side from which the core learns; ``parts``: comma-separated; ``static_words``: of each
    static prompt of ``warm_up``."""

    model: str = "tiny-llama"
    parts: str = "mechanisms,placement"
    pairs: int = 10
    warm_rounds: int = 5
    runs: int = 2
    document_words: int = 200
    answer_tokens: int = 16
    static_words: int = 1000


class Side:
    """A cluster, and what it has counted by now."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self._pages = [
            f"http://{HOST}:{worker.metrics_port}/metrics" for worker in cluster.config.workers
        ]

    def counted(self) -> dict[str, float]:
        """By the core and its engines, when nothing runs any more. TimeoutError if that does not
        come."""
        ends_s = time.monotonic() + QUIET_S
        while (seen := self.cluster.snapshot()).active or seen.queued:
            if time.monotonic() > ends_s:
                raise TimeoutError(f"calls still run after {QUIET_S:.0f} s")
            time.sleep(POLL_S)
        counters = {name: float(seen.counters[name]) for name in COUNTERS}
        return {"computed_tokens": sum(map(computed_tokens, self._pages)), **counters}


def run(setup: Setup | None = None, console: Console | None = None) -> dict[str, Any]:
    """Measure. Returns ``{"figures": ..., "rows": ...}``.

    LaunchError, TimeoutError or an error of the clients' if a server fails; ValueError for an
    unknown part.
    """
    setup = setup or Setup()
    console = console or Console(stderr=True)
    parts = setup.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"no such part: {', '.join(sorted(unknown))}")
    rows = [row for part in parts for row in _measured(part, setup, console)]
    return {"figures": figures_of(rows), "rows": rows}


def main(json_path: Path | None = None, **options: Any) -> int:
    """The command: tables, and with ``json_path`` a JSON file. ``options`` make a ``Setup``."""
    console = table_console()
    result = run(Setup(**options), console)
    report = write(json_path, COMMAND, result["figures"], result["rows"])
    show_parts(
        report,
        list(PARTS),
        f"seconds of a run in the mean of a round, of {WARM_UP} until a call's first token",
        "ratios are the other side's / ours, medians over pairs",
        console,
    )
    return 0


def figures_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By part: medians over the pairs, quartiles, and how many pairs there were."""
    figures: dict[str, float] = {}
    for part, (ours, others) in ((part, tuple(sides)) for part, sides in PARTS.items()):
        of_part = [row for row in rows if row["part"] == part]
        if not of_part:
            continue
        for name in ("completion_ratio", "computed_ratio"):
            values = [row[name] for row in of_part]
            figures[f"{part}_{name}"] = statistics.median(values)
            if len(values) > 1:
                low, _, high = statistics.quantiles(values, n=4)
                figures[f"{part}_{name}_q1"], figures[f"{part}_{name}_q3"] = low, high
        for side in (ours, others):
            seconds = [row[f"{side}_s"] for row in of_part]
            figures[f"{part}_{side}_s"] = statistics.median(seconds)
        figures[f"{part}_pairs"] = len(of_part)
        figures[f"{part}_faster"] = sum(row["completion_ratio"] > 1.0 for row in of_part)
    return figures


def computed_tokens(url: str) -> float:
    """Prompt tokens that an engine has computed, as vLLM counts them."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    computed = [line for line in lines if line.startswith(COMPUTED) and "local_compute" in line]
    return sum(float(line.rpartition(" ")[2]) for line in computed)


def config_of(side: str, model: str, placement: Placement) -> ClusterConfig:
    """The cluster of a side."""
    name = f"bench-{side.replace('_', '-')}"
    return cluster_config(name, model, ROLES, metrics=True, placement=placement)


def _measured(part: str, setup: Setup, console: Console) -> list[dict[str, Any]]:
    workflow = _workflow()
    with scratch() as folder, ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name, placement in PARTS[part].items():
            console.print(f"starting {name}")
            config = config_of(name, setup.model, placement)
            cluster = LocalCluster(config, folder / name, progress=progress_for(console))
            sides[name] = Side(stack.enter_context(cluster))
        total = 2 * (setup.warm_rounds + setup.pairs)
        progress = stack.enter_context(progress_bar(console, total))
        return _take_turns(part, setup, workflow, sides, progress)


def _take_turns(
    part: str, setup: Setup, workflow: ModuleType, sides: Mapping[str, Side], progress: Progress
) -> list[dict[str, Any]]:
    rows = []
    ours, others = sides
    for pair in range(-setup.warm_rounds, setup.pairs):
        row: dict[str, Any] = {"part": part, "pair": pair}
        question = uuid.uuid4().hex
        for name in (ours, others) if pair % 2 else (others, ours):
            task = progress.task_ids[0]
            progress.update(task, description=f"{part}, pair {pair}, {name}")
            row |= _round(part, setup, workflow, name, sides[name], question)
            progress.advance(task)
        row["completion_ratio"] = row[f"{others}_s"] / row[f"{ours}_s"]
        row["computed_ratio"] = row[f"{others}_computed_tokens"] / row[f"{ours}_computed_tokens"]
        if pair >= 0:
            rows.append(row)
    return rows


def _round(
    part: str, setup: Setup, workflow: ModuleType, name: str, side: Side, question: str
) -> dict[str, float]:
    before = side.counted()
    if part == WARM_UP:
        seconds = first_calls(side.cluster, setup.runs, setup.static_words, setup.answer_tokens)
    else:
        seconds = asyncio.run(_runs(setup, workflow, side.cluster, question))
    after = side.counted()
    told = {f"{name}_{what}": after[what] - before[what] for what in after}
    return {f"{name}_s": statistics.mean(seconds)} | told


async def _runs(
    setup: Setup, workflow: ModuleType, cluster: LocalCluster, question: str
) -> list[float]:
    """Seconds of each of several runs side by side, each with a question of its own."""
    async with AsyncOpenAI(
        base_url=f"{cluster.base_url}/v1", api_key="none", timeout=CALL_S
    ) as client:
        reports = await asyncio.gather(
            *(
                workflow.run_workflow(
                    client,
                    cluster.config.served_name,
                    question=f"{number} {question}",
                    document_words=setup.document_words,
                    max_tokens=setup.answer_tokens,
                )
                for number in range(setup.runs)
            )
        )
    return [report.completion_s for report in reports]


def _workflow() -> ModuleType:
    """The example, which is a program and no part of any package."""
    name = "pythia_example_research_team"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, EXAMPLE)
    if spec is None or spec.loader is None or not EXAMPLE.is_file():
        raise LaunchError(f"{EXAMPLE} is missing: this needs the repository, not only a wheel")
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their own module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

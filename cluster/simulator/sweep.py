"""Simulates every configuration on every workload with every seed, over several processes.

What a process gets and gives is encoded data, never live objects. Each finished replay is
written down at once; an interrupt ends all processes and leaves what is finished.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cluster.simulator.failure import SimulationError
from cluster.simulator.outcome import Outcome, outcome_of
from cluster.simulator.results import Results
from cluster.simulator.scenario import Scenario
from cluster.simulator.source import open_source
from cluster.workload.form import Workload

P = ParamSpec("P")
R = TypeVar("R")

KILLED_AFTER_S = 5.0
POLL_S = 0.2
ENDING = (signal.SIGINT, signal.SIGTERM)
"""Whoever asks politely gets the same clean end as Ctrl-C."""


class Task(msgspec.Struct, frozen=True):
    """One replay to do."""

    workload: str
    configuration: str
    seed: int
    pictured: bool

    @property
    def key(self) -> tuple[str, str, int]:
        """Which replay this is."""
        return self.workload, self.configuration, self.seed


def tasks(scenario: Scenario, done: Collection[tuple[str, str, int]] = ()) -> list[Task]:
    """All replays but those ``done``, seed by seed: an interrupt leaves whole comparisons."""
    found = [
        Task(source.name, configuration, seed, seed == 0)
        for seed in range(scenario.seeds)
        for source in scenario.workloads
        for configuration in scenario.compare
    ]
    return [task for task in found if task.key not in done]


def simulate_task(scenario_text: bytes, task_text: bytes) -> bytes:
    """Runs in a process of its own: one replay, an encoded ``Outcome``."""
    from cluster.simulator.configurations import replay

    scenario = msgspec.json.decode(scenario_text, type=Scenario)
    task = msgspec.json.decode(task_text, type=Task)
    source = next(source for source in scenario.workloads if source.name == task.workload)
    workload = _workload(source.name, source.source, task.seed)
    began_s = time.perf_counter()
    result = replay(task.configuration, scenario, workload, task.seed)
    real_s = time.perf_counter() - began_s
    return msgspec.json.encode(outcome_of(result, source.slo, real_s, task.pictured))


@functools.lru_cache(maxsize=1)
def _workload(name: str, source: str | tuple[str, ...], seed: int) -> Workload:
    """Configurations of a seed follow each other, mostly in the same process."""
    return msgspec.structs.replace(open_source(source, seed), name=name)


def run(
    scenario: Scenario,
    results: Results,
    processes: int,
    console: Console,
    wanted: list[Task] | None = None,
) -> list[Outcome]:
    """Does what ``results`` lacks, and returns all that are ``wanted`` in their order, else all of
    the scenario's in that of ``tasks``.

    SimulationError if a replay fails; that and KeyboardInterrupt leave no process behind and
    everything finished in ``results``.
    """
    done = {outcome.key: outcome for outcome in results.found}
    wanted = tasks(scenario) if wanted is None else wanted
    left = [task for task in wanted if task.key not in done]
    total = len(wanted)
    with (
        _interrupts() as interrupted,
        _shown(console, total, total - len(left)) as show,
        pool(processes, len(left)) as workers,
    ):
        for outcome in _outcomes(workers, scenario, left, processes, interrupted):
            results.append(outcome)
            done[outcome.key] = outcome
            show(outcome)
    return [done[task.key] for task in wanted]


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether this process was asked to end meanwhile. An exception out of the blue would break
    whatever waits just then: a lock that is taken half, a line that is written half."""
    asked: list[int] = []
    before = {number: signal.signal(number, lambda n, _: asked.append(n)) for number in ENDING}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcomes(
    pool: ProcessPoolExecutor,
    scenario: Scenario,
    left: list[Task],
    processes: int,
    interrupted: Callable[[], bool],
) -> Iterator[Outcome]:
    """As they finish. Few are handed over ahead, so that little is lost by an interrupt."""
    text = msgspec.json.encode(scenario)
    queue = iter(left)
    running: dict[Future[bytes], Task] = {}
    while True:
        while len(running) < processes and (task := next(queue, None)) is not None:
            running[pool.submit(simulate_task, text, msgspec.json.encode(task))] = task
        if not running:
            return
        finished, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
        if interrupted():
            raise KeyboardInterrupt
        for future in finished:
            task = running.pop(future)
            try:
                encoded = future.result()
            except Exception as error:
                name = f"{task.configuration} on {task.workload}, seed {task.seed}"
                raise SimulationError(f"{name}: {type(error).__name__}: {error}") from error
            yield msgspec.json.decode(encoded, type=Outcome)


class _Executor(ProcessPoolExecutor):
    """An interrupt from a terminal reaches all processes, and all leave it to the parent: also one
    that is only being started, as a signal mask is inherited before any code of ours runs."""

    def submit(self, call: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Starts processes as they are needed."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
        try:
            return super().submit(call, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def pool(processes: int, tasks_left: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that are gone when this is left, whatever they are doing."""
    others = multiprocessing.active_children()
    executor = _Executor(
        max_workers=max(1, min(processes, tasks_left)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin_process,
    )
    try:
        yield executor
    finally:
        own = [child for child in multiprocessing.active_children() if child not in others]
        for child in own:
            child.terminate()
        executor.shutdown(wait=True, cancel_futures=True)
        for child in own:
            child.join(KILLED_AFTER_S)
            if child.is_alive():
                child.kill()
                child.join()


def _begin_process() -> None:
    """A process goes when its parent is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Shown:
    """What a person sees meanwhile: a bar on a terminal, else a line per replay."""

    def __init__(self, console: Console, progress: Progress | None, total: int, done: int) -> None:
        self._console, self._progress = console, progress
        self._total, self._done = total, done
        self._bar = progress.add_task("", total=total, completed=done) if progress else None

    def __call__(self, outcome: Outcome) -> None:
        self._done += 1
        name = f"{outcome.workload}, {outcome.configuration}, seed {outcome.seed}"
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, advance=1, description=name)
            return
        self._console.print(
            f"{self._done} of {self._total}: {name} ({outcome.real_s:.1f} s)",
            highlight=False,
            markup=False,
        )


@contextmanager
def _shown(console: Console, total: int, done: int) -> Iterator[_Shown]:
    if not console.is_terminal:
        yield _Shown(console, None, total, done)
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Shown(console, progress, total, done)

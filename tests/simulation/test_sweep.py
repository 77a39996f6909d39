"""Comparisons over processes: the same results however many there are, and clean ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest
from rich.console import Console

from cluster.simulator.configurations import bounds, names, replay
from cluster.simulator.failure import SimulationError
from cluster.simulator.outcome import Outcome
from cluster.simulator.results import Results
from cluster.simulator.scenario import Overrides, Scenario, load
from cluster.simulator.source import open_source
from cluster.simulator.sweep import run, tasks

ROOT = Path(__file__).parents[2]
SCENARIO = """\
model: llama-3.1-8b-h200-tp1
workers: {count: 3}
workloads:
  - {name: chains, source: "generator:chain?runs=6&rate=1&prompt_max=60000&pause_max=5"}
compare: [aggregated-sticky, pythia]
seeds: 2
"""


def written(folder: Path, text: str = SCENARIO) -> Path:
    path = folder / "small.yaml"
    path.write_text(text)
    return path


def swept(scenario: Scenario, path: Path, processes: int, resume: bool = False) -> list[Outcome]:
    results = Results(path, scenario, resume=resume)
    try:
        return run(scenario, results, processes, Console(quiet=True))
    finally:
        results.close()


def timeless(outcomes: list[Outcome]) -> list[Outcome]:
    """Without what depends on the machine."""
    for outcome in outcomes:
        outcome.real_s = 0.0
        outcome.figures.pop("core_us_per_message", None)
    return outcomes


def test_processes_change_nothing_but_the_time_it_takes(tmp_path: Path) -> None:
    scenario = load(written(tmp_path))
    one = swept(scenario, tmp_path / "one.jsonl", processes=1)
    two = swept(scenario, tmp_path / "two.jsonl", processes=2)
    assert [outcome.key for outcome in one] == [task.key for task in tasks(scenario)]
    assert timeless(one) == timeless(two)
    assert one[0].picture is not None
    assert one[-1].picture is None
    assert one[0].figures["runs_served_share"] == 1.0


def test_only_what_is_missing_is_done(tmp_path: Path) -> None:
    scenario = load(written(tmp_path))
    path = tmp_path / "results.jsonl"
    few = msgspec.structs.replace(scenario, seeds=1)
    first = swept(few, path, processes=1)
    before = path.read_bytes()
    everything = swept(scenario, path, processes=1, resume=True)
    assert path.read_bytes().startswith(before)
    assert everything[:2] == first
    assert len(path.read_bytes().splitlines()) == 1 + 4


def test_a_replay_that_fails_is_named(tmp_path: Path) -> None:
    scenario = load(written(tmp_path))
    broken = msgspec.structs.replace(scenario, compare=("nonsense",))
    with pytest.raises(SimulationError, match="nonsense on chains, seed 0: KeyError"):
        swept(broken, tmp_path / "results.jsonl", processes=1)


def command(path: Path, results: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cluster", "simulate", str(path), "--resume", str(results), *more],
        cwd=path.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_lines(path: Path, lines: int, process: subprocess.Popen[str]) -> None:
    ends_s = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < ends_s
        time.sleep(0.05)


def gone(processes: list[psutil.Process], limit_s: float = 20.0) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=limit_s)
    return not alive


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_what_is_finished_and_nothing_else(
    tmp_path: Path, number: signal.Signals
) -> None:
    path, results = written(tmp_path), tmp_path / "results.jsonl"
    process = command(path, results, "--seeds", "5000", "--processes", "2")
    wait_for_lines(results, 4, process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: to all of them
    else:
        process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert f"--resume {results}" in said.replace("\n", "")
    assert gone(children)
    kept = results.read_bytes()
    assert kept.endswith(b"\n")
    seeds = 1 + kept.count(b"\n") // 2
    again = command(path, results, "--seeds", str(seeds), "--json", "figures.json")
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert results.read_bytes().startswith(kept)
    report = msgspec.json.decode((tmp_path / "figures.json").read_bytes())
    assert len(report["rows"]) == 2 * seeds
    assert "chains.pythia.completion_s_mean.against" in report["figures"]


def test_an_interrupt_while_processes_are_starting_is_the_parents_alone(tmp_path: Path) -> None:
    path, results = written(tmp_path), tmp_path / "results.jsonl"
    process = command(path, results, "--seeds", "5000", "--processes", "2")
    parent, ends_s = psutil.Process(process.pid), time.monotonic() + 120
    while len(children := starting(parent)) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < ends_s
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert gone(children)


def starting(parent: psutil.Process) -> list[psutil.Process]:
    """The replaying processes that have begun, without multiprocessing's own."""
    return [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]


def test_processes_go_when_their_parent_is_killed(tmp_path: Path) -> None:
    path, results = written(tmp_path), tmp_path / "results.jsonl"
    process = command(path, results, "--seeds", "5000", "--processes", "2")
    wait_for_lines(results, 3, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    assert gone(children)


@pytest.mark.parametrize("name", names())
def test_every_configuration_serves_a_small_workload(tmp_path: Path, name: str) -> None:
    scenario = load(written(tmp_path))
    workload = open_source(scenario.workloads[0].source, 0)
    result = replay(name, scenario, workload, 0)
    assert result.configuration == name
    assert all(run.finished for run in result.runs)
    assert len(result.calls) == sum(len(run.calls) for run in workload.runs)


def test_bounds_are_what_no_cluster_can_be() -> None:
    assert set(bounds()) == {"clairvoyant", "infinite", "rebalance-oracle"}


def test_trouble_of_the_file_happens(tmp_path: Path) -> None:
    text = SCENARIO + "faults: {crash_every_s: 5, loss: 0.01}\nengine: {startup_s: 2}\n"
    scenario = load(written(tmp_path, text), Overrides())
    workload = open_source(scenario.workloads[0].source, 0)
    calm = replay("pythia", load(written(tmp_path)), workload, 0)
    troubled = replay("pythia", scenario, workload, 0)
    assert max(call.attempts for call in calm.calls) == 1
    assert max(call.attempts for call in troubled.calls) > 1


def test_transfers_have_a_beginning(tmp_path: Path) -> None:
    scenario = load(written(tmp_path))
    result = replay("pd-sticky", scenario, open_source(scenario.workloads[0].source, 0), 0)
    moved = [call for call in result.calls if call.moved_tokens]
    assert moved
    for call in moved:
        assert call.planned_s < call.first_token_s < call.loaded_s <= call.ended_s


def test_workers_that_turn_are_counted_and_seen(tmp_path: Path) -> None:
    text = SCENARIO.replace("{count: 3}", "{prefill: 1, decode: 5}").replace(
        "generator:chain?runs=6&rate=1&prompt_max=60000",
        "generator:coding?runs=60&rate=3&prompt_max=120000&calls=4",
    )
    scenario = load(written(tmp_path, text))
    workload = open_source(scenario.workloads[0].source, 0)
    fixed, turning = (
        replay(name, scenario, workload, 0) for name in ("pd-sticky-conditional", "pd-reactive")
    )
    seen: dict[str, list[str]] = {}
    for sample in turning.samples:
        roles = seen.setdefault(sample.worker, [sample.role])
        if roles[-1] != sample.role:
            roles.append(sample.role)
    assert fixed.totals.flips == 0
    # Workers turn back, too.
    assert turning.totals.flips == sum(len(roles) - 1 for roles in seen.values()) > 0

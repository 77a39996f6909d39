"""The command line: what a person types, what comes back, and how fast."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli import app
from cluster.simulator.baselines import BASELINES
from cluster.simulator.scenario import load
from cluster.simulator.versus import SYSTEMS, TARGETS
from cluster.status import Unreachable, inspect, render
from coordinator.protocol import (
    CallContext,
    CallStatus,
    LinkStatus,
    Load,
    Snapshot,
    WorkerStatus,
    decode_to_core,
    encode,
)

ROOT = Path(__file__).parents[2]
GOOD = "model: tiny-llama\nworkers:\n  - {name: one, role: mixed}\n  - {name: two, role: decode}\n"

runner = CliRunner()


def snapshot(token: int = 0) -> Snapshot:
    def row(name: str, role: str, state: str, used: int, warm: int) -> WorkerStatus:
        load = Load(running=3, waiting=2, kv_blocks_used=used)
        return WorkerStatus(
            name, "1", role, state, "127.0.0.1", "", load, 1000, 32, 5, 340, 0.4, warm, 2, 3
        )

    workers = [
        row("decode-10", "decode", "up", 970, 2),
        row("decode-2", "decode", "suspect", 10, 1),
        row("prefill-0", "prefill", "up", 0, 2),
    ]
    context = CallContext("research-team", "run-1", "explorer 2")
    calls = [
        CallStatus("chatcmpl-1", "decoding", 1, context, "prefill-0", "decode-2", 1830, 12, 512),
        CallStatus("cmpl-77", "finished", 1, CallContext(), "", "decode-10", 12, 5, ttft_s=0.05),
    ]
    links = [
        LinkStatus("prefill-0", "decode-10", "warm", 12, 3_355_443_200, 1.5, 67_108_864, 2.5e9, 0),
        LinkStatus("prefill-0", "decode-2", "warm", 1, 98_304, 1.0, 0, 0.0, 0.0),
        LinkStatus("decode-10", "prefill-0", "failed", 0, 0, 0.0, 0, 0.0, 0.0),
    ]
    counters = {"submits": 7}
    return Snapshot(
        *(token, "core-id", "tiny-llama", 4000.0, workers, 2, 3, 1024, 66, calls, counters, links)
    )


@pytest.fixture
def core() -> Iterator[str]:
    """A core that answers ``Inspect``, and nothing else."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            if socket.poll(50):
                peer, frame = socket.recv_multipart()
                token = decode_to_core(frame).token
                socket.send_multipart([peer, encode(snapshot(token + 1))])  # a stale one
                socket.send_multipart([peer, encode(snapshot(token))])
        socket.close(linger=0)

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"tcp://127.0.0.1:{port}"
    stop.set()
    thread.join()


def shown(width: int, calls: bool = False, links: bool = False) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(render(snapshot(), width, calls, links))
    return capture.get()


class TestCheck:
    def test_good(self, tmp_path: Path) -> None:
        path = tmp_path / "my.yaml"
        path.write_text(GOOD)
        result = runner.invoke(app, ["check", str(path)])
        assert result.exit_code == 0
        assert "my serves tiny-llama with 1 mixed, 1 decode" in result.output

    def test_bad_is_told_in_full_on_stderr_and_exits_2(self, tmp_path: Path) -> None:
        path = tmp_path / "my.yaml"
        path.write_text(GOOD + "api: {prot: 1}\nlimits: {queue_s: 0}\n")
        result = runner.invoke(app, ["check", str(path)])
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.splitlines() == [
            f"{path}:5: api.prot: unknown key; did you mean 'port'?",
            f"{path}:6: limits.queue_s: must be a number > 0.0 (got 0)",
        ]

    def test_no_such_file(self, tmp_path: Path) -> None:
        result = runner.invoke(app, ["check", str(tmp_path / "none.yaml")])
        assert result.exit_code == 2
        assert "No such file" in result.stderr


class TestStatus:
    def test_table(self, core: str) -> None:
        result = runner.invoke(app, ["status", "--coordinator", core])
        assert result.exit_code == 0, result.output
        assert "tiny-llama, up 1 h 6 min" in result.output
        assert "2 API processes, 66 calls active, 3 of 1024 waiting for room" in result.output
        assert "explorer 2" not in result.output
        assert "GB/s" not in result.output

    def test_table_of_links(self, core: str) -> None:
        result = runner.invoke(app, ["status", "--coordinator", core, "--links"])
        assert result.exit_code == 0, result.output
        assert "3.36 GB" in result.output

    def test_json_has_every_field(self, core: str) -> None:
        result = runner.invoke(app, ["status", "--coordinator", core, "--json"])
        data = json.loads(result.output)
        assert data["workers"][0]["load"]["running"] == 3
        assert data["workers"][0]["load"]["preemptions_total"] == 0
        assert data["counters"] == {"submits": 7}
        assert data["workers"][0]["handles"] == 3
        assert data["links"][2]["transfers"] == 0
        assert data["calls"][1]["context"]["agent"] == ""

    def test_nobody_there(self) -> None:
        result = runner.invoke(app, ["status", "--coordinator", "tcp://127.0.0.1:9"])
        assert result.exit_code == 1
        assert "no coordinator answers at tcp://127.0.0.1:9" in result.stderr

    @pytest.mark.parametrize("address", ["nonsense", "tcp://", "tcp://host", "http://x:1"])
    def test_an_address_that_is_none(self, address: str) -> None:
        with pytest.raises(Unreachable, match=address):
            inspect(address, 0.2)

    def test_someone_else_there(self) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        with contextlib.closing(socket):
            port = socket.bind_to_random_port("tcp://127.0.0.1")

            def answer() -> None:
                peer, _ = socket.recv_multipart()
                socket.send_multipart([peer, b"what?"])

            thread = threading.Thread(target=answer)
            thread.start()
            with pytest.raises(Unreachable, match="is no coordinator"):
                inspect(f"tcp://127.0.0.1:{port}")
            thread.join()

    @pytest.mark.parametrize("width", [80, 140])
    def test_fits_the_terminal_and_loses_nothing_that_matters(self, width: int) -> None:
        text = shown(width, calls=True)
        assert "…" not in text
        assert all(len(line.rstrip()) <= width for line in text.splitlines())
        for word in ("decode-10", "suspect", "97%", "340", "1/2", "explorer 2", "1830", "0.05 s"):
            assert word in text, word
        assert ("970/1000" in text) == (width == 140)

    def test_links_are_shown_when_asked_for(self) -> None:
        assert "GB/s" not in shown(80)
        rows = [line.split() for line in shown(80, links=True).splitlines()]
        for row in (
            "prefill-0 decode-2 warm 1 98.3 kB <0.01 0 B",
            "prefill-0 decode-10 warm 12 3.36 GB 2.50 67.1 MB",
            "decode-10 prefill-0 failed 0 0 B - 0 B",
        ):
            assert row.split() in rows
        assert max(len(line.rstrip()) for line in shown(80, links=True).splitlines()) <= 80

    def test_prefill_comes_first_and_numbers_count(self) -> None:
        text = shown(80)
        places = [text.index(name) for name in ("prefill-0", "decode-2", "decode-10")]
        assert places == sorted(places)


class TestOthers:
    def test_version(self) -> None:
        result = runner.invoke(app, ["--version"])
        assert result.exit_code == 0
        assert result.output.startswith("pythia ")

    def test_up_names_the_port_in_use(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import socket

        monkeypatch.setenv("PYTHIA_RUN_DIR", str(tmp_path / "run"))
        path = tmp_path / "my.yaml"
        path.write_text(GOOD)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            result = runner.invoke(
                app, ["up", str(path), "--api-port", str(port), "--coordinator-port", "0"]
            )
        assert result.exit_code == 2
        assert f"api.port: port {port} on 127.0.0.1 is in use" in result.stderr

    def test_down_without_a_cluster(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHIA_RUN_DIR", str(tmp_path / "run"))
        result = runner.invoke(app, ["down"])
        assert result.exit_code == 0
        assert "no cluster is running" in result.output

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--name", "x"], "give --config FILE or --model M"),
            (["--name", "x", "--model", "tiny-llama"], "give --role"),
            (["--name", "X", "--model", "m", "--role", "mixed"], "matching regex"),
            (["--name", "x", "--model", "m", "--role", "boss"], "Invalid enum value"),
            (["--name", "x", "--model", "m", "--role", "mixed", "--devices", "a"], "GPU indexes"),
            (
                ["--name", "x", "--model", "m", "--role", "mixed", "--coordinator", "y"],
                "tcp://host",
            ),
            (["--name", "x", "--config", "none.yaml"], "No such file"),
        ],
    )
    def test_a_worker_that_can_not_be_is_refused(self, arguments: list[str], message: str) -> None:
        result = runner.invoke(app, ["worker", *arguments])
        assert result.exit_code == 2
        assert message in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["speed"], "no benchmark 'speed'"),
            (["transfer", "--mebibyts", "4"], "did you mean --mebibytes?"),
            (["transfer", "--mebibytes", "many"], "--mebibytes many"),
            (["transfer", "--mebibytes"], "needs a value"),
        ],
    )
    def test_a_benchmark_that_is_not_is_refused(self, arguments: list[str], message: str) -> None:
        result = runner.invoke(app, ["bench", *arguments])
        assert result.exit_code == 2
        assert message in result.stderr

    @pytest.mark.parametrize("arguments", [["--help"], ["status", "--coordinator", "tcp://x"]])
    def test_answers_at_once_without_vllm(self, arguments: list[str]) -> None:
        code = (
            "import sys; from cluster.cli import app\n"
            "try: app(sys.argv[1:])\n"
            "except SystemExit: pass\n"
            "bad = {'vllm', 'torch', 'transformers', 'uvloop'} & sys.modules.keys()\n"
            "sys.exit(f'imported {bad}' if bad else 0)"
        )
        spent_s = []
        for _ in range(3):
            before = os.times()
            result = subprocess.run(
                [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, check=False
            )
            assert result.returncode == 0, result.stderr.decode()
            after = os.times()
            spent_s.append(after.children_user - before.children_user)
        assert min(spent_s) < 2.0, "0.4 s of processor time on a quiet machine"


BUSY = """\
# busy
model: llama-3.1-8b-h200-tp1
workers: {count: 2, ratio: [1, 1]}
slo: {ttft_s: 1.0, itl_s: 0.0055}
compare: [pythia, pythia-no-pulls]
seeds: 2
workloads:
  - name: teams
    source: generator:chain?runs=30&rate=0.3&prompt_max=60000&pause_max=2
"""
SIMULATED = """\
model: {model}
workers: {{count: {workers}}}
workloads: [{{name: a, source: "generator:chain?runs=2&rate=1&prompt_max=60000&pause_max=2"}}]
"""


class TestSimulate:
    def written(self, folder: Path, model: str = "llama-3.1-8b-h200-tp1", workers: int = 2) -> str:
        path = folder / "small.yaml"
        path.write_text(SIMULATED.format(model=model, workers=workers))
        return str(path)

    def test_the_list_has_every_configuration_and_what_it_is(self) -> None:
        result = runner.invoke(app, ["simulate", "--list"])
        assert result.exit_code == 0
        for name, baseline in BASELINES.items():
            assert f" {name} " in result.output
            assert baseline.description in " ".join(result.output.split())

    def test_something_has_to_be_simulated(self) -> None:
        result = runner.invoke(app, ["simulate"])
        assert result.exit_code == 2
        assert "give a FILE, or one of --compare, --list" in " ".join(result.stderr.split())

    def test_an_impossible_cluster_is_refused_before_anything_starts(self, tmp_path: Path) -> None:
        path = self.written(tmp_path, "llama-3.1-70b-h200-tp4")
        Path(path).write_text(Path(path).read_text() + "tp: 1\n")
        result = runner.invoke(app, ["simulate", path, "--resume", str(tmp_path / "r.jsonl")])
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.startswith(f"{path}:1: model: ")
        assert "does not fit 1 x h200" in result.stderr
        assert not (tmp_path / "r.jsonl").exists()

    @pytest.mark.parametrize(
        ("compare", "message"),
        [
            ("pithia", "no configuration 'pithia'; did you mean 'pythia'?"),
            ("pythia,pythia", "a configuration is compared with itself"),
        ],
    )
    def test_configurations_that_are_not(self, tmp_path: Path, compare: str, message: str) -> None:
        result = runner.invoke(
            app, ["simulate", self.written(tmp_path), "--configurations", compare]
        )
        assert result.exit_code == 2
        assert message in result.stderr

    def test_one_worker_can_not_be_split(self, tmp_path: Path) -> None:
        path = self.written(tmp_path, workers=1)
        result = runner.invoke(
            app, ["simulate", path, "--configurations", "aggregated-sticky,pythia"]
        )
        assert result.exit_code == 2
        assert "pythia: of 1 workers 0 prefill" in result.stderr

    def test_a_comparison_from_the_file_to_the_figures(self, tmp_path: Path) -> None:
        arguments = ["--configurations", "infinite,pythia", "--seeds", "2", "--processes", "1"]
        for option, name in (("--resume", "r.jsonl"), ("--json", "f.json"), ("--plots", "plots")):
            arguments += [option, str(tmp_path / name)]
        result = runner.invoke(app, ["simulate", self.written(tmp_path), *arguments])
        assert result.exit_code == 0, result.output
        assert "4 of 4: a, pythia, seed 1" in result.output
        assert "completion time of runs" in result.output
        report = json.loads((tmp_path / "f.json").read_text())
        assert report["command"] == "pythia simulate"
        assert len(report["rows"]) == 4
        assert report["figures"]["a.pythia.completion_s_mean.against"] > 0
        assert len(list((tmp_path / "plots").iterdir())) == 4

    def test_pythia_against_others_from_the_load_to_the_figures(self, tmp_path: Path) -> None:
        path = tmp_path / "busy.yaml"
        path.write_text(BUSY)
        busy = ["simulate", str(path), "--compare", "--processes", "1"]
        result = runner.invoke(app, [*busy, "--seeds", "1"])
        assert result.exit_code == 2
        assert "workload 'teams' has no 'capacity'; --find-load" in result.stderr
        result = runner.invoke(app, [*busy, "--find-load"])
        assert result.exit_code == 0, result.output
        text = path.read_text()
        assert text.startswith("# busy\n")
        assert "aggregated-sticky: " in text.partition("capacity:")[2]
        found = load(path)
        strongest = max(found.workloads[0].capacity.values())
        assert strongest == pytest.approx(1 / 0.9, rel=0.01)
        files = [str(tmp_path / name) for name in ("r.jsonl", "f.json", "plots")]
        options = ["--seeds", "2", "--no-ablations", "--resume", files[0], "--json", files[1]]
        result = runner.invoke(app, [*busy, *options, "--plots", files[2]])
        assert result.exit_code == 0, result.output
        assert "at 90% of its capacity" in result.output
        report = json.loads(Path(files[1]).read_text())
        assert report["command"] == "pythia simulate --compare"
        figures = report["figures"]
        for name in TARGETS:
            # So few runs fit all caches: nobody computes anything again.
            if name != "recomputed_tokens_vs_sticky":
                assert figures[name] == pytest.approx(figures[f"teams.{name}"])
        assert figures["teams.load"] == pytest.approx(0.9, rel=0.01)
        assert figures["hit_ratio_of_infinite_cache"] <= 1.0
        systems = {row["system"] for row in report["rows"] if not row["variant"]}
        assert systems == {*SYSTEMS, "pythia-random"}
        assert {row["variant"] for row in report["rows"]} == {"", "low load", "anonymous"}
        assert all(row["completion_p95_s"] > 0 for row in report["rows"])
        assert (tmp_path / "plots" / "compare.png").is_file()

    def test_load_is_looked_for_only_in_comparisons(self, tmp_path: Path) -> None:
        result = runner.invoke(app, ["simulate", self.written(tmp_path), "--find-load"])
        assert result.exit_code == 2
        assert "--find-load is of --compare" in " ".join(result.stderr.split())

    def test_seeds_of_faults(self, tmp_path: Path) -> None:
        path = tmp_path / "f.json"
        arguments = ["--faults", "3", "--first", "5", "--processes", "1", "--json", str(path)]
        result = runner.invoke(app, ["simulate", *arguments])
        assert result.exit_code == 0, result.output
        assert "3 seeds" in result.output
        assert "all is well" in result.output
        report = json.loads(path.read_text())
        assert [row["seed"] for row in report["rows"]] == [5, 6, 7]
        assert report["figures"]["failed_seeds"] == 0

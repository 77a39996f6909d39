"""The example workflow, as the separate program that it is, against both servers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e.harness import MODEL, Control, Server

EXAMPLE = Path(__file__).parents[2] / "examples" / "research_team.py"
LONGEST_S = 300


def run_example(server: Server, folder: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """What it prints, and what it writes with ``--json``."""
    path = folder / "run.json"
    command = [sys.executable, str(EXAMPLE), "--base-url", f"{server.base_url}/v1"]
    command += ["--api-key", server.api_key, "--max-tokens", "8", "--json", str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


def test_workflow_on_the_cluster(cluster: Server, control: Control, tmp_path: Path) -> None:
    printed, written = run_example(cluster, tmp_path)
    rows = written["rows"]
    agents = [row["agent"] for row in rows]
    assert agents[0] == "planner"
    assert agents[1:4] == ["explorer"] * 3
    assert agents[-1] == "summariser"
    assert 1 <= agents.count("engineer") == agents.count("reviewer") == written["figures"]["rounds"]
    explorers = rows[1:4]
    assert all(row["decode_worker"].startswith("decode-") for row in rows)
    assert all(row["moved_tokens"] is not None for row in rows)
    assert {row["prefill_worker"] for row in explorers} == {"prefill-0"}
    assert sum(row["moved_tokens"] for row in explorers) > 0
    assert any(row["cached_tokens"] for row in rows[1:])
    assert "prefill-0" in printed
    assert f"completed in {written['figures']['completion_s']:.1f} s" in printed

    calls = [call for call in control.snapshot().calls if call.context.run == written["run"]]
    assert sorted(call.context.agent for call in calls) == sorted(agents)
    assert {call.context.workflow for call in calls} == {"research-team"}
    assert [call.context.agent for call in calls if call.context.final] == ["summariser"]


def test_workflow_on_any_other_server(oracle: Server, tmp_path: Path) -> None:
    _, written = run_example(oracle, tmp_path, "--model", MODEL, "--document-words", "100")
    assert all(row["decode_worker"] == "" for row in written["rows"])
    assert all(row["moved_tokens"] is None for row in written["rows"])
    assert all(row["prompt_tokens"] > 0 for row in written["rows"])


def test_errors_are_told_in_one_line(cluster: Server) -> None:
    command = [sys.executable, str(EXAMPLE), "--base-url", f"{cluster.base_url}/v1"]
    done = subprocess.run(
        [*command, "--api-key", "wrong"],
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "API key" in done.stderr

"""Agent frameworks against the cluster: their graphs are known and their runs are followed,
without a tag in their code. And the demo's workflow, learned, drawn, and declared."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.workflow_files import read_workflows
from coordinator.workflow.limits import WorkflowLimits
from examples.research_team import ROUNDS_MAX, run_workflow
from tests.e2e.harness import API_KEY, MAX_MODEL_LEN, Server

EXAMPLES = Path(__file__).parents[2] / "examples"
LONGEST_S = 300
RUNS = 2
MAX_TOKENS = {"openai-client": 8, "langgraph": 8, "agents-sdk": 96}
"""Of each example. A handoff is a call of a tool, whose name the tiny model spells in pieces."""
DEMO = "research-team"
DEMO_TOKENS = 8
WRONG: dict[str, Any] = {
    "agents": {
        "planner": {"output_tokens": 500},
        "explorer": {},
        "engineer": {},
        "reviewer": {},
        "summariser": {},
    },
    "edges": [
        {"kind": "fan_out", "from": "planner", "to": "explorer", "least": 2, "most": 6},
        {"kind": "join", "from": ["explorer"], "to": "engineer"},
        {"kind": "next", "from": "engineer", "to": "reviewer"},
        {"kind": "loop", "from": "reviewer", "to": "engineer", "most": 9, "probability": 0.05},
        {"kind": "branch", "from": "reviewer", "to": "summariser", "probability": 0.95},
    ],
}
"""The demo's workflow as somebody may believe it is who has not measured it."""
STEPS = {
    ("(start)", "planner"),
    ("planner", "explorer"),
    ("explorer", "engineer"),
    ("engineer", "reviewer"),
    ("reviewer", "engineer"),
}


def run_example(server: Server, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run an example as the program that it is."""
    command = [sys.executable, str(EXAMPLES / name), "--base-url", f"{server.base_url}/v1"]
    command += ["--api-key", server.api_key, *options]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
        cwd=EXAMPLES.parent,
    )
    assert done.returncode == 0, done.stderr
    return done


def known(http: httpx.Client, name: str) -> Any:
    """What the cluster knows of a workflow."""
    response = http.get(f"/v1/workflows/{name}")
    assert response.status_code == 200, response.text
    return response.json()


def edges_of(shown: Any) -> dict[tuple[str, str], Any]:
    """What was seen or declared of who follows whom."""
    return {(edge["source"], edge["target"]): edge for edge in shown["learned"]["edges"]}


def calls_of(shown: Any) -> dict[str, int]:
    """How often each agent has asked; old calls count a little less."""
    return {agent["name"]: round(agent["calls"]) for agent in shown["learned"]["agents"]}


@pytest.fixture(scope="module")
def shown(cluster: Server, http: httpx.Client) -> dict[str, Any]:
    """What is known of each example's workflow after a few runs of it."""
    found = {}
    for kind, tokens in MAX_TOKENS.items():
        http.delete(f"/v1/workflows/{kind}-team")
        example = f"{kind.replace('-', '_')}_team.py"
        done = run_example(cluster, example, "--max-tokens", str(tokens), "--runs", str(RUNS))
        assert done.stderr == "", "nothing went wrong, nothing was warned of"
        assert done.stdout.count("run ") == RUNS
        found[kind] = known(http, f"{kind}-team")
    return found


def test_every_run_was_followed_and_has_ended(shown: dict[str, Any], http: httpx.Client) -> None:
    for workflow in shown.values():
        learned = workflow["learned"]
        assert (learned["runs_started"], learned["runs_ended"]) == (RUNS, RUNS)
        assert workflow["runs_live"] == 0
    rows = {row["name"]: row for row in http.get("/v1/workflows").json()}
    assert [rows[f"{kind}-team"]["declared"] for kind in shown] == [False, True, True]


@pytest.mark.parametrize("kind", ["openai-client", "langgraph"])
def test_the_team_is_seen_as_it_is(shown: dict[str, Any], kind: str) -> None:
    edges = edges_of(shown[kind])
    assert edges.keys() == STEPS | {("reviewer", "writer")}
    assert edges["planner", "explorer"]["calls"] == [{"value": 3, "share": 1.0}]
    agents = {agent["name"]: agent for agent in shown[kind]["learned"]["agents"]}
    assert calls_of(shown[kind]) == {
        "planner": RUNS,
        "explorer": 3 * RUNS,
        "engineer": 2 * RUNS,
        "reviewer": 2 * RUNS,
        "writer": RUNS,
    }
    assert agents["writer"]["end_probability"] > 0.5


def test_langgraph_declares_its_graph(shown: dict[str, Any]) -> None:
    declared = shown["langgraph"]["declared"]
    assert declared["start"] == "planner"
    kinds = sorted(edge["kind"] for edge in declared["edges"])
    assert kinds == ["branch", "fan_out", "join", "loop", "next"]
    assert all(
        edge["declared"]
        for ends, edge in edges_of(shown["langgraph"]).items()
        if "(start)" not in ends
    )


def test_the_agents_sdk_declares_agents_with_what_they_are_told(
    shown: dict[str, Any], http: httpx.Client
) -> None:
    team = shown["agents-sdk"]
    assert edges_of(team).keys() == {
        ("(start)", "planner"),
        ("planner", "engineer"),
        ("engineer", "writer"),
    }
    assert calls_of(team) == {"planner": RUNS, "engineer": RUNS, "writer": RUNS}
    declared = team["declared"]["agents"]
    for name, tokens in team["static_tokens"].items():
        prompts = [_tokens(http, declared[name], said) for said in ("Why?", "It depends.")]
        static = [_tokens(http, declared[name], said)[:tokens] for said in ("Why?", "It depends.")]
        assert static[0] == static[1]
        assert tokens < min(map(len, prompts))
        assert tokens > 20
    assert team["static_tokens"].keys() == {"planner", "engineer", "writer"}


def _tokens(http: httpx.Client, agent: dict[str, Any], said: str) -> list[int]:
    """A prompt of an agent, as vLLM's own endpoint makes it."""
    messages = [*agent["static_prompt"], {"role": "user", "content": said}]
    body = {"messages": messages, "tools": agent.get("tools")}
    tokens: list[int] = http.post("/tokenize", json=body).json()["tokens"]
    return tokens


def test_a_static_prompt_that_no_request_takes_is_refused(http: httpx.Client) -> None:
    agents = {
        "odd": {"static_prompt": [{"role": 5}]},
        "long": {"static_prompt": "word " * MAX_MODEL_LEN},
        "text": {"static_prompt": "Once upon a time"},
    }
    edges = [{"kind": "next", "from": "odd", "to": "long"}]
    edges += [{"kind": "next", "from": "long", "to": "text"}]
    refused = http.put("/v1/workflows/refused", json={"agents": agents, "edges": edges})
    assert refused.status_code == 422
    odd, long = refused.json()["error"]["problems"]
    assert odd.startswith("agents.odd.static_prompt: no chat request takes it: messages.0")
    assert long.startswith("agents.long.static_prompt: ")
    assert str(MAX_MODEL_LEN) in long
    assert http.get("/v1/workflows/refused").status_code == 404


def test_a_plain_server_serves_the_team_all_the_same(oracle: Server) -> None:
    done = run_example(oracle, "langgraph_team.py", "--max-tokens", "4")
    assert "run 1: " in done.stdout
    (warning,) = done.stderr.splitlines()
    assert "could not declare the workflow 'langgraph-team', calls go on without" in warning


# --- the demo ------------------------------------------------------------------------------------


def run_demo(server: Server, runs: int) -> None:
    async def runs_of() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{server.base_url}/v1", api_key=API_KEY, timeout=LONGEST_S
        ) as client:
            for _ in range(runs):
                report = await run_workflow(
                    client, server.model, document_words=60, max_tokens=DEMO_TOKENS
                )
                assert report.rounds == ROUNDS_MAX, "the tiny model approves of nothing"

    asyncio.run(runs_of())


@pytest.fixture(scope="module")
def learned(cluster: Server, http: httpx.Client) -> Any:
    """What is known of the demo's workflow that nobody has declared."""
    http.delete(f"/v1/workflows/{DEMO}")
    run_demo(cluster, 3)
    return known(http, DEMO)


def test_the_demo_is_learned(learned: Any) -> None:
    assert learned["declared"] is None
    assert learned["learned"]["runs_ended"] == 3
    edges = edges_of(learned)
    assert edges.keys() == STEPS | {("reviewer", "summariser")}
    assert edges["planner", "explorer"]["calls"] == [{"value": 3, "share": 1.0}]
    again, over = edges["reviewer", "engineer"], edges["reviewer", "summariser"]
    assert 0.5 < again["probability"] < 0.8, "two of three reviews lead back"
    assert 0.2 < over["probability"] < 0.5
    agents = {agent["name"]: agent for agent in learned["learned"]["agents"]}
    believed = read_workflows([str(EXAMPLES / "workflows/research-team.yaml")], WorkflowLimits())
    assert agents.keys() == believed[DEMO].agents.keys()
    assert agents["summariser"]["end_probability"] > 0.5
    assert all(
        agent["end_probability"] < 0.2 for agent in agents.values() if agent["name"] != "summariser"
    )


def test_the_demo_is_drawn(learned: Any, cluster: Server, tmp_path: Path) -> None:
    if not cluster.control_address:
        pytest.skip("PYTHIA_E2E_CONTROL does not say where the core is")
    command = [sys.executable, "-m", "cluster", "workflows", "show", DEMO]
    command += ["--coordinator", cluster.control_address]
    for suffix in ("svg", "png"):
        command += ["--picture", str(tmp_path / f"team.{suffix}")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    assert done.returncode == 0, done.stderr
    for part in ("research-team (learned, 3 runs seen)", "planner", "explorer x 3", "summariser"):
        assert part in done.stdout
    lines = done.stdout.splitlines()
    engineers = [line for line in lines if "engineer" in line]
    assert [("as above" in line) for line in engineers] == [False, True], "the loop"
    svg = (tmp_path / "team.svg").read_text()
    assert svg.count("</svg>") == 1
    assert (tmp_path / "team.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_declared_is_refined(learned: Any, cluster: Server, http: httpx.Client) -> None:
    seen = edges_of(learned)["reviewer", "engineer"]["probability"]
    http.delete(f"/v1/workflows/{DEMO}")
    assert http.put(f"/v1/workflows/{DEMO}", content=json.dumps(WRONG)).status_code == 201
    believed = edges_of(known(http, DEMO))["reviewer", "engineer"]["probability"]
    assert believed == pytest.approx(0.05, abs=0.02)
    run_demo(cluster, 2)
    shown = known(http, DEMO)
    edges = edges_of(shown)
    refined = edges["reviewer", "engineer"]
    assert refined["declared"]
    assert believed + 0.1 < refined["probability"] <= seen + 0.05
    assert refined["gap_s"]["samples"] > 0
    assert edges["planner", "explorer"]["calls"][-1]["value"] <= 6
    agents = {agent["name"]: agent for agent in shown["learned"]["agents"]}
    planner = agents["planner"]
    assert planner["declared"]
    assert planner["output_tokens"]["p50"] == pytest.approx(DEMO_TOKENS, abs=1)
    assert shown["declared"]["agents"]["planner"]["output_tokens"] == 500
    assert http.delete(f"/v1/workflows/{DEMO}").status_code == 200

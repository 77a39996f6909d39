"""``pythia workflows`` against a real core: shown, drawn, taken out and in again."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from typer.testing import CliRunner, Result

from cluster.cli import app
from coordinator.core import Core
from coordinator.limits import Limits, Placement
from coordinator.protocol import (
    CallContext,
    DeclareWorkflow,
    Finished,
    Hello,
    Submit,
    ToCore,
    decode_to_core,
    encode,
)
from coordinator.tenant import tenant_of

DECLARED = {
    "agents": {"triage": {}, "refund": {}, "human": {}},
    "edges": [
        {"kind": "branch", "from": "triage", "to": "refund", "probability": 0.7},
        {"kind": "branch", "from": "triage", "to": "human", "probability": 0.3},
    ],
}
runner = CliRunner()


class Served:
    """A core on a socket of its own, in virtual time."""

    def __init__(self) -> None:
        self.core = Core(Limits(), Placement(), "core")
        self.now_s = 1.0
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.serve)
        self.say(Hello("api"))

    def say(self, message: ToCore) -> None:
        self.core.handle(b"api", message, self.now_s)

    def call(self, run: str, number: int, agent: str, tokens: int, tenant: str = "") -> None:
        """One call from beginning to end, two seconds after what was before."""
        self.now_s += 2.0
        request = f"{run}-{number}"
        final = agent == "writer"
        context = CallContext("team", run, agent, final=final, tenant=tenant)
        self.say(Submit("api", request, 1, 100, 900, bytes(48), context=context))
        self.now_s += 1.0
        self.say(Finished("api", request, 1, "stop", tokens))

    def serve(self) -> None:
        while not self.stopping.is_set():
            if self.socket.poll(50):
                peer, frame = self.socket.recv_multipart()
                for send in self.core.handle(peer, decode_to_core(memoryview(frame)), self.now_s):
                    self.socket.send_multipart([send.peer, encode(send.message)])
        self.socket.close(linger=0)

    def pythia(self, *arguments: str) -> Result:
        command = ["workflows", *arguments, "--coordinator", self.address]
        return runner.invoke(app, command, env={"COLUMNS": "140"})


def share_of(line: str, agent: str) -> int:
    """The probability that a line of the tree gives an agent, in percent."""
    found = re.search(rf"(\d+) % {agent}", line)
    assert found, line
    return int(found[1])


@pytest.fixture
def served() -> Iterator[Served]:
    """With a workflow that was learned and one that was declared."""
    served = Served()
    for run in range(10):
        agents = ["planner", "explorer", "engineer", *["reviewer", "engineer"] * (run % 2)]
        for number, agent in enumerate([*agents, "writer"]):
            served.call(f"run-{run}", number, agent, 40 if agent == "planner" else 250)
    served.call("live", 0, "planner", 40)
    served.say(DeclareWorkflow(1, "support", json.dumps(DECLARED).encode()))
    served.thread.start()
    yield served
    served.stopping.set()
    served.thread.join()


def test_the_list_says_what_is_declared_and_what_learned(served: Served) -> None:
    result = served.pythia("list")
    assert result.exit_code == 0, result.output
    rows = {line.split("│")[1].strip(): line for line in result.output.splitlines() if "│" in line}
    assert rows.keys() >= {"support", "team"}
    assert "3" in rows["support"]
    assert "1" in rows["team"]


def test_a_learned_workflow_is_shown_as_a_tree(served: Served) -> None:
    result = served.pythia("show", "team")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "team (learned, 10 runs seen)" in lines[0]
    assert share_of(lines[1], "planner") > 85
    assert "answers 40" in lines[1]
    explorer = next(line for line in lines if "explorer" in line)
    assert share_of(explorer, "explorer") > 85
    assert "after 2" in explorer
    assert explorer.index("explorer") > lines[1].index("planner"), "deeper in the tree"
    reviewer = next(line for line in lines if "reviewer" in line)
    assert 20 < share_of(reviewer, "reviewer") < 45
    assert any("engineer" in line and "(as above)" in line for line in lines)
    assert any("live" in line and "│" in line for line in lines)


def test_a_declared_workflow_is_shown_before_anybody_has_run_it(served: Served) -> None:
    output = served.pythia("show", "support").output
    assert "support (declared, 0 runs seen)" in output
    assert "triage" in output
    assert "70 % refund" in output
    assert "30 % human" in output
    assert "? tokens" in output


def test_all_that_is_known_is_shown_as_json(served: Served) -> None:
    shown = json.loads(served.pythia("show", "team", "--json").output)
    assert shown["learned"]["agents"][0]["name"] == "planner"


@pytest.mark.parametrize(
    ("suffix", "head"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".dot", b"digraph")]
)
def test_a_workflow_is_drawn(served: Served, tmp_path: Path, suffix: str, head: bytes) -> None:
    path = tmp_path / f"team{suffix}"
    result = served.pythia("show", "team", "--picture", str(path))
    assert result.exit_code == 0, result.output
    content = path.read_bytes()
    assert content.startswith(head)
    if suffix == ".dot":
        assert '"(start)" -> "planner"' in content.decode()
        assert content.count(b"->") >= 6


def test_a_picture_of_an_unknown_kind_is_refused(served: Served, tmp_path: Path) -> None:
    result = served.pythia("show", "team", "--picture", str(tmp_path / "team.colour"))
    assert result.exit_code == 1
    assert "colour" in result.output


def test_a_workflow_is_exported_and_imported_under_another_name(
    served: Served, tmp_path: Path
) -> None:
    path = tmp_path / "team.json"
    assert served.pythia("export", "team", str(path)).exit_code == 0
    assert json.loads(path.read_bytes())["learned"]["runs_ended"] == 10
    result = served.pythia("import", str(path), "--name", "crew")
    assert result.output == "imported crew\n"
    assert "crew (learned, 10 runs seen)" in served.pythia("show", "crew").output
    printed = served.pythia("export", "support").output
    assert json.loads(printed)["declared"]["agents"].keys() == {"triage", "refund", "human"}


def test_a_tenants_workflows_are_shown_to_who_knows_its_salt(served: Served) -> None:
    served.call("mine", 0, "planner", 5, tenant_of("salt"))
    shown = served.pythia("show", "team", "--cache-salt", "salt")
    assert "mine" in shown.output
    assert "mine" not in served.pythia("show", "team").output


@pytest.mark.parametrize("content", [b"{}", b"[]", b"no json", b"\xff"])
def test_what_is_no_export_is_refused(served: Served, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.json"
    path.write_bytes(content)
    result = served.pythia("import", str(path))
    assert result.exit_code == 1
    assert result.output.startswith("pythia: ")


def test_what_is_unknown_is_said_so(served: Served, tmp_path: Path) -> None:
    for arguments in (("show", "nobody"), ("export", "nobody")):
        result = served.pythia(*arguments)
        assert (result.exit_code, result.output) == (
            1,
            "pythia: no workflow 'nobody' is known\n",
        )
    assert served.pythia("import", str(tmp_path / "missing.json")).exit_code == 1

"""How much follows a call until its run is over."""

from __future__ import annotations

from itertools import count

import pytest

from coordinator.workflow.ahead import Remaining
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.prediction import RunKey
from coordinator.workflow.profiles import Profiles

PROMPT, OUTPUT = 1000, 100


class Told:
    """Profiles that are told of runs of a planner, two explorers and a writer."""

    def __init__(self) -> None:
        self.profiles = Profiles(WorkflowLimits())
        self.remaining = Remaining(self.profiles)
        self.numbers = count()
        self.now_s = 0.0

    def run(self) -> None:
        key = RunKey("", "team", f"run-{next(self.numbers)}")
        before = ""
        for agents in (("planner",), ("explorer", "explorer"), ("writer",)):
            calls = [f"{key.run}-{next(self.numbers)}" for _ in agents]
            for agent, call in zip(agents, calls, strict=True):
                final = agent == "writer"
                self.profiles.observe_start(
                    key, call, agent, PROMPT, b"", self.now_s, before, final
                )
            self.now_s += 1.0
            for call in calls:
                self.profiles.observe_end(call, OUTPUT, self.now_s)
            before = agents[0]
            self.now_s += 1.0

    def renewed(self) -> Remaining:
        while self.remaining.refresh():
            pass
        return self.remaining


def test_nothing_is_known_before_anything_has_ended() -> None:
    told = Told()
    assert told.renewed().after("", "team", "planner", 1) is None
    for _ in range(30):
        told.run()
    assert told.renewed().after("", "other", "planner", 1) is None
    assert told.renewed().after("somebody", "team", "planner", 1) is None


def test_what_follows_becomes_less_from_agent_to_agent() -> None:
    told = Told()
    for _ in range(60):
        told.run()
    remaining = told.renewed()
    planner = remaining.after("", "team", "planner", 1)
    explorer = remaining.after("", "team", "explorer", 3)
    writer = remaining.after("", "team", "writer", 4)
    assert planner is not None
    assert explorer is not None
    assert writer is not None
    # Two explorers and the writer; of each explorer half a writer, in all one.
    assert planner.output_tokens == pytest.approx(3 * OUTPUT, rel=0.15)
    assert explorer.output_tokens == pytest.approx(0.5 * OUTPUT, rel=0.2)
    assert writer.output_tokens == pytest.approx(0.0, abs=0.05 * OUTPUT)
    assert planner.contexts == pytest.approx(planner.output_tokens * PROMPT, rel=0.1)


def test_tables_are_renewed_only_when_much_has_happened() -> None:
    told = Told()
    for _ in range(60):
        told.run()
    told.renewed()
    told.run()
    assert not told.remaining.refresh()
    for _ in range(20):
        told.run()
    assert told.remaining.refresh()
    assert not told.remaining.refresh()

"""Predictions that are wrong at random."""

from __future__ import annotations

import pytest

from cluster.simulator.baselines import BASELINES, applied, core_factory
from cluster.simulator.scrambled import FACTOR, Scrambled
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.prediction import RunKey
from coordinator.workflow.profiles import Profiles
from tests.unit.test_baselines import NOTHING, setup_of

AGENTS = ("plan", "work", "check")


def taught(profiles: Profiles) -> Profiles:
    """Thirty runs of three agents in turn, and one that has begun."""
    for number in range(31):
        key, at_s = RunKey("", "flow", f"run-{number}"), 100.0 * number
        for place, agent in enumerate(AGENTS if number < 30 else AGENTS[:1]):
            call = f"{number}.{place}"
            profiles.observe_start(key, call, agent, 640, b"", at_s + 10 * place)
            profiles.observe_end(call, 100, at_s + 10 * place + 5)
        if number < 30:
            profiles.end_run(key, at_s + 50)
    return profiles


def test_what_is_learned_is_the_same_and_what_is_said_is_not() -> None:
    true, wrong = taught(Profiles(WorkflowLimits())), taught(Scrambled(WorkflowLimits(), 1))
    key = RunKey("", "flow", "run-30")
    assert wrong.exported("", "flow") == true.exported("", "flow")
    told, said = true.predict(key, 3010.0), wrong.predict(key, 3010.0)
    assert told.next[0].agent == "work"
    assert len(said.next) == len(told.next)
    assert said != told
    assert said.calls_left != told.calls_left
    assert wrong.output_tokens(key, "plan").mean != true.output_tokens(key, "plan").mean
    true_tokens = true.mean_output_tokens("", "flow", "plan")
    tokens = {
        taught(Scrambled(WorkflowLimits(), seed)).mean_output_tokens("", "flow", "plan")
        for seed in range(20)
    }
    assert len(tokens) == 20
    assert all(true_tokens / FACTOR <= each <= true_tokens * FACTOR for each in tokens)
    assert min(tokens) < 0.5 * true_tokens
    assert max(tokens) > 2.0 * true_tokens


def test_the_next_agent_is_mostly_another_one() -> None:
    key = RunKey("", "flow", "run-30")
    named = [
        taught(Scrambled(WorkflowLimits(), seed)).predict(key, 3010.0).next[0].agent
        for seed in range(30)
    ]
    assert set(named) == set(AGENTS)


def test_equal_questions_have_equal_answers() -> None:
    key = RunKey("", "flow", "run-30")
    one, other = (taught(Scrambled(WorkflowLimits(), 5)) for _ in range(2))
    assert one.predict(key, 3010.0) == other.predict(key, 3010.0) == one.predict(key, 3010.1)
    unknown = RunKey("", "other", "run")
    assert one.predict(unknown, 3010.0) == Profiles(WorkflowLimits()).predict(unknown, 3010.0)


@pytest.mark.parametrize(("name", "wrong"), [("pythia", False), ("pythia-random", True)])
def test_the_core_acts_on_them(name: str, wrong: bool) -> None:
    baseline = BASELINES[name]
    setup = applied(baseline, setup_of(4), 2)
    core = core_factory(baseline, setup, NOTHING, 7)(setup.limits, setup.placement, "core")
    assert isinstance(core._learner.profiles, Scrambled) is wrong
    assert core._pace._learner.profiles is core._learner.profiles

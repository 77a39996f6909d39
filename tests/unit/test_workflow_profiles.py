"""What is learned of made-up workflows whose truth is known, and what is predicted from it."""

from __future__ import annotations

import random

import msgspec
import pytest

from coordinator.workflow.graph import Agent, FanOut, Graph, Join, Loop, Next, checked
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.prediction import UNKNOWN, EdgeView, RunKey, WorkflowView
from coordinator.workflow.profiles import Profiles
from coordinator.workflow.record import ProfileRecord
from tests.unit.workflow_runs import BLOCK_TOKENS, STATIC_BLOCKS, Application, World

KEY = RunKey("", "flow", "run")


def new_profiles(**limits: int) -> Profiles:
    return Profiles(WorkflowLimits(**limits), BLOCK_TOKENS)


def learned(runs: int, application: Application, world: World | None = None) -> World:
    world = world or World(new_profiles())
    for _ in range(runs):
        world.at(world.now_s + world.rng.uniform(0, 20 * runs), lambda: world.run(application))
    world.until(world.now_s + 20 * runs + 5000)
    return world


def view(world: World, name: str = "research") -> WorkflowView:
    found = world.profiles.view("", name)
    assert found is not None
    return found


def edges(found: WorkflowView) -> dict[tuple[str, str], EdgeView]:
    return {(edge.source, edge.target): edge for edge in found.edges}


@pytest.fixture(scope="module")
def research() -> World:
    return learned(300, Application())


def test_the_graph_is_learned_with_its_probabilities(research: World) -> None:
    found = edges(view(research))
    assert set(found) == {
        ("(start)", "planner"),
        ("planner", "explorer"),
        ("explorer", "explorer"),
        ("explorer", "engineer"),
        ("engineer", "reviewer"),
        ("reviewer", "engineer"),
        ("reviewer", "writer"),
    }
    assert found["planner", "explorer"].probability > 0.95
    # Each explorer makes one call or two, so a third of its calls is followed by its own.
    assert found["explorer", "explorer"].probability == pytest.approx(1 / 3, abs=0.08)
    assert found["reviewer", "engineer"].probability == pytest.approx(0.6, abs=0.08)
    assert found["reviewer", "writer"].probability == pytest.approx(0.4, abs=0.08)


def test_the_width_of_a_fan_out_is_a_distribution(research: World) -> None:
    calls = {one.value: one.share for one in edges(view(research))["planner", "explorer"].calls}
    assert set(calls) == {2, 3, 4}
    assert all(share == pytest.approx(1 / 3, abs=0.12) for share in calls.values())


def test_how_often_a_loop_goes_round_is_a_distribution(research: World) -> None:
    agents = {agent.name: agent for agent in view(research).agents}
    visits = {one.value: one.share for one in agents["engineer"].visits}
    assert visits[1] == pytest.approx(0.4, abs=0.1)
    assert visits[2] == pytest.approx(0.24, abs=0.1)
    assert {one.value for one in agents["planner"].visits} == {1}


def test_lengths_gaps_and_new_tokens_are_learned(research: World) -> None:
    found = view(research)
    agents = {agent.name: agent for agent in found.agents}
    assert agents["planner"].output_tokens.p50 == pytest.approx(100, rel=0.1)
    assert agents["planner"].output_tokens.p95 == pytest.approx(145, rel=0.1)
    assert agents["reviewer"].output_tokens.mean == pytest.approx(20, rel=0.1)
    gap = edges(found)["engineer", "reviewer"].gap_s
    assert (gap.p05, gap.p50, gap.p95) == pytest.approx((1.1, 2.0, 2.9), rel=0.12)
    # The reviewer goes on from its own prompt after its first call, which begins like others'.
    new = edges(found)["reviewer", "engineer"].new_tokens
    assert new.mean < 11 * BLOCK_TOKENS


def test_where_kv_comes_from_is_learned(research: World) -> None:
    found = edges(view(research))
    own = found["reviewer", "engineer"].kept[0]
    assert (own.origin, own.whole) == ("own", 1.0)
    assert own.probability > 0.95
    static = found["(start)", "planner"].kept[0]
    assert static.origin == "static"
    assert static.share == pytest.approx(STATIC_BLOCKS / (STATIC_BLOCKS + 10), abs=0.2)


def test_it_knows_how_good_it_is(research: World) -> None:
    scores = view(research).scores
    assert scores.trusted
    # Two choices in a run are open: an explorer's second call, and the loop.
    assert 0.6 < scores.next_agent_top1 < 0.95
    assert 0.92 <= scores.length95_coverage <= 0.98
    assert scores.gap_calibration_error < 0.06


def test_the_next_call_of_a_run_is_predicted(research: World) -> None:
    profiles = research.profiles
    key = RunKey("", "research", "asked")
    profiles.observe_start(key, "asked-1", "planner", 480, b"", research.now_s)
    found = profiles.predict(key, research.now_s)
    assert found.known
    assert found.after == "planner"
    assert found.next[0].agent == "explorer"
    assert found.next[0].probability > 0.95
    assert found.next[0].calls == pytest.approx(3, abs=0.2)
    assert found.next[0].gap_s.p50 == pytest.approx(2, rel=0.1)
    # 3 explorers with 1.5 calls each, 2.5 engineers, 2.5 reviewers and a writer.
    assert found.calls_left == pytest.approx(3 * 1.5 + 2.5 + 2.5 + 1, rel=0.15)
    assert found.output_tokens_left == pytest.approx(4.5 * 40 + 2.5 * 100 + 150, rel=0.15)
    profiles.observe_end("asked-1", 100, research.now_s)
    assert profiles.predict(key, research.now_s).next[0].agent == "explorer"
    profiles.end_run(key, research.now_s)
    assert profiles.predict(key, research.now_s) == UNKNOWN


def test_answers_are_told_apart_by_how_many_there_were_before() -> None:
    """One that plans first and then says yes or no: reserving for a plan each time is waste."""
    profiles = Profiles(WorkflowLimits(), BLOCK_TOKENS)
    rng = random.Random(3)
    for number in range(60):
        key = RunKey("", "loop", f"run-{number}")
        for turn in range(6):
            call, at_s = f"{number}-{turn}", 100.0 * number + 10 * turn
            profiles.observe_start(key, call, "a", 10, b"", at_s, final=turn == 5)
            tokens = rng.randint(1800, 2000) if turn == 0 else rng.randint(1, 20)
            profiles.observe_end(call, tokens, at_s + 5)
    key = RunKey("", "loop", "new")
    record = profiles.exported("", "loop")
    assert record is not None
    profiles.restore("", "loop", record)
    first = profiles.output_tokens(key, "a")
    assert first.p05 > 1600
    assert first.upper == pytest.approx(2000, rel=0.1)
    for turn in range(2):
        profiles.observe_start(key, f"new-{turn}", "a", 10, b"", 9000.0 + turn)
        profiles.observe_end(f"new-{turn}", 10, 9000.5 + turn)
        assert profiles.output_tokens(key, "a").upper < 40
    (following,) = profiles.predict(key, 9002.0).next
    assert following.output_tokens.upper < 40


def test_nothing_is_known_at_first_and_more_after_few_runs() -> None:
    world = World(new_profiles())
    assert world.profiles.view("", "research") is None
    assert world.profiles.output_tokens(RunKey("", "research", ""), "planner").samples == 0
    world.run(Application())
    world.until(1.0)
    key = RunKey("", "research", "run-0")
    first = world.profiles.predict(key, world.now_s)
    assert not first.known
    learned(3, Application(), world)
    names = {(edge.source, edge.target) for edge in view(world).edges}
    assert ("planner", "explorer") in names
    assert ("engineer", "reviewer") in names


def test_runs_without_a_final_mark_end_when_they_are_silent_for_long() -> None:
    world = learned(40, Application(finals=False))
    found = view(world)
    assert found.runs_ended == 40
    assert world.profiles.live_runs == 0
    assert found.idle_s == 60.0
    writer = next(agent for agent in found.agents if agent.name == "writer")
    assert writer.end_probability > 0.9


def test_a_changed_application_is_learned_anew() -> None:
    world = learned(200, Application())
    learned(120, Application(again=0.1, output_scale=3.0), world)
    found = view(world)
    assert edges(found)["reviewer", "writer"].probability > 0.75
    planner = next(agent for agent in found.agents if agent.name == "planner")
    assert planner.output_tokens.upper > 400
    assert found.scores.length95_coverage > 0.9


def test_a_declared_graph_is_predicted_at_once_and_refined() -> None:
    profiles = new_profiles()
    graph = Graph(
        {name: Agent() for name in ("planner", "explorer", "engineer", "reviewer", "writer")},
        [
            FanOut("planner", "explorer", 2, 4),
            Join(["explorer"], "engineer"),
            Next("engineer", "reviewer"),
            Loop("reviewer", "engineer", 3, 0.1),
            Next("reviewer", "writer"),
        ],
    )
    profiles.declare("", "research", checked(graph, WorkflowLimits()))
    key = RunKey("", "research", "first")
    profiles.observe_start(key, "call", "planner", 100, b"", 0.0)
    assert profiles.predict(key, 0.0).next[0].agent == "explorer"
    before = edges(profiles.view("", "research"))  # type: ignore[arg-type]
    assert before["reviewer", "engineer"].declared
    assert before["reviewer", "engineer"].probability == pytest.approx(0.1, abs=0.02)
    world = learned(100, Application(), World(profiles))
    after = edges(view(world))
    assert after["reviewer", "engineer"].probability > 0.5
    assert after["explorer", "explorer"].declared is False
    profiles.declare("", "research", None)
    assert not view(world).declared


def alike(one: object, other: object) -> bool:
    """Equal but for rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == (pytest.approx(other) if isinstance(other, float) else other)


def test_what_was_learned_can_be_kept_and_given_to_another(research: World) -> None:
    record = research.profiles.exported("", "research")
    assert record is not None
    for codec in (msgspec.json, msgspec.msgpack):
        read = codec.decode(codec.encode(record), type=ProfileRecord)
        other = new_profiles()
        other.restore("tenant", "copy", read)
        found, expected = other.view("tenant", "copy"), view(research)
        assert found is not None
        assert alike(msgspec.to_builtins(found), msgspec.to_builtins(expected) | {"name": "copy"})
        again = other.exported("tenant", "copy")
        assert msgspec.json.encode(again) == msgspec.json.encode(read)
    assert len(msgspec.msgpack.encode(record)) < 30_000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 99}, "version 99"),
        ({"names": ["planner"]}, "names"),
        ({"contexts": [{"path": [77], "counts": {}}]}, "beyond"),
    ],
)
def test_a_record_that_cannot_be_true_is_refused(
    research: World, change: dict[str, object], said: str
) -> None:
    record = research.profiles.exported("", "research")
    document = msgspec.to_builtins(record, str_keys=True) | change
    read = msgspec.convert(document, ProfileRecord, strict=False)
    with pytest.raises(ValueError, match=said):
        new_profiles().restore("", "research", read)


def test_a_restored_workflow_keeps_its_graph_and_loses_its_live_runs(research: World) -> None:
    record = research.profiles.exported("", "research")
    assert record is not None
    profiles = new_profiles()
    profiles.declare("", "research", Graph({"planner": Agent()}))
    profiles.observe_start(RunKey("", "research", "1"), "call", "planner", 10, b"", 0.0)
    profiles.restore("", "research", record)
    found = profiles.view("", "research")
    assert found is not None
    assert found.declared
    assert found.runs_ended == record.runs_ended
    assert profiles.live_runs == 0
    profiles.observe_end("call", 10, 1.0)
    assert len(profiles.units) == 0


def test_tenants_see_nothing_of_each_other() -> None:
    profiles = new_profiles()
    for number in range(50):
        key = RunKey("one", "flow", str(number))
        profiles.observe_start(key, f"{number}", "a", 10, b"", number, final=True)
        profiles.observe_end(f"{number}", 500, number + 0.5)
    assert profiles.view("two", "flow") is None
    assert profiles.output_tokens(RunKey("two", "flow", ""), "a").samples == 0
    assert profiles.output_tokens(RunKey("one", "flow", ""), "a").samples > 40
    assert profiles.workflows("one") == ["flow"]
    assert profiles.workflows("two") == []


def test_calls_without_a_run_are_runs_of_one_call() -> None:
    profiles = new_profiles()
    for number in range(20):
        profiles.observe_start(RunKey("", "", ""), f"{number}", "", 10, b"", number)
        assert profiles.live_runs == 1
        profiles.observe_end(f"{number}", 7, number + 0.5)
    assert profiles.live_runs == 0
    found = profiles.view("", "")
    assert found is not None
    assert found.runs_ended == 20


def test_what_comes_twice_late_or_never_is_ignored() -> None:
    profiles = new_profiles()
    profiles.observe_start(KEY, "call", "a", 10, b"", 5.0)
    profiles.observe_start(KEY, "call", "b", 99, b"", 6.0)
    profiles.observe_end("nobody", 10, 6.0)
    profiles.observe_end("call", 10, 7.0)
    profiles.observe_end("call", 99, 8.0)
    profiles.end_run(RunKey("", "flow", "other"), 9.0)
    found = profiles.view("", "flow")
    assert found is not None
    assert [(agent.name, agent.calls) for agent in found.agents] == [("a", pytest.approx(1.0))]


def test_a_clock_that_goes_back_stands_still() -> None:
    profiles = new_profiles()
    profiles.observe_start(KEY, "1", "a", 10, b"", 100.0)
    profiles.observe_end("1", 10, 50.0)
    profiles.observe_start(KEY, "2", "b", 10, b"", 20.0)
    found = edges(profiles.view("", "flow"))  # type: ignore[arg-type]
    assert found["a", "b"].gap_s.p95 <= 0.001


def test_a_cancelled_answer_teaches_no_length_and_a_cancelled_run_no_end() -> None:
    profiles = new_profiles()
    profiles.observe_start(KEY, "1", "a", 10, b"", 0.0)
    profiles.observe_end("1", 3, 1.0, completed=False)
    profiles.end_run(KEY, 2.0, completed=False)
    found = profiles.view("", "flow")
    assert found is not None
    assert found.agents[0].calls == 0
    assert found.agents[0].end_probability == 0
    assert found.runs_ended == 0


def test_parallel_sessions_of_one_agent_are_told_apart_by_their_prompts() -> None:
    """Without that, the reader's calls would seem to follow the writer's, and the other way."""
    profiles = new_profiles()
    rng = random.Random(0)
    prompts = {"reader": rng.randbytes(80), "writer": rng.randbytes(80)}
    for agent in prompts:
        profiles.observe_start(KEY, f"{agent}-0", agent, 160, prompts[agent], 0.0)
    for number in range(50):
        # Both end before both go on, in the other order.
        for agent in ("reader", "writer"):
            profiles.observe_end(f"{agent}-{number}", 10, number + 0.5)
        for agent in ("reader", "writer"):
            prompts[agent] += rng.randbytes(16)
            name = f"{agent}-{number + 1}"
            profiles.observe_start(KEY, name, agent, 200, prompts[agent], number + 1.0)
    found = edges(profiles.view("", "flow"))  # type: ignore[arg-type]
    assert found["reader", "reader"].probability > 0.9
    assert found["writer", "writer"].probability > 0.9


def test_names_that_change_with_every_request_are_forgotten_and_real_ones_are_not() -> None:
    profiles = new_profiles(
        workflows_per_tenant=8, agents_per_workflow=16, contexts_per_workflow=64,
        edges_per_workflow=64, runs_per_tenant=32, tenants=4,
    )  # fmt: skip
    for number in range(3000):
        tenant = f"tenant-{number % 7}"
        for key, agent in (
            (RunKey(tenant, f"flow-{number}", f"run-{number}"), f"agent-{number}"),
            (RunKey("real", "real", f"run-{number // 10}"), "real" if number % 2 else f"{number}"),
        ):
            call = f"{key.workflow}-{number}"
            profiles.observe_start(key, call, agent, 10, b"", number)
            if number % 3:
                profiles.observe_end(call, 10, number + 0.5)
    assert profiles.live_runs <= 4 * 32
    assert len(profiles.by_number) <= 4 * 8
    found = profiles.view("real", "real")
    assert found is not None
    assert len(found.agents) <= 16
    real = next(agent for agent in found.agents if agent.name == "real")
    assert real.calls > 100


def test_huge_names_cost_nothing() -> None:
    profiles = new_profiles()
    huge = "name" * 1_000_000
    key = RunKey(huge, huge, huge)
    profiles.observe_start(key, huge, huge, 10, b"", 0.0, parent=huge)
    assert profiles.predict(key, 0.0).after == "(other)"
    profiles.observe_end(huge, 10, 1.0)
    profiles.end_run(key, 2.0)
    assert profiles.live_runs == 0
    assert all(len(name) < 100 for name in profiles.workflows(huge))


def test_a_workflow_that_is_forgotten_leaves_nothing_alive() -> None:
    profiles = new_profiles()
    profiles.observe_start(KEY, "1", "a", 10, b"", 0.0)
    profiles.forget("", "flow")
    assert profiles.view("", "flow") is None
    assert (profiles.live_runs, profiles.live_calls, len(profiles.units)) == (0, 0, 0)
    assert profiles.by_number == {}


# --- several at once, one of them late ------------------------------------------------------------


def hashed(*blocks: int) -> bytes:
    return b"".join(block.to_bytes(8, "little") for block in blocks)


def spread_out(
    late_tokens: int, late_prompt: bytes, **parents: str
) -> dict[tuple[str, str], EdgeView]:
    """A planner sets off two explorers. The second one's request comes when the first has ended;
    then a writer follows both."""
    profiles = new_profiles()

    def call(name: str, agent: str, tokens: int, prompt: bytes, at_s: float) -> None:
        parent = parents.get(agent, "")
        profiles.observe_start(KEY, name, agent, tokens, prompt, at_s, parent=parent)
        profiles.observe_end(name, 10, at_s + 1.0)

    call("one", "planner", 3 * BLOCK_TOKENS, hashed(1, 2, 3), 0.0)
    call("two", "explorer", 5 * BLOCK_TOKENS, hashed(1, 2, 4, 5, 6), 2.0)
    call("three", "explorer", late_tokens, late_prompt, 4.0)
    call("four", "writer", 4 * BLOCK_TOKENS, hashed(1, 2, 9, 9), 6.0)
    profiles.end_run(KEY, 8.0)
    found = profiles.view("", "flow")
    assert found is not None
    return edges(found)


PARENTS = {"explorer": "planner", "writer": "explorer"}
SAME_BUT_THE_END = hashed(1, 2, 4, 5, 6)


def test_a_late_one_of_several_follows_whoever_it_names() -> None:
    found = spread_out(5 * BLOCK_TOKENS, hashed(1, 2, 7, 8, 9), **PARENTS)
    assert ("explorer", "explorer") not in found
    assert [one.value for one in found["planner", "explorer"].calls] == [2]
    assert found["explorer", "writer"].probability > 0.7, "the writer followed both"


def test_prompts_that_differ_in_less_than_a_block_are_of_several_all_the_same() -> None:
    found = spread_out(5 * BLOCK_TOKENS + 3, SAME_BUT_THE_END, **PARENTS)
    assert ("explorer", "explorer") not in found
    assert [one.value for one in found["planner", "explorer"].calls] == [2]


def test_a_prompt_with_room_for_the_answer_goes_on_from_it() -> None:
    prompt = SAME_BUT_THE_END + hashed(20, 21)
    found = spread_out(7 * BLOCK_TOKENS, prompt, **PARENTS)
    assert ("explorer", "explorer") in found
    assert [one.value for one in found["planner", "explorer"].calls] == [1]


def test_an_agent_that_always_names_the_same_parent_still_follows_what_came_before() -> None:
    profiles = new_profiles()
    steps = ["planner", "engineer", "reviewer", "engineer", "reviewer"]
    for number, agent in enumerate(steps):
        at_s = 2.0 * number
        prompt = hashed(1, 100 + number)
        parent = {"engineer": "planner", "reviewer": "engineer"}.get(agent, "")
        profiles.observe_start(KEY, str(number), agent, 2 * BLOCK_TOKENS, prompt, at_s, parent)
        profiles.observe_end(str(number), 10, at_s + 1.0)
    profiles.end_run(KEY, 20.0)
    found = profiles.view("", "flow")
    assert found is not None
    assert ("reviewer", "engineer") in edges(found), "the loop is seen, whatever the parent says"

"""Traces and authored files become workloads, wrong ones errors that say where."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.workload.change import of_tenant, with_samples
from cluster.workload.common import read_common, write_common
from cluster.workload.dag import read_dag
from cluster.workload.form import Call, Run, Workload, WorkloadError
from cluster.workload.generators import GENERATORS, Options, generated
from cluster.workload.habits import load_habits
from cluster.workload.lineage import linked
from cluster.workload.mooncake import read_mooncake
from cluster.workload.source import detected, open_workload
from cluster.workload.spans import after, cut, merged, shared, total

DATA = Path(__file__).parents[1] / "data" / "workload"


# --- the common form --------------------------------------------------------------


def test_sessions_with_subagents() -> None:
    workload = read_common(DATA / "weka_subagents.jsonl.gz")
    assert (workload.name, workload.licence, workload.block_tokens) == (
        "weka_subagents",
        "Apache-2.0",
        64,
    )
    assert not workload.arrivals_known
    (run,) = workload.runs
    assert (run.id, run.workflow) == ("trace_0003", "weka_subagents")
    join = run.calls[11]
    assert (join.parents, join.agent, join.kind, join.stage) == ((0, 10), "main", "main", "opus")
    # 153 s - (96.212 + 34.28): the recorded 145 s are since call 0, while sub-agents worked.
    assert join.think_s == pytest.approx(22.508)
    assert run.calls[2].think_s == 3.0
    assert run.calls[1].blocks == ((36622, 148),)
    # 258 full blocks; 16,564 + 244 tokens end in the 263rd of the agent's next prompt.
    assert run.calls[0].continued == ((259, 5),)
    assert [call.index for call in run.calls if call.final] == [13]


def test_pauses_without_durations_are_what_an_assumed_speed_leaves() -> None:
    calls = read_common(DATA / "lmcache_miniswe.jsonl").runs[0].calls
    assert calls[1].think_s == pytest.approx(2.333984 - 97 / 50)
    assert calls[2].think_s == 0.0  # 3.680717 - 2.333984 is less than 216 / 50


def test_traces_without_clock_have_no_pauses_and_no_arrivals() -> None:
    team = read_common(DATA / "whowhen.jsonl")
    assert not team.arrivals_known
    assert {call.think_s for run in team.runs for call in run.calls} == {0.0}
    assert team.runs[0].calls[0].kind == "Validation_Expert"


def test_global_ids_are_shared_by_sessions_and_session_ids_are_not() -> None:
    airline = read_common(DATA / "taubench_airline.jsonl")
    one, two = airline.runs
    assert one.scope == two.scope
    assert shared(one.calls[0].blocks, two.calls[0].blocks) == 21
    assert (
        read_common(DATA / "weka_subagents.jsonl.gz").runs[0].scope == "weka_subagents/trace_0003"
    )


def test_calls_without_sessions_are_runs_with_arrivals() -> None:
    azure = read_common(DATA / "azure2023_code.jsonl")
    assert azure.arrivals_known
    assert [run.arrival_s for run in azure.runs[:3]] == [0.0, 0.052, 0.0982]
    assert len({run.scope for run in azure.runs}) == len(azure.runs) == 8
    call = azure.runs[0].calls[0]
    assert (call.prompt_tokens, call.output_tokens, total(call.blocks)) == (4808, 10, 75)
    assert call.final


def test_prompts_of_unknown_length_are_refused() -> None:
    with pytest.raises(WorkloadError, match=r"deerflow.jsonl:2: in: prompt lengths are not"):
        read_common(DATA / "deerflow.jsonl")


def entry(**changes: Any) -> dict[str, Any]:
    return {"sid": "a", "i": 0, "par": [], "in": 100, "out": 5, "h": [[0, 1]]} | changes


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry(out=-1)], r":2: out: Expected `int` >= 0"),
        ([entry(out=None)], r":2: out: Expected `int`, got `null`"),
        ([entry(i="0")], r":2: i: Expected `int`"),
        ([entry(h=[[0]])], r":2: h\[0\]: Expected `array` of length 2"),
        ([entry(think=-2.5)], r":2: think: Expected `float` >= 0"),
        ([entry(i=1)], r":2: i: 1 where 0 is next"),
        ([entry(), entry(i=1, par=[1])], r":3: par: \[1\] are not all before call 1"),
        ([entry(), entry(sid="b"), entry(i=1)], r":4: sid: session 'a' goes on after another"),
        ([entry(h=[])], r":2: h: 0 blocks where the prompt has 1 full ones"),
        ([entry(), entry(i=1, h=None)], r":3: h: missing, though"),
        ([entry(**{"in": 0})], r":2: in: an empty prompt"),
        ([[]], r":2: Expected `object`, got `array`"),
    ],
)
def test_what_is_wrong_is_named_with_file_line_and_field(
    tmp_path: Path, entries: list[Any], message: str
) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [{"meta": {"bs": 64}}, *entries]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(WorkloadError, match=f"trace.jsonl{message}"):
        read_common(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "1: empty"),
        (b'{"meta": {"bs": 0}}\n', r"1: meta.bs: Expected `int` >= 1"),
        (b'{"meta": {}}\n{"sid"\n', "2: not JSON"),
        (b'{"meta": {}}\n{"sid": "\xff"}\n', "2: "),
        (gzip.compress(b'{"meta": {}}\n')[:-4], "cannot be read after line 1"),
    ],
)
def test_files_that_are_none_are_errors(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(WorkloadError, match=message):
        read_common(path)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    texts = st.text(max_size=3)
    runs = []
    for number in range(draw(st.integers(0, 4))):
        calls = []
        for index in range(draw(st.integers(1, 4))):
            blocks = merged(draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3)))))
            earlier = st.sampled_from(range(index)) if index else st.nothing()
            calls.append(
                Call(
                    index=index,
                    parents=tuple(draw(st.lists(earlier, unique=True, max_size=min(index, 2)))),
                    think_s=draw(st.floats(0, 1e9)),
                    prompt_tokens=total(blocks) * 16 + draw(st.integers(1, 15)),
                    output_tokens=draw(st.integers(1, 99)),
                    blocks=blocks,
                    agent=draw(texts),
                    kind=draw(texts),
                    stage=draw(texts),
                )
            )
        arrival_s = draw(st.floats(0, 1e9))
        scope = draw(st.sampled_from(["all", f"own {number}"]))
        runs.append(Run(f"{number}", draw(st.text(min_size=1)), arrival_s, scope, tuple(calls)))
    return Workload(
        name=draw(st.text(min_size=1, max_size=3)),
        source=draw(texts),
        licence=draw(texts),
        block_tokens=16,
        runs=linked(runs, 16),
        arrivals_known=draw(st.booleans()),
        concurrency=draw(st.integers(0, 3)),
        dropped_runs=draw(st.integers(0, 3)),
    )


@settings(max_examples=150)
@given(workloads(), st.sampled_from(["w.jsonl", "w.jsonl.gz"]))
def test_what_is_written_is_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory, workload: Workload, name: str
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    write_common(workload, path)
    assert read_common(path) == workload
    written = path.read_bytes()
    write_common(read_common(path), path)
    assert path.read_bytes() == written


@pytest.mark.parametrize("name", GENERATORS)
def test_generated_workloads_are_read_back_equal(tmp_path: Path, name: str) -> None:
    workload = generated(name, load_habits(), Options(runs=3, calls=20), random.Random(5))
    write_common(workload, tmp_path / "w.jsonl.gz")
    assert read_common(tmp_path / "w.jsonl.gz") == workload


# --- Mooncake ---------------------------------------------------------------------


def test_mooncake_is_the_same_in_its_own_and_in_the_common_form() -> None:
    own, common = (
        read_mooncake(DATA / "mooncake.jsonl"),
        read_common(DATA / "mooncake_common.jsonl"),
    )
    assert own.block_tokens == common.block_tokens == 512
    assert own.arrivals_known
    assert [run.calls for run in own.runs] == [run.calls for run in common.runs]
    assert own.runs[0].calls[0].blocks == ((0, 13),)  # 6,758 tokens: the 14th id is partial
    assert shared(own.runs[0].calls[0].blocks, own.runs[1].calls[0].blocks) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hash_ids": [1]}, "hash_ids: 1 ids for 2 full blocks"),
        ({"hash_ids": [1, -2]}, r"hash_ids\[1\]: Expected `int` >= 0"),
        ({"input_length": 0}, "input_length: Expected `int` >= 1"),
        ({"session_id": "x"}, "unknown field `session_id`"),
    ],
)
def test_wrong_mooncake_lines(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    right = {"timestamp": 1, "input_length": 1100, "output_length": 2, "hash_ids": [1, 2, 3]}
    path = tmp_path / "m.jsonl"
    path.write_text(f"{json.dumps(right)}\n\n{json.dumps(right | changes)}\n")
    with pytest.raises(WorkloadError, match=rf"m.jsonl:3: .*{message}"):
        read_mooncake(path)


# --- dag_jsonl --------------------------------------------------------------------


def test_branching_conversations_become_runs() -> None:
    workload = read_dag(DATA / "branches.jsonl")
    assert [run.id for run in workload.runs] == ["root", "other"]
    said = [(call.agent, call.parents, call.think_s) for call in workload.runs[0].calls]
    assert said == [
        ("root", (), 0.0),
        ("root", (0,), 1.5),
        ("reader", (1,), 0.0),
        ("reader", (2,), 0.25),
        ("writer", (1,), 0.0),
        ("root", (1, 3), 0.0),
        ("root", (5, 4), 0.0),
        ("left", (6,), 0.0),
        ("right", (6,), 0.0),
        ("watcher", (6,), 0.0),
    ]
    root = workload.runs[0].calls
    assert (root[0].stage, root[0].output_tokens, root[4].output_tokens) == ("large", 64, 10)
    assert root[2].output_tokens == 128
    # Texts of 671 and 14 characters, each with 4 tokens more.
    assert root[0].prompt_tokens == (168 + 4) + (4 + 4)


def test_branches_share_what_they_have_heard() -> None:
    root, other = read_dag(DATA / "branches.jsonl").runs
    before, left, right = root.calls[6], root.calls[7], root.calls[8]
    heard = (before.prompt_tokens + before.output_tokens) // 64
    assert shared(left.blocks, right.blocks) == heard
    end = -(-(before.prompt_tokens + before.output_tokens) // 64)
    assert before.continued == after(cut(left.blocks, end), total(before.blocks))
    # Spawned ones begin afresh; roots that begin alike share their beginning.
    assert shared(root.calls[0].blocks, root.calls[2].blocks) == 0
    assert shared(root.calls[0].blocks, other.calls[1].blocks) == total(root.calls[0].blocks) == 2
    assert other.calls[0].parents == other.calls[1].parents == ()


def test_turns_with_their_whole_prompt_do_not_add_up(tmp_path: Path) -> None:
    turns = [{"messages": [{"role": "user", "content": "x" * 400}]}] * 2
    modes = {"a": "deltas_without_responses", "b": "message_array_with_responses"}
    lines = [{"session_id": k, "turns": turns, "context_mode": mode} for k, mode in modes.items()]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    added, whole = read_dag(path).runs
    assert [call.prompt_tokens for call in added.calls] == [104, 104 + 128 + 104]
    assert [call.prompt_tokens for call in whole.calls] == [104, 104]


def talk(name: str = "a", **changes: Any) -> dict[str, Any]:
    return {"session_id": name, "turns": [turn()]} | changes


def turn(**changes: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}]} | changes


@pytest.mark.parametrize(
    ("talks", "message"),
    [
        ([talk(turns=[])], "1: turns: must not be empty"),
        ([talk(), talk()], "2: session_id: 'a' is there twice"),
        ([talk(turns=[turn(forks=["b"])])], r"1: turns\[0\].forks: there is no conversation 'b'"),
        ([talk(turns=[turn(forks=["b"]), turn()]), talk("b")], r"1: turns\[0\].forks: a turn that"),
        ([talk(turns=[turn(spawns=[{"children": ["b"], "join_at": 1}])]), talk("b")], "join_at: 1"),
        ([talk(turns=[turn(spawns=["b", "b"])]), talk("b")], r"turns\[0\]: names a child twice"),
        (
            [talk(turns=[turn(forks=["c"])]), talk("b", turns=[turn(forks=["c"])]), talk("c")],
            "2: turns.*'c' has been forked before",
        ),
        ([talk(turns=[turn(forks=["a"])])], "1: session_id: 'a' begins itself"),
        ([talk(turns=[turn(max_tokens=True)])], r"1: turns\[0\].max_tokens: Expected `int"),
        ([talk(turns=[{"messages": [{}]}])], r"turns\[0\].messages\[0\]: has no role"),
        ([talk(sessoin="x")], "1: .*unknown field `sessoin`"),
        ([talk(orchestrator=True)], "1: orchestrator: .* not supported"),
    ],
)
def test_wrong_conversations(tmp_path: Path, talks: list[Any], message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, talks)))
    with pytest.raises(WorkloadError, match=message):
        read_dag(path)


# --- by one line of text ------------------------------------------------------------


def test_formats_are_found_out() -> None:
    assert detected(DATA / "whowhen.jsonl") == "common"
    assert detected(DATA / "weka_subagents.jsonl.gz") == "common"
    assert detected(DATA / "mooncake.jsonl") == "mooncake"
    assert detected(DATA / "branches.jsonl") == "dag_jsonl"


def test_a_spec_names_a_file_its_format_and_changes() -> None:
    path = DATA / "weka_subagents.jsonl.gz"
    assert open_workload(str(path)) == read_common(path)
    assert open_workload(f"common:{path}") == read_common(path)
    changed = open_workload(f"{path}?scale=16&rate=0.5&pace=2&calls=12")
    (run,) = changed.runs
    assert (changed.block_tokens, changed.arrivals_known, len(run.calls)) == (4, True, 12)
    assert run.arrival_s > 0
    assert run.calls[11].think_s == pytest.approx(22.508 / 2)
    assert run.calls[0].prompt_tokens == 16564 // 16
    assert open_workload(f"{path}?closed=3").concurrency == 3
    assert open_workload(f"{path}?prompt_max=100").dropped_runs == 1
    with pytest.raises(WorkloadError, match=r"gz:1: .*unknown field `meta`"):
        open_workload(f"mooncake:{path}")


def test_a_generator_is_named_with_its_options() -> None:
    spec = "generator:review?runs=3&seed=1&width=2&rounds=2"
    workload = open_workload(spec)
    assert workload == open_workload(spec)
    assert workload != open_workload(spec.replace("seed=1", "seed=2"))
    slow, fast = (open_workload(f"{spec}&rate={rate}") for rate in (0.5, 5))
    assert [run.calls for run in slow.runs] == [run.calls for run in fast.runs]
    assert slow.runs[2].arrival_s == pytest.approx(10 * fast.runs[2].arrival_s)
    sampled = open_workload(f"{spec}&samples=2&tenant=t")
    assert sampled == with_samples(of_tenant(workload, "t"), 2, together=True)
    assert open_workload(f"{spec}&repeats=2") == with_samples(workload, 2, together=False)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("generator:codin", "no generator 'codin', did you mean 'coding'?"),
        ("generator:coding?ruuns=3", "no option 'ruuns', did you mean 'runs'?"),
        ("generator:coding?runs=0", "runs: Expected `int` >= 1"),
        ("generator:coding?runs=many", "runs: Expected `int`"),
        ("generator:chain?runs", "options are written"),
        ("generator:chain?runs=1&runs=2", "given twice"),
        ("generator:chain?runs=1&rate=1&closed=2", "rate and closed exclude"),
        ("generator:chain?runs=1&burst=2", "burst needs a rate"),
        ("generator:chain?runs=1&scale=7", "7 does not divide"),
        ("generator:chain?runs=1&samples=0", "samples: Expected `int` >= 1"),
        ("generator:chain?runs=1&repeats=65", "repeats: Expected `int` <= 64"),
        ("mooncak:file", "no format 'mooncak', did you mean 'mooncake'?"),
        ("/no/such/file.jsonl?rate=1", "No such file"),
        (f"{DATA / 'whowhen.jsonl'}?width=2", "no option 'width'"),
        (f"{DATA / 'README.md'}", "README.md:1: not JSON"),
    ],
)
def test_specs_that_mean_nothing_are_refused(spec: str, message: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        open_workload(spec)
    assert message in str(caught.value)

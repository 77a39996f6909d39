"""A scenario's file: what it means, and that everything wrong is told with key and line."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from cluster.schema import ConfigError
from cluster.simulator.baselines import BASELINES
from cluster.simulator.scenario import Overrides, Scenario, load
from cluster.simulator.source import open_source, resolved, with_options
from cluster.simulator.subject import shipped

EXAMPLES = Path(__file__).parents[2] / "examples" / "simulate"
GOOD = """\
model: llama-3.1-8b-h200-tp1
workers: {prefill: 2, decode: 6}
workloads:
  - name: reviews
    source: generator:review?runs=5&rate=1&prompt_max=100000
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "My scenario.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str, overrides: Overrides | None = None) -> list[str]:
    """What is wrong, without the file's name."""
    path = written(folder, text)
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert all(problem.startswith(f"{path}:") for problem in caught.value.problems)
    return [problem.removeprefix(f"{path}:") for problem in caught.value.problems]


def test_a_small_file_is_enough(tmp_path: Path) -> None:
    scenario = load(written(tmp_path, GOOD))
    assert scenario.name == "my-scenario"
    setup = scenario.setup
    assert setup.hardware.name == "h200"
    assert setup.tp == 1
    assert (len(setup.workers), scenario.prefill_workers) == (8, 2)
    assert {worker.node for worker in setup.workers} == {"node-0"}
    assert scenario.workloads[0].source == "generator:review?runs=5&rate=1&prompt_max=100000"
    assert setup.kv_blocks() * setup.options.block_size > 500_000


def test_workers_may_have_room_on_their_hosts(tmp_path: Path) -> None:
    text = GOOD.replace("decode: 6", "decode: 6, kv_host_gib: 64, host_bytes_per_s: 40e9")
    setup = load(written(tmp_path, text)).setup
    assert setup.host_blocks() == int(64 * 2**30 / setup.block_bytes())
    assert setup.host_bytes_per_s == 40e9
    assert load(written(tmp_path, GOOD)).setup.host_memory() is None


def test_it_survives_the_way_to_another_process(tmp_path: Path) -> None:
    links = "network: {links: {rdma: {latency_s: 1e-5, bytes_per_s: 25e9}}}\nfaults: {loss: 0.01}\n"
    scenario = load(written(tmp_path, GOOD + links))
    assert msgspec.json.decode(msgspec.json.encode(scenario), type=Scenario) == scenario
    assert scenario.setup.network.links["rdma"].bytes_per_s == 25e9


def test_types_and_unknown_keys(tmp_path: Path) -> None:
    text = GOOD + "engine:\n  blocksize: 16\n  max_num_seqs: 0\nslo: {ttft_s: soon}\nsed: 3\n"
    assert problems(tmp_path, text) == [
        "7: engine.blocksize: unknown key; did you mean 'block_size'?",
        "8: engine.max_num_seqs: must be a whole number >= 1 (got 0)",
        "9: slo.ttft_s: must be a number (got 'soon')",
        "10: sed: unknown key; did you mean 'seeds'?",
    ]


def test_bounds_of_what_goes_wrong(tmp_path: Path) -> None:
    text = GOOD + "faults:\n  loss: 1.5\n  crash_every_s: -1\nnetwork: {message_s: -1.0}\n"
    assert [line.partition(" (")[0] for line in problems(tmp_path, text)] == [
        "7: faults.loss: must be a number <= 1.0",
        "8: faults.crash_every_s: must be a number >= 0.0",
        "9: network.message_s: must be a number >= 0.0",
    ]


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        ("{}", "2: workers: give count, or how many prefill and decode"),
        ("{prefill: 3}", "2: workers: give count, or how many prefill and decode"),
        ("{count: 8, decode: 4}", "2: workers.decode: excludes 'count'"),
        ("{prefill: 1, decode: 4, ratio: [1, 3]}", "2: workers.ratio: says nothing without"),
        ("{count: 8, ratio: [1, 2, 3]}", "2: workers.ratio: takes two numbers"),
    ],
)
def test_workers_that_make_no_cluster(tmp_path: Path, workers: str, said: str) -> None:
    found = problems(tmp_path, GOOD.replace("{prefill: 2, decode: 6}", workers))
    assert len(found) == 1
    assert found[0].startswith(said)


def test_a_ratio_of_workers_on_nodes_in_racks(tmp_path: Path) -> None:
    text = GOOD.replace("{prefill: 2, decode: 6}", "{count: 32, ratio: [3, 5], nodes_per_rack: 2}")
    scenario = load(written(tmp_path, text + "tp: 2\n"))
    workers = scenario.setup.workers
    assert scenario.prefill_workers == 12
    assert [worker.name for worker in workers] == [f"worker-{n:02}" for n in range(32)]
    assert [worker.node for worker in workers].count("node-3") == 4
    assert len({worker.node for worker in workers}) == 8
    assert len({worker.rack for worker in workers}) == 4
    alone = load(written(tmp_path, GOOD.replace("{prefill: 2, decode: 6}", "{count: 1}")))
    assert alone.prefill_workers == 0


def test_a_model_that_does_not_fit_says_why_in_numbers(tmp_path: Path) -> None:
    text = GOOD.replace("llama-3.1-8b-h200-tp1", "llama-3.1-70b-h200-tp4") + "tp: 1\n"
    (found,) = problems(tmp_path, text)
    assert found.startswith("1: model: meta-llama/Meta-Llama-3.1-70B does not fit 1 x h200: ")
    assert "its share of the weights is 141.1 GB" in found
    assert "136.3 GB to use" in found


def test_an_engine_has_room_for_its_longest_call(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, GOOD + "engine:\n  max_model_len: 2000000\n")
    assert found.startswith("7: engine.max_model_len: a call may have 2000000 tokens")
    assert "131.1 kB per token" in found


def test_an_engine_larger_than_a_node(tmp_path: Path) -> None:
    text = GOOD.replace("decode: 6}", "decode: 6, gpus_per_node: 4}") + "tp: 8\n"
    found = problems(tmp_path, text)
    assert any("2: workers.gpus_per_node: an engine of 8 devices" in line for line in found)


def test_calls_that_no_engine_takes(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, GOOD + "engine: {max_model_len: 4096}\n")
    assert found.startswith("5: workloads[0].source: ")
    assert "calls are longer than an engine takes" in found
    assert "max_model_len is 4096" in found


def test_unknown_models_and_hardware(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, GOOD.replace("8b-h200", "8b-h20"))
    assert found.startswith("1: model: neither a calibration nor a file")
    assert "did you mean 'llama-3.1-8b-h200-tp1'?" in found
    (found,) = problems(tmp_path, GOOD + "hardware: b200\n")
    assert found.startswith("6: hardware: the calibration is of h200")


def test_a_config_json_on_named_hardware(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    text = GOOD.replace("llama-3.1-8b-h200-tp1", "./m")
    (found,) = problems(tmp_path, text)
    assert found == "1: model: a config.json needs 'hardware': a100-80gb, b200, h100, h200"
    (found,) = problems(tmp_path, text + "hardware: h20\n")
    assert found.startswith("6: hardware: unknown; did you mean 'h200'? (got 'h20'")
    scenario = load(written(tmp_path, text + "hardware: h100\ntp: 2\n"))
    assert scenario.setup.shape.parameters == pytest.approx(8.03e9, rel=0.01)
    assert (scenario.setup.hardware.name, scenario.setup.tp) == ("h100", 2)
    del config["vocab_size"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (found,) = problems(tmp_path, text + "hardware: h100\n")
    assert "lacks vocab_size" in found


def test_links_that_are_not_there(tmp_path: Path) -> None:
    text = GOOD + "network:\n  links:\n    rdma: {latency_s: 0, bytes_per_s: 0}\n"
    (found,) = problems(tmp_path, text)
    assert found.startswith("8: network.links.rdma: bytes_per_s must be above 0")
    (found,) = problems(tmp_path, GOOD + "network: {same_rack: rmda}\n")
    assert found.startswith("6: network.same_rack: must be one of nvlink, pcie, rdma, tcp")
    text = GOOD + "network: {links: {rmda: {latency_s: 0, bytes_per_s: 1}}}\n"
    (found,) = problems(tmp_path, text)
    assert found.startswith("6: network.links.rmda: unknown key; did you mean 'rdma'?")


def test_workloads_that_can_not_be_had(tmp_path: Path) -> None:
    text = GOOD + "  - {name: reviews, source: weka_single}\n  - {name: b, source: 'generator:x'}\n"
    found = problems(tmp_path, text)
    assert found[0] == "6: workloads[1].name: given twice"
    assert found[1].startswith("6: workloads[1].source: no file 'weka_single' in ")
    assert "PYTHIA_TRACES" in found[1]
    assert found[2].startswith("7: workloads[2].source: generator:x?seed=0: no generator 'x'")


def test_a_bad_trace_line_names_file_line_and_field(tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    traces.mkdir()
    (traces / "bad.jsonl").write_text(
        '{"timestamp": 0, "input_length": 10, "output_length": 5, "hash_ids": [1]}\n'
        '{"timestamp": 1, "input_length": -4, "output_length": 5, "hash_ids": [1]}\n'
    )
    text = GOOD.replace("generator:review?runs=5&rate=1&prompt_max=100000", "bad")
    (found,) = problems(tmp_path, text, Overrides(traces=traces))
    assert found.startswith(f"5: workloads[0].source: {traces / 'bad.jsonl'}:2: input_length")


def test_several_sources_are_one_workload(tmp_path: Path) -> None:
    both = """source:
      - generator:review?runs=5&rate=1&prompt_max=100000
      - generator:chain?runs=7&rate=2&prompt_max=100000"""
    text = GOOD.replace("source: generator:review?runs=5&rate=1&prompt_max=100000", both)
    assert text != GOOD
    scenario = load(written(tmp_path, text))
    source = scenario.workloads[0].source
    assert isinstance(source, tuple)
    workload = open_source(source, seed=3)
    assert [run.arrival_s for run in workload.runs] == sorted(
        run.arrival_s for run in workload.runs
    )
    names = [run.id.partition("/")[0] for run in workload.runs]
    assert (names.count("review"), names.count("chain")) == (5, 7)
    assert workload == open_source(source, seed=3) != open_source(source, seed=4)
    # Alike as they are, two of one kind are not the same runs at the same times.
    line = "generator:chain?runs=7&rate=2"
    twice = open_source((line, line), seed=0)
    assert len({run.arrival_s for run in twice.runs}) == 14
    assert msgspec.json.decode(msgspec.json.encode(scenario), type=type(scenario)) == scenario


def test_sources_that_can_not_be_mixed(tmp_path: Path) -> None:
    def found(*lines: str) -> str:
        listed = "".join(f"\n      - {line}" for line in lines) or " []"
        head, _, _ = GOOD.partition(" generator:review")
        (problem,) = problems(tmp_path, f"{head}{listed}\n")
        return problem

    chain = "generator:chain?runs=3"
    said = found(f"{chain}&rate=1", f"{chain}&closed=2")
    assert f"{chain}&closed=2: a closed loop can't be mixed" in said
    said = found(f"{chain}&rate=1", chain)
    assert f"{chain}: its runs have no arrivals to mix them by" in said
    assert "workloads[0].source[1]: no file 'nowhere'" in found(f"{chain}&rate=1", "nowhere")
    assert "workloads[0].source: there is none" in found()


def test_the_command_line_shortens_workloads(tmp_path: Path) -> None:
    text = GOOD.replace("generator:review?runs=5&", "generator:assistant?runs=5&")
    scenario = load(written(tmp_path, text), Overrides(runs=2, calls=3))
    workload = open_source(scenario.workloads[0].source, seed=5)
    assert len(workload.runs) == 2
    assert all(len(run.calls) <= 3 for run in workload.runs)


def test_compared_configurations_are_named_once(tmp_path: Path) -> None:
    text = GOOD + "compare: [pythia, pythia]\nreference: pithia\n"
    assert problems(tmp_path, text) == [
        "6: compare[1]: given twice",
        "7: reference: is not among 'compare'; did you mean 'pythia'?",
    ]


# --- lines of workloads -------------------------------------------------------------


def test_traces_are_looked_for_beside_the_file_first(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, names in ((here, ["a.jsonl"]), (there, ["a.jsonl.gz", "b.jsonl.gz"])):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    assert resolved("a?runs=3", here, there) == f"{here / 'a.jsonl'}?runs=3"
    assert resolved("mooncake:b", here, there) == f"mooncake:{there / 'b.jsonl.gz'}"
    assert resolved("b.jsonl.gz?x=1", here, there) == f"{there / 'b.jsonl.gz'}?x=1"


def test_a_seed_of_the_line_is_kept() -> None:
    line = "generator:chain?runs=4&rate=2"
    assert open_source(line, 1) != open_source(line, 2)
    assert open_source(line, 1) == open_source(line, 1)
    assert open_source(f"{line}&seed=9", 1) == open_source(f"{line}&seed=9", 2)
    assert with_options("a?runs=5&rate=1", {"runs": 2}) == "a?runs=2&rate=1"
    assert with_options("a", {"runs": None}) == "a"


# --- the shipped examples -------------------------------------------------------------


def test_there_are_calibrations() -> None:
    assert "llama-3.1-8b-h200-tp1" in shipped()


@pytest.mark.parametrize("name", ["quick", "faults", "mechanisms", "scarce", "slow-links"])
def test_examples_need_no_traces(name: str) -> None:
    scenario = load(EXAMPLES / f"{name}.yaml")
    assert set(scenario.compare) <= set(BASELINES)
    assert scenario.reference in scenario.compare


def test_the_example_with_traces_lacks_only_these() -> None:
    with pytest.raises(ConfigError) as caught:
        load(EXAMPLES / "traces.yaml")
    missing = ["weka_single", "weka_subagents", "mooncake_conversation"]
    for index, (problem, name) in enumerate(zip(caught.value.problems, missing, strict=True)):
        assert f"workloads[{index}].source: no file {name!r}" in problem

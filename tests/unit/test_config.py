"""Cluster files: what is wrong is named with key and line, what is right means what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import (
    ClusterConfig,
    ConfigError,
    WorkerEntry,
    coordinator_config,
    default_cluster,
    joined,
    load,
    parse,
    with_keys,
    worker_config,
)
from cluster.document import dump
from cluster.launch import with_store
from coordinator.limits import Limits, Placement, Ratio

ROOT = Path(__file__).parents[2]
HEAD = "model: tiny-llama\nworkers:\n  - {name: one, role: mixed}\n"
"""Three lines: what a test adds begins on line 4."""


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, "cluster.yaml")
    return caught.value.problems


BAD = [
    # What is added to HEAD, the line that is to blame, and what the message says.
    ("modle: x\n", 4, "modle: unknown key; did you mean 'model'?"),
    ("api: {prot: 80}\n", 4, "api.prot: unknown key; did you mean 'port'?"),
    ("api:\n  port: 70000\n", 5, "api.port: must be a whole number <= 65535 (got 70000)"),
    ("api:\n  port: -1\n", 5, "api.port: must be a whole number >= 0 (got -1)"),
    ("api:\n  port: '80'\n", 5, "api.port: must be a whole number (got '80')"),
    ("api:\n  port: true\n", 5, "api.port: must be a whole number (got True)"),
    ("api:\n  port: 99999999999999999999\n", 5, "api.port: must be"),
    ("api: 8000\n", 4, "api: must be a mapping of keys to values (got 8000)"),
    ("api: {servers: 0}\n", 4, "api.servers: must be a whole number >= 1 (got 0)"),
    ("api: {keys: [12345]}\n", 4, "api.keys[0]: must be text (got 12345)"),
    ("api: {keys: secret}\n", 4, "api.keys: must be a list (got 'secret')"),
    ("api: {keys: ['']}\n", 4, "api.keys[0]: must be text of length >= 1 (got '')"),
    ("api: {body_bytes_max: 5}\n", 4, "api.body_bytes_max: must be a whole number >= 1024"),
    ("api: {arguments: {port: 1}}\n", 4, "api.arguments.port: may not be set here"),
    ("model: again\n", 4, "model: given twice (first on line 1)"),
    ("limits:\n  queue_calls: -5\n", 5, "limits.queue_calls: must be a whole number >= 1 (got -5)"),
    ("limits:\n  queue_s: soon\n", 5, "limits.queue_s: must be a number (got 'soon')"),
    ("limits:\n  call_s: .inf\n", 5, "limits.call_s: must be finite (got inf)"),
    ("limits: {queue: 1}\n", 4, "limits.queue: unknown key; did you mean 'queue_s'?"),
    ("placement: {retained_share: 2}\n", 4, "retained_share: must be a number <= 1.0"),
    (
        "placement: {policy: round-robin}\n",
        4,
        "placement.policy: must be one of pythia, least_kv, round_robin, least_loaded, "
        "cache_aware, cost (got 'round-robin'; did you mean 'round_robin'?)",
    ),
    (
        "placement: {disaggregated: sometimes}\n",
        4,
        "disaggregated: must be one of conditional, always, never",
    ),
    ("placement: {temperature: -1}\n", 4, "temperature: must be a number >= 0.0 (got -1)"),
    ("placement: {sticky: 1}\n", 4, "placement.sticky: must be true or false (got 1)"),
    (
        "placement:\n  ratio:\n    mode: dynamic\n",
        6,
        "placement.ratio.mode: must be one of static, reactive (got 'dynamic')",
    ),
    (
        "placement:\n  rebalance: {mode: auto}\n",
        5,
        "placement.rebalance.mode: auto needs three workers, and two of them that may turn",
    ),
    (
        "placement:\n  ratio: {mode: reactive}\n  rebalance:\n    mode: auto\n",
        7,
        "placement.rebalance.mode: placement.ratio turns workers already (reactive)",
    ),
    ("api:\n  admin_keys: ['']\n", 5, "api.admin_keys[0]: must be text of length >= 1"),
    ("placement: {ratio: {dwell_s: 0}}\n", 4, "ratio.dwell_s: must be a number > 0.0 (got 0)"),
    ("placement: {ratio: {spare: 1.1}}\n", 4, "ratio.spare: must be a number <= 1.0 (got 1.1)"),
    ("placement: {ratio: {dwell: 1}}\n", 4, "ratio.dwell: unknown key; did you mean 'dwell_s'?"),
    ("start: {timeout_s: 0}\n", 4, "start.timeout_s: must be a number > 0.0 (got 0)"),
    ("network: {nixl_host: 'a b'}\n", 4, "network.nixl_host: must be a host name or address"),
    ("network: {lease_s: 1}\n", 4, "network.lease_s: must be a whole number >= 6 (got 1)"),
    ("environment: {A: true}\n", 4, "environment.A: must be a number or text (got True)"),
    ("environment: {A: {B: 1}}\n", 4, "environment.A: must be a number or text"),
    ("name: My Cluster\n", 4, "name: must be lower-case letters, digits and dashes"),
    ("engine: {model: x}\n", 4, "engine.model: may not be set here: set 'model' at the top"),
    ("engine: {kv_transfer_config: {}}\n", 4, "engine.kv_transfer_config: may not be set here"),
    ("engine: {data_parallel_size: 2}\n", 4, "add entries to 'workers' instead"),
    ("engine: {block_size: 16}\n", 4, "engine.block_size: must be a multiple of 32 on CPU"),
    ("engine: {tensor_parallel_size: 0}\n", 4, "engine.tensor_parallel_size: must be a whole"),
    ("engine: {seed: 2001-01-01}\n", 4, "engine.seed: a timestamp is not supported here"),
    ("engine: !!python/name:os.system x\n", 4, "is not supported here"),
    (
        "coordinator: {port: 8000}\n",
        4,
        "coordinator.port: port 8000 on 127.0.0.1 is already that of api",
    ),
    ("api: [\n", 5, "not valid YAML"),
    (
        "  - {name: two, role: prefil}\n",
        4,
        "workers[1].role: must be one of prefill, decode, mixed",
    ),
    ("  - {name: two, role: prefil}\n", 4, "(got 'prefil'; did you mean 'prefill'?)"),
    ("  - {name: Two, role: decode}\n", 4, "workers[1].name: must be lower-case letters"),
    (
        "  - {name: one, role: decode}\n",
        4,
        "workers[1].name: 'one' is taken by the worker on line 3",
    ),
    ("  - {name: coordinator, role: decode}\n", 4, "'coordinator' is not a worker's name"),
    ("  - {name: two}\n", 4, "workers[1]: 'role' is missing"),
    ("  - two\n", 4, "workers[1]: must be a mapping of keys to values (got 'two')"),
    ("  - {name: two, role: decode, host: 0.0.0.0}\n", 4, "workers[1].host: must be an address"),
    ("  - {name: two, role: decode, devices: [-1]}\n", 4, "workers[1].devices[0]: must be"),
    (
        "  - {name: two, role: decode, devices: [1, 1]}\n",
        4,
        "GPU 1 of 127.0.0.1 is already used by",
    ),
    ("  - {name: two, role: decode, data_port: 8000}\n", 4, "workers[1].data_port: port 8000"),
    ("  - {name: two, role: decode, health_port: 8000}\n", 4, "workers[1].health_port: port 8000"),
    ("engine: {nnodes: 0}\n", 4, "engine.nnodes: must be a whole"),
    ("engine: {node_rank: 1}\n", 4, "engine.node_rank: may not be set here: say it to each node"),
    ("  - {name: two, role: decode, engine: {block_size: 64}}\n", 4, "exchange KV must agree"),
    (
        "  - {name: two, role: decode, engine: {served_model_name: x}}\n",
        4,
        "workers[1].engine.served",
    ),
    (
        "  - {name: two, role: decode, devices: [0, 1, 2], engine: {tensor_parallel_size: 2}}\n",
        4,
        "workers[1].devices: 3 GPUs do not fit the 2 that",
    ),
]


@pytest.mark.parametrize(("added", "line", "message"), BAD, ids=[row[0].strip() for row in BAD])
def test_what_is_wrong_is_named_with_key_and_line(added: str, line: int, message: str) -> None:
    found = problems(HEAD + added)
    assert any(p.startswith(f"cluster.yaml:{line}: ") and message in p for p in found), found


def test_everything_wrong_is_reported_at_once_in_order() -> None:
    found = problems(
        "model: 5\nworkers:\n  - {name: one, role: x}\n"
        "api: {port: no}\nengine: {model: m}\nlimit: 1\n"
    )
    assert [problem.split(": ")[0] for problem in found] == [
        f"cluster.yaml:{line}" for line in (1, 3, 4, 5, 6)
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("just text\n", "must be a mapping of keys to values"),
        ("model: m\n", "'workers' is missing"),
        ("model: m\nworkers: []\n", "at least one worker must have the role decode or mixed"),
        ("model: m\nworkers:\n  - {name: p, role: prefill}\n", "at least one worker must"),
        ("a: &a [*a]\n", "too many or too deeply nested"),
        ("a: " + "[" * 20_000, "nested"),
        ("model: \x00\n", "not valid YAML"),
        ("x: 1\n? [1, 2]\n: y\n", "keys must be text"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: " + "x" * (1024 * 1024), "larger than 1048576 bytes"),
    ],
)
def test_hopeless_files_are_refused_in_words(text: str, message: str) -> None:
    assert any(message in problem for problem in problems(text))


def test_many_aliases_do_not_grow_without_bound() -> None:
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert any("too many" in problem for problem in problems("\n".join(lines)))


KEYS = ["model", "workers", "name", "role", "engine", "api", "port", "keys", "limits", "devices"]
KEYS += ["environment", "host", "arguments", "block_size", "tensor_parallel_size", "network"]
DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6)
    ),
    max_leaves=25,
)


@given(st.text(max_size=200) | DATA.map(yaml.safe_dump))
def test_any_text_is_a_cluster_or_a_config_error(text: str) -> None:
    try:
        found = [parse(text, "cluster.yaml").name]
    except ConfigError as error:
        found = error.problems
    assert found


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.yaml")


def test_a_placement_is_read_with_its_ratio() -> None:
    text = "placement: {policy: cache_aware, sticky: true, ratio: {mode: reactive, looks: 2}}\n"
    placement = parse(HEAD + text, "x.yaml").placement
    ratio = Ratio(mode="reactive", looks=2)
    assert placement == Placement(policy="cache_aware", sticky=True, ratio=ratio)


def test_bytes_that_are_no_text_are_a_config_error(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load(path)


def test_defaults_and_empty_sections() -> None:
    config = parse(HEAD + "limits:\napi:\nengine:\n", "x/My File.yaml")
    assert config.name == "my-file"
    assert config.limits == Limits()
    assert config.placement == Placement()
    assert config.served_name == "tiny-llama"
    assert config.control_address == "tcp://127.0.0.1:5570"
    assert config.base_url == "http://127.0.0.1:8000"


def test_a_wildcard_address_is_reached_through_loopback() -> None:
    config = parse(HEAD + "api: {host: 0.0.0.0}\ncoordinator: {host: '::'}\n", "x.yaml")
    assert config.base_url == "http://127.0.0.1:8000"
    assert config.control_address == "tcp://[::1]:5570"
    assert coordinator_config(config, "m").control_address == "tcp://[::]:5570"


def test_merge_keys_and_numbers_of_yaml_1_2() -> None:
    config = parse(
        "model: m\nworkers:\n"
        "  - &base {name: one, role: decode, engine: {gpu_memory_utilization: 8e-1}}\n"
        "  - {<<: *base, name: two}\n",
        "x.yaml",
    )
    assert [entry.name for entry in config.workers] == ["one", "two"]
    assert config.workers[1].engine == {"gpu_memory_utilization": 0.8}


def test_a_model_path_is_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(HEAD.replace("tiny-llama", "./weights"))
    assert load(path).model == str(tmp_path / "weights")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_the_examples_are_fine(path: Path) -> None:
    assert load(path).name == path.stem


def test_what_is_dumped_reads_as_the_same() -> None:
    config = parse(
        HEAD + "engine: {tokenizer: '1e5', revision: 'no'}\napi: {keys: ['\\u2028é😀', '007']}\n",
        "x.yaml",
    )
    assert parse(dump(config), "other.yaml") == config


@pytest.mark.parametrize(
    ("gpus", "roles"),
    [(0, "pdd"), (1, "m"), (2, "pd"), (4, "pddd"), (8, "pp" + "d" * 6), (16, "p" * 4 + "d" * 12)],
)
def test_default_clusters(gpus: int, roles: str) -> None:
    config = default_cluster("tiny-llama", gpus)
    assert "".join(entry.role[0] for entry in config.workers) == roles
    assert [d for entry in config.workers for d in entry.devices] == list(range(gpus))
    assert parse(dump(config), "x.yaml") == config


class TestWorkerConfig:
    def config(self, more: str = "") -> ClusterConfig:
        return parse(
            "model: m\nserved_model_name: served\n"
            "engine: {seed: 1, max_num_seqs: 4}\nenvironment: {A: 1, B: x, OMP_NUM_THREADS: 7}\n"
            "workers:\n  - {name: one, role: prefill}\n  - name: two\n    role: decode\n"
            "    engine: {max_num_seqs: 9}\n    environment: {B: y}\n"
            f"    data_port: 7001\n{more}",
            "x.yaml",
        )

    def test_a_worker_s_own_values_win(self) -> None:
        worker = worker_config(self.config(), "two", "/models/m")
        assert worker.engine["seed"] == 1
        assert worker.engine["max_num_seqs"] == 9
        assert worker.engine["distributed_executor_backend"] == "uni"
        assert (worker.role, worker.data_port, worker.model) == ("decode", 7001, "/models/m")
        environment = worker.process_environment()
        assert (environment["A"], environment["B"]) == ("1", "y")
        assert environment["OMP_NUM_THREADS"] == "7"
        assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert environment["UCX_TLS"] == "tcp,shm,self,cma"
        assert int(environment["VLLM_NIXL_SIDE_CHANNEL_PORT"]) > 0

    def test_engine_arguments_are_complete_and_every_engine_is_another(self) -> None:
        worker = worker_config(self.config("network: {lease_s: 12}\n"), "one", "/models/m")
        first, second = worker.engine_arguments(), worker.engine_arguments()
        assert first["scheduling_policy"] == "priority"
        assert first["model"] == "/models/m"
        assert first["served_model_name"] == ["served"]
        transfer = first["kv_transfer_config"]
        assert transfer["kv_connector_extra_config"]["kv_lease_duration"] == 12
        assert transfer["engine_id"] != second["kv_transfer_config"]["engine_id"]

    def test_an_engine_remembers_what_may_be_pinned_only_where_the_core_pins(self) -> None:
        for text, pins in (("", True), ("placement: {retention: false}\n", False)):
            worker = worker_config(self.config(text), "one", "/models/m")
            extra = worker.engine_arguments()["kv_transfer_config"]["kv_connector_extra_config"]
            assert extra["pythia_pins"] is pins

    def test_a_worker_s_room_on_its_host_is_its_own(self) -> None:
        text = "model: m\nworkers:\n  - {name: a, role: mixed, kv_host_gib: 1.5}\n"
        config = parse(f"{text}  - {{name: b, role: mixed}}\n", "x.yaml")
        first, second = (worker_config(config, name, "m") for name in "ab")
        assert (first.host_bytes, second.host_bytes) == (3 << 29, 0)
        (_, host) = first.engine_arguments()["kv_transfer_config"]["kv_connector_extra_config"][
            "connectors"
        ]
        assert host["kv_connector_extra_config"]["cpu_bytes_to_use"] == 3 << 29
        assert second.engine_arguments()["kv_transfer_config"]["kv_connector"] == "PythiaConnector"
        with pytest.raises(ConfigError, match="kv_host_gib"):
            parse(text.replace("1.5", "-1"), "x.yaml")

    def test_side_channel_ports_count_from_the_base(self) -> None:
        config = self.config("network: {side_channel_port_base: 5600}\n")
        ports = [worker_config(config, name, "m").side_channel_port for name in ("one", "two")]
        assert ports == [5600, 5601]

    def test_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = (
            "model: m\nworkers:\n"
            "  - {name: one, role: mixed, devices: [1, 2]}\n"
            "  - {name: two, role: mixed, devices: [3, 0], engine: {pipeline_parallel_size: 2}}\n"
        )
        config = parse(text, "x.yaml")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        one, two = (worker_config(config, name, "m") for name in ("one", "two"))
        assert one.engine == {"tensor_parallel_size": 2}
        assert two.engine == {"tensor_parallel_size": 1, "pipeline_parallel_size": 2}
        assert one.process_environment()["CUDA_VISIBLE_DEVICES"] == "1,2"
        assert "UCX_TLS" not in one.process_environment()
        assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in one.process_environment()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,GPU-7")
        assert two.process_environment()["CUDA_VISIBLE_DEVICES"] == "GPU-7,4"

    def test_an_engine_of_several_nodes_has_all_of_their_gpus(self) -> None:
        worker = "workers:\n  - {name: one, role: mixed, devices: [0, 1]}\n"
        text = "model: m\nengine: {nnodes: 2}\n" + worker
        found = worker_config(parse(text, "x.yaml"), "one", "m")
        assert found.engine == {"tensor_parallel_size": 4, "nnodes": 2}
        assert "node_rank" not in found.engine_arguments()
        second = msgspec.structs.replace(found, node_rank=1, leader="first-node")
        arguments = second.engine_arguments()
        assert (arguments["node_rank"], arguments["master_addr"]) == (1, "first-node")
        assert second.process_environment()["VLLM_HOST_IP"] == "127.0.0.1"
        with pytest.raises(ConfigError, match="4 GPUs do not fit the 2 that"):
            parse(text.replace("{nnodes: 2}", "{nnodes: 2, tensor_parallel_size: 2}"), "x.yaml")

    def test_an_unknown_worker_is_a_config_error(self) -> None:
        with pytest.raises(ConfigError, match="there are: one, two"):
            worker_config(self.config(), "three", "m")

    def test_joining(self) -> None:
        entry = WorkerEntry(name="three", role="mixed")
        config = joined(self.config(), entry, "tcp://10.0.0.1:99")
        assert worker_config(config, "three", "m").coordinator == "tcp://10.0.0.1:99"
        changed = joined(self.config(), WorkerEntry(name="two", role="mixed"))
        assert [entry.role for entry in changed.workers] == ["prefill", "mixed"]
        for bad in ("10.0.0.1:99", "tcp://x", "tcp://x:70000", "ipc://x"):
            with pytest.raises(ConfigError, match="must be tcp://host:port"):
                joined(self.config(), entry, bad)


def test_more_api_keys_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("sk-two\n\n  sk-three \n")
    config = with_keys(parse(HEAD + "api: {keys: [sk-one]}\n", "x.yaml"), path)
    assert config.api.keys == ["sk-one", "sk-two", "sk-three"]
    admin = with_keys(config, path, admin=True)
    assert admin.api.keys == config.api.keys
    assert admin.api.admin_keys == ["sk-two", "sk-three"]
    for text in ("", "\n \n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="there is no API key in it"):
            with_keys(config, path)
    with pytest.raises(ConfigError, match="No such file"):
        with_keys(config, tmp_path / "missing")


def test_roles_follow_demand_where_enough_workers_may_turn() -> None:
    text = (
        "model: tiny-llama\nworkers:\n  - {name: p, role: prefill}\n  - {name: d, role: decode}\n"
        "  - {name: m, role: mixed}\nplacement: {rebalance: {mode: auto}}\n"
    )
    assert parse(text, "cluster.yaml").placement.rebalance.mode == "auto"
    (problem,) = problems(text.replace("name: p,", "name: p, fixed: true,"))
    assert "(there are 3, 1 may turn)" in problem
    advisory = HEAD + "placement: {rebalance: {mode: advisory}}\n"
    assert parse(advisory, "cluster.yaml").placement.rebalance.mode == "advisory"


def test_coordinator_config_carries_what_the_file_says() -> None:
    text = HEAD + "api: {keys: [k], servers: 2}\nlimits: {queue_calls: 7}\nengine: {seed: 3}\n"
    made = coordinator_config(parse(text, "x.yaml"), "/models/m")
    assert made.control_address == "tcp://127.0.0.1:5570"
    assert (made.api_keys, made.api_servers, made.limits.queue_calls) == (["k"], 2, 7)
    assert (made.model, made.served_model_name) == ("/models/m", ["tiny-llama"])
    assert made.engine["seed"] == 3


def test_reading_a_file_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pathlib import Path; from cluster.config import load;"
        f"load(Path({str(ROOT / 'examples/local.yaml')!r}));"
        "sys.exit(any(m in sys.modules for m in ('vllm', 'torch', 'transformers', 'zmq')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


class TestNamesOfVllm:
    """Names of vLLM's arguments are checked where vLLM is installed."""

    @pytest.fixture(autouse=True)
    def _vllm(self) -> None:
        from cluster.arguments import engine_argument_names

        if engine_argument_names() is None:
            pytest.skip("vLLM is not installed")

    @pytest.mark.parametrize(
        ("added", "message"),
        [
            ("engine: {max_modl_len: 1}\n", "engine.max_modl_len: vLLM has no such argument; did"),
            ("engine: {tool_call_parser: x}\n", "it is an option of the API server"),
            ("api: {arguments: {reasoning_parser: x}}\n", "it is an argument of the engine"),
            ("api: {arguments: {enable_auto_tools: x}}\n", "vLLM has no such argument"),
        ],
    )
    def test_unknown_names(self, added: str, message: str) -> None:
        assert any(problem.startswith("cluster.yaml:4: ") and message in problem
                   for problem in problems(HEAD + added))  # fmt: skip


# --- workflows ---------------------------------------------------------------------------------

TEAM = """team:
  agents: {a: {}, b: {output_tokens: 5}}
  edges:
    - {kind: next, from: a, to: b}
"""


def with_workflows(folder: Path, *texts: str) -> str:
    """A cluster file's text that names files with these texts, in a folder below its own."""
    (folder / "flows").mkdir()
    names = []
    for number, text in enumerate(texts):
        names.append(f"flows/{number}.yaml")
        (folder / names[-1]).write_text(text)
    return HEAD + f"workflows: [{', '.join(names)}]\n"


def test_workflows_are_read_from_files_beside_the_clusters(tmp_path: Path) -> None:
    text = with_workflows(tmp_path, TEAM, TEAM.replace("team", "crew"))
    config = parse(text, str(tmp_path / "cluster.yaml"))
    again = parse(dump(config), "/elsewhere/cluster.yaml")
    workflows = coordinator_config(again, "m").workflows
    assert workflows.keys() == {"team", "crew"}
    assert workflows["team"].agents["b"].output_tokens == 5


BAD_WORKFLOWS = [
    (TEAM + "    - {kind: next, from: b, to: a}\n", "0.yaml:1: team: unbounded loop: a -> b -> a"),
    (TEAM + "    - {kind: next, from: b, to: c}\n", "0.yaml:5: team.edges[1]: no agent is called"),
    (TEAM + "    - {kind: nxt, from: b, to: a}\n", "0.yaml:5: team.edges[1]"),
    (TEAM + "    - {kind: loop, from: b, to: a}\n", "0.yaml:5: team.edges[1]: Object missing"),
    (TEAM.replace("5}", "-5}"), "0.yaml:2: team.agents"),
    ("a/b: {agents: {a: {}}}\n", "0.yaml:1: a/b: a name has no slash"),
    ("[1]\n", "0.yaml:1: must map names"),
    ("team: {\n", "not valid YAML"),
    ("", "must map names"),
]


@pytest.mark.parametrize(("text", "message"), BAD_WORKFLOWS)
def test_what_is_wrong_with_a_workflow_is_named_with_file_and_line(
    tmp_path: Path, text: str, message: str
) -> None:
    cluster = with_workflows(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        parse(cluster, str(tmp_path / "cluster.yaml"))
    assert any(message in problem for problem in caught.value.problems), caught.value.problems


def test_a_workflow_is_declared_once_and_its_file_is_there(tmp_path: Path) -> None:
    cluster = with_workflows(tmp_path, TEAM, TEAM)
    with pytest.raises(ConfigError, match="another file declares a workflow of this name"):
        parse(cluster, str(tmp_path / "cluster.yaml"))
    with pytest.raises(ConfigError, match=r"none.yaml: No such file"):
        parse(HEAD + "workflows: [none.yaml]\n", str(tmp_path / "cluster.yaml"))


def test_the_example_of_workflows_makes_sense() -> None:
    text = HEAD + "workflows: [workflows/research-team.yaml]\n"
    config = parse(text, str(ROOT / "examples" / "cluster.yaml"))
    assert coordinator_config(config, "m").workflows.keys() == {"research-team"}


def test_the_store_is_where_the_file_says_or_in_the_run_directory(tmp_path: Path) -> None:
    def stores(more: str) -> str:
        config = parse(HEAD + more, str(tmp_path / "cluster.yaml"))
        return coordinator_config(with_store(config, Path("/run")), "m").store

    assert stores("") == "/run/workflows.sqlite"
    assert stores("coordinator: {store: kept/w.sqlite}\n") == str(tmp_path / "kept/w.sqlite")
    assert stores("coordinator: {store: ''}\n") == ""

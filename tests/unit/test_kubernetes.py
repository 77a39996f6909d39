"""Manifests from a cluster file: valid, true to the file, or refused with the key."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli import _entry, app
from cluster.config import joined, load, parse, worker_config
from cluster.kubernetes.command import options_of, render, shown, text_of, write
from cluster.schema import ConfigError

ROOT = Path(__file__).parents[2]
VERSIONS = ("1.31", kubernetes_validate.latest_version())
CUSTOM = {"LeaderWorkerSet", "PodMonitor", "ScaledObject"}
"""Kinds that Kubernetes itself does not have; the schemas are those of its own."""

CPU = """\
model: tiny-llama
workers:
  - {name: prefill-0, role: prefill}
  - {name: decode-1, role: decode}
  - {name: decode-2, role: decode}
"""
SECRETS = """\
model: tiny-llama
environment: {HF_TOKEN: hub-token, OMP_NUM_THREADS: 2}
workers:
  - {name: decode-0, role: decode, environment: {OTHER_KEY: decode-key}}
  - {name: prefill-0, role: prefill, environment: {OTHER_KEY: prefill-key}}
api: {keys: [sk-one, sk-two]}
"""
SPANNING = """\
model: org/large
workers:
  - {name: prefill-0, role: prefill, devices: [0, 1, 2, 3]}
  - name: decode-0
    role: decode
    devices: [4, 5, 6, 7, 8, 9, 10, 11]
    engine: {pipeline_parallel_size: 2}
"""


def file_of(folder: Path, text: str, name: str = "team.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def objects_of(path: Path, **given: Any) -> list[dict[str, Any]]:
    return [each for group in render(path, options_of(given)).values() for each in group]


def one(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = (o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name)
    return found


def container_of(workload: dict[str, Any]) -> dict[str, Any]:
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    return container


def expanded(container: dict[str, Any], variables: dict[str, str]) -> list[str]:
    """Arguments as the kubelet makes them."""
    return [
        re.sub(r"\$\(([A-Z_]+)\)", lambda found: variables[found[1]], argument)
        for argument in container["args"]
    ]


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


CASES: list[tuple[str, str | Path, dict[str, Any]]] = [
    ("cpu", CPU, {}),
    ("nothing kept", CPU + "coordinator: {store: ''}\n", {"namespace": "agents"}),
    ("secrets", SECRETS, {}),
    ("spanning", SPANNING, {"span_nodes": True, "gpus_per_node": 4}),
    (
        "everything",
        (ROOT / "examples/gpu.yaml").read_text() + "placement: {rebalance: {mode: auto}}\n",
        {
            "namespace": "agents",
            "rdma": "rdma/hca_shared",
            "gpu_product": "NVIDIA-H100-80GB-HBM3",
            "model_claim": "models",
            "storage_class": "fast",
            "monitors": True,
            "prometheus": "http://prometheus:9090",
            "replicas_max": 8,
        },
    ),
]


@pytest.mark.parametrize(("what", "source", "given"), CASES, ids=[case[0] for case in CASES])
def test_what_is_rendered_is_valid_for_kubernetes(
    what: str, source: str | Path, given: dict[str, Any], tmp_path: Path
) -> None:
    path = source if isinstance(source, Path) else file_of(tmp_path, source)
    objects = list(yaml.safe_load_all(text_of(objects_of(path, **given))))
    templates = [
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": key}, "template": value}
        for each in objects
        if each["kind"] == "LeaderWorkerSet"
        for key, value in each["spec"]["leaderWorkerTemplate"].items()
        if key.endswith("Template")
    ]
    assert len(templates) == (2 if what == "spanning" else 0)
    checked = [each for each in objects if each["kind"] not in CUSTOM]
    assert len(checked) >= 8
    for each in checked + templates:
        for version in VERSIONS:
            kubernetes_validate.validate(each, version, strict=True)


def test_the_schemas_notice_what_is_wrong(tmp_path: Path) -> None:
    worker = one(objects_of(file_of(tmp_path, CPU)), "StatefulSet", "team-decode")
    container_of(worker)["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(worker, VERSIONS[0], strict=True)


def test_the_files_workers_are_the_pods(tmp_path: Path) -> None:
    path = file_of(tmp_path, CPU)
    objects = objects_of(path)
    text = one(objects, "ConfigMap", "team-config")["data"]["cluster.yaml"]
    cluster = parse(text, str(tmp_path / "cluster.yaml"))
    names = []
    for name in ("team-prefill", "team-decode"):
        spec = one(objects, "StatefulSet", name)["spec"]
        first = spec.get("ordinals", {}).get("start", 0)
        for index in range(first, first + spec["replicas"]):
            container = container_of(one(objects, "StatefulSet", name))
            pod = {"POD_INDEX": str(index), "POD_IP": f"10.0.0.{index}"}
            arguments = expanded(container, pod)
            given = {
                "name": option(arguments, "--name"),
                "host": option(arguments, "--data-host"),
            }
            entry = _entry(cluster, given, option(arguments, "--like"))
            control = option(arguments, "--coordinator")
            config = worker_config(joined(cluster, entry, control), entry.name, "m")
            assert (config.host, config.nixl_host) == (f"10.0.0.{index}", f"10.0.0.{index}")
            assert config.coordinator == "tcp://team-core:5570"
            assert (config.data_port, config.health_port) == (5571, 5572)
            assert not config.loopback
            names.append((config.name, config.role))
    assert names == [(entry.name, entry.role) for entry in load(path).workers]


def test_a_pod_beyond_the_file_is_like_the_others_of_its_set(tmp_path: Path) -> None:
    objects = objects_of(ROOT / "examples/gpu.yaml")
    text = one(objects, "ConfigMap", "gpu-config")["data"]["cluster.yaml"]
    cluster = parse(text, "cluster.yaml")
    container = container_of(one(objects, "StatefulSet", "gpu-prefill"))
    arguments = expanded(container, {"POD_INDEX": "7", "POD_IP": "10.0.0.7"})
    entry = _entry(cluster, {"name": "prefill-7"}, option(arguments, "--like"))
    assert (entry.name, entry.role, entry.devices) == ("prefill-7", "prefill", [0])
    assert entry.engine == {"max_num_batched_tokens": 16384}


def test_probes_volumes_and_ports_lead_to_what_is_there(tmp_path: Path) -> None:
    objects = objects_of(ROOT / "examples/gpu.yaml", monitors=True)
    for workload in (o for o in objects if o["kind"] in ("StatefulSet", "Deployment")):
        spec, container = workload["spec"]["template"]["spec"], container_of(workload)
        ports = {port["name"] for port in container["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["port"] in ports
        start = container["startupProbe"]
        assert start["periodSeconds"] * start["failureThreshold"] >= 600
        claims = workload["spec"].get("volumeClaimTemplates", [])
        volumes = {volume["name"] for volume in spec["volumes"]}
        volumes |= {claim["metadata"]["name"] for claim in claims}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        wanted = workload["spec"]["selector"]["matchLabels"]
        assert wanted.items() <= workload["spec"]["template"]["metadata"]["labels"].items()
        services = {o["metadata"]["name"] for o in objects if o["kind"] == "Service"}
        assert workload["spec"]["serviceName"] in services
    resources = container_of(one(objects, "StatefulSet", "gpu-decode"))["resources"]
    assert resources["limits"] == {"nvidia.com/gpu": "2"}
    assert one(objects, "Service", "gpu-core")["spec"]["publishNotReadyAddresses"] is True


def test_pods_get_the_time_that_their_workers_drain(tmp_path: Path) -> None:
    def grace_s(text: str) -> int:
        workload = one(objects_of(file_of(tmp_path, text)), "StatefulSet", "team-decode")
        seconds: int = workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        return seconds

    assert grace_s(CPU + "stop: {drain_s: 90.5}\n") - grace_s(CPU + "stop: {drain_s: 0}\n") == 91


def test_only_the_api_and_the_probes_are_open_to_others(tmp_path: Path) -> None:
    objects = objects_of(file_of(tmp_path, CPU))
    open_ports = {}
    for each in (o for o in objects if o["kind"] == "NetworkPolicy"):
        rules = each["spec"]["ingress"]
        anybody = [rule["ports"] for rule in rules if "from" not in rule]
        name = each["metadata"]["name"]
        open_ports[name] = {port["port"] for ports in anybody for port in ports}
    assert open_ports == {"team-coordinator": {"api"}, "team-workers": {"health"}}


def test_secrets_stand_in_the_secret_only(tmp_path: Path) -> None:
    path = file_of(tmp_path, SECRETS)
    objects = objects_of(path)
    secret = one(objects, "Secret", "team-keys")["stringData"]
    assert secret == {
        "HF_TOKEN": "hub-token",
        "decode.OTHER_KEY": "decode-key",
        "prefill.OTHER_KEY": "prefill-key",
        "api-keys": "sk-one\nsk-two\n",
    }
    others = text_of([each for each in objects if each["kind"] != "Secret"])
    for value in ("sk-one", "sk-two", "hub-token", "decode-key", "prefill-key"):
        assert value not in others
        assert value not in shown(render(path, options_of({})))
    prefill = container_of(one(objects, "StatefulSet", "team-prefill"))["env"]
    keys = {e["name"]: e["valueFrom"]["secretKeyRef"]["key"] for e in prefill[3:]}
    assert keys == {"HF_TOKEN": "HF_TOKEN", "OTHER_KEY": "prefill.OTHER_KEY"}
    coordinator = container_of(one(objects, "StatefulSet", "team-coordinator"))
    assert option(coordinator["args"], "--api-keys") == "/etc/pythia-keys/api-keys"


def test_written_files_are_private_and_complete(tmp_path: Path) -> None:
    path = file_of(tmp_path, SECRETS)
    objects = render(path, options_of({}))
    written = write(objects, tmp_path / "out")
    write(objects, tmp_path / "out")
    assert {each.name for each in written} == {each.name for each in (tmp_path / "out").iterdir()}
    assert {stat.S_IMODE(each.stat().st_mode) for each in written} == {0o600}
    listed = yaml.safe_load((tmp_path / "out/kustomization.yaml").read_text())["resources"]
    assert listed == [f"{name}.yaml" for name in objects]
    read = [
        each
        for name in listed
        for each in yaml.safe_load_all((tmp_path / "out" / name).read_text())
    ]
    assert read == [each for group in objects.values() for each in group]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl")
def test_kustomize_takes_them(tmp_path: Path) -> None:
    write(render(ROOT / "examples/gpu.yaml", options_of({})), tmp_path / "out")
    command = ["kubectl", "kustomize", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kinds = [each["kind"] for each in yaml.safe_load_all(done.stdout)]
    assert kinds.count("StatefulSet") == 3
    assert kinds.count("NetworkPolicy") == 2


def test_an_engine_that_spans_nodes_is_a_leader_with_followers(tmp_path: Path) -> None:
    objects = objects_of(file_of(tmp_path, SPANNING), span_nodes=True, gpus_per_node=4)
    spec = one(objects, "LeaderWorkerSet", "team-decode")["spec"]
    groups = spec["leaderWorkerTemplate"]
    assert (spec["replicas"], groups["size"]) == (1, 2)
    ranks = []
    for template in (groups["leaderTemplate"], groups["workerTemplate"]):
        (container,) = template["spec"]["containers"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "4"}
        pod = {"POD_INDEX": "0", "POD_IP": "10.0.0.3", "LWS_WORKER_INDEX": "1"}
        arguments = expanded(container, pod | {"LWS_LEADER_ADDRESS": "team-decode-0.team-decode"})
        assert option(arguments, "--leader") == "team-decode-0.team-decode"
        ranks.append(option(arguments, "--node-rank"))
    assert ranks == ["0", "1"]
    assert "readinessProbe" not in groups["workerTemplate"]["spec"]["containers"][0]
    text = one(objects, "ConfigMap", "team-config")["data"]["cluster.yaml"]
    config = worker_config(parse(text, "cluster.yaml"), "decode-0", "m")
    assert config.devices == [0, 1, 2, 3]
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "nnodes")
    assert [config.engine[name] for name in sizes] == [4, 2, 2]


def test_workers_are_scaled_to_what_the_core_says_that_their_role_needs(tmp_path: Path) -> None:
    text = (ROOT / "examples/gpu.yaml").read_text()
    file = file_of(tmp_path, text + "placement: {rebalance: {mode: advisory}}\n")
    objects = objects_of(file, prometheus="http://p", replicas_max=5, namespace="team")
    scaled = {
        each["spec"]["scaleTargetRef"]["name"].rpartition("-")[2]: each["spec"]
        for each in objects
        if each["kind"] == "ScaledObject"
    }
    assert set(scaled) == {"prefill", "decode"}
    assert (scaled["prefill"]["minReplicaCount"], scaled["prefill"]["maxReplicaCount"]) == (2, 5)
    sets = [each for each in objects if each["kind"] == "StatefulSet"]
    workers = [each for each in sets if "coordinator" not in each["metadata"]["name"]]
    assert len(workers) == 2
    assert all("replicas" not in each["spec"] for each in workers)
    for role, spec in scaled.items():
        (trigger,) = spec["triggers"]
        query = f'max(pythia_desired_workers{{role="{role}",namespace="team"}})'
        assert trigger["metadata"]["query"] == query
        assert (trigger["metricType"], trigger["metadata"]["threshold"]) == ("AverageValue", "1")


def test_admin_keys_are_in_the_secret_and_nowhere_else(tmp_path: Path) -> None:
    text = CPU + "api: {keys: [sk-one], admin_keys: [sk-admin]}\n"
    objects = objects_of(file_of(tmp_path, text))
    secret = one(objects, "Secret", "team-keys")["stringData"]
    assert secret == {"api-keys": "sk-one\n", "admin-keys": "sk-admin\n"}
    others = [each for each in objects if each["kind"] != "Secret"]
    assert "sk-admin" not in str(others)
    assert "--admin-keys" in str(others)


def test_workflow_files_go_along(tmp_path: Path) -> None:
    declared = ROOT / "examples/workflows/research-team.yaml"
    objects = objects_of(file_of(tmp_path, CPU + f"workflows: [{declared}]\n"))
    data = one(objects, "ConfigMap", "team-config")["data"]
    assert data["workflow-0.yaml"] == declared.read_text()
    assert yaml.safe_load(data["cluster.yaml"])["workflows"] == ["/etc/pythia/workflow-0.yaml"]


BAD: list[tuple[str, dict[str, Any], str]] = [
    (CPU.replace("decode-1", "one"), {}, r"4: workers\[1\].name: must be a word, a dash"),
    (CPU.replace("decode-1", "decode-01"), {}, r"4: workers\[1\].name: must be a word, a dash"),
    (CPU.replace("decode-2", "decode-3"), {}, r"5: workers\[2\].name: .*decode-2 is missing"),
    (CPU.replace("prefill-0", "core-0"), {}, r"3: workers\[0\].name: 'core' is taken"),
    (CPU.replace("prefill-0", "x" * 60 + "-0"), {}, r"3: workers\[0\].name: .*longer than 52"),
    (CPU + "name: 2team\n", {}, r"6: name: .*begin with a letter"),
    (CPU + "name: team-\n", {}, r"6: name: .*not end with a dash"),
    (
        CPU.replace("role: prefill", "role: prefill, host: 10.1.2.3"),
        {},
        r"3: workers\[0\].host: pods get their own address .*10.1.2.3",
    ),
    (CPU + "coordinator: {host: head-node}\n", {}, r"6: coordinator.host: .*'head-node'"),
    (CPU + "api: {host: 10.1.2.3}\n", {}, r"6: api.host: .*'10.1.2.3'"),
    (CPU + "network: {nixl_host: 10.1.2.3}\n", {}, r"6: network.nixl_host: .*'10.1.2.3'"),
    (CPU + "api: {port: 0}\n", {}, r"6: api.port: must be a fixed port"),
    (
        CPU.replace("role: prefill", "role: prefill, data_port: 5572"),
        {},
        r"3: workers\[0\].data_port: port 5572 of the same pod is already that of .*health_port",
    ),
    (
        CPU + "network: {side_channel_port_base: 5571}\n",
        {},
        r"6: network.side_channel_port_base: port 5571 of the same pod",
    ),
    (
        CPU.replace("decode-2, role: decode", "decode-2, role: decode, engine: {max_num_seqs: 3}"),
        {},
        r"5: workers\[2\].engine: engine of 'decode-2' is not that of 'decode-1'",
    ),
    (CPU.replace("tiny-llama", "/models/large"), {}, r"1: model: .*--model-claim"),
    (SPANNING, {"gpus_per_node": 4}, r"6: workers\[1\].devices: 8 GPUs, but a node has 4"),
    (
        SPANNING,
        {"gpus_per_node": 3, "span_nodes": True},
        r"3: workers\[0\].devices: 4 GPUs do not fill nodes of 3",
    ),
    (
        SPANNING.replace("pipeline_parallel_size: 2", "nnodes: 2, tensor_parallel_size: 16"),
        {"gpus_per_node": 4, "span_nodes": True},
        r"7: workers\[1\].engine.nnodes: follows from 'devices'",
    ),
    (CPU, {"prometheus": "http://p"}, r"--prometheus: nobody reckons desired workers while"),
    (CPU, {"namespace": "Not A Label"}, r"--namespace: "),
    (CPU, {"rdma": "hca"}, r"--rdma: "),
    (CPU, {"memory": "lots"}, r"--memory: "),
]


@pytest.mark.parametrize(("text", "given", "message"), BAD)
def test_what_can_not_be_is_refused_with_its_key_and_nothing_written(
    text: str, given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = file_of(tmp_path, text)
    with pytest.raises(ConfigError, match=message):
        objects_of(path, **given)
    words = [word for name, value in given.items() for word in _words(name, value)]
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["kubernetes", str(path), "--out", str(out), *words])
    assert done.exit_code == 2
    assert re.search(message, done.output)
    assert not out.exists()


def _words(name: str, value: Any) -> list[str]:
    words = [f"--{name.replace('_', '-')}"]
    return words if value is True else [*words, str(value)]


def test_the_command_writes_or_shows(tmp_path: Path) -> None:
    path, out = file_of(tmp_path, SECRETS), tmp_path / "out"
    run = CliRunner().invoke
    shown_only = run(app, ["kubernetes", str(path), "--out", str(out), "--dry-run"])
    assert (shown_only.exit_code, out.exists()) == (0, False)
    assert "kind: Secret" in shown_only.output
    assert "sk-one" not in shown_only.output
    done = run(app, ["kubernetes", str(path), "--out", str(out), "--image", "registry/pythia:1"])
    assert done.exit_code == 0, done.output
    assert "registry/pythia:1" in (out / "workers.yaml").read_text()
    blocked = file_of(tmp_path, "", "blocked")
    failed = run(app, ["kubernetes", str(path), "--out", str(blocked)])
    assert failed.exit_code == 1
    assert "blocked" in failed.output


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.gpu"])
def test_images_are_made_as_they_should_be(name: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    hadolint = shutil.which("hadolint", path=path)
    assert hadolint is not None
    done = subprocess.run([hadolint, str(ROOT / name)], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    text = (ROOT / name).read_text()
    assert f"--kind {name.rpartition('.')[2]}" in text
    for copied in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in copied.split():
            assert (ROOT / source).exists()
            assert f"!{source}\n" in (ROOT / ".dockerignore").read_text()

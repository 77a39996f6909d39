"""Pods: what the coordinator's and the workers' containers run, need and are asked."""

from __future__ import annotations

import hashlib
import math
from typing import Any

from cluster.document import dump
from cluster.kubernetes.options import (
    CONFIG_FOLDER,
    DATA_PORT,
    HEALTH_PORT,
    KEYS_FOLDER,
    MODEL_FOLDER,
    STORE_FOLDER,
)
from cluster.kubernetes.plan import Plan, WorkerSet, metrics_port
from coordinator.protocol import Role

Object = dict[str, Any]
USER = 10001
"""Who the images' processes are."""
PROBE_PERIOD_S = 5
PROBE_TIMEOUT_S = 5
PROBES_MISSED = 6
ENDPOINTS_S = 5
"""How long an API that is about to end goes on to serve, for proxies to hear of it."""
COORDINATOR_GRACE_S = 60
WORKER_GRACE_S = 60
"""A worker that has drained says so, what is left goes on elsewhere, and its engine ends in
seconds."""
GROUP_INDEX = "leaderworkerset.sigs.k8s.io/group-index"
POD_INDEX = "apps.kubernetes.io/pod-index"
HOME = "/home/pythia"


def labels(plan: Plan, component: str, role: Role | None = None) -> dict[str, str]:
    """What a cluster's objects and pods are found by. ``component``: coordinator or worker."""
    found = {
        "app.kubernetes.io/name": "pythia",
        "app.kubernetes.io/instance": plan.name,
        "app.kubernetes.io/component": component,
    }
    return found | ({"pythia.dev/role": role} if role else {})


def set_labels(plan: Plan, each: WorkerSet) -> dict[str, str]:
    """Those of one set's pods."""
    return labels(plan, "worker", each.entry.role) | {"pythia.dev/set": each.stem}


def configuration(plan: Plan) -> dict[str, str]:
    """The ConfigMap's files by name."""
    return {"cluster.yaml": dump(plan.config), **plan.files}


def coordinator_template(plan: Plan) -> Object:
    """The coordinator's pod."""
    arguments = ["coordinator", f"{CONFIG_FOLDER}/cluster.yaml"]
    mounts = [_mount("config", CONFIG_FOLDER)]
    volumes = [_config_volume(plan)]
    files = [
        name for name, keys in (("api-keys", plan.keys), ("admin-keys", plan.admin_keys)) if keys
    ]
    for name in files:
        arguments += [f"--{name}", f"{KEYS_FOLDER}/{name}"]
    if files:
        mounts.append(_mount("keys", KEYS_FOLDER))
        items = [{"key": name, "path": name} for name in files]
        volumes.append(
            {"name": "keys", "secret": {"secretName": f"{plan.name}-keys", "items": items}}
        )
    if plan.keeps_workflows:
        mounts.append({"name": "store", "mountPath": STORE_FOLDER})
    _add_scratch(plan, mounts, volumes)
    api = plan.config.api.port
    container = {
        "name": "coordinator",
        "image": plan.options.coordinator_image,
        "args": arguments,
        "env": _environment(plan, ""),
        "ports": [
            {"name": "api", "containerPort": api},
            {"name": "control", "containerPort": plan.config.coordinator.port},
        ],
        **_probes("/live", "/ready", "api", plan.config.start.timeout_s),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(ENDPOINTS_S)]}}},
        "resources": {"requests": {"cpu": str(1 + plan.config.api.servers), "memory": "4Gi"}},
        "securityContext": _container_security([]),
        "volumeMounts": mounts,
    }
    return _template(
        plan, labels(plan, "coordinator"), [container], volumes, {}, COORDINATOR_GRACE_S
    )


def worker_template(plan: Plan, each: WorkerSet) -> Object:
    """A worker's pod; of an engine that spans nodes, its leader's."""
    index = GROUP_INDEX if each.nodes > 1 else POD_INDEX
    entry = each.entry
    ports = [
        {"name": "data", "containerPort": entry.data_port or DATA_PORT},
        {"name": "health", "containerPort": entry.health_port or HEALTH_PORT},
    ]
    if port := metrics_port(entry, plan.options):
        ports.append({"name": "metrics", "containerPort": port})
    container = _worker_container(plan, each, index, "0" if each.nodes > 1 else "")
    container |= {
        "ports": ports,
        **_probes("/live", "/ready", "health", plan.config.start.timeout_s),
    }
    return _worker_pod(plan, each, container)


def follower_template(plan: Plan, each: WorkerSet) -> Object:
    """A further pod of an engine that spans nodes. It ends with its leader, or ends it."""
    return _worker_pod(
        plan, each, _worker_container(plan, each, GROUP_INDEX, "$(LWS_WORKER_INDEX)")
    )


def _worker_container(plan: Plan, each: WorkerSet, index_label: str, node_rank: str) -> Object:
    control = f"tcp://{plan.core_host}:{plan.config.coordinator.port}"
    arguments = [
        *("worker", "--config", f"{CONFIG_FOLDER}/cluster.yaml"),
        *("--name", f"{each.stem}-$(POD_INDEX)"),
        *("--like", each.entry.name),
        *("--coordinator", control),
        *("--data-host", "$(POD_IP)"),
    ]
    if node_rank:
        arguments += ["--node-rank", node_rank, "--leader", "$(LWS_LEADER_ADDRESS)"]
    mounts = [_mount("config", CONFIG_FOLDER)]
    if each.gpus:
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    _add_scratch(plan, mounts, [])
    return {
        "name": "worker",
        "image": plan.options.image or ("pythia:gpu" if each.gpus else "pythia:cpu"),
        "args": arguments,
        "env": [
            _field("POD_IP", "status.podIP"),
            _field("POD_INDEX", f"metadata.labels['{index_label}']"),
            *_environment(plan, each.stem),
        ],
        "resources": _resources(plan, each),
        "securityContext": _container_security(
            ["IPC_LOCK"] if each.gpus and plan.options.rdma else []
        ),
        "volumeMounts": mounts,
    }


def _worker_pod(plan: Plan, each: WorkerSet, container: Object) -> Object:
    volumes = [_config_volume(plan)]
    if each.gpus:
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
    _add_scratch(plan, [], volumes)
    placement: Object = {"affinity": _affinity(plan, each)}
    if each.gpus:
        placement["tolerations"] = [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
    grace_s = WORKER_GRACE_S + math.ceil(plan.config.stop.drain_s)
    return _template(plan, set_labels(plan, each), [container], volumes, placement, grace_s)


def _template(
    plan: Plan,
    pod_labels: dict[str, str],
    containers: list[Object],
    volumes: list[Object],
    more: Object,
    grace_s: int,
) -> Object:
    # A pod reads its configuration once: another one needs another pod.
    text = "\0".join(f"{name}\0{text}" for name, text in configuration(plan).items())
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {
        "metadata": {"labels": pod_labels, "annotations": {"pythia.dev/config": digest}},
        "spec": {
            "automountServiceAccountToken": False,
            # Variables of Services would begin with their names, some of which vLLM reads.
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "terminationGracePeriodSeconds": grace_s,
            "containers": containers,
            "volumes": volumes,
            **more,
        },
    }


def _probes(live: str, ready: str, port: str, start_s: float) -> Object:
    def probe(path: str, missed: int) -> Object:
        return {
            "httpGet": {"path": path, "port": port},
            "periodSeconds": PROBE_PERIOD_S,
            "timeoutSeconds": PROBE_TIMEOUT_S,
            "failureThreshold": missed,
        }

    return {
        "startupProbe": probe(live, max(1, math.ceil(start_s / PROBE_PERIOD_S))),
        "livenessProbe": probe(live, PROBES_MISSED),
        "readinessProbe": probe(ready, 2),
    }


def _resources(plan: Plan, each: WorkerSet) -> Object:
    options = plan.options
    devices: dict[str, Any] = {}
    if each.gpus:
        devices["nvidia.com/gpu"] = str(each.gpus)
        if options.rdma:
            devices[options.rdma] = "1"
    requests = {"cpu": options.cpu, "memory": options.memory}
    return {"requests": requests | devices} | ({"limits": devices} if devices else {})


def _affinity(plan: Plan, each: WorkerSet) -> Object:
    """Near the cluster's other workers, but not all of a set on one machine."""

    def preferred(selector: dict[str, str], topology: str, weight: int) -> list[Object]:
        term = {"labelSelector": {"matchLabels": selector}, "topologyKey": topology}
        return [{"weight": weight, "podAffinityTerm": term}]

    key = "preferredDuringSchedulingIgnoredDuringExecution"
    near = preferred(labels(plan, "worker"), "topology.kubernetes.io/zone", 50)
    apart = preferred(set_labels(plan, each), "kubernetes.io/hostname", 10)
    affinity: Object = {"podAffinity": {key: near}, "podAntiAffinity": {key: apart}}
    if each.gpus and (product := plan.options.gpu_product):
        match = {"key": "nvidia.com/gpu.product", "operator": "In", "values": [product]}
        terms = {"nodeSelectorTerms": [{"matchExpressions": [match]}]}
        affinity["nodeAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": terms}
    return affinity


def _environment(plan: Plan, stem: str) -> list[Object]:
    """Where models are kept, and the variables that are secrets: of all, and of one set."""
    home = MODEL_FOLDER if plan.options.model_claim else f"{HOME}/.cache"
    found: list[Object] = [{"name": "HF_HOME", "value": f"{home}/huggingface"}]
    secrets = {name: "" for name in plan.secrets.get("", {})}
    secrets |= {name: stem for name in (plan.secrets.get(stem, {}) if stem else {})}
    for name, owner in secrets.items():
        source = {"name": f"{plan.name}-keys", "key": secret_key(owner, name)}
        found.append({"name": name, "valueFrom": {"secretKeyRef": source}})
    return found


def secret_key(stem: str, name: str) -> str:
    """The Secret's key for a variable of one set, or of all."""
    return f"{stem}.{name}" if stem else name


def _add_scratch(plan: Plan, mounts: list[Object], volumes: list[Object]) -> None:
    mounts.append({"name": "home", "mountPath": HOME})
    volumes.append({"name": "home", "emptyDir": {}})
    if claim := plan.options.model_claim:
        mounts.append({"name": "models", "mountPath": MODEL_FOLDER})
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": claim}})


def _config_volume(plan: Plan) -> Object:
    return {"name": "config", "configMap": {"name": f"{plan.name}-config"}}


def _mount(name: str, path: str) -> Object:
    return {"name": name, "mountPath": path, "readOnly": True}


def _field(name: str, path: str) -> Object:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _container_security(capabilities: list[str]) -> Object:
    added = {"add": capabilities} if capabilities else {}
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"], **added}}

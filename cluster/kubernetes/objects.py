"""The Kubernetes objects of one cluster, as plain data in the order in which to apply them."""

from __future__ import annotations

from typing import Any

from cluster.kubernetes.plan import Plan, WorkerSet, metrics_port, set_name
from cluster.kubernetes.pods import (
    Object,
    configuration,
    coordinator_template,
    follower_template,
    labels,
    secret_key,
    set_labels,
    worker_template,
)

SCALE_DOWN_S = 600
"""How long fewer workers must do before one is taken away."""


def manifests(plan: Plan) -> dict[str, list[Object]]:
    """All objects by the file that they go into."""
    found = {"config": [_config_map(plan)]}
    if secret := _secret(plan):
        found["secret"] = [secret]
    found["coordinator"] = _coordinator(plan)
    found["workers"] = [_headless(plan, f"{plan.name}-workers", "worker", [])]
    for each in plan.sets:
        found["workers"] += [_worker_set(plan, each), _budget(plan, each)]
    found["network"] = [_coordinator_policy(plan), _worker_policy(plan)]
    if plan.options.monitors:
        found["monitors"] = [_monitor(plan, "coordinator", "api")]
        found["monitors"] += [_monitor(plan, "worker", "metrics")]
    if scalers := [scaler for each in plan.sets if (scaler := _scaler(plan, each))]:
        found["scaling"] = scalers
    return found


def _object(plan: Plan, api_version: str, kind: str, name: str, component: str) -> Object:
    metadata: dict[str, Any] = {"name": name, "labels": labels(plan, component)}
    if plan.options.namespace:
        metadata["namespace"] = plan.options.namespace
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata}


def _config_map(plan: Plan) -> Object:
    head = _object(plan, "v1", "ConfigMap", f"{plan.name}-config", "coordinator")
    return head | {"data": configuration(plan)}


def _secret(plan: Plan) -> Object | None:
    """What must not stand in the ConfigMap, if there is any."""
    data = {
        secret_key(stem, name): value
        for stem, variables in plan.secrets.items()
        for name, value in variables.items()
    }
    if plan.keys:
        data["api-keys"] = "".join(f"{key}\n" for key in plan.keys)
    if plan.admin_keys:
        data["admin-keys"] = "".join(f"{key}\n" for key in plan.admin_keys)
    if not data:
        return None
    head = _object(plan, "v1", "Secret", f"{plan.name}-keys", "coordinator")
    return head | {"type": "Opaque", "stringData": data}


def _coordinator(plan: Plan) -> list[Object]:
    """One core at a time: neither kind starts the next before the last has ended."""
    name = f"{plan.name}-coordinator"
    spec: Object = {
        "replicas": 1,
        "selector": {"matchLabels": labels(plan, "coordinator")},
        "template": coordinator_template(plan),
    }
    if plan.keeps_workflows:
        claim: Object = {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": plan.options.storage}},
        }
        if plan.options.storage_class is not None:
            claim["storageClassName"] = plan.options.storage_class
        spec["serviceName"] = plan.core_host
        spec["volumeClaimTemplates"] = [{"metadata": {"name": "store"}, "spec": claim}]
        kind = "StatefulSet"
    else:
        spec["strategy"] = {"type": "Recreate"}
        kind = "Deployment"
    ports = [_port("api", plan.config.api.port)]
    api = _object(plan, "v1", "Service", f"{plan.name}-api", "coordinator")
    api["spec"] = {"selector": labels(plan, "coordinator"), "ports": ports}
    # The API is ready when a worker is there, so workers must find the core before that.
    control = [_port("control", plan.config.coordinator.port)]
    core = _headless(plan, plan.core_host, "coordinator", control)
    return [_object(plan, "apps/v1", kind, name, "coordinator") | {"spec": spec}, core, api]


def _port(name: str, port: int) -> Object:
    return {"name": name, "port": port, "targetPort": name}


def _headless(plan: Plan, name: str, component: str, ports: list[Object]) -> Object:
    """Names for pods, also before they are ready."""
    spec: Object = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": labels(plan, component),
    }
    if ports:
        spec["ports"] = ports
    return _object(plan, "v1", "Service", name, component) | {"spec": spec}


def _worker_set(plan: Plan, each: WorkerSet) -> Object:
    name = set_name(plan.name, each.stem)
    # Applied anew, a number would undo what the autoscaler has done.
    replicas = {} if _is_scaled(plan, each) else {"replicas": each.count}
    if each.nodes > 1:
        api_version = "leaderworkerset.x-k8s.io/v1"
        head = _object(plan, api_version, "LeaderWorkerSet", name, "worker")
        groups = {
            "size": each.nodes,
            "restartPolicy": "RecreateGroupOnPodRestart",
            "leaderTemplate": worker_template(plan, each),
            "workerTemplate": follower_template(plan, each),
        }
        return head | {"spec": {**replicas, "leaderWorkerTemplate": groups}}
    spec: Object = {
        **replicas,
        "serviceName": f"{plan.name}-workers",
        # All at once: none waits for another, and engines take minutes.
        "podManagementPolicy": "Parallel",
        "selector": {"matchLabels": set_labels(plan, each)},
        "template": worker_template(plan, each),
    }
    if each.first:
        spec["ordinals"] = {"start": each.first}
    return _object(plan, "apps/v1", "StatefulSet", name, "worker") | {"spec": spec}


def _budget(plan: Plan, each: WorkerSet) -> Object:
    name = set_name(plan.name, each.stem)
    head = _object(plan, "policy/v1", "PodDisruptionBudget", name, "worker")
    selector = {"matchLabels": set_labels(plan, each)}
    return head | {"spec": {"maxUnavailable": 1, "selector": selector}}


def _coordinator_policy(plan: Plan) -> Object:
    """The API for everybody, the core for the cluster's own workers."""
    rules: list[Object] = [
        {"ports": [{"port": "api", "protocol": "TCP"}]},
        {
            "from": [{"podSelector": {"matchLabels": labels(plan, "worker")}}],
            "ports": [{"port": "control", "protocol": "TCP"}],
        },
    ]
    return _policy(plan, "coordinator", rules)


def _worker_policy(plan: Plan) -> Object:
    """Workers among themselves without bounds: NIXL and engines that span nodes choose ports."""
    rules: list[Object] = [
        {"from": [{"podSelector": {"matchLabels": labels(plan, "worker")}}]},
        {
            "from": [{"podSelector": {"matchLabels": labels(plan, "coordinator")}}],
            "ports": [{"port": "data", "protocol": "TCP"}],
        },
        {"ports": [{"port": "health", "protocol": "TCP"}]},
    ]
    if any(metrics_port(each.entry, plan.options) for each in plan.sets):
        rules.append({"ports": [{"port": "metrics", "protocol": "TCP"}]})
    return _policy(plan, "worker", rules)


def _policy(plan: Plan, component: str, rules: list[Object]) -> Object:
    name = {"worker": f"{plan.name}-workers"}.get(component, f"{plan.name}-{component}")
    head = _object(plan, "networking.k8s.io/v1", "NetworkPolicy", name, component)
    selector = {"matchLabels": labels(plan, component)}
    return head | {"spec": {"podSelector": selector, "policyTypes": ["Ingress"], "ingress": rules}}


def _monitor(plan: Plan, component: str, port: str) -> Object:
    """For the Prometheus operator."""
    name = {"worker": f"{plan.name}-workers"}.get(component, f"{plan.name}-{component}")
    head = _object(plan, "monitoring.coreos.com/v1", "PodMonitor", name, component)
    return head | {
        "spec": {
            "selector": {"matchLabels": labels(plan, component)},
            "podMetricsEndpoints": [{"port": port, "path": "/metrics"}],
        }
    }


def _is_scaled(plan: Plan, each: WorkerSet) -> bool:
    """Whether somebody else says how many workers a set has; not of those without roles."""
    return bool(plan.options.prometheus) and each.entry.role != "mixed"


def _scaler(plan: Plan, each: WorkerSet) -> Object | None:
    """For KEDA: as many workers as the core says that their role needs."""
    options = plan.options
    if not _is_scaled(plan, each):
        return None
    phase = "prefill" if each.entry.role == "prefill" else "decode"
    where = f',namespace="{options.namespace}"' if options.namespace else ""
    query = f'max(pythia_desired_workers{{role="{phase}"{where}}})'
    spans = each.nodes > 1
    name = set_name(plan.name, each.stem)
    slowly = {"stabilizationWindowSeconds": SCALE_DOWN_S}
    return _object(plan, "keda.sh/v1alpha1", "ScaledObject", name, "worker") | {
        "spec": {
            "scaleTargetRef": {
                "apiVersion": "leaderworkerset.x-k8s.io/v1" if spans else "apps/v1",
                "kind": "LeaderWorkerSet" if spans else "StatefulSet",
                "name": name,
            },
            "minReplicaCount": each.count,
            "maxReplicaCount": max(each.count, options.replicas_max),
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": {"scaleDown": slowly}}},
            "triggers": [
                {
                    "type": "prometheus",
                    "metricType": "AverageValue",
                    "metadata": {
                        "serverAddress": options.prometheus,
                        "query": query,
                        # As many workers as the number says.
                        "threshold": "1",
                    },
                }
            ],
        }
    }

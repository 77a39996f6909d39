"""What a person says of a Kubernetes cluster that no cluster file knows."""

from __future__ import annotations

from typing import Annotated

import msgspec

from coordinator.limits import Positive

CONTROL_PORT = 5570
"""Where nothing else is said, ports of a pod; each pod has an address of its own."""
DATA_PORT = 5571
HEALTH_PORT = 5572
METRICS_PORT = 5573
SIDE_CHANNEL_PORT = 5600
MODEL_FOLDER = "/models"
STORE_FOLDER = "/var/lib/pythia"
CONFIG_FOLDER = "/etc/pythia"
KEYS_FOLDER = "/etc/pythia-keys"

Quantity = Annotated[str, msgspec.Meta(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]
Label = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
ResourceName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Choices for one cluster.

    ``image``: with vLLM for the workers' devices, by them if not given;
    ``coordinator_image``: the coordinator's, which has no GPU. ``gpus_per_node``: GPUs of a
    node; an engine of more needs ``span_nodes``. ``rdma``: the device plugin's resource, one
    of which each worker with GPUs gets. ``model_claim``: a volume claim that is mounted at
    ``/models``. ``storage``: size of the store's volume.
    ``prometheus``: where KEDA asks, if workers are to be scaled, at most to ``replicas_max``.
    ``cpu`` and ``memory``: what each worker asks for.
    """

    image: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    coordinator_image: Annotated[str, msgspec.Meta(min_length=1)] = "pythia:cpu"
    namespace: Label | None = None
    gpus_per_node: Positive = 8
    span_nodes: bool = False
    gpu_product: str = ""
    rdma: ResourceName | None = None
    model_claim: Label | None = None
    storage: Quantity = "1Gi"
    storage_class: str | None = None
    cpu: Quantity = "2"
    memory: Quantity = "8Gi"
    monitors: bool = False
    prometheus: str = ""
    replicas_max: Positive = 16

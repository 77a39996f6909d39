"""``pythia kubernetes``: its options, handed on to ``command``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def kubernetes(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The cluster's YAML file.")],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the manifests are written.")
    ] = Path("manifests"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print them, without secrets, and write nothing.")
    ] = False,
    image: Annotated[str | None, typer.Option(help="The workers' image.")] = None,
    coordinator_image: Annotated[str | None, typer.Option(help="For no GPU.")] = None,
    namespace: Annotated[str | None, typer.Option(metavar="NS")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, metavar="N", help="Else 8.")] = None,
    span_nodes: Annotated[
        bool, typer.Option("--span-nodes", help="Engines of more GPUs are LeaderWorkerSets.")
    ] = False,
    gpu_product: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of nodes' label nvidia.com/gpu.product.")
    ] = None,
    rdma: Annotated[
        str | None, typer.Option(metavar="rdma/NAME", help="A device for each worker.")
    ] = None,
    model_claim: Annotated[
        str | None, typer.Option(metavar="CLAIM", help="The volume with models.")
    ] = None,
    storage: Annotated[str | None, typer.Option(help="For workflows; else 1Gi.")] = None,
    storage_class: Annotated[str | None, typer.Option(help="Else the cluster's own.")] = None,
    cpu: Annotated[str | None, typer.Option(help="Asked for by a worker; else 2.")] = None,
    memory: Annotated[str | None, typer.Option(help="Asked for by a worker; else 8Gi.")] = None,
    monitors: Annotated[
        bool, typer.Option("--monitors", help="PodMonitors, and metrics of workers.")
    ] = False,
    prometheus: Annotated[
        str | None, typer.Option(metavar="URL", help="KEDA asks there how many workers to run.")
    ] = None,
    replicas_max: Annotated[int | None, typer.Option(min=1, metavar="N", help="Else 16.")] = None,
) -> None:
    """Write the Kubernetes manifests of a cluster file."""
    from cluster.kubernetes import command

    given = {
        "image": image,
        "coordinator_image": coordinator_image,
        "namespace": namespace,
        "gpus_per_node": gpus_per_node,
        "span_nodes": span_nodes,
        "gpu_product": gpu_product,
        "rdma": rdma,
        "model_claim": model_claim,
        "storage": storage,
        "storage_class": storage_class,
        "cpu": cpu,
        "memory": memory,
        "monitors": monitors,
        "prometheus": prometheus,
        "replicas_max": replicas_max,
    }
    objects = command.render(file, command.options_of(given))
    if dry_run:
        typer.echo(command.shown(objects), nl=False)
        return
    for path in command.write(objects, out):
        typer.echo(path)
    typer.echo(f"now: kubectl apply -k {out}")

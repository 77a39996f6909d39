"""What is next to a GPU: which network devices, and which cores.

Pure: reads what ``nvidia-smi topo -m`` prints and chooses. A GPU's KV goes out through the
NIC behind the same PCIe switch at full speed; through one on the other socket it crosses
the processors' link, which all others share.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import msgspec

NEAR = ("PIX", "PXB", "PHB", "NODE")
"""From nearest to farthest. ``SYS``, over the processors' link, is not near."""
CORES_MAX = 65536

_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
_NIC = re.compile(r"\s*(NIC\d+):\s*(\S+)\s*$")


class Gpu(msgspec.Struct, frozen=True):
    """A GPU: how far every NIC is, by the device's name, and the cores of its NUMA node."""

    distances: dict[str, str]
    cores: list[int]


class Place(msgspec.Struct, frozen=True):
    """Where a worker belongs on its host. Empty: no choice is better than the system's."""

    net_devices: list[str] = []
    cores: list[int] = []


class TopologyError(ValueError):
    """Not what ``nvidia-smi topo -m`` prints."""


def parse(text: str) -> list[Gpu]:
    """Every GPU of ``nvidia-smi topo -m``, in order. TopologyError for anything else."""
    lines = _ESCAPE.sub("", text).splitlines()
    names = {found[1]: found[2] for line in lines if (found := _NIC.match(line))}
    rows = [_cells(line) for line in lines]
    headers = [row for row in rows if "GPU0" in row[1:2]]
    if not headers:
        raise TopologyError("there is no line with GPU0 and what is beside it")
    header = headers[0]
    return [_gpu(header, row, names) for row in rows if re.fullmatch(r"GPU\d+", row[0])]


def _gpu(header: Sequence[str], row: Sequence[str], names: dict[str, str]) -> Gpu:
    by_column = dict(zip(header, row, strict=False))
    distances = {names[column]: cell for column, cell in by_column.items() if column in names}
    return Gpu(distances, core_list(by_column.get("CPU Affinity", "")))


def _cells(line: str) -> list[str]:
    """Of a line of the table; the first is its label, empty in the header."""
    cells = line.split("\t") if "\t" in line else re.split(r"\s{2,}", line)
    return [cell.strip() for cell in cells] or [""]


def core_list(text: str) -> list[int]:
    """``0-3,8`` as numbers; nothing for ``N/A``. TopologyError for anything else."""
    cores: list[int] = []
    if text in ("", "N/A"):
        return cores
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if found is None:
            raise TopologyError(f"{text!r} is no list of cores")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < CORES_MAX:
            raise TopologyError(f"{text!r} is no list of cores")
        cores += range(first, last + 1)
    return cores


def place(gpus: Sequence[Gpu], devices: Sequence[int], active: Collection[str]) -> Place:
    """Next to GPUs ``devices``. ``active``: NICs that have a link, as UCX names them.

    A worker of several GPUs gets the nearest NICs of each, and the cores of all. No NIC if
    there is none near one of them: UCX then chooses among all.
    """
    chosen = [gpus[device] for device in devices if device < len(gpus)]
    if not chosen or len(chosen) < len(devices):
        return Place()
    nearest = [_nearest(gpu, active) for gpu in chosen]
    names = {name for each in nearest for name in each} if all(nearest) else set()
    cores = {core for gpu in chosen for core in gpu.cores}
    return Place(sorted(names), sorted(cores) if all(gpu.cores for gpu in chosen) else [])


def _nearest(gpu: Gpu, active: Collection[str]) -> list[str]:
    for distance in NEAR:
        found = [name for name in active if gpu.distances.get(name.partition(":")[0]) == distance]
        if found:
            return found
    return []

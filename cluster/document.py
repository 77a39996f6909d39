"""Reads a YAML text into plain data or msgspec Structs and keeps every key's line.

All that is wrong is reported, each with its dotted path and line::

    cluster.yaml:12: workers[1].role: must be one of prefill, decode, mixed (got 'prefil')

Strict on purpose: unknown keys, duplicate keys, wrong types, values outside their
bounds and YAML tags beyond plain data are problems. Nothing is converted silently,
no file is read here, and nothing in the text can make this code run anything.
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
import yaml

TEXT_BYTES_MAX = 1024 * 1024
NODES_MAX = 100_000
"""Values in one document, aliases counted each time they are used."""
DEPTH_MAX = 64

Path = tuple[str | int, ...]
T = TypeVar("T")

_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "map", "seq")
)
_MERGE_TAG = "tag:yaml.org,2002:merge"
_TYPE_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping of keys to values",
    "null": "empty",
}


class Problem(msgspec.Struct, frozen=True, order=True):
    """One thing that is wrong: the line (from 1) and a sentence that names the key."""

    line: int
    text: str


def dotted(path: Path) -> str:
    """``("workers", 1, "role")`` as ``workers[1].role``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def suggestion(name: str, known: typing.Iterable[str]) -> str:
    """``; did you mean ...?`` when a known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, reading ``1e-4`` as the number that it is in YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Its counterpart, quoting text that looks like such a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def dump(value: msgspec.Struct) -> str:
    """A Struct as YAML that ``read`` makes into an equal one."""
    return yaml.dump(msgspec.to_builtins(value), Dumper=_Dumper, sort_keys=False)


class Document:
    """The data of one YAML text, where each key stands, and what is wrong so far."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.data: Any = None
        self._lines: dict[Path, int] = {(): 1}
        self._problems: list[Problem] = []
        self._nodes = 0
        if len(text.encode()) > TEXT_BYTES_MAX:
            self._add(1, f"larger than {TEXT_BYTES_MAX} bytes")
            return
        try:
            self._read(text)
        except yaml.YAMLError as error:
            self._add_yaml_error(error, text)
        except RecursionError:
            self._add(1, "too deeply nested")

    def _read(self, text: str) -> None:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                self.data = self._build(loader, node, ())
        finally:
            loader.dispose()

    def problem(self, path: Path, text: str) -> None:
        """Reports that the value at ``path`` is wrong."""
        self._add(self.line(path), f"{dotted(path)}: {text}" if path else text)

    def problems(self) -> list[str]:
        """Everything reported, in the order of lines, as ``name:line: key: what``."""
        return [f"{self.name}:{problem.line}: {problem.text}" for problem in sorted(self._problems)]

    def has(self, path: Path) -> bool:
        """True if the text has a key at ``path``."""
        return path in self._lines

    def line(self, path: Path) -> int:
        """Line of the key at ``path``, or of the nearest key around it."""
        while path not in self._lines:
            path = path[:-1]
        return self._lines[path]

    def _add(self, line: int, text: str) -> None:
        problem = Problem(line, text)
        if problem not in self._problems:
            self._problems.append(problem)

    def _add_yaml_error(self, error: yaml.YAMLError, text: str) -> None:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        if isinstance(error, yaml.reader.ReaderError):
            line, what = text.count("\n", 0, error.position) + 1, error.reason
        else:
            line = mark.line + 1 if mark else 1
            what = getattr(error, "problem", None) or str(error)
        self._add(line, f"not valid YAML: {what}")

    def _build(self, loader: _Loader, node: yaml.Node, path: Path) -> Any:
        self._nodes += 1
        if self._nodes > NODES_MAX or len(path) > DEPTH_MAX:
            raise yaml.MarkedYAMLError(
                problem="too many or too deeply nested values", problem_mark=node.start_mark
            )
        if isinstance(node, yaml.MappingNode):
            return self._build_mapping(loader, node, path)
        if isinstance(node, yaml.SequenceNode):
            return self._build_sequence(loader, node, path)
        if node.tag not in _PLAIN_TAGS:
            kind = node.tag.rpartition(":")[2]
            self.problem(path, f"a {kind} is not supported here; quote it to make it text")
            return str(node.value)
        try:
            return loader.construct_object(node)
        except ValueError as error:
            self.problem(path, str(error))
            return None

    def _build_sequence(self, loader: _Loader, node: yaml.SequenceNode, path: Path) -> list[Any]:
        items = []
        for index, item in enumerate(node.value):
            self._lines[(*path, index)] = item.start_mark.line + 1
            items.append(self._build(loader, item, (*path, index)))
        return items

    def _build_mapping(self, loader: _Loader, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        self._report_duplicates(node, path)
        built: dict[str, Any] = {}
        for key_node, value_node in sorted(node.value, key=lambda pair: pair[0].tag != _MERGE_TAG):
            if not isinstance(key_node, yaml.ScalarNode):
                self._add(key_node.start_mark.line + 1, f"{dotted(path)}: keys must be text")
                continue
            if key_node.tag == _MERGE_TAG:
                built.update(self._merged(loader, value_node, path))
                continue
            key = str(key_node.value)
            self._lines[(*path, key)] = key_node.start_mark.line + 1
            built[key] = self._build(loader, value_node, (*path, key))
        return built

    def _merged(self, loader: _Loader, node: yaml.Node, path: Path) -> dict[str, Any]:
        """The keys that ``<<: *other`` or ``<<: [*first, *second]`` brings; the first wins."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for source in reversed(sources):
            if not isinstance(source, yaml.MappingNode):
                raise yaml.MarkedYAMLError(
                    problem="<< takes a mapping or a list of mappings",
                    problem_mark=source.start_mark,
                )
            merged.update(self._build_mapping(loader, source, path))
        return merged

    def _report_duplicates(self, node: yaml.MappingNode, path: Path) -> None:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                self._add(line, f"{dotted((*path, key))}: given twice (first on line {seen[key]})")
            seen.setdefault(key, line)


def read(document: Document, kind: type[T]) -> T | None:
    """The document as a Struct of type ``kind``, or None after reporting what is wrong."""
    data = {} if document.data is None else document.data
    value = _check(document, data, kind, ())
    return None if document.problems() else typing.cast(T, value)


def _check(document: Document, data: Any, kind: Any, path: Path) -> Any:
    """``data`` as ``kind``; reports what is wrong and then returns something unusable."""
    kind, optional = _without_none(kind)
    if data is None and optional:
        return None
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return _check_struct(document, data, kind, path)
    arguments = get_args(kind)
    if get_origin(kind) is list and isinstance(data, list):
        return [
            _check(document, item, arguments[0], (*path, index)) for index, item in enumerate(data)
        ]
    if get_origin(kind) is dict and isinstance(data, dict):
        if get_origin(arguments[0]) is Literal:
            _check_keys(document, data, get_args(arguments[0]), path)
        return {
            key: _check(document, item, arguments[1], (*path, key)) for key, item in data.items()
        }
    return _check_leaf(document, data, kind, path)


def _check_struct(
    document: Document, data: Any, kind: type[msgspec.Struct], path: Path
) -> msgspec.Struct | None:
    if not isinstance(data, dict):
        document.problem(path, f"must be {_TYPE_WORDS['object']} (got {_shown(data)})")
        return None
    hints = typing.get_type_hints(kind, include_extras=True)
    _check_keys(document, data, hints, path)
    values: dict[str, Any] = {}
    complete = True
    for field in msgspec.structs.fields(kind):
        if _is_absent(data, field.name, hints[field.name]):
            if field.required:
                document.problem(path, f"{field.name!r} is missing")
                complete = False
            continue
        values[field.name] = _check(
            document, data[field.name], hints[field.name], (*path, field.name)
        )
    return kind(**values) if complete else None


def _check_keys(
    document: Document, data: dict[str, Any], known: typing.Collection[str], path: Path
) -> None:
    for key in data:
        if key not in known:
            document.problem((*path, key), f"unknown key{suggestion(key, known)}")


def _is_absent(data: dict[str, Any], key: str, kind: Any) -> bool:
    """True for a missing key; an empty section (``limits:`` and nothing) counts as one."""
    return key not in data or (data[key] is None and not _without_none(kind)[1])


def _check_leaf(document: Document, data: Any, kind: Any, path: Path) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        document.problem(path, f"must be finite (got {data})")
        return None
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        wanted, hint = _explained(error, data, kind)
        document.problem(path, f"must be {wanted} (got {_shown(data)}{hint})")
        return None


def _explained(error: msgspec.ValidationError, data: Any, kind: Any) -> tuple[str, str]:
    """msgspec's message in words a person would use, and a hint."""
    base = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if get_origin(base) is Literal:
        choices = [str(choice) for choice in get_args(base)]
        return f"one of {', '.join(choices)}", suggestion(str(data), choices)
    text = str(error).partition(" - at ")[0]
    if "matching regex" in text:
        return _description(kind), ""
    found = re.match(r"Expected `([^`]*)`(.*?)(, got .*)?$", text)
    if found is None:
        return f"something else: {text}", ""
    names = found[1].split(" | ")
    if "float" in names and "int" in names:
        names.remove("int")
    return " or ".join(_TYPE_WORDS[name] for name in names) + found[2], ""


def _description(kind: Any) -> str:
    for extra in get_args(kind)[1:]:
        if isinstance(extra, msgspec.Meta) and extra.description:
            return extra.description
    raise AssertionError(f"a pattern without a description: {kind}")


def _shown(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else text[:57] + "..."


def _without_none(kind: Any) -> tuple[Any, bool]:
    """The type without ``| None``, and whether None was allowed."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, kind is Any
    rest = tuple(part for part in get_args(kind) if part is not type(None))
    return (Union[rest], True) if len(rest) < len(get_args(kind)) else (kind, False)  # noqa: UP007

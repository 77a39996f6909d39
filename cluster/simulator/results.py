"""A file of finished replays, one a line, written as they finish.

The first line says of which scenario they are. A line that was cut off, as by a full disk or
a power cut, is dropped when the file is continued.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO

import msgspec

from cluster.schema import ConfigError
from cluster.simulator.outcome import Outcome
from cluster.simulator.scenario import Scenario

LINE_BYTES_MAX = 64 * 1024 * 1024


class Header(msgspec.Struct, tag="scenario"):
    """Whose results follow. ``digest``: of all in the scenario that decides results."""

    name: str
    digest: str


_LINE = msgspec.json.Decoder(Header | Outcome)


def digest_of(scenario: Scenario) -> str:
    """The same for all scenarios of equal results: what is compared, how often, is not in it."""
    fixed = msgspec.structs.replace(scenario, name="", seeds=0, compare=(), reference="")
    return hashlib.blake2b(msgspec.json.encode(fixed), digest_size=16).hexdigest()


class Results:
    """The open file, and what was in it."""

    def __init__(self, path: Path, scenario: Scenario, *, resume: bool) -> None:
        """ConfigError if ``path`` has another scenario's results, or exists and is not to be
        continued."""
        header = Header(scenario.name, digest_of(scenario))
        self.path = path
        self.found: list[Outcome] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume and path.exists():
            end = self._read(header)
            self._file: IO[bytes] = path.open("r+b")
            self._file.truncate(end)
            self._file.seek(end)
        else:
            try:
                self._file = path.open("xb")
            except FileExistsError:
                raise ConfigError([f"{path} exists; --resume {path} goes on with it"]) from None
            end = 0
        if end == 0:
            self._write(header)

    def append(self, outcome: Outcome) -> None:
        """Write one replay down; it is in the file when this returns."""
        self._write(outcome)
        self.found.append(outcome)

    def close(self) -> None:
        """Nothing more comes."""
        self._file.close()

    def _write(self, line: Header | Outcome) -> None:
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, expected: Header) -> int:
        """Fills ``found``; where the whole lines end."""
        end = 0
        with self.path.open("rb") as file:
            number = 0
            while line := file.readline(LINE_BYTES_MAX):
                if not line.endswith(b"\n"):
                    break
                number += 1
                try:
                    value = _LINE.decode(line)
                except msgspec.DecodeError as error:
                    raise ConfigError([f"{self.path}:{number}: {error}"]) from error
                self._take(number, value, expected)
                end += len(line)
        return end

    def _take(self, number: int, value: Header | Outcome, expected: Header) -> None:
        if number == 1 and (not isinstance(value, Header) or value.digest != expected.digest):
            raise ConfigError(
                [
                    f"{self.path}: results of another scenario, or of this one before it was "
                    "changed; give another file, or leave --resume out"
                ]
            )
        if isinstance(value, Outcome):
            self.found.append(value)

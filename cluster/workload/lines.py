"""Lines of JSON from a file, plain or gzipped, and what is wrong with one of them.

Reads as it goes, so that a trace may be larger than memory, and refuses a line that could
not be one instead of collecting it.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

import msgspec

from cluster.workload.form import WorkloadError

LINE_BYTES_MAX = 16 * 1024 * 1024
GZIP_MAGIC = b"\x1f\x8b"

T = TypeVar("T")


class Line(msgspec.Struct, frozen=True):
    """One line and where it stands."""

    path: Path
    number: int
    data: bytes

    def wrong(self, what: str, field: str = "") -> WorkloadError:
        """The error that says so: ``file:line: field: what``."""
        place = f"{self.path}:{self.number}: "
        return WorkloadError(place + (f"{field}: " if field else "") + what)

    def read(self, decoder: msgspec.json.Decoder[T]) -> T:
        """What the line says, as the decoder's type."""
        try:
            return decoder.decode(self.data)
        except msgspec.ValidationError as error:
            what, _, path = str(error).partition(" - at `")
            raise self.wrong(what, path.rstrip("`").removeprefix("$.")) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self.wrong(f"not JSON: {error}") from error


def lines(path: Path) -> Iterator[Line]:
    """The lines that are not blank."""
    number = 0
    try:
        with path.open("rb") as plain:
            zipped = plain.read(len(GZIP_MAGIC)) == GZIP_MAGIC
            plain.seek(0)
            file = cast(BinaryIO, gzip.GzipFile(fileobj=plain)) if zipped else plain
            while data := file.readline(LINE_BYTES_MAX + 1):
                number += 1
                if len(data) > LINE_BYTES_MAX:
                    raise WorkloadError(f"{path}:{number}: longer than {LINE_BYTES_MAX} bytes")
                if data.strip():
                    yield Line(path, number, data)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise WorkloadError(f"{path}: cannot be read after line {number}: {reason}") from error


def workload_name(path: Path) -> str:
    """The file's name without what says how it is written."""
    return (
        path.name.removesuffix(".gz")
        .removesuffix(".jsonl")
        .removesuffix(".json")
        .removesuffix(".csv")
    )

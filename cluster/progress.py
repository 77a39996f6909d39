"""What a person sees while a cluster starts: a live table, or plain lines in a log.

Shows what it is told and knows nothing of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

REMIND_S = 10.0
READY = "ready"


class Row(msgspec.Struct, frozen=True):
    """One process: what it is doing, and for how many seconds by now."""

    label: str
    phase: str
    seconds: float


class Progress(Protocol):
    """Where a launcher reports to."""

    def show(self, rows: Sequence[Row], elapsed_s: float) -> None:
        """All processes as they are now; called several times a second."""

    def close(self) -> None:
        """Nothing more comes."""


class NoProgress:
    """Shows nothing."""

    def show(self, rows: Sequence[Row], elapsed_s: float) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class PlainProgress:
    """A line when a process changes its phase, and every ``REMIND_S`` while it does not."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._said: dict[str, tuple[str, float]] = {}

    def show(self, rows: Sequence[Row], elapsed_s: float) -> None:
        """Says what is new."""
        for row in rows:
            phase, said_s = self._said.get(row.label, ("", 0.0))
            overdue = row.phase != READY and elapsed_s - said_s >= REMIND_S
            if row.phase != phase or overdue:
                self._said[row.label] = (row.phase, elapsed_s)
                seconds = elapsed_s if row.phase == READY else row.seconds
                self._write(f"{row.label}: {row.phase} ({seconds:.0f} s)")

    def close(self) -> None:
        """All has been written."""


class LiveProgress:
    """A table that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=8, transient=True)
        self._spinner = Spinner("dots")
        self._live.start()

    def show(self, rows: Sequence[Row], elapsed_s: float) -> None:
        """Redraws."""
        table = Table(box=box.SIMPLE_HEAD, show_header=False, show_edge=False, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, justify="right")
        for row in rows:
            style = "green" if row.phase == READY else ""
            seconds = "" if row.phase == READY else f"{row.seconds:.0f} s"
            table.add_row(row.label, Text(row.phase, style=style), seconds)
        self._spinner.update(text=f"starting, {elapsed_s:.0f} s")
        self._live.update(Group(self._spinner, table))

    def close(self) -> None:
        """Takes the table away."""
        self._live.stop()


def progress_for(console: Console) -> Progress:
    """The live table on a terminal, plain lines anywhere else."""
    if console.is_terminal:
        return LiveProgress(console)
    return PlainProgress(lambda line: console.print(line, markup=False, highlight=False))

"""Where commands print tables: a terminal as wide as it is, or a file as wide as tables need."""

from __future__ import annotations

from rich.console import Console

PLAIN_COLUMNS = 140
"""Width of a table in a file or a pipe, which would else be cut to 80."""


def table_console(columns: int = PLAIN_COLUMNS) -> Console:
    """Standard output. ``columns``: its width where that is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=columns)

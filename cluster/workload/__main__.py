"""``python -m cluster.workload``: look at a workload, or write one to a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cluster.terminal import table_console
from cluster.workload.common import write_common
from cluster.workload.describe import described
from cluster.workload.form import WorkloadError, call_count
from cluster.workload.generators import GENERATORS
from cluster.workload.habits import load_habits
from cluster.workload.source import open_workload

REFUSED = 2


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cluster.workload", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    help_text = f"FILE, FORMAT:FILE or generator:NAME, with ?options; or just {list(GENERATORS)}"
    for name, what in (("describe", "print a table"), ("write", "write the common form")):
        command = commands.add_parser(name, help=what)
        command.add_argument("workload", help=help_text)
        if name == "write":
            command.add_argument("output", type=Path, help="gzipped if it ends in .gz")
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except WorkloadError as error:
        print(error, file=sys.stderr)
        return REFUSED
    return 0


def _run(options: argparse.Namespace) -> None:
    spec: str = options.workload
    # A generator's bare name will do here, unless there is a file of that name.
    if spec.partition("?")[0] in GENERATORS and not Path(spec).exists():
        spec = f"generator:{spec}"
    workload = open_workload(spec)
    console = table_console()
    if options.command == "describe":
        console.print(described(workload, load_habits().references))
    else:
        write_common(workload, options.output)
        console.print(f"{options.output}: {len(workload.runs)} runs, {call_count(workload)} calls")


if __name__ == "__main__":
    sys.exit(main())

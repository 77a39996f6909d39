"""Following a Slurm job: its log as it grows, until the job is over."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from cluster.failure import CommandFailure

POLL_S = 1.0
ASK_S = 30.0
READ_BYTES = 1024 * 1024
ASKS_FAILED_MAX = 10
"""Questions in a row that Slurm may leave unanswered; a busy controller does, now and then."""
OVER = frozenset(
    (
        "COMPLETED",
        "FAILED",
        "CANCELLED",
        "TIMEOUT",
        "NODE_FAIL",
        "BOOT_FAIL",
        "OUT_OF_MEMORY",
        "DEADLINE",
        "PREEMPTED",
    )
)
KILLED = 128


def follow(job_id: str, log: Path, write: Callable[[str], None]) -> int:
    """Hands the log on as it grows; returns the job's exit code when it is over.

    CommandFailure if Slurm does not know the job, or does not answer any more. Whoever is
    interrupted leaves the job as it is.
    """
    read = 0
    failed = 0
    while True:
        try:
            state, code = job_state(job_id)
            failed = 0
        except CommandFailure:
            failed += 1
            if failed > ASKS_FAILED_MAX:
                raise
            state, code = "", 0
        # The log is looked at after the question: what was written before the end is in it.
        while text := _more(log, read):
            read += len(text)
            write(text.decode(errors="replace"))
        if state in OVER:
            return code
        time.sleep(POLL_S)


def job_state(job_id: str) -> tuple[str, int]:
    """A job's state, and the exit code as a shell would give it. CommandFailure if unknown."""
    try:
        done = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job_id],
            capture_output=True,
            text=True,
            timeout=ASK_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CommandFailure(f"scontrol: {error}") from error
    if done.returncode:
        raise CommandFailure(f"scontrol refused: {done.stderr.strip()}")
    return parse_state(done.stdout)


def parse_state(line: str) -> tuple[str, int]:
    """``JobState`` and ``ExitCode`` of ``scontrol --oneliner show job``. CommandFailure if there
    is none: 0 for a job that was cut off would say that it went well."""
    fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
    try:
        state = fields["JobState"]
        code, _, number = fields["ExitCode"].partition(":")
        exit_code = int(code) or (KILLED + int(number) if int(number) else 0)
    except (KeyError, ValueError) as error:
        raise CommandFailure(f"scontrol says something unexpected: {line.strip()[:200]}") from error
    return state, exit_code or int(state in OVER and state != "COMPLETED")


def _more(log: Path, read: int) -> bytes:
    try:
        with log.open("rb") as file:
            file.seek(read)
            return file.read(READ_BYTES)
    except FileNotFoundError:
        return b""

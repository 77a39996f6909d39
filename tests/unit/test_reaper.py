"""Nothing that a protected process started outlives it, and the helper does not either."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.process import ProcessIdentity, identify, is_running

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 10.0

# Children of every kind: executed, a grandchild, forked (they share open files), forked by
# a forked one, and one that has left for a session of its own with its inherited files.
PROGRAM = """
import os, subprocess, sys, time
from cluster import reaper

def note(what):
    os.write(1, f"{what}\\n".encode())

group = reaper.protect_group()
assert group == os.getpgrp() == os.getpid()
note(os.getpid())
sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
note(subprocess.Popen(sleeper).pid)
nested = "import os, subprocess, sys, time\\n" + (
    "os.write(1, b'%d\\\\n' % subprocess.Popen({0}).pid)\\n"
    "time.sleep(60)"
)
note(subprocess.Popen([sys.executable, "-c", nested.format(sleeper)]).pid)
if (child := os.fork()) == 0:
    # The number of the closed pipe is free here: whatever takes it must stay open in the next.
    taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(16)]
    if (grandchild := os.fork()) == 0:
        for number in taken:
            os.fstat(number)
        note("files kept")
        time.sleep(60)
    note(grandchild)
    time.sleep(60)
note(child)
note("ready")
{end}
"""


def start(end: str) -> tuple[subprocess.Popen[str], list[ProcessIdentity], list[ProcessIdentity]]:
    """The process; itself and all that it started; its helper."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace("{end}", end)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    while len(lines) < 8:
        line = process.stdout.readline().strip()
        assert line, f"it ended after {lines}"
        lines.append(line)
    assert {"ready", "files kept"} <= set(lines)
    found = [identify(int(line)) for line in lines if line.isdigit()]
    family = [identity for identity in found if identity is not None]
    assert len(family) == 6
    return process, family, helpers_of(process.pid)


def helpers_of(pid: int) -> list[ProcessIdentity]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if any(word.endswith(b"reaper.py") for word in words) and str(pid).encode() in words:
                identity = identify(int(entry.name))
                assert identity is not None
                found.append(identity)
    return found


def assert_gone(identities: list[ProcessIdentity]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while running := [identity for identity in identities if is_running(identity)]:
        assert time.monotonic() < deadline_s, f"still there: {running}"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_takes_all_with_it(number: signal.Signals) -> None:
    process, family, helpers = start("time.sleep(60)")
    assert len(helpers) == 1
    time.sleep(0.1)
    assert all(is_running(identity) for identity in [*family, *helpers])
    process.send_signal(number)
    assert process.wait(WAIT_S) == -number
    assert_gone([*family, *helpers])


def test_a_process_that_ends_by_itself_takes_all_with_it() -> None:
    process, family, helpers = start("sys.stdin.read()")
    assert len(helpers) == 1
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(WAIT_S) == 0
    assert_gone([*family, *helpers])


def test_the_helper_can_not_be_ended_by_the_signals_that_end_the_others() -> None:
    process, family, helpers = start("time.sleep(60)")
    (helper,) = helpers
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(helper.pid, number)
    time.sleep(0.2)
    assert is_running(helper)
    process.kill()
    process.wait(WAIT_S)
    assert_gone([*family, *helpers])


def test_a_process_without_children_ends_and_so_does_its_helper() -> None:
    program = "import os; from cluster import reaper; reaper.protect_group(); print(os.getpid())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S
    )
    assert done.returncode == 0, done.stderr
    deadline_s = time.monotonic() + WAIT_S
    while helpers_of(int(done.stdout)):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)

"""Following a Slurm job, as far as it can be told without one; tests/deploy has the real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import slurm_wait
from cluster.failure import CommandFailure


@pytest.mark.parametrize(
    ("state", "code", "exit_code"),
    [
        ("COMPLETED", "0:0", 0),
        ("FAILED", "7:0", 7),
        ("CANCELLED", "0:15", 143),
        ("TIMEOUT", "0:0", 1),
        ("RUNNING", "0:0", 0),
    ],
)
def test_exit_codes_are_as_a_shell_gives_them(state: str, code: str, exit_code: int) -> None:
    line = f"JobId=3 JobName=x JobState={state} Reason=None ExitCode={code} Comment=a=b"
    assert slurm_wait.parse_state(line) == (state, exit_code)


@pytest.mark.parametrize("line", ["", "JobId=3", "JobState=FAILED ExitCode=x:0"])
def test_what_is_no_job_is_refused(line: str) -> None:
    with pytest.raises(CommandFailure, match="unexpected"):
        slurm_wait.parse_state(line)


def test_the_log_is_handed_on_as_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scontrol that says RUNNING twice, and writes to the log each time."""
    log = tmp_path / "3.log"
    program = tmp_path / "scontrol"
    program.write_text(
        "#!/bin/sh\n"
        f'echo x >> "{tmp_path}/asked"; echo "line" >> "{log}"\n'
        f'[ "$(wc -l < "{tmp_path}/asked")" -lt 3 ] && state=RUNNING || state=FAILED\n'
        'echo "JobState=$state ExitCode=5:0"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm_wait, "POLL_S", 0.01)
    said: list[str] = []
    assert slurm_wait.follow("3", log, said.append) == 5
    assert said == ["line\n"] * 3


def test_a_slurm_that_does_not_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(slurm_wait, "POLL_S", 0.0)
    with pytest.raises(CommandFailure, match="scontrol"):
        slurm_wait.follow("3", tmp_path / "3.log", lambda text: None)

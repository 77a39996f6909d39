"""Requests drawn from windows of production traffic."""

from __future__ import annotations

import gzip
from pathlib import Path
from statistics import fmean

import pytest

from cluster.workload.form import WorkloadError
from cluster.workload.servegen import WINDOW_S
from cluster.workload.source import detected, open_workload

HEADER = "model,t_s,req_per_s,mean_in,mean_out,clients\n"
BUSY = "chat,1200,8.0,900.0,40.0,30\n"
IDLE = "chat,1800,0,900.0,40.0,0\n"
SLOW = "chat,3000,2.0,100.0,400.0,7\n"
OTHER = "reason,0,1.0,500.0,3000.0,5\n"


def written(folder: Path, *windows: str, header: str = HEADER) -> Path:
    path = folder / "windows.csv"
    path.write_text(header + "".join(windows))
    return path


def test_requests_come_at_each_windows_rate_with_its_lengths(tmp_path: Path) -> None:
    # The order of the lines is nobody's concern; where there is no window nothing comes.
    found = open_workload(f"{written(tmp_path, SLOW, BUSY, IDLE, OTHER)}?model=chat")
    assert found.name == "windows-chat"
    assert found.arrivals_known
    times_s = [run.arrival_s for run in found.runs]
    assert times_s == sorted(times_s)
    busy = [run.calls[0] for run in found.runs if run.arrival_s < WINDOW_S]
    slow = [run.calls[0] for run in found.runs if run.arrival_s >= 1800.0]
    assert len(busy) + len(slow) == len(found.runs)
    assert max(times_s) < 2400.0
    assert len(busy) == pytest.approx(4800, rel=0.06)
    assert len(slow) == pytest.approx(1200, rel=0.12)
    assert fmean(call.prompt_tokens for call in busy) == pytest.approx(900, rel=0.1)
    assert fmean(call.output_tokens for call in busy) == pytest.approx(40, rel=0.1)
    assert fmean(call.prompt_tokens for call in slow) == pytest.approx(100, rel=0.15)
    assert fmean(call.output_tokens for call in slow) == pytest.approx(400, rel=0.15)


def test_every_request_is_alone(tmp_path: Path) -> None:
    found = open_workload(f"{written(tmp_path, BUSY)}?share=0.05")
    assert {len(run.calls) for run in found.runs} == {1}
    assert len({run.scope for run in found.runs}) == len(found.runs) > 100


def test_windows_and_a_share_are_chosen(tmp_path: Path) -> None:
    path = written(tmp_path, BUSY, IDLE, SLOW)
    first = open_workload(f"servegen:{path}?windows=1&share=0.25")
    assert len(first.runs) == pytest.approx(1200, rel=0.12)
    last = open_workload(f"{path}?first=2")
    assert max(run.arrival_s for run in last.runs) < WINDOW_S
    faster = open_workload(f"{path}?first=2&speed=10")
    assert [run.arrival_s for run in faster.runs] == pytest.approx(
        [run.arrival_s / 10 for run in last.runs]
    )


def test_the_seed_is_all_the_chance_there_is(tmp_path: Path) -> None:
    path = written(tmp_path, BUSY)
    assert open_workload(f"{path}?seed=1") == open_workload(f"{path}?seed=1")
    assert open_workload(f"{path}?seed=1") != open_workload(f"{path}?seed=2")


def test_a_zipped_file_is_known_by_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "windows.csv.gz"
    path.write_bytes(gzip.compress((HEADER + BUSY).encode()))
    assert detected(path) == "servegen"
    assert open_workload(f"{path}?share=0.1").name == "windows-chat"


@pytest.mark.parametrize(
    ("windows", "options", "message"),
    [
        ((BUSY, OTHER), "", r"windows.csv: say which model \(model=\); there are: chat, reason"),
        ((BUSY, OTHER), "?model=reson", r"no model 'reson', did you mean 'reason'\?; there are"),
        ((BUSY,), "?first=1", r"chat has 1 windows, none from 1"),
        ((BUSY, "chat,0,many,1,1,1\n"), "", r"windows.csv:3: req_per_s: 'many' is no number"),
        ((BUSY, "chat,0,nan,1,1,1\n"), "", r"windows.csv:3: req_per_s: nan is not from 0"),
        ((BUSY, "chat,0,-1,1,1,1\n"), "", r"windows.csv:3: req_per_s: -1 is not from 0"),
        ((BUSY, "chat,0,1\n"), "", r"windows.csv:3: 3 values, 6 were expected"),
        (("chat,0,9000,1,1,1\n",), "", r"about 5,400,000 requests in 1 windows, more than 1,000"),
        ((BUSY,), "?windws=1", r"no option 'windws', did you mean 'windows'\?"),
        ((BUSY,), "?share=2", r"share: Expected `float` <= 1"),
    ],
)
def test_what_can_not_be_drawn_from(
    tmp_path: Path, windows: tuple[str, ...], options: str, message: str
) -> None:
    with pytest.raises(WorkloadError, match=message):
        open_workload(f"{written(tmp_path, *windows)}{options}")


def test_a_file_that_is_said_to_be_one_and_is_not(tmp_path: Path) -> None:
    path = written(tmp_path, header="model,t\n")
    with pytest.raises(WorkloadError, match=r"windows.csv:1: model,t_s,req_per_s,.* was expected"):
        open_workload(f"servegen:{path}")

"""What surrounds an engine in its worker: statistics that do not stand in the way of tokens."""

from __future__ import annotations

import asyncio
from typing import Any

from cluster import engine as subject
from cluster.engine import LaterLoggers


class Loggers:
    """Notes what it is told to record and to log."""

    def __init__(self) -> None:
        self.recorded: list[Any] = []
        self.logged = 0

    def record(self, engine_idx: int, scheduler_stats: Any) -> None:
        self.recorded.append((engine_idx, scheduler_stats))

    def log(self) -> None:
        self.logged += 1


async def test_statistics_are_recorded_later_all_and_in_order() -> None:
    loggers = Loggers()
    later = LaterLoggers(loggers)
    for burst in range(3):
        for step in range(5):
            later.record(engine_idx=burst, scheduler_stats=step)
        assert len(loggers.recorded) == 5 * burst, "not while the step is passed on"
        await asyncio.sleep(5 * subject.RECORD_DELAY_S)
    assert loggers.recorded == [(burst, step) for burst in range(3) for step in range(5)]
    later.log()
    assert loggers.logged == 1


async def test_no_more_than_a_bounded_number_waits() -> None:
    loggers = Loggers()
    later = LaterLoggers(loggers)
    count = 3 * subject.RECORDS_WAITING_MAX + 1
    for step in range(count):
        later.record(engine_idx=0, scheduler_stats=step)
        assert step + 1 - len(loggers.recorded) < subject.RECORDS_WAITING_MAX
    await asyncio.sleep(5 * subject.RECORD_DELAY_S)
    assert [step for _, step in loggers.recorded] == list(range(count))

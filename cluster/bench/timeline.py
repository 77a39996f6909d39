"""When the calls of a workload start and end on a cluster that is never full.

Closed-loop, as ``cluster.workload.replay`` has it, in virtual time: a call takes as long as
its uncached prompt and its answer do at fixed rates. What is predicted of such a timeline is
judged without a cluster's queues in it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import NamedTuple

from cluster.workload.common import ASSUMED_TOKENS_PER_S
from cluster.workload.form import Call, Run, Workload
from cluster.workload.measure import cached
from cluster.workload.replay import Replay

PREFILL_TOKENS_PER_S = 10_000.0
OVERHEAD_S = 0.05


class Event(NamedTuple):
    """A call started or, if ``ends``, ended. ``uncached_tokens`` of its prompt were computed."""

    at_s: float
    ends: bool
    run: Run
    call: Call
    uncached_tokens: int

    @property
    def call_id(self) -> str:
        """Unique in the workload."""
        return f"{self.run.id}#{self.call.index}"


def timeline(workload: Workload) -> Iterator[Event]:
    """All events in order; ends before starts of the same time."""
    uncached = {
        (entry.run.id, entry.call.index): entry.uncached_tokens for entry in cached(workload)
    }
    replay = Replay(workload)
    running: list[tuple[float, int, int]] = []
    while replay.calls_left:
        due_s = replay.next_s
        if running and (due_s is None or running[0][0] <= due_s):
            at_s, position, index = heapq.heappop(running)
            run = workload.runs[position]
            yield Event(at_s, True, run, run.calls[index], uncached[run.id, index])
            replay.ended(position, index, at_s)
            continue
        assert due_s is not None, "calls are left, so one of them runs or is due"
        for due in replay.due(due_s):
            run = workload.runs[due.run]
            call = run.calls[due.call]
            tokens = uncached[run.id, call.index]
            yield Event(due.at_s, False, run, call, tokens)
            heapq.heappush(running, (due.at_s + call_s(call, tokens), due.run, due.call))


def call_s(call: Call, uncached_tokens: int) -> float:
    """How long a call takes."""
    prefill_s = uncached_tokens / PREFILL_TOKENS_PER_S
    return OVERHEAD_S + prefill_s + call.output_tokens / ASSUMED_TOKENS_PER_S

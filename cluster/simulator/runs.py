"""Records of runs, made from those of their calls."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from cluster.simulator.recorder import think_path_s
from cluster.simulator.records import CallRecord, RunRecord
from cluster.workload.form import Workload


def run_records(
    workload: Workload,
    calls: Iterable[CallRecord],
    began_s: Mapping[int, float],
    failed: Collection[int],
) -> list[RunRecord]:
    """One for each run of which a call was sent. ``began_s``: the replay's; ``failed``: runs
    that were given up."""
    found: dict[int, list[CallRecord]] = {}
    for record in calls:
        found.setdefault(record.run, []).append(record)
    return [
        RunRecord(
            run=position,
            id=workload.runs[position].id,
            workflow=workload.runs[position].workflow,
            arrival_s=began_s[position],
            ended_s=max(record.ended_s for record in records),
            calls=len(records),
            think_s=think_path_s(workload.runs[position]),
            finished=position not in failed,
        )
        for position, records in sorted(found.items())
    ]

"""The common form of all workloads: runs of calls, with what the calls' prompts share.

Times are seconds. Only a run's arrival is absolute; within a run a call becomes due
``think_s`` after the last of its parents ended, because agents wait for answers. Nothing
here holds text: a prompt is its length and the ids of its full blocks.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from cluster.workload.spans import Spans
from coordinator.protocol import CallContext
from coordinator.tenant import tenant_of

BLOCK_TOKENS = 64
"""Block size of workloads whose source has none."""


class WorkloadError(Exception):
    """A workload cannot be had: the text says which file, line and field, or which option."""


class Call(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One LLM call of a run.

    ``agent`` is the instance that speaks, ``kind`` its type or role, ``stage`` its model class
    or phase; each may be empty. ``parents``: indexes of calls of the run that must end first,
    several make a join, none a call that waits for the run's arrival only.

    ``blocks``: ids of the prompt's full blocks. ``continued``: ids of the blocks that follow
    them in the prompt of the call that extends this one, up to the block in which this
    call's output ends: what its decoding leaves in the cache for that call. Empty if nobody
    extends it. ``group``: of the run's calls those that are one request with several answers
    have the same one.
    """

    index: int
    parents: tuple[int, ...]
    think_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: Spans
    agent: str = ""
    kind: str = ""
    stage: str = ""
    continued: Spans = ()
    final: bool = False
    group: str = ""


class Run(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One execution of a workflow: its calls in order, parents before children.

    ``scope``: within it equal block ids mean equal prefixes. It is the run's own for ids that
    are its own (session scope), and the same for all runs whose ids are comparable (global).
    ``tenant``: whose it is, as the salt of its requests; empty if all are of one.
    """

    id: str
    workflow: str
    arrival_s: float
    scope: str
    calls: tuple[Call, ...]
    tenant: str = ""


class Workload(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Runs, and where they come from.

    ``arrivals_known``: the runs' ``arrival_s`` are meant, not just zero for lack of a clock.
    ``concurrency``: if not 0, arrivals do not count and that many runs are kept going.
    ``dropped_runs``: how many runs of the source a limit took away.
    """

    name: str
    source: str
    licence: str
    block_tokens: int
    runs: tuple[Run, ...]
    arrivals_known: bool = False
    concurrency: int = 0
    dropped_runs: int = 0


def session_scope(workload: str, run: str) -> str:
    """The scope of a run whose block ids mean something in this run only."""
    return f"{workload}/{run}"


def call_count(workload: Workload) -> int:
    """How many calls there are in all runs."""
    return sum(len(run.calls) for run in workload.runs)


def context_of(run: Run, call: Call) -> CallContext:
    """Who speaks, as a client would say it: agents by kind, the last parent's as parent. Of a
    run without a workflow only whose it is is said."""
    if not run.workflow:
        return CallContext(tenant=tenant_of(run.tenant))
    parent = run.calls[call.parents[-1]] if call.parents else None
    return CallContext(
        workflow=run.workflow,
        run=run.id,
        agent=call.kind or call.agent,
        parent=(parent.kind or parent.agent) if parent else "",
        final=call.final,
        tenant=tenant_of(run.tenant),
    )


def leaves(calls: Iterable[Call]) -> list[int]:
    """Indexes of the calls that nobody waits for."""
    calls = tuple(calls)
    awaited = {parent for call in calls for parent in call.parents}
    return [call.index for call in calls if call.index not in awaited]

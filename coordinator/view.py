"""What policies may see of the core's state, and what people may see of it.

Policies get read-only protocols over the live objects, not copies: copying 64 workers
for every call would cost more than the decision itself. Their type checker keeps them
from writing. ``worker_status``, ``link_status``, ``call_status`` and ``run_status`` make the frozen
rows of a snapshot.
"""

from __future__ import annotations

from collections.abc import Mapping, Set, Sized
from typing import Protocol

from coordinator.gauge import Gauge
from coordinator.protocol import (
    CallStatus,
    Finished,
    LinkLoad,
    LinkStatus,
    Load,
    Role,
    RunStatus,
    WorkerStatus,
)
from coordinator.state import Call, Pair, PairPhase, Worker
from coordinator.workflow.roster import Run


class WorkerView(Protocol):
    """A registered worker, as placement sees it. KV in blocks."""

    @property
    def name(self) -> str: ...
    @property
    def incarnation(self) -> str: ...
    @property
    def role(self) -> Role: ...
    @property
    def started_role(self) -> Role: ...
    @property
    def turned_s(self) -> float: ...
    @property
    def up(self) -> bool: ...
    @property
    def ending(self) -> bool: ...
    @property
    def tokens_max(self) -> int: ...
    @property
    def batch_slots(self) -> int: ...
    @property
    def usable_blocks(self) -> int: ...
    @property
    def kv_blocks_reserved(self) -> int: ...
    @property
    def kv_blocks_shared(self) -> int: ...
    @property
    def kv_blocks_used(self) -> int: ...
    @property
    def load(self) -> Load: ...
    @property
    def waiting(self) -> int: ...
    @property
    def decodes(self) -> Sized: ...
    @property
    def prefilling(self) -> int: ...
    @property
    def prefill_tokens(self) -> int: ...
    @property
    def gauge(self) -> Gauge: ...
    @property
    def kv_bytes_per_block(self) -> int: ...
    @property
    def warm_sources(self) -> Set[str]: ...
    @property
    def partial_reads(self) -> bool: ...
    @property
    def readable_from_s(self) -> float: ...
    def link(self, source: str) -> LinkLoad | None: ...


def worker_status(worker: Worker, peers: int, now_s: float) -> WorkerStatus:
    """One row about a worker; ``warm_peers`` counts those whose KV it has pulled."""
    return WorkerStatus(
        worker=worker.name,
        incarnation=worker.incarnation,
        role=worker.role,
        state=worker.phase.value,
        host=worker.ready.host,
        devices=worker.ready.devices,
        load=worker.load,
        kv_blocks=worker.facts.kv_blocks,
        block_size=worker.facts.block_size,
        calls=len({*worker.decodes, *worker.prefills, *worker.pulls}),
        kv_blocks_reserved=worker.kv_blocks_reserved,
        last_beat_age_s=max(0.0, now_s - worker.last_heard_s),
        warm_peers=len(worker.warm_sources),
        peers=peers,
        handles=len(worker.prefills) - worker.prefilling + len(worker.pulls),
        data_address=worker.ready.data_address,
        side_channel=worker.ready.side_channel,
        turning=worker.turning.value if worker.turning is not None else "",
    )


def link_status(pair: Pair, said: Mapping[str, LinkLoad]) -> LinkStatus:
    """One row about a pair, of whose sources its target has ``said`` so much.

    What was read before these two incarnations met is not theirs.
    """
    name = pair.source.name
    load = said.get(name) if pair.phase is PairPhase.WARM else None
    load = load or LinkLoad(name)
    return LinkStatus(
        source=name,
        target=pair.target.name,
        state=pair.phase.value,
        transfers=load.transfers,
        bytes_total=load.bytes_total,
        elapsed_s=load.elapsed_s,
        in_flight_bytes=load.in_flight_bytes,
        bytes_per_s=load.bytes_per_s,
        fixed_s=load.fixed_s,
    )


def call_status(
    call: Call, now_s: float, finished: Finished | None = None, reason: str = ""
) -> CallStatus:
    """One row about a live call, or about one that just ended (``finished``, ``reason``)."""
    plan = call.plan
    row = CallStatus(
        request=call.request,
        phase=call.phase.value,
        attempt=call.attempt,
        context=call.submit.context,
        prefill=plan.prefill.worker if plan and plan.prefill else "",
        decode=plan.decode.worker if plan else "",
        prompt_tokens=call.submit.prompt_tokens,
        output_tokens=finished.output_tokens if finished else call.generated_tokens,
        prefill_cached_tokens=finished.prefill_cached_tokens if finished else 0,
        local_cached_tokens=finished.local_cached_tokens if finished else 0,
        moved_tokens=finished.moved_tokens if finished else 0,
        ttft_s=finished.ttft_s if finished else 0.0,
        elapsed_s=finished.elapsed_s if finished else max(0.0, now_s - call.submitted_s),
        outcome=finished.outcome if finished else "",
        reason=reason or (plan.reason if plan else ""),
        pull=plan.pull_worker.worker if plan and plan.pull_worker else "",
        pulled_tokens=finished.pulled_tokens if finished else 0,
    )
    return row


def run_status(run: Run, now_s: float) -> RunStatus:
    """One row about a live run of a workflow."""
    tenant, workflow, name = run.key
    return RunStatus(
        tenant=tenant,
        workflow=workflow,
        run=name,
        calls=run.calls,
        open_calls=len(run.open),
        elapsed_s=max(0.0, now_s - run.started_s),
        silent_s=0.0 if run.open else max(0.0, now_s - run.heard_s),
        explicit=run.explicit,
        deadline_s=None if run.deadline_s is None else run.deadline_s - now_s,
        priority=run.priority,
    )

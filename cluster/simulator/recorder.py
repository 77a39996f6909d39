"""What a simulation leaves behind, collected while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cluster.simulator.events import Events
from cluster.simulator.records import CallRecord, Gaps, RunRecord, Sample
from cluster.simulator.worker import Worker
from cluster.workload.form import Run, Workload
from cluster.workload.spans import SeenBlocks
from coordinator.protocol import Role

SAMPLES_MAX = 20_000
SAMPLE_S = 1.0

RoleOf = Callable[[Worker], Role]


class Recorder:
    """Records of one simulation. Times are the clock's until ``shift``, but for arrivals."""

    def __init__(self, workload: Workload) -> None:
        self.calls: list[CallRecord] = []
        self.runs: list[RunRecord] = [
            RunRecord(index, run.id, run.workflow, run.arrival_s, calls=len(run.calls))
            for index, run in enumerate(workload.runs)
        ]
        for record, run in zip(self.runs, workload.runs, strict=True):
            record.think_s = think_path_s(run)
        self.gaps = Gaps()
        self.samples: list[Sample] = []
        self.recomputed_tokens = 0
        self.sample_s = SAMPLE_S
        self._workload = workload
        self._open: dict[str, CallRecord] = {}
        self._seen: dict[int, SeenBlocks] = {}
        self._new_tokens: dict[str, int] = {}

    # --- calls ---------------------------------------------------------------------------

    def opened(self, request: str, record: CallRecord) -> None:
        """A call is sent."""
        call = self._workload.runs[record.run].calls[record.call]
        seen = self._seen.setdefault(record.run, SeenBlocks())
        shared = seen.leading(call.blocks) * self._workload.block_tokens
        self._open[request] = record
        self._new_tokens[request] = max(0, record.prompt_tokens - shared)

    def computed(self, engine_id: str, tokens: int) -> None:
        """An engine has computed so many tokens of a call's text that it lacked."""
        record = self._open.get(engine_id.rpartition("~")[0])
        if record is not None:
            record.computed_tokens += tokens

    def ended(self, request: str) -> None:
        """A call has ended; its record says how."""
        record = self._open.pop(request)
        new_tokens = self._new_tokens.pop(request)
        self.recomputed_tokens += max(0, record.computed_tokens - new_tokens)
        call = self._workload.runs[record.run].calls[record.call]
        seen = self._seen.get(record.run)
        if seen is not None:
            seen.add(call.blocks + call.continued)

    def run_began(self, run: int, arrival_s: float) -> None:
        """A run's first calls are due, counted from ``arrival_s`` of the replay: in a closed
        loop that is not what the workload says."""
        self.runs[run].arrival_s = arrival_s

    def run_ended(self, run: int, at_s: float, finished: bool) -> None:
        """Nothing more comes of a run."""
        record = self.runs[run]
        record.ended_s, record.finished = at_s, finished
        self._seen.pop(run, None)

    def gap(self, gap_s: float) -> None:
        """A pause between two tokens that no engine knows of."""
        self.gaps.add(gap_s)

    # --- workers -------------------------------------------------------------------------

    def sample(self, workers: Iterable[Worker], role: RoleOf, now_s: float) -> None:
        """Look at all workers. Beyond the bound every second moment is forgotten, and they
        are looked at half as often from then on."""
        for worker in workers:
            load = worker.engine.load(now_s)
            self.samples.append(
                Sample(
                    at_s=now_s,
                    worker=worker.name,
                    role=role(worker),
                    running=load.running,
                    waiting=load.waiting,
                    kv_used=load.kv_blocks_used / worker.facts.kv_blocks,
                    prefill_tokens=worker.pending_tokens,
                )
            )
        if len(self.samples) > SAMPLES_MAX:
            moments = sorted({sample.at_s for sample in self.samples})
            kept = set(moments[::2])
            self.samples = [sample for sample in self.samples if sample.at_s in kept]
            self.sample_s *= 2

    def keep_sampling(
        self, events: Events, workers: Callable[[], Iterable[Worker]], role: RoleOf
    ) -> None:
        """Look at all workers now and every ``sample_s``."""
        self.sample(workers(), role, events.now_s)
        events.after(self.sample_s, self.keep_sampling, events, workers, role)

    # --- the end -------------------------------------------------------------------------

    def shift(self, began_s: float) -> None:
        """Count all times from the beginning of the replay."""
        for call in self.calls:
            call.due_s -= began_s
            for name in ("planned_s", "first_token_s", "loaded_s", "ended_s"):
                if at_s := getattr(call, name):
                    setattr(call, name, at_s - began_s)
        for run in self.runs:
            if run.ended_s:
                run.ended_s -= began_s
        self.samples = [
            Sample(
                sample.at_s - began_s,
                sample.worker,
                sample.role,
                sample.running,
                sample.waiting,
                sample.kv_used,
                sample.prefill_tokens,
            )
            for sample in self.samples
        ]


def think_path_s(run: Run) -> float:
    """The longest path of pauses through a run, if all calls took no time."""
    ends_s: list[float] = []
    for call in run.calls:
        begins_s = max((ends_s[parent] for parent in call.parents), default=0.0)
        ends_s.append(begins_s + call.think_s)
    return max(ends_s, default=0.0)

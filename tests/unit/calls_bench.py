"""A ``Calls`` to try, with everything around it in the test's hands."""

from __future__ import annotations

from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.metrics.stats import PrefillStats

from coordinator.api.calls import Calls
from coordinator.api.exchange import CallRecord
from coordinator.limits import Limits
from coordinator.protocol import CallContext, Placed
from tests.unit.recording_wire import (
    DECODER,
    PREFILLER,
    RecordingWire,
    engine_request,
    output,
    plan,
    prefill_done,
)

UNIX_S = 1000.0


class Bench:
    """A ``Calls`` on a recording wire, with a clock that is set by hand."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.wire = RecordingWire()
        self.calls = Calls("api", self.wire, limits or Limits())
        self.calls.on_welcome("core-1", 4)
        self.now_s = 100.0

    def submit(self, request: str = "r", group: str = "", **params: object) -> CallRecord:
        record = CallRecord(request)
        self.calls.submit(
            engine_request(request, **params), record, CallContext(run="run"), group, self.now_s
        )
        return record

    def plan(self, *arguments: object, **options: object) -> None:
        self.calls.on_plan(plan(*arguments, **options), self.now_s)  # type: ignore[arg-type]

    def prefilled(
        self,
        worker: Placed = PREFILLER,
        unix_s: float = UNIX_S,
        first: EngineCoreOutput | None = None,
        **options: object,
    ) -> None:
        done = prefill_done(worker=worker, **options)  # type: ignore[arg-type]
        self.calls.on_prefill_done(done, first, worker, self.now_s, unix_s)

    def tokens(
        self,
        tokens: list[int],
        finish: FinishReason | None = None,
        worker: Placed = DECODER,
        attempt: int = 1,
        request: str = "r",
        stats: PrefillStats | None = None,
    ) -> None:
        self.calls.on_outputs(
            [output(request, attempt, tokens, finish, stats)], worker, 0.0, self.now_s
        )

    def lose(self, worker: Placed) -> None:
        self.calls.on_worker_gone(worker, "test", self.now_s)

    def forget(self) -> None:
        """What was sent until now does not matter."""
        self.wire.take_core()
        self.wire.take_workers()

"""The clients of a simulated cluster: they replay a workload, closed-loop.

A call is sent its think time after its parents ended. One that is refused for now is sent
again when the server says, a few times; then, and after any other error, its run is given
up, as by a client that got an error. Clients name no limit of their output beyond the model's
context, unless they are ``limited``: then, as load generators do, just what they will get.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from cluster.simulator.api import NO_ANSWER, Api
from cluster.simulator.call import RETRIES_MAX, request_id
from cluster.simulator.events import Event, Events
from cluster.simulator.recorder import Recorder
from cluster.simulator.records import CallRecord
from cluster.workload.chains import Chains
from cluster.workload.form import Call, Run, Workload, call_count, context_of
from cluster.workload.replay import Due, Replay
from coordinator.protocol import BLOCK_HASH_BYTES

RETRY_S_MIN = 0.5
"""A client's pause before it tries again where the server names none (openai-python's)."""
RETRIED = frozenset({NO_ANSWER, 429, 500, 502, 503, 504})
ABORT_S_MAX = 4.0
PROGRESS_CALLS = 100

Progress = Callable[[int, int, float], None]
"""Is told calls that are over, all calls, and the virtual time."""


class Open:
    """A call that was sent."""

    __slots__ = ("record", "request", "retries")

    def __init__(self, record: CallRecord) -> None:
        self.record = record
        self.retries = 0
        self.request = ""


class Clients:
    """All clients. ``api_s`` and ``api_token_s``: what an API process takes before it submits a
    call, and for each token of its prompt; ``tokens_max``: the model's context; ``aborted``:
    share of calls that are given up."""

    def __init__(
        self,
        events: Events,
        workload: Workload,
        recorder: Recorder,
        rng: random.Random,
        *,
        block_size: int,
        tokens_max: int,
        api_s: float,
        api_token_s: float = 0.0,
        aborted: float = 0.0,
        aborts_until_s: float = 0.0,
        limited: bool = False,
        finished: Callable[[], None] = lambda: None,
        progress: Progress | None = None,
    ) -> None:
        self.began_s = 0.0
        self._events = events
        self._workload = workload
        self._recorder = recorder
        self._rng = rng
        self._block_size = block_size
        self._tokens_max = tokens_max
        self._api_s = api_s
        self._api_token_s = api_token_s
        self._aborted = aborted
        self._aborts_until_s = aborts_until_s
        self._limited = limited
        self._finished = finished
        self._progress = progress
        self._chains = Chains(workload.block_tokens, block_size)
        self._replay = Replay(workload)
        self._calls_total = call_count(workload)
        self._told_calls = 0
        self._calls_left = [len(run.calls) for run in workload.runs]
        self._failed_runs: set[int] = set()
        self._open: dict[tuple[int, int], Open] = {}
        self._apis: Sequence[Api | None] = ()
        self._wake: Event | None = None
        self._wake_s = float("inf")

    def start(self, apis: Sequence[Api | None]) -> None:
        """The replay begins now. ``apis``: None where one is gone, until there is another."""
        self._apis = apis
        self.began_s = self._events.now_s
        self._look()

    @property
    def done(self) -> bool:
        """Whether no call is open and none will come."""
        return not self._replay.calls_left and not self._open

    # --- sending -------------------------------------------------------------------------

    def _look(self) -> None:
        """Be woken when the next call is due."""
        next_s = self._replay.next_s
        at_s = float("inf") if next_s is None else next_s
        if at_s != self._wake_s:
            self._events.cancel(self._wake)
            self._wake, self._wake_s = None, at_s
            if next_s is not None:
                self._wake = self._events.at(self.began_s + next_s, self._woken, next_s)

    def _woken(self, next_s: float) -> None:
        self._wake, self._wake_s = None, float("inf")
        for due in self._replay.due(max(next_s, self._events.now_s - self.began_s)):
            self._send(due)
        self._look()

    def _send(self, due: Due) -> None:
        run = self._workload.runs[due.run]
        call = run.calls[due.call]
        record = CallRecord(
            due.run,
            due.call,
            self._events.now_s,
            agent=call.kind or call.agent,
            prompt_tokens=call.prompt_tokens,
        )
        self._recorder.calls.append(record)
        self._recorder.run_began(due.run, self._replay.began_s[due.run])
        open_call = Open(record)
        self._open[due.run, due.call] = open_call
        if call.prompt_tokens >= self._tokens_max:
            # vLLM's front half refuses it before anybody is asked for a plan.
            record.outcome, record.status, record.ended_s = "rejected", 400, self._events.now_s
            self._over(open_call)
            return
        rendered_s = self._api_s + self._api_token_s * record.prompt_tokens
        self._events.after(rendered_s, self._submit, open_call)

    def _submit(self, open_call: Open) -> None:
        record = open_call.record
        api = self._apis[record.run % len(self._apis)]
        if api is None:
            # Nobody listens there: as any client it tries again.
            self._events.after(RETRY_S_MIN, self._submit, open_call)
            return
        run = self._workload.runs[record.run]
        call = run.calls[record.call]
        limit = self._tokens_max - call.prompt_tokens
        wanted = max(1, call.output_tokens)
        record.output_tokens = min(wanted, limit)
        if self._limited:
            limit = record.output_tokens
        open_call.request = request_id(record.run, record.call, open_call.retries)
        chain, hashes = self._hashes(run, call, record.output_tokens)
        self._recorder.opened(open_call.request, record)
        api.open(
            open_call.request,
            record,
            chain,
            hashes,
            limit,
            "length" if self._limited or wanted > limit else "stop",
            context_of(run, call),
            call.group,
        )
        now_s = self._events.now_s
        if self._aborted and now_s < self._aborts_until_s and self._rng.random() < self._aborted:
            pause_s = self._rng.random() * ABORT_S_MAX
            self._events.after(pause_s, api.end, open_call.request, "abort")

    def _hashes(self, run: Run, call: Call, output_tokens: int) -> tuple[bytes, bytes]:
        """Of all full blocks of prompt and output, and of the prompt alone."""
        chain = self._chains.computed(run, call)
        size = self._block_size
        blocks = (call.prompt_tokens + output_tokens - 1) // size
        chain = chain[: blocks * BLOCK_HASH_BYTES]
        return chain, chain[: call.prompt_tokens // size * BLOCK_HASH_BYTES]

    # --- what comes back -----------------------------------------------------------------

    def resumed(self, gap_s: float) -> None:
        """Tokens of a call go on, from another worker."""
        self._recorder.gap(gap_s)

    def ended(self, record: CallRecord, retry_after_s: float) -> None:
        """A call ended as its record says."""
        open_call = self._open[record.run, record.call]
        self._recorder.ended(open_call.request)
        served = record.outcome in ("stop", "length")
        retried = record.status in RETRIED and not record.first_token_s
        if not served and retried and open_call.retries < RETRIES_MAX:
            open_call.retries += 1
            pause_s = max(retry_after_s, RETRY_S_MIN * 2 ** (open_call.retries - 1))
            self._events.after(pause_s, self._submit_again, open_call)
        else:
            self._over(open_call)

    def _submit_again(self, open_call: Open) -> None:
        record = open_call.record
        record.outcome, record.status, record.ended_s = "", 0, 0.0
        record.prefill = record.decode = ""
        self._submit(open_call)

    def _over(self, open_call: Open) -> None:
        """Nothing more comes of a call; of its run only if it was served."""
        record, now_s = open_call.record, self._events.now_s
        run = record.run
        del self._open[run, record.call]
        if record.outcome in ("stop", "length"):
            self._replay.ended(run, record.call, now_s - self.began_s)
            self._calls_left[run] -= 1
            if not self._calls_left[run]:
                self._run_over(run, run not in self._failed_runs)
        elif run not in self._failed_runs:
            self._failed_runs.add(run)
            self._replay.abandoned(run, now_s - self.began_s)
            self._run_over(run, False)
        self._look()
        self._tell()
        if self.done:
            self._finished()

    def _run_over(self, run: int, finished: bool) -> None:
        self._recorder.run_ended(run, self._events.now_s, finished)
        self._chains.forget(self._workload.runs[run].id)

    def _tell(self) -> None:
        over = self._calls_total - self._replay.calls_left
        if self._progress is not None and (over - self._told_calls >= PROGRESS_CALLS or self.done):
            self._told_calls = over
            self._progress(over, self._calls_total, self._events.now_s - self.began_s)

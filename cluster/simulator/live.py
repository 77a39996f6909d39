"""A workload on a running cluster: the same records as from the simulator, of what is real.

Driven by the same ``Replay``, so a call is sent its think time after its parents ended. Calls
go to ``/v1/completions`` as token ids (``prompts``), greedily and to their full length,
streamed. When tokens came is this process's clock at the arrival of their event; where a call
ran, and what it found cached there, is what the core says of it (``/v1/cluster``).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
import msgspec

from cluster.simulator.failure import SimulationError
from cluster.simulator.prompts import Prompts
from cluster.simulator.records import CallRecord, Gaps, Result, Totals
from cluster.simulator.runs import run_records
from cluster.workload.form import Call, Run, Workload, context_of
from cluster.workload.replay import Due, Replay
from coordinator.protocol import CallStatus, Snapshot

logger = logging.getLogger("pythia.replay")

CALLS_MAX = 512
"""Calls under way at a time; more wait in the client, and their waiting counts."""
CALL_S = 600.0
CONNECT_S = 10.0
ASK_EVERY_CALLS = 64
"""The core remembers 256 ended calls unless told otherwise."""
STATUS_S = 30.0
STATUS_TRIES = 20
STATUS_PAUSE_S = 0.25
FAILED_CONNECTION = 0
"""``CallRecord.status`` of a call that got no HTTP status."""
GAP_S_MIN = 1e-6
"""Between tokens that came together."""
END_OF_EVENT = b"\n\n"
DATA = b"data: "
DONE = b"[DONE]"
EVENT_BYTES_MAX = 16 * 2**20

_ID = re.compile(r"replay-([0-9a-f]{8})-(\d+)-(\d+)-")
_decode_snapshot = msgspec.json.Decoder(Snapshot).decode

Progress = Callable[[int], None]
"""Told how many calls have ended."""


class LiveError(SimulationError):
    """The cluster did not answer as it should."""


class Target(msgspec.Struct, frozen=True):
    """A running cluster. ``base_url`` is without ``/v1``; token ids from ``first_token`` to
    ``last_token`` are plain ones in the model's vocabulary."""

    base_url: str
    model: str
    first_token: int
    last_token: int
    api_key: str = ""
    calls_max: int = CALLS_MAX
    call_s: float = CALL_S


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    error: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode


class _Answer:
    """What has come of one stream."""

    def __init__(self, gaps: Gaps) -> None:
        self._gaps = gaps
        self._rest = b""
        self.tokens: list[int] = []
        self.first_s = 0.0
        self.last_s = 0.0
        self.finish = ""
        self.error = ""
        self.done = False

    def take(self, data: bytes, now_s: float) -> None:
        """The next bytes. LiveError if they are no events."""
        *events, self._rest = (self._rest + data).split(END_OF_EVENT)
        if len(self._rest) > EVENT_BYTES_MAX:
            raise LiveError(f"an event of more than {EVENT_BYTES_MAX} bytes")
        for event in events:
            if event.startswith(DATA):
                self._event(event[len(DATA) :], now_s)

    def _event(self, body: bytes, now_s: float) -> None:
        if body == DONE:
            self.done = True
            return
        event = _decode_event(body)
        if event.error is not None:
            self.error = str(event.error)
        for choice in event.choices:
            self.finish = choice.finish_reason or self.finish
            if choice.token_ids:
                self._tokens(choice.token_ids, now_s)

    def _tokens(self, tokens: list[int], now_s: float) -> None:
        if self.tokens:
            self._gaps.add(max(now_s - self.last_s, GAP_S_MIN))
        else:
            self.first_s = now_s
        # Tokens in one event came together.
        if len(tokens) > 1:
            self._gaps.add(GAP_S_MIN, len(tokens) - 1)
        self.last_s = now_s
        self.tokens += tokens


class LiveReplay:
    """One replay. ``extra`` is added to every request's body."""

    def __init__(
        self,
        target: Target,
        workload: Workload,
        extra: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._target = target
        self._workload = workload
        self._extra = dict(extra or {})
        self._progress = progress or (lambda ended: None)
        self._name = uuid.uuid4().hex[:8]
        # No replay finds what another one has left in the caches.
        self._prompts = Prompts(
            workload.block_tokens, target.first_token, target.last_token, self._name
        )
        self._replay = Replay(workload)
        self._began_s = 0.0
        self._gaps = Gaps()
        self._records: dict[tuple[int, int], CallRecord] = {}
        self._unknown: set[tuple[int, int]] = set()
        """Ended calls of which the core has not been asked yet."""
        self._failed_runs: set[int] = set()
        self._seats = asyncio.Semaphore(target.calls_max)
        self._changed = asyncio.Event()
        self._ended = 0

    async def run(self, configuration: str = "live", seed: int = 0) -> Result:
        """Send everything and wait for all answers, whatever they are.

        LiveError if the core can't say where the calls ran.
        """
        target = self._target
        headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
        async with aiohttp.ClientSession(
            target.base_url,
            # No idle connections: a server may close one at the moment that it is used again.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=target.call_s, sock_connect=CONNECT_S),
            headers=headers,
        ) as session:
            before = await self._snapshot(session)
            try:
                await self._send_all(session)
            except* LiveError as errors:
                raise errors.exceptions[0] from errors
            await self._ask_all(session)
            totals = totals_of(before, await self._snapshot(session))
        calls = sorted(self._records.values(), key=lambda call: (call.run, call.call))
        totals.duration_s = max((call.ended_s for call in calls), default=0.0)
        return Result(
            configuration=configuration,
            workload=self._workload.name,
            seed=seed,
            where="live",
            calls=calls,
            runs=run_records(self._workload, calls, self._replay.began_s, self._failed_runs),
            samples=[],
            gaps=self._gaps,
            totals=totals,
        )

    async def _send_all(self, session: aiohttp.ClientSession) -> None:
        asking: asyncio.Task[None] | None = None
        gc.collect()
        self._began_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            while self._replay.calls_left:
                self._changed.clear()
                for due in self._replay.due(self._now_s()):
                    group.create_task(self._call(session, due))
                if len(self._unknown) >= ASK_EVERY_CALLS and (asking is None or asking.done()):
                    asking = group.create_task(self._ask(session))
                await self._sleep()

    @property
    def unknown_outputs(self) -> int:
        """Generated tokens that a prompt should have contained but had been sent without."""
        return self._prompts.unknown_outputs

    def _now_s(self) -> float:
        return time.monotonic() - self._began_s

    async def _sleep(self) -> None:
        """Until the next call is due or something has ended."""
        next_s = self._replay.next_s
        if next_s is None:
            await self._changed.wait()
            return
        try:
            await asyncio.wait_for(self._changed.wait(), max(0.0, next_s - self._now_s()))
        except TimeoutError:
            return

    # --- one call ---------------------------------------------------------------------

    async def _call(self, session: aiohttp.ClientSession, due: Due) -> None:
        run = self._workload.runs[due.run]
        call = run.calls[due.call]
        record = self._records[due.run, due.call] = CallRecord(
            run=due.run,
            call=due.call,
            due_s=self._now_s(),
            agent=call.kind or call.agent,
            prompt_tokens=call.prompt_tokens,
        )
        prompt = self._prompts.prompt(run, call)
        answer = _Answer(self._gaps)
        async with self._seats:
            record.outcome, record.status = await self._ask_for(
                session, due, self._body(run, call, prompt), answer
            )
        record.ended_s = self._now_s()
        record.output_tokens = len(answer.tokens)
        if answer.tokens:
            record.first_token_s = answer.first_s - self._began_s
            # What comes behind the last token is no time that a client waits for an answer.
            record.ended_s = answer.last_s - self._began_s
            self._unknown.add((due.run, due.call))
        if record.outcome in ("stop", "length"):
            self._prompts.generated(run, call, answer.tokens)
            self._replay.ended(due.run, due.call, record.ended_s)
        else:
            self._failed_runs.add(due.run)
            self._replay.abandoned(due.run, record.ended_s)
        self._ended += 1
        self._progress(self._ended)
        self._changed.set()

    def _body(self, run: Run, call: Call, prompt: list[int]) -> bytes:
        context = context_of(run, call)
        return msgspec.json.encode(
            {
                "model": self._target.model,
                "prompt": prompt,
                "max_tokens": call.output_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,
                "workflow": {
                    "name": context.workflow,
                    "run": context.run,
                    "agent": context.agent,
                    "parent": context.parent,
                    "final": context.final,
                },
                **({"cache_salt": run.tenant} if run.tenant else {}),
                **self._extra,
            }
        )

    async def _ask_for(
        self, session: aiohttp.ClientSession, due: Due, body: bytes, answer: _Answer
    ) -> tuple[str, int]:
        """Send a call and read its answer. Its outcome, and its HTTP status if it failed."""
        headers = {
            "Content-Type": "application/json",
            "X-Request-Id": f"replay-{self._name}-{due.run}-{due.call}-",
        }
        try:
            async with session.post("/v1/completions", data=body, headers=headers) as response:
                if response.status != 200:
                    reason = await response.text()
                    logger.warning("run %d, call %d: refused: %s", due.run, due.call, reason)
                    return "rejected", response.status
                async for data in response.content.iter_any():
                    answer.take(data, time.monotonic())
        except (aiohttp.ClientError, TimeoutError, LiveError, msgspec.DecodeError) as error:
            logger.warning("run %d, call %d: %r", due.run, due.call, error)
            return "error", FAILED_CONNECTION
        if answer.error or not answer.done or not answer.tokens:
            reason = answer.error or "the stream ended before the answer did"
            logger.warning("run %d, call %d: %s", due.run, due.call, reason)
            return "error", 200
        return answer.finish, 0

    # --- what the core says -------------------------------------------------------------

    async def _snapshot(self, session: aiohttp.ClientSession) -> Snapshot:
        try:
            async with session.get("/v1/cluster") as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise LiveError(f"{self._target.base_url}/v1/cluster: {error!r}") from error
        if response.status != 200:
            raise LiveError(f"{self._target.base_url}/v1/cluster: status {response.status}")
        return _decode_snapshot(body)

    async def _ask(self, session: aiohttp.ClientSession) -> None:
        """Fill in where the calls that have ended ran and what they found."""
        for status in (await self._snapshot(session)).calls:
            found = _ID.search(status.request)
            if not found or found[1] != self._name or not status.outcome:
                continue
            key = int(found[2]), int(found[3])
            if key in self._unknown:
                self._unknown.discard(key)
                fill_in(self._records[key], status)

    async def _ask_all(self, session: aiohttp.ClientSession) -> None:
        """The core hears of an end a little later than the client."""
        for _ in range(STATUS_TRIES):
            await self._ask(session)
            if not self._unknown:
                return
            await asyncio.sleep(STATUS_PAUSE_S)
        raise LiveError(
            f"the core does not know (any more) how {len(self._unknown)} calls ended;"
            " it remembers limits.recent_calls of them"
        )


def fill_in(record: CallRecord, status: CallStatus) -> None:
    """What the core says of a call that has ended."""
    record.prefill, record.decode = status.prefill, status.decode
    record.attempts = status.attempt
    record.prefill_cached_tokens = status.prefill_cached_tokens
    record.local_cached_tokens = status.local_cached_tokens
    record.moved_tokens = status.moved_tokens
    here = status.prompt_tokens - status.local_cached_tokens - status.moved_tokens
    there = status.prompt_tokens - status.prefill_cached_tokens if status.prefill else 0
    record.computed_tokens = here + there


def totals_of(before: Snapshot, after: Snapshot) -> Totals:
    """What a cluster has counted between two snapshots."""
    bytes_moved = sum(link.bytes_total for link in after.links) - sum(
        link.bytes_total for link in before.links
    )
    preemptions = sum(row.load.preemptions_total for row in after.workers) - sum(
        row.load.preemptions_total for row in before.workers
    )
    return Totals(
        gpus=len(after.workers),
        preemptions=preemptions,
        moved_bytes={"tcp": bytes_moved},
        counters={
            name: count - before.counters.get(name, 0) for name, count in after.counters.items()
        },
    )

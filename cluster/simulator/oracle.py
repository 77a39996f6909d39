"""What must be true of a simulated cluster, judged by who sees everything.

It trusts nobody's books but its own: who computed which KV, which handle was read, what each
client got. It watches all the time, and looks at everything once more when all is quiet.
What it finds is an ``OracleError`` with the seed, the time and the last that was said about
the call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from cluster.simulator.call import RETRIES_MAX, request_id
from cluster.simulator.frames import Handle, Tokens, Work
from cluster.simulator.network import Letter, Network
from cluster.simulator.records import CallRecord
from coordinator.core import Core
from coordinator.limits import Limits
from coordinator.protocol import (
    BLOCK_HASH_BYTES,
    Abort,
    Failed,
    Plan,
    Rejected,
    Stop,
    Welcome,
    engine_request_id,
    split_engine_request_id,
)

if TYPE_CHECKING:
    from cluster.simulator.api import Api
    from cluster.simulator.call import Call
    from cluster.simulator.worker import Worker

BELIEFS = {"loading": ("loading", "decoding"), "decoding": ("decoding",)}
"""Where a call must be in its API process if the core takes it for that."""
WANT = ("no room", "given up after 4 attempts: stuck")
"""What the core says for want of room: a worker that is too busy for a call looks stuck."""
OVER_S = 6.0
"""How long a call that is over may still be in an engine that hears of it: a message's longest way
(``Faults.delay_s`` is 5 s at most here), and a step."""
SLACK_S = 2.0
"""Between a deadline of the core's and its last word."""
LETTERS_TOLD = 40
MADE_MAX = 65536


class OracleError(AssertionError):
    """The cluster did what it must never do."""


class Oracle:
    """One simulation's. ``now_s`` is had from the network's clock."""

    def __init__(self, seed: int, network: Network, block_size: int, limits: Limits) -> None:
        self.seed = seed
        self.reads = 0
        self.reads_failed = 0
        self._network = network
        self._block_size = block_size
        self._made: dict[tuple[str, str], bytes] = {}
        """By incarnation and engine request: the hash of the last full block that is held,
        which stands for all before it."""
        self._read: dict[tuple[str, str], str] = {}
        """Handles whose KV has been read lately, and for which request."""
        self._tokens: dict[str, int] = {}
        """What the clients of open calls have got."""
        self._patience_s = _patience_s(limits)
        self._cores: dict[str, str] = {}
        """By API process: the core that took it in last."""
        self._planned_by: dict[str, tuple[int, str]] = {}
        """Attempt of the latest plan for each open call, and whom its API process took for the
        core when it came."""
        self._unknown_s: dict[tuple[str, str, int], float] = {}
        """Since when the core has had calls that no API process has, by request, phase and
        attempt."""
        self._undead_s: dict[tuple[str, str], float] = {}
        """Since when engines have worked for calls that are over, by incarnation and request."""

    # --- KV -----------------------------------------------------------------------------

    def made(self, worker: Worker, engine_id: str, chain: bytes) -> None:
        """``worker`` holds KV of these blocks, which it computed for this request."""
        self._made[worker.incarnation, engine_id] = chain[-BLOCK_HASH_BYTES:]
        if len(self._made) > MADE_MAX:
            del self._made[next(iter(self._made))]

    def reading(
        self, reader: Worker, engine_id: str, chain: bytes, handle: Handle, source: Worker
    ) -> None:
        """``reader`` begins to read ``handle`` for a request whose blocks are ``chain``."""
        key = handle.incarnation, handle.engine_id
        what = f"{reader.address} reads {handle} for {engine_id}"
        self._assert(source.placed == handle.holder, f"{what} from {source.address}", engine_id)
        self._assert(key not in self._read, f"{what}, read before", engine_id)
        self._read[key] = engine_id
        if len(self._read) > MADE_MAX:
            del self._read[next(iter(self._read))]
        own = engine_id.replace("probe-read-", "probe-") == handle.engine_id.replace("~-", "~")
        # A call that is moved has one name on both workers.
        self._assert(own or engine_id == handle.engine_id, f"{what}: another request's", engine_id)
        self._assert_held(what, handle, source, engine_id)
        blocks = handle.tokens // self._block_size
        end = blocks * BLOCK_HASH_BYTES
        last = chain[max(0, end - BLOCK_HASH_BYTES) : end]
        self._assert(self._made.get(key) == last, f"{what}: other blocks", engine_id)

    def has_read(
        self, reader: Worker, engine_id: str, handle: Handle, source: Worker | None, tokens: int
    ) -> None:
        """The read is over and ``reader`` uses what came."""
        what = f"{reader.address} has read {handle} for {engine_id}"
        if source is None:
            raise self._error(f"{what}: its holder is gone", engine_id)
        self._assert(tokens <= handle.tokens, f"{what}: {tokens} tokens", engine_id)
        self._assert_held(what, handle, source, engine_id)
        self._made.pop((handle.incarnation, handle.engine_id), None)
        self.reads += 1

    def _assert_held(self, what: str, handle: Handle, source: Worker, engine_id: str) -> None:
        held = source.engine.holds(handle.engine_id, self._network.now_s)
        self._assert(held, f"{what}: its lease is over", engine_id)

    # --- clients ------------------------------------------------------------------------

    def opened(self, request: str) -> None:
        """A client sent a call."""
        self._assert(request not in self._tokens, f"{request} was opened twice", request)
        self._tokens[request] = 0

    def delivered(self, request: str, first: int, count: int) -> None:
        """A client got ``count`` tokens, the first of them number ``first`` of the answer."""
        got = self._tokens.get(request)
        if got is None:
            raise self._error(f"{request} got tokens after its end", request)
        self._assert(first == got, f"{request} got token {first} after {got} tokens", request)
        self._assert(count >= 0, f"{request} got {count} tokens", request)
        self._tokens[request] = got + count

    def ended(self, request: str, outcome: str, expected_tokens: int) -> None:
        """A call ended for its client."""
        self._planned_by.pop(request, None)
        got = self._tokens.pop(request, None)
        if got is None:
            raise self._error(f"{request} ended twice or was never opened", request)
        served = outcome in ("stop", "length")
        complete = got == expected_tokens or not served
        self._assert(complete, f"{request} ended with {got} of {expected_tokens} tokens", request)

    def overdue(self, call: Call, since_s: float, welcomed_s: float) -> None:
        """An API process, last taken in at ``welcomed_s``, gives a call up by itself that the
        core should have ended, counted from ``since_s``.

        Only if the core has counted from a later moment, for it did not know the API process
        before, or if it has said its last word about the call.
        """
        if since_s <= welcomed_s:
            return
        if self._last_word(call.request) is None:
            what = f"{call.request} is {call.phase} and the core has forgotten it"
            raise self._error(what, call.request)

    def arrived(self, api: Api, message: object) -> None:
        """An API process has just got a word of the core, and done what it does about it."""
        if isinstance(message, Welcome):
            self._cores[api.name] = message.core
        elif isinstance(message, Plan):
            if message.request in self._tokens:
                core = self._cores.get(api.name, "")
                self._planned_by[message.request] = message.attempt, core
        elif isinstance(message, Stop):
            call = api.calls.get(message.request)
            if call is None or message.attempt < call.attempt:
                return
            # What is being said goes on if it is another attempt that there was no room for.
            served = message.status == 503 and message.attempt > call.attempt
            goes_on = served and call.phase == "decoding"
            self._assert(goes_on, f"{message.request} was stopped and goes on", message.request)

    def failed(self, api: str, message: Failed) -> None:
        """An API process asks the core for another plan: it must be the one that made the first."""
        attempt, planned_by = self._planned_by.get(message.request, (0, ""))
        core = self._cores.get(api, "")
        if attempt == message.attempt and planned_by not in ("", core):
            what = f"{api} asks {core} for {message.request}, which another core had planned"
            raise self._error(what, message.request)

    def served_well(self, calls: Iterable[CallRecord], after_s: float) -> None:
        """Calls sent after ``after_s``, when nothing goes wrong, fail only for want of room
        or time."""
        for call in calls:
            if call.due_s < after_s or call.outcome != "error" or call.status == 504:
                continue
            requests = [request_id(call.run, call.call, retry) for retry in range(RETRIES_MAX + 1)]
            words = [word for each in requests if (word := self._last_word(each)) is not None]
            if not words or not words[-1].reason.startswith(WANT):
                raise self._error(f"without need: {call}", requests[0])

    def _last_word(self, request: str) -> Stop | Rejected | None:
        """What the core said when it gave a call up, if that is not long ago."""
        for letter in reversed(self._network.letters):
            message = letter.message
            if isinstance(message, Stop | Rejected) and message.request == request:
                return message
        return None

    @property
    def open_calls(self) -> int:
        """Calls whose clients wait."""
        return len(self._tokens)

    # --- all ----------------------------------------------------------------------------

    def check(self, core: Core, workers: Iterable[Worker]) -> None:
        """What must be true at any moment."""
        try:
            core.check()
            for worker in workers:
                worker.engine.check()
        except AssertionError as error:
            raise self._error(f"{type(error).__name__}: {error}") from error

    def watch(self, core: Core, apis: Iterable[Api]) -> None:
        """The core believes of a call nothing that its API process has not said, and keeps none
        that nobody has any more for longer than it may be in doubt."""
        now_s = self._network.now_s
        calls = {request: call for api in apis for request, call in api.calls.items()}
        unknown_s: dict[tuple[str, str, int], float] = {}
        for row in core.snapshot(0, now_s).calls:
            call = calls.get(row.request)
            if call is None and row.phase in self._patience_s:
                key = row.request, row.phase, row.attempt
                since_s = unknown_s[key] = self._unknown_s.get(key, now_s)
                in_time = now_s - since_s <= self._patience_s[row.phase]
                what = f"the core has had {row.request} {row.phase} for {now_s - since_s:.1f} s"
                self._assert(in_time, f"{what}, and nobody else", row.request)
            said = BELIEFS.get(row.phase)
            if call is None or said is None or call.attempt != row.attempt or call.failed:
                continue
            known = call.phase in said or (row.phase == "loading" and not row.prefill)
            self._assert(known, f"the core takes {row.request} for {row.phase}", row.request)
        self._unknown_s = unknown_s

    def watch_engines(self, workers: Iterable[Worker], apis: Iterable[Api]) -> None:
        """No engine works for long for a call that is over, or for a former attempt."""
        now_s = self._network.now_s
        attempts = {
            request: call.attempt if call.phase != "waiting" else call.attempt + 1
            for api in apis
            for request, call in api.calls.items()
        }
        undead_s: dict[tuple[str, str], float] = {}
        for worker in workers:
            for job in worker.jobs.values():
                # A worker that hears nothing can't know.
                if job.connection is None or worker.hung:
                    continue
                if self._network.is_cut(worker.name, job.connection.api):
                    continue
                request, attempt = split_engine_request_id(job.engine_id)
                # A peer that is pulled from knows the attempt by its negative.
                if abs(attempt) >= attempts.get(request, abs(attempt) + 1):
                    continue
                key = worker.incarnation, job.engine_id
                since_s = undead_s[key] = self._undead_s.get(key, now_s)
                in_time = now_s - since_s <= OVER_S
                what = (
                    f"{worker.address} has worked for {now_s - since_s:.1f} s for {job.engine_id}"
                )
                self._assert(in_time, f"{what}, which is over", request)
        self._undead_s = undead_s

    def quiet(self, core: Core, workers: Iterable[Worker], apis: Iterable[Api]) -> None:
        """What must be true when all calls have ended and all leases are over."""
        now_s = self._network.now_s
        workers = list(workers)
        self.check(core, workers)
        apis = list(apis)
        for api in apis:
            for request in api.calls:
                raise self._error(f"{request} is stuck in {api.name}", request)
        for request in self._tokens:
            raise self._error(f"the client of {request} still waits", request)
        snapshot = core.snapshot(0, now_s)
        alive = f"{snapshot.apis} API processes for alive, there are {len(apis)}"
        self._assert(snapshot.apis == len(apis), f"the core takes {alive}")
        for row in snapshot.calls[len(snapshot.calls) - snapshot.active - snapshot.queued :]:
            raise self._error(f"the core still has {row}", row.request)
        for status in snapshot.workers:
            kept = status.calls, status.handles, status.kv_blocks_reserved
            self._assert(kept == (0, 0, 0), f"something is left in the core: {status}")
        for worker in workers:
            load = worker.engine.load(now_s)
            left = load.running, load.waiting, load.kv_blocks_used
            self._assert(left == (0, 0, 0), f"something is left in {worker.address}: {load}")
            self._assert(not worker.jobs, f"{worker.address} still has {list(worker.jobs)}")
            self._assert(not len(worker.reader), f"{worker.address} still has handles to read")
            self._assert(worker.pending_tokens == 0, f"{worker.address} counts pending tokens")

    # --- errors -------------------------------------------------------------------------

    def _assert(self, fact: bool, what: str, about: str = "") -> None:
        if not fact:
            raise self._error(what, about)

    def _error(self, what: str, about: str = "") -> OracleError:
        lines = [f"seed {self.seed} at {self._network.now_s:.6f} s: {what}"]
        request = about.partition("~")[0]
        if request:
            letters = [each for each in self._network.letters if _is_about(each.message, request)]
            lines += [_line(letter) for letter in letters[-LETTERS_TOLD:]]
        return OracleError("\n".join(lines))


def _patience_s(limits: Limits) -> dict[str, float]:
    """How long the core may have a call in a phase whose API process does not know it: until
    the phase is overdue, and some questions have had no answer."""
    asked_s = 2 * limits.check_s + SLACK_S
    return {
        "queued": limits.wait_s + SLACK_S,
        "pulling": limits.pull_s + limits.check_s + asked_s,
        "prefilling": limits.prefill_s + asked_s,
        "loading": limits.first_token_s + asked_s,
        "decoding": limits.decode_check_s + asked_s,
        "resuming": limits.check_s + asked_s,
    }


def _is_about(message: Any, request: str) -> bool:
    match message:
        case Work():
            return bool(message.message.request == request)
        case Tokens():
            return split_engine_request_id(message.engine_id)[0] == request
        case Abort():
            return any(each == request for each, _ in message.calls)
        case _:
            return getattr(message, "request", "") == request


def _line(letter: Letter) -> str:
    message = letter.message
    if isinstance(message, Work):
        head, body = message.message, message.body
        text = f"{head} + {body.prompt_tokens} tokens, {body.output_tokens} to come"
    elif isinstance(message, Tokens):
        text = f"Tokens({message.engine_id}, {'end' if message.ended else message.first})"
    elif hasattr(message, "block_hashes"):
        call = engine_request_id(message.request, message.attempt)
        text = f"Submit({call}, {message.prompt_tokens} tokens)"
    else:
        text = str(message)
    return f"  {letter.at_s:12.6f} {letter.source} -> {letter.target}: {text}"

"""What the core knows, and the lifecycles of its parts as tables.

A call, a worker and a pair of workers each have a phase, a table of legal moves and one
``move`` that is the only writer of the phase; a move that the table does not have raises
``InvalidTransition`` with the object's story. ``State`` holds everything that the parts
of the core share. Nothing here decides anything.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from coordinator.deadlines import Deadlines, Key
from coordinator.errors import InvalidTransition, StoryLine
from coordinator.gauge import Decoded, Gauge, Mark
from coordinator.limits import Limits
from coordinator.protocol import (
    CoreToApi,
    CoreToWorker,
    EngineFacts,
    LinkLoad,
    Load,
    Plan,
    Ready,
    Role,
    Submit,
)
from coordinator.workflow.roster import Run

Peer = bytes
"""Opaque address of a connection."""

CallKey = tuple[str, str]
"""API process and request: request ids are unique only within an API process."""

PairKey = tuple[str, str]
"""Source and target worker."""


class Send(msgspec.Struct, frozen=True, gc=False):
    """The shell is to send ``message`` to ``peer``."""

    peer: Peer
    message: CoreToWorker | CoreToApi


class CallPhase(enum.Enum):
    """Where a call is."""

    QUEUED = "queued"
    """Waits for room; nothing is reserved."""
    PULLING = "pulling"
    """Planned; a peer is to name what it has cached of the prompt."""
    PREFILLING = "prefilling"
    """Planned, or pulled; the prefill worker computes the prompt."""
    LOADING = "loading"
    """With the decode worker (planned locally, pulled or prefilled); no token yet."""
    DECODING = "decoding"
    """The first token came."""
    RESUMING = "resuming"
    """Its decode worker is lost; the API process is to say what the client has got."""
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"
    REJECTED = "rejected"
    STOPPED = "stopped"
    GONE = "gone"
    """Its API process is lost, or does not know the call any more."""


_ENDED_BY_API = frozenset(
    {CallPhase.FINISHED, CallPhase.CANCELLED, CallPhase.FAILED, CallPhase.GONE}
)
_ENDED = _ENDED_BY_API | {CallPhase.STOPPED}

CALL_MOVES: Mapping[CallPhase, frozenset[CallPhase]] = {
    CallPhase.QUEUED: _ENDED
    | {CallPhase.PULLING, CallPhase.PREFILLING, CallPhase.LOADING, CallPhase.REJECTED},
    CallPhase.PULLING: _ENDED | {CallPhase.PREFILLING, CallPhase.LOADING, CallPhase.QUEUED},
    CallPhase.PREFILLING: _ENDED | {CallPhase.LOADING, CallPhase.QUEUED},
    CallPhase.LOADING: _ENDED | {CallPhase.DECODING, CallPhase.QUEUED},
    # A call that is moved is loaded anew, on the worker where its KV is by then.
    CallPhase.DECODING: _ENDED | {CallPhase.RESUMING, CallPhase.QUEUED, CallPhase.LOADING},
    CallPhase.RESUMING: _ENDED | {CallPhase.QUEUED},
    CallPhase.FINISHED: frozenset(),
    CallPhase.CANCELLED: frozenset(),
    CallPhase.FAILED: frozenset(),
    CallPhase.REJECTED: frozenset(),
    CallPhase.STOPPED: frozenset(),
    CallPhase.GONE: frozenset(),
}


class WorkerPhase(enum.Enum):
    """Where a worker is."""

    UP = "up"
    SUSPECT = "suspect"
    """Missed beats: keeps its calls, gets no new ones."""
    DRAINING = "draining"
    """Said that it will leave when its calls have ended: gets no new ones."""
    LOST = "lost"
    LEFT = "left"


WORKER_MOVES: Mapping[WorkerPhase, frozenset[WorkerPhase]] = {
    WorkerPhase.UP: frozenset(
        {WorkerPhase.SUSPECT, WorkerPhase.DRAINING, WorkerPhase.LOST, WorkerPhase.LEFT}
    ),
    WorkerPhase.SUSPECT: frozenset(
        {WorkerPhase.UP, WorkerPhase.DRAINING, WorkerPhase.LOST, WorkerPhase.LEFT}
    ),
    WorkerPhase.DRAINING: frozenset({WorkerPhase.LOST, WorkerPhase.LEFT}),
    WorkerPhase.LOST: frozenset(),
    WorkerPhase.LEFT: frozenset(),
}


ROLE_TURNS: Mapping[Role, frozenset[Role]] = {
    "prefill": frozenset({"decode"}),
    "decode": frozenset({"prefill"}),
    "mixed": frozenset(),
}


class TurnPhase(enum.Enum):
    """How far a worker is with a change of its role, or with a drain."""

    DRAINING = "draining"
    """It gets no more work of its old role, and ends what it has begun. Work of its new role it
    gets already, within what it owes to that."""
    SWITCHING = "switching"
    """It gets no work; its engine is to work as the new role does."""
    VERIFYING = "verifying"
    """It gets no work; a canary goes through it."""
    DRAINED = "drained"
    """It has nothing left to do and gets nothing: a drain, until that is undone."""
    DONE = "done"
    UNDONE = "undone"
    """It has its old role again."""
    LOST = "lost"
    """The worker is gone."""


TURN_MOVES: Mapping[TurnPhase, frozenset[TurnPhase]] = {
    TurnPhase.DRAINING: frozenset(
        {TurnPhase.SWITCHING, TurnPhase.DRAINED, TurnPhase.UNDONE, TurnPhase.LOST}
    ),
    TurnPhase.SWITCHING: frozenset({TurnPhase.VERIFYING, TurnPhase.UNDONE, TurnPhase.LOST}),
    TurnPhase.VERIFYING: frozenset({TurnPhase.DONE, TurnPhase.UNDONE, TurnPhase.LOST}),
    TurnPhase.DRAINED: frozenset({TurnPhase.UNDONE, TurnPhase.LOST}),
    TurnPhase.DONE: frozenset(),
    TurnPhase.UNDONE: frozenset(),
    TurnPhase.LOST: frozenset(),
}


class PairPhase(enum.Enum):
    """How far the warm-up of an ordered pair of workers is."""

    COLD = "cold"
    SOURCE = "probing the source"
    TARGET = "probing the target"
    WARM = "warm"
    FAILED = "failed"


PAIR_MOVES: Mapping[PairPhase, frozenset[PairPhase]] = {
    PairPhase.COLD: frozenset({PairPhase.SOURCE}),
    PairPhase.SOURCE: frozenset({PairPhase.TARGET, PairPhase.COLD, PairPhase.FAILED}),
    PairPhase.TARGET: frozenset({PairPhase.WARM, PairPhase.COLD, PairPhase.FAILED}),
    PairPhase.WARM: frozenset(),
    PairPhase.FAILED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Story:
    """The last moves of one object, for error messages."""

    lines_max: int
    lines: list[StoryLine] = field(default_factory=list)

    def add(self, now_s: float, phase: str, why: str) -> None:
        """Remember one move, forget the oldest beyond the bound."""
        self.lines.append((now_s, phase, why))
        if len(self.lines) > self.lines_max:
            del self.lines[0]


@dataclass(slots=True, eq=False)
class Worker:
    """One registered incarnation of a worker. KV in blocks.

    What placement reads for every call and worker are plain fields, for speed.
    """

    ready: Ready
    peer: Peer
    last_heard_s: float
    usable_blocks: int
    story: Story
    name: str = field(init=False)
    incarnation: str = field(init=False)
    role: Role = field(init=False)
    tokens_max: int = field(init=False)
    """Prompt and output that its engine can hold for one call."""
    batch_slots: int = field(init=False)
    started_role: Role = field(init=False)
    """The one that it registered with."""
    kv_bytes_per_block: int = field(init=False)
    """What a block weighs on a link; 0 if its engine did not say."""
    partial_reads: bool = field(init=False)
    """Of a prompt's KV it can read, and others can read from it, the beginning alone."""
    turned_s: float = float("-inf")
    """When its role last changed since it registered."""
    chunk_tokens: int = 0
    """Of one prompt, what it has been told to compute in a step at most; 0: no bound."""
    phase: WorkerPhase = WorkerPhase.UP
    up: bool = True
    """May get new work."""
    cordoned: bool = False
    """It may not, though it is well."""
    ending: bool = False
    """It has decodes of a role that it has no more, and owes them their pace."""
    turning: TurnPhase | None = None
    """How far it is with a change of its role, or with a drain."""
    load: Load = field(default_factory=Load)
    waiting: int = 0
    """Requests that its engine had not begun at the last beat."""
    kv_blocks_used: int = 0
    """What its engine said at the last beat, less what ended since."""
    kv_blocks_reserved: int = 0
    kv_blocks_shared: int = 0
    """What calls would have reserved beyond that if their prompts had nothing in common."""
    beginnings: dict[int, int] = field(default_factory=dict)
    """How many calls have each stretch of prompts that is in common; see ``Rooms``."""
    host_full: bool = False
    """Its host's memory has forgotten something, so that more pushes out more."""
    decodes: dict[CallKey, Call] = field(default_factory=dict)
    """Calls that it decodes, from plan to end."""
    prefills: dict[CallKey, Call] = field(default_factory=dict)
    """Calls whose prompt it computes or holds for a decode worker, from plan to first token."""
    pulls: dict[CallKey, Call] = field(default_factory=dict)
    """Calls that are to read what it has cached, from plan until it is where it is needed."""
    arriving: dict[CallKey, Call] = field(default_factory=dict)
    """Calls that are decoded elsewhere and are to go on here."""
    readable_from_s: float = float("-inf")
    """From when on its cache may be pulled from: it was late before."""
    prefilling: int = 0
    """Those of ``prefills`` that are not computed yet."""
    prefill_tokens: int = 0
    """Uncached prompt tokens that it has yet to compute, for itself or for others."""
    gauge: Gauge = field(default_factory=Gauge)
    """The same and what it decodes, in seconds and tokens to come."""
    warm_sources: set[str] = field(default_factory=set)
    """Workers whose KV it has been seen to pull."""
    links: list[LinkLoad] = field(default_factory=list)
    """What it said at the last beat of whom it reads from."""
    _link_of: dict[str, LinkLoad] | None = None
    probe: Pair | None = None
    cold_urgent: dict[PairKey, Pair] = field(default_factory=dict)
    cold_other: dict[PairKey, Pair] = field(default_factory=dict)

    def __post_init__(self) -> None:
        facts = self.facts
        self.name, self.incarnation = self.ready.worker, self.ready.incarnation
        self.role = self.started_role = self.ready.role
        self.tokens_max = min(facts.max_model_len, facts.kv_blocks * facts.block_size)
        self.batch_slots = facts.max_num_seqs
        self.kv_bytes_per_block = facts.kv_bytes_per_block
        self.partial_reads = facts.partial_reads

    @property
    def facts(self) -> EngineFacts:
        """What its engine is."""
        return self.ready.facts

    @property
    def computes_once(self) -> bool:
        """Of prompts that begin alike and come together its engine computes the beginning once:
        one after the other, not in parts side by side."""
        return self.facts.computes_once and not self.chunk_tokens

    def beat(self, load: Load, links: list[LinkLoad]) -> None:
        """What its engine says of itself, and the worker of its links."""
        self.load = load
        if links is not self.links:
            self.links, self._link_of = links, None
        self.waiting = max(0, load.waiting)
        self.kv_blocks_used = load.kv_blocks_used

    def link(self, source: str) -> LinkLoad | None:
        """What it said at the last beat of reading from ``source``, if anything."""
        if self._link_of is None:
            self._link_of = {link.source: link for link in self.links}
        return self._link_of.get(source)

    def turn(self, role: Role, now_s: float, why: str) -> None:
        """The only writer of ``role``; InvalidTransition for a turn not in the table.

        Its pairs have to hear of it (``Pairs.turned``).
        """
        if role not in ROLE_TURNS[self.role]:
            raise InvalidTransition(f"worker {self.name}", self.role, role, self.story.lines)
        self.story.add(now_s, role, why)
        self.role = role
        self.turned_s = now_s

    def move(self, phase: WorkerPhase, now_s: float, why: str) -> None:
        """The only writer of ``phase``; InvalidTransition for a move not in the table."""
        if phase not in WORKER_MOVES[self.phase]:
            raise InvalidTransition(
                f"worker {self.name}", self.phase.value, phase.value, self.story.lines
            )
        self.story.add(now_s, phase.value, why)
        self.phase = phase
        self.up = phase is WorkerPhase.UP and not self.cordoned

    def cordon(self, cordoned: bool) -> None:
        """It gets no new work, or gets it again. Orders and pairs have to hear of it."""
        self.cordoned = cordoned
        self.up = self.phase is WorkerPhase.UP and not cordoned


@dataclass(slots=True, eq=False)
class Turn:
    """A change of a worker's role, or a drain (``role`` None), from cordon to its end."""

    worker: Worker
    number: int
    role: Role | None
    former: Role
    by: str
    """Who wanted it: ``policy`` or ``operator``."""
    why: str
    began_s: float
    waits: dict[CallKey, None]
    """What it has begun in its old role and has not ended."""
    story: Story
    phase: TurnPhase = TurnPhase.DRAINING
    tries: int = 0
    probe: int = 0
    """The canary's number."""
    handle: bytes = b""
    """What it is read by, when it is computed."""
    reader: Worker | None = None
    """Who reads the canary's KV; None if there is nobody but the worker."""
    writer: Worker | None = None
    """Who computes it."""
    move_from_s: float = float("-inf")
    """From when on its decodes may be asked to go on elsewhere again."""

    def move(self, phase: TurnPhase, now_s: float, why: str) -> None:
        """The only writer of ``phase``; InvalidTransition for a move not in the table."""
        if phase not in TURN_MOVES[self.phase]:
            raise InvalidTransition(
                f"turn of {self.worker.name}", self.phase.value, phase.value, self.story.lines
            )
        self.story.add(now_s, phase.value, why)
        self.phase = phase


@dataclass(slots=True, eq=False)
class Pair:
    """An ordered pair of workers and how far its warm-up is."""

    source: Worker
    target: Worker
    urgent: bool
    """The source may prefill and the target may decode."""
    story: Story
    phase: PairPhase = PairPhase.COLD
    attempts: int = 0
    probe: int = 0

    @property
    def key(self) -> PairKey:
        """Names of source and target."""
        return self.source.name, self.target.name

    def move(self, phase: PairPhase, now_s: float, why: str) -> None:
        """The only writer of ``phase``; InvalidTransition for a move not in the table."""
        if phase not in PAIR_MOVES[self.phase]:
            raise InvalidTransition(
                f"pair {self.key}", self.phase.value, phase.value, self.story.lines
            )
        self.story.add(now_s, phase.value, why)
        self.phase = phase


@dataclass(slots=True, eq=False)
class Api:
    """One registered API process and its open calls by request."""

    name: str
    peer: Peer
    registered_s: float
    last_heard_s: float
    calls: dict[str, Call] = field(default_factory=dict)


class Stretches(NamedTuple):
    """Of all of a prompt's full blocks; see ``Rooms``. ``ends``: blocks before each, and in all."""

    keys: list[int]
    ends: list[int]


@dataclass(slots=True, eq=False)
class Relocation:
    """A running call's way to another worker. ``blocks`` are reserved there."""

    target: Worker
    blocks: int
    number: int


@dataclass(slots=True, eq=False)
class Call:
    """One call from its first ``Submit`` to its end. KV in blocks."""

    api: Api
    submit: Submit
    arrival: int
    submitted_s: float
    deadline_s: float
    attempt: int
    story: Story
    phase: CallPhase = CallPhase.QUEUED
    plans: int = 0
    generated_tokens: int = 0
    """What the client has got from earlier attempts; part of the prompt from then on."""
    plan: Plan | None = None
    overdue: int = 0
    """How often the API process was asked, its phase having taken too long, without an answer."""
    stuck_s: tuple[int, CallPhase, float] | None = None
    """Attempt and phase in which it was found to get nowhere, and since when."""
    follows: Call | None = None
    """Who is bringing to a worker what it would have computed once more; it waits for that."""
    followers: dict[CallKey, Call] = field(default_factory=dict)
    stretches: Stretches | None = None
    """Of its prompt, once somebody has asked."""
    follows_until_s: float = float("inf")
    """Till when it may follow others, once it has begun to."""
    decode: Worker | None = None
    decode_blocks: int = 0
    """Reserved there for this call alone, beside the stretches that it may have in common."""
    decode_stretches: int = 0
    prefill: Worker | None = None
    prefill_blocks: int = 0
    prefill_stretches: int = 0
    pull: Worker | None = None
    """Who is to name what it has cached, or holds it until it is read."""
    pull_blocks: int = 0
    pull_tokens: int = 0
    """What it is believed to have of the prompt."""
    pulled_blocks: int = 0
    """Of them, what who computes the prompt lacks."""
    computing: Worker | None = None
    """Who has the prompt yet to compute; ``uncached_tokens`` of it count there."""
    uncached_tokens: int = 0
    promised_from: int | None = None
    """From which block on the prompt counts as held by who computes it though it is not yet; None
    if it does not."""
    cached_blocks: int = 0
    """What the index believed the decode worker to hold when the call was planned."""
    loaded_blocks: int = 0
    """What by its plan comes from the host of who computes the prompt."""
    held_blocks: int = 0
    """What somebody was believed to hold of the prompt when the call was planned."""
    expected_tokens: float = 0.0
    """What it is expected to generate by its plan."""
    context_tokens: float = 0.0
    """Its context by its plan, halfway through."""
    mark: Mark | None = None
    """How its worker's gauge stood when it began to decode."""
    decoded: Decoded | None = None
    """What its worker's gauge said at its end."""
    run: Run | None = None
    """The run of a workflow that it belongs to, if that is tracked."""
    avoid: set[tuple[str, str]] = field(default_factory=set)
    """Workers (name, incarnation) that failed this call."""
    relocation: Relocation | None = None
    """Where it is to go on, while its KV is brought there."""
    moved_attempt: int = -1
    """The attempt that went on as the next one, elsewhere."""
    movable_from_s: float = float("-inf")
    """From when on it may be moved; never, if it can't go on elsewhere."""

    @property
    def request(self) -> str:
        """Unique within its API process."""
        return self.submit.request

    @property
    def key(self) -> CallKey:
        """Unique among all calls."""
        return self.api.name, self.submit.request

    @property
    def deadline_key(self) -> Key:
        """What its deadline is filed under."""
        return "call", self.api.name, self.submit.request

    @property
    def move_key(self) -> Key:
        """What the bound of its move is filed under."""
        return "move", self.api.name, self.submit.request

    @property
    def prompt_tokens(self) -> int:
        """Tokens to have KV for before the next token can be made."""
        return self.submit.prompt_tokens + self.generated_tokens

    @property
    def output_tokens(self) -> int:
        """Most tokens that are still to come, at least 1."""
        return max(1, self.submit.max_output_tokens - self.generated_tokens)

    @property
    def planned(self) -> bool:
        """Has a plan and no first token."""
        phase = self.phase
        return (
            phase is CallPhase.PREFILLING
            or phase is CallPhase.LOADING
            or phase is CallPhase.PULLING
        )

    @property
    def plan_unseen(self) -> bool:
        """Nothing the API process said shows that it has seen the plan."""
        if self.phase is CallPhase.PULLING:
            return True
        if self.plan is not None and self.plan.pull_worker is not None:
            return False
        if self.phase is CallPhase.LOADING:
            return self.plan is not None and self.plan.prefill is None
        return self.phase is CallPhase.PREFILLING

    def move(self, phase: CallPhase, now_s: float, why: str) -> None:
        """The only writer of ``phase``; InvalidTransition for a move not in the table."""
        if phase not in CALL_MOVES[self.phase]:
            raise InvalidTransition(
                f"call {self.key}", self.phase.value, phase.value, self.story.lines
            )
        self.story.add(now_s, phase.value, why)
        self.phase = phase


COUNTERS = (
    "apis_lost",
    "apis_registered",
    "calls_cancelled",
    "calls_failed",
    "calls_finished",
    "calls_followed",
    "calls_gone",
    "calls_rejected",
    "calls_stopped",
    "calls_submitted",
    "checks_sent",
    "errands_done",
    "errands_dropped",
    "errands_sent",
    "kv_changes",
    "kv_resyncs",
    "messages_stale",
    "messages_unknown_call",
    "messages_unknown_sender",
    "move_tokens",
    "moves_begun",
    "moves_made",
    "moves_undone",
    "pairs_failed",
    "pairs_warmed",
    "peers_refused",
    "pins",
    "pins_released",
    "plans_local",
    "plans_pull",
    "plans_remote",
    "prefetches",
    "prefetches_done",
    "prefetches_dropped",
    "prefetches_used",
    "prefetches_wasted",
    "probes_failed",
    "probes_sent",
    "pulls_missing",
    "pulls_unread",
    "replans",
    "role_flips",
    "tokens_cached_local",
    "tokens_cached_prefill",
    "tokens_moved",
    "tokens_output",
    "tokens_prefetched",
    "tokens_prompt",
    "tokens_pulled",
    "turns_begun",
    "turns_undone",
    "workers_drained",
    "workers_left",
    "workers_lost",
    "workers_registered",
)


MOVED_COUNTERS = (
    "move_tokens",
    "moves_begun",
    "moves_made",
    "moves_undone",
    "plans_pull",
    "prefetches",
    "prefetches_dropped",
    "prefetches_used",
    "prefetches_wasted",
    "pulls_missing",
    "pulls_unread",
    "tokens_moved",
    "tokens_prefetched",
    "tokens_pulled",
)
"""Those that metrics show."""


class State:
    """What the parts of the core share: peers, calls, deadlines, counters, the outbox."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.block_size = 0
        """Tokens per KV block, 0 until the first worker registers."""
        self.workers: dict[str, Worker] = {}
        self.apis: dict[str, Api] = {}
        self.calls: dict[CallKey, Call] = {}
        self.deadlines = Deadlines()
        self.counters: dict[str, int] = dict.fromkeys(COUNTERS, 0)
        self.room_changed = False
        """A queued call might be placed that could not be before."""
        self._outbox: list[Send] = []

    def story(self) -> Story:
        """An empty story."""
        return Story(self.limits.story_lines)

    def send(self, peer: Peer, message: CoreToWorker | CoreToApi) -> None:
        """Put a message into the outbox."""
        self._outbox.append(Send(peer, message))

    def take_outbox(self) -> list[Send]:
        """Everything sent since the last call, in order."""
        sent, self._outbox = self._outbox, []
        return sent

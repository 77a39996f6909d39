"""Every message on Pythia's wire.

Control (core <-> API processes and workers), one msgpack frame each::

    worker                    core                     API process
      | Ready                  |                        | Hello
      |----------------------->|<-----------------------|
      | Welcome | Refused      |  Welcome | Refused     |
      |<-----------------------|----------------------->|  WorkerUp*
      | Beat ...               |                        | ApiBeat ...
      |----------------------->|<-----------------------|
      |                        |  Alive                 |
      |                        |----------------------->|
      | Probe / ProbeRead      |                        | Submit
      |<-----------------------|<-----------------------|
      | Probed / ProbeFinished |                        |
      |----------------------->|  Plan | Rejected       |
      |                        |----------------------->|
      |                        |  Pulled, Prefilled, Started
      |                        |<-----------------------|
      |                        |  Finished | Failed     |
      |                        |<-----------------------|
      |                        |  Check, Stop, WorkerGone
      |                        |----------------------->|
      |                        |  Move                  |
      |                        |----------------------->|
      |                        |  MoveReady | MoveDeclined
      |                        |<-----------------------|
      |                        |  Plan (the next attempt: it goes on there)
      |                        |----------------------->|
      |                        |  DeclareWorkflow, StartRun, ...
      |                        |<-----------------------|
      |                        |  WorkflowAnswer        |
      |                        |----------------------->|

Data (API process <-> worker, direct), a msgpack header frame and, for
``Prefill``, ``PrefillDone``, ``Decode``, ``Deltas``, ``Utility`` and ``UtilityReply``, the
frames of vLLM's own encoder behind it::

    API process                            worker
      | Prefill  + EngineCoreRequest          |
      |-------------------------------------->|
      | PrefillDone (handle) + first token    |   or CallFailed
      |<--------------------------------------|
      | Prefill, cached only + request        |   to a peer whose cache is pulled from; its handle
      |-------------------------------------->|   goes with the call's own Prefill or Decode
      | Prefill, cached only + request        |   to a worker whose running call is moved; its
      |-------------------------------------->|   handle goes with a Prefill to where it is to go on
      | Decode (handle or none) + request     |
      |-------------------------------------->|
      | Deltas + EngineCoreOutputs ...        |   one per engine step and API process
      |<--------------------------------------|
      | Abort, Discard                        |
      |-------------------------------------->|

``pythia doctor`` talks to workers over the same sockets: ``AskTime`` (``TimeIs``), ``Look``
(``Looked``), ``Sample`` and ``SampleRead`` (``Sampled``).

Every message that concerns a call names ``request`` and ``attempt``; every message
that concerns a worker names its ``incarnation``, so that a late one can be told
from a current one. Handles and prompts are opaque here: the core never sees them.

Schema evolution: fields only grow, at the end, with defaults; unknown fields are
ignored by receivers. ``PROTOCOL_VERSION`` changes when a peer could misunderstand.
Nothing is ever pickled.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

PROTOCOL_VERSION = 1

MESSAGE_BYTES_MAX = 64 * 1024 * 1024
"""Frames larger than this are refused by every socket (ZMQ_MAXMSGSIZE)."""

Role = Literal["prefill", "decode", "mixed"]
BLOCK_HASH_BYTES = 8
LINKS_MAX = 256
"""Most links that one beat tells of."""
MOVE_ATTEMPTS = 1 << 30
KV_CHAINS_MAX = 4096
"""Most chains of blocks, of each kind, that one message tells of."""


class Message(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """Base of all messages. New fields go last and have defaults."""


class CallContext(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Who speaks: the workflow, run and agent that a call belongs to.

    A hint: it may make serving faster or slower, never wrong. ``parent``: the agent, or the
    thread, whose call led to this one. ``final``: the run ends with this call. ``thread``: one
    agent's chain of calls, to tell agents of one name apart that run side by side.
    ``tenant``: whose KV it is, as a digest of the request's cache salt.
    """

    workflow: str = ""
    run: str = ""
    agent: str = ""
    parent: str = ""
    final: bool = False
    thread: str = ""
    tenant: str = ""


class EngineFacts(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What a worker's engine is: compared at registration, used for placement.

    ``block_size`` and ``max_model_len`` are in tokens, ``kv_blocks`` counts blocks of
    ``block_size`` tokens. ``model_fingerprint`` is equal iff KV may be exchanged.
    ``kv_bytes_per_block`` is what one block weighs on the wire.
    """

    vllm_version: str
    model: str
    model_fingerprint: str
    block_size: int
    kv_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_bytes_per_block: int = 0
    kv_lease_s: float = 30.0
    partial_reads: bool = True
    """What it has cached of how a prompt begins can be read by others, and that of others by it."""
    computes_once: bool = True
    """It keeps a prefix cache, and no part of a step is all that a prompt gets."""
    kv_host_blocks: int = 0
    """Blocks that its host's memory holds, beside those of its cache."""


class Load(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """How busy a worker is, as its engine says. KV in blocks."""

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    prefill_tokens_total: int = 0
    decode_tokens_total: int = 0
    external_tokens_total: int = 0
    preemptions_total: int = 0
    garbage_frames_total: int = 0
    kv_blocks_pinned: int = 0
    """Kept for calls to come (``Retain``), and not in use: free for whoever needs them."""


class LinkLoad(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What a worker has read of the KV of ``source``, another worker, since they met.

    ``transfers``: NIXL's reads that are over; ``elapsed_s``: all their times together.
    ``in_flight_bytes``: held for calls that wait for them. ``bytes_per_s``: lately, 0 before
    anything large has moved; ``fixed_s``: what even a small read takes.
    """

    source: str
    transfers: int = 0
    bytes_total: int = 0
    elapsed_s: float = 0.0
    in_flight_bytes: int = 0
    bytes_per_s: float = 0.0
    fixed_s: float = 0.0


# --- worker -> core -----------------------------------------------------------


class Ready(Message, frozen=True, gc=False, tag=True):
    """A worker is up and asks to be taken in. Sent again until answered."""

    worker: str
    incarnation: str
    role: Role
    data_address: str
    facts: EngineFacts
    protocol_version: int = PROTOCOL_VERSION
    host: str = ""
    devices: str = ""
    side_channel: str = ""
    """``host:port`` where peers are to ask its engine for NIXL's metadata."""
    fixed: bool = False
    """Its role is not to be changed."""


class Beat(Message, frozen=True, gc=False, tag=True):
    """A worker is alive, and how busy it and the links to it are."""

    worker: str
    incarnation: str
    load: Load
    links: Annotated[list[LinkLoad], msgspec.Meta(max_length=LINKS_MAX)] = []


class KvRemoved(msgspec.Struct, frozen=True, gc=False):
    """Of a chain of blocks only the first ``kept_blocks`` are cached, if they are."""

    chain: bytes
    kept_blocks: int


class KvChanges(Message, frozen=True, gc=False, tag=True):
    """What has come into a worker's prefix cache, or gone, as chains of block hashes.

    ``sequence`` counts up from 0; after a gap the core asks for all (``KvResync``). ``reset``:
    nothing that was said before counts. ``host_stored``, ``host_removed``: the same of what its
    engine keeps in its host's memory.
    """

    worker: str
    incarnation: str
    sequence: int
    stored: Annotated[list[bytes], msgspec.Meta(max_length=KV_CHAINS_MAX)] = []
    removed: Annotated[list[KvRemoved], msgspec.Meta(max_length=KV_CHAINS_MAX)] = []
    reset: bool = False
    host_stored: Annotated[list[bytes], msgspec.Meta(max_length=KV_CHAINS_MAX)] = []
    host_removed: Annotated[list[KvRemoved], msgspec.Meta(max_length=KV_CHAINS_MAX)] = []


class Leaving(Message, frozen=True, gc=False, tag=True):
    """A worker stops on purpose; nothing more will come from it."""

    worker: str
    incarnation: str
    reason: str = ""


class Draining(Message, frozen=True, gc=False, tag=True):
    """A worker ends what it has begun and will leave then: it wants no more work. Sent again
    until it leaves."""

    worker: str
    incarnation: str


class Probed(Message, frozen=True, gc=False, tag=True):
    """Answer to ``Probe``: a handle for a small prompt, or why there is none."""

    worker: str
    incarnation: str
    probe: int
    handle: bytes = b""
    error: str = ""


class ProbeFinished(Message, frozen=True, gc=False, tag=True):
    """Answer to ``ProbeRead``: the KV arrived (``tokens_moved`` > 0), or why not."""

    worker: str
    incarnation: str
    probe: int
    elapsed_s: float = 0.0
    tokens_moved: int = 0
    error: str = ""


class RoleSet(Message, frozen=True, gc=False, tag=True):
    """Answer to ``SetRole``: the engine works as that role does from now on, or why not."""

    worker: str
    incarnation: str
    turn: int
    error: str = ""


# --- API process -> core --------------------------------------------------------


class Hello(Message, frozen=True, gc=False, tag=True):
    """An API process is up. ``api`` is unique per process start."""

    api: str
    protocol_version: int = PROTOCOL_VERSION
    model: str = ""


class ApiBeat(Message, frozen=True, gc=False, tag=True):
    """An API process is alive. ``open_calls`` counts calls it has not finished."""

    api: str
    open_calls: int = 0


class Submit(Message, frozen=True, gc=False, tag=True):
    """A call asks for a plan. Sent again, unchanged, until ``Plan`` or ``Rejected``.

    ``block_hashes``: the prompt's full blocks, ``BLOCK_HASH_BYTES`` each, chained and
    salted. ``aggregated``: may not be split over two workers. Calls with equal
    non-empty ``group`` are siblings (``n`` > 1) and go to one worker.
    ``priority``: lower is earlier. ``deadline_s``: seconds from now for the whole
    call, 0 for the cluster's default.
    """

    api: str
    request: str
    attempt: int
    prompt_tokens: int
    max_output_tokens: int
    block_hashes: bytes = b""
    aggregated: bool = False
    group: str = ""
    priority: int = 0
    deadline_s: float = 0.0
    context: CallContext = CallContext()


class Prefilled(Message, frozen=True, gc=False, tag=True):
    """The prefill worker is done and its handle goes to the decode worker now."""

    api: str
    request: str
    attempt: int


class Started(Message, frozen=True, gc=False, tag=True):
    """The first token came from the decode worker."""

    api: str
    request: str
    attempt: int


class Finished(Message, frozen=True, gc=False, tag=True):
    """A call ended; what really happened. ``outcome``: stop, length, abort, error, gone.

    ``prefill_cached_tokens``: found in the cache of whoever prefilled;
    ``moved_tokens``: came to the decode worker by KV transfer;
    ``local_cached_tokens``: found in the decode worker's own cache. ``undecoded``: over with
    the token that the prefill worker sampled; the decode worker never heard of it.
    ``pulled_tokens``: came from a peer's cache to whoever computed the rest of the prompt; where
    that is the decode worker they are among ``moved_tokens``.
    """

    api: str
    request: str
    attempt: int
    outcome: str
    output_tokens: int = 0
    prefill_cached_tokens: int = 0
    local_cached_tokens: int = 0
    moved_tokens: int = 0
    ttft_s: float = 0.0
    elapsed_s: float = 0.0
    undecoded: bool = False
    pulled_tokens: int = 0


class Failed(Message, frozen=True, gc=False, tag=True):
    """An attempt failed through no fault of the client: asks for another plan.

    ``worker`` is whom the API process holds responsible; ``generated_tokens`` is what
    the client has already got (they are part of the prompt of the next attempt).
    """

    api: str
    request: str
    attempt: int
    worker: str
    reason: str
    generated_tokens: int = 0


CheckedPhase = Literal["prefilling", "loading", "decoding", "gone", "pulling"]


class Checked(Message, frozen=True, gc=False, tag=True):
    """Answer to ``Check``: where the call stands in the API process."""

    api: str
    request: str
    attempt: int
    phase: CheckedPhase


class Pulled(Message, frozen=True, gc=False, tag=True):
    """The peer's handle for ``tokens`` of its cache goes to whoever computes the prompt now; with
    none of them it is computed without. ``missing``: these are all that the peer still had."""

    api: str
    request: str
    attempt: int
    tokens: int = 0
    missing: bool = False
    late: bool = False
    """The peer did not say in time."""


class MoveReady(Message, frozen=True, gc=False, tag=True):
    """The target of ``Move`` has cached ``tokens`` of prompt and answer that the source had: the
    plan for the next attempt, there, may come. Sent again until it does. ``generated_tokens``:
    as in ``Failed``; ``moved_tokens``: those that had to be brought."""

    api: str
    request: str
    attempt: int
    number: int
    tokens: int = 0
    generated_tokens: int = 0
    moved_tokens: int = 0


class MoveDeclined(Message, frozen=True, gc=False, tag=True):
    """The call goes on where it is, and why. ``for_good``: it can go on nowhere else."""

    api: str
    request: str
    attempt: int
    number: int
    reason: str
    for_good: bool = False


ErrandOutcome = Literal["done", "failed", "unknown"]


class ErrandDone(Message, frozen=True, gc=False, tag=True):
    """An errand is over. ``unknown``: this process has not the tokens for it."""

    api: str
    errand: int
    outcome: ErrandOutcome
    computed_tokens: int = 0
    elapsed_s: float = 0.0
    moved_tokens: int = 0


class Inspect(Message, frozen=True, gc=False, tag=True):
    """Anyone allowed to connect asks for a ``Snapshot``."""

    token: int = 0


class MoveCalls(Message, frozen=True, gc=False, tag=True):
    """Running calls of a worker are to go on elsewhere: of ``request`` only, if that is not empty;
    on ``target`` only, likewise. Answered with ``WorkflowAnswer``: how many are being moved and
    how many stay for now."""

    token: int
    worker: str
    request: str = ""
    target: str = ""


class DeclareWorkflow(Message, frozen=True, gc=False, tag=True):
    """Anyone allowed to connect declares a workflow, in place of one of that name.

    ``graph``: a ``workflow.graph.Graph`` as JSON. As all questions about workflows it is
    answered with ``WorkflowAnswer``, and may be asked again with the same ``token``.
    """

    token: int
    name: str
    graph: bytes


class StaticPrefix(msgspec.Struct, frozen=True, gc=False):
    """With what all prompts of a declared agent begin: how many tokens, and the hashes of their
    full blocks as in ``Submit``, without salt."""

    agent: str
    tokens: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
    block_hashes: bytes = b""


class StaticPrefixes(Message, frozen=True, gc=False, tag=True):
    """An API process has templated the static prompts of a declared workflow.

    ``graph_digest``: of the graph that they are of (``workflow.registry.digest_of``); if another
    one is declared by now, they are refused.
    """

    token: int
    name: str
    graph_digest: str
    prefixes: list[StaticPrefix]


class DropWorkflow(Message, frozen=True, gc=False, tag=True):
    """A workflow is not declared any more, and what ``tenant`` taught of it is forgotten."""

    token: int
    name: str
    tenant: str = ""


class ListWorkflows(Message, frozen=True, gc=False, tag=True):
    """Which workflows are declared, or known of a tenant?"""

    token: int
    tenant: str = ""


class ShowWorkflow(Message, frozen=True, gc=False, tag=True):
    """What is known of a tenant's workflow? ``learned``: all of it, fit to be imported."""

    token: int
    name: str
    tenant: str = ""
    learned: bool = False


class ShowForecast(Message, frozen=True, gc=False, tag=True):
    """How much will be asked of the cluster, and how much of it by a tenant's workflows?"""

    token: int
    tenant: str = ""


class ShowFigures(Message, frozen=True, gc=False, tag=True):
    """How good are predictions, and what is forecast, as figures for metrics?"""

    token: int


class ImportWorkflow(Message, frozen=True, gc=False, tag=True):
    """Take over what ``ShowWorkflow`` with ``learned`` has answered elsewhere."""

    token: int
    name: str
    record: bytes
    tenant: str = ""


class StartRun(Message, frozen=True, gc=False, tag=True):
    """A run of a workflow begins now. ``deadline_s``: seconds from now, 0 for none;
    ``priority``: of its calls that have none of their own, lower is earlier."""

    token: int
    workflow: str
    run: str
    tenant: str = ""
    deadline_s: float = 0.0
    priority: int = 0


class CancelRun(Message, frozen=True, gc=False, tag=True):
    """All calls of a run are to be stopped, and further ones refused."""

    token: int
    workflow: str
    run: str
    tenant: str = ""


class EndRun(Message, frozen=True, gc=False, tag=True):
    """A run gets no more calls; those that are open go on. ``completed``: it came to its own
    end, so that its end is worth learning."""

    token: int
    workflow: str
    run: str
    tenant: str = ""
    completed: bool = True


class ShowCall(Message, frozen=True, gc=False, tag=True):
    """Why did a tenant's call go where it went? ``request``: its id, or that of its response.

    Answered with ``WorkflowAnswer``, whose body is an ``explaining.Explained``.
    """

    token: int
    request: str
    tenant: str = ""


class ShowRebalance(Message, frozen=True, gc=False, tag=True):
    """Which worker does what and why, what would be better, and what was decided before?"""

    token: int


class SetRebalance(Message, frozen=True, gc=False, tag=True):
    """Change how roles follow demand. ``settings``: fields of ``limits.Rebalance`` as JSON; those
    that are left out stay as they are."""

    token: int
    settings: bytes


class TurnWorker(Message, frozen=True, gc=False, tag=True):
    """A worker is to have this role from now on."""

    token: int
    worker: str
    role: str


class DrainWorker(Message, frozen=True, gc=False, tag=True):
    """A worker is to get no more work; what it has begun it ends. ``undo``: it gets work again."""

    token: int
    worker: str
    undo: bool = False


# --- core -> worker -------------------------------------------------------------


class Welcome(Message, frozen=True, gc=False, tag=True):
    """Taken in. ``beat_interval_s``: how often to beat. ``contexts``: an API process is to remember
    the tokens of calls of runs for a while, for errands."""

    beat_interval_s: float
    core: str
    block_size: int = 0
    contexts: bool = False


class Refused(Message, frozen=True, gc=False, tag=True):
    """Not taken in, and why; the peer should stop."""

    reason: str


class Unknown(Message, frozen=True, gc=False, tag=True):
    """The core does not know the peer (it restarted): say ``Ready``/``Hello`` again."""

    core: str


class Probe(Message, frozen=True, gc=False, tag=True):
    """Prefill a small random prompt and answer with its handle."""

    probe: int
    incarnation: str
    seed: int
    prompt_tokens: int


class ProbeRead(Message, frozen=True, gc=False, tag=True):
    """Pull that prompt's KV from the peer behind ``handle`` and answer how it went."""

    probe: int
    incarnation: str
    seed: int
    prompt_tokens: int
    source: str
    handle: bytes


class KvResync(Message, frozen=True, gc=False, tag=True):
    """The core has lost count of ``KvChanges``: say anew what is cached, from a reset on."""

    incarnation: str


class Pin(msgspec.Struct, frozen=True, gc=False):
    """Keep what an ended request has left in the cache from eviction, for ``hold_s`` seconds from
    now, whatever was said of it before. ``name``: ``engine_request_id``. Where requests need the
    room, the pins of the least worth are given up first: ``worth`` for a second since it was used
    last, which was ``age_s`` ago, half of it for two, and so on."""

    name: str
    hold_s: float
    worth: float
    age_s: float = 0.0


class Retain(Message, frozen=True, gc=False, tag=True):
    """Pins to set, renew or shorten, and names of those to release. ``unneeded``: what these have
    left will not be asked for again, and is to be evicted before everything else, if nothing else
    goes on from it. Unknown names do nothing."""

    incarnation: str
    pins: list[Pin] = []
    released: list[str] = []
    unneeded: list[str] = []


class SetRole(Message, frozen=True, gc=False, tag=True):
    """Work as a role does from now on. Sent again, with the same ``turn``, until answered.

    ``chunk_tokens``: of one prompt, how many the engine computes in a step at most beside other
    requests; 0: as its own arguments say.
    """

    incarnation: str
    turn: int
    role: Role
    chunk_tokens: int = 0


class Leave(Message, frozen=True, gc=False, tag=True):
    """The cluster is being stopped: finish up and exit."""

    incarnation: str
    reason: str = ""


# --- core -> API process ----------------------------------------------------------


class Alive(Message, frozen=True, gc=False, tag=True):
    """Answer to ``ApiBeat``: the core lives, and knows the API process."""

    core: str


class WorkerUp(Message, frozen=True, gc=False, tag=True):
    """A worker can be used from now on: connect to its data address."""

    worker: str
    incarnation: str
    role: Role
    data_address: str
    facts: EngineFacts


class WorkerGone(Message, frozen=True, gc=False, tag=True):
    """A worker is lost or left: what it was doing will not be finished."""

    worker: str
    incarnation: str
    reason: str


class Placed(msgspec.Struct, frozen=True, gc=False):
    """A worker in a plan."""

    worker: str
    incarnation: str


class Plan(Message, frozen=True, gc=False, tag=True):
    """Where a call runs. ``prefill`` is None for a local prefill on ``decode``.

    KV room on the decode worker is reserved from now on. ``pull_worker``: a peer from whose cache
    the prompt's first ``pull_tokens`` tokens, whole blocks, come to whoever computes the rest.
    """

    request: str
    attempt: int
    decode: Placed
    prefill: Placed | None = None
    reason: str = ""
    pull_worker: Placed | None = None
    pull_tokens: int = 0


class Rejected(Message, frozen=True, gc=False, tag=True):
    """No plan. ``status`` is the HTTP status to answer with (429, 503 or 504; 410 if the call's
    run is cancelled)."""

    request: str
    attempt: int
    status: int
    reason: str
    retry_after_s: float = 0.0


class Check(Message, frozen=True, gc=False, tag=True):
    """A phase took long: is the call still there, and in which phase?"""

    request: str
    attempt: int


class Move(Message, frozen=True, gc=False, tag=True):
    """A running call is to go on on ``target``, where room is reserved: bring its KV there from the
    worker that decodes it, which goes on meanwhile. Nothing changes before the plan for the next
    attempt. ``number`` counts up within one core."""

    request: str
    attempt: int
    number: int
    target: Placed
    reason: str = ""


class Stop(Message, frozen=True, gc=False, tag=True):
    """The call is over its deadline or beyond its attempts: end it with an error."""

    request: str
    attempt: int
    status: int
    reason: str


class Errand(Message, frozen=True, gc=False, tag=True):
    """Work for calls that have not come yet, to be carried out within ``budget_s`` and answered
    with ``ErrandDone``. ``warm``: compute the static prompt of ``agent`` in the declared graph on
    ``target``. ``prefetch``: move what ``source`` has cached of the first ``tokens`` tokens, whole
    blocks, of the prompt of ``call``, a request of the API process, to ``target``."""

    errand: int
    kind: Literal["warm", "prefetch"]
    target: Placed
    graph_digest: str
    agent: str
    budget_s: float
    source: Placed | None = None
    call: str = ""
    tokens: int = 0


class DropErrand(Message, frozen=True, gc=False, tag=True):
    """Stop an errand at once, without an answer: a call needs the worker."""

    errand: int


# --- core -> whoever asked ----------------------------------------------------------


class WorkerStatus(msgspec.Struct, frozen=True, gc=False):
    """One row of ``pythia status``."""

    worker: str
    incarnation: str
    role: Role
    state: str
    host: str
    devices: str
    load: Load
    kv_blocks: int
    block_size: int
    calls: int
    kv_blocks_reserved: int
    last_beat_age_s: float
    warm_peers: int
    peers: int
    handles: int = 0
    """Prompts it holds for calls that have no token yet."""
    data_address: str = ""
    side_channel: str = ""
    turning: str = ""
    """How far it is with a change of its role, or with a drain; empty if there is none."""


class LinkStatus(msgspec.Struct, frozen=True, gc=False):
    """An ordered pair of workers: how far its warm-up is, and what has moved (``LinkLoad``)."""

    source: str
    target: str
    state: str
    transfers: int
    bytes_total: int
    elapsed_s: float
    in_flight_bytes: int
    bytes_per_s: float
    fixed_s: float


class CallStatus(msgspec.Struct, frozen=True, gc=False):
    """One recent or live call."""

    request: str
    phase: str
    attempt: int
    context: CallContext
    prefill: str
    decode: str
    prompt_tokens: int
    output_tokens: int = 0
    prefill_cached_tokens: int = 0
    local_cached_tokens: int = 0
    moved_tokens: int = 0
    ttft_s: float = 0.0
    elapsed_s: float = 0.0
    outcome: str = ""
    reason: str = ""
    pull: str = ""
    pulled_tokens: int = 0


class RunStatus(msgspec.Struct, frozen=True, gc=False):
    """One live run of a workflow. ``deadline_s``: seconds from now, None without one."""

    tenant: str
    workflow: str
    run: str
    calls: int
    open_calls: int
    elapsed_s: float
    silent_s: float
    explicit: bool = False
    deadline_s: float | None = None
    priority: int = 0


class Snapshot(Message, frozen=True, gc=False, tag=True):
    """The core's view of the cluster, for people and programs to look at."""

    token: int
    core: str
    model: str
    uptime_s: float
    workers: list[WorkerStatus]
    apis: int
    queued: int
    queue_limit: int
    active: int
    calls: list[CallStatus]
    counters: dict[str, int]
    links: list[LinkStatus] = []
    runs: list[RunStatus] = []
    """Of the live ones, the youngest."""
    runs_live: int = 0
    unix_time_s: float = 0.0
    """The wall clock of the core's host when this was sent."""


class WorkflowAnswer(Message, frozen=True, gc=False, tag=True):
    """Answer to any question about workflows. ``status``: as in HTTP; ``body``: JSON, if it went
    well; ``problems``: why not. What was to be kept is on disk when this says that it is."""

    token: int
    status: int
    body: bytes = b""
    problems: list[str] = []


# --- API process -> worker (data) ---------------------------------------------------


class Prefill(Message, frozen=True, gc=False, tag=True):
    """Compute the prompt's KV, hold it, answer ``PrefillDone``. Request frames follow.

    ``first_token``: sample it as well, with the request's own options. ``handle``: the prompt's
    beginning is read by it, the rest computed. ``cached_only``: compute nothing; hold what the
    engine has cached of the prompt, and a token more.
    """

    request: str
    attempt: int
    incarnation: str
    first_token: bool = False
    handle: bytes = b""
    cached_only: bool = False


class Decode(Message, frozen=True, gc=False, tag=True):
    """Generate, pulling the prompt's KV by ``handle`` if there is one. Request frames follow."""

    request: str
    attempt: int
    incarnation: str
    handle: bytes = b""


class Abort(Message, frozen=True, gc=False, tag=True):
    """Forget these attempts, whatever they are doing. Each is (request, attempt)."""

    calls: list[tuple[str, int]]


class Discard(Message, frozen=True, gc=False, tag=True):
    """This handle will not be read: tell its owner to free the blocks."""

    request: str
    attempt: int
    incarnation: str
    handle: bytes


class Utility(Message, frozen=True, gc=False, tag=True):
    """Call one of the engine's utility methods (LoRA, caches). Argument frames follow."""

    call: int
    method: str


# --- whoever examines the cluster <-> worker (data) ---------------------------------


class AskTime(Message, frozen=True, gc=False, tag=True):
    """What time is it there, and what has been read? Answered at once, with ``TimeIs``."""

    call: int


class TimeIs(Message, frozen=True, gc=False, tag=True):
    """Answer to ``AskTime``: the worker's wall clock, and the links to it as in ``Beat``."""

    call: int
    unix_time_s: float
    links: list[LinkLoad] = []


class Peer(msgspec.Struct, frozen=True, gc=False):
    """Another worker, and where it says that it is to be found."""

    worker: str
    data_address: str
    side_channel: str
    engine: str = ""


class Look(Message, frozen=True, gc=False, tag=True):
    """Who is there, and which of ``peers`` can it reach? Answered with ``Looked``."""

    call: int
    peers: Annotated[list[Peer], msgspec.Meta(max_length=LINKS_MAX)] = []


class Transport(msgspec.Struct, frozen=True, gc=False):
    """A way that UCX has found to move memory there, over one of its devices."""

    name: str
    device: str


class Reach(msgspec.Struct, frozen=True, gc=False):
    """Why a peer's data address and side channel can't be reached; empty if they can."""

    worker: str
    data_error: str = ""
    side_error: str = ""


class HostFacts(msgspec.Struct, frozen=True, gc=False):
    """What is installed and to be had on a host, as a process there sees it.

    ``versions`` by name (pythia, vllm, nixl, ucx); ``ucx_tls`` and ``ucx_net_devices`` as they
    are set, empty for UCX's own choice; ``transports_error``: why UCX could not be asked.
    """

    versions: dict[str, str]
    ucx_tls: str = ""
    ucx_net_devices: str = ""
    transports: list[Transport] = []
    transports_error: str = ""


class Looked(Message, frozen=True, gc=False, tag=True):
    """Answer to ``Look``. ``engine``: what its handles call it."""

    call: int
    engine: str
    facts: EngineFacts
    host: HostFacts
    reaches: list[Reach] = []


class Sample(Message, frozen=True, gc=False, tag=True):
    """Prefill a random prompt and hold its KV, to be read once. Answered with ``Sampled``."""

    call: int
    seed: int
    prompt_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class SampleRead(Message, frozen=True, gc=False, tag=True):
    """Pull that prompt's KV, from an engine that was met before. Answered with ``Sampled``."""

    call: int
    seed: int
    prompt_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    handle: bytes


class Sampled(Message, frozen=True, gc=False, tag=True):
    """Answer to ``Sample``, with a handle, and to ``SampleRead``; or why it did not work."""

    call: int
    handle: bytes = b""
    tokens_moved: int = 0
    error: str = ""


# --- worker -> API process (data) ---------------------------------------------------


class PrefillDone(Message, frozen=True, gc=False, tag=True):
    """The prompt's KV is held behind ``handle``, for ``lease_s`` seconds from
    ``held_at_unix_s`` (the worker's wall clock). With less than ``margin_s`` left the
    handle must not be sent on.

    Frames of the engine's output follow if the first token was asked for. If the call is over
    with it, so says the output, and there need not be a handle. ``moved_tokens``: those of the
    cached ones that were read by the handle that came with the prompt."""

    request: str
    attempt: int
    incarnation: str
    handle: bytes
    prompt_tokens: int
    cached_tokens: int
    lease_s: float
    held_at_unix_s: float = 0.0
    margin_s: float = 10.0
    moved_tokens: int = 0


class Deltas(Message, frozen=True, gc=False, tag=True):
    """What one engine step produced for one API process. Output frames follow.

    The outputs' request ids are ``engine_request_id(request, attempt)``.
    """

    incarnation: str


class CallFailed(Message, frozen=True, gc=False, tag=True):
    """An attempt could not be carried out. ``retryable``: another worker might.
    ``handle_refused``: this one might, too, without the handle."""

    request: str
    attempt: int
    incarnation: str
    reason: str
    retryable: bool = True
    handle_refused: bool = False


class UtilityReply(Message, frozen=True, gc=False, tag=True):
    """Result of a ``Utility``; ``error`` is empty on success. Result frames follow."""

    call: int
    incarnation: str
    error: str = ""


AboutRoles = ShowRebalance | SetRebalance | TurnWorker | DrainWorker
"""Questions, answered with ``WorkflowAnswer`` as those about workflows."""
WorkerToCore = Ready | Beat | KvChanges | Leaving | Probed | ProbeFinished | Draining | RoleSet
ApiToCore = (
    Hello
    | ApiBeat
    | Submit
    | Pulled
    | Prefilled
    | Started
    | Finished
    | Failed
    | Checked
    | ErrandDone
    | MoveReady
    | MoveDeclined
)
AboutWorkflows = (
    DeclareWorkflow
    | StaticPrefixes
    | DropWorkflow
    | ListWorkflows
    | ShowWorkflow
    | ShowForecast
    | ShowFigures
    | ImportWorkflow
    | StartRun
    | CancelRun
    | EndRun
)
Question = AboutWorkflows | ShowCall | AboutRoles
ToCore = WorkerToCore | ApiToCore | Inspect | Question | MoveCalls
CoreToWorker = Welcome | Refused | Unknown | Probe | ProbeRead | KvResync | SetRole | Leave | Retain
CoreToApi = (
    Welcome
    | Refused
    | Unknown
    | Alive
    | WorkerUp
    | WorkerGone
    | Plan
    | Rejected
    | Check
    | Stop
    | Snapshot
    | Move
    | WorkflowAnswer
    | Errand
    | DropErrand
)
ApiToWorker = Prefill | Decode | Abort | Discard | Utility
WorkerToApi = PrefillDone | Deltas | CallFailed | UtilityReply
ExaminerToWorker = AskTime | Look | Sample | SampleRead
WorkerToExaminer = TimeIs | Looked | Sampled | CallFailed

encode = msgspec.msgpack.Encoder().encode
decode_to_core = msgspec.msgpack.Decoder(ToCore).decode
decode_core_to_worker = msgspec.msgpack.Decoder(CoreToWorker).decode
decode_core_to_api = msgspec.msgpack.Decoder(CoreToApi).decode
decode_api_to_worker = msgspec.msgpack.Decoder(ApiToWorker).decode
decode_to_worker = msgspec.msgpack.Decoder(ApiToWorker | ExaminerToWorker).decode
decode_worker_to_examiner = msgspec.msgpack.Decoder(WorkerToExaminer).decode
decode_worker_to_api = msgspec.msgpack.Decoder(WorkerToApi).decode
decode_snapshot = msgspec.msgpack.Decoder(Snapshot).decode
decode_workflow_answer = msgspec.msgpack.Decoder(WorkflowAnswer).decode


def engine_request_id(request: str, attempt: int) -> str:
    """The id an engine knows an attempt by; unique per attempt."""
    return f"{request}~{attempt}"


def pull_attempt(attempt: int) -> int:
    """What the peer that an attempt pulls from knows as the attempt: attempts count from 1, so
    none of its own is called that."""
    return -attempt


def move_attempt(number: int) -> int:
    """What both workers know as the attempt when a call is moved, for the ``number``-th time: no
    attempt of its own nor of a pull is called that."""
    return -(MOVE_ATTEMPTS + number)


def split_engine_request_id(engine_id: str) -> tuple[str, int]:
    """Inverse of ``engine_request_id``; ValueError for anything else."""
    request, _, attempt = engine_id.rpartition("~")
    if not request:
        raise ValueError(f"not an engine request id: {engine_id!r}")
    return request, int(attempt)

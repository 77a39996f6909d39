"""Every bound the core works within, in one frozen struct.

Read once from the cluster's configuration (``limits:`` and ``placement:``) and handed
down; nothing else in the core holds a tunable number.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Positive = Annotated[int, msgspec.Meta(gt=0)]
NotNegative = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
Factor = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of the core. Times in seconds, sizes in calls, tokens or blocks."""

    queue_calls: Positive = 1024
    """Calls that may wait for room; the next one is answered 429."""
    calls_per_worker: Positive = 256
    """Calls planned onto one decode worker at a time."""
    prefills_per_worker: Positive = 8
    """Calls planned onto one prefill worker at a time."""
    attempts: Positive = 4
    """Plans a call may get before it is given up."""
    queue_s: Seconds = 120.0
    """Longest wait for a plan; then 503."""
    prefill_s: Seconds = 120.0
    """Longest time from plan to ``Prefilled`` before the core asks, then replans."""
    first_token_s: Seconds = 120.0
    """Longest time from plan or ``Prefilled`` to ``Started`` before the core asks."""
    pull_s: Seconds = 3.0
    """Longest time that a peer may take to name what it has cached; then it is computed."""
    decode_check_s: Seconds = 60.0
    """How long a decode may go unheard of before the core asks."""
    check_s: Seconds = 10.0
    """How long an answer to ``Check`` may take before the call is closed."""
    call_s: Seconds = 1800.0
    """Longest life of a call from its first ``Submit``; then 504."""
    beat_s: Seconds = 1.0
    """Interval of beats."""
    beats_missed: Positive = 5
    """Beats a peer may miss before it is lost."""
    probe_s: Seconds = 30.0
    """Longest time for one probe of a pair of workers."""
    probe_attempts: Positive = 3
    """Probes of one pair before it is left cold."""
    workers: Positive = 1024
    """Workers that may register."""
    apis: Positive = 256
    """API processes that may register."""
    recent_calls: NotNegative = 256
    """Ended calls kept for people to look at."""
    request_id_bytes: Positive = 256
    """Longest request id accepted from an API process."""
    prompt_blocks: Positive = 65536
    """Most block hashes read from one ``Submit``."""
    sessions: Positive = 16384
    """Sessions whose last decode worker is remembered, where ``Placement.sticky`` asks for it."""
    story_lines: Positive = 32
    """Moves of a call or worker that are remembered for error messages."""
    admission_s: Seconds = 120.0
    """Longest wait of a new run's calls for runs that have begun, where ``Placement.admission``
    asks for it; then they wait ``queue_s`` for a plan as others do."""
    explained_calls: NotNegative = 256
    """Calls whose decisions are kept for people to ask about."""
    late_peer_s: Seconds = 60.0
    """How long nothing is pulled from a peer that was late."""
    move_s: Seconds = 10.0
    """Longest time until a running call's KV is where it is to go on; then it stays where it is."""
    moves_per_worker: Positive = 8
    """Running calls that are moved away from one worker at a time."""

    @property
    def wait_s(self) -> float:
        """Longest wait of any call for a plan."""
        return self.queue_s + self.admission_s


class Ratio(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many workers prefill and how many decode. Times in seconds, sizes in tokens.

    ``reactive`` turns workers of the roles ``prefill`` and ``decode`` into the other one when
    one side has been overloaded for a while and the other can spare a worker, and back when
    that is over; see ``policy.ratio``. Workers with the role ``mixed`` do both and stay as they
    are.
    """

    mode: Literal["static", "reactive"] = "static"
    interval_s: Seconds = 2.0
    """Time between two looks at the load."""
    looks: Positive = 3
    """How often in a row a side must be found overloaded before a worker turns to it."""
    dwell_s: Seconds = 30.0
    """Least time between two turns of one worker, and between any two turns."""
    prefill_workers_min: Positive = 1
    """Workers with the role prefill that are left at least."""
    decode_workers_min: Positive = 1
    """Workers with the role decode that are left at least."""
    prefill_tokens_high: Positive = 32768
    """Prompt tokens yet to compute per prefill worker from which prefill is overloaded."""
    decode_kv_high: Share = 0.9
    """Share of the decode workers' KV in use from which decode is overloaded."""
    decode_itl_high_s: Seconds = 0.025
    """Mean time between tokens from which decode is overloaded, whatever KV is in use: what
    has been promised, or less of it."""
    spare: Share = 0.8
    """A side can spare a worker if its load per worker, with one less, stays below this
    share of what counts as overloaded, and its prefill workers below this share of being
    busy all the time."""


class Rebalance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Roles that follow the demand that is expected; see ``policy.rebalance``. Times in seconds.

    ``advisory`` decides and says so, ``auto`` also turns workers. Workers with the role ``mixed``
    and those that are ``fixed`` stay as they are.
    """

    mode: Literal["off", "advisory", "auto"] = "off"
    interval_s: Seconds = 2.0
    """Time between two decisions."""
    horizon_s: Seconds = 10.0
    """How far ahead demand is looked at."""
    dwell_s: Seconds = 20.0
    """Least time between two turns of one worker."""
    itl_s: Seconds = 0.03
    """What has been promised of the mean time between tokens: what a decode worker can take."""
    margin: Factor = 0.05
    """By how much another ratio must be better, beyond what turning costs: as a share of one
    side's capacity that is missing."""
    prefill_workers_min: Positive = 1
    decode_workers_min: Positive = 1
    """Workers of each role that are left at least."""
    drain_s: Seconds = 120.0
    """How long a worker that turns may take to end its old work; then it turns all the same."""
    step_s: Seconds = 5.0
    """How long the worker may take to answer, and the canary to come back, before it is asked
    again; after ``tries`` of them it gets its old role back."""
    tries: Positive = 3
    prefill_chunk_tokens: NotNegative = 0
    decode_chunk_tokens: NotNegative = 512
    """Tokens of one prompt that an engine computes in a step at most, by role, beside other
    requests; 0: as its own arguments say."""
    decisions: Positive = 64
    """Decisions kept for people to look at."""
    move_decodes: bool = False
    """A worker that turns to prefill has its decodes go on elsewhere, with their KV, as one that is
    drained does."""


Policy = Literal["pythia", "least_kv", "round_robin", "least_loaded", "cache_aware", "cost"]


class Placement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the placement policy is told. Tokens and fractions.

    The defaults are Pythia's own policy. Every part of it can be replaced or switched off
    alone: other policies are here to be compared with.
    """

    policy: Policy = "pythia"
    """``pythia`` chooses the decode worker and the way to have the prompt's KV there together, by
    what they cost; see ``policy.joint``. The others choose the decode worker among those with
    room, see ``policy.decode_choice``, and then whether and where to prefill elsewhere."""
    prefill_policy: Literal["least_tokens", "least_loaded", "round_robin"] = "least_tokens"
    """Not ``pythia``: how the prefill worker is chosen among those with room; see
    ``policy.prefill_choice``."""
    disaggregated: Literal["conditional", "always", "never"] = "conditional"
    """When a dedicated prefill worker computes a prompt: if that pays (``pythia``) or from
    ``remote_prefill_min_tokens`` on, whenever there is one, or never."""
    remote_prefill_min_tokens: NotNegative = 512
    """Not ``pythia``: prompt tokens not cached on the chosen decode worker from which a
    dedicated prefill worker is used; below it the decode worker prefills itself."""
    reserve: bool = True
    """Calls wait in the core until KV room is free for them on their workers. Otherwise they
    are sent at once, and engines let them wait and preempt them."""
    reserve_output_tokens: Positive = 256
    """Output room reserved on the decode worker: the smaller of this and the call's limit."""
    kv_headroom_fraction: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    """Share of a decode worker's KV blocks that is never reserved: nothing for ``pythia``, which
    reckons with what caches forget; other policies are better off with some."""
    compared_workers: Positive = 32
    """``pythia``, ``least_kv``: in a cluster of more workers only about so many are compared for
    a call: the least loaded, those with the most room, those that hold the most of the prompt."""
    prefill_workers_decode: bool | None = None
    """``pythia``: a call may be decoded on a prefill worker, too, if that costs least. None: unless
    ``rebalance`` turns workers, which keeps promises better with roles kept apart."""
    work_price: Factor = 3.0
    """``pythia``: how much it counts that prompts hold up calls that come later."""
    forgotten: Factor = 3.0
    """``pythia``: how much it counts that caches forget what somebody may ask for."""
    siblings_together: bool = True
    """Calls of one group go to one decode worker while it has room."""
    single_flight: bool = True
    """A prompt counts as held by whoever has begun to compute it: calls that share a prefix with
    it and come meanwhile go there, where the engine computes it once."""
    pulls: bool = True
    """``pythia``: what a peer has cached of a prompt may be read from it by whoever computes the
    rest."""
    cached_weight: Factor = 0.1
    """``least_kv``: having the whole prompt cached is worth this much of a worker's KV memory
    in load."""
    sticky: bool = False
    """``cache_aware``: an agent of a run that follows itself goes where its last call went, if
    no other worker in reach holds more of the prompt."""
    affinity_cached_min: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.3
    """``cache_aware``: the least share of a prompt that counts if it is cached."""
    affinity_load_max: Factor = 2.0
    """``cache_aware``: caches and stickiness count up to this many times the mean open calls."""
    affinity_calls_min: NotNegative = 8
    """``cache_aware``: and with fewer open calls than this in any case."""
    overlap_weight: Factor = 1.0
    """``cost``: what a block to prefill costs, in blocks that are being decoded."""
    temperature: Factor = 0.0
    """``cost``: 0 takes the cheapest worker; above it draws by a softmax over the costs."""
    ratio: Ratio = Ratio()
    """How many workers prefill and how many decode, by load that was seen."""
    retention: bool = True
    """What calls have left in caches is kept from eviction while that is worth it, and what will
    not be asked for again is evicted first."""
    retained_share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.8
    """Of a worker's KV blocks, at most so many are kept so."""
    warm_up: bool = False
    """Static prompts of declared agents are computed on idle workers before a call asks."""
    prefetch: bool = False
    """``pythia``: what the next call of a run is likely to begin with is moved to the idle worker
    where it would be decoded, before it comes."""

    order: Literal["runs", "arrival"] = "arrival"
    """Of calls that wait, behind explicit priority and fairness: first come, first served, or by
    how much their runs have still to do and by deadlines. Where nothing is reserved nobody waits in
    the core, and there is no order."""
    aging_s: Seconds = 60.0
    """``runs``: how much later a call may come and still be served before another one."""
    admission: bool = True
    """New runs wait while those that have begun need the KV that there is."""
    fairness: bool = True
    """Of tenants whose calls wait the one goes first that has been served least."""
    tenant_weights: dict[str, Share] = {}
    """What a tenant's share is worth, by the digest that it is known by; 1 for all others."""
    token_gap_s: Factor = 0.0
    """``pythia``: a worker with the role decode computes prompts itself only as far as the mean
    time between tokens of what it decodes stays below this, if another one can; 0: as it costs.
    With ``prefill_workers_decode`` one with the role prefill, too, and it decodes only what it can
    within this."""
    rebalance: Rebalance = Rebalance()
    """How many workers prefill and how many decode, by demand that is expected."""
    host_bytes_per_s: Annotated[float, msgspec.Meta(gt=0.0)] = 20e9
    """``pythia``: how fast KV comes back from a worker's host, where workers keep any there
    (``kv_host_gib``)."""

    @property
    def gap_s(self) -> float:
        """``token_gap_s``; roles that follow demand need one: what has been promised."""
        promised_s = self.rebalance.itl_s if self.rebalance.mode == "auto" else 0.0
        return self.token_gap_s or promised_s

    @property
    def roles_shared(self) -> bool:
        """Whether workers with the role prefill may decode beside others."""
        wanted = self.prefill_workers_decode
        if wanted is None:
            wanted = self.rebalance.mode != "auto"
        return self.policy == "pythia" and wanted and self.disaggregated != "always"

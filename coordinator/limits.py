"""Every bound the core works within, in one frozen struct.

Read once from the cluster's configuration (``limits:`` and ``placement:``) and handed
down; nothing else in the core holds a tunable number.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

Positive = Annotated[int, msgspec.Meta(gt=0)]
NotNegative = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]


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
    story_lines: Positive = 32
    """Moves of a call or worker that are remembered for error messages."""


class Placement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the placement policy is told. Tokens and fractions."""

    remote_prefill_min_tokens: NotNegative = 512
    """Prompt tokens not cached on the chosen decode worker from which a dedicated
    prefill worker is used; below it the decode worker prefills itself."""
    reserve_output_tokens: Positive = 256
    """Output room reserved on the decode worker: the smaller of this and the call's limit."""
    kv_headroom_fraction: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.05
    """Share of a decode worker's KV blocks that is never reserved."""

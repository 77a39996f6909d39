"""What a replay of a workload leaves behind: the same records from the simulator and from a
live cluster, so that one report reads both.

Times are seconds since the replay began, on one clock.
"""

from __future__ import annotations

from math import exp, floor, log

import msgspec

from coordinator.cost import Tier
from coordinator.protocol import Role


class CallRecord(msgspec.Struct, gc=False, omit_defaults=True):
    """One call. ``outcome`` is ``Finished.outcome``, or ``rejected`` (``status`` says how).

    ``due_s``: when the client sent it. Cached, moved and computed tokens are of the prompt:
    ``prefill_cached_tokens`` found in the cache of whoever prefilled, ``local_cached_tokens``
    on the decode worker, ``moved_tokens`` pulled by it, ``computed_tokens`` computed for this
    call anywhere, over all attempts and preemptions (more than the prompt where work was lost).
    """

    run: int
    call: int
    due_s: float
    agent: str = ""
    planned_s: float = 0.0
    first_token_s: float = 0.0
    ended_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefill: str = ""
    decode: str = ""
    prefill_cached_tokens: int = 0
    local_cached_tokens: int = 0
    moved_tokens: int = 0
    computed_tokens: int = 0
    attempts: int = 1
    outcome: str = ""
    status: int = 0
    loaded_s: float = 0.0
    """When the decode worker had the KV and its own first token, where a prefill worker made
    the client's first one; else 0."""
    pulled_tokens: int = 0
    """From a peer's cache, to whoever prefilled."""

    @property
    def ttft_s(self) -> float:
        """Time to first token; of a call that has one."""
        return self.first_token_s - self.due_s

    @property
    def itl_s(self) -> float:
        """Mean time between tokens (TPOT); of a call with two tokens and more."""
        return (self.ended_s - self.first_token_s) / (self.output_tokens - 1)


class RunRecord(msgspec.Struct, gc=False, omit_defaults=True):
    """One run. ``arrival_s``: when it arrived, or in a closed loop when the run that it follows
    had ended; pauses before its first calls are counted from then. ``finished``: all its calls
    were served."""

    run: int
    id: str
    workflow: str
    arrival_s: float
    ended_s: float = 0.0
    calls: int = 0
    think_s: float = 0.0
    """Of its completion time, pauses that no server could have shortened: the longest path of
    thinking alone."""
    finished: bool = False

    @property
    def completion_s(self) -> float:
        """From its arrival to the end of its last call."""
        return self.ended_s - self.arrival_s


class Sample(msgspec.Struct, frozen=True, gc=False):
    """A worker at a moment: what its engine would say in a beat."""

    at_s: float
    worker: str
    role: Role
    running: int
    waiting: int
    kv_used: float
    """Share of its KV blocks that requests hold."""
    prefill_tokens: int
    """Prompt tokens taken in and not computed yet."""


BASE = 1.05
"""A bin of ``Gaps`` ends at this many times its beginning."""
UNIT_S = 10e-6
_LOG_BASE = log(BASE)


def _bin(seconds: float) -> int:
    return floor(log(seconds / UNIT_S) / _LOG_BASE)


class Gaps(msgspec.Struct):
    """Times between tokens, counted in logarithmic bins: bin i is [BASE^i, BASE^(i+1)) x 10 us.

    Their number and sum are exact. Times are more than 0.
    """

    counts: dict[int, int] = {}
    count: int = 0
    sum_s: float = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        """``count`` gaps of ``seconds``."""
        place = _bin(seconds)
        self.counts[place] = self.counts.get(place, 0) + count
        self.count += count
        self.sum_s += seconds * count

    def add_growing(self, first_s: float, growth_s: float, steps: int, each: int) -> None:
        """``each`` gaps of ``first_s``, as many that are ``growth_s`` longer, and so on."""
        if not each or not steps:
            return
        last_s = first_s + growth_s * (steps - 1)
        if _bin(first_s) == _bin(last_s):
            self.add((first_s + last_s) * 0.5, steps * each)
            return
        half = steps // 2
        self.add_growing(first_s, growth_s, half, each)
        self.add_growing(first_s + growth_s * half, growth_s, steps - half, each)

    def merge(self, other: Gaps) -> None:
        """Count those of ``other`` too."""
        for place, count in other.counts.items():
            self.counts[place] = self.counts.get(place, 0) + count
        self.count += other.count
        self.sum_s += other.sum_s

    @property
    def mean_s(self) -> float:
        """Exact; of at least one gap."""
        return self.sum_s / self.count

    def quantile(self, share: float) -> float:
        """Seconds that ``share`` of the gaps do not exceed, to half a bin (2.5 %); of at least
        one gap."""
        rank = share * self.count
        passed = 0
        for place in sorted(self.counts):
            passed += self.counts[place]
            if passed >= rank:
                return UNIT_S * exp(_LOG_BASE * (place + 0.5))
        raise AssertionError("the counts are less than their sum")


class Totals(msgspec.Struct):
    """Sums over a whole replay."""

    duration_s: float = 0.0
    gpus: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    """Computed again: lost by eviction of what a run's earlier call had, preemption, failure."""
    flips: int = 0
    warmups: int = 0
    """Prefixes computed or moved before any call asked for them."""
    wasted_warmups: int = 0
    """Those of them that none used."""
    moved_bytes: dict[Tier, int] = {}
    """KV that calls had moved."""
    probe_bytes: dict[Tier, int] = {}
    """KV that the core had moved to see whether two workers can: not the calls' affair. A live
    cluster counts it together with the calls'."""
    core_s: float = 0.0
    """Real seconds spent in the core (0 where they were not measured)."""
    core_messages: int = 0
    """What it spent them on: messages that it handled, and deadlines that came."""
    counters: dict[str, int] = {}
    """The core's own."""


class Result(msgspec.Struct):
    """One replay of one workload on one cluster. ``configuration``: the baseline's or policy's
    name; ``where``: simulator or live."""

    configuration: str
    workload: str
    seed: int
    where: str
    calls: list[CallRecord]
    runs: list[RunRecord]
    samples: list[Sample]
    gaps: Gaps
    totals: Totals

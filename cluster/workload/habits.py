"""What agents do, as measured from real traces: the contents of ``fitted.json``.

``fit`` writes the file, generators draw from it, tests compare with its reference figures.
"""

from __future__ import annotations

from importlib.resources import files

import msgspec

from cluster.workload.quantiles import Quantiles

FITTED = "fitted.json"


class Agent(msgspec.Struct, frozen=True):
    """How one kind of agent talks: lengths in tokens, per call unless said otherwise.

    ``static_tokens``: what every agent of the kind begins with (instructions, tools).
    ``first_tokens``: its first prompt. ``new_tokens``: what its prompt grows by from call to
    call beyond its own output (tool results, what others said). ``context_tokens``: its
    longest prompt. ``calls``: how many it makes. ``think_s``: pauses before all but the first
    call; none where the trace has no clock.

    Prompts do not only grow. In ``rewritten_share`` of calls the last ``rewritten_tokens`` of
    the prompt before are replaced. In ``compacted_share`` a part is kept, ``kept_share`` of
    the prompt before, and the rest is written anew, ``fresh_share`` of it.
    """

    trace: str
    static_tokens: int
    context_tokens: int
    calls: Quantiles
    first_tokens: Quantiles
    new_tokens: Quantiles
    output_tokens: Quantiles
    think_s: Quantiles | None = None
    rewritten_share: float = 0.0
    rewritten_tokens: Quantiles | None = None
    compacted_share: float = 0.0
    kept_share: Quantiles | None = None
    fresh_share: Quantiles | None = None


class Shape(msgspec.Struct, frozen=True):
    """How agents of a run depend on each other.

    ``fork_share``: part of the main agent's calls that set off sub-agents, ``fork_width`` of
    them at once, with ``fork_weights`` by kind. ``speakers``: different agents that take
    part in a run. ``rounds``: how often work goes to the one who verifies it.
    """

    fork_share: float
    fork_width: Quantiles
    fork_weights: dict[str, int]
    speakers: Quantiles
    rounds: Quantiles


class Reference(msgspec.Struct, frozen=True):
    """What a trace is like as a whole; see ``measure.Figures``. Gaps are 0 without a clock."""

    cached_share: float
    uncached_tokens_p50: float
    uncached_tokens_p95: float
    uncached_top_share: float
    gap_s_p50: float
    gap_s_p90: float
    prompt_tokens_p50: float
    output_tokens_p50: float


class Habits(msgspec.Struct, frozen=True):
    """All that was measured. ``licences``: of the traces, by name."""

    licences: dict[str, str]
    agents: dict[str, Agent]
    shape: Shape
    references: dict[str, Reference]


def load_habits() -> Habits:
    """The measurements that come with the package."""
    data = files("cluster.workload").joinpath(FITTED).read_bytes()
    return msgspec.json.decode(data, type=Habits)

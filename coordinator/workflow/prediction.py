"""What is predicted of runs and calls, as plain data.

Who wants to persist or show it encodes these structs with msgspec; they refer to nothing.
The way to get them is ``coordinator.workflow.profiles.Profiles``::

    profiles = Profiles(WorkflowLimits())
    profiles.declare(tenant, name, graph)                     a checked graph as prior
    profiles.observe_start(key, call, agent, prompt_tokens, block_hashes, now_s, ...)
    profiles.observe_end(key, call, output_tokens, now_s, ...)
    profiles.end_run(key, now_s)                              cancelled or explicitly over
    profiles.expire(now_s)                                    runs that are silent too long
    profiles.predict(key, now_s) -> Prediction                what the run does next
    profiles.output_tokens(key, agent) -> Spread              how long an answer gets
    profiles.view(tenant, workflow) -> WorkflowView           all that is known, for people
    profiles.exported(tenant, workflow) -> ProfileRecord      all that is learned, versioned
    profiles.restore(tenant, workflow, record)
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from coordinator.workflow.scores import ScoreView

SHOWN_LEAST = 0.05
"""Next agents that are less probable are neither shown nor projected."""


class RunKey(NamedTuple):
    """Who a call belongs to. An empty ``run`` is a run of this one call."""

    tenant: str
    workflow: str
    run: str


class Spread(msgspec.Struct, frozen=True, gc=False):
    """A distribution in a few numbers. ``samples``: what it rests on, decayed; 0 is a guess.

    ``upper`` is meant to be exceeded by one value in twenty: it is corrected by how often it
    was, and is what to reserve by.
    """

    p05: float
    p50: float
    p95: float
    mean: float
    upper: float
    samples: float


Origin = Literal["own", "previous", "first", "static"]
"""Where a prompt's beginning was computed before: in the ``own`` last call of the same agent in
the run, in the call that set it off (``previous``), in the run's ``first`` call, or in calls of
the same agent in other runs (``static``)."""


class Kept(msgspec.Struct, frozen=True, gc=False):
    """How much of an earlier call's KV a prompt will begin with.

    ``probability``: that it is this call of which most is kept; ``share``: of that call's
    prompt, on average then; ``whole``: probability that all of that prompt is kept.
    """

    origin: Origin
    probability: float
    share: float
    whole: float


class NextCall(msgspec.Struct, frozen=True, gc=False):
    """An agent that may be called next.

    ``calls``: how many at once if it is. ``gap_s``: from the end of the call that sets it off.
    ``new_tokens``: what of its prompt has to be computed, because it was in no earlier prompt or
    answer, or is in no cache any more.
    """

    agent: str
    probability: float
    calls: float
    gap_s: Spread
    prompt_tokens: Spread
    new_tokens: Spread
    output_tokens: Spread
    kept: list[Kept]


class Prediction(msgspec.Struct, frozen=True, gc=False):
    """What a run does next, the likeliest first.

    ``known``: false if too little was seen, or if predictions of this workflow have been
    wrong: then act as if there was no prediction. ``trust``: share of recent next agents that
    were predicted right. ``after``: the agent, running or ended, whose call sets the next one
    off. ``calls_left``, ``output_tokens_left``: expected of all calls that have not started.
    """

    known: bool
    trust: float
    after: str
    next: list[NextCall]
    end_probability: float
    calls_left: float
    output_tokens_left: float


UNKNOWN = Prediction(False, 0.0, "", [], 0.0, 0.0, 0.0)
"""Of a run or workflow nobody has seen."""


class Number(msgspec.Struct, frozen=True, gc=False):
    """How often a number occurred, as a share of all."""

    value: int
    share: float


class EdgeView(msgspec.Struct, frozen=True, gc=False):
    """What follows an agent: see ``NextCall``. ``calls``: how many at once, by how often.

    ``declared``: a graph says so. The probability is that of the agent alone, whatever came
    before it, and of the run going on or not.
    """

    source: str
    target: str
    probability: float
    declared: bool
    calls: list[Number]
    gap_s: Spread
    new_tokens: Spread
    kept: list[Kept]


class AgentView(msgspec.Struct, frozen=True, gc=False):
    """One agent. ``visits``: how many calls it makes in a run, by how often."""

    name: str
    declared: bool
    calls: float
    visits: list[Number]
    end_probability: float
    prompt_tokens: Spread
    output_tokens: Spread
    duration_s: Spread


class WorkflowView(msgspec.Struct, frozen=True, gc=False):
    """A workflow, for people. Edges of less than ``SHOWN_LEAST`` that nobody declared are not.

    ``start``: with what runs begin, as edges from ``(start)``. ``idle_s``: a run has ended when
    it is silent for longer.
    """

    name: str
    declared: bool
    runs_started: int
    runs_ended: int
    idle_s: float
    agents: list[AgentView]
    edges: list[EdgeView]
    scores: ScoreView

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
    ``new_tokens``: what of its prompt is in no earlier prompt or output.
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
    were predicted right. ``calls_left``: expected, after the running ones. ``after``: the
    agent, running or ended, whose call sets the next one off.
    """

    known: bool
    trust: float
    after: str
    next: list[NextCall]
    end_probability: float
    calls_left: float


UNKNOWN = Prediction(False, 0.0, "", [], 0.0, 0.0)
"""Of a run or workflow nobody has seen."""

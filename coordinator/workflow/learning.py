"""What a call that starts or ends says of its workflow, counted in the profile."""

from __future__ import annotations

from typing import NamedTuple

from coordinator.workflow.learned import ORIGINS
from coordinator.workflow.lengths import add_to_both
from coordinator.workflow.prediction import Origin
from coordinator.workflow.profile import START, Profile
from coordinator.workflow.runs import LiveCall, LiveRun


class Shared(NamedTuple):
    """With which earlier call a prompt begins: how much of that, and how many tokens."""

    origin: Origin | None = None
    share: float = 0.0
    tokens: int = 0


def learn_start(
    profile: Profile, before: list[LiveCall], live: LiveCall, shared: Shared, new_tokens: int
) -> None:
    """Count a call that starts after those of ``before``, of which the first set it off."""
    setter = before[0]
    first = setter.children is None
    edge = profile.edge(setter.agent, live.agent)
    for call in before:
        _followed(profile, call, live.agent, scored=call is setter)
    edge.starts += 1.0
    if first and setter.agent != START:
        gap_s = max(0.0, live.started_s - setter.ended_s) if setter.ended_s >= 0 else 0.0
        gaps = edge.gap_s if edge.gap_s.values.samples else profile.gap_s
        profile.scores.gap(*gaps.shares_around(gap_s))
        add_to_both(edge.gap_s, profile.gap_s, gap_s)
    if shared.origin is not None:
        edge.keep(shared.origin, shared.share)
    counts, everything = profile.agent(live.agent), profile.everything
    add_to_both(edge.new_tokens, profile.new_tokens, new_tokens)
    add_to_both(counts.prompt_tokens, everything.prompt_tokens, live.prompt_tokens)
    profile.events += 1


def learn_end(profile: Profile, live: LiveCall) -> None:
    """Count the answer of a call that ended."""
    counts, everything = profile.agent(live.agent), profile.everything
    tokens = float(live.output_tokens)
    if live.bound_tokens:
        profile.scores.length(tokens, live.bound_tokens, counts.longest or everything.longest)
    counts.longest = max(counts.longest, tokens)
    everything.longest = max(everything.longest, tokens)
    add_to_both(counts.duration_s, everything.duration_s, live.ended_s - live.started_s)
    bound = live.bound_tokens or None
    add_to_both(counts.output_tokens, everything.output_tokens, tokens, bound)
    counts.answers(live.before).add(tokens, bound)


def shared_with(
    run: LiveRun, setter: LiveCall, live: LiveCall, prompt: memoryview, block_tokens: int
) -> Shared:
    """The earlier call of which most is in a prompt that is about to join its run."""
    own = setter if setter.agent == live.agent else run.latest.get(live.agent)
    first, counts = run.first, run.profile.agent(live.agent)
    candidates = (
        own.sketch if own is not None else None,
        setter.sketch if setter is not own else None,
        first.sketch if first is not None and first is not own else None,
        counts.static if own is None else None,
    )
    if own is None:
        counts.static = live.sketch
    found, blocks, of = None, 0, 1
    for origin, sketch in zip(ORIGINS, candidates, strict=True):
        if sketch is not None and sketch.blocks > blocks:
            shared = sketch.shared_blocks(prompt)
            if shared > blocks:
                found, blocks, of = origin, shared, sketch.blocks
    tokens = blocks * block_tokens
    if found == "own" and own is not None and blocks == of:
        tokens = max(tokens, _with_answer(own, live))
    return Shared(found, blocks / of, tokens)


def _with_answer(own: LiveCall, live: LiveCall) -> int:
    """Tokens of an agent's prompt that its earlier call left behind, with its answer.

    Engines keep answers as they keep prompts, but their hashes are not known here: a prompt
    that goes on from all of the earlier one has the answer in it if it has room for it.
    """
    answered = own.prompt_tokens + own.output_tokens
    return answered if own.ended_s >= 0 and answered <= live.prompt_tokens else 0


def _followed(profile: Profile, call: LiveCall, agent: int, scored: bool) -> None:
    """``agent`` comes after ``call``."""
    edge = profile.edge(call.agent, agent)
    if call.children is None:
        profile.followed(call.path, agent, scored and call.agent != START)
        call.children = {}
        profile.agent(call.agent).resolve(ended_run=False)
    elif agent not in call.children:
        profile.followed(call.path, agent, scored=False)
    width = call.children.get(agent, 0) + 1
    call.children[agent] = width
    if width == 1:
        edge.follows += 1.0
        edge.widths.add(1)
    else:
        edge.widths.correct(width - 1, width)

"""What was learned of a workflow as plain data, so that it can be kept and shown elsewhere.

``PROFILE_VERSION`` says what the fields mean. Records of another version are refused: what was
learned is cheap to learn again, and wrong to misread. Live runs are not part of it.
"""

from __future__ import annotations

from math import isfinite
from typing import Annotated

import msgspec

from coordinator.workflow.histogram import Histogram
from coordinator.workflow.learned import ORIGINS, ROUNDS_MOST, AgentCounts, EdgeCounts
from coordinator.workflow.lengths import LEVEL_LEAST, LEVEL_MOST, Lengths
from coordinator.workflow.profile import NAMES, Profile
from coordinator.workflow.scores import GAP_BINS, Scores

PROFILE_VERSION = 1

Weight = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
Bin = Annotated[int, msgspec.Meta(ge=0, le=1 << 12)]
Symbol = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
Bins = dict[Bin, Weight]


class LengthsRecord(msgspec.Struct, frozen=True, gc=False):
    """A distribution, and how often its bound is meant to be exceeded by now."""

    bins: Bins = {}
    exceeded: Annotated[float, msgspec.Meta(ge=LEVEL_LEAST, le=LEVEL_MOST)] = 0.05


class EdgeRecord(msgspec.Struct, frozen=True, gc=False):
    """A pair of agents by number. ``kept``: by origin, in the order of ``ORIGINS``."""

    source: Symbol
    target: Symbol
    follows: Weight
    starts: Weight
    widths: Bins
    gap: LengthsRecord
    new: LengthsRecord
    kept: list[tuple[Weight, Weight, Weight]]


class AgentRecord(msgspec.Struct, frozen=True, gc=False):
    """An agent by number."""

    symbol: Symbol
    prompt: LengthsRecord
    output: LengthsRecord
    duration: LengthsRecord
    visits: Bins
    resolved: Weight
    ended_runs: Weight
    final_runs: Weight
    longest: Weight
    rounds: Annotated[list[LengthsRecord], msgspec.Meta(max_length=ROUNDS_MOST)] = []


class ContextRecord(msgspec.Struct, frozen=True, gc=False):
    """What followed a path of agents."""

    path: list[Symbol]
    counts: dict[Symbol, Weight]


class ProfileRecord(msgspec.Struct, frozen=True, gc=False):
    """All that was learned of one workflow. ``names``: the agents', by number."""

    version: int
    names: list[str]
    agents: list[AgentRecord]
    everything: AgentRecord
    edges: list[EdgeRecord]
    contexts: list[ContextRecord]
    gap: LengthsRecord
    new: LengthsRecord
    scores: Scores
    runs_started: Annotated[int, msgspec.Meta(ge=0)] = 0
    runs_ended: Annotated[int, msgspec.Meta(ge=0)] = 0
    run_calls: Bins = {}


def recorded(profile: Profile) -> ProfileRecord:
    """A profile as data."""
    return ProfileRecord(
        version=PROFILE_VERSION,
        names=[profile.name(symbol) for symbol in range(profile.symbols)],
        agents=[_agent(symbol, counts) for symbol, counts in profile.agents.items()],
        everything=_agent(0, profile.everything),
        edges=[
            _edge(source, target, counts)
            for source, agent in profile.agents.items()
            for target, counts in agent.followers.items()
        ],
        contexts=[ContextRecord(list(path), counts) for path, counts in profile.automaton.counts()],
        gap=_lengths(profile.gap_s),
        new=_lengths(profile.new_tokens),
        scores=msgspec.structs.replace(profile.scores, gaps=list(profile.scores.gaps)),
        runs_started=profile.runs_started,
        runs_ended=profile.runs_ended,
        run_calls=profile.run_calls.weights()[0],
    )


def restored(record: ProfileRecord, empty: Profile) -> Profile:
    """The empty profile, filled. ValueError if the record cannot be true."""
    _check(record)
    for symbol, name in enumerate(record.names):
        if symbol >= len(NAMES):
            empty.adopt(symbol, name, any(one.symbol == symbol for one in record.agents))
    for one in record.agents:
        if one.symbol in empty.agents:
            _fill_agent(one, empty.agents[one.symbol])
    _fill_agent(record.everything, empty.everything)
    for edge in record.edges:
        if edge.source in empty.agents and edge.target in empty.agents:
            _fill_edge(edge, empty.edge(edge.source, edge.target))
    empty.automaton.restore([(tuple(one.path), one.counts) for one in record.contexts])
    _fill(record.gap, empty.gap_s)
    _fill(record.new, empty.new_tokens)
    _fill_numbers(record.run_calls, empty.run_calls)
    fading = empty.scores.fading
    empty.scores = msgspec.structs.replace(
        record.scores, gaps=list(record.scores.gaps), fading=fading
    )
    empty.runs_started, empty.runs_ended = record.runs_started, record.runs_ended
    return empty


def _check(record: ProfileRecord) -> None:
    if record.version != PROFILE_VERSION:
        raise ValueError(f"a profile of version {record.version}, not {PROFILE_VERSION}")
    symbols = len(record.names)
    if record.names[: len(NAMES)] != list(NAMES):
        raise ValueError(f"names: the first are {', '.join(NAMES)}")
    for context in record.contexts:
        if any(symbol >= symbols for symbol in (*context.path, *context.counts)):
            raise ValueError(f"contexts: an agent beyond the {symbols} that have names")
    sums = [value for value in msgspec.structs.astuple(record.scores) if isinstance(value, float)]
    if len(record.scores.gaps) != GAP_BINS or not all(
        isfinite(value) and value >= 0 for value in (*sums, *record.scores.gaps)
    ):
        raise ValueError("scores: numbers from 0 are expected, and ten gaps")
    if any(len(edge.kept) != len(ORIGINS) for edge in record.edges):
        raise ValueError(f"edges: kept has one entry for each of {', '.join(ORIGINS)}")


def _agent(symbol: int, counts: AgentCounts) -> AgentRecord:
    return AgentRecord(
        symbol,
        _lengths(counts.prompt_tokens),
        _lengths(counts.output_tokens),
        _lengths(counts.duration_s),
        counts.visits.weights()[0],
        counts.resolved,
        counts.ended_runs,
        counts.final_runs,
        counts.longest,
        [_lengths(one) for one in counts.rounds],
    )


def _edge(source: int, target: int, counts: EdgeCounts) -> EdgeRecord:
    return EdgeRecord(
        source,
        target,
        counts.follows,
        counts.starts,
        counts.widths.weights()[0],
        _lengths(counts.gap_s),
        _lengths(counts.new_tokens),
        [(one[0], one[1], one[2]) for one in counts.kept.values()],
    )


def _lengths(lengths: Lengths) -> LengthsRecord:
    return LengthsRecord(lengths.values.weights()[0], lengths.exceeded)


def _fill(record: LengthsRecord, lengths: Lengths) -> None:
    lengths.values.restore(record.bins)
    lengths.exceeded = record.exceeded


def _fill_agent(record: AgentRecord, counts: AgentCounts) -> None:
    _fill(record.prompt, counts.prompt_tokens)
    _fill(record.output, counts.output_tokens)
    _fill(record.duration, counts.duration_s)
    _fill_numbers(record.visits, counts.visits)
    counts.resolved, counts.ended_runs = record.resolved, record.ended_runs
    counts.final_runs, counts.longest = record.final_runs, record.longest
    counts.rounds = [Lengths() for _ in record.rounds]
    for one, lengths in zip(record.rounds, counts.rounds, strict=True):
        _fill(one, lengths)


def _fill_edge(record: EdgeRecord, counts: EdgeCounts) -> None:
    _fill(record.gap, counts.gap_s)
    _fill(record.new, counts.new_tokens)
    _fill_numbers(record.widths, counts.widths)
    counts.follows, counts.starts = record.follows, record.starts
    for origin, kept in zip(ORIGINS, record.kept, strict=True):
        counts.kept[origin][:] = kept


def _fill_numbers(bins: Bins, histogram: Histogram) -> None:
    histogram.restore(bins)

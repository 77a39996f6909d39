"""Predictions and tables made of what was counted; nothing is learned here."""

from __future__ import annotations

import numpy as np

from coordinator.workflow.graph import Graph, ways
from coordinator.workflow.histogram import Histogram, middle_of
from coordinator.workflow.learned import AgentCounts, EdgeCounts
from coordinator.workflow.lengths import GUESS, GUESS_S
from coordinator.workflow.prediction import (
    SHOWN_LEAST,
    AgentView,
    EdgeView,
    NextCall,
    Number,
    Prediction,
    WorkflowView,
)
from coordinator.workflow.profile import END, OTHER, START, Profile
from coordinator.workflow.runs import LiveCall, LiveRun
from coordinator.workflow.scores import score_view

LEFT_MOST = 10_000.0
"""More calls than this are not expected of any run."""
EDGE_SAMPLES = 4.0
"""Gaps of a pair of agents from which on those of other pairs are not asked."""


def predicted(run: LiveRun) -> Prediction:
    """What a run does next."""
    profile, after = run.profile, _latest(run)
    found = profile.automaton.probabilities(after.path)
    end = found.pop(END, 0.0)
    likely = sorted((-share, symbol) for symbol, share in found.items() if share >= SHOWN_LEAST)
    calls, tokens = remaining(profile, after.agent)
    return Prediction(
        known=bool(likely) and profile.scores.trusted,
        trust=profile.scores.top1,
        after=profile.name(after.agent),
        next=[_next_call(run, after.agent, symbol, -share) for share, symbol in likely],
        end_probability=end,
        calls_left=calls,
        output_tokens_left=tokens,
    )


def remaining(profile: Profile, agent: int) -> tuple[float, float]:
    """Calls, and output tokens of them, that follow a call of an agent on average.

    The expected visits of an absorbing Markov chain (Kemeny and Snell, *Finite Markov Chains*).
    """
    symbols = [START, *sorted(symbol for symbol in profile.agents if symbol not in (START, END))]
    place = {symbol: at for at, symbol in enumerate(symbols)}
    matrix = np.zeros((len(symbols), len(symbols)))
    tokens = np.zeros(len(symbols))
    for symbol, at in place.items():
        counts = profile.agents[symbol]
        tokens[at] = counts.output_tokens.mean()
        for target, calls in counts.calls_after().items():
            if target in place:
                matrix[at, place[target]] = calls
    # A little of everything ends, so that what has never been seen to end has an expectation.
    unit = np.eye(len(symbols))
    sums = np.stack([matrix.sum(axis=1), matrix @ tokens], axis=1)
    try:
        left = np.linalg.solve(unit - (1.0 - 1.0 / LEFT_MOST) * matrix, sums)
    except np.linalg.LinAlgError:
        return LEFT_MOST, LEFT_MOST * float(tokens.mean())
    calls, output = left[place.get(agent, place[OTHER])].tolist()
    if not 0.0 <= calls <= LEFT_MOST:
        # It branches faster than it ends: there is no expectation.
        return LEFT_MOST, LEFT_MOST * float(tokens.mean())
    return calls, output


def workflow_view(name: str, profile: Profile) -> WorkflowView:
    """All that is known of a workflow, for people."""
    declared = _declared(profile.graph)
    edges: list[EdgeView] = []
    for source, symbol in [("(start)", START), *((n, s) for n, s, _ in profile.named_agents())]:
        edges += _edge_views(profile, source, symbol, declared)
    agents = [
        AgentView(
            name=agent,
            declared=profile.graph is not None and agent in profile.graph.agents,
            calls=counts.output_tokens.values.samples,
            visits=numbers(counts.visits),
            end_probability=_end_probability(profile, symbol),
            prompt_tokens=counts.prompt_tokens.spread(profile.everything.prompt_tokens),
            output_tokens=counts.output_tokens.spread(profile.everything.output_tokens),
            duration_s=counts.duration_s.spread(profile.everything.duration_s, GUESS_S),
        )
        for agent, symbol, counts in profile.named_agents()
    ]
    return WorkflowView(
        name=name,
        declared=profile.graph is not None,
        runs_started=profile.runs_started,
        runs_ended=profile.runs_ended,
        idle_s=profile.idle_s(),
        agents=agents,
        edges=edges,
        scores=score_view(profile.scores),
    )


def numbers(histogram: Histogram) -> list[Number]:
    """Which numbers occurred how often; large ones are put together."""
    bins, total = histogram.weights()
    found: dict[int, float] = {}
    for place, weight in bins.items():
        value = round(middle_of(place)) if place else 0
        found[value] = found.get(value, 0.0) + weight / total
    return [Number(value, share) for value, share in sorted(found.items())]


def _latest(run: LiveRun) -> LiveCall:
    """The call that the next one will follow, as far as one can say."""
    if run.running:
        return next(reversed(run.running.values()))
    return next(run.open_ends(), None) or next(reversed(run.ended.values()), run.root)


def _next_call(run: LiveRun, source: int, target: int, probability: float) -> NextCall:
    profile = run.profile
    edge = profile.known_edge(source, target) or EdgeCounts()
    counts = profile.agents.get(target) or AgentCounts()
    everything = profile.everything
    gaps = edge.gap_s if edge.gap_s.values.samples >= EDGE_SAMPLES else profile.gap_s
    return NextCall(
        agent=profile.name(target),
        probability=probability,
        calls=max(1.0, edge.starts / edge.follows if edge.follows else 1.0),
        gap_s=gaps.spread(None, GUESS_S),
        prompt_tokens=counts.prompt_tokens.spread(everything.prompt_tokens),
        new_tokens=edge.new_tokens.spread(profile.new_tokens),
        output_tokens=counts.answer_tokens(run.visits.get(target, 0), everything),
        kept=edge.kept_view(),
    )


def _edge_views(
    profile: Profile, source: str, symbol: int, declared: set[tuple[str, str]]
) -> list[EdgeView]:
    shares = profile.automaton.probabilities((symbol,))
    found: list[EdgeView] = []
    for target, share in sorted(shares.items(), key=lambda item: (-item[1], item[0])):
        known = (source, profile.name(target)) in declared
        if target == END or (share < SHOWN_LEAST and not known):
            continue
        edge = profile.known_edge(symbol, target)
        # The back-off of an agent knows all agents; an edge is what was seen, or declared.
        if edge is None and not known:
            continue
        edge = edge or EdgeCounts()
        found.append(
            EdgeView(
                source=source,
                target=profile.name(target),
                probability=share,
                declared=known,
                calls=numbers(edge.widths),
                gap_s=edge.gap_s.spread(profile.gap_s, GUESS_S),
                new_tokens=edge.new_tokens.spread(profile.new_tokens, GUESS),
                kept=edge.kept_view(),
            )
        )
    return found


def _end_probability(profile: Profile, symbol: int) -> float:
    return profile.automaton.probabilities((symbol,)).get(END, 0.0)


def _declared(graph: Graph | None) -> set[tuple[str, str]]:
    if graph is None:
        return set()
    return {(source, way.target) for source, targets in ways(graph).items() for way in targets}

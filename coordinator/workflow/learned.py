"""What is counted of the agents of a workflow and of the pairs of agents that follow each other."""

from __future__ import annotations

from coordinator.workflow.histogram import Histogram
from coordinator.workflow.lengths import LEANING_SAMPLES, Lengths
from coordinator.workflow.prediction import Kept, Origin, Spread
from coordinator.workflow.sharing import Sketch

ORIGINS: tuple[Origin, ...] = ("own", "previous", "first", "static")
COUNT_MOST = 128.0
"""Followers of an agent at which counts are halved, so that what is new soon outweighs them."""
NUMBERS_HALF_LIFE = 100.0
"""Numbers (of calls at once, of visits in a run) after which one weighs half."""
MILLISECOND = 0.001
ROUNDS_MOST = 6
"""Classes of answers by how many the agent gave in the run before: 0, 1, 2, 4, 8, 16 and more."""


class EdgeCounts:
    """An agent and one that follows it.

    ``follows``: how often it did; ``starts``: with how many calls in all. ``widths``: how many
    calls at once. ``kept``: by origin how often, how much of it, how often all of it.
    """

    __slots__ = ("follows", "gap_s", "kept", "new_tokens", "starts", "widths")

    def __init__(self) -> None:
        self.follows = 0.0
        self.starts = 0.0
        self.gap_s = Lengths(MILLISECOND)
        self.new_tokens = Lengths()
        self.widths = Histogram(NUMBERS_HALF_LIFE)
        self.kept = {origin: [0.0, 0.0, 0.0] for origin in ORIGINS}

    def keep(self, origin: Origin, share: float) -> None:
        """A prompt began with this share of the prompt of that origin."""
        counts = self.kept[origin]
        counts[0] += 1.0
        counts[1] += share
        counts[2] += 1.0 if share >= 1.0 else 0.0

    def halve(self) -> None:
        """Make what was counted so far weigh half."""
        self.follows *= 0.5
        self.starts *= 0.5
        for counts in self.kept.values():
            counts[:] = [count * 0.5 for count in counts]

    def kept_view(self) -> list[Kept]:
        """Where the beginnings of prompts come from, the likeliest first."""
        total = max(self.starts, sum(counts[0] for counts in self.kept.values()))
        found = [
            Kept(origin, count / total, share / count, whole / count)
            for origin, (count, share, whole) in self.kept.items()
            if count > 0
        ]
        return sorted(found, key=lambda kept: -kept.probability)


class AgentCounts:
    """An agent: how long its prompts, answers and calls are, and what follows it.

    ``resolved``: how many of its calls were followed, or ended their run (``ended_runs``), of
    these ``final_runs`` by saying so. ``visits``: its calls in one run. ``rounds``: its answers by
    how many it gave in the run before. ``longest``: its longest answer, in tokens. ``static``: its
    first prompt in the last run that had one.
    """

    __slots__ = (
        "duration_s",
        "ended_runs",
        "final_runs",
        "followers",
        "longest",
        "output_tokens",
        "prompt_tokens",
        "resolved",
        "rounds",
        "static",
        "visits",
    )

    def __init__(self) -> None:
        self.prompt_tokens = Lengths()
        self.output_tokens = Lengths()
        self.duration_s = Lengths(MILLISECOND)
        self.visits = Histogram(NUMBERS_HALF_LIFE)
        self.rounds: list[Lengths] = []
        self.followers: dict[int, EdgeCounts] = {}
        self.resolved = 0.0
        self.ended_runs = 0.0
        self.final_runs = 0.0
        self.longest = 0.0
        self.static: Sketch | None = None

    def answers(self, before: int) -> Lengths:
        """Those it gives when it gave so many in the run before."""
        at = min(before.bit_length(), ROUNDS_MOST - 1)
        while len(self.rounds) <= at:
            self.rounds.append(Lengths())
        return self.rounds[at]

    def bound_tokens(self, before: int, everything: AgentCounts) -> float:
        """What one such answer in twenty is meant to exceed; 0 if nothing is known."""
        return self.answers(before).upper(self._leaning(everything))

    def answer_tokens(self, before: int, everything: AgentCounts) -> Spread:
        """How long such an answer gets."""
        return self.answers(before).spread(self._leaning(everything))

    def _leaning(self, everything: AgentCounts) -> Lengths:
        """What is asked of answers of which few were seen."""
        own = self.output_tokens
        return own if own.values.samples >= LEANING_SAMPLES else everything.output_tokens

    def resolve(self, ended_run: bool, final: bool = False) -> None:
        """One of its calls was followed, or ended its run, maybe by saying so (``final``)."""
        self.resolved += 1.0
        self.ended_runs += 1.0 if ended_run else 0.0
        self.final_runs += 1.0 if final else 0.0
        if self.resolved >= COUNT_MOST:
            self.resolved *= 0.5
            self.ended_runs *= 0.5
            self.final_runs *= 0.5
            for edge in self.followers.values():
                edge.halve()

    def calls_after(self) -> dict[int, float]:
        """How many calls of each agent one of its calls sets off, on average."""
        if not self.resolved:
            return {}
        return {symbol: edge.starts / self.resolved for symbol, edge in self.followers.items()}

"""What is learned of one workflow. Holds counts only: nothing of a run outlives it here.

Agents are numbers, ``START``, ``END`` and ``OTHER`` those that stand for no single agent. If
there are more agents than are told apart, those not seen for longest are forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from coordinator.workflow.automaton import Automaton, Path
from coordinator.workflow.graph import Graph, start_of, ways
from coordinator.workflow.histogram import Histogram
from coordinator.workflow.learned import NUMBERS_HALF_LIFE, AgentCounts, EdgeCounts
from coordinator.workflow.lengths import Lengths
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.scores import FADING, Scores

START, END, OTHER = 0, 1, 2
NAMES = ("(start)", "(end)", "(other)")
IDLE_SHARE = 0.995
"""A run has ended when it is silent for longer than this share of all gaps, and some more."""
IDLE_FACTOR = 2.0
IDLE_SAMPLES = 50.0
"""Gaps from which on a run's end is told from them."""


class Profile:
    """One workflow of one tenant."""

    def __init__(
        self,
        number: int,
        tenant: str,
        workflow: str,
        limits: WorkflowLimits,
        score_fading: float = FADING,
    ) -> None:
        """``number``: what it is called in arrays."""
        self.number = number
        self.tenant = tenant
        self.workflow = workflow
        self.graph: Graph | None = None
        self.scores = Scores(fading=score_fading)
        self.automaton = Automaton(limits.contexts_per_workflow)
        self.everything = AgentCounts()
        """Of all agents together: what is believed of one that was seen rarely."""
        self.gap_s = Lengths(0.001)
        self.new_tokens = Lengths()
        self.run_calls = Histogram(NUMBERS_HALF_LIFE)
        """How many calls runs made that came to their end."""
        self.agents: dict[int, AgentCounts] = {at: AgentCounts() for at in (START, END, OTHER)}
        self.events = 0
        self.runs_started = 0
        self.runs_ended = 0
        self._limits = limits
        self._names: list[str] = list(NAMES)
        self._symbols: OrderedDict[str, int] = OrderedDict()
        self._free: list[int] = []
        self._edges: OrderedDict[tuple[int, int], None] = OrderedDict()

    # --- agents by name and number ---------------------------------------------------------

    def symbol(self, name: str) -> int:
        """The number of an agent, new or not."""
        found = self._symbols.get(name)
        if found is not None:
            self._symbols.move_to_end(name)
            return found
        if len(name) > self._limits.name_bytes or len(name.encode("utf-8", "replace")) > (
            self._limits.name_bytes
        ):
            return OTHER
        if len(self._symbols) >= self._limits.agents_per_workflow:
            self._forget_agents()
        symbol = self._free.pop() if self._free else len(self._names)
        if symbol == len(self._names):
            self._names.append(name)
        else:
            self._names[symbol] = name
        self._symbols[name] = symbol
        self.agents[symbol] = AgentCounts()
        return symbol

    def adopt(self, symbol: int, name: str, alive: bool) -> None:
        """Take over the next agent of a record, in the order of their numbers."""
        assert symbol == len(self._names), symbol
        self._names.append(name)
        full = len(self._symbols) >= self._limits.agents_per_workflow
        if alive and not full and name not in self._symbols:
            self._symbols[name] = symbol
            self.agents[symbol] = AgentCounts()
        else:
            self._free.append(symbol)

    def known_symbol(self, name: str) -> int:
        """The number of an agent, or that of all others."""
        return self._symbols.get(name, OTHER)

    def name(self, symbol: int) -> str:
        """The name of an agent."""
        return self._names[symbol]

    def agent(self, symbol: int) -> AgentCounts:
        """An agent's counts; those of the others if it was forgotten since."""
        return self.agents.get(symbol) or self.agents[OTHER]

    def named_agents(self) -> Iterator[tuple[str, int, AgentCounts]]:
        """All agents that were seen or declared, the longest known first."""
        for name, symbol in sorted(self._symbols.items(), key=lambda item: item[1]):
            yield name, symbol, self.agents[symbol]

    @property
    def symbols(self) -> int:
        """One more than the largest number of an agent."""
        return len(self._names)

    def _forget_agents(self) -> None:
        """Half of the agents go, those that were not seen for longest; declared ones stay."""
        declared = self.graph.agents if self.graph is not None else {}
        old = [name for name in self._symbols if name not in declared]
        gone = {self._symbols.pop(name) for name in old[: max(1, (len(old) + 1) // 2)]}
        for source, target in [edge for edge in self._edges if not gone.isdisjoint(edge)]:
            self._drop_edge(source, target)
        for symbol in gone:
            del self.agents[symbol]
        self._free += sorted(gone, reverse=True)
        self.automaton.forget(gone)

    # --- edges ---------------------------------------------------------------------------

    def edge(self, source: int, target: int) -> EdgeCounts:
        """The counts of a pair of agents, new or not."""
        if source not in self.agents:
            source = OTHER
        followers = self.agents[source].followers
        found = followers.get(target)
        key = (source, target)
        if found is None:
            found = followers[target] = EdgeCounts()
            self._edges[key] = None
            if len(self._edges) > self._limits.edges_per_workflow:
                self._drop_edge(*next(iter(self._edges)))
        elif key in self._edges:
            self._edges.move_to_end(key)
        return found

    def known_edge(self, source: int, target: int) -> EdgeCounts | None:
        """The counts of a pair of agents, if there are any."""
        return self.agent(source).followers.get(target)

    @property
    def edges(self) -> int:
        """How many pairs of agents are counted."""
        return len(self._edges)

    def _drop_edge(self, source: int, target: int) -> None:
        del self._edges[source, target]
        self.agent(source).followers.pop(target, None)

    # --- what happened ---------------------------------------------------------------------

    def declare(self, graph: Graph | None) -> None:
        """Take a checked graph as prior, or give up the one there was."""
        self.graph = graph
        if graph is None:
            self.automaton.declare({})
            return
        prior: dict[int, dict[int, float]] = {START: {self.symbol(start_of(graph)): 1.0}}
        for source, targets in ways(graph).items():
            shares = {self.symbol(way.target): way.probability for way in targets}
            taken = sum(shares.values())
            shares[END] = max(0.0, 1.0 - taken)
            scale = 1.0 / (taken + shares[END])
            prior[self.symbol(source)] = {
                symbol: share * scale for symbol, share in shares.items() if share > 0
            }
        self.automaton.declare(prior)

    def followed(self, path: Path, symbol: int, scored: bool) -> None:
        """``symbol`` is what the last call of ``path`` set off first, or next."""
        if scored:
            self.scores.next_agent(self.next_agents(path), symbol)
        self.automaton.observe(path, symbol)

    def ended_run(self, path: Path, final: bool) -> None:
        """Nothing came after ``path``. ``final``: the run's client said so."""
        self.automaton.observe(path, END)
        self.agent(path[-1]).resolve(ended_run=True, final=final)

    def next_agents(self, path: Path) -> dict[int, float]:
        """How probable each next agent is, given that there is one."""
        found = self.automaton.probabilities(path)
        left = 1.0 - found.pop(END, 0.0)
        if left <= 1e-9:
            return {}
        scale = 1.0 / left
        return {symbol: share * scale for symbol, share in found.items()}

    def idle_s(self) -> float:
        """How long a run has to be silent to have ended."""
        least_s, most_s = self._limits.idle_least_s, self._limits.idle_most_s
        if self.gap_s.values.samples < IDLE_SAMPLES:
            return most_s
        return min(most_s, max(least_s, IDLE_FACTOR * self.gap_s.quantile(IDLE_SHARE)))

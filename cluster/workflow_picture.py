"""A workflow to look at: as a tree in a terminal, as a picture, or as Graphviz's text.

Pictures (SVG, PNG, PDF) are made by matplotlib (``workflow_figure``), which needs no program beside
Python; the text is for whoever has Graphviz and wants its layout.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

from rich.text import Text
from rich.tree import Tree

from cluster.failure import CommandFailure
from coordinator.workflow.desk import Shown
from coordinator.workflow.graph import Graph, start_of
from coordinator.workflow.prediction import AgentView, EdgeView, Number, Spread, WorkflowView

START = "(start)"
GRAPHVIZ_SUFFIXES = (".dot", ".gv")
END_SHOWN_LEAST = 0.05


class NoPicture(CommandFailure):
    """It can't be drawn; says why."""


class Links:
    """The edges of a workflow by their source, and its agents by name.

    ``first``: the agents that it begins with, as far as that was seen or is declared.
    """

    def __init__(self, view: WorkflowView, graph: Graph | None) -> None:
        self.agents = {agent.name: agent for agent in view.agents}
        self.edges: dict[str, list[EdgeView]] = {}
        for edge in view.edges:
            self.edges.setdefault(edge.source, []).append(edge)
        self.first = {edge.target for edge in self.edges.get(START, [])}
        if graph is not None and not self.first:
            self.first = {start_of(graph)}

    def depths(self) -> dict[str, int]:
        """How many steps each agent is from the start; those nothing leads to come last."""
        depths = {START: 0} | dict.fromkeys(sorted(self.first), 1)
        waiting = deque(sorted(self.first))
        while waiting:
            source = waiting.popleft()
            for edge in self.edges.get(source, []):
                if edge.target not in depths:
                    depths[edge.target] = depths[source] + 1
                    waiting.append(edge.target)
        last = max(depths.values()) + 1
        return depths | {name: last for name in self.agents if name not in depths}


def tree(shown: Shown) -> Tree:
    """The workflow from its start on. An agent's followers are shown where it comes first."""
    view = shown.learned
    if view is None:
        return Tree(Text(f"{shown.name}: nothing is learned yet", "bold"))
    root = Tree(Text(_title(shown.name, shown.declared, view), "bold"))
    links = Links(view, shown.declared)
    seen: set[str] = set()
    waiting = deque([(START, root)])
    if START not in links.edges:
        seen = set(links.first)
        waiting.extend((name, root.add(Text(name, "bold"))) for name in sorted(links.first))
    while waiting:
        source, branch = waiting.popleft()
        for edge in links.edges.get(source, []):
            new = edge.target not in seen
            seen.add(edge.target)
            twig = branch.add(_line(edge, links.agents.get(edge.target), new))
            if new:
                waiting.append((edge.target, twig))
        agent = links.agents.get(source)
        if agent is not None and agent.end_probability >= END_SHOWN_LEAST:
            branch.add(Text(f"end {percent(agent.end_probability)}", "dim"))
    for name in links.agents:
        if name not in seen:
            root.add(Text(f"{name} (nothing is known to lead there)", "dim"))
    return root


def _title(name: str, declared: Graph | None, view: WorkflowView) -> str:
    known = "declared" if declared else "learned"
    return f"{name} ({known}, {view.runs_ended} runs seen)"


def _line(edge: EdgeView, agent: AgentView | None, new: bool) -> Text:
    text = Text.assemble((percent(edge.probability), "cyan"), " ", (edge.target, "bold"))
    if calls := counts(edge.calls):
        text.append(f" x {calls}", "magenta")
    if edge.source != START:
        text.append(f"  after {spread(edge.gap_s, 's')}", "dim")
    if not new:
        text.append("  (as above)", "dim italic")
    elif agent is not None:
        text.append(f"  answers {spread(agent.output_tokens, 'tokens')}", "green")
        text.append(f", new prompt {spread(edge.new_tokens, 'tokens')}", "dim")
    if edge.declared:
        text.append("  declared", "dim italic")
    return text


def percent(share: float) -> str:
    """A probability."""
    return f"{100 * share:.0f} %"


def counts(numbers: list[Number]) -> str:
    """How many calls at once: ``2-4``; empty for always one."""
    values = [number.value for number in numbers if number.share >= END_SHOWN_LEAST]
    if not values or max(values) == 1:
        return ""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def spread(values: Spread, unit: str) -> str:
    """The middle and the bound of a distribution; a question mark for a guess."""
    if not values.samples:
        return f"? {unit}"
    low, high = (
        (f"{value:.0f}" if unit == "tokens" else _short(value))
        for value in (values.p50, values.p95)
    )
    return f"{low} (to {high}) {unit}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def draw(shown: Shown, path: Path) -> None:
    """Draws the workflow into a file: Graphviz's text for ``.dot`` and ``.gv``, else a picture of
    the kind that its suffix names. NoPicture if that is impossible."""
    view = shown.learned
    if view is None:
        raise NoPicture(f"nothing is known of {shown.name!r} that could be drawn")
    if path.suffix in GRAPHVIZ_SUFFIXES:
        path.write_text(graphviz(shown.name, Links(view, shown.declared)), encoding="utf-8")
        return
    from cluster.workflow_figure import figure_of  # matplotlib takes long to import

    figure = figure_of(_title(shown.name, shown.declared, view), Links(view, shown.declared))
    try:
        figure.savefig(path, bbox_inches="tight", dpi=150)
    except (ValueError, OSError) as error:
        raise NoPicture(f"{path}: {error}") from error


def graphviz(name: str, links: Links) -> str:
    """The workflow in Graphviz's language."""
    lines = [f"digraph {_quoted(name)} {{", "  rankdir=LR; node [shape=box, style=rounded];"]
    for agent in links.agents.values():
        lines.append(f"  {_quoted(agent.name)} [label={_quoted(node_label(agent))}];")
    for edges in links.edges.values():
        for edge in edges:
            ends = f"{_quoted(edge.source)} -> {_quoted(edge.target)}"
            style = "solid" if is_seen(edge) else "dashed"
            lines.append(f"  {ends} [label={_quoted(edge_label(edge))}, style={style}];")
    return "\n".join([*lines, "}", ""])


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def node_label(agent: AgentView | None, name: str = "") -> str:
    """What an agent's box says."""
    if agent is None:
        return name
    lines = [agent.name, spread(agent.output_tokens, "tokens")]
    if agent.end_probability >= END_SHOWN_LEAST:
        lines.append(f"end {percent(agent.end_probability)}")
    return "\n".join(lines)


def is_seen(edge: EdgeView) -> bool:
    """Whether it was taken, not only declared."""
    return any(number.value for number in edge.calls)


def edge_label(edge: EdgeView) -> str:
    """What stands at an edge."""
    calls = counts(edge.calls)
    label = percent(edge.probability) + (f" x {calls}" if calls else "")
    return label if edge.source == START else f"{label}\n{spread(edge.gap_s, 's')}"

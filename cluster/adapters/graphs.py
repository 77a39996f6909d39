"""A framework's graph as a workflow that can be declared (``PUT /v1/workflows/{name}``).

Frameworks say which agent may lead to which, and whether always or on a condition; they do not say
how often. What is declared here is a first guess, to be refined by what is learned: conditions are
equally probable, what leads back is a loop, and a condition with one way out is taken for a
fan-out, since nobody writes it for anything else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROUNDS_MAX = 10
"""How often a loop is thought to go round at most, where nobody says it."""
FAN_OUT_MAX = 8


@dataclass(frozen=True)
class Link:
    """``target`` may follow ``source``; always, or only on a condition. ``END`` is no agent."""

    source: str
    target: str
    conditional: bool = False


END = ""


class NoGraph(Exception):
    """It can't be declared; says why. It will be learned."""


def contracted(links: Iterable[Link], kept: Collection[str]) -> list[Link]:
    """The links between ``kept`` and ``END``, with everything else left out: what leads to it
    leads to what follows it."""
    found = list(dict.fromkeys(links))
    ends = {*kept, END}
    others = {link.source for link in found} | {link.target for link in found}
    for name in sorted(others - ends):
        before = [link for link in found if link.target == name and link.source != name]
        after = [link for link in found if link.source == name and link.target != name]
        found = [link for link in found if name not in (link.source, link.target)]
        found += [
            Link(one.source, other.target, one.conditional or other.conditional)
            for one in before
            for other in after
        ]
    return list(dict.fromkeys(found))


def graph_of(
    start: str,
    links: Sequence[Link],
    agents: Mapping[str, Mapping[str, Any]],
    rounds_max: int = ROUNDS_MAX,
) -> dict[str, Any]:
    """The workflow that begins with ``start``. ``agents``: what is known of each.

    Agents that nothing leads to are left out. NoGraph if ``start`` is no agent.
    """
    if start not in agents:
        raise NoGraph(f"it does not begin with one agent: {start!r}")
    followers = _followers(links)
    backward = _backward(start, followers)
    reached = _reached(start, followers)
    edges = _edges(
        [link for link in _single(links) if link.source in reached], backward, rounds_max
    )
    return {
        "agents": {name: dict(known) for name, known in agents.items() if name in reached},
        "edges": edges,
        "start": start,
    }


def _reached(start: str, followers: Mapping[str, list[Link]]) -> set[str]:
    reached, waiting = {start}, [start]
    while waiting:
        for link in followers.get(waiting.pop(), []):
            if link.target not in reached:
                reached.add(link.target)
                waiting.append(link.target)
    return reached


def _single(links: Iterable[Link]) -> list[Link]:
    """One link from each agent to each other; on a condition if any of them is."""
    found: dict[tuple[str, str], bool] = {}
    for link in links:
        ends = link.source, link.target
        found[ends] = found.get(ends, False) or link.conditional
    return [Link(source, target, conditional) for (source, target), conditional in found.items()]


def _followers(links: Iterable[Link]) -> dict[str, list[Link]]:
    found: dict[str, list[Link]] = {}
    for link in _single(links):
        if link.target != END:
            found.setdefault(link.source, []).append(link)
    return found


def _backward(start: str, followers: Mapping[str, list[Link]]) -> set[tuple[str, str]]:
    """The links that lead back to where a run came from (back edges of a depth-first search)."""
    found: set[tuple[str, str]] = set()
    done: set[str] = set()
    on_path = [start]
    ways = [iter(followers.get(start, []))]
    while ways:
        link = next(ways[-1], None)
        if link is None:
            done.add(on_path.pop())
            ways.pop()
        elif link.target in on_path:
            found.add((link.source, link.target))
        elif link.target not in done:
            on_path.append(link.target)
            ways.append(iter(followers.get(link.target, [])))
    return found


def _edges(
    links: Sequence[Link], backward: Collection[tuple[str, str]], rounds_max: int
) -> list[dict[str, Any]]:
    outgoing: dict[str, list[Link]] = {}
    for link in links:
        outgoing.setdefault(link.source, []).append(link)
    at_once = {link.target for links in outgoing.values() for link in _at_once(links, backward)}
    edges: list[dict[str, Any]] = []
    joins: dict[str, list[str]] = {}
    for link in links:
        if link.target == END:
            continue
        siblings = outgoing[link.source]
        ends = {"from": link.source, "to": link.target}
        if (link.source, link.target) in backward:
            edges.append(
                {
                    "kind": "loop",
                    **ends,
                    "most": rounds_max,
                    "probability": _share(link, siblings, backward),
                }
            )
        elif link in _at_once(siblings, backward):
            most = FAN_OUT_MAX if link.conditional else 1
            edges.append({"kind": "fan_out", **ends, "least": 1, "most": most})
        elif link.conditional:
            edges.append(
                {"kind": "branch", **ends, "probability": _share(link, siblings, backward)}
            )
        elif link.source in at_once:
            joins.setdefault(link.target, []).append(link.source)
        else:
            edges.append({"kind": "next", **ends})
    return edges + [
        {"kind": "join", "from": sources, "to": target} for target, sources in joins.items()
    ]


def _at_once(siblings: Sequence[Link], backward: Collection[tuple[str, str]]) -> list[Link]:
    """Which of the links out of one agent set off several calls at once."""
    forward = [link for link in siblings if (link.source, link.target) not in backward]
    always = [link for link in forward if not link.conditional and link.target != END]
    choices = [link for link in siblings if link.conditional]
    found = always if len(always) > 1 else []
    if len(choices) == 1 and choices[0].target != END and choices[0] in forward:
        found = [*found, choices[0]]
    return found


def _share(link: Link, siblings: Sequence[Link], backward: Collection[tuple[str, str]]) -> float:
    """How probable a link is among those out of its agent: all that may be taken are equally so,
    and what always goes forward is one of them."""
    loops = [one for one in siblings if (one.source, one.target) in backward]
    forward = [one for one in siblings if one not in loops]
    choices = sum(1 for one in forward if one.conditional) + len(loops)
    choices += any(not one.conditional for one in forward)
    # A condition with one way out may not hold.
    return 1.0 / (2 if choices == 1 and link.conditional else choices)

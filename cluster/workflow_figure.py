"""A workflow as a figure: boxes in columns from the start on, arrows with what is known of them.

Boxes and arrows are matplotlib's text and annotations, since arrows have to end at boxes that are
as large as what stands in them.
"""

from __future__ import annotations

import textwrap
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from cluster.workflow_picture import START, Links, edge_label, is_seen, node_label
from coordinator.workflow.prediction import EdgeView

COLUMN_INCHES, ROW_INCHES = 3.0, 1.5
START_COLUMN = 0.4
MARGIN_INCHES = 1.2
NAME_COLUMNS = 22
NAME_LINES = 3
BACK_BEND, SKIP_BEND, PAIR_BEND = 0.35, -0.25, 0.15
"""How far arrows bend: back over columns, forward over columns, and one of two between the same
boxes. Others are straight."""
LOOP_INCHES, LOOP_BEND = 0.25, -1.8
BOX_POINTS = 8
BOX_PADDING = 0.5
"""Of a box, in units of its letters' size."""
LINE_POINTS = 1.2 * BOX_POINTS
BOX = {"boxstyle": f"round,pad={BOX_PADDING}", "facecolor": "#dbe9f6", "edgecolor": "#4a6fa5"}
START_BOX = {"boxstyle": "circle,pad=0.3", "facecolor": "#4a6fa5", "edgecolor": "#4a6fa5"}
LABEL_BOX = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
ARROW = "#555555"

Place = tuple[float, float]


def figure_of(title: str, links: Links) -> Figure:
    """The figure; whoever asked for it saves it."""
    depths = links.depths()
    places = _places(depths, links)
    columns = [x for x, _ in places.values()]
    rows = [y for _, y in places.values()]
    width, height = max(columns) - min(columns), max(rows) - min(rows)
    size = (width + 2 * MARGIN_INCHES, height + 2 * MARGIN_INCHES)
    figure = Figure(figsize=size)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    # One unit is one inch, so that arrows bend as they are reckoned here.
    axes.set_xlim(min(columns) - MARGIN_INCHES, max(columns) + MARGIN_INCHES)
    axes.set_ylim(min(rows) - MARGIN_INCHES, max(rows) + MARGIN_INCHES)
    axes.set_title(title, y=0.98, va="top")
    boxes = {}
    for name, (x, y) in places.items():
        label = "" if name == START else _wrapped(node_label(links.agents.get(name), name))
        box = START_BOX if name == START else BOX
        boxes[name] = axes.text(
            x, y, label or " ", ha="center", va="center", fontsize=BOX_POINTS, bbox=box, zorder=1
        )
    taken = {(edge.source, edge.target) for edges in links.edges.values() for edge in edges}
    for edges in links.edges.values():
        for edge in edges:
            if edge.source in places and edge.target in places:
                mutual = (edge.target, edge.source) in taken
                _draw_edge(axes, edge, places, boxes, _bend(edge, depths, mutual))
    return figure


def _places(depths: dict[str, int], links: Links) -> dict[str, Place]:
    """Where boxes are, in inches; rows around 0. The start is small and near to what follows.

    In a column, boxes stand in the order of what leads to them, so that arrows cross less (the
    barycentre method: Sugiyama, Tagawa and Toda, 1981, one sweep).
    """
    before: dict[str, list[str]] = {}
    for source, edges in links.edges.items():
        for edge in edges:
            if depths.get(source, 0) < depths.get(edge.target, 0):
                before.setdefault(edge.target, []).append(source)
    columns: dict[int, list[str]] = {}
    for name, depth in depths.items():
        columns.setdefault(depth, []).append(name)
    places: dict[str, Place] = {}

    def height(name: str) -> float:
        return fmean([places[source][1] for source in before.get(name, ())] or [0.0])

    for depth in sorted(columns):
        names = sorted(columns[depth], key=lambda name: -height(name))
        x = COLUMN_INCHES * (depth or START_COLUMN)
        for row, name in enumerate(names):
            places[name] = x, ROW_INCHES * ((len(names) - 1) / 2 - row)
    return places


def _bend(edge: EdgeView, depths: dict[str, int], mutual: bool) -> float:
    steps = depths[edge.target] - depths[edge.source]
    if mutual and abs(steps) == 1:
        return PAIR_BEND
    if steps < 0:
        return BACK_BEND
    return SKIP_BEND if steps > 1 else 0.0


def _draw_edge(
    axes: Any, edge: EdgeView, places: dict[str, Place], boxes: dict[str, Any], bend: float
) -> None:
    """An arrow from box to box, and its label where it bends most."""
    (x, y), (to_x, to_y) = places[edge.source], places[edge.target]
    patches = [boxes[name].get_bbox_patch() for name in (edge.source, edge.target)]
    if edge.source == edge.target:
        # Above its box: what begins and ends within one can't be cut off at its border.
        lines = boxes[edge.source].get_text().count("\n") + 1
        y = to_y = y + (lines * LINE_POINTS / 2 + BOX_PADDING * BOX_POINTS) / 72
        x, to_x, bend, patches = x - LOOP_INCHES, to_x + LOOP_INCHES, LOOP_BEND, [None, None]
    label_x = (x + to_x + bend * (to_y - y)) / 2
    label_y = (y + to_y - bend * (to_x - x)) / 2
    axes.annotate(
        "",
        xy=(to_x, to_y),
        xytext=(x, y),
        arrowprops={
            "arrowstyle": "-|>",
            "color": ARROW,
            "linestyle": "solid" if is_seen(edge) else "dashed",
            "linewidth": 0.8 + 1.6 * edge.probability,
            "connectionstyle": f"arc3,rad={bend}",
            "patchA": patches[0],
            "patchB": patches[1],
            "shrinkA": 0,
            "shrinkB": 2,
        },
        zorder=2,  # after the boxes, which have their size only when they are drawn
    )
    axes.text(
        label_x,
        label_y,
        edge_label(edge),
        ha="center",
        va="center",
        fontsize=7,
        bbox=LABEL_BOX,
        zorder=3,
    )


def _wrapped(label: str) -> str:
    """A box's text with a name of at most some short lines."""
    name, *rest = label.split("\n")
    lines = textwrap.wrap(name, NAME_COLUMNS, max_lines=NAME_LINES, placeholder="…")
    return "\n".join([*(lines or [name]), *rest])

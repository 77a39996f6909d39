"""Load and ratio over time, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cluster.simulator.measures import is_good
from cluster.simulator.records import Result
from cluster.simulator.setup import Slo

WINDOW_S = 5.0
GOOD_WINDOW_S = 15.0
COLOURS = ("#1f77b4", "#2b7a3d", "#d62728", "#7f7f7f")


def draw(path: Path, results: Mapping[str, Result], slo: Slo) -> None:
    """One figure: demand of the first result, prefill workers of all, good calls of all."""
    figure = Figure(figsize=(12.0, 9.0), dpi=110, layout="constrained")
    load, ratio, good = figure.subplots(3, 1, sharex=True)
    first = next(iter(results.values()))
    _load(load, first)
    for colour, (name, result) in zip(COLOURS, results.items(), strict=False):
        _ratio(ratio, name, result, colour)
        _good(good, name, result, slo, colour)
    ratio.set_ylabel("workers that prefill")
    ratio.legend(loc="upper right", fontsize="small")
    good.set_ylabel(f"good calls in {GOOD_WINDOW_S:.0f} s, %")
    good.set_xlabel("seconds since the replay began")
    good.set_ylim(0, 104)
    good.legend(loc="lower right", fontsize="small")
    figure.savefig(path)


def _load(axes: Axes, result: Result) -> None:
    from cluster.bench.rebalance import answered

    prompt: dict[int, float] = {}
    answer: dict[int, float] = {}
    for call in result.calls:
        window = int(call.due_s / WINDOW_S)
        prompt[window] = prompt.get(window, 0.0) + call.computed_tokens / WINDOW_S
        for at, tokens in answered(call, WINDOW_S).items():
            answer[at] = answer.get(at, 0.0) + tokens / WINDOW_S
    windows = range(max([*prompt, *answer], default=0) + 1)
    times = [window * WINDOW_S for window in windows]
    axes.plot(times, [prompt.get(at, 0.0) / 1e3 for at in windows], color="#ff7f0e")
    axes.set_ylabel("prompts, 1000 tokens/s", color="#ff7f0e")
    other = axes.twinx()
    other.plot(times, [answer.get(at, 0.0) / 1e3 for at in windows], color="#9467bd")
    other.set_ylabel("answers, 1000 tokens/s", color="#9467bd")
    axes.set_title("what is asked for: uncached prompt tokens and answers' tokens")


def _ratio(axes: Axes, name: str, result: Result, colour: str) -> None:
    counts: dict[float, int] = {}
    for sample in result.samples:
        counts[sample.at_s] = counts.get(sample.at_s, 0) + (sample.role == "prefill")
    times = sorted(counts)
    axes.step(times, [counts[at] for at in times], where="post", label=name, color=colour)


def _good(axes: Axes, name: str, result: Result, slo: Slo, colour: str) -> None:
    good: dict[int, list[bool]] = {}
    for call in result.calls:
        good.setdefault(int(call.due_s / GOOD_WINDOW_S), []).append(is_good(call, slo))
    times = sorted(good)
    shares = [100.0 * sum(good[at]) / len(good[at]) for at in times]
    axes.plot([at * GOOD_WINDOW_S for at in times], shares, label=name, color=colour, marker=".")

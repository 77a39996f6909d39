"""A workload as a table for people, beside the trace that it imitates, if any."""

from __future__ import annotations

from rich.table import Table

from cluster.workload.form import Workload
from cluster.workload.habits import Reference
from cluster.workload.measure import Figures, figures

IMITATED = {
    "coding": "weka_single",
    "subagents": "weka_subagents",
    "assistant": "taubench_airline",
}
"""Generators whose runs are meant to look like those of one trace."""


def described(workload: Workload, references: dict[str, Reference]) -> Table:
    """The workload's figures, and those of the trace that was measured for it."""
    measured = figures(workload)
    reference = references.get(IMITATED.get(workload.name, ""))
    table = Table(title=f"{workload.name}: {workload.source or 'no source given'}")
    table.caption = f"licence: {workload.licence or 'none given'}; {_arrivals(workload, measured)}"
    table.add_column("")
    for column in ("p50", "p95 / p90", "whole"):
        table.add_column(column, justify="right")
    if reference:
        table.add_column(IMITATED[workload.name], justify="right", style="dim")
    for row in _rows(measured, reference):
        table.add_row(*(row if reference else row[:-1]))
    return table


def _rows(measured: Figures, reference: Reference | None) -> list[tuple[str, ...]]:
    """Label, median, p95 or p90, total, and the reference's numbers in the same order."""
    like = _reference_texts(reference) if reference else ("",) * 5
    return [
        ("runs", "", "", f"{measured.runs:,}", ""),
        (
            "calls (of a run)",
            f"{measured.calls_per_run_p50:,.0f}",
            f"{measured.calls_per_run_p95:,.0f}",
            f"{measured.calls:,}",
            "",
        ),
        (
            "prompt tokens",
            f"{measured.prompt_tokens_p50:,.0f}",
            f"{measured.prompt_tokens_p95:,.0f}",
            "",
            like[0],
        ),
        (
            "output tokens",
            f"{measured.output_tokens_p50:,.0f}",
            f"{measured.output_tokens_p95:,.0f}",
            "",
            like[1],
        ),
        (
            "uncached tokens, infinite cache",
            f"{measured.uncached_tokens_p50:,.0f}",
            f"{measured.uncached_tokens_p95:,.0f}",
            f"{measured.uncached_top_share:.0%} in 5 % of calls",
            like[2],
        ),
        ("cached share, infinite cache", "", "", f"{measured.cached_share:.1%}", like[3]),
        ("pause, s", f"{measured.gap_s_p50:,.1f}", f"{measured.gap_s_p90:,.1f}", "", like[4]),
        (
            "calls set off at once",
            "",
            "",
            f"{measured.width_mean:.1f} on average, {measured.width_max} at most, "
            f"{measured.joins:,} joins",
            "",
        ),
        (
            "pauses of a run, s",
            f"{measured.span_s_p50:,.0f}",
            f"{measured.span_s_p95:,.0f}",
            "",
            "",
        ),
    ]


def _reference_texts(reference: Reference) -> tuple[str, ...]:
    return (
        f"{reference.prompt_tokens_p50:,.0f}",
        f"{reference.output_tokens_p50:,.0f}",
        f"{reference.uncached_tokens_p50:,.0f} / {reference.uncached_tokens_p95:,.0f}, "
        f"{reference.uncached_top_share:.0%}",
        f"{reference.cached_share:.1%}",
        f"{reference.gap_s_p50:,.1f} / {reference.gap_s_p90:,.1f}",
    )


def _arrivals(workload: Workload, measured: Figures) -> str:
    dropped = f"; {workload.dropped_runs:,} runs left out" if workload.dropped_runs else ""
    if workload.concurrency:
        return f"{workload.concurrency} runs kept going{dropped}"
    if not workload.arrivals_known:
        return f"no arrivals given{dropped}"
    return f"arrivals over {measured.arrivals_s:,.0f} s{dropped}"

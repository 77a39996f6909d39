"""What a workload is like, in numbers: the same for traces and for what imitates them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec

from cluster.workload.form import Call, Run, Workload, call_count
from cluster.workload.quantiles import quantile
from cluster.workload.spans import SeenBlocks, Spans, cut


class Cached(msgspec.Struct, frozen=True, gc=False):
    """Of one call: how much of its prompt a cache without limit would hold."""

    run: Run
    call: Call
    cached_tokens: int

    @property
    def uncached_tokens(self) -> int:
        """What has to be prefilled."""
        return self.call.prompt_tokens - self.cached_tokens


class Figures(msgspec.Struct, frozen=True, gc=False):
    """A workload in numbers. Quantiles are named by their percent.

    ``cached_share``: part of all prompt tokens that are in an infinite cache, which holds
    prompts and outputs; ``uncached_top_share``: part of the uncached tokens that is in the
    5 % of calls that have most of them. ``width``: calls that one call sets off at once;
    ``span_s``: from a run's first pause to its last, without any time to compute;
    ``arrivals_s``: from the first run's arrival to the last one's.
    """

    runs: int
    calls: int
    calls_per_run_p50: float
    calls_per_run_p95: float
    prompt_tokens_p50: float
    prompt_tokens_p95: float
    output_tokens_p50: float
    output_tokens_p95: float
    cached_share: float
    uncached_tokens_p50: float
    uncached_tokens_p95: float
    uncached_top_share: float
    gap_s_p50: float
    gap_s_p90: float
    joins: int
    width_max: int
    width_mean: float
    span_s_p50: float
    span_s_p95: float
    arrivals_s: float


def cached(workload: Workload) -> Iterator[Cached]:
    """Every call with what an infinite cache holds of its prompt, run after run."""
    seen: dict[str, SeenBlocks] = {}
    for run in workload.runs:
        scope = seen.setdefault(run.scope, SeenBlocks())
        for call in run.calls:
            blocks = scope.leading(call.blocks)
            scope.add(call.blocks)
            scope.add(_filled(call, workload.block_tokens))
            yield Cached(run, call, blocks * workload.block_tokens)


def _filled(call: Call, block_tokens: int) -> Spans:
    """The blocks that the output fills to their end."""
    end = (call.prompt_tokens + call.output_tokens) // block_tokens
    return cut(call.continued, end - call.prompt_tokens // block_tokens)


def figures(workload: Workload) -> Figures:
    """The workload in numbers."""
    calls = [call for run in workload.runs for call in run.calls]
    prompts = sorted(call.prompt_tokens for call in calls)
    outputs = sorted(call.output_tokens for call in calls)
    uncached = sorted(entry.uncached_tokens for entry in cached(workload))
    gaps_s = sorted(call.think_s for call in calls if call.parents)
    lengths = sorted(len(run.calls) for run in workload.runs)
    spans_s = sorted(_span_s(run) for run in workload.runs)
    widths = [width for run in workload.runs for width in _widths(run)]
    top = uncached[len(uncached) - -(-len(uncached) // 20) :]
    return Figures(
        runs=len(workload.runs),
        calls=call_count(workload),
        calls_per_run_p50=quantile(lengths, 0.5),
        calls_per_run_p95=quantile(lengths, 0.95),
        prompt_tokens_p50=quantile(prompts, 0.5),
        prompt_tokens_p95=quantile(prompts, 0.95),
        output_tokens_p50=quantile(outputs, 0.5),
        output_tokens_p95=quantile(outputs, 0.95),
        cached_share=1 - sum(uncached) / max(1, sum(prompts)),
        uncached_tokens_p50=quantile(uncached, 0.5),
        uncached_tokens_p95=quantile(uncached, 0.95),
        uncached_top_share=sum(top) / max(1, sum(uncached)),
        gap_s_p50=quantile(gaps_s, 0.5),
        gap_s_p90=quantile(gaps_s, 0.9),
        joins=sum(len(call.parents) > 1 for call in calls),
        width_max=max(widths, default=0),
        width_mean=sum(widths) / max(1, len(widths)),
        span_s_p50=quantile(spans_s, 0.5),
        span_s_p95=quantile(spans_s, 0.95),
        arrivals_s=max((run.arrival_s for run in workload.runs), default=0.0),
    )


def _span_s(run: Run) -> float:
    """The longest path through the run's pauses."""
    ends_s: list[float] = []
    for call in run.calls:
        ends_s.append(call.think_s + max((ends_s[parent] for parent in call.parents), default=0.0))
    return max(ends_s, default=0.0)


def _widths(run: Run) -> list[int]:
    """How many calls each call sets off, where there are several."""
    children = Counter(parent for call in run.calls for parent in call.parents)
    return [count for count in children.values() if count > 1]

"""Measures agents' habits from traces: ``python -m cluster.workload.fit TRACES``.

Writes ``fitted.json`` beside this file. The same traces give the same file.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import msgspec

from cluster.workload.common import read_common
from cluster.workload.form import Call, Run, Workload
from cluster.workload.habits import FITTED, Agent, Habits, Reference, Shape
from cluster.workload.measure import figures
from cluster.workload.quantiles import fitted, quantile
from cluster.workload.spans import shared, total

TRACES = ("weka_single", "weka_subagents", "lmcache_miniswe", "whowhen", "taubench_airline")
CLOCKED = ("weka_single", "weka_subagents")
"""Those that recorded pauses. Pauses of others are none, or guesses of the reader."""
REWRITTEN_BLOCKS_MAX = 8
"""A prompt that loses at most so many blocks had its end rewritten; else it was compacted."""
STATIC_QUANTILE = 0.05
"""Where traces do not say what runs share: as much as the shortest first prompts have."""

Talk = tuple[Call, ...]
"""The calls of one agent in one run."""


def main() -> None:
    """Read the traces of a folder, write the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path, help="the folder with the traces")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name(FITTED))
    options = parser.parse_args()
    workloads = {name: read_common(options.traces / f"{name}.jsonl.gz") for name in TRACES}
    text = msgspec.json.format(msgspec.json.encode(fit(workloads)), indent=1)
    options.output.write_bytes(_packed(text) + b"\n")


def fit(traces: dict[str, Workload]) -> Habits:
    """The habits of the agents of all ``TRACES``."""
    subagents, team = traces["weka_subagents"], traces["whowhen"]
    return Habits(
        licences={name: f"{trace.licence}, {trace.source}" for name, trace in traces.items()},
        agents={
            "coder": habits_of(traces["weka_single"], {"main"}),
            "lead": habits_of(subagents, {"main"}),
            "explorer": habits_of(subagents, {"Explore"}),
            "delegate": habits_of(subagents, {"general-purpose", "Plan"}),
            "engineer": habits_of(traces["lmcache_miniswe"], {""}),
            "assistant": habits_of(traces["taubench_airline"], {"agent"}),
            "planner": habits_of(team, _kinds(team, "planner")),
            "reviewer": habits_of(team, _kinds(team, "reviewer")),
            "expert": habits_of(team, _kinds(team, "expert")),
        },
        shape=_shape(subagents, team),
        references={name: _reference(trace) for name, trace in traces.items()},
    )


def role(kind: str) -> str:
    """What an agent of the ``whowhen`` transcripts is in a team, by its name."""
    if kind == "Orchestrator":
        return "planner"
    return "reviewer" if "Verification" in kind or "Validation" in kind else "expert"


def _kinds(workload: Workload, wanted: str) -> set[str]:
    kinds = {call.kind for run in workload.runs for call in run.calls}
    return {kind for kind in kinds if role(kind) == wanted}


def habits_of(workload: Workload, kinds: set[str]) -> Agent:
    """The habits of a workload's agents of some kinds."""
    talks = [talk for _, talk in _talks(workload, kinds)]
    calls = [call for talk in talks for call in talk]
    pairs = [pair for talk in talks for pair in pairwise(talk)]
    block_tokens = workload.block_tokens
    new, rewritten, kept, fresh = [], [], [], []
    for before, call in pairs:
        lost_blocks = total(before.blocks) - shared(before.blocks, call.blocks)
        if lost_blocks > REWRITTEN_BLOCKS_MAX:
            common = shared(before.blocks, call.blocks) * block_tokens
            kept.append(common / before.prompt_tokens)
            fresh.append((call.prompt_tokens - common) / before.prompt_tokens)
            continue
        if lost_blocks:
            rewritten.append(lost_blocks * block_tokens)
        new.append(max(0, call.prompt_tokens - before.prompt_tokens - before.output_tokens))
    gaps_s = [call.think_s for _, call in pairs]
    return Agent(
        trace=workload.name,
        static_tokens=_static_tokens(workload, kinds),
        context_tokens=max(call.prompt_tokens for call in calls),
        calls=fitted(len(talk) for talk in talks),
        first_tokens=fitted(talk[0].prompt_tokens for talk in talks),
        new_tokens=fitted(new),
        output_tokens=fitted(call.output_tokens for call in calls),
        think_s=fitted(gaps_s) if workload.name in CLOCKED else None,
        rewritten_share=round(len(rewritten) / len(pairs), 5),
        rewritten_tokens=fitted(rewritten) if rewritten else None,
        compacted_share=round(len(kept) / len(pairs), 5),
        kept_share=fitted(kept) if kept else None,
        fresh_share=fitted(fresh) if kept else None,
    )


def _talks(workload: Workload, kinds: set[str]) -> Iterator[tuple[Run, Talk]]:
    for run in workload.runs:
        talks: dict[str, list[Call]] = defaultdict(list)
        for call in run.calls:
            if call.kind in kinds:
                talks[call.agent].append(call)
        for talk in talks.values():
            yield run, tuple(talk)


def _static_tokens(workload: Workload, kinds: set[str]) -> int:
    """What first prompts of a kind have in common over runs, where ids tell; else a guess."""
    firsts = [(run.scope, talk[0]) for run, talk in _talks(workload, kinds)]
    if len({scope for scope, _ in firsts}) > 1:
        ordered = sorted(first.prompt_tokens for _, first in firsts)
        return int(quantile(ordered, STATIC_QUANTILE))
    common = []
    for position, (_, first) in enumerate(firsts):
        common += [
            shared(first.blocks, other.blocks)
            for at, (_, other) in enumerate(firsts)
            if at != position and first.kind == other.kind
        ]
    return int(quantile(sorted(common), 0.5)) * workload.block_tokens


def _shape(subagents: Workload, team: Workload) -> Shape:
    widths: list[int] = []
    weights: dict[str, int] = defaultdict(int)
    for run in subagents.runs:
        started = defaultdict(set)
        for call in run.calls:
            for parent in (run.calls[index] for index in call.parents):
                if parent.kind == "main" != call.kind:
                    started[parent.index].add(call.agent)
                    weights["explorer" if call.kind == "Explore" else "delegate"] += 1
        widths += [len(agents) for agents in started.values()]
    mains = sum(call.kind == "main" for run in subagents.runs for call in run.calls)
    rounds = [_turns(run, "reviewer") for run in team.runs]
    return Shape(
        fork_share=round(len(widths) / mains, 5),
        fork_width=fitted(widths),
        fork_weights=dict(sorted(weights.items())),
        speakers=fitted(len({call.kind for call in run.calls}) for run in team.runs),
        rounds=fitted(count for count in rounds if count),
    )


def _turns(run: Run, wanted: str) -> int:
    """How often an agent of a role begins to speak after another one."""
    roles = ["", *(role(call.kind) for call in run.calls)]
    return sum(now == wanted != before for before, now in pairwise(roles))


def _reference(workload: Workload) -> Reference:
    measured = msgspec.structs.asdict(figures(workload))
    names: Iterable[str] = Reference.__struct_fields__
    return Reference(**{name: round(measured[name], 4) for name in names})


def _packed(text: bytes) -> bytes:
    """Lists of numbers on one line each."""
    return re.sub(rb"\[[^\[\]]*\]", lambda found: b" ".join(found[0].split()), text)


if __name__ == "__main__":
    main()

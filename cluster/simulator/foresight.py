"""What only a replay can know of its calls: how long each will take, and what comes after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from cluster.simulator.critical_path import critical_path
from cluster.simulator.setup import ClusterSetup
from cluster.workload.form import Run, Workload


class Foresight(NamedTuple):
    """One call. Seconds are of one engine that serves the call alone, with all of the prompt
    cached that could be.

    ``remaining_s``: this call and all of its run that is not before it. ``path_s``: the longest
    path from its beginning to the run's end, pauses included. ``after_prefill_s`` and
    ``after_decode_s``: the rest of the run without this call. ``active``: the share of its time
    that the run computes. ``continued``: another call's prompt goes on from this one's output.
    """

    output_tokens: int
    remaining_s: float
    path_s: float
    after_prefill_s: float
    after_decode_s: float
    active: float
    continued: bool
    largest_tokens: int
    """Prompt and output of the largest call of the run from this one on."""


class _Alone(NamedTuple):
    """What a call takes alone."""

    prefill_s: float
    decode_s: float


def foresee(workload: Workload, setup: ClusterSetup) -> Mapping[tuple[int, int], Foresight]:
    """Of all calls, by the run's position in the workload and the call's index."""
    alone = {
        (record.run, record.call): _Alone(
            record.first_token_s - record.due_s, record.ended_s - record.first_token_s
        )
        for record in critical_path(workload, setup).calls
    }
    foreseen: dict[tuple[int, int], Foresight] = {}
    for number, run in enumerate(workload.runs):
        calls = [alone[number, call.index] for call in run.calls]
        for index, foresight in enumerate(_of_run(run, calls)):
            foreseen[number, index] = foresight
    return foreseen


def _of_run(run: Run, alone: list[_Alone]) -> list[Foresight]:
    total = _Alone(sum(each.prefill_s for each in alone), sum(each.decode_s for each in alone))
    paths_s = _paths_s(run, alone)
    pause_s = sum(call.think_s for call in run.calls)
    busy_s = total.prefill_s + total.decode_s
    largest = [call.prompt_tokens + call.output_tokens for call in run.calls]
    for index in range(len(largest) - 1, 0, -1):
        largest[index - 1] = max(largest[index - 1], largest[index])
    foreseen: list[Foresight] = []
    for call, own, path_s, before in zip(run.calls, alone, paths_s, _ancestors(run), strict=True):
        earlier = [alone[index] for index in range(call.index) if before >> index & 1]
        prefill_s = total.prefill_s - sum(each.prefill_s for each in earlier)
        decode_s = total.decode_s - sum(each.decode_s for each in earlier)
        foreseen.append(
            Foresight(
                output_tokens=call.output_tokens,
                remaining_s=prefill_s + decode_s,
                path_s=path_s,
                after_prefill_s=max(0.0, prefill_s - own.prefill_s),
                after_decode_s=max(0.0, decode_s - own.decode_s),
                active=busy_s / (busy_s + pause_s),
                continued=bool(call.continued),
                largest_tokens=largest[call.index],
            )
        )
    return foreseen


def _paths_s(run: Run, alone: list[_Alone]) -> list[float]:
    paths_s = [each.prefill_s + each.decode_s for each in alone]
    for call in reversed(run.calls):
        for parent in call.parents:
            own_s = alone[parent].prefill_s + alone[parent].decode_s
            through_s = own_s + call.think_s + paths_s[call.index]
            paths_s[parent] = max(paths_s[parent], through_s)
    return paths_s


def _ancestors(run: Run) -> list[int]:
    """Bitmasks of the calls that ended before each call began."""
    before: list[int] = []
    for call in run.calls:
        mask = 0
        for parent in call.parents:
            mask |= before[parent] | 1 << parent
        before.append(mask)
    return before

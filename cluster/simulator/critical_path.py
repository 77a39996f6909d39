"""The bound that no cluster can beat: every call on an engine of its own, nothing forgotten.

A call begins when it is due. What of its prompt any call before it had, prompt or output, is
cached; the rest is prefilled in one step on an engine that does nothing else, and the output
decoded there at batch 1. Nothing waits, moves or is lost; what remains is the longest path
through each run's calls and pauses. With it comes what each call takes like that, which is
what a policy that knows the future reckons with.

It is a lower bound for clusters of these engines. It says nothing of engines with more
devices, and leaves out what messages and the API process take.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from cluster.simulator.records import CallRecord, Gaps, Result, RunRecord, Totals
from cluster.simulator.setup import ClusterSetup
from cluster.workload.chains import Chains
from cluster.workload.form import Call, Run, Workload
from cluster.workload.replay import Due, Replay
from coordinator.cost import StepCost

CONFIGURATION = "infinite"


def critical_path(workload: Workload, setup: ClusterSetup, seed: int = 0) -> Result:
    """The replay of a workload with infinite resources. Of ``setup`` only the engines count.

    ``seed`` is only noted: there is no chance in it.
    """
    return _Infinite(workload, setup).replayed(seed)


def decode_s(cost: StepCost, prompt_tokens: int, output_tokens: int) -> float:
    """All tokens behind the first one, alone on the engine.

    A step's time grows in proportion to the context (sliding windows aside, with which this
    is a lower bound), so the mean of the first and the last step is that of all.
    """
    steps = output_tokens - 1
    if steps < 1:
        return 0.0
    first_s = cost.decode_step_s(1, prompt_tokens)
    last_s = cost.decode_step_s(1, prompt_tokens + steps - 1)
    return steps * 0.5 * (first_s + last_s)


def longest_think_s(run: Run) -> float:
    """The longest path through a run's pauses, as if all calls took no time."""
    done_s: list[float] = []
    for call in run.calls:
        begun_s = max((done_s[parent] for parent in call.parents), default=0.0)
        done_s.append(begun_s + call.think_s)
    return max(done_s, default=0.0)


class _Seen:
    """Blocks that have been computed, by scope; a scope goes with its last run."""

    def __init__(self, workload: Workload, block_tokens: int) -> None:
        self._chains = Chains(workload.block_tokens, block_tokens)
        self._block_tokens = block_tokens
        self._runs_left = Counter(run.scope for run in workload.runs)
        self._blocks: dict[str, set[int]] = {}

    def cached_tokens(self, run: Run, call: Call) -> int:
        """How much of a prompt is there; its last token is not, as on a real engine."""
        seen = self._blocks.get(run.scope)
        if not seen:
            return 0
        hashes = memoryview(self._chains.prompt(run, call)).cast("Q")
        blocks = _leading(hashes, seen)
        return min(blocks, (call.prompt_tokens - 1) // self._block_tokens) * self._block_tokens

    def add(self, run: Run, call: Call) -> None:
        """A call is computed."""
        seen = self._blocks.setdefault(run.scope, set())
        hashes = memoryview(self._chains.computed(run, call)).cast("Q")
        seen.update(hashes[_leading(hashes, seen) :])

    def ended(self, run: Run) -> None:
        """No further calls of the run will come."""
        self._chains.forget(run.id)
        self._runs_left[run.scope] -= 1
        if not self._runs_left[run.scope]:
            self._blocks.pop(run.scope, None)


def _leading(hashes: Sequence[int], seen: set[int]) -> int:
    """How many of a chain's first blocks are in a set that has with each block all before it."""
    return bisect_left(hashes, True, key=lambda block: block not in seen)


class _Infinite:
    """One replay."""

    def __init__(self, workload: Workload, setup: ClusterSetup) -> None:
        self._workload = workload
        self._cost = setup.cost()
        self._overhead_s = setup.options.step_overhead_s
        self._seen = _Seen(workload, setup.options.block_size)
        self._calls: list[CallRecord] = []
        self._runs: dict[int, RunRecord] = {}

    def replayed(self, seed: int) -> Result:
        """Everything in order of time."""
        replay = Replay(self._workload)
        ends: list[tuple[float, int, int]] = []
        while True:
            due_s = replay.next_s
            if due_s is not None and (not ends or due_s <= ends[0][0]):
                for due in replay.due(due_s):
                    heapq.heappush(ends, (self._served(due), due.run, due.call))
            elif ends:
                ended_s, run, call = heapq.heappop(ends)
                replay.ended(run, call, ended_s)
                self._ended(run, ended_s)
            else:
                break
        return Result(
            configuration=CONFIGURATION,
            workload=self._workload.name,
            seed=seed,
            where="simulator",
            calls=self._calls,
            runs=[record for _, record in sorted(self._runs.items())],
            samples=[],
            gaps=Gaps(),
            totals=Totals(duration_s=max((call.ended_s for call in self._calls), default=0.0)),
        )

    def _served(self, due: Due) -> float:
        """When a call that is due ends."""
        run = self._workload.runs[due.run]
        call = run.calls[due.call]
        if due.run not in self._runs:
            began_s = due.at_s - call.think_s
            arrival_s = began_s if self._workload.concurrency else run.arrival_s
            self._runs[due.run] = RunRecord(
                run=due.run,
                id=run.id,
                workflow=run.workflow,
                arrival_s=arrival_s,
                think_s=longest_think_s(run),
            )
        cached_tokens = self._seen.cached_tokens(run, call)
        self._seen.add(run, call)
        new_tokens = call.prompt_tokens - cached_tokens
        first_token_s = due.at_s + self._cost.prefill_s(new_tokens, cached_tokens)
        first_token_s += self._overhead_s
        ended_s = first_token_s + decode_s(self._cost, call.prompt_tokens, call.output_tokens)
        ended_s += self._overhead_s * max(0, call.output_tokens - 1)
        self._calls.append(
            CallRecord(
                run=due.run,
                call=due.call,
                due_s=due.at_s,
                agent=call.kind or call.agent,
                planned_s=due.at_s,
                first_token_s=first_token_s,
                ended_s=ended_s,
                prompt_tokens=call.prompt_tokens,
                output_tokens=call.output_tokens,
                local_cached_tokens=cached_tokens,
                computed_tokens=new_tokens,
                outcome="stop",
            )
        )
        return ended_s

    def _ended(self, number: int, ended_s: float) -> None:
        run, record = self._workload.runs[number], self._runs[number]
        record.calls += 1
        record.ended_s = max(record.ended_s, ended_s)
        if record.calls == len(run.calls):
            record.finished = True
            self._seen.ended(run)

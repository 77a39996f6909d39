"""Calls as steps of workflows: every call that begins or ends moves its run on.

What it costs is paid for every call, so nothing here looks at more than one run.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from coordinator.protocol import CallContext, Finished, Submit
from coordinator.state import Call, CallKey, CallPhase, State
from coordinator.workflow.journal import Began, Over
from coordinator.workflow.keeping import DropRun, KeepRun
from coordinator.workflow.learner import Learner
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.prediction import RunKey
from coordinator.workflow.registry import Registry
from coordinator.workflow.roster import Run, RunEnd, Runs

CANCELLED_STATUS = 410
"""Of HTTP: clients do not try such a call again by themselves."""
DEADLINE_STATUS = 504
REFUSALS = {
    RunEnd.CANCELLED: (CANCELLED_STATUS, "the run was cancelled"),
    RunEnd.DEADLINE: (DEADLINE_STATUS, "the run is over its deadline"),
}


class Tracker:
    """The runs of all workflows, moved on by calls."""

    def __init__(
        self, state: State, limits: WorkflowLimits, registry: Registry, learner: Learner
    ) -> None:
        self._state = state
        self._limits = limits
        self._registry = registry
        self.learner = self._learner = learner
        self.runs = Runs(limits)

    # --- of calls, in this order ------------------------------------------------------

    def refusal(self, message: Submit) -> tuple[int, str] | None:
        """Status and reason if the call's run is to get no more calls."""
        key = self._key(message.context)
        why = self.runs.refusal(key) if key is not None else None
        return None if why is None else REFUSALS[why]

    def with_terms(self, message: Submit, now_s: float) -> Submit:
        """A new call on the terms of its run, if that has any: deadline and priority."""
        key = self._key(message.context)
        run = self.runs.live.get(key) if key is not None else None
        if run is None or not run.explicit:
            return message
        deadline_s = message.deadline_s
        if run.deadline_s is not None:
            left_s = max(run.deadline_s - now_s, 0.001)
            deadline_s = min(deadline_s or left_s, left_s)
        priority = message.priority or run.priority
        return msgspec.structs.replace(message, deadline_s=deadline_s, priority=priority)

    def opened(self, call: Call, now_s: float) -> None:
        """A call waits for its first plan."""
        submit = call.submit
        context = submit.context
        key = self._key(context)
        parent = context.parent
        if key is not None:
            call.run = run = self.runs.opened(key, call.key, context.thread, context.agent, now_s)
            if run is not None:
                parent = run.agents.get(parent, parent)
                self._set_due(run)
        tenant, workflow, name = key or (context.tenant, context.workflow, "")
        began = Began(
            tenant,
            workflow,
            name,
            _name(call),
            context.agent,
            submit.prompt_tokens,
            submit.block_hashes,
            self._learner.at_s(now_s),
            parent,
            context.final,
        )
        self._learner.began(began, _is_noted(context))

    def closed(self, call: Call, finished: Finished | None, now_s: float) -> None:
        """A call has ended, by whatever way."""
        context = call.submit.context
        done = call.phase is CallPhase.FINISHED
        tokens = max(0, finished.output_tokens) if finished is not None else call.generated_tokens
        run = call.run
        at_s = self._learner.at_s(now_s)
        over = Over(context.tenant, context.workflow, _name(call), tokens, at_s, done)
        self._learner.ended(over, _is_noted(context))
        if run is None:
            return
        declared = self._registry.declared.get(context.workflow)
        last = done and declared is not None and context.agent in declared.last
        if self.runs.closed(run, call.key, done and context.final, last, now_s):
            self._learner.run_over(run.key, run.completed, now_s)
            self._dropped(run)
        self._set_due(run)

    # --- of runs -----------------------------------------------------------------------

    def start(self, key: RunKey, deadline_s: float, priority: int, now_s: float) -> Run | None:
        """A run starts explicitly; ``deadline_s`` from now, 0 for none. None without room."""
        due_s = now_s + deadline_s if deadline_s else None
        run = self.runs.start(key, due_s, priority, now_s)
        if run is not None:
            self._set_due(run)
        return run

    def restore(self, kept: Sequence[KeepRun], now_s: float) -> None:
        """Runs that were started with an earlier core and are not over; they have been silent
        since this one began."""
        for each in kept:
            due_s = None
            if each.deadline_at_s is not None:
                due_s = now_s + each.deadline_at_s - self._learner.at_s(now_s)
            key = RunKey(each.tenant, each.workflow, each.run)
            run = self.runs.start(key, due_s, each.priority, now_s)
            if run is not None:
                self._set_due(run)

    def kept(self, run: Run) -> KeepRun:
        """What of an explicit run is to outlive the core."""
        deadline_at_s = None if run.deadline_s is None else self._learner.at_s(run.deadline_s)
        return KeepRun(*run.key, deadline_at_s, run.priority)

    def finish(self, run: Run, completed: bool, now_s: float) -> None:
        """A run gets no more calls: it is over when the last open one is. ``completed``: it came
        to its own end."""
        run.final = True
        run.completed = completed
        if not run.open:
            self._end(run, RunEnd.FINAL, now_s)

    def cancel(self, run: Run, now_s: float) -> list[CallKey]:
        """End a run; its open calls, which are to be stopped."""
        return self._end(run, RunEnd.CANCELLED, now_s)

    def due(self, key: RunKey, now_s: float) -> list[CallKey]:
        """A run was silent for long, or is over its deadline: calls that are to be stopped."""
        run = self.runs.live[key]
        if run.deadline_s is not None and now_s >= run.deadline_s:
            return self._end(run, RunEnd.DEADLINE, now_s)
        if run.open:
            self._set_due(run)
            return []
        limit_s = self._learner.profiles.idle_s(key.tenant, key.workflow)
        # As the deadline is reckoned: a difference that is rounded otherwise would be due for ever.
        if run.heard_s + limit_s <= now_s:
            return self._end(run, RunEnd.IDLE, now_s)
        silent_s = max(0.0, now_s - run.heard_s)
        # Asked again before that: more may be known of its workflow by then.
        self._set_due(run, min(limit_s, 2.0 * silent_s))
        return []

    def counters(self) -> dict[str, int]:
        """What became of runs so far, by name."""
        ends = {f"runs_{why.value}": count for why, count in self.runs.ends.items()}
        return {"runs_begun": self.runs.begun, "calls_untracked": self.runs.untracked, **ends}

    def check(self) -> None:
        """Assert that runs and calls agree; for tests."""
        self.runs.check()
        open_calls = {key: run for run in self.runs.live.values() for key in run.open}
        for call_key, run in open_calls.items():
            assert self._state.calls[call_key].run is run
        for call in self._state.calls.values():
            if call.run is not None and self.runs.live.get(call.run.key) is call.run:
                assert call.key in call.run.open
        for key, run in self.runs.live.items():
            due_s = self._state.deadlines.get(("run", *key))
            assert (due_s is None) == (self.runs.due_s(run, 0.0) is None), key

    def _key(self, context: CallContext) -> RunKey | None:
        """The run that a call belongs to; None for a call that is a run of its own."""
        if not context.run:
            return None
        longest = max(map(len, (context.tenant, context.workflow, context.run, context.thread)))
        if longest > self._limits.name_bytes:
            return None
        return self.runs.resolve(RunKey(context.tenant, context.workflow, context.run))

    def _end(self, run: Run, why: RunEnd, now_s: float) -> list[CallKey]:
        calls = sorted(run.open)
        self.runs.end(run, why, now_s)
        completed = why is RunEnd.IDLE or (why is RunEnd.FINAL and run.completed)
        self._learner.run_over(run.key, completed, now_s)
        self._state.deadlines.drop(("run", *run.key))
        self._dropped(run)
        return calls

    def _dropped(self, run: Run) -> None:
        if run.explicit:
            self._registry.run_over(DropRun(*run.key))

    def _set_due(self, run: Run, silent_s: float = 0.0) -> None:
        """``silent_s``: how long it may be silent until it is looked at. What was learned is asked
        only then, not for every call."""
        key = ("run", *run.key)
        due_s = None
        if self.runs.live.get(run.key) is run:
            due_s = self.runs.due_s(run, silent_s or self._limits.idle_least_s)
        if due_s is None:
            self._state.deadlines.drop(key)
        else:
            self._state.deadlines.set(key, due_s)


def _name(call: Call) -> str:
    """A call as one text, unique among the live ones."""
    return "\0".join(call.key)


def _is_noted(context: CallContext) -> bool:
    """Whether it says anything of itself, so that it is worth to be written down."""
    return bool(context.agent or context.workflow or context.run)

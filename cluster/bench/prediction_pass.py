"""One pass of predictions over a timeline: what was predicted, and what then came.

Predictions go on learning while they are judged, as in service: each value is predicted before
it is seen. The second half of the time is judged.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from cluster.bench.prediction_load import Judged
from cluster.bench.timeline import OVERHEAD_S, PREFILL_TOKENS_PER_S, Event, timeline
from cluster.workload.chains import Chains
from cluster.workload.common import ASSUMED_TOKENS_PER_S
from cluster.workload.form import context_of
from coordinator.workflow.automaton import ORDER
from coordinator.workflow.forecast import TICK_S, Forecaster
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.prediction import RunKey
from coordinator.workflow.profiles import Profiles
from coordinator.workflow.scores import GAP_BINS, Scores

HORIZON_S = 30.0
TICKS = round(HORIZON_S / TICK_S)
_Path = tuple[str, ...]


class Pass:
    """Profiles that are told a timeline."""

    def __init__(self, load: Judged, finals: bool) -> None:
        """``finals``: clients say which call is a run's last."""
        self.load = load
        self.limits = WorkflowLimits()
        self.block_tokens = load.workload.block_tokens
        self.profiles = Profiles(self.limits, self.block_tokens, score_fading=1.0)
        self.updates_s: list[float] = []
        self._finals = finals
        self._chains = Chains(self.block_tokens, self.block_tokens)

    def tell(self, event: Event) -> None:
        """Tell the profiles of an event, and measure how long that takes."""
        call = event.call
        if event.ends:
            began_s = time.perf_counter()
            self.profiles.observe_end(event.call_id, call.output_tokens, event.at_s)
            self.updates_s.append(time.perf_counter() - began_s)
            return
        context = context_of(event.run, call)
        # A run of one call is a call without identity.
        name = event.run.id if len(event.run.calls) > 1 else ""
        key = RunKey("", event.run.workflow, name)
        prompt = self._chains.prompt(event.run, call)
        if call.index == len(event.run.calls) - 1:
            self.forget(event.run.id)
        began_s = time.perf_counter()
        self.profiles.observe_start(
            key,
            event.call_id,
            context.agent,
            call.prompt_tokens,
            prompt,
            event.at_s,
            parent=context.parent,
            final=context.final and self._finals,
            uncached_tokens=event.uncached_tokens,
        )
        self.updates_s.append(time.perf_counter() - began_s)

    def forget(self, run: str) -> None:
        """Drop what is kept of a run's prompts here."""
        self._chains.forget(run)


class Bound:
    """How many next agents could be predicted at best from the last ``ORDER`` agents.

    ``best``: if what follows each path was known in advance, as the issue of it is in the
    judged half itself; a path that occurs once is then always right. ``fair``: from all other
    runs of the judged half, with shorter paths where they have not seen it.
    """

    def __init__(self) -> None:
        self._paths: dict[tuple[str, int], _Path] = {}
        self._events: list[tuple[str, str, _Path, str]] = []
        self._followed: set[tuple[str, int]] = set()

    def see(self, event: Event, judged: bool) -> None:
        """A call starts."""
        run, call = event.run, event.call
        agent = call.kind or call.agent
        path: _Path = ("",)
        if call.parents:
            parent = (run.id, call.parents[-1])
            path = self._paths[parent]
            if judged and parent not in self._followed:
                self._events.append((run.workflow, run.id, path, agent))
            self._followed.add(parent)
        self._paths[run.id, call.index] = (*path, agent)[-ORDER:]

    def best(self, workflow: str | None = None) -> float:
        """Share that is right if the likeliest of each path is known; 0 without any."""
        events = self._of(workflow)
        counts: dict[tuple[str, _Path], Counter[str]] = defaultdict(Counter)
        for name, _, path, agent in events:
            counts[name, path][agent] += 1
        right = sum(max(found.values()) for found in counts.values())
        return right / max(1, len(events))

    def fair(self, workflow: str | None = None) -> float:
        """Share that is right if that is taken from the other runs."""
        events = self._of(workflow)
        total: dict[tuple[str, _Path], Counter[str]] = defaultdict(Counter)
        own: dict[tuple[str, _Path], Counter[str]] = defaultdict(Counter)
        for name, run, path, agent in events:
            for length in range(len(path) + 1):
                shorter = path[len(path) - length :]
                total[name, shorter][agent] += 1
                own[run, shorter][agent] += 1
        right = 0
        for name, run, path, agent in events:
            for length in range(len(path), -1, -1):
                shorter = path[len(path) - length :]
                others = total[name, shorter] - own[run, shorter]
                if others:
                    right += max(others, key=lambda one: (others[one], one)) == agent
                    break
        return right / max(1, len(events))

    def _of(self, workflow: str | None) -> list[tuple[str, str, _Path, str]]:
        return [event for event in self._events if workflow in (None, event[0])]

    @property
    def named(self) -> bool:
        """Whether there is more than one agent to tell apart."""
        return len({agent for _, _, _, agent in self._events}) > 1


class Summary(msgspec.Struct, frozen=True):
    """What was judged of agents, lengths and gaps. Shares; ``None`` where there is nothing."""

    next_agent_top1: float | None
    next_agent_top1_bound: float | None
    next_agent_top1_bound_fair: float | None
    next_agent_log_loss: float | None
    length95_coverage: float
    length95_width_ratio: float
    gap_calibration_error: float | None
    named: bool


def judge_behaviour(load: Judged, finals: bool) -> tuple[Summary, Pass, Bound, dict[str, Scores]]:
    """Agents, lengths and gaps over every run once; the scores are by workflow as well."""
    one, bound = Pass(load, finals), Bound()
    judging = paused = False
    for event in timeline(load.workload):
        if not judging and event.at_s >= load.half_s:
            judging = True
            one.profiles.reset_scores()
        if not event.ends:
            bound.see(event, judging)
            paused = paused or event.call.think_s > 0
        one.tell(event)
        one.profiles.expire(event.at_s)
    by_workflow = {
        profile.workflow: replace(profile.scores, gaps=list(profile.scores.gaps))
        for profile in one.profiles.by_number.values()
    }
    scores = added(list(by_workflow.values()))
    predicted = scores.next_count > 0
    summary = Summary(
        next_agent_top1=scores.top1 if predicted else None,
        next_agent_top1_bound=bound.best() if predicted else None,
        next_agent_top1_bound_fair=bound.fair() if predicted else None,
        next_agent_log_loss=scores.log_loss if predicted else None,
        length95_coverage=scores.length_coverage,
        length95_width_ratio=scores.length_width_ratio,
        gap_calibration_error=scores.gap_error if paused else None,
        named=bound.named,
    )
    return summary, one, bound, by_workflow


def added(scores: list[Scores]) -> Scores:
    """The sums of several workflows."""
    found = Scores(fading=1.0)
    for one in scores:
        for field in found.__struct_fields__:
            if field == "gaps":
                found.gaps = [found.gaps[at] + one.gaps[at] for at in range(GAP_BINS)]
            elif field != "fading":
                setattr(found, field, getattr(found, field) + getattr(one, field))
    return found


class Series(msgspec.Struct, frozen=True):
    """Demand tick by tick, in tokens per second, and what was said of the next 30 s.

    The first axis of ``said`` and its like is ticks, the second prefill and decode. ``came``:
    the mean of the next 30 s, ``last`` that of the last; ``known``: what of ``came`` was of runs
    that had begun, which no forecast can know better.
    """

    demand: NDArray[np.float64]
    said: NDArray[np.float64]
    came: NDArray[np.float64]
    last: NDArray[np.float64]
    known: NDArray[np.float64]
    within: NDArray[np.bool_]
    judged: NDArray[np.bool_]
    runs_alive: float


def judge_forecasts(load: Judged, finals: bool) -> tuple[Series, Pass, Forecaster]:
    """Forecasts every ``TICK_S`` of the prefill and decode tokens of the next 30 s."""
    one = Pass(load, finals)
    forecaster = Forecaster(one.profiles, one.limits)
    ticks = int(load.end_s / TICK_S)
    truth = _Truth(ticks + TICKS + 1)
    said = np.zeros((ticks, 2, 3))
    alive: list[int] = []
    tick = 0
    for event in timeline(load.workload):
        while tick < ticks and event.at_s >= (tick + 1) * TICK_S:
            now_s = (tick + 1) * TICK_S
            one.profiles.expire(now_s)
            forecaster.tick(now_s)
            forecast = forecaster.forecast(HORIZON_S, now_s)
            pair = (forecast.prefill_tokens_per_s, forecast.decode_tokens_per_s)
            said[tick] = [(found.likely, found.low, found.high) for found in pair]
            if now_s >= load.half_s:
                alive.append(truth.alive)
            tick += 1
        if tick == ticks and event.at_s > load.end_s + HORIZON_S:
            break
        one.tell(event)
        truth.see(event)
    return truth.series(said[:tick], load, float(np.mean(alive or [0]))), one, forecaster


class _Truth:
    """Demand as it is: prompts when they start, answers spread over the time they take."""

    def __init__(self, ticks: int) -> None:
        self.alive = 0
        self._tokens = np.zeros((ticks, 2))
        self._fresh = np.zeros((ticks, 2))
        """By tick, what runs that begin within the next 30 s ask for within these."""
        self._left: dict[str, int] = {}

    def see(self, event: Event) -> None:
        """A call starts or ends."""
        run, call = event.run, event.call
        if event.ends:
            self._left[run.id] -= 1
            self.alive -= not self._left[run.id]
            return
        if run.id not in self._left:
            self._left[run.id] = len(run.calls)
            self.alive += 1
        self._add(event, 0, event.at_s, float(event.uncached_tokens))
        begins_s = event.at_s + OVERHEAD_S + event.uncached_tokens / PREFILL_TOKENS_PER_S
        ends_s = begins_s + call.output_tokens / ASSUMED_TOKENS_PER_S
        while begins_s < ends_s:
            until_s = min(ends_s, (int(begins_s / TICK_S) + 1) * TICK_S)
            self._add(event, 1, begins_s, (until_s - begins_s) * ASSUMED_TOKENS_PER_S)
            begins_s = max(until_s, np.nextafter(begins_s, np.inf))

    def _add(self, event: Event, quantity: int, at_s: float, tokens: float) -> None:
        place = int(at_s / TICK_S)
        if place >= len(self._tokens):
            return
        self._tokens[place, quantity] += tokens
        # Forecasts made before the run began and not more than 30 s ago, by tick.
        first = max(0, place - TICKS)
        began = int(event.run.arrival_s / TICK_S)
        self._fresh[first : max(first, min(place, began)), quantity] += tokens

    def series(self, said: NDArray[np.float64], load: Judged, runs_alive: float) -> Series:
        """All together."""
        ticks = len(said)
        sums = np.concatenate([np.zeros((1, 2)), np.cumsum(self._tokens, axis=0)])
        now: NDArray[np.int64] = np.arange(ticks) + 1
        ahead = np.minimum(now + TICKS, len(sums) - 1)
        came = (sums[ahead] - sums[now]) / HORIZON_S
        last = (sums[now] - sums[np.maximum(0, now - TICKS)]) / HORIZON_S
        times_s = now * TICK_S
        judged = (times_s >= load.half_s) & (times_s + HORIZON_S <= load.end_s)
        fresh = self._fresh[:ticks] / HORIZON_S
        return Series(
            demand=self._tokens[:ticks] / TICK_S,
            said=said[:, :, 0],
            came=came,
            last=last,
            known=came - fresh,
            within=(came >= said[:, :, 1]) & (came <= said[:, :, 2]),
            judged=judged,
            runs_alive=runs_alive,
        )

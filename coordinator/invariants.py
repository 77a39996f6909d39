"""What must always be true of the core's state, recomputed from scratch.

Slow and thorough: for tests, simulations and people who chase a bug. Every account that
the core keeps incrementally is summed up anew from the calls themselves. It changes nothing.
"""

from __future__ import annotations

from collections import Counter
from math import isclose

from coordinator.calls import Calls
from coordinator.kv_index import KvIndex
from coordinator.limits import Placement
from coordinator.pairs import Pairs
from coordinator.protocol import Role
from coordinator.roles import Roles
from coordinator.rooms import checked_blocks
from coordinator.state import COUNTERS, Call, CallPhase, State, Worker, WorkerPhase

LIVE_PHASES = frozenset(
    {
        CallPhase.QUEUED,
        CallPhase.PULLING,
        CallPhase.PREFILLING,
        CallPhase.LOADING,
        CallPhase.DECODING,
        CallPhase.RESUMING,
    }
)


def check_all(state: State, calls: Calls, pairs: Pairs, roles: Roles, index: KvIndex) -> None:
    """AssertionError if anything is not as it must be."""
    for call in state.calls.values():
        _check_call(call, state)
    _check_queue(state, calls)
    _check_groups(state, calls)
    for name, worker in state.workers.items():
        assert worker.name == name
        _check_worker(worker, state, calls.placement)
    for name, api in state.apis.items():
        assert api.name == name
        assert state.deadlines.get(("api", name)) is not None, name
        for request, call in api.calls.items():
            assert state.calls[name, request] is call
    assert sum(len(api.calls) for api in state.apis.values()) == len(state.calls)
    assert state.counters.keys() >= set(COUNTERS)
    assert all(count >= 0 for count in state.counters.values())
    assert len(calls.recent) <= state.limits.recent_calls
    assert not calls.recent.keys() & state.calls.keys()
    assert not state.room_changed
    assert len(calls.sessions) <= (state.limits.sessions if calls.placement.sticky else 0)
    pairs.check()
    roles.check()
    index.check()


def _check_call(call: Call, state: State) -> None:
    key = call.key
    assert state.calls[key] is call
    assert state.apis[call.api.name] is call.api
    assert call.api.calls[call.request] is call
    assert call.phase in LIVE_PHASES, key
    assert call.plans <= state.limits.attempts
    assert len(call.story.lines) <= state.limits.story_lines
    due_s = state.deadlines.get(call.deadline_key)
    assert due_s is not None, f"{key} waits for ever"
    assert due_s <= call.deadline_s
    planned = (CallPhase.PULLING, CallPhase.PREFILLING, CallPhase.LOADING)
    decodes = call.phase in (*planned, CallPhase.DECODING)
    assert (call.decode is not None) == decodes, key
    assert (call.decode_blocks > 0) == decodes, key
    if call.decode is not None:
        assert state.workers.get(call.decode.name) is call.decode, f"{key} is on a lost worker"
        assert call.plan is not None
        assert call.plan.attempt == call.attempt
        assert call.plan.decode.incarnation == call.decode.incarnation
    if call.prefill is not None:
        assert state.workers.get(call.prefill.name) is call.prefill, f"{key} is on a lost worker"
        assert call.phase in planned, key
    else:
        assert call.prefill_blocks == call.prefill_stretches == 0
        assert call.phase is not CallPhase.PREFILLING, key
    if call.computing is not None:
        assert call.computing in (call.prefill, call.decode), key
        assert call.phase in planned, key
    if call.follows is not None:
        assert call.phase is CallPhase.QUEUED, key
        assert call.follows.phase in planned, f"{key} follows a call that brings nothing"
        assert call.follows.followers[key] is call
    assert all(follower.follows is call for follower in call.followers.values()), key
    _check_pull(call, state)
    _check_relocation(call, state)


def _check_pull(call: Call, state: State) -> None:
    if call.pull is None:
        assert call.pull_blocks == 0, call.key
        return
    assert call.phase in (CallPhase.PULLING, CallPhase.PREFILLING, CallPhase.LOADING), call.key
    assert state.workers.get(call.pull.name) is call.pull, f"{call.key} pulls from a lost worker"
    assert call.plan is not None, call.key
    assert call.plan.pull_worker is not None, call.key
    assert call.plan.pull_worker.incarnation == call.pull.incarnation, call.key
    assert 0 <= call.pulled_blocks * state.block_size <= call.pull_tokens, call.key


def _check_relocation(call: Call, state: State) -> None:
    relocation = call.relocation
    assert (state.deadlines.get(call.move_key) is not None) == (relocation is not None), call.key
    if relocation is None:
        return
    assert call.phase is CallPhase.DECODING, call.key
    assert relocation.target is not call.decode, call.key
    assert state.workers.get(relocation.target.name) is relocation.target, call.key


def _check_queue(state: State, calls: Calls) -> None:
    waiting = list(calls.queue)
    calls.queue.check()
    expected = {key for key, call in state.calls.items() if call.phase is CallPhase.QUEUED}
    assert {call.key for call in waiting} == expected
    fresh = sum(call.plans == 0 for call in waiting)
    assert fresh <= state.limits.queue_calls


def _check_groups(state: State, calls: Calls) -> None:
    members = Counter(
        (call.api.name, call.submit.group) for call in state.calls.values() if call.submit.group
    )
    assert members == {key: group.calls for key, group in calls.groups.items()}


def _check_worker(worker: Worker, state: State, placement: Placement) -> None:
    limits = state.limits
    built: Role = worker.ready.role
    assert worker.role == built or {worker.role, built} == {"prefill", "decode"}, worker.name
    assert worker.role == built or worker.turned_s > float("-inf"), worker.name
    assert worker.phase not in (WorkerPhase.LOST, WorkerPhase.LEFT), worker.name
    well = worker.phase is WorkerPhase.UP
    assert worker.up == (well and not worker.cordoned), worker.name
    assert state.deadlines.get(("worker", worker.name)) is not None, worker.name
    everyone = state.calls.values()
    assert worker.decodes == {call.key: call for call in everyone if call.decode is worker}
    assert worker.prefills == {call.key: call for call in everyone if call.prefill is worker}
    reserved = checked_blocks(worker)
    assert worker.pulls == {call.key: call for call in everyone if call.pull is worker}
    reserved += sum(call.pull_blocks for call in worker.pulls.values())
    moving = {call.key: call.relocation for call in everyone if call.relocation is not None}
    arriving = {key: each for key, each in moving.items() if each.target is worker}
    assert worker.arriving.keys() == arriving.keys(), worker.name
    reserved += sum(each.blocks for each in arriving.values())
    assert worker.kv_blocks_reserved == reserved, worker.name
    assert reserved <= worker.usable_blocks or not placement.reserve, worker.name
    before = (CallPhase.PULLING, CallPhase.PREFILLING)
    prefilling = [each for each in worker.prefills.values() if each.phase in before]
    assert worker.prefilling == len(prefilling), worker.name
    computing = [call.uncached_tokens for call in everyone if call.computing is worker]
    assert worker.prefill_tokens == sum(computing), worker.name
    _check_gauge(worker, [call for call in everyone if call.computing is worker])
    assert len(worker.decodes) <= limits.calls_per_worker
    assert worker.prefilling <= limits.prefills_per_worker
    assert len(worker.story.lines) <= limits.story_lines


def _check_gauge(worker: Worker, computing: list[Call]) -> None:
    gauge, decodes = worker.gauge, worker.decodes.values()
    assert gauge.prompts.keys() == {call.key for call in computing}, worker.name
    sums = (
        (gauge.backlog_s, sum(prompt.seconds for prompt in gauge.prompts.values())),
        (gauge.context_tokens, sum(call.context_tokens for call in decodes)),
        (gauge.left_tokens, sum(call.expected_tokens for call in decodes)),
        (gauge.decoding_tokens, sum(call.context_tokens for call in decodes if call.mark)),
    )
    for kept, summed in sums:
        assert isclose(kept, summed, rel_tol=1e-6, abs_tol=1e-6), worker.name
    assert gauge.decoding == sum(call.phase is CallPhase.DECODING for call in decodes), worker.name
    assert gauge.decoding == sum(call.mark is not None for call in decodes), worker.name

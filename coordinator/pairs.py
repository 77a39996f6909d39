"""Warm-up of pairs of workers: a transfer is tried before a call depends on it.

The first transfer between two engines pays for a handshake, and may not work at all. So
every ordered pair is probed once::

    COLD --> SOURCE --> TARGET --> WARM
     ^         |          |
     +---------+----------+--> FAILED after the last attempt

The source prefills a small prompt (``Probe``, ``Probed``), the target pulls its KV
(``ProbeRead``, ``ProbeFinished``). The handle in between passes through unread. A worker
takes part in one probe at a time. Pairs that calls could use (a source that may prefill,
a target that may decode) come before all others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from coordinator.deadlines import Key
from coordinator.protocol import Probe, Probed, ProbeFinished, ProbeRead, Role
from coordinator.state import ROLE_TURNS, Pair, PairKey, PairPhase, State, Worker


def _deadline_key(pair: Pair) -> Key:
    return ("pair", *pair.key)


def _urgent(source: Worker, target: Worker) -> bool:
    """Calls could use the pair."""
    return source.role != "decode" and target.role != "prefill"


def _idle(worker: Worker) -> bool:
    return worker.up and worker.probe is None


class Pairs:
    """Every ordered pair of registered workers, and the probes in progress."""

    def __init__(self, state: State, first_probe: int) -> None:
        """``first_probe``: numbers start behind it, so that no other core's answers fit."""
        self._state = state
        self.pairs: dict[PairKey, Pair] = {}
        self._urgent_waiting = 0
        self._probes = first_probe
        self._may_start: set[str] = set()
        self._idle: dict[Role, dict[str, Worker]] = {role: {} for role in ROLE_TURNS}
        """Workers that may take part in a probe."""

    def add(self, worker: Worker) -> None:
        """A worker registered: its pairs wait to be probed."""
        for other in self._state.workers.values():
            if other is not worker:
                self._add(other, worker)
                self._add(worker, other)
        self._look_at(worker)
        self._may_start.add(worker.name)

    def remove(self, worker: Worker, now_s: float) -> None:
        """A worker is gone, and its pairs with it. It is not registered any more."""
        if worker.probe is not None:
            self._end_probe(worker.probe)
        self._look_at(worker)
        for other in self._state.workers.values():
            for key in ((other.name, worker.name), (worker.name, other.name)):
                pair = self.pairs.pop(key)
                self._take_out(pair)
                self._state.deadlines.drop(_deadline_key(pair))
            other.warm_sources.discard(worker.name)
        self._may_start.discard(worker.name)
        self.start(now_s)

    def woke(self, worker: Worker, now_s: float) -> None:
        """A suspect worker is up again and may take part in probes."""
        self._look_at(worker)
        self._may_start.add(worker.name)
        self.start(now_s)

    def dozed(self, worker: Worker) -> None:
        """A worker is suspect: it takes part in no new probe."""
        self._look_at(worker)

    def turned(self, worker: Worker, now_s: float) -> None:
        """A worker's role changed: other pairs of it are urgent now."""
        self._look_at(worker)
        for other in self._state.workers.values():
            if other is not worker:
                for pair in (
                    self.pairs[other.name, worker.name],
                    self.pairs[worker.name, other.name],
                ):
                    waiting = self._take_out(pair)
                    pair.urgent = _urgent(pair.source, pair.target)
                    if waiting:
                        self._put_in(pair)
        self._may_start.add(worker.name)
        self.start(now_s)

    def start(self, now_s: float) -> None:
        """Begin the probes that can be begun."""
        while self._may_start:
            names = sorted(self._may_start)
            self._may_start.clear()
            for name in names:
                worker = self._state.workers.get(name)
                if worker is not None and _idle(worker):
                    pair = self._next_for(worker)
                    if pair is not None:
                        self._begin(pair, now_s)

    def answered(self, worker: Worker, message: Probed | ProbeFinished, now_s: float) -> bool:
        """One side of a probe answered. False if it was not asked (any more)."""
        if isinstance(message, Probed):
            return self.probed(worker, message, now_s)
        return self.finished(worker, message, now_s)

    def probed(self, worker: Worker, message: Probed, now_s: float) -> bool:
        """The source answered. False if it was not asked (any more)."""
        pair = worker.probe
        if pair is None or pair.probe != message.probe or pair.source is not worker:
            return False
        if pair.phase is not PairPhase.SOURCE:
            return False
        if message.error or not message.handle:
            self._fail(pair, message.error or "no handle", now_s)
            return True
        pair.move(PairPhase.TARGET, now_s, "has a handle")
        self._state.deadlines.set(_deadline_key(pair), now_s + self._state.limits.probe_s)
        self._state.send(
            pair.target.peer,
            ProbeRead(
                probe=pair.probe,
                incarnation=pair.target.incarnation,
                seed=pair.probe,
                prompt_tokens=self._prompt_tokens,
                source=worker.name,
                handle=message.handle,
            ),
        )
        return True

    def finished(self, worker: Worker, message: ProbeFinished, now_s: float) -> bool:
        """The target answered. False if it was not asked (any more)."""
        pair = worker.probe
        if pair is None or pair.probe != message.probe or pair.target is not worker:
            return False
        if pair.phase is not PairPhase.TARGET:
            return False
        if message.error or message.tokens_moved <= 0:
            self._fail(pair, message.error or "nothing moved", now_s)
            return True
        pair.move(PairPhase.WARM, now_s, f"{message.tokens_moved} tokens moved")
        self._end_probe(pair)
        self._state.deadlines.drop(_deadline_key(pair))
        worker.warm_sources.add(pair.source.name)
        self._state.counters["pairs_warmed"] += 1
        self._state.room_changed = True
        self.start(now_s)
        return True

    def due(self, key: PairKey, now_s: float) -> None:
        """A probe took too long, or a pair has waited long enough for its next one."""
        pair = self.pairs[key]
        if pair.phase is PairPhase.COLD:
            self._put_in(pair)
            self._may_start.update(key)
            self.start(now_s)
        else:
            self._fail(pair, f"no answer from the {pair.phase.name.lower()}", now_s)

    def in_order(self) -> Iterator[Pair]:
        """Every pair, by the names of source and target."""
        names = sorted(self._state.workers)
        return (self.pairs[pair] for pair in itertools.permutations(names, 2))

    def check(self) -> None:
        """Assert what must always be true of pairs and probes."""
        workers = self._state.workers
        assert len(self.pairs) == len(workers) * (len(workers) - 1)
        waiting = {id(pair) for worker in workers.values() for pair in worker.cold_urgent.values()}
        assert len(waiting) == self._urgent_waiting
        for key, pair in self.pairs.items():
            source, target = pair.source, pair.target
            assert key == pair.key
            assert pair.urgent == _urgent(source, target), key
            assert workers[key[0]] is source
            assert workers[key[1]] is target
            probing = pair.phase in (PairPhase.SOURCE, PairPhase.TARGET)
            assert probing == (source.probe is pair) == (target.probe is pair), key
            assert (pair.phase is PairPhase.WARM) == (source.name in target.warm_sources), key
            lines = [
                key in line
                for worker in (source, target)
                for line in (worker.cold_urgent, worker.cold_other)
            ]
            in_line = any(lines)
            assert lines == [in_line and pair.urgent, in_line and not pair.urgent] * 2, key
            assert not in_line or pair.phase is PairPhase.COLD
            has_deadline = self._state.deadlines.get(_deadline_key(pair)) is not None
            assert has_deadline == (probing or (pair.phase is PairPhase.COLD and not in_line)), key
            assert pair.attempts <= self._state.limits.probe_attempts
        for role, idle in self._idle.items():
            expected = {
                name: each for name, each in workers.items() if each.role == role and _idle(each)
            }
            assert idle == expected, role
        for worker in workers.values():
            assert worker.probe is None or self.pairs[worker.probe.key] is worker.probe
            assert worker.warm_sources <= workers.keys() - {worker.name}

    @property
    def _prompt_tokens(self) -> int:
        return 2 * self._state.block_size + 1

    def _add(self, source: Worker, target: Worker) -> None:
        pair = Pair(source, target, _urgent(source, target), self._state.story())
        self.pairs[pair.key] = pair
        self._put_in(pair)

    def _put_in(self, pair: Pair) -> None:
        for worker in (pair.source, pair.target):
            (worker.cold_urgent if pair.urgent else worker.cold_other)[pair.key] = pair
        self._urgent_waiting += pair.urgent

    def _take_out(self, pair: Pair) -> bool:
        """Out of the lines; False if it was in none."""
        line = pair.source.cold_urgent if pair.urgent else pair.source.cold_other
        if line.pop(pair.key, None) is None:
            return False
        (pair.target.cold_urgent if pair.urgent else pair.target.cold_other).pop(pair.key)
        self._urgent_waiting -= pair.urgent
        if self._urgent_waiting == 0 and pair.urgent:
            # Whoever has only other pairs left may begin those now.
            self._may_start.update(self._state.workers)
        return True

    def _look_at(self, worker: Worker) -> None:
        for idle in self._idle.values():
            idle.pop(worker.name, None)
        if _idle(worker):
            self._idle[worker.role][worker.name] = worker

    def _next_for(self, worker: Worker) -> Pair | None:
        """A pair that waits, of this worker and an idle one.

        When there is much to do most workers are busy: then who is idle is looked through, and
        not all pairs that wait.
        """
        urgent = self._urgent_waiting > 0
        line = worker.cold_urgent if urgent else worker.cold_other
        others = [
            idle
            for role, idle in self._idle.items()
            if not urgent or role != worker.role or role == "mixed"
        ]
        if len(line) <= sum(map(len, others)):
            for pair in line.values():
                if _idle(pair.target if pair.source is worker else pair.source):
                    return pair
            return None
        for idle in others:
            for name in idle:
                found = line.get((worker.name, name)) or line.get((name, worker.name))
                if found is not None:
                    return found
        return None

    def _begin(self, pair: Pair, now_s: float) -> None:
        state = self._state
        self._take_out(pair)
        self._probes += 1
        pair.probe = self._probes
        pair.attempts += 1
        pair.move(PairPhase.SOURCE, now_s, f"probe {pair.probe}")
        pair.source.probe = pair.target.probe = pair
        self._look_at(pair.source)
        self._look_at(pair.target)
        state.deadlines.set(_deadline_key(pair), now_s + state.limits.probe_s)
        state.counters["probes_sent"] += 1
        state.send(
            pair.source.peer,
            Probe(
                probe=pair.probe,
                incarnation=pair.source.incarnation,
                seed=pair.probe,
                prompt_tokens=self._prompt_tokens,
            ),
        )

    def _fail(self, pair: Pair, why: str, now_s: float) -> None:
        state = self._state
        state.counters["probes_failed"] += 1
        if pair.attempts < state.limits.probe_attempts:
            pair.move(PairPhase.COLD, now_s, why)
            pause_s = state.limits.beat_s * 2**pair.attempts
            state.deadlines.set(_deadline_key(pair), now_s + pause_s)
        else:
            pair.move(PairPhase.FAILED, now_s, why)
            state.deadlines.drop(_deadline_key(pair))
            state.counters["pairs_failed"] += 1
        self._end_probe(pair)
        self.start(now_s)

    def _end_probe(self, pair: Pair) -> None:
        pair.source.probe = pair.target.probe = None
        self._look_at(pair.source)
        self._look_at(pair.target)
        self._may_start.update(pair.key)

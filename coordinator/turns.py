"""Workers that change their role, or are drained, while everything goes on.

::

    DRAINING --> SWITCHING --> VERIFYING --> DONE
       |  `--> DRAINED |           |
       +---------------+-----------+--> UNDONE (its old role again), LOST (the worker is gone)

A worker that turns gets no more work of its old role at once and ends what it has begun: decodes
of one that is to prefill, prompts and the handles on them of one that is to decode. Meanwhile it
works in its new role already, as far as it does not slow down what it still owes. Then it is
cordoned, its engine is told to work as the new role does (``SetRole``), and a canary goes
through it: a prompt that it computes and a peer reads, or the other way round, as in ``pairs``.
What takes too long is tried again some times and then undone. A drain is the same without an
end: the worker is cordoned and stays so until that is undone. Its decodes are moved to peers as far
as they can go on there (``moves``), and so are those of a worker that turns, if that is wanted; the
others are waited for.

No call fails for any of it. It is soft state: after a restart of the core workers have the
roles that they were started with, which they see to themselves (``Welcome`` of another core), and
one that registers anew has nothing to end.
"""

from __future__ import annotations

from collections.abc import Callable

from coordinator.deadlines import Key
from coordinator.limits import Rebalance
from coordinator.pairs import Pairs
from coordinator.protocol import Probe, Probed, ProbeFinished, ProbeRead, Role, RoleSet, SetRole
from coordinator.standing import Standing
from coordinator.state import ROLE_TURNS, State, Turn, TurnPhase, Worker, WorkerPhase

ENDED = frozenset({TurnPhase.DONE, TurnPhase.UNDONE, TurnPhase.LOST})
MOVES_S = 0.5
"""Between two looks at which decodes can be moved."""
PAUSED = frozenset({TurnPhase.SWITCHING, TurnPhase.VERIFYING, TurnPhase.DRAINED})
"""Phases in which a worker gets no work."""


UNASKED = 0
"""The number of what nobody waits for."""


class Refusal(Exception):
    """What was asked for can't be had; ``status`` as in HTTP."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Turns:
    """All turns under way. ``ended`` is told of each that is over; ``move_away`` is told a worker
    and why: as many of its decodes as can are to go on elsewhere."""

    def __init__(
        self,
        state: State,
        pairs: Pairs,
        standing: Standing,
        first_probe: int,
        ended: Callable[[Turn, float], None],
        move_away: Callable[[Worker, float, str], object],
    ) -> None:
        self._state = state
        self._pairs = pairs
        self._standing = standing
        self._numbers = first_probe
        self._ended = ended
        self._move_away = move_away
        self.live: dict[str, Turn] = {}
        """By worker."""
        self.settings = Rebalance()

    # --- wishes -----------------------------------------------------------------------------

    def turn(self, name: str, role: str, by: str, why: str, now_s: float) -> Turn | None:
        """A worker is to have a role; None if it has it. Refusal if that can't be."""
        worker = self._known(name)
        if role not in ROLE_TURNS:
            raise Refusal(422, f"role: must be prefill or decode (got {role[:32]!r})")
        if name in self.live:
            raise Refusal(409, f"{name} is {self.live[name].phase.value} already")
        if worker.role == role:
            return None
        if worker.ready.fixed:
            raise Refusal(409, f"the role of {name} is fixed")
        wanted: Role = "prefill" if role == "prefill" else "decode"
        if role not in ROLE_TURNS[worker.role]:
            raise Refusal(409, f"{name} is {worker.role}, it does not turn to {role}")
        self._may_go(worker)
        return self._begin(worker, wanted, by, why, now_s)

    def drain(self, name: str, by: str, why: str, now_s: float) -> Turn:
        """A worker is to end what it has and get no more. Refusal if that can't be."""
        worker = self._known(name)
        turn = self.live.get(name)
        if turn is not None:
            if turn.role is None:
                return turn
            raise Refusal(409, f"{name} is {turn.phase.value} already")
        self._may_go(worker)
        return self._begin(worker, None, by, why, now_s)

    def undrain(self, name: str, now_s: float) -> None:
        """A worker gets work again, as soon as it is well; nothing happens if it is not drained.
        Refusal if it turns or is not known."""
        turn = self.live.get(name)
        if turn is None:
            self._known(name)
            return
        if turn.role is not None:
            raise Refusal(409, f"{name} is {turn.phase.value} to be {turn.role}")
        self._end(turn, TurnPhase.UNDONE, now_s, "the drain is undone")

    def _known(self, name: str) -> Worker:
        worker = self._state.workers.get(name)
        if worker is None:
            raise Refusal(404, f"no worker {name[:64]!r} is known")
        if worker.phase is not WorkerPhase.UP:
            raise Refusal(409, f"{name} is {worker.phase.value}")
        return worker

    def _may_go(self, worker: Worker) -> None:
        """Refusal if nobody else would do what a worker does."""
        others = [
            other
            for other in self._state.workers.values()
            if other is not worker and other.up and other.role in (worker.role, "mixed")
        ]
        if not others:
            raise Refusal(409, f"without {worker.name} there is no worker left for {worker.role}")
        if worker.role != "prefill":
            longest = max(other.tokens_max for other in others)
            if longest < worker.tokens_max:
                raise Refusal(
                    409, f"nobody else can hold {worker.tokens_max} tokens, at most {longest}"
                )

    def registered(self, worker: Worker) -> None:
        """A worker is here that may have to turn: its engine is to work as its role does."""
        if self.settings.mode == "auto" and worker.role != "mixed":
            self._tell(worker, worker.role, UNASKED)

    # --- the way -----------------------------------------------------------------------------

    def _begin(self, worker: Worker, role: Role | None, by: str, why: str, now_s: float) -> Turn:
        self._numbers += 1
        waits = dict.fromkeys(worker.decodes) if worker.role != "prefill" else {}
        if worker.role != "decode" or role is None:
            waits |= dict.fromkeys(worker.prefills)
        # What peers read here they read to its end.
        waits |= dict.fromkeys(worker.pulls)
        story = self._state.story()
        turn = Turn(worker, self._numbers, role, worker.role, by, why, now_s, waits, story)
        self.live[worker.name] = turn
        worker.turning = turn.phase
        self._state.counters["turns_begun"] += 1
        self._state.deadlines.set(_key(turn), now_s + self.settings.drain_s)
        if role is None:
            self._cordon(worker, True, now_s)
        else:
            worker.ending = role == "prefill" and bool(waits)
            self._turned(worker, role, now_s, why)
        return turn

    def look(self, now_s: float) -> None:
        """Something happened: whoever has nothing left to end goes on."""
        if not self.live:
            return
        for turn in list(self.live.values()):
            if turn.phase is not TurnPhase.DRAINING:
                continue
            if not self._drained(turn):
                self._hurry(turn, now_s)
            elif turn.role is None:
                self._move(turn, TurnPhase.DRAINED, now_s, "nothing is left")
                self._state.deadlines.drop(_key(turn))
                self._state.counters["workers_drained"] += 1
            else:
                self._switch(turn, now_s, "nothing is left of its old role")

    def _hurry(self, turn: Turn, now_s: float) -> None:
        """Have what it decodes go on elsewhere, every now and then: room comes, tokens begin."""
        moves = turn.role is None or (turn.role == "prefill" and self.settings.move_decodes)
        if moves and now_s >= turn.move_from_s:
            turn.move_from_s = now_s + MOVES_S
            self._move_away(turn.worker, now_s, turn.why)

    def _drained(self, turn: Turn) -> bool:
        """Whether a worker has ended what it had begun; the first that it has not is looked at."""
        worker = turn.worker
        while turn.waits:
            key = next(iter(turn.waits))
            if key in worker.decodes or key in worker.prefills or key in worker.pulls:
                return False
            del turn.waits[key]
        # Nobody else's KV is held here for them.
        return True

    def due(self, name: str, now_s: float) -> None:
        """A step took too long."""
        turn = self.live[name]
        if turn.phase is TurnPhase.DRAINING:
            if turn.role is None:
                # It goes on waiting; calls have deadlines of their own.
                self._state.deadlines.set(_key(turn), now_s + self.settings.drain_s)
            else:
                self._switch(turn, now_s, f"{len(turn.waits)} calls go on beside the new role")
        elif turn.tries >= self.settings.tries:
            self._end(turn, TurnPhase.UNDONE, now_s, f"{turn.phase.value} took too long")
        elif turn.phase is TurnPhase.SWITCHING:
            self._say(turn, now_s)
        elif turn.tries % 2:
            self._ask_again(turn, now_s)
        else:
            self._send_canary(turn, now_s)

    def _switch(self, turn: Turn, now_s: float, why: str) -> None:
        turn.worker.ending = False
        self._move(turn, TurnPhase.SWITCHING, now_s, why)
        self._cordon(turn.worker, True, now_s)
        self._say(turn, now_s)

    def _say(self, turn: Turn, now_s: float) -> None:
        assert turn.role is not None
        turn.tries += 1
        self._tell(turn.worker, turn.role, turn.number)
        self._state.deadlines.set(_key(turn), now_s + self.settings.step_s)

    def _tell(self, worker: Worker, role: Role, number: int) -> None:
        settings = self.settings
        chunk = settings.prefill_chunk_tokens if role == "prefill" else settings.decode_chunk_tokens
        worker.chunk_tokens = chunk
        message = SetRole(worker.incarnation, number, role, chunk)
        self._state.send(worker.peer, message)

    def _role_set(self, worker: Worker, message: RoleSet, now_s: float) -> bool:
        """A worker's engine works in its new role, or can't. False if it was not asked."""
        if message.turn == UNASKED:
            return True
        turn = self.live.get(worker.name)
        if turn is None or turn.number != message.turn or turn.phase is not TurnPhase.SWITCHING:
            return False
        if message.error:
            self._end(turn, TurnPhase.UNDONE, now_s, message.error)
            return True
        self._move(turn, TurnPhase.VERIFYING, now_s, "the engine has the new role")
        turn.tries = 0
        self._send_canary(turn, now_s)
        return True

    # --- the canary ----------------------------------------------------------------------------

    def _send_canary(self, turn: Turn, now_s: float) -> None:
        """A small prompt through the worker, as in a warm-up of a pair."""
        turn.tries += 1
        self._numbers += 1
        turn.probe, turn.handle = self._numbers, b""
        turn.writer, turn.reader = self._pair(turn)
        self._ask(turn, now_s)

    def _ask_again(self, turn: Turn, now_s: float) -> None:
        """The same canary: whoever is only slow does nothing twice, and its answer counts."""
        turn.tries += 1
        self._ask(turn, now_s)

    def _ask(self, turn: Turn, now_s: float) -> None:
        """Whoever is next with a canary."""
        self._state.deadlines.set(_key(turn), now_s + self.settings.step_s)
        number, tokens = turn.probe, self._canary_tokens
        writer, reader = turn.writer, turn.reader
        assert writer is not None
        if turn.handle and reader is not None:
            message = ProbeRead(
                number, reader.incarnation, number, tokens, writer.name, turn.handle
            )
            self._state.send(reader.peer, message)
        else:
            self._state.send(writer.peer, Probe(number, writer.incarnation, number, tokens))

    def _pair(self, turn: Turn) -> tuple[Worker, Worker | None]:
        """Who computes and who reads: the worker does what its new role does, with a peer that it
        is known to work with. It alone if there is none."""
        worker, workers = turn.worker, self._state.workers
        if turn.role == "prefill":
            readers = [each for each in workers.values() if worker.name in each.warm_sources]
            return worker, _first(readers)
        writers = [each for name, each in workers.items() if name in worker.warm_sources]
        writer = _first(writers)
        return (worker, None) if writer is None else (writer, worker)

    @property
    def _canary_tokens(self) -> int:
        return 2 * self._state.block_size + 1

    def answered(
        self, worker: Worker, message: Probed | ProbeFinished | RoleSet, now_s: float
    ) -> bool:
        """A worker that turns answered, or one side of its canary. False if it was not asked (any
        more)."""
        if isinstance(message, RoleSet):
            return self._role_set(worker, message, now_s)
        for turn in self.live.values():
            if turn.probe == message.probe and turn.phase is TurnPhase.VERIFYING:
                if isinstance(message, Probed) and turn.writer is worker and not turn.handle:
                    self._computed(turn, message, now_s)
                    return True
                if isinstance(message, ProbeFinished) and turn.reader is worker:
                    self._read(turn, message, now_s)
                    return True
        return False

    def _computed(self, turn: Turn, message: Probed, now_s: float) -> None:
        reader, writer = turn.reader, turn.writer
        if message.error or not message.handle:
            self._failed(turn, message.error or "no handle", now_s)
        elif reader is None:
            self._end(turn, TurnPhase.DONE, now_s, "the canary is computed")
        elif self._state.workers.get(reader.name) is not reader or writer is None:
            self._failed(turn, f"{reader.name} is gone", now_s)
        else:
            turn.handle = message.handle
            self._ask(turn, now_s)

    def _read(self, turn: Turn, message: ProbeFinished, now_s: float) -> None:
        if message.error or message.tokens_moved <= 0:
            self._failed(turn, message.error or "nothing moved", now_s)
        else:
            self._end(turn, TurnPhase.DONE, now_s, "the canary is back")

    def _failed(self, turn: Turn, why: str, now_s: float) -> None:
        if turn.tries >= self.settings.tries:
            self._end(turn, TurnPhase.UNDONE, now_s, f"canary: {why}")
        else:
            self._send_canary(turn, now_s)

    # --- the end -------------------------------------------------------------------------------

    def lost(self, worker: Worker, now_s: float) -> None:
        """A worker is gone, and with it what it was turning to. It is not registered any more."""
        turn = self.live.get(worker.name)
        if turn is not None and turn.worker is worker:
            self._end(turn, TurnPhase.LOST, now_s, "the worker is gone")
        # Canaries that others were to read or to compute are tried again when they are due.

    def _end(self, turn: Turn, phase: TurnPhase, now_s: float, why: str) -> None:
        worker = turn.worker
        self._move(turn, phase, now_s, why)
        del self.live[worker.name]
        self._state.deadlines.drop(_key(turn))
        worker.ending, worker.turning = False, None
        if phase is TurnPhase.LOST:
            self._ended(turn, now_s)
            return
        if phase is TurnPhase.UNDONE and turn.role is not None:
            self._state.counters["turns_undone"] += 1
            self._turned(worker, turn.former, now_s, why)
            self._tell(worker, turn.former, UNASKED)
        elif phase is TurnPhase.DONE:
            self._state.counters["role_flips"] += 1
        self._cordon(worker, False, now_s)
        self._ended(turn, now_s)

    def _move(self, turn: Turn, phase: TurnPhase, now_s: float, why: str) -> None:
        turn.move(phase, now_s, why)
        turn.worker.turning = phase

    def _turned(self, worker: Worker, role: Role, now_s: float, why: str) -> None:
        worker.turn(role, now_s, why)
        self._standing.add(worker)
        self._state.room_changed = True
        self._pairs.turned(worker, now_s)

    def _cordon(self, worker: Worker, cordoned: bool, now_s: float) -> None:
        if worker.cordoned == cordoned:
            return
        worker.cordon(cordoned)
        self._standing.touch(worker)
        self._state.room_changed = True
        if cordoned:
            self._pairs.dozed(worker)
        else:
            self._pairs.woke(worker, now_s)

    def check(self) -> None:
        """Assert what must always be true of turns."""
        for name, turn in self.live.items():
            worker = self._state.workers[name]
            assert turn.worker is worker
            assert turn.phase not in ENDED
            assert worker.turning is turn.phase
            assert worker.cordoned == (turn.role is None or turn.phase in PAUSED), name
            assert worker.role == (turn.role or turn.former), name
            due = self._state.deadlines.get(_key(turn)) is not None
            assert due == (turn.phase is not TurnPhase.DRAINED), name
            assert turn.tries <= self.settings.tries
        for name, worker in self._state.workers.items():
            if name not in self.live:
                assert worker.turning is None
                assert not worker.cordoned
                assert not worker.ending


def _key(turn: Turn) -> Key:
    return ("turn", turn.worker.name)


def _first(workers: list[Worker]) -> Worker | None:
    """One that is well; rather one that gets work."""
    able = [each for each in workers if each.phase is WorkerPhase.UP]
    return min(able, key=lambda each: (each.cordoned, each.name), default=None)

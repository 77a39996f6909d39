"""Workers that turn and are drained in a network that loses, delays and doubles, among crashes.

All that can happen to a core happens here too (``test_core``); besides, operators turn and drain
workers at any moment, engines refuse roles, and the policy turns whom it likes.
"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import msgspec
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test

from coordinator.limits import Placement, Rebalance
from coordinator.protocol import DrainWorker, SetRebalance, ShowRebalance, TurnWorker
from tests.properties.test_core import PROFILE, ROLES, CoreInALossyNetwork, index, pick

TURNING = Placement(
    remote_prefill_min_tokens=8,
    reserve_output_tokens=8,
    prefill_workers_decode=False,
    token_gap_s=0.05,
    rebalance=Rebalance(
        mode="auto", interval_s=0.2, dwell_s=0.6, margin=0.0, drain_s=3.0, step_s=2.0, tries=2
    ),
)
TURNS_END_ROUNDS = 80
names = st.sampled_from([*ROLES, "nobody"])
questions = st.one_of(
    st.builds(TurnWorker, st.just(1), names, st.sampled_from(["prefill", "decode", "mixed", ""])),
    st.builds(TurnWorker, st.just(1), st.sampled_from(["p", "d", "e"]), st.just("prefill")),
    st.builds(TurnWorker, st.just(1), st.sampled_from(["p", "d", "e"]), st.just("decode")),
    st.builds(DrainWorker, st.just(1), names, st.booleans()),
    st.builds(DrainWorker, st.just(1), st.sampled_from(["d", "e"])),
    st.builds(ShowRebalance, st.just(1)),
    st.builds(
        SetRebalance,
        st.just(1),
        st.sampled_from([b'{"mode":"off"}', b'{"mode":"auto"}', b'{"mode":7}', b"", b"[]"]),
    ),
)


class TurningCoreInALossyNetwork(CoreInALossyNetwork):
    """A core whose workers turn, for any reason and at any moment."""

    placement = TURNING
    workers = ("p", "d", "e")
    reached: ClassVar[Counter[str]] = Counter()
    """How often turns were seen in a phase, and came to an end, over all examples."""

    @rule(question=questions)
    def operate(self, question: TurnWorker | DrainWorker | ShowRebalance | SetRebalance) -> None:
        self.forge(b"operator", question)

    @rule(question=questions, again=questions, rounds=st.integers(1, 6))
    def operate_twice(
        self, question: TurnWorker | DrainWorker, again: TurnWorker | DrainWorker, rounds: int
    ) -> None:
        """A second wish at any step of the first one's way."""
        self.forge(b"operator", question)
        self.flow(rounds, 0.2)
        self.forge(b"operator", again)

    @precondition(lambda self: self.busy())
    @rule(number=index, rounds=st.integers(0, 3))
    def turn_who_decodes(self, number: int, rounds: int) -> None:
        """A worker is to turn that has something to end before."""
        self.forge(b"operator", TurnWorker(1, pick(self.busy(), number), "prefill"))
        self.flow(rounds, 0.2)

    @precondition(lambda self: self.world.workers)
    @rule(number=index, stubborn=st.booleans())
    def be_stubborn(self, number: int, stubborn: bool) -> None:
        pick(list(self.world.workers.values()), number).stubborn = stubborn

    @precondition(lambda self: self.world.workers)
    @rule(number=index, rounds=st.integers(0, 5))
    def crash_while_it_turns(self, number: int, rounds: int) -> None:
        """The worker goes at some step, or its peer, or the core."""
        worker = pick(list(self.world.workers.values()), number)
        assume(worker.name in ("p", "d", "e"))
        role = "decode" if worker.name == "p" else "prefill"
        self.forge(b"operator", TurnWorker(1, worker.name, role))
        self.flow(rounds, 0.2)
        if number % 3:
            self.world.crash_worker(worker.name)
        else:
            self.world.restart_core()

    def busy(self) -> list[str]:
        """Workers with calls in them."""
        snapshot = self.world.core.snapshot(0, self.world.now_s)
        return [worker.worker for worker in snapshot.workers if worker.calls]

    @invariant()
    def count(self) -> None:
        snapshot = self.world.core.snapshot(0, self.world.now_s)
        for worker in snapshot.workers:
            if worker.turning:
                self.reached[worker.turning] += 1
        self.reached["done"] += snapshot.counters["role_flips"]
        self.reached["undone"] += snapshot.counters["turns_undone"]

    def teardown(self) -> None:
        for worker in self.world.workers.values():
            worker.stubborn = False
        for name in ROLES:
            self.forge(b"operator", DrainWorker(1, name, undo=True))
        # What turns by itself may turn for ever.
        off = msgspec.json.encode({"mode": "off"})
        self.forge(b"operator", SetRebalance(1, off))
        super().teardown()
        # A turn under way needs no call to come to its end.
        for _ in range(TURNS_END_ROUNDS):
            self.world.deliver_all()
            self.world.advance(0.25)
        self.world.check()
        for shown in self.world.core.snapshot(0, self.world.now_s).workers:
            assert shown.turning == ""


def test_nothing_breaks_where_workers_turn() -> None:
    profile = settings(PROFILE, max_examples=400)
    run_state_machine_as_test(TurningCoreInALossyNetwork, settings=profile)
    reached = TurningCoreInALossyNetwork.reached
    for phase in ("draining", "switching", "verifying", "drained", "done", "undone"):
        assert reached[phase] > 0, reached

"""The core in a network that loses, delays, doubles and reorders, among peers that crash.

Hypothesis chooses what happens; ``World.check`` asserts after every step the core's own
invariants and the oracle's, and at the end, without further faults, that every call has
ended once and nothing of any is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from coordinator import rooms
from coordinator.core import Core
from coordinator.limits import Limits, Placement, Ratio
from coordinator.protocol import (
    ApiBeat,
    Beat,
    CallContext,
    CancelRun,
    Checked,
    DeclareWorkflow,
    DropWorkflow,
    EndRun,
    EngineFacts,
    Failed,
    Finished,
    Hello,
    ImportWorkflow,
    Inspect,
    Leaving,
    ListWorkflows,
    Load,
    MoveCalls,
    MoveDeclined,
    MoveReady,
    Prefilled,
    Probed,
    ProbeFinished,
    Pulled,
    Ready,
    Role,
    ShowWorkflow,
    Started,
    StartRun,
    StaticPrefixes,
    Submit,
    ToCore,
)
from tests.simulation.fakes import CORE, FakeApi, Letter, MakeCore, World, make_handle
from tests.simulation.prefetch_everything import prefetching_core
from tests.simulation.pull_everything import pulling_core

LIMITS = Limits(
    queue_calls=8,
    calls_per_worker=3,
    prefills_per_worker=2,
    attempts=3,
    queue_s=8.0,
    prefill_s=4.0,
    first_token_s=4.0,
    decode_check_s=3.0,
    check_s=1.5,
    call_s=24.0,
    beat_s=1.0,
    beats_missed=4,
    probe_s=2.0,
    probe_attempts=2,
    workers=4,
    apis=3,
    recent_calls=4,
    sessions=2,
    story_lines=6,
    move_s=2.0,
    moves_per_worker=2,
)
# Of more than one worker only a few are compared, as in a large cluster.
PLACEMENT = Placement(
    remote_prefill_min_tokens=8,
    reserve_output_tokens=8,
    compared_workers=1,
    retention=True,
    warm_up=True,
    prefetch=True,
)
REACTIVE = Placement(
    policy="cache_aware",
    sticky=True,
    disaggregated="always",
    reserve=False,
    reserve_output_tokens=8,
    ratio=Ratio(
        mode="reactive",
        interval_s=0.2,
        looks=1,
        dwell_s=1.0,
        prefill_tokens_high=1,
        decode_kv_high=0.6,
        spare=1.0,
    ),
)
"""Everything that is off by default; roles change whenever anything happens."""
ROLES: dict[str, Role] = {"p": "prefill", "d": "decode", "e": "decode", "m": "mixed"}
IMPOSTOR = b"impostor"
T = TypeVar("T")


@pytest.fixture(autouse=True)
def short_prompts_have_something_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "STRETCH_TOKENS", 8)


PROFILE = settings(
    max_examples=500,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)

index = st.integers(min_value=0, max_value=10_000)
run_names = st.sampled_from(["", "", "r", "s", "t"])
contexts = st.builds(
    CallContext,
    st.sampled_from(["", "w"]),
    run_names,
    st.sampled_from(["", "a", "b"]),
    st.sampled_from(["", "a", "t"]),
    st.sampled_from([False, False, False, True]),
    run_names,
    st.sampled_from(["", "", "tenant"]),
)
run_questions = st.builds(
    StartRun,
    st.just(1),
    st.just("w"),
    st.sampled_from(["r", "s"]),
    st.just(""),
    st.sampled_from([0.0, 2.0]),
) | st.builds(CancelRun, st.just(1), st.just("w"), st.sampled_from(["r", "s"]))
run_questions |= st.builds(
    EndRun, st.just(1), st.just("w"), st.sampled_from(["r", "s"]), st.just(""), st.booleans()
)


class CoreInALossyNetwork(RuleBasedStateMachine):
    """Everything that can happen to a core."""

    placement = PLACEMENT
    make_core: ClassVar[MakeCore] = Core
    rounds_before = 12
    """Until the pairs have met that calls need."""
    workers: tuple[str, ...] = ("p", "d")
    """Of which there is one at the start, besides others."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(LIMITS, self.placement, self.make_core)
        self.held_back: list[Letter] = []

    @initialize(extra=st.sets(st.sampled_from(["e", "m"])))
    def start(self, extra: set[str]) -> None:
        for name in sorted({*self.workers, *extra}):
            self.world.start_worker(name, ROLES[name])
        self.world.start_api()
        self.flow(self.rounds_before, 0.2)

    def calls(self) -> list[tuple[FakeApi, str]]:
        """Open calls, as their API processes see them."""
        return [(api, request) for api in self.world.apis.values() for request in api.calls]

    def late_letters(self) -> list[Letter]:
        """What was said about earlier attempts of open calls."""
        attempts = {request: api.calls[request].attempt for api, request in self.calls()}
        return [
            letter
            for letter in self.world.history
            if letter.message.attempt < attempts.get(letter.message.request, 0)
        ]

    # --- what people and time do ---------------------------------------------------------

    @precondition(lambda self: self.world.apis)
    @rule(
        number=index,
        prompts_tokens=st.lists(st.integers(1, 120), min_size=1, max_size=4),
        output_tokens=st.integers(1, 8),
        group=st.sampled_from(["", "", "", "g"]),
        context=contexts,
    )
    def submit(
        self,
        number: int,
        prompts_tokens: list[int],
        output_tokens: int,
        group: str,
        context: CallContext,
    ) -> None:
        api = pick(list(self.world.apis.values()), number)
        for prompt_tokens in prompts_tokens:
            self.world.submit(api, prompt_tokens, output_tokens, group, context)

    @rule(about=run_questions)
    def ask_about_a_run(self, about: StartRun | CancelRun | EndRun) -> None:
        self.forge(b"client", about)

    @precondition(lambda self: self.calls())
    @rule(number=index)
    def abort(self, number: int) -> None:
        api, request = pick(self.calls(), number)
        self.world.emit(api.address, api.abort(request))

    @rule(name=st.sampled_from(sorted(ROLES)), one=st.booleans(), number=index)
    def move_away(self, name: str, one: bool, number: int) -> None:
        request = pick(self.calls(), number)[1] if one and self.calls() else ""
        self.forge(b"client", MoveCalls(1, name, request))

    @precondition(lambda self: self.calls())
    @rule(number=index)
    def give_up(self, number: int) -> None:
        api, request = pick(self.calls(), number)
        self.world.emit(api.address, api.give_up(request, self.world.now_s))

    @rule(rounds=st.integers(1, 8), elapsed_s=st.sampled_from([0.0, 0.2, 0.4]))
    def flow(self, rounds: int, elapsed_s: float) -> None:
        for _ in range(rounds):
            self.world.deliver_all()
            self.world.advance(elapsed_s)

    @rule(elapsed_s=st.sampled_from([0.5, 1.0, 3.0, 9.0]))
    def advance(self, elapsed_s: float) -> None:
        self.world.advance(elapsed_s)

    # --- what the network does -------------------------------------------------------------

    @precondition(lambda self: self.world.letters)
    @rule(number=index, how=st.sampled_from(["deliver", "double", "lose"]))
    def treat_one_letter(self, number: int, how: str) -> None:
        letter = pick(self.world.letters, number)
        if how != "double":
            self.world.letters.remove(letter)
        if how != "lose":
            self.world.deliver(letter)

    @precondition(lambda self: self.calls())
    @rule(number=index)
    def overtake(self, number: int) -> None:
        """What was said about an attempt arrives after the news that it failed."""
        api, request = pick(self.calls(), number)
        self.world.emit(api.address, api.give_up(request, self.world.now_s))
        self.flow(2, 0.0)
        for letter in self.late_letters():
            if letter.message.request == request:
                self.world.deliver(letter)
                self.world.check()

    @precondition(lambda self: self.late_letters())
    @rule(number=index)
    def repeat(self, number: int) -> None:
        self.world.deliver(pick(self.late_letters(), number))

    @precondition(lambda self: self.world.letters)
    @rule(hold_back=st.booleans())
    def confuse(self, hold_back: bool) -> None:
        """Turn the order around, or hold everything back until much later."""
        self.world.letters.reverse()
        if hold_back:
            self.held_back += self.world.letters
            self.world.letters = []

    @precondition(lambda self: self.held_back)
    @rule()
    def release(self) -> None:
        self.world.letters += self.held_back
        self.held_back = []

    # --- who comes and goes ------------------------------------------------------------------

    @rule(
        name=st.sampled_from(sorted(ROLES)),
        how=st.sampled_from(["restart", "crash", "leave", "drain"]),
    )
    def lose_worker(self, name: str, how: str) -> None:
        if how == "restart":
            self.world.start_worker(name, ROLES[name])
            return
        for worker in list(self.world.workers.values()):
            if worker.name == name and how in ("leave", "drain"):
                said = worker.leave() if how == "leave" else worker.drain()
                self.world.emit(worker.address, said)
        if how != "drain":
            self.world.crash_worker(name)

    @rule(number=index, what=st.sampled_from(["start", "start", "crash", "core"]))
    def change_front(self, number: int, what: str) -> None:
        if what == "core":
            self.world.restart_core()
        elif what == "crash" and self.world.apis:
            del self.world.apis[pick(sorted(self.world.apis), number)]
        elif len(self.world.apis) < LIMITS.apis:
            self.world.start_api()

    # --- what others pretend -----------------------------------------------------------------

    @precondition(lambda self: self.calls())
    @rule(number=index, what=st.integers(0, 10))
    def speak_for_another_api(self, number: int, what: int) -> None:
        api, request = pick(self.calls(), number)
        attempt = api.calls[request].attempt
        forged = (
            Prefilled(api.name, request, attempt),
            Started(api.name, request, attempt),
            Finished(api.name, request, attempt, "stop"),
            Failed(api.name, request, attempt, "d", "bad"),
            Checked(api.name, request, attempt, "loading"),
            Checked(api.name, request, attempt, "decoding"),
            Checked(api.name, request, attempt, "gone"),
            Checked(api.name, request, attempt, "pulling"),
            Pulled(api.name, request, attempt, 8),
            MoveReady(api.name, request, attempt, 1, 8, 1),
            MoveDeclined(api.name, request, attempt, 1, "no"),
        )
        self.forge(IMPOSTOR, forged[what])

    @precondition(lambda self: self.world.workers and self.world.oracle.asked)
    @rule(number=index, which=index, by_worker=st.booleans())
    def answer_for_another_worker(self, number: int, which: int, by_worker: bool) -> None:
        """A stranger speaks under a worker's name, or a worker answers what others were asked."""
        worker = pick(list(self.world.workers.values()), number)
        asked = self.world.oracle.asked
        newest = sorted({probe for _, probe, _ in asked}, reverse=True)[:4]
        probe = pick(newest, which)
        peer = worker.address.encode() if by_worker else IMPOSTOR
        handle = make_handle("nobody", "0", "probe", probe)
        if not by_worker or (worker.address, probe, "Probe") not in asked:
            self.forge(peer, Probed(worker.name, worker.incarnation, probe, handle))
        if not by_worker or (worker.address, probe, "ProbeRead") not in asked:
            self.forge(peer, ProbeFinished(worker.name, worker.incarnation, probe, 0.1, 9))

    def forge(self, peer: bytes, message: object) -> None:
        self.world.deliver(Letter(peer.decode(), CORE, message))

    # --- what must be true -------------------------------------------------------------------

    @invariant()
    def check(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.letters += self.held_back
        self.world.settle()
        self.world.assert_quiet()


def pick(choices: Sequence[T], number: int) -> T:
    """One of several, by a number of any size."""
    return choices[number % len(choices)]


def test_nothing_breaks_and_nothing_is_left() -> None:
    run_state_machine_as_test(CoreInALossyNetwork, settings=PROFILE)


class PullingCoreInALossyNetwork(CoreInALossyNetwork):
    """The same with a core whose every plan pulls, if anybody holds anything."""

    make_core = staticmethod(pulling_core)
    rounds_before = 40
    workers = ("p", "d", "e")

    def __init__(self) -> None:
        super().__init__()
        self.world.alike_every = 1

    planned: ClassVar[Counter[str]] = Counter()
    """Pulls of all examples, by what computes the prompt."""

    @invariant()
    def count_pulls(self) -> None:
        for row in self.world.core.snapshot(0, self.world.now_s).calls:
            if row.pull and row.phase == "pulling":
                self.planned["remote" if row.prefill else "local"] += 1


def test_nothing_breaks_where_everything_is_pulled() -> None:
    profile = settings(PROFILE, max_examples=150)
    run_state_machine_as_test(PullingCoreInALossyNetwork, settings=profile)
    assert PullingCoreInALossyNetwork.planned["local"] > 20


class MovingCoreInALossyNetwork(CoreInALossyNetwork):
    """The same with several decode workers, from which running calls are moved away again and
    again."""

    rounds_before = 40
    workers = ("d", "e", "m")
    made: ClassVar[Counter[str]] = Counter()
    """Moves of all examples."""

    @precondition(lambda self: self.world.apis)
    @rule(number=index, rounds=st.integers(4, 16), output_tokens=st.integers(10, 40))
    def say_much_and_move(self, number: int, rounds: int, output_tokens: int) -> None:
        """Long enough for tokens to come and for KV to be where it is to go."""
        api = pick(list(self.world.apis.values()), number)
        self.world.submit(api, 9, output_tokens)
        for _ in range(rounds):
            for name in sorted(ROLES):
                self.forge(b"client", MoveCalls(1, name))
            self.world.deliver_all()
            self.world.check()
            self.world.advance(0.2)

    def teardown(self) -> None:
        super().teardown()
        for name, count in self.world.core.counters.items():
            self.made[name] += count


def test_nothing_breaks_where_running_calls_are_moved() -> None:
    profile = settings(PROFILE, max_examples=150)
    run_state_machine_as_test(MovingCoreInALossyNetwork, settings=profile)
    assert MovingCoreInALossyNetwork.made["moves_made"] > 20
    assert MovingCoreInALossyNetwork.made["moves_undone"] > 20


class PrefetchingCoreInALossyNetwork(CoreInALossyNetwork):
    """The same with a core that has contexts moved wherever it can."""

    make_core = staticmethod(prefetching_core)
    rounds_before = 40
    workers = ("p", "d", "e")

    def __init__(self) -> None:
        super().__init__()
        self.world.alike_every = 1

    seen: ClassVar[Counter[str]] = Counter()
    """What became of prefetches, over all examples."""

    @precondition(lambda self: self.world.apis)
    @rule(number=index, what=st.sampled_from(["nothing", "calls", "crash", "late"]))
    def move_ahead_and_disturb(self, number: int, what: str) -> None:
        """A run's context is moved ahead, and something comes between."""
        world, before = self.world, self.world.core.counters["prefetches"]
        api = pick(list(world.apis.values()), number)
        world.submit(api, 60, 12)
        rounds = 0
        while world.core.counters["prefetches"] == before and rounds < 20:
            rounds += 1
            world.deliver_all()
            world.check()
            world.advance(0.2)
        if what == "calls":
            for _ in range(4):
                world.submit(api, 60, 4)
            world.deliver_all()
        elif what == "crash":
            self.lose_worker(pick(self.workers, number), "restart")
        elif what == "late":
            world.advance(9.0)

    def teardown(self) -> None:
        super().teardown()
        for name, count in self.world.core.counters.items():
            if name.startswith("prefetches"):
                self.seen[name] += count


def test_nothing_breaks_where_everything_is_moved_ahead() -> None:
    profile = settings(PROFILE, max_examples=150)
    run_state_machine_as_test(PrefetchingCoreInALossyNetwork, settings=profile)
    seen = PrefetchingCoreInALossyNetwork.seen
    assert min(seen["prefetches_done"], seen["prefetches_dropped"]) > 8, seen


class ReactiveCoreInALossyNetwork(CoreInALossyNetwork):
    """The same with a core that changes the roles of its workers."""

    placement = REACTIVE
    workers = ("p", "d", "e")
    flips: ClassVar[Counter[str]] = Counter()
    """Turns by role, over all examples."""

    @invariant()
    def count_flips(self) -> None:
        for worker in self.world.core.snapshot(0, self.world.now_s).workers:
            if worker.role != ROLES[worker.worker]:
                self.flips[worker.role] += 1


def test_nothing_breaks_where_roles_change() -> None:
    profile = settings(PROFILE, max_examples=250)
    run_state_machine_as_test(ReactiveCoreInALossyNetwork, settings=profile)
    assert ReactiveCoreInALossyNetwork.flips["prefill"] > 20


names = st.sampled_from(["a", "a", "b", ""])
numbers = st.sampled_from([-1, 0, 1, 2, 40, 10**6])
times = st.sampled_from([-1.0, 0.0, 0.5, float("nan"), float("inf")])
hashes = st.integers(0, 5).map(lambda blocks: bytes(8 * blocks)) | st.just(b"odd")
facts = st.builds(
    EngineFacts,
    st.just("0.32"),
    st.just("model"),
    st.just("same"),
    st.sampled_from([4, 4, 4, 0]),
    st.sampled_from([9, 64, -1]),
    st.just(200),
    st.just(8),
    st.just(64),
)
GRAPHS = [b'{"agents":{"a":{},"b":{}},"edges":[{"kind":"next","from":"a","to":"b"}]}', b"{}"]
RECORDS = [b'{"name":"a","declared":{"agents":{"a":{}}}}', b'{"name":"b"}']
sayings: st.SearchStrategy[ToCore] = st.one_of(
    st.builds(Ready, names, names, st.sampled_from(["prefill", "decode", "mixed"]), names, facts),
    st.builds(Beat, names, names, st.builds(Load, numbers, numbers, numbers)),
    st.builds(Leaving, names, names),
    st.builds(Probed, names, names, numbers, st.binary(max_size=1)),
    st.builds(ProbeFinished, names, names, numbers, times, numbers),
    st.builds(Hello, names, st.sampled_from([1, 1, 2])),
    st.builds(ApiBeat, names, numbers),
    st.builds(
        Submit,
        names,
        names,
        numbers,
        numbers,
        numbers,
        hashes,
        st.booleans(),
        names,
        numbers,
        times,
        contexts,
    ),
    st.builds(Prefilled, names, names, numbers),
    st.builds(Started, names, names, numbers),
    st.builds(Finished, names, names, numbers, names, numbers, numbers, numbers, numbers, times),
    st.builds(Failed, names, names, numbers, names, names, numbers),
    st.builds(Checked, names, names, numbers, st.sampled_from(["prefilling", "loading", "gone"])),
    st.builds(Pulled, names, names, numbers, numbers, st.booleans()),
    st.builds(MoveReady, names, names, numbers, numbers, numbers, numbers),
    st.builds(MoveDeclined, names, names, numbers, numbers, names, st.booleans()),
    st.builds(MoveCalls, numbers, names, names, names),
    st.builds(Inspect, numbers),
    st.builds(DeclareWorkflow, numbers, names, st.binary(max_size=3) | st.sampled_from(GRAPHS)),
    st.builds(DropWorkflow, numbers, names, names),
    st.builds(ListWorkflows, numbers, names),
    st.builds(ShowWorkflow, numbers, names, names, st.booleans()),
    st.builds(
        ImportWorkflow, numbers, names, st.binary(max_size=3) | st.sampled_from(RECORDS), names
    ),
    st.builds(StartRun, numbers, names, names, names, times, numbers),
    st.builds(CancelRun, numbers, names, names, names),
    st.builds(StaticPrefixes, numbers, names, names, st.just([])),
    st.builds(EndRun, numbers, names, names, names, st.booleans()),
)


@pytest.mark.parametrize("placement", [PLACEMENT, REACTIVE], ids=["default", "reactive"])
@settings(max_examples=150, deadline=None)
@given(said=st.lists(st.tuples(names, sayings, st.sampled_from([0.0, 0.1, 1.0])), max_size=60))
def test_nothing_that_a_peer_can_say_breaks_the_core(
    placement: Placement, said: list[tuple[str, ToCore, float]]
) -> None:
    core, now_s = Core(LIMITS, placement, "core"), 0.0
    for peer, message, elapsed_s in said:
        core.handle(peer.encode(), message, now_s)
        now_s += elapsed_s
        core.tick(now_s)
        core.check()
    while (due_s := core.next_deadline_s()) is not None:
        now_s = due_s
        core.tick(now_s)
    snapshot = core.snapshot(0, now_s)
    assert (snapshot.workers, snapshot.apis, snapshot.queued, snapshot.active) == ([], 0, 0, 0)
    assert snapshot.runs_live == 0

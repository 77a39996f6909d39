"""Virtual time, and messages on their way between simulated processes."""

from __future__ import annotations

import random

import pytest

from cluster.simulator.events import Events
from cluster.simulator.network import CORE, Connection, Network
from cluster.simulator.setup import Faults, NetworkSetup
from coordinator.protocol import Placed

MESSAGE_S = 0.5
NO_FAULTS = Faults(until_s=0.0)


class Bed:
    """A network with a core, an API process and a worker that note what they get and when."""

    def __init__(self, faults: Faults = NO_FAULTS, jitter_s: float = 0.0, seed: int = 1) -> None:
        self.events = Events()
        setup = NetworkSetup(message_s=MESSAGE_S, message_jitter_s=jitter_s)
        self.network = Network(self.events, setup, faults, random.Random(seed))
        self.got: list[tuple[float, str, object]] = []
        self.broken: list[tuple[float, str]] = []
        for name in (CORE, "api", "w#1"):
            self.network.attach(name, lambda _, message, name=name: self._note(name, message))
        for name in ("api", "w"):
            self.network.listen(
                name,
                lambda _, message, name=name: self._note(name, message),
                lambda _, name=name: self.broken.append((self.events.now_s, name)),
            )

    def _note(self, name: str, message: object) -> None:
        self.got.append((self.events.now_s, name, message))

    def connect(self) -> Connection:
        return self.network.connect("api", Placed("w", "1"))


def test_equal_times_come_in_the_order_in_which_they_were_put_in() -> None:
    events, seen = Events(), []
    events.at(2.0, seen.append, "late")
    for name in "abc":
        events.at(1.0, seen.append, name)
    events.at(1.0, lambda: events.at(0.5, seen.append, "what has passed is now"))
    assert events.run()
    assert seen == ["a", "b", "c", "what has passed is now", "late"]
    assert events.now_s == 2.0


def test_what_was_cancelled_does_not_happen() -> None:
    events, seen = Events(), []
    kept = [events.at(float(number), seen.append, number) for number in range(20_000)]
    for event in kept[1::2]:
        events.cancel(event)
        events.cancel(event)
    assert len(events) == 10_000
    events.run()
    assert seen == list(range(0, 20_000, 2))
    events.cancel(kept[0])
    assert len(events) == 0


def test_a_run_ends_at_its_time_or_when_it_is_stopped() -> None:
    events, seen = Events(), []
    events.at(1.0, seen.append, 1)
    events.at(3.0, events.stop)
    events.at(3.0, seen.append, 3)
    assert events.run(2.0)
    assert (events.now_s, seen) == (2.0, [1])
    assert not events.run(9.0)
    assert (events.now_s, seen) == (3.0, [1])
    assert events.run(9.0)
    assert (events.now_s, seen) == (9.0, [1, 3])


def test_messages_take_their_time_and_nobody_gets_those_to_the_dead() -> None:
    bed = Bed()
    bed.network.send("api", CORE, "a")
    bed.network.send(CORE, "w#2", "b")
    bed.events.run()
    assert bed.got == [(MESSAGE_S, CORE, "a")]


def test_without_faults_messages_stay_in_order_however_long_they_take() -> None:
    bed = Bed(jitter_s=10.0)
    connection = bed.connect()
    for number in range(50):
        bed.network.send("api", CORE, number)
        bed.network.to_worker(connection, number)
        bed.network.to_api(connection, number)
    bed.events.run()
    for name in (CORE, "w", "api"):
        assert [message for _, who, message in bed.got if who == name] == list(range(50))
    assert len({at_s for at_s, _, _ in bed.got}) > 10


def test_control_messages_are_lost_doubled_and_delayed() -> None:
    faults = Faults(loss=0.2, duplication=0.2, delay=0.5, delay_s=3.0, until_s=100.0)
    bed = Bed(faults)
    for number in range(1000):
        bed.events.at(number / 100, bed.network.send, "api", CORE, number)
    bed.events.run()
    numbers = [message for _, _, message in bed.got]
    assert 700 < len(set(numbers)) < 900
    assert 100 < len(numbers) - len(set(numbers)) < 250
    assert numbers != sorted(numbers)
    delays_s = [at_s - message / 100 for at_s, _, message in bed.got]  # type: ignore[operator]
    assert min(delays_s) == pytest.approx(MESSAGE_S)
    assert 3.0 < max(delays_s) <= MESSAGE_S + 3.0
    bed.got.clear()
    bed.events.run(100.0)
    for number in range(100):
        bed.network.send("api", CORE, number)
    bed.events.run()
    assert [message for _, _, message in bed.got] == list(range(100)), "the trouble is over"


def test_a_connection_that_breaks_takes_with_it_what_is_on_it() -> None:
    bed = Bed()
    connection = bed.connect()
    bed.network.to_worker(connection, "arrives")
    bed.events.run(1.0)
    bed.network.to_worker(connection, "lost")
    assert bed.network.to_api(connection, "lost too")
    bed.network.break_off(connection)
    assert not bed.network.to_api(connection, "refused")
    bed.network.to_worker(connection, "lost as well")
    bed.events.run()
    assert bed.got == [(MESSAGE_S, "w", "arrives")]
    assert bed.broken == [(1.0, "w"), (1.0 + MESSAGE_S, "api")]


def test_a_partition_loses_control_messages_and_holds_data_back() -> None:
    bed = Bed()
    connection = bed.connect()
    bed.network.partition(frozenset({"w", CORE}), 7.0)
    bed.events.at(7.0, bed.network.heal)
    bed.network.send("api", CORE, "lost")
    bed.network.send("w#1", CORE, "same side")
    bed.network.to_worker(connection, "held")
    bed.events.at(7.0, bed.network.to_worker, connection, "after")
    bed.events.run()
    assert bed.got == [
        (MESSAGE_S, CORE, "same side"),
        (7.0 + MESSAGE_S, "w", "held"),
        (7.0 + MESSAGE_S, "w", "after"),
    ]


@pytest.mark.parametrize("seed", [1, 2])
def test_chance_comes_from_the_seed_alone(seed: int) -> None:
    def history() -> list[tuple[float, str, object]]:
        bed = Bed(Faults(loss=0.1, duplication=0.1, delay=0.5, until_s=9.0), seed=seed)
        connection = bed.connect()
        for number in range(100):
            bed.network.send("api", CORE, number)
            bed.network.to_worker(connection, number)
        bed.events.run()
        return bed.got

    assert history() == history()

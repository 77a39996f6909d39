"""KV on its way between simulated engines: how links are shared."""

from __future__ import annotations

import msgspec
import pytest

from cluster.simulator.events import Events
from cluster.simulator.links import Links, Read
from cluster.simulator.setup import ClusterSetup, NetworkSetup, WorkerSetup
from coordinator.cost import Link, Tier
from tests.simulation.cluster import SHAPE, cluster

SPEED = 1e9
LATENCY_S = 0.25
FIXED_S = 0.75
LINKS: dict[Tier, Link] = {"rdma": Link(LATENCY_S, SPEED), "nvlink": Link(0.0, 10 * SPEED)}
BEGIN_S = LATENCY_S + FIXED_S


class Bed:
    """Links between workers on ``nodes``, in racks by the first letter, and when reads end."""

    def __init__(self, *nodes: str, rack_bytes_per_s: float = 0.0, tp: int = 1) -> None:
        network = NetworkSetup(
            links=LINKS, transfer_fixed_s=FIXED_S, rack_bytes_per_s=rack_bytes_per_s
        )
        workers = tuple(
            WorkerSetup(f"w{number}", "mixed", node=node, rack=node[0])
            for number, node in enumerate(nodes)
        )
        self.setup: ClusterSetup = msgspec.structs.replace(
            cluster("mixed", network=network), workers=workers, tp=tp
        )
        self.events = Events()
        self.links = Links(self.events, self.setup)
        self.ended_s: dict[str, float] = {}

    def read(self, name: str, source: int, target: int, size_bytes: float) -> Read:
        def done(_read: Read) -> None:
            self.ended_s[name] = self.events.now_s

        return self.links.read(f"w{source}", f"w{target}", size_bytes, done)


def test_a_read_alone_has_the_whole_link() -> None:
    bed = Bed("a1", "a2")
    bed.read("one", 0, 1, 2 * SPEED)
    bed.events.run()
    assert bed.ended_s == {"one": pytest.approx(BEGIN_S + 2.0)}
    assert bed.links.moved_bytes == {"rdma": 2 * SPEED}
    assert bed.links.in_flight() == []


@pytest.mark.parametrize("ends", [((0, 1), (0, 2)), ((0, 2), (1, 2))])
def test_reads_share_what_leaves_a_worker_and_what_enters_one(
    ends: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    bed = Bed("a1", "a2", "a3")
    bed.read("long", *ends[0], 3 * SPEED)
    bed.read("short", *ends[1], SPEED)
    bed.events.run()
    # Both at half speed until the short one has ended; then 2 are left of the long one.
    assert bed.ended_s["short"] == pytest.approx(BEGIN_S + 2.0)
    assert bed.ended_s["long"] == pytest.approx(BEGIN_S + 4.0)


def test_who_comes_later_slows_who_is_there() -> None:
    bed = Bed("a1", "a2", "a3")
    bed.read("first", 0, 2, 2 * SPEED)
    bed.events.at(1.0, bed.read, "second", 1, 2, 2 * SPEED)
    bed.events.run()
    # From 1 to 2 alone, to 4 shared, and then the second one alone.
    assert bed.ended_s["first"] == pytest.approx(BEGIN_S + 3.0)
    assert bed.ended_s["second"] == pytest.approx(BEGIN_S + 4.0)


def test_the_ways_in_and_out_and_other_workers_do_not_share() -> None:
    bed = Bed("a1", "a2", "a3", "a4")
    bed.read("there", 0, 1, SPEED)
    bed.read("back", 1, 0, SPEED)
    bed.read("others", 2, 3, SPEED)
    bed.events.run()
    assert list(bed.ended_s.values()) == [pytest.approx(BEGIN_S + 1.0)] * 3


def test_within_a_node_it_is_another_link() -> None:
    bed = Bed("a1", "a1", "a2")
    bed.read("near", 0, 1, 10 * SPEED)
    bed.read("far", 0, 2, SPEED)
    bed.events.run()
    assert bed.ended_s["near"] == pytest.approx(FIXED_S + 1.0)
    assert bed.ended_s["far"] == pytest.approx(BEGIN_S + 1.0)
    assert bed.links.moved_bytes == {"nvlink": 10 * SPEED, "rdma": SPEED}


def test_racks_share_what_joins_them() -> None:
    bed = Bed("a1", "a2", "b1", "b2", rack_bytes_per_s=SPEED)
    bed.read("one", 0, 2, SPEED)
    bed.read("two", 1, 3, SPEED)
    bed.read("inside", 0, 1, 0.25 * SPEED)
    bed.events.run()
    assert bed.ended_s["one"] == bed.ended_s["two"] == pytest.approx(BEGIN_S + 2.0)
    # It shares w0's way out with ``one``.
    assert bed.ended_s["inside"] == pytest.approx(BEGIN_S + 0.5)


def test_shards_go_over_as_many_links() -> None:
    assert SHAPE.kv_heads == 8
    bed = Bed("a1", "a2", tp=4)
    bed.read("one", 0, 1, 4 * SPEED)
    bed.events.run()
    assert bed.ended_s == {"one": pytest.approx(BEGIN_S + 1.0)}


def test_what_was_broken_off_has_moved_as_far_as_it_came() -> None:
    bed = Bed("a1", "a2", "a3")
    read = bed.read("one", 0, 2, 4 * SPEED)
    bed.read("two", 1, 2, 2 * SPEED)
    bed.events.run(BEGIN_S + 2.0)
    assert bed.links.of("w0") == [read]
    bed.links.stop(read)
    bed.links.stop(read)
    bed.events.run()
    assert bed.ended_s == {"two": pytest.approx(BEGIN_S + 3.0)}
    assert bed.links.moved_bytes == {"rdma": pytest.approx(3 * SPEED)}


def test_a_link_that_is_not_there_is_said_before_anything_starts() -> None:
    bed = Bed("a1", "a2")
    hardware = msgspec.structs.replace(bed.setup.hardware, links={})
    network = NetworkSetup()
    setup = msgspec.structs.replace(bed.setup, hardware=hardware, network=network)
    with pytest.raises(ValueError, match="has no rdma link"):
        Links(Events(), setup)

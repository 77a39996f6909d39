"""What engines say of their prefix caches: from their sockets into the core's index."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch, ZmqEventPublisher

from cluster import kv_listener
from cluster.kv_listener import Endpoints, KvListener
from coordinator.blocks import hash_blocks, salt_of
from coordinator.core import Core
from coordinator.limits import Placement
from coordinator.protocol import (
    Finished,
    KvChanges,
    KvRemoved,
    KvResync,
    Leaving,
    Prefilled,
    Role,
    Started,
)
from tests.unit.test_core import LIMITS, Bed, Told, ready

WAIT_S = 30.0
BLOCK = 4
SALT = salt_of("", "")


def chain(*blocks: int) -> bytes:
    return b"".join(block.to_bytes(8, "little") for block in blocks)


def said(sequence: int, **more: object) -> KvChanges:
    return KvChanges("decode-1", "1", sequence, **more)  # type: ignore[arg-type]


def bed() -> Bed:
    made = Bed()
    made.cluster("prefill", "decode")
    return made


def held(made: Bed, *blocks: int) -> int:
    """How much of a chain the core believes the decode worker to have."""
    return made.core._index.longest_prefix(chain(*blocks)).get("decode-1", 0)


def hosted(made: Bed, *blocks: int) -> int:
    """The same of its host."""
    return made.core._hosts.longest_prefix(chain(*blocks)).get("decode-1", 0)


# --- the core ---------------------------------------------------------------------------------


def test_what_an_engine_has_evicted_is_not_counted_on() -> None:
    made = bed()
    made.say("decode-1", said(0, stored=[chain(1, 2, 3)], reset=True))
    assert held(made, 1, 2, 3, 4) == 3
    made.say("decode-1", said(1, removed=[KvRemoved(chain(1, 2, 3), 1)]))
    assert held(made, 1, 2, 3) == 1
    assert made.core.counters["kv_changes"] == 2


def test_what_calls_leave_behind_counts_at_once_and_evictions_go_before_it() -> None:
    made = bed()
    made.say("decode-1", said(0, reset=True))
    made.plan("c", 320, block_hashes=chain(*range(1, 21)))
    made.say("api", Prefilled("api", "c", 1))
    made.say("api", Started("api", "c", 1))
    assert held(made, *range(1, 21)) == 20
    made.say("decode-1", said(1, removed=[KvRemoved(chain(*range(1, 21)), 5)]))
    assert held(made, *range(1, 21)) == 5


def test_a_reset_takes_back_all_that_was_believed() -> None:
    made = bed()
    made.say("decode-1", said(0, stored=[chain(1, 2)], reset=True))
    made.say("decode-1", said(1, stored=[chain(7)], reset=True))
    assert (held(made, 1, 2), held(made, 7)) == (0, 1)


def test_who_is_missing_a_message_asks_for_all_once_a_beat() -> None:
    made = bed()
    assert made.say("decode-1", said(5, stored=[chain(1)])) == [("decode-1", KvResync("1"))]
    assert made.say("decode-1", said(6, stored=[chain(1)])) == []
    assert held(made, 1) == 0
    made.now_s += 1.0
    assert made.say("decode-1", said(7)) == [("decode-1", KvResync("1"))]
    made.say("decode-1", said(8, stored=[chain(1)], reset=True))
    assert made.say("decode-1", said(9, stored=[chain(2)])) == []
    assert (held(made, 1), held(made, 2)) == (1, 1)
    made.now_s += 1.0
    assert made.say("decode-1", said(9, stored=[chain(3)])) == [("decode-1", KvResync("1"))]
    assert held(made, 3) == 0


@pytest.mark.parametrize(
    "nonsense",
    [
        {"stored": [b"short"]},
        {"removed": [KvRemoved(b"odd", 0)]},
        {"removed": [KvRemoved(chain(1), -1)]},
        {"host_stored": [b"odd"]},
        {"host_removed": [KvRemoved(chain(1), -1)]},
        {"stored": [b"short"], "reset": True},
    ],
)
def test_nonsense_counts_as_not_heard(nonsense: dict[str, object]) -> None:
    made = bed()
    made.say("decode-1", said(0, stored=[chain(1)], reset=True))
    assert made.say("decode-1", said(1, **nonsense)) == [("decode-1", KvResync("1"))]
    assert held(made, 1) == 1


def test_another_incarnation_begins_anew() -> None:
    made = bed()
    made.say("decode-1", said(0, stored=[chain(1)], reset=True))
    made.worker("decode-1", incarnation="2")
    assert held(made, 1) == 0
    made.say("decode-1", said(1, stored=[chain(1)]))
    assert held(made, 1) == 0, "the old one is not listened to"
    changes = KvChanges("decode-1", "2", 0, [chain(1)], reset=True)
    assert made.say("decode-1", changes) == []
    assert held(made, 1) == 1


def test_what_is_on_hosts_is_known_beside_what_is_cached() -> None:
    made = Bed()
    made.cluster("prefill")
    made.say("decode-1", ready("decode-1", kv_host_blocks=500))
    made.say("decode-1", said(0, stored=[chain(1)], host_stored=[chain(1, 2, 3)], reset=True))
    assert (held(made, 1, 2, 3), hosted(made, 1, 2, 3)) == (1, 3)
    made.say("decode-1", said(1, host_removed=[KvRemoved(chain(1, 2, 3), 2)]))
    assert (held(made, 1, 2, 3), hosted(made, 1, 2, 3)) == (1, 2)
    # After a gap nothing is taken from either until all is said anew.
    assert made.say("decode-1", said(3, host_stored=[chain(7)])) == [("decode-1", KvResync("1"))]
    assert hosted(made, 7) == 0
    made.say("decode-1", said(4, host_stored=[chain(7)], reset=True))
    assert (held(made, 1), hosted(made, 1), hosted(made, 7)) == (0, 0, 1)
    made.say("decode-1", Leaving("decode-1", "1"))
    assert hosted(made, 7) == 0


def test_a_host_that_has_forgotten_something_is_full_whatever_is_known_of_it() -> None:
    made = Bed()
    made.cluster("prefill")
    made.say("decode-1", ready("decode-1", kv_host_blocks=500))
    made.say("decode-1", said(0, host_stored=[chain(1, 2, 3)], reset=True))
    placing = made.core._calls._placing
    assert placing._host("decode-1").room == 497
    made.say("decode-1", said(1, host_removed=[KvRemoved(chain(1, 2, 3), 0)]))
    assert hosted(made, 1) == 0
    assert placing._host("decode-1").room == 0
    made.say("decode-1", said(2, reset=True))
    assert placing._host("decode-1").room == 0, "what was lost is there still"


def test_what_is_still_to_be_loaded_is_not_held() -> None:
    made = Bed()
    made.core = Core(LIMITS, Placement(disaggregated="never"), "core")
    made.api()
    made.say("decode-1", ready("decode-1", kv_host_blocks=500))
    prompt = chain(*range(20))
    made.say("decode-1", said(0, host_stored=[prompt[: 15 * 8]], reset=True))
    made.plan("r", 320, block_hashes=prompt)
    assert made.core._state.calls["api", "r"].loaded_blocks == 15
    assert held(made, *range(20)) == 0
    made.say("api", Started("api", "r", 1))
    assert held(made, *range(20)) == 20


class HostBed(Bed):
    """Workers keep blocks on their hosts."""

    def worker(self, name: str, role: Role = "decode", incarnation: str = "1") -> Told:
        return self.say(name, ready(name, role, incarnation, kv_host_blocks=500))


def test_what_was_on_the_host_only_is_not_missed_in_the_cache() -> None:
    """By a policy that counts it as cached, of a prompt that came from elsewhere."""
    made = HostBed()
    made.cluster("prefill", "decode")
    prompt = chain(*range(20))
    made.say("decode-1", said(0, host_stored=[prompt[: 5 * 8]], reset=True))
    assert made.plan("r", 320, block_hashes=prompt).prefill is not None
    made.say("api", Prefilled("api", "r", 1))
    made.say("api", Started("api", "r", 1))
    made.say("api", Finished("api", "r", 1, "stop", 4, local_cached_tokens=0))
    assert held(made, *range(20)) == 20


def test_a_worker_without_room_on_its_host_has_nothing_there() -> None:
    made = bed()
    made.say("decode-1", said(0, host_stored=[chain(1)], reset=True))
    assert hosted(made, 1) == 0


# --- the worker, with vLLM's own publisher ------------------------------------------------------


class Engine:
    """What publishes in an engine, and who listens to it."""

    def __init__(self) -> None:
        self.endpoints = Endpoints()
        self.publisher = self.publish_from()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sent: list[KvChanges] = []
        self.may_send = True
        self.listener = KvListener(self.context, self.endpoints, "w", "1", self.send, host=True)

    def publish_from(self) -> ZmqEventPublisher:
        config = self.endpoints.config()
        del config["enable_kv_cache_events"], config["publisher"]
        return ZmqEventPublisher(0, **config)

    def send(self, message: KvChanges) -> bool:
        if self.may_send:
            self.sent.append(message)
        return self.may_send

    def stores(self, *blocks: int, after: int = 0) -> None:
        """Blocks of 4 tokens, each known by a number."""
        tokens = [block for block in blocks[after:] for _ in range(BLOCK)]
        event = BlockStored(
            block_hashes=[bytes([*blocks[: end + 1]]) for end in range(after, len(blocks))],
            parent_block_hash=bytes(blocks[:after]) if after else None,
            token_ids=tokens,
            block_size=BLOCK,
            lora_id=None,
            medium="GPU",
            lora_name=None,
            group_idx=0,
        )
        self.publisher.publish(KVEventBatch(ts=time.time(), events=[event]))

    def evicts(self, *blocks: int) -> None:
        event = BlockRemoved(block_hashes=[bytes(blocks)], medium="GPU", group_idx=0)
        self.publisher.publish(KVEventBatch(ts=time.time(), events=[event]))

    def copies(self, *blocks: int) -> None:
        """Blocks are on the host, too; of each vLLM tells its hash."""
        events = [
            BlockStored(
                block_hashes=[bytes(blocks[:end])],
                parent_block_hash=None,
                token_ids=[],
                block_size=0,
                lora_id=None,
                medium="CPU",
                lora_name=None,
                group_idx=0,
            )
            for end in range(1, len(blocks) + 1)
        ]
        self.publisher.publish(KVEventBatch(ts=time.time(), events=events))

    async def heard(self, batches: int) -> None:
        """Wait until so many batches have been heard. A subscriber may come late: then the next
        batch makes it ask, and there always is a next one."""
        deadline_s = time.monotonic() + WAIT_S
        while self.listener._next_batch < batches:
            assert time.monotonic() < deadline_s, "not heard"
            self.evicts(255)  # which nobody has stored
            await asyncio.sleep(0.1)

    def close(self) -> None:
        self.publisher.shutdown()
        self.listener.close()
        self.context.destroy(linger=0)
        self.endpoints.close()


def told(*blocks: int) -> bytes:
    """What a chain is called in the cluster."""
    return hash_blocks([block for block in blocks for _ in range(BLOCK)], BLOCK, SALT)


@pytest.fixture
def engine_maker() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for each in made:
        each.close()


async def test_an_engine_s_blocks_are_told_by_our_names(engine_maker: list[Engine]) -> None:
    engine = Engine()
    engine_maker.append(engine)
    listening = asyncio.create_task(engine.listener.run())
    await asyncio.sleep(0.2)
    engine.stores(1, 2, 3)
    await engine.heard(1)
    engine.listener.tell()
    assert engine.sent == [KvChanges("w", "1", 0, [told(1, 2, 3)], reset=True)]
    engine.stores(1, 2, 3, 4, after=3)
    engine.evicts(1, 2, 3, 4)
    await engine.heard(engine.listener._next_batch + 2)
    engine.listener.tell()
    assert engine.sent[1:] == [KvChanges("w", "1", 1, removed=[KvRemoved(told(1, 2, 3, 4), 3)])]
    listening.cancel()


async def test_an_engine_s_copies_on_the_host_are_told_beside_them(
    engine_maker: list[Engine],
) -> None:
    engine = Engine()
    engine_maker.append(engine)
    listening = asyncio.create_task(engine.listener.run())
    await asyncio.sleep(0.2)
    engine.stores(1, 2, 3)
    engine.copies(1, 2, 3)
    await engine.heard(2)
    engine.listener.tell()
    both = KvChanges("w", "1", 0, [told(1, 2, 3)], reset=True, host_stored=[told(1, 2, 3)])
    assert engine.sent == [both]
    listening.cancel()


async def test_what_was_missed_is_asked_for_again(engine_maker: list[Engine]) -> None:
    engine = Engine()
    engine_maker.append(engine)
    events = engine.listener._events.raw
    events.setsockopt(zmq.UNSUBSCRIBE, b"")
    await asyncio.sleep(0.3)
    for number in range(5):
        engine.stores(number)
    await asyncio.sleep(0.3)  # nobody has listened
    events.setsockopt(zmq.SUBSCRIBE, b"")
    listening = asyncio.create_task(engine.listener.run())
    await asyncio.sleep(0.3)
    engine.stores(9)
    await engine.heard(6)
    engine.listener.tell()
    (message,) = engine.sent
    assert sorted(message.stored) == sorted(told(block) for block in (0, 1, 2, 3, 4, 9))
    listening.cancel()


async def test_what_the_core_did_not_get_is_told_with_all_the_rest(
    engine_maker: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_listener, "CHAIN_BYTES_MAX", 24)
    engine = Engine()
    engine_maker.append(engine)
    listening = asyncio.create_task(engine.listener.run())
    await asyncio.sleep(0.2)
    for number in range(4):
        engine.stores(number, number + 10)
    await engine.heard(4)
    engine.may_send = False
    engine.listener.tell()
    engine.may_send = True
    engine.listener.tell()
    assert [(part.sequence, part.reset) for part in engine.sent] == [
        (0, True),
        (1, False),
        (2, False),
        (3, False),
    ]
    expected = sorted(told(number, number + 10) for number in range(4))
    assert sorted(each for part in engine.sent for each in part.stored) == expected
    engine.listener.resync()
    assert (engine.sent[4].sequence, engine.sent[4].reset) == (4, True)
    listening.cancel()


def test_nobody_else_may_listen() -> None:
    endpoints = Endpoints()
    folder = endpoints.events.removeprefix("ipc://").rsplit("/", 1)[0]
    assert Path(folder).stat().st_mode & 0o077 == 0
    endpoints.close()
    assert not Path(folder).exists()


def test_what_a_killed_worker_left_goes_with_the_next_one_s_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    left = tmp_path / f"pythia-kv-{int(process.stdout)}-x"
    live = tmp_path / f"pythia-kv-{os.getpid()}-x"
    for folder in (left, live):
        folder.mkdir()
    Endpoints().close()
    assert (left.exists(), live.exists()) == (False, True)

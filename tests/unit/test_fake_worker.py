"""The worker without a model: speaks the whole protocol, as a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import msgspec
import pytest
import zmq
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from cluster import fake_worker
from cluster.config import default_cluster
from cluster.document import dump
from cluster.fake_engine import Behaviour, FakeCore, token_at
from cluster.process import free_port
from cluster.schema import CoordinatorEntry, WorkerEntry
from coordinator import protocol
from transfer import handle as handles

START_S = 120.0
ANSWER_S = 20.0
NAME = "fake-0"
VOCABULARY = 4096
HOLD = {"kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}}

T = TypeVar("T")


def request(
    name: str, prompt_tokens: int = 40, max_tokens: int = 4, extra: dict[str, Any] | None = None
) -> EngineCoreRequest:
    """A request as an API process makes it."""
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=list(range(prompt_tokens)),
        mm_features=None,
        sampling_params=SamplingParams(
            max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA, extra_args=extra
        ),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def core(seats: int = 2, **behaviour: Any) -> FakeCore:
    """A fake engine core, stepped by hand; its configuration is what it reads of vLLM's."""
    config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=seats),
        model_config=SimpleNamespace(max_model_len=100, get_vocab_size=lambda: VOCABULARY),
        cache_config=SimpleNamespace(block_size=32),
    )
    return FakeCore(config, "engine-of-the-test", Behaviour(**behaviour))


async def test_every_request_in_the_batch_gets_a_token_a_step() -> None:
    fake = core(seats=2)
    for name in "abc":
        await fake.add_request_async(request(name, max_tokens=2))
    assert [output.request_id for output in fake.step(1.0)] == ["a", "b"]
    last = fake.step(2.0)
    assert [output.finish_reason for output in last] == [FinishReason.LENGTH] * 2
    assert [output.request_id for output in fake.step(3.0)] == ["c"]


async def test_a_token_depends_on_its_place_alone() -> None:
    fake = core()
    await fake.add_request_async(request("whole", prompt_tokens=10, max_tokens=6))
    whole = [fake.step(float(step))[0].new_token_ids[0] for step in range(6)]
    await fake.add_request_async(request("rest", prompt_tokens=13, max_tokens=3))
    assert [fake.step(float(step))[0].new_token_ids[0] for step in range(3)] == whole[3:]
    assert whole[0] == token_at(10, 0, VOCABULARY)


async def test_a_prompt_takes_its_time() -> None:
    fake = core(prefill_s_per_token=0.01)
    await fake.add_request_async(request("slow", prompt_tokens=50))
    assert fake.step(100.0) == []
    assert fake.step(100.4) == []
    (first,) = fake.step(100.6)
    assert first.prefill_stats is not None
    assert first.prefill_stats.num_computed_tokens == 50


async def test_kv_is_held_for_whoever_asked_and_pulled_by_its_handle() -> None:
    fake = core(prefill_s_per_token=10.0, transfer_s=0.5)
    await fake.add_request_async(request("held", 40, 1, HOLD))
    fake.step(0.0)
    (held,) = fake.step(401.0)
    handle = handles.from_params(held.kv_transfer_params)
    assert (handles.owner(handle), handle.remote_num_tokens) == ("held", 40)
    assert handles.blocks_held(handle) == 2
    pull = {"kv_transfer_params": handles.to_params(handle)}
    await fake.add_request_async(request("pulled", 40, 1, pull))
    assert fake.step(500.0) == []
    (pulled,) = fake.step(500.6)
    assert pulled.prefill_stats is not None
    assert pulled.prefill_stats.num_external_cached_tokens == 39
    assert pulled.kv_transfer_params is None


async def test_without_a_limit_it_stops_at_the_context_length() -> None:
    fake = core()
    endless = request("endless", prompt_tokens=98)
    assert endless.sampling_params is not None
    endless.sampling_params.max_tokens = None
    await fake.add_request_async(endless)
    assert [fake.step(float(step))[0].finish_reason for step in range(2)] == [
        None,
        FinishReason.LENGTH,
    ]


class Peer:
    """The core and an API process, as the worker meets them."""

    def __init__(self, context: zmq.Context[Any], control_port: int, health_port: int) -> None:
        self.health_port = health_port
        self.control = context.socket(zmq.ROUTER)
        self.control.bind(f"tcp://127.0.0.1:{control_port}")
        self.data = context.socket(zmq.DEALER)
        self.identity = b""
        self.ready: protocol.Ready | None = None
        self.encoder = MsgpackEncoder()
        self.decoder = MsgpackDecoder(EngineCoreOutputs)

    def take_in(self) -> protocol.Ready:
        """Welcome the worker and connect to it."""
        ready = self.told(protocol.Ready, START_S)
        self.say(protocol.Welcome(beat_interval_s=0.2, core="core-of-the-test"))
        self.data.connect(ready.data_address)
        self.ready = ready
        return ready

    def say(self, message: protocol.Message) -> None:
        """The core says something."""
        self.control.send_multipart([self.identity, protocol.encode(message)])

    def told(self, kind: type[T], timeout_s: float = ANSWER_S) -> T:
        """The next message of that kind to the core."""
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            if self.control.poll(int(1000 * left_s) + 1):
                self.identity, frame = self.control.recv_multipart()
                message = protocol.decode_to_core(frame)
                if isinstance(message, kind):
                    return message
        raise TimeoutError(f"no {kind.__name__}")

    def ask(self, message: protocol.Message, body: object = None) -> None:
        """The API process asks."""
        frames = self.encoder.encode(body) if body is not None else []
        self.data.send_multipart([protocol.encode(message), *frames])

    def answer(self) -> tuple[protocol.WorkerToApi, list[bytes]]:
        """The next message to the API process."""
        if not self.data.poll(int(1000 * ANSWER_S)):
            raise TimeoutError("no answer from the worker")
        header, *frames = self.data.recv_multipart()
        return protocol.decode_worker_to_api(header), frames

    def tokens(self, engine_id: str) -> list[int]:
        """What the worker says until that request is over."""
        tokens: list[int] = []
        while True:
            message, frames = self.answer()
            assert isinstance(message, protocol.Deltas)
            for output in self.decoder.decode(frames).outputs:
                if output.request_id == engine_id:
                    tokens += output.new_token_ids
                    if output.finish_reason is not None:
                        return tokens

    @property
    def incarnation(self) -> str:
        """The worker's."""
        assert self.ready is not None
        return self.ready.incarnation


@pytest.fixture(scope="module")
def peer(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """A running fake worker that has been taken in."""
    port = free_port("127.0.0.1")
    config = msgspec.structs.replace(
        default_cluster(str(tiny_model), 0),
        served_model_name="tiny",
        coordinator=CoordinatorEntry(port=port),
        workers=[WorkerEntry(name=NAME, role="mixed", health_port=free_port("127.0.0.1"))],
    )
    folder = tmp_path_factory.mktemp("fake-worker")
    path = folder / "cluster.yaml"
    path.write_text(dump(config), encoding="utf-8")
    with zmq.Context() as context, (folder / "log").open("wb") as log:
        made = Peer(context, port, config.workers[0].health_port)
        command = fake_worker.command(path, NAME, "--step-s", "0.005")
        root = Path(__file__).parents[2]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=root)
        try:
            made.take_in()
            yield made
            made.say(protocol.Leave(made.incarnation))
            assert process.wait(ANSWER_S) == 0, (folder / "log").read_text()
        finally:
            process.kill()
            process.wait()
            context.destroy(linger=0)


def test_it_registers_as_a_worker_does_and_beats(peer: Peer) -> None:
    assert peer.ready is not None
    assert (peer.ready.worker, peer.ready.role) == (NAME, "mixed")
    assert peer.ready.facts.model == "tiny"
    assert peer.ready.facts.block_size == 32
    assert peer.told(protocol.Beat).incarnation == peer.incarnation


def test_it_answers_over_http_that_it_lives_and_is_taken_in(peer: Peer) -> None:
    for path in ("live", "ready"):
        with urllib.request.urlopen(f"http://127.0.0.1:{peer.health_port}/{path}") as answer:
            assert answer.status == 200


def test_it_answers_probes(peer: Peer) -> None:
    peer.say(protocol.Probe(1, peer.incarnation, seed=1, prompt_tokens=65))
    probed = peer.told(protocol.Probed)
    assert probed.error == ""
    peer.say(protocol.ProbeRead(2, peer.incarnation, 1, 65, NAME, probed.handle))
    finished = peer.told(protocol.ProbeFinished)
    assert (finished.probe, finished.error) == (2, "")
    assert finished.tokens_moved > 0


def test_it_prefills_hands_over_and_decodes(peer: Peer) -> None:
    wanted = request("call", prompt_tokens=70, max_tokens=5)
    peer.ask(protocol.Prefill("call", 1, peer.incarnation), wanted)
    done, _ = peer.answer()
    assert isinstance(done, protocol.PrefillDone)
    assert done.prompt_tokens == 70
    peer.ask(protocol.Decode("call", 1, peer.incarnation, done.handle), wanted)
    expected = [token_at(place, 0, VOCABULARY) for place in range(70, 75)]
    assert peer.tokens("call~1") == expected
    # The same handle again: a worker reads one once.
    peer.ask(protocol.Decode("call", 2, peer.incarnation, done.handle), wanted)
    failed, _ = peer.answer()
    assert isinstance(failed, protocol.CallFailed)


def test_a_call_decodes_without_a_handle(peer: Peer) -> None:
    peer.ask(protocol.Decode("local", 1, peer.incarnation), request("local", 10, 3))
    assert peer.tokens("local~1") == [token_at(place, 0, VOCABULARY) for place in range(10, 13)]


def test_a_request_may_ask_for_slower_steps(peer: Peer) -> None:
    slow = request("slow", 10, 5, {"step_s": 0.05})
    began_s = time.monotonic()
    peer.ask(protocol.Decode("slow", 1, peer.incarnation), slow)
    assert len(peer.tokens("slow~1")) == 5
    assert time.monotonic() - began_s > 4 * 0.05


def test_an_aborted_call_is_forgotten(peer: Peer) -> None:
    peer.ask(protocol.Decode("long", 1, peer.incarnation), request("long", 10, 4000))
    peer.answer()
    peer.ask(protocol.Abort([("long", 1)]))
    deadline_s = time.monotonic() + ANSWER_S
    while peer.told(protocol.Beat).load.running:
        assert time.monotonic() < deadline_s
    while peer.data.poll(100):
        peer.data.recv_multipart()


def test_a_handle_can_be_given_back_unread(peer: Peer) -> None:
    wanted = request("unread", prompt_tokens=70)
    peer.ask(protocol.Prefill("unread", 1, peer.incarnation), wanted)
    done, _ = peer.answer()
    assert isinstance(done, protocol.PrefillDone)
    peer.ask(protocol.Discard("unread", 1, peer.incarnation, done.handle))
    peer.ask(protocol.Decode("unread", 2, peer.incarnation, done.handle), wanted)
    failed, _ = peer.answer()
    assert isinstance(failed, protocol.CallFailed)


def test_the_engines_utilities_answer(peer: Peer) -> None:
    peer.ask(protocol.Utility(7, "list_loras"), ())
    reply, frames = peer.answer()
    assert isinstance(reply, protocol.UtilityReply)
    assert (reply.call, reply.error) == (7, "")
    assert MsgpackDecoder().decode(frames) == []
    peer.ask(protocol.Utility(8, "shutdown"), ())
    refused, _ = peer.answer()
    assert isinstance(refused, protocol.UtilityReply)
    assert refused.error


def test_the_command_line_starts_this_python() -> None:
    assert fake_worker.command(Path("c.yaml"), "w")[0] == sys.executable

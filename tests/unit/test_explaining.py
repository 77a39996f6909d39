"""Why calls went where they went: what the core says of them, over HTTP and on the terminal."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
import zmq
from fastapi import FastAPI
from typer.testing import CliRunner

from cluster.cli import app as command_line
from coordinator import protocol
from coordinator.api.explain import router
from coordinator.api.questions import Questions
from coordinator.core import Core
from coordinator.explaining import Explained
from coordinator.limits import Limits, Placement
from coordinator.protocol import (
    CallContext,
    EngineFacts,
    Failed,
    Finished,
    Hello,
    KvChanges,
    Message,
    Plan,
    Prefilled,
    Probe,
    Probed,
    ProbeFinished,
    ProbeRead,
    Ready,
    ShowCall,
    Started,
    Submit,
    WorkflowAnswer,
)
from coordinator.tenant import tenant_of

FACTS = EngineFacts("0.32", "model", "same", 16, 4000, 64_000, 8, 2048, kv_bytes_per_block=1 << 20)
LIMITS = Limits(explained_calls=3)


class Bed:
    """A core with a prefill worker and two decode workers whose links are warm."""

    def __init__(self, placement: Placement | None = None, **facts: int) -> None:
        its_facts = msgspec.structs.replace(FACTS, **facts)
        self.core = Core(LIMITS, placement or Placement(), "core")
        self.now_s = 100.0
        pending = self.core.handle(b"api", Hello("api"), self.now_s)
        for name in ("prefill-0", "decode-0", "decode-1"):
            role: Any = name.partition("-")[0]
            ready = Ready(name, "1", role, f"tcp://{name}", its_facts)
            pending += self.core.handle(name.encode(), ready, self.now_s)
        while pending:
            send = pending.pop(0)
            name, asked = send.peer.decode(), send.message
            answer: Any = None
            if isinstance(asked, Probe):
                answer = Probed(name, "1", asked.probe, b"handle")
            elif isinstance(asked, ProbeRead):
                answer = ProbeFinished(name, "1", asked.probe, 0.01, 16)
            if answer is not None:
                pending += self.core.handle(send.peer, answer, self.now_s)

    def call(self, request: str, tokens: int = 1000, salt: str = "") -> Plan | None:
        context = CallContext(tenant=tenant_of(salt))
        hashes = b"".join(hash(request).to_bytes(8, "little", signed=True) for _ in range(4))
        submit = Submit("api", request, 1, tokens, 100, hashes, context=context)
        return self.planned(submit)

    def planned(self, message: protocol.ToCore) -> Plan | None:
        sends = self.core.handle(b"api", message, self.now_s)
        self.core.check()
        return next((one.message for one in sends if isinstance(one.message, Plan)), None)

    def finish(self, request: str, attempt: int = 1) -> None:
        for message in (
            Prefilled("api", request, attempt),
            Started("api", request, attempt),
            Finished("api", request, attempt, "stop", 40, 0, 16, 0, 0.25, 1.5),
        ):
            self.core.handle(b"api", message, self.now_s)
        self.core.check()

    def ask(self, request: str, salt: str = "") -> WorkflowAnswer:
        (send,) = self.core.handle(b"who", ShowCall(1, request, tenant_of(salt)), self.now_s)
        assert isinstance(send.message, WorkflowAnswer)
        return send.message

    def explained(self, request: str, salt: str = "") -> Explained:
        answer = self.ask(request, salt)
        assert answer.status == 200, answer.problems
        return msgspec.json.decode(answer.body, type=Explained)


def test_the_chosen_way_comes_first_and_every_worker_is_an_alternative() -> None:
    bed = Bed()
    plan = bed.call("chatcmpl-1-abcd", 8000)
    assert plan is not None
    found = bed.explained("chatcmpl-1-abcd")
    (planned,) = found.plans
    assert planned.decode == plan.decode.worker
    chosen, *others = planned.ways
    assert (chosen.decode, chosen.prefill) == (planned.decode, planned.prefill)
    assert {way.decode for way in planned.ways} == {"prefill-0", "decode-0", "decode-1"}
    assert any(way.prefill for way in planned.ways)
    totals = [way.total_s for way in others]
    assert totals == sorted(totals)
    assert chosen.total_s <= totals[0]


def test_parts_add_up_to_what_was_compared() -> None:
    bed = Bed()
    for number in range(2):
        bed.call(f"busy-{number}", 20_000)
    bed.call("r", 8000)
    (planned,) = bed.explained("r").plans
    for way in planned.ways:
        parts = way.first_token_s + way.decode_s + way.others_s + way.later_s + way.forgotten_s
        assert way.total_s == pytest.approx(parts)
        assert way.waiting_s <= way.first_token_s
    # The policy's own sum is in its reason, to the millisecond.
    said_s = float(planned.reason.partition(": ")[2].removesuffix(" s"))
    assert planned.ways[0].total_s == pytest.approx(said_s, abs=0.002)


def test_numbers_stay_as_they_were_when_the_call_was_planned() -> None:
    bed = Bed()
    bed.call("r", 8000)
    before = bed.explained("r").plans[0].ways[0]
    for number in range(2):
        bed.call(f"later-{number}", 20_000)
    assert bed.explained("r").plans[0].ways[0] == before


def test_what_comes_from_the_host_is_told_beside_what_is_cached() -> None:
    bed = Bed(kv_host_blocks=4000)
    known = b"".join(block.to_bytes(8, "little") for block in range(400))
    told = KvChanges("decode-1", "1", 0, [known[: 100 * 8]], reset=True, host_stored=[known])
    bed.core.handle(b"decode-1", told, bed.now_s)
    bed.planned(Submit("api", "r", 1, 8000, 100, known))
    found = bed.explained("r")
    (planned,) = found.plans
    assert (planned.decode, planned.prefill, planned.pull) == ("decode-1", "", "")
    tokens = planned.cached_tokens, planned.loaded_tokens, planned.computed_tokens
    assert tokens == (1600, 4800, 1600)
    chosen, *others = planned.ways
    assert (chosen.cached_tokens, chosen.loaded_tokens) == (1600, 4800)
    assert {way.loaded_tokens for way in others if way.prefill or way.decode != "decode-1"} == {0}
    words = " ".join(found.words)
    assert "decoded on decode-1, 4800 tokens of it loaded from its host, because" in words
    assert "with 1600 tokens cached, 4800 loaded, decoding" in words


def test_what_happened_is_told_next_to_what_was_estimated() -> None:
    bed = Bed()
    bed.call("r")
    assert bed.explained("r").phase == "under way"
    bed.finish("r")
    found = bed.explained("r")
    assert found.phase == "finished"
    assert found.happened is not None
    assert (found.happened.output_tokens, found.happened.ttft_s) == (40, 0.25)
    assert "what happened: first token after 0.250 s (estimated" in found.words[-1]
    assert "because that costs" in found.words[1]


def test_a_replanned_call_has_both_plans() -> None:
    bed = Bed()
    plan = bed.call("r")
    assert plan is not None
    bed.now_s += 1.0
    worker = plan.decode.worker
    assert bed.planned(Failed("api", "r", 1, worker, "broken")) is not None
    first, second = bed.explained("r").plans
    assert (first.attempt, second.attempt) == (1, 2)
    assert second.at_s == 1.0


def test_a_call_that_waited_says_for_what() -> None:
    bed = Bed(Placement(policy="least_kv", disaggregated="never"))
    for number in range(2):
        bed.call(f"filler-{number}", 63_000)
    assert bed.call("r", 63_000) is None
    bed.now_s += 2.0
    bed.finish("filler-0")
    turn = bed.explained("r").plans[0].turn
    assert turn is not None
    assert (turn.waited_for, turn.waited_s) == ("room", 2.0)
    assert "waited 2.000 s for room" in bed.explained("r").words[0]


def test_names_of_responses_are_understood() -> None:
    bed = Bed()
    bed.call("1_chatcmpl-7f-0a1b2c3d")
    for name in ("chatcmpl-7f", "1_chatcmpl-7f-0a1b2c3d", "chatcmpl-7f-0a1b2c3d"):
        assert bed.explained(name).request == "1_chatcmpl-7f-0a1b2c3d"
    for name in ("chatcmpl-7", "chatcmpl", "", "1"):
        assert bed.ask(name).status == 404, name


def test_tenants_see_only_their_own_and_old_calls_are_forgotten() -> None:
    bed = Bed()
    bed.call("secret", salt="a")
    assert bed.ask("secret", "a").status == 200
    assert bed.ask("secret").status == bed.ask("secret", "b").status == 404
    for number in range(3):
        bed.call(f"more-{number}")
    assert bed.ask("secret", "a").status == 404
    assert bed.ask("more-0").status == 200


async def test_over_http_a_call_is_explained_or_404_in_the_usual_shape() -> None:
    bed = Bed()
    bed.call("chatcmpl-1-abcd", salt="s")

    def send(message: Message) -> bool:
        heard = protocol.decode_to_core(memoryview(protocol.encode(message)))
        for one in bed.core.handle(b"api", heard, bed.now_s):
            answer = protocol.decode_core_to_api(memoryview(protocol.encode(one.message)))
            assert isinstance(answer, WorkflowAnswer)
            questions.on_answer(answer)
        return True

    questions = Questions(send)
    app = FastAPI()
    app.include_router(router)
    app.state.engine_client = SimpleNamespace(cluster=SimpleNamespace(questions=questions))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://c") as client:
        path = "/v1/calls/chatcmpl-1/explain"
        found = await client.get(path, headers={"X-Cache-Salt": "s"})
        assert found.status_code == 200
        assert found.json()["request"] == "chatcmpl-1-abcd"
        unknown = await client.get(path)
        assert unknown.status_code == 404
        assert unknown.json()["error"]["code"] == 404
        assert "no call 'chatcmpl-1' is known" in unknown.json()["error"]["message"]


def test_the_command_prints_words_a_table_and_numbers() -> None:
    bed = Bed()
    bed.call("chatcmpl-1-abcd", 8000)
    bed.finish("chatcmpl-1-abcd")
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    address = f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"

    def serve() -> None:
        for _ in range(3):
            peer, frame = socket.recv_multipart()
            for send in bed.core.handle(peer, protocol.decode_to_core(frame), bed.now_s):
                socket.send_multipart([send.peer, protocol.encode(send.message)])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        runner = CliRunner()
        shown = runner.invoke(
            command_line,
            ["explain", "chatcmpl-1", "--coordinator", address],
            env={"COLUMNS": "200"},
        )
        as_json = runner.invoke(
            command_line, ["explain", "chatcmpl-1", "--coordinator", address, "--json"]
        )
        unknown = runner.invoke(command_line, ["explain", "nobody", "--coordinator", address])
    finally:
        thread.join(10.0)
        socket.close(0)
    assert shown.exit_code == 0, shown.output
    assert "because that costs" in shown.output
    assert "what was compared for attempt 1" in shown.output
    assert "loaded tokens" in shown.output
    assert json.loads(as_json.output)["phase"] == "finished"
    assert unknown.exit_code != 0

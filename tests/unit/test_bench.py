"""The benchmarks: that they count what they say and report what was asked for. Not speed."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.bench import api_rate, hop, idle, mechanisms, moves_real, overhead, simulator
from cluster.bench.command import known_options
from cluster.bench.load import Load, LoadError, Outcome, generate
from cluster.bench.sides import command_line, command_of, process_cpu_s
from cluster.config import parse
from cluster.document import dump
from cluster.workload.form import call_count

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PROMPT_TOKENS = 11


def event(payload: object) -> bytes:
    """One event in one chunk."""
    body = b"data: " + json.dumps(payload).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(body), body)


class Server:
    """Answers chats as vLLM's server does, ``step_s`` after one another."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.open = 0
        self.open_most = 0
        self.first_token_s = 0.0
        self.refuse = False
        self.cut_off = False
        self.tokens_less = 0

    async def chat(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        head = await reader.readuntil(b"\r\n\r\n")
        found = re.search(rb"Content-Length: (\d+)", head)
        assert found is not None
        body = json.loads(await reader.readexactly(int(found[1])))
        self.prompts.append(body["messages"][0]["content"])
        self.open += 1
        self.open_most = max(self.open, self.open_most)
        try:
            await self._answer(body, writer)
        finally:
            self.open -= 1
            writer.close()

    async def _answer(self, body: dict[str, int], writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            return
        writer.write(HEAD + event({"delta": {"role": "assistant", "content": ""}}))
        await asyncio.sleep(self.first_token_s)
        tokens = body["max_tokens"] - self.tokens_less
        for number in range(tokens):
            # A text that looks like an event is none.
            packet = event({"delta": {"content": f"{number}\ndata: {{0\r\n\r\n"}})
            # Cut anywhere, as TCP may.
            writer.write(packet[: 9 + number])
            await writer.drain()
            await asyncio.sleep(0.001)
            writer.write(packet[9 + number :])
        if self.cut_off:
            return
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": tokens}
        writer.write(event({"choices": [], "usage": usage}) + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[str]:
    """The server's address."""
    listener = await asyncio.start_server(server.chat, "127.0.0.1", 0)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"


async def ask(server: Server, **changes: int) -> Outcome:
    """A small load on the server."""
    settings: dict[str, Any] = {
        "calls": 6,
        "concurrency": 3,
        "prompt_words": 4,
        "output_tokens": 5,
        "seed": 1,
    }
    async with serving(server) as url:
        return await generate(Load(base_url=url, model="m", **(settings | changes)))


async def test_all_calls_are_made_and_their_tokens_counted() -> None:
    server = Server()
    outcome = await ask(server)
    assert server.open_most == 3
    assert len(set(server.prompts)) == 6
    assert all(len(prompt.split()) == 4 for prompt in server.prompts)
    assert len(outcome.ttft_s) == 6
    assert outcome.output_tokens == outcome.events == 6 * 5
    assert outcome.prompt_tokens == 6 * PROMPT_TOKENS


async def test_the_same_seed_gives_the_same_prompts_and_another_one_others() -> None:
    servers = [Server(), Server(), Server()]
    for server, seed in zip(servers, (1, 1, 2), strict=True):
        await ask(server, concurrency=1, seed=seed)
    assert servers[0].prompts == servers[1].prompts
    assert not set(servers[0].prompts) & set(servers[2].prompts)


async def test_the_first_token_counts_not_the_head_of_the_answer() -> None:
    server = Server()
    server.first_token_s = 0.1
    outcome = await ask(server, calls=1)
    assert outcome.ttft_s[0] >= 0.1
    assert outcome.elapsed_s > outcome.ttft_s[0]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("refuse", True, "refused"), ("cut_off", True, "cut off"), ("tokens_less", 1, "5 tokens")],
)
async def test_a_wrong_answer_is_an_error(field: str, value: int, words: str) -> None:
    server = Server()
    setattr(server, field, value)
    with pytest.raises((LoadError, ExceptionGroup)) as caught:
        await ask(server, calls=1)
    errors = getattr(caught.value, "exceptions", [caught.value])
    assert words in str(errors[0])


def local_row(kind: str, pythia: float) -> dict[str, object]:
    """A row of the local part in which Pythia needs ``pythia`` times what vLLM does."""
    row: dict[str, object] = {"part": "local", "kind": kind, "pair": 1}
    for name in ("ttft_ms", "tokens_per_s", "cpu_s_per_1000"):
        row |= {f"plain_{name}": 2.0, f"pythia_{name}": 2.0 * pythia, f"{name}_ratio": pythia}
    return row


def test_the_local_part_reports_medians_of_pairs() -> None:
    kinds = ("ttft", "c1", "c8", "c32")
    rows = [local_row(kind, ratio) for kind in kinds for ratio in (1.5, 1.0, 1.1)]
    figures = overhead.local_figures(rows)
    for name in ("ttft_ratio_local", "cpu_ratio_per_token"):
        assert figures[name] == 1.1
    for seats in (1, 8, 32):
        assert figures[f"throughput_ratio_c{seats}"] == 1.1
    assert figures["throughput_ratio_c32_q1"] <= 1.1 <= figures["throughput_ratio_c32_q3"]
    assert figures["pairs"] == figures["ttft_pairs"] == 3


def test_the_hop_is_what_neither_prefill_nor_transfer_explains() -> None:
    local = {"local_ttft_ms": 110.0, "local_second_ms": 118.0, "local_prefill_ms": 100.0}
    times = local | {"prefill_ms": 90.0, "transfer_ms": 20.0, "first_step_ms": 5.0}
    remote = (
        {"remote_ttft_ms": ttft_ms, "remote_second_ms": ttft_ms + 36.0}
        for ttft_ms in (101.0, 103.0, 105.0)
    )
    rows = [times | row for row in remote]
    figures = hop.figures([row | hop.rest(row) for row in rows])
    assert figures["hop_overhead_ms_p50"] == 139.0 - 90.0 - 20.0 - (118.0 - 100.0)
    assert figures["hop_first_token_overhead_ms_p50"] == 3.0
    assert figures["hop_ttft_difference_ms_p50"] == -7.0
    assert figures["hop_local_rest_ms_p50"] == 10.0
    assert figures["hop_pairs"] == 3


def test_the_api_part_reports_one_process_and_two() -> None:
    rows = [
        {"api_processes": count, "tokens_per_s": 1000.0 * count, "tokens_per_cpu_s": 2000.0}
        for count in (1, 2)
    ]
    figures = api_rate.figures(rows)
    assert figures["api_tokens_per_s"] == 1000.0
    assert figures["api_tokens_per_s_2"] == 2000.0


def test_an_idle_worker_is_all_of_its_processes_and_the_busiest_counts() -> None:
    rows = [
        {"kind": "worker", "name": "decode-0", "cpu_percent": 1.0},
        {"kind": "worker", "name": "decode-0", "cpu_percent": 2.0},
        {"kind": "worker", "name": "decode-1", "cpu_percent": 2.5},
        {"kind": "core", "name": "coordinator", "cpu_percent": 0.5},
        {"kind": "api", "name": "API process 1", "cpu_percent": 0.75},
    ]
    assert idle.figures(rows) == {
        "idle_cpu_percent_per_worker": 3.0,
        "idle_cpu_percent_core": 0.5,
        "idle_cpu_percent_api": 0.75,
    }


def test_people_see_one_row_per_kind() -> None:
    rows = [local_row("c8", 1.0), local_row("c8", 3.0), local_row("c32", 1.0)]
    table = overhead.summary(rows)
    assert [(row["kind"], row["rounds"]) for row in table] == [("c8", 2), ("c32", 1)]
    assert table[0]["ttft ms ratio"] == 2.0


def test_an_unknown_part_is_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        overhead.run(overhead.Setup(parts="local,nonsense"))


def test_the_command_line_reaches_every_option() -> None:
    assert {"model", "pairs", "parts"} <= known_options(overhead).keys()
    assert {"model", "seconds"} <= known_options(idle).keys()


def test_server_options_become_words() -> None:
    options = {"max_model_len": 4096, "enforce_eager": True, "async_scheduling": False, "x": [1]}
    assert command_line(options) == [
        *("--max-model-len", "4096"),
        "--enforce-eager",
        "--no-async-scheduling",
        *("--x", "[1]"),
    ]


def test_processor_time_is_the_kernels() -> None:
    before_s = process_cpu_s(os.getpid())
    sum(range(3_000_000))
    assert process_cpu_s(os.getpid()) > before_s
    assert "python" in command_of(os.getpid())


def test_the_simulators_workload_has_the_calls_that_were_asked_for() -> None:
    workload = simulator.workload_of(500, 8, seed=1)
    assert call_count(workload) == 500
    assert all(run.calls[0].parents == () for run in workload.runs)
    assert simulator.workload_of(500, 8, seed=1) == workload != simulator.workload_of(500, 8, 2)


def test_a_simulation_is_measured_in_a_process_of_its_own() -> None:
    found = simulator.in_a_process(60, 4, "pythia", seed=0)
    assert (found.calls, found.served, found.workers) == (60, 60, 4)
    assert found.real_s > 0 < found.processor_s
    assert 0.02 < found.peak_rss_gib < 2


def test_the_simulators_figures(tmp_path: Path) -> None:
    rows = [
        {"workers": size, "run": number, "decision_us_p50": 10.0 * number + size}
        for size in (8, 64)
        for number in (1, 2, 3)
    ]
    whole = simulator.Simulated(100_000, 64, 99_000, 900.0, 5.0, 200.0, 190.0, 0.5)
    assert simulator.figures_of(whole, rows) == {
        "calls_per_s": 500.0,
        "seconds_100k_calls_64_workers": 200.0,
        "peak_rss_gib": 0.5,
        "served_share": 0.99,
        "decision_us_at_8_workers": 28.0,
        "decision_us_at_64_workers": 84.0,
    }
    smaller = simulator.Simulated(1000, 64, 1000, 9.0, 1.0, 2.0, 2.0, 0.1)
    assert "seconds_100k_calls_64_workers" not in simulator.figures_of(smaller, rows)
    simulator.draw(tmp_path / "plots" / "decisions.png", rows)
    assert (tmp_path / "plots" / "decisions.png").stat().st_size > 5000


def test_the_gap_of_a_move_is_the_one_that_its_stream_tells_of() -> None:
    stream = moves_real._Stream(source="w-1")
    for token in (1, 2, 3):
        moves_real._heard(stream, f'data: {{"choices": [{{"token_ids": [{token}]}}]}}')
    moves_real._heard(stream, ": pythia continued on w-2 after 4 tokens, sampling restarted")
    moves_real._heard(stream, 'data: {"choices": []}')
    moves_real._heard(stream, "data: [DONE]")
    assert (stream.token_ids, stream.target, stream.after) == ([1, 2, 3], "w-2", 4)
    moved = [
        moves_real.Moved("w-1", "w-2", gap_ms, 4.0, 3.0, same)
        for gap_ms, same in ((30.0, True), (0.0, True), (54.0, False), (40.0, True))
    ]
    assert moves_real.move_figures(moved) == {
        "moves_done": 3.0,
        "move_failed_streams": 1.0,
        "move_gap_ms_p50": 40.0,
        "move_gap_extra_ms_p50": 36.0,
        "move_transfer_ms_p50": 3.0,
    }
    assert moves_real.move_figures(moved[1:2]) == {"moves_done": 0.0, "move_failed_streams": 0.0}


def test_the_bench_of_mechanisms_tells_ratios_with_their_spread() -> None:
    rows = [
        {
            "part": "mechanisms",
            "on_s": 2.0,
            "off_s": 2.0 * ratio,
            "completion_ratio": ratio,
            "computed_ratio": 3.0,
        }
        for ratio in (0.9, 1.1, 1.2, 1.3, 1.4)
    ]
    figures = mechanisms.figures_of(rows)
    assert figures["mechanisms_completion_ratio"] == 1.2
    assert figures["mechanisms_completion_ratio_q1"] < 1.1
    assert figures["mechanisms_completion_ratio_q3"] > 1.3
    assert figures["mechanisms_computed_ratio"] == 3.0
    assert (figures["mechanisms_on_s"], figures["mechanisms_off_s"]) == (2.0, 2.4)
    assert (figures["mechanisms_pairs"], figures["mechanisms_faster"]) == (5, 4)
    assert not any(name.startswith("placement") for name in figures)


def test_the_bench_of_mechanisms_knows_its_parts() -> None:
    with pytest.raises(ValueError, match="no such part: other"):
        mechanisms.run(mechanisms.Setup(parts="placement,other"))
    assert {"pairs", "runs", "model"} <= known_options(mechanisms).keys()


def test_the_bench_of_mechanisms_makes_clusters_that_may_be() -> None:
    for part in mechanisms.PARTS:
        for name, placement in mechanisms.PARTS[part].items():
            config = mechanisms.config_of(name, "tiny-llama", placement)
            assert parse(dump(config), "bench.yaml").placement == placement

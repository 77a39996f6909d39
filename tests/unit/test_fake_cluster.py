"""Several API processes on one port: under load, and when processes around them fail."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.launch import COORDINATOR, LocalCluster
from tests.unit.fake_cluster import (
    API_SERVERS,
    LIMITS,
    MODEL,
    WAIT_S,
    Chat,
    api_processes,
    client_of,
    live_call,
    port_of,
    running,
    served_by,
)

CALLS = 64
CONCURRENCY = 16
START_S = 300.0
"""Of an API process, on a busy machine."""
LONG_TOKENS = 400
"""Of a stream during which something happens: at least eight seconds."""
LONGER_TOKENS = 2 * LONG_TOKENS
SILENCE_S = (LIMITS.beats_missed + 0.5) * LIMITS.beat_s


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """One for all tests here; the last one takes a worker away."""
    with running(tmp_path_factory.mktemp("fake-cluster")) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
async def everybody_serves(cluster: LocalCluster) -> None:
    """A cluster is ready when one API process is; here all have to be."""
    await until(lambda: all_answer(cluster, "/ready", 200), "all processes serve", START_S)


async def until(
    condition: Callable[[], Awaitable[bool]], what: str, limit_s: float = WAIT_S
) -> None:
    deadline_s = time.monotonic() + limit_s
    while not await condition():
        assert time.monotonic() < deadline_s, what
        await asyncio.sleep(0.3)


async def answers(cluster: LocalCluster, path: str) -> tuple[list[httpx.Response], set[int]]:
    """What the API processes answer to requests at the same time, and which of them did."""
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=WAIT_S) as client:
        found = await asyncio.gather(*(client.get(path) for _ in range(8)))
        owners = await asyncio.to_thread(served_by, cluster)
        return found, {owners[port_of(each)] for each in found if port_of(each) in owners}


async def all_answer(cluster: LocalCluster, path: str, status: int) -> bool:
    found, apis = await answers(cluster, path)
    return {each.status_code for each in found} == {status} and len(apis) == API_SERVERS


async def events_of(response: httpx.Response) -> list[Any]:
    """The rest of an event stream."""
    lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def served(page: str) -> float:
    """Calls that ended well, by a page of metrics."""
    return sum(
        float(sample.value)
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "vllm:request_success_total"
    )


async def quiet(cluster: LocalCluster) -> bool:
    """Whether nothing of any call is left in the core and on the workers that live."""
    snapshot = await asyncio.to_thread(cluster.snapshot)
    busy = sum(row.calls + row.kv_blocks_reserved + row.load.running for row in snapshot.workers)
    return (snapshot.active, snapshot.queued, busy) == (0, 0, 0)


async def test_a_workflow_is_known_to_all_processes_and_its_run_can_be_cancelled(
    cluster: LocalCluster,
) -> None:
    edges = [{"kind": "next", "from": "planner", "to": "writer"}]
    graph = {"agents": {"planner": {}, "writer": {}}, "edges": edges}
    who = {"X-Workflow": "team", "X-Workflow-Run": "run-1", "X-Workflow-Agent": "planner"}
    long = {
        "model": MODEL,
        "prompt": "word",
        "max_tokens": LONGER_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    async with client_of(cluster) as client:
        assert (await client.put("/v1/workflows/team", json=graph)).status_code == 201
        found, apis = await answers(cluster, "/v1/workflows/team")
        assert len(apis) == API_SERVERS
        assert [each.json()["declared"]["edges"] for each in found] == [edges] * 8
        path = "/v1/completions"
        async with client.stream("POST", path, json=long, headers=who) as response:
            assert response.status_code == 200, await response.aread()
            cancelled = await client.delete("/v1/workflows/team/runs/run-1")
            assert cancelled.json()["stopped"] == 1, cancelled.text
            events = await events_of(response)
        assert events[-1]["error"]["code"] == 410
        assert events[-1]["error"]["message"] == "the run was cancelled"
        assert len(events) < LONGER_TOKENS
        refused = await client.post(path, json=long, headers=who)
        assert (refused.status_code, refused.json()["error"]["code"]) == (410, 410)
        other = who | {"X-Workflow-Run": "run-2"}
        short = long | {"max_tokens": 3, "stream": False}
        assert (await client.post(path, json=short, headers=other)).status_code == 200
    await until(lambda: quiet(cluster), "nothing of the cancelled call is left")
    snapshot = await asyncio.to_thread(cluster.snapshot)
    assert [run.run for run in snapshot.runs] == ["run-2"]


async def test_every_process_tells_the_forecast_and_the_same_metrics_of_the_core(
    cluster: LocalCluster,
) -> None:
    who = {"X-Workflow": "crew", "X-Workflow-Run": "run-1", "X-Workflow-Agent": "planner"}
    call = {"model": MODEL, "prompt": "word", "max_tokens": 3}
    async with client_of(cluster) as client:
        for _ in range(3):
            assert (await client.post("/v1/completions", json=call, headers=who)).is_success
    found, apis = await answers(cluster, "/v1/forecast")
    assert len(apis) == API_SERVERS
    assert {len(each.json()["forecasts"]) for each in found} == {5}
    pages, apis = await answers(cluster, "/metrics")
    assert len(apis) == API_SERVERS
    for one in pages:
        assert "pythia_core_up 1.0" in one.text
        # The first call had none before it.
        line = 'pythia_workflow_predictions{tenant="",workflow="crew"} '
        assert any(each.startswith(line + "1.99") for each in one.text.splitlines())


async def test_every_process_explains_a_call_by_its_responses_id(cluster: LocalCluster) -> None:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "word"}], "max_tokens": 3}
    text = {"model": MODEL, "prompt": ["word", "other"], "max_tokens": 3, "n": 2}
    async with client_of(cluster) as client:
        for path, call in (("/v1/chat/completions", chat), ("/v1/completions", text)):
            answer = (await client.post(path, json=call)).json()
            found, apis = await answers(cluster, f"/v1/calls/{answer['id']}/explain")
            assert len(apis) == API_SERVERS
            for each in found:
                assert each.status_code == 200, each.text
                explained = each.json()
                assert answer["id"] in explained["request"]
                assert explained["happened"]["output_tokens"] == 3
                assert "because that costs" in "".join(explained["words"])
        other = {"X-Cache-Salt": "somebody else's"}
        hidden = await client.get(f"/v1/calls/{answer['id']}/explain", headers=other)
        assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, 404)


async def test_all_answers_are_right_and_every_process_gives_some(cluster: LocalCluster) -> None:
    (before, *_), _ = await answers(cluster, "/metrics")
    seats = asyncio.Semaphore(CONCURRENCY)
    chats = [Chat(seed, tokens_asked=24) for seed in range(CALLS)]
    apis: set[int] = set()

    async def one(client: httpx.AsyncClient, chat: Chat) -> None:
        async with seats:
            asked = asyncio.create_task(chat.run(client))
            await chat.begun()
            apis.add((await asyncio.to_thread(served_by, cluster)).get(chat.port, 0))
            await asked

    async with client_of(cluster) as client:
        await asyncio.gather(*(one(client, chat) for chat in chats))
    for chat in chats:
        chat.check()
    assert set(api_processes(cluster)) <= apis

    async def summed() -> bool:
        pages, asked = await answers(cluster, "/metrics")
        found = {served(page.text) for page in pages}
        return found == {served(before.text) + CALLS} and len(asked) == API_SERVERS

    await until(summed, "every page of metrics counts the calls of all processes")
    assert (await asyncio.to_thread(cluster.snapshot)).apis == API_SERVERS
    await until(lambda: quiet(cluster), "nothing is left")


async def test_a_core_that_stands_still_is_noticed_and_streams_go_on(
    cluster: LocalCluster,
) -> None:
    chats = [Chat(seed, LONG_TOKENS) for seed in range(4)]
    core = cluster.processes[COORDINATOR]
    async with client_of(cluster) as client, asyncio.TaskGroup() as group:
        asked = [group.create_task(chat.run(client)) for chat in chats]
        await asyncio.gather(*(chat.begun() for chat in chats))
        await until(lambda: all_answer(cluster, "/ready", 200), "ready before")
        os.kill(core, signal.SIGSTOP)
        try:
            stopped_s = time.monotonic()
            await until(lambda: all_answer(cluster, "/ready", 503), "not ready without a core")
            assert time.monotonic() - stopped_s >= SILENCE_S - 2 * LIMITS.beat_s
            assert await all_answer(cluster, "/live", 200)
            assert await all_answer(cluster, "/health", 503)
            await asyncio.gather(*asked)
        finally:
            os.kill(core, signal.SIGCONT)
        await until(lambda: all_answer(cluster, "/ready", 200), "ready again")
    for chat in chats:
        chat.check()
        assert not chat.marks
    await until(lambda: quiet(cluster), "nothing is left")


async def test_an_api_process_that_is_killed_breaks_its_own_streams_alone(
    cluster: LocalCluster,
) -> None:
    chats = [Chat(seed, LONG_TOKENS) for seed in range(12)]
    async with client_of(cluster) as client:
        asked = [asyncio.create_task(chat.run(client)) for chat in chats]
        await asyncio.gather(*(chat.begun() for chat in chats))
        owners = await asyncio.to_thread(served_by, cluster)
        victim, survivor = api_processes(cluster)
        victims = [chat for chat in chats if owners[chat.port] == victim]
        assert 0 < len(victims) < len(chats)
        os.kill(victim, signal.SIGKILL)
        later = Chat(99, tokens_asked=10)
        await asyncio.gather(later.run(client), *asked)
    later.check()
    for chat in chats:
        if chat in victims:
            assert chat.error is not None
        else:
            chat.check()
    await until(lambda: all_answer(cluster, "/ready", 200), "two processes again", START_S)
    assert survivor in api_processes(cluster)
    assert victim not in api_processes(cluster)
    await until(lambda: quiet(cluster), "the lost process's calls are aborted on the workers")


# --- a decode worker is killed: this one is the last -------------------------------------------


class Clients:
    """Everything that a client may be, each with the same question."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        base_url = cluster.base_url
        self.openai = openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
        self.claude = anthropic.AsyncAnthropic(base_url=base_url, api_key="none", max_retries=0)

    async def close(self) -> None:
        await self.openai.close()
        await self.claude.close()

    def question(self, name: str, **extra: Any) -> dict[str, Any]:
        return {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Go on, for long."}],
            "max_tokens": LONGER_TOKENS,
            "extra_headers": {"X-Request-Id": name},
            "extra_body": {"temperature": 0, **extra},
        }

    async def openai_stream(self, name: str) -> str:
        stream = await self.openai.chat.completions.create(
            **self.question(name, ignore_eos=True), stream=True
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    async def anthropic_stream(self, name: str) -> str:
        async with self.claude.messages.stream(**self.question(name)) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            assert (await stream.get_final_message()).stop_reason == "max_tokens"
            return text

    async def whole(self, name: str) -> str:
        raw = await self.openai.chat.completions.with_raw_response.create(
            **self.question(name, ignore_eos=True)
        )
        self.continued = raw.headers.get("X-Pythia-Continued", "")
        return raw.parse().choices[0].message.content or ""

    async def chat_with_penalty(self, name: str) -> str:
        """What counts generated tokens can't go on elsewhere. The error that ends the stream."""
        stream = await self.openai.chat.completions.create(
            **self.question(name, presence_penalty=0.5), stream=True
        )
        with pytest.raises(openai.APIError) as raised:
            [chunk async for chunk in stream]
        assert not isinstance(raised.value, openai.APIConnectionError)
        return str(raised.value)

    async def response_with_penalty(self, name: str) -> str:
        """The same of a stream into which vLLM lets the exception through."""
        stream = await self.openai.responses.create(
            model=MODEL,
            input="Go on, for long.",
            max_output_tokens=LONGER_TOKENS,
            stream=True,
            extra_body={"temperature": 0, "presence_penalty": 0.5, "request_id": name},
        )
        *events, last = [event async for event in stream]
        assert last.type == "error"
        assert last.sequence_number == events[-1].sequence_number + 1
        message: str = last.message
        return message


Ask = Callable[[str], Awaitable[Any]]


async def on_one_worker(
    cluster: LocalCluster, kinds: dict[str, Ask]
) -> tuple[str, list[asyncio.Task[Any]], list[asyncio.Task[Any]]]:
    """Ask each kind until one answer of it comes from the same worker as those of all others.

    Returns that worker, those answers, and the others, which keep the load even meanwhile.
    """
    victim, wanted, others = "", [], []
    for kind, ask in kinds.items():
        for attempt in range(20):
            name = f"{kind}-{attempt}-mark"
            task = asyncio.ensure_future(ask(name))
            worker = (await live_call(cluster, name, task)).decode
            victim = victim or worker
            if worker == victim:
                wanted.append(task)
                break
            others.append(task)
        else:
            raise AssertionError(f"{victim} gets no calls")
    return victim, wanted, others


async def test_what_goes_on_on_another_worker_says_so_and_no_client_minds(
    cluster: LocalCluster,
) -> None:
    """Greedy, seeded, streamed and whole: all lose the worker that they are decoded on. Those that
    can't go on end with an error event."""
    clients = Clients(cluster)
    async with client_of(cluster) as client:

        async def chat(name: str, temperature: float) -> Chat:
            sent = Chat(len(name), LONGER_TOKENS, temperature, name)
            await sent.run(client)
            return sent

        victim, tasks, others = await on_one_worker(
            cluster,
            {
                "greedy": lambda name: chat(name, 0.0),
                "seeded": lambda name: chat(name, 0.8),
                "openai": clients.openai_stream,
                "claude": clients.anthropic_stream,
                "whole": clients.whole,
                "chat": clients.chat_with_penalty,
                "response": clients.response_with_penalty,
            },
        )
        os.kill(cluster.workers[victim], signal.SIGKILL)
        for other in others:
            other.cancel()
        greedy, seeded, *texts, chat_error, response_error = await asyncio.gather(*tasks)
        await asyncio.gather(*others, return_exceptions=True)
    (other_worker,) = cluster.workers.keys() - {victim}
    for sent, restarted in ((greedy, ""), (seeded, ", sampling restarted")):
        sent.check()
        ((tokens, mark),) = sent.marks
        assert 0 < tokens < LONGER_TOKENS
        assert mark == f": pythia continued on {other_worker} after {tokens} tokens{restarted}"
    assert texts == [await clients.openai_stream("again")] * 3, "they have got all of it"
    assert clients.continued.startswith(f"{other_worker} after ")
    assert clients.continued.endswith(" tokens")
    assert "can't be continued" in chat_error
    assert "can't be continued" in response_error
    await clients.close()
    await until(lambda: quiet(cluster), "nothing is left")

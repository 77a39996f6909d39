"""A running call goes on on another engine with its KV, and its client sees nothing but a mark.

A cluster of two decode workers. One stream is moved to and fro while it is said; what comes must be
what a plain engine says, without a gap worth the name. What was moved is proved with vLLM's own
counters.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest

from coordinator import protocol
from coordinator.protocol import MoveCalls, WorkflowAnswer
from tests.e2e.harness import BLOCK_TOKENS, Control, Server, wait_for
from tests.e2e.test_pulls import (
    ask,
    completion,
    config_of,
    external,
    fresh_tokens,
    running,
)

WORKERS = "  - {name: decode-0, role: decode}\n  - {name: decode-1, role: decode}\n"
PROMPT_TOKENS = 20 * BLOCK_TOKENS
ANSWER_TOKENS = 900
MOVES = 7
MOVES_LEAST = 3
BETWEEN_TOKENS = 90
"""Of the answer, between a move and the wish for the next one."""
GAP_MS_MOST = 100.0
"""In the middle of several, beyond the transfer and what other steps take now and then: other
processes share these cores."""
MARK = ": pythia continued on "

OTHER = {"decode-0": "decode-1", "decode-1": "decode-0"}


@pytest.fixture(scope="module", autouse=True)
def quiet_afterwards() -> None:
    """Instead of the shared cluster's: it is not needed here."""


class Piece(NamedTuple):
    """An event of a stream, when it came, and whether the call went on elsewhere before it."""

    at_s: float
    token_ids: list[int]
    mark: str


def pieces(response: httpx.Response) -> Iterator[Piece]:
    mark = ""
    for line in response.iter_lines():
        if line.startswith(MARK):
            mark = line.removeprefix(MARK)
        elif line.startswith("data: {"):
            choices = json.loads(line.removeprefix("data: "))["choices"]
            if choices:
                yield Piece(time.monotonic(), choices[0].get("token_ids") or [], mark)
                mark = ""


def move(control: Control, worker: str, **more: str) -> dict[str, int]:
    """How many calls of a worker are being moved, and how many are not."""
    control.send(protocol.encode(MoveCalls(1, worker, **more)))
    frame = control.receive(5.0)
    assert frame is not None
    answer = protocol.decode_core_to_api(frame)
    assert isinstance(answer, WorkflowAnswer)
    assert answer.status == 200, answer
    found: dict[str, int] = msgspec.json.decode(answer.body)
    return found


class Told(NamedTuple):
    """What the client of one long stream got."""

    token_ids: list[int]
    gaps_ms: list[float]
    """Between the last token of one worker and the first one of the next."""
    usual_ms: float
    slow_ms: float
    """What one in twenty of all other steps takes."""
    workers: list[str]


def listen_while_moving(server: Server, control: Control, body: dict[str, Any]) -> Told:
    token_ids: list[int] = []
    came_s: list[float] = []
    after: list[int] = []
    with (
        server.http() as client,
        client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response,
    ):
        assert response.status_code == 200
        workers = [response.headers["X-Pythia-Decode"]]
        next_at, asked = BETWEEN_TOKENS, False
        for piece in pieces(response):
            if piece.mark:
                worker, tokens = piece.mark.removesuffix(" tokens").split(" after ")
                workers.append(worker)
                after.append(int(tokens))
                next_at, asked = int(tokens) + BETWEEN_TOKENS, False
            token_ids += piece.token_ids
            came_s += [piece.at_s] * len(piece.token_ids)
            if len(token_ids) >= next_at and not asked and len(workers) <= MOVES:
                # Other than at the end, which may be said already and not be here yet.
                asked = move(control, workers[-1]) == {"moving": 1, "staying": 0}
    steps_ms = [1000.0 * (one - other) for other, one in itertools.pairwise(came_s)]
    gaps_ms = [steps_ms[tokens - 1] for tokens in after]
    others_ms = [step for at, step in enumerate(steps_ms, 1) if at not in after]
    slow_ms = statistics.quantiles(others_ms, n=20)[-1]
    return Told(token_ids, gaps_ms, statistics.median(others_ms), slow_ms, workers)


def test_a_stream_goes_on_elsewhere_with_its_kv(
    oracle: Server,
    tmp_path_factory: pytest.TempPathFactory,
    record_property: Any,
) -> None:
    config = config_of(WORKERS, "{}", "{queue_s: 60, move_s: 20}")
    with running(config, tmp_path_factory.mktemp("moves")) as server:
        body = completion(fresh_tokens(PROMPT_TOKENS), ANSWER_TOKENS)
        # An engine compiles something when it is first asked for them, for seconds.
        del body["logprobs"]
        with contextlib.closing(Control(server.control_address)) as control:
            links = {(each.source, each.target): each for each in control.snapshot().links}
            before = {worker: external(config, worker) for worker in OTHER}
            told = listen_while_moving(server, control, body)
            snapshot = control.wait_until_quiet()
        assert len(told.workers) > MOVES_LEAST
        assert all(OTHER[one] == other for one, other in itertools.pairwise(told.workers))
        assert told.token_ids == ask(oracle, body).json()["choices"][0]["token_ids"]
        counters = snapshot.counters
        moves = len(told.gaps_ms)
        assert counters["moves_made"] == moves
        assert counters["replans"] == 0
        # The first one brings the prompt, each of them what was said since the target had it.
        moved = sum(external(config, worker) - before[worker] for worker in OTHER)
        assert moved == counters["move_tokens"]
        assert moved >= PROMPT_TOKENS
        assert moved <= PROMPT_TOKENS + len(told.token_ids)
        transfer_s, transfers = 0.0, 0
        for link in snapshot.links:
            former = links[link.source, link.target]
            transfer_s += link.elapsed_s - former.elapsed_s
            transfers += link.transfers - former.transfers
        gap_ms = statistics.median(told.gaps_ms)
        transfer_ms = 1000.0 * transfer_s / transfers
        record_property("gap_ms_p50", gap_ms)
        gaps = ", ".join(f"{gap:.0f}" for gap in told.gaps_ms)
        print(
            f"\n{moves} moves, gaps of {gaps} ms; other steps {told.usual_ms:.1f} ms, one in "
            f"twenty {told.slow_ms:.0f} ms; a transfer {transfer_ms:.1f} ms; {moved} tokens moved, "
            f"{counters['moves_undone']} moves undone"
        )
        assert gap_ms <= transfer_ms + told.slow_ms + GAP_MS_MOST


def test_what_can_not_go_on_elsewhere_stays(tmp_path_factory: pytest.TempPathFactory) -> None:
    config = config_of(WORKERS, "{}", "{queue_s: 60}")
    with running(config, tmp_path_factory.mktemp("moves")) as server:
        body = completion(fresh_tokens(PROMPT_TOKENS), 200) | {"presence_penalty": 0.5}
        with contextlib.closing(Control(server.control_address)) as control:
            with (
                server.http() as client,
                client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response,
            ):
                worker = response.headers["X-Pythia-Decode"]
                found = pieces(response)
                next(found)
                # Until the core has heard that it has begun.
                wait_for(lambda: move(control, worker)["moving"], 10.0, "a running call")
                rest = [piece for piece in found]
            assert not any(piece.mark for piece in rest)
            assert sum(len(piece.token_ids) for piece in rest) >= 190
            counters = control.wait_until_quiet().counters
        assert (counters["moves_made"], counters["moves_undone"]) == (0, 1)

"""``pythia bench rebalance --real``: workers of a live cluster on this machine turn under load.

One prefill worker and three decode workers with small models; clients call all the time, greedily,
with texts whose answers are known from before. Meanwhile workers turn, back and forth, one after
the other: each time an idle one is wanted the load pauses until it has nothing to do.

* ``flip_idle_ms_p50``, ``flip_idle_ms_max``: from the request for a turn of an idle worker until
  its canary is back;
* ``flip_busy_extra_ms_max``, ``_p50``: of a busy one, beyond the end of what it had begun;
* ``flips_done``, and ``flips_undone``, which are none where engines answer within seconds;
  ``flip_failed_requests``: calls that failed, stalled (no token for ``STALL_S``)
  or were answered otherwise than before, and of how many (``requests``);
* those of ``moves_real``, which come first.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from statistics import median

import httpx
import msgspec
from rich.console import Console

from cluster.bench.moves_real import measure_moves, move_figures
from cluster.bench.report import table, write
from cluster.config import parse
from cluster.failure import CommandFailure
from cluster.launch import LocalCluster
from coordinator.rebalancer import Shown

MODEL = "tiny-llama"
CLUSTER = """\
model: {model}
name: bench-rebalance
engine:
  dtype: float32
  enforce_eager: true
  max_model_len: 2048
  max_num_seqs: 16
  kv_cache_memory_bytes: 134217728
workers:
  - {{name: w-0, role: prefill}}
  - {{name: w-1, role: decode}}
  - {{name: w-2, role: decode}}
api: {{port: 0}}
coordinator: {{port: 0}}
placement: {{prefill_workers_decode: false, policy: least_kv, remote_prefill_min_tokens: 32}}
"""
CLIENTS = 4
PROMPT_WORDS = (8, 60, 160)
ANSWER_TOKENS = (4, 24, 64)
STALL_S = 30.0
LOOK_S = 0.01
TURN_S = 60.0
WARM_S = 60.0
MOVES = 12


class Text(msgspec.Struct, frozen=True):
    """A call, by number."""

    prompt: str
    tokens: int


class Load:
    """Clients that call all the time, and what came of it."""

    def __init__(self, http: httpx.AsyncClient, model: str) -> None:
        self._http = http
        self._model = model
        self._known: dict[Text, str] = {}
        self.texts = [
            Text(" ".join(f"word{seed * 7 + at * seed}" for at in range(words)), tokens)
            for seed, (words, tokens) in enumerate(
                ((words, tokens) for words in PROMPT_WORDS for tokens in ANSWER_TOKENS), start=1
            )
        ]
        self.calls = 0
        self.failed: list[str] = []
        self._go, self._idle = asyncio.Event(), asyncio.Event()
        self._go.set()
        self._idle.set()
        self._open = 0

    async def learn(self) -> None:
        """What is answered while nothing turns."""
        for text in self.texts:
            self._known[text] = await self._answer(text)

    async def call(self, number: int) -> None:
        """One client, for ever."""
        while True:
            await self._go.wait()
            text = self.texts[number % len(self.texts)]
            number += 1
            self._open += 1
            self._idle.clear()
            try:
                async with asyncio.timeout(STALL_S):
                    answer = await self._answer(text)
                if answer != self._known[text]:
                    self.failed.append(f"another answer: {answer[:60]!r}")
            except (httpx.HTTPError, TimeoutError) as error:
                self.failed.append(f"{type(error).__name__}: {error}")
            finally:
                self._open -= 1
                self.calls += 1
                if not self._open:
                    self._idle.set()

    async def _answer(self, text: Text) -> str:
        response = await self._http.post(
            "/v1/completions",
            json={
                "model": self._model,
                "prompt": text.prompt,
                "max_tokens": text.tokens,
                "temperature": 0.0,
                "ignore_eos": True,
            },
        )
        response.raise_for_status()
        answer: str = response.json()["choices"][0]["text"]
        return answer

    @contextlib.asynccontextmanager
    async def pause(self) -> AsyncIterator[None]:
        """Nothing is called."""
        self._go.clear()
        try:
            async with asyncio.timeout(STALL_S):
                await self._idle.wait()
            yield
        finally:
            self._go.set()


class Turned(msgspec.Struct, frozen=True):
    """One turn. ``total_s``: until it has its role; ``drain_s``: until it had ended its work;
    ``problem``: why it has not, empty if it has."""

    worker: str
    role: str
    busy: bool
    total_s: float
    drain_s: float
    problem: str = ""


async def turn(http: httpx.AsyncClient, worker: str, role: str) -> Turned:
    """Turn a worker and wait for it. CommandFailure if that does not come to an end."""
    began_s = drained_s = time.monotonic()
    response = await http.post(f"/v1/workers/{worker}/role", json={"role": role})
    response.raise_for_status()
    busy = response.json()["turning"] == "draining"
    while True:
        now_s = time.monotonic()
        now = await shown(http)
        one = next((one for one in now.workers if one.worker == worker), None)
        if one is None:
            raise CommandFailure(f"{worker} is gone")
        if one.turning == "draining":
            drained_s = now_s
        if not one.turning:
            problem = "" if one.role == role else now.decisions[-1].reason
            return Turned(worker, role, busy, now_s - began_s, drained_s - began_s, problem)
        if now_s - began_s > TURN_S:
            raise CommandFailure(f"{worker} is still {one.turning} after {TURN_S:.0f} s")
        await asyncio.sleep(LOOK_S)


async def shown(http: httpx.AsyncClient) -> Shown:
    """What the cluster says of roles."""
    response = await http.get("/v1/cluster/rebalance")
    response.raise_for_status()
    return msgspec.json.decode(response.content, type=Shown)


async def measure(
    base_url: str, model: str, flips: int, tell: Callable[[str], None]
) -> tuple[list[Turned], Load]:
    """``flips`` turns, every second one of an idle worker."""
    async with httpx.AsyncClient(base_url=base_url, timeout=STALL_S) as http:
        load = Load(http, model)
        await load.learn()
        clients = [asyncio.create_task(load.call(number)) for number in range(CLIENTS)]
        done: list[Turned] = []
        try:
            for number in range(flips):
                worker, role = _next((await shown(http)), number)
                if number % 2:
                    async with load.pause():
                        done.append(await turn(http, worker, role))
                else:
                    done.append(await turn(http, worker, role))
                tell(f"{number + 1} of {flips} turns, {load.calls} calls")
                await asyncio.sleep(0.2)
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
        return done, load


def _next(now: Shown, number: int) -> tuple[str, str]:
    """Whose turn it is: of the role that has two workers, one after the other."""
    roles = [one.role for one in now.workers]
    giving = max(("prefill", "decode"), key=roles.count)
    givers = sorted(one.worker for one in now.workers if one.role == giving)
    return givers[number // 2 % len(givers)], "decode" if giving == "prefill" else "prefill"


def figures_of(done: list[Turned], load: Load) -> dict[str, float]:
    """The figures that the module names."""
    turned = [one for one in done if not one.problem]
    idle = [1e3 * one.total_s for one in turned if not one.busy]
    extra = [1e3 * (one.total_s - one.drain_s) for one in turned if one.busy]
    found = {
        "flips_done": float(len(turned)),
        "flips_undone": float(len(done) - len(turned)),
        "flips_busy": float(len(extra)),
        "flip_failed_requests": float(len(load.failed)),
        "requests": float(load.calls),
    }
    if idle:
        found |= {"flip_idle_ms_p50": median(idle), "flip_idle_ms_max": max(idle)}
    if extra:
        found |= {"flip_busy_extra_ms_p50": median(extra), "flip_busy_extra_ms_max": max(extra)}
    return found


def main(json_path: Path | None, model: str | None, flips: int, console: Console) -> int:
    """The command; 1 if a request failed."""
    config = parse(CLUSTER.format(model=model or MODEL), "bench-rebalance")
    with (
        console.status("starting engines") as status,
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(config, log_dir=Path(folder)) as running,
    ):
        _wait_warm(running)
        status.update("moves of running decodes")
        moving = measure_moves(
            running.base_url, config.served_name, MOVES, lambda: running.snapshot().links
        )
        moved = asyncio.run(moving)
        measured = measure(running.base_url, config.served_name, flips, status.update)
        done, load = asyncio.run(measured)
    found = figures_of(done, load) | move_figures(moved)
    rows = [msgspec.structs.asdict(one) for one in done]
    rows_moved = [msgspec.structs.asdict(one) for one in moved]
    write(json_path, "pythia bench rebalance --real", found, rows + rows_moved)
    table(console, "moves of running decodes", rows_moved)
    table(console, "turns of live workers", rows)
    table(console, "figures", [{"figure": key, "value": value} for key, value in found.items()])
    for reason in load.failed[:10]:
        console.print(f"failed: {reason}", style="red")
    return 1 if load.failed or found["move_failed_streams"] else 0


def _wait_warm(running: LocalCluster) -> None:
    """All pairs are tried before anything turns. CommandFailure if that takes too long."""
    until_s = time.monotonic() + WARM_S
    while time.monotonic() < until_s:
        workers = running.snapshot().workers
        if workers and all(worker.warm_peers == worker.peers for worker in workers):
            return
        time.sleep(0.1)
    raise CommandFailure(f"not all pairs of workers are warm after {WARM_S:.0f} s")

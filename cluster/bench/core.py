"""How long a decision of the core takes, in a cluster that is half busy.

Calls with shared prefixes are submitted, prefilled, started and finished in virtual time;
only the core runs, in this process. A decision is one ``handle(Submit)``: admission,
prefix lookup, placement, reservation and the plan. What is learned from the call comes behind
its answer, as in the server, and counts for ``events_per_s``. Refuses to measure anything else:
no sockets, no serialisation.
"""

from __future__ import annotations

import random
import time
from collections import deque
from pathlib import Path
from statistics import median

from rich.console import Console

from cluster.bench.report import table, write
from coordinator.collecting import rare_collections
from coordinator.core import Core, Send
from coordinator.limits import Limits, Placement
from coordinator.protocol import (
    EngineFacts,
    Finished,
    Hello,
    Plan,
    Prefilled,
    Probe,
    Probed,
    ProbeFinished,
    ProbeRead,
    Pulled,
    Ready,
    Started,
    Submit,
    ToCore,
)

BLOCK_TOKENS = 16
OUTPUT_TOKENS = 256
AGENTS = 32
API = b"api"
EVENT_GAP_S = 1e-4


class _Bench:
    """A core, its virtual clock and how long each of its events took."""

    def __init__(self, seed: int) -> None:
        self.core = Core(Limits(), Placement(), "bench")
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.events = 0
        self.busy_s = 0.0

    def handle(self, peer: bytes, message: ToCore) -> tuple[list[Send], float]:
        """Let the core handle one event; the answer and the seconds that it took."""
        self.now_s += EVENT_GAP_S
        began_s = time.perf_counter()
        sent = self.core.handle(peer, message, self.now_s)
        took_s = time.perf_counter() - began_s
        self.core.learn()
        self.events += 1
        self.busy_s += time.perf_counter() - began_s
        return sent, took_s

    def register(self, workers: int, kv_blocks: int) -> None:
        """Bring up one prefill worker for every three decode workers, and warm all pairs: any
        worker may read what any other has cached."""
        facts = EngineFacts("0", "model", "same", BLOCK_TOKENS, kv_blocks, 1 << 20, 256, 8192)
        self.handle(API, Hello("api"))
        pending: deque[Send] = deque()
        for number in range(workers):
            role = "prefill" if number % 4 == 0 else "decode"
            name = f"worker-{number:03}"
            ready = Ready(name, f"{name}-1", role, f"tcp://{name}", facts)  # type: ignore[arg-type]
            pending.extend(self.handle(name.encode(), ready)[0])
        while self.core.counters["pairs_warmed"] < workers * (workers - 1):
            sent = pending.popleft()
            name, probe = sent.peer.decode(), sent.message
            if isinstance(probe, Probe):
                answer = Probed(name, f"{name}-1", probe.probe, b"handle")
                pending.extend(self.handle(sent.peer, answer)[0])
            elif isinstance(probe, ProbeRead):
                done = ProbeFinished(name, f"{name}-1", probe.probe, 0.01, BLOCK_TOKENS)
                pending.extend(self.handle(sent.peer, done)[0])

    def submit(self, number: int, prefixes: list[bytes], prompt_blocks: int) -> Submit:
        """A call of one of some agents: a shared prefix, then blocks of its own."""
        shared = self.rng.choice(prefixes)
        own = self.rng.randbytes(8 * prompt_blocks - len(shared))
        tokens = prompt_blocks * BLOCK_TOKENS + self.rng.randrange(BLOCK_TOKENS)
        return Submit("api", f"call-{number}", 1, tokens, OUTPUT_TOKENS, shared + own)


def run(
    workers: int = 64, calls: int = 20000, prompt_blocks: int = 128, seed: int = 0
) -> dict[str, float]:
    """Measure decisions; times in microseconds, rates per second.

    ``decision_us_p50`` and ``decision_us_p99`` over ``handle(Submit)``,
    ``decisions_per_s`` their number by their time, ``events_per_s`` the same for all
    events of the calls, with what is learned from them.
    """
    bench = _Bench(seed)
    call_blocks = prompt_blocks + OUTPUT_TOKENS // BLOCK_TOKENS + 1
    in_flight_per_worker = 16
    bench.register(workers, kv_blocks=2 * in_flight_per_worker * call_blocks)
    decode_workers = workers - (workers + 3) // 4
    in_flight = max(1, decode_workers) * in_flight_per_worker
    prefixes = [bench.rng.randbytes(8 * (prompt_blocks * 3 // 4)) for _ in range(AGENTS)]
    bench.events, bench.busy_s = 0, 0.0
    decisions_s: list[float] = []
    running: deque[str] = deque()
    for number in range(in_flight + calls):
        sent, took_s = bench.handle(API, bench.submit(number, prefixes, prompt_blocks))
        if number >= in_flight:
            decisions_s.append(took_s)
        plan = sent[0].message
        assert isinstance(plan, Plan), "half the cluster is free: every call has a plan at once"
        if plan.pull_worker is not None:
            bench.handle(API, Pulled("api", plan.request, 1, plan.pull_tokens))
        if plan.prefill is not None:
            bench.handle(API, Prefilled("api", plan.request, 1))
        bench.handle(API, Started("api", plan.request, 1))
        running.append(plan.request)
        if len(running) > in_flight:
            at = bench.rng.randrange(len(running))
            running[0], running[at] = running[at], running[0]
            cached_tokens = prompt_blocks * BLOCK_TOKENS
            ended = Finished("api", running.popleft(), 1, "stop", OUTPUT_TOKENS, 0, cached_tokens)
            bench.handle(API, ended)
    bench.core.check()
    decisions_s.sort()
    return {
        "decision_us_p50": 1e6 * decisions_s[len(decisions_s) // 2],
        "decision_us_p99": 1e6 * decisions_s[len(decisions_s) * 99 // 100],
        "decisions_per_s": len(decisions_s) / sum(decisions_s),
        "events_per_s": bench.events / bench.busy_s,
    }


def main(
    json_path: Path | None = None,
    workers: int = 64,
    calls: int = 20000,
    prompt_blocks: int = 128,
    seed: int = 0,
    repeats: int = 5,
) -> int:
    """The command: ``repeats`` runs, the median of each figure, and every run as a row."""
    console = Console()
    rows: list[dict[str, float]] = []
    with console.status("deciding") as status:
        for number in range(1, repeats + 1):
            status.update(f"run {number} of {repeats}: {calls} calls over {workers} workers")
            # As the core's own process has it.
            with rare_collections():
                rows.append({"run": number, **run(workers, calls, prompt_blocks, seed)})
    figures = {name: median(row[name] for row in rows) for name in rows[0] if name != "run"}
    write(json_path, "pythia bench core", figures, rows)
    table(console, f"decisions of the core with {workers} workers", rows)
    table(console, "median", [{"figure": name, "value": value} for name, value in figures.items()])
    return 0

"""Results of replays that never happened: what the report and the plots are tried with."""

from __future__ import annotations

import random

from cluster.simulator.records import CallRecord, Gaps, Result, RunRecord, Sample, Totals

WORKERS = 8


def made_result(
    configuration: str = "pythia",
    seed: int = 0,
    slower: float = 1.0,
    runs: int = 40,
    workload: str = "sessions",
) -> Result:
    """Chains of calls whose times are ``slower`` times those of the same seed at 1."""
    rng = random.Random(seed)
    calls: list[CallRecord] = []
    records: list[RunRecord] = []
    for run in range(runs):
        made = _run(rng, run, slower)
        calls += made
        records.append(
            RunRecord(
                run=run,
                id=f"run-{run}",
                workflow="made",
                arrival_s=made[0].due_s,
                ended_s=made[-1].ended_s,
                calls=len(made),
                think_s=2.0 * (len(made) - 1),
                finished=True,
            )
        )
    end_s = max(call.ended_s for call in calls)
    totals = Totals(
        duration_s=end_s,
        gpus=WORKERS,
        preemptions=rng.randrange(20),
        recomputed_tokens=rng.randrange(100_000),
        moved_bytes={"nvlink": 10**11, "rdma": 3 * 10**10},
        core_s=1e-4 * len(calls),
        core_messages=len(calls),
    )
    samples = [
        sample for at_s in range(0, int(end_s), 2) for sample in _samples(rng, float(at_s), end_s)
    ]
    gaps = Gaps({})
    for _ in range(500):
        gaps.add(slower * rng.lognormvariate(-4.4, 0.5), 20)
    return Result(configuration, workload, seed, "simulator", calls, records, samples, gaps, totals)


def _run(rng: random.Random, run: int, slower: float) -> list[CallRecord]:
    now_s = run * 5.0 + rng.random()
    made: list[CallRecord] = []
    prompt_tokens = rng.randrange(2000, 20000)
    for number in range(rng.randrange(3, 30)):
        remote = rng.random() < 0.6
        planned_s = now_s + rng.expovariate(4.0) * slower
        first_s = planned_s + rng.uniform(0.1, 1.5) * slower
        tokens = rng.randrange(20, 400)
        ended_s = first_s + tokens * 0.012 * slower
        made.append(
            CallRecord(
                run=run,
                call=number,
                due_s=now_s,
                agent=rng.choice(["planner", "explorer", "engineer", "reviewer"]),
                planned_s=planned_s,
                first_token_s=first_s,
                ended_s=ended_s,
                prompt_tokens=prompt_tokens,
                output_tokens=tokens,
                prefill="worker-0" if remote else "",
                decode="worker-3",
                prefill_cached_tokens=int(0.8 * prompt_tokens),
                local_cached_tokens=int(0.7 * prompt_tokens),
                moved_tokens=1000 if remote else 0,
                computed_tokens=int(0.2 * prompt_tokens),
                outcome="stop",
                loaded_s=first_s + 0.08 * slower if remote else 0.0,
            )
        )
        prompt_tokens += tokens + rng.randrange(200)
        now_s = ended_s + 2.0 + (rng.expovariate(0.02) if rng.random() < 0.15 else 0.0)
    return made


def _samples(rng: random.Random, at_s: float, end_s: float) -> list[Sample]:
    prefill = 2 if at_s < end_s / 2 else 3
    return [
        Sample(
            at_s=at_s,
            worker=f"worker-{number}",
            role="prefill" if number < prefill else "decode",
            running=rng.randrange(3) if number < prefill else rng.randrange(10, 30),
            waiting=rng.randrange(4),
            kv_used=rng.random() * (0.3 if number < prefill else 0.9),
            prefill_tokens=rng.randrange(20000),
        )
        for number in range(WORKERS)
    ]

"""What moving a running decode costs its stream, on the live cluster of ``rebalance_real``.

A stream is said greedily, once undisturbed; then again and again, and each time the worker that
decodes it is drained meanwhile, so that it goes on elsewhere with its KV:

* ``move_gap_ms_p50``: from the last token of the one worker to the first of the other, as the
  client gets them; ``move_transfer_ms_p50``: what a read took meanwhile, on average;
* ``move_gap_extra_ms_p50``: the gap beyond a usual step; nothing is taken off for the transfer, as
  tokens come meanwhile;
* ``moves_done``; ``move_failed_streams``: those that were answered otherwise than undisturbed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from statistics import median

import httpx
import msgspec

from coordinator.protocol import LinkStatus

MARK = ": pythia continued on "
ANSWER_TOKENS = 400
DRAINED_AFTER = 80
PROMPT_WORDS = 300
STREAM_S = 60.0


class Moved(msgspec.Struct, frozen=True):
    """One stream. ``gap_ms`` 0: it was not moved. ``step_ms``: from token to token, as a rule."""

    source: str
    target: str
    gap_ms: float
    step_ms: float
    transfer_ms: float
    same: bool


class _Stream(msgspec.Struct):
    token_ids: list[int] = []
    came_s: list[float] = []
    source: str = ""
    target: str = ""
    after: int = 0


async def measure_moves(
    base_url: str, model: str, moves: int, links: Callable[[], Iterable[LinkStatus]]
) -> list[Moved]:
    """``moves`` streams, each drained away from where it is. ``links``: as they are now."""
    async with httpx.AsyncClient(base_url=base_url, timeout=STREAM_S) as http:
        known = await _listen(http, model, drained=False)
        found = []
        for _ in range(moves):
            before_s, reads = _totals(links())
            stream = await _listen(http, model, drained=True)
            now_s, reads_now = _totals(links())
            transfer_s = (now_s - before_s) / max(1, reads_now - reads)
            steps_ms = [1e3 * (later - one) for one, later in itertools.pairwise(stream.came_s)]
            found.append(
                Moved(
                    stream.source,
                    stream.target,
                    steps_ms[stream.after - 1] if stream.after else 0.0,
                    median(steps_ms),
                    1e3 * transfer_s,
                    stream.token_ids == known.token_ids,
                )
            )
        return found


async def _listen(http: httpx.AsyncClient, model: str, drained: bool) -> _Stream:
    """One stream to its end; with ``drained`` its worker is drained on the way."""
    body = {
        "model": model,
        "prompt": " ".join(f"word{at}" for at in range(PROMPT_WORDS)),
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }
    stream, wanted = _Stream(), drained
    async with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        stream.source = response.headers["X-Pythia-Decode"]
        drain = f"/v1/workers/{stream.source}/drain"
        async for line in response.aiter_lines():
            _heard(stream, line)
            if wanted and len(stream.token_ids) >= DRAINED_AFTER:
                wanted = False
                (await http.post(drain)).raise_for_status()
    if drained:
        (await http.delete(drain)).raise_for_status()
    return stream


def _heard(stream: _Stream, line: str) -> None:
    if line.startswith(MARK):
        stream.target, _, rest = line.removeprefix(MARK).partition(" after ")
        stream.after = int(rest.split()[0])
    elif line.startswith("data: {"):
        choices = msgspec.json.decode(line.removeprefix("data: "))["choices"]
        token_ids = choices[0].get("token_ids") or [] if choices else []
        stream.token_ids += token_ids
        stream.came_s += [time.monotonic()] * len(token_ids)


def _totals(links: Iterable[LinkStatus]) -> tuple[float, int]:
    found = list(links)
    return sum(link.elapsed_s for link in found), sum(link.transfers for link in found)


def move_figures(found: list[Moved]) -> dict[str, float]:
    """The figures that the module names."""
    moved = [one for one in found if one.gap_ms]
    figures = {
        "moves_done": float(len(moved)),
        "move_failed_streams": float(sum(not one.same for one in found)),
    }
    if moved:
        figures |= {
            "move_gap_ms_p50": median(one.gap_ms for one in moved),
            "move_gap_extra_ms_p50": median(one.gap_ms - one.step_ms for one in moved),
            "move_transfer_ms_p50": median(one.transfer_ms for one in moved),
        }
    return figures

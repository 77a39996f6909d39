"""Mooncake's trace format: independent requests with the hash ids of 512-token blocks.

``{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [...]}``, as
in kvcache-ai/Mooncake, ``FAST25-release/traces``. An id also stands for the partial last
block there; that one does not count here. Every request is a run of its own; ids are
comparable over the whole file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from cluster.workload.common import BlockId, Count
from cluster.workload.form import Call, Run, Workload
from cluster.workload.lineage import linked
from cluster.workload.lines import Line, lines, workload_name
from cluster.workload.spans import cut, merged, total

MOONCAKE_BLOCK_TOKENS = 512


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line."""

    timestamp: Annotated[float, msgspec.Meta(ge=0, le=1e13)]
    input_length: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    output_length: Count
    hash_ids: list[BlockId]


_decoder = msgspec.json.Decoder(Request)


def read_mooncake(path: Path) -> Workload:
    """The workload of a file in Mooncake's format; WorkloadError if it is not one."""
    name = workload_name(path)
    runs = [_run(line, position, name) for position, line in enumerate(lines(path))]
    runs.sort(key=lambda run: run.arrival_s)
    return Workload(
        name=name,
        source=str(path),
        licence="",
        block_tokens=MOONCAKE_BLOCK_TOKENS,
        runs=linked(runs, MOONCAKE_BLOCK_TOKENS),
        arrivals_known=True,
    )


def _run(line: Line, position: int, name: str) -> Run:
    request = line.read(_decoder)
    full_blocks = request.input_length // MOONCAKE_BLOCK_TOKENS
    blocks = merged((block, 1) for block in request.hash_ids)
    if total(blocks) < full_blocks:
        raise line.wrong(f"{total(blocks)} ids for {full_blocks} full blocks", "hash_ids")
    call = Call(
        index=0,
        parents=(),
        think_s=0.0,
        prompt_tokens=request.input_length,
        output_tokens=max(1, request.output_length),
        blocks=cut(blocks, full_blocks),
    )
    return Run(str(position), name, request.timestamp / 1000, name, (call,))

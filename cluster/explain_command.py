"""``pythia explain``: why a call went where it went, from the coordinator's last decisions.

Asks over the control socket, as ``pythia status`` does, and never imports vLLM.
"""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.table import Table

from cluster.workflow_command import ask
from coordinator.explaining import Explained, Planned
from coordinator.protocol import ShowCall


def explain(address: str, request: str, tenant: str, as_json: bool, console: Console) -> int:
    """Prints what is known of a call in words and a table of what was compared; or as JSON.

    ``WorkflowRefused`` if the call is not known, or another tenant's.
    """
    body = ask(address, lambda token: ShowCall(token, request, tenant))
    if as_json:
        console.print_json(body.decode())
        return 0
    found = msgspec.json.decode(body, type=Explained)
    console.print(f"call {found.request}: {found.phase}, {found.prompt_tokens} prompt tokens")
    for line in found.words:
        if not line.startswith(" "):
            console.print(line, soft_wrap=True, highlight=False)
    for plan in found.plans:
        if plan.ways:
            console.print(_table(plan))
    return 0


def _table(plan: Planned) -> Table:
    table = Table(title=f"what was compared for attempt {plan.attempt}, in seconds")
    table.add_column("decode")
    table.add_column("prompt on")
    for name in ("total", "first token", "waiting", "moving", "decoding", "others", "later"):
        table.add_column(name, justify="right")
    table.add_column("forgotten", justify="right")
    table.add_column("cached tokens", justify="right")
    table.add_column("loaded tokens", justify="right")
    for number, way in enumerate(plan.ways):
        seconds = (
            way.total_s,
            way.first_token_s,
            way.waiting_s,
            way.moving_s,
            way.decode_s,
            way.others_s,
            way.later_s,
            way.forgotten_s,
        )
        table.add_row(
            way.decode,
            (way.prefill or way.decode) + (f", from {way.pull}" if way.pull else ""),
            *(f"{each:.3f}" for each in seconds),
            f"{way.cached_tokens:,}",
            f"{way.loaded_tokens:,}",
            style="bold" if number == 0 else None,
        )
    return table

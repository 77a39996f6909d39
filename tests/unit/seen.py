"""Workers as policies see them, with nothing behind them."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.gauge import Gauge
from coordinator.protocol import LinkLoad, Load, Role


@dataclass
class Seen:
    """A worker as placement sees it."""

    name: str
    role: Role = "decode"
    started_role: Role = ""  # type: ignore[assignment]
    incarnation: str = "1"
    up: bool = True
    ending: bool = False
    turned_s: float = float("-inf")
    tokens_max: int = 1600
    batch_slots: int = 8
    usable_blocks: int = 100
    kv_blocks_reserved: int = 0
    kv_blocks_shared: int = 0
    kv_blocks_used: int = 0
    load: Load = field(default_factory=Load)
    waiting: int = 0
    decodes: list[str] = field(default_factory=list)
    prefilling: int = 0
    prefill_tokens: int = 0
    warm_sources: set[str] = field(default_factory=set)
    gauge: Gauge = field(default_factory=Gauge)
    kv_bytes_per_block: int = 1 << 20
    partial_reads: bool = True
    readable_from_s: float = float("-inf")
    links: dict[str, LinkLoad] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started_role = self.started_role or self.role

    def link(self, source: str) -> LinkLoad | None:
        """What it said of reading from ``source``."""
        return self.links.get(source)

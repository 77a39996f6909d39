"""How often NIXL's progress thread looks for progress.

NIXL's Python wrapper leaves no choice: it sets no pause at all, so that every agent keeps
one core busy for as long as it lives, at rest or not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from nixl import _api as nixl_api


@contextlib.contextmanager
def progress_pause(pause_us: int) -> Iterator[None]:
    """NIXL agents made inside sleep ``pause_us`` between two looks; 0 is busy polling.

    Replaces the wrapper's configuration class for that time: not for several threads at once.
    """
    config = nixl_api.nixlBind.nixlAgentConfig

    def set_field(self: Any, name: str, value: object) -> None:
        config.__setattr__(self, name, pause_us if name == "pthrDelay" else value)

    nixl_api.nixlBind.nixlAgentConfig = type("Config", (config,), {"__setattr__": set_field})
    try:
        yield
    finally:
        nixl_api.nixlBind.nixlAgentConfig = config

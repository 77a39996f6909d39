"""How often a process that holds the core looks for cyclic garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

COLLECT_OBJECTS = 20_000
"""Many small objects come and go in a core, hardly any of them in cycles: at Python's threshold of
some hundreds one decision in a hundred waits for a collection for longer than it takes itself."""


@contextmanager
def rare_collections(objects: int = COLLECT_OBJECTS) -> Iterator[None]:
    """Look at new objects when there are so many more, while its block runs."""
    before = gc.get_threshold()
    gc.set_threshold(objects, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)

"""What is alive, in arrays: one row per call that runs or has ended and may be followed.

A forecast reads the arrays whole; an event writes one row. ``phase`` is ``RUNNING`` or
``IDLE``, ``since_s`` when it began, ``context_tokens`` what the call's KV holds, ``calls`` how
many calls its run had made by then, ``LAST`` if the run has said that it makes no more.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RUNNING, IDLE = 0, 1
LAST = 1 << 30
_FIRST_ROWS = 1024


class Units:
    """Rows that are taken and given back; those free belong to workflow -1."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self.rows = 0
        self._grow(_FIRST_ROWS)

    def __len__(self) -> int:
        return self.rows - len(self._free)

    def take(self) -> int:
        """A row that is free."""
        if not self._free:
            if self.rows == len(self.workflow):
                self._grow(2 * self.rows)
            self.rows += 1
            return self.rows - 1
        return self._free.pop()

    def set(
        self,
        row: int,
        workflow: int,
        agent: int,
        phase: int,
        since_s: float,
        tokens: float,
        calls: int,
    ) -> None:
        """Write a row."""
        self.workflow[row] = workflow
        self.state[row] = 2 * agent + phase
        self.since_s[row] = since_s
        self.context_tokens[row] = tokens
        self.calls[row] = calls

    def give_back(self, row: int) -> None:
        """Free a row."""
        self.workflow[row] = -1
        self._free.append(row)

    def _grow(self, size: int) -> None:
        old, kept = self.__dict__.copy(), self.rows
        self.workflow: NDArray[np.int32] = np.full(size, -1, np.int32)
        self.state: NDArray[np.int32] = np.zeros(size, np.int32)
        self.since_s: NDArray[np.float64] = np.zeros(size)
        self.context_tokens: NDArray[np.float64] = np.zeros(size)
        self.calls: NDArray[np.int32] = np.zeros(size, np.int32)
        if kept:
            for name in ("workflow", "state", "since_s", "context_tokens", "calls"):
                getattr(self, name)[:kept] = old[name][:kept]

"""What the last calls of live runs asked, kept for errands: the core knows hashes, not tokens.

Bounded in calls and bytes, and forgotten after a while; a run that says that a call is its last is
forgotten with that call's end.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec
from vllm.v1.engine import EngineCoreRequest

from coordinator.protocol import CallContext

CALLS_MOST = 1024
BYTES_MOST = 64 << 20
TOKEN_BYTES = 40
"""Of a token in a list: a pointer and a number."""
KEPT_S = 120.0
"""How long a call is remembered from its beginning on, if it is not asked for."""


class Kept(msgspec.Struct, frozen=True):
    """A call's request as it came from the client."""

    request: EngineCoreRequest
    run: tuple[str, str, str]
    began_s: float

    @property
    def size_bytes(self) -> int:
        """About what it weighs."""
        return TOKEN_BYTES * len(self.request.prompt_token_ids or ())


class Contexts:
    """Of one API process. ``on``: the core asked for it."""

    def __init__(self) -> None:
        self._on = False
        self._calls: OrderedDict[str, Kept] = OrderedDict()
        self._size_bytes = 0

    def __len__(self) -> int:
        return len(self._calls)

    def switch(self, on: bool) -> None:
        """Whether to remember anything."""
        self._on = on
        while not on and self._calls:
            self._forget(next(iter(self._calls)))

    def add(self, request: EngineCoreRequest, context: CallContext, now_s: float) -> None:
        """A call begins."""
        if not self._on or not context.run or request.prompt_token_ids is None:
            return
        kept = Kept(request, (context.tenant, context.workflow, context.run), now_s)
        self._forget(request.request_id)
        self._calls[request.request_id] = kept
        self._size_bytes += kept.size_bytes
        while len(self._calls) > CALLS_MOST or self._size_bytes > BYTES_MOST:
            self._forget(next(iter(self._calls)))

    def ended(self, request: str, context: CallContext) -> None:
        """A call is over; if it was its run's last, so is the run."""
        kept = self._calls.get(request)
        if kept is not None and context.final:
            for name in [name for name, one in self._calls.items() if one.run == kept.run]:
                self._forget(name)

    def of(self, request: str) -> EngineCoreRequest | None:
        """A call's request, if it is remembered."""
        kept = self._calls.get(request)
        return kept.request if kept is not None else None

    def expire(self, now_s: float) -> None:
        """Time passes."""
        while self._calls:
            name, kept = next(iter(self._calls.items()))
            if now_s - kept.began_s < KEPT_S:
                break
            self._forget(name)

    def _forget(self, request: str) -> None:
        kept = self._calls.pop(request, None)
        if kept is not None:
            self._size_bytes -= kept.size_bytes

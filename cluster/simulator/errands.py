"""Errands of a simulated API process: contexts that the core wants moved, see ``api.errands``.

Static prompts are not computed here: a simulated process has no declared graphs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import msgspec

from cluster.simulator.frames import Body, Tokens, Work
from coordinator.protocol import (
    BLOCK_HASH_BYTES,
    Abort,
    CallFailed,
    Decode,
    Discard,
    DropErrand,
    Errand,
    ErrandDone,
    ErrandOutcome,
    Message,
    Placed,
    Prefill,
    PrefillDone,
    Submit,
    pull_attempt,
    split_engine_request_id,
)

LAST_PRIORITY = 1 << 40
CALLS_MOST = 1024


class Moving(msgspec.Struct):
    """A context on its way. ``source``: who is to name first what it has cached."""

    errand: int
    source: Placed | None
    target: Placed
    body: Body
    moved_tokens: int = 0


class Errands:
    """Of one simulated API process."""

    def __init__(
        self,
        api: str,
        to_core: Callable[[Message], object],
        to_worker: Callable[[Placed, object], bool],
    ) -> None:
        self.on = False
        self.block_size = 0
        self._api = api
        self._to_core = to_core
        self._to_worker = to_worker
        self._moving: dict[str, Moving] = {}
        """By the name of its request."""
        self._contexts: OrderedDict[str, bytes] = OrderedDict()
        """Hashes of prompts, by call."""

    def opened(self, submit: Submit, chain: bytes) -> None:
        """A call begins."""
        if self.on and submit.context.run:
            self._contexts[submit.request] = chain
            if len(self._contexts) > CALLS_MOST:
                self._contexts.popitem(last=False)

    def on_message(self, message: Errand | DropErrand) -> None:
        """What the core wants."""
        name = self._name(message.errand)
        if isinstance(message, DropErrand):
            moving = self._moving.pop(name, None)
            if moving is not None:
                self._abort(name, moving)
            return
        chain, source = self._contexts.get(message.call), message.source
        blocks = message.tokens // self.block_size if self.block_size else 0
        if chain is None or source is None or not blocks:
            self._say(message.errand, "unknown")
            return
        # What it says behind is nobody's: another hash than any other prompt's.
        body = Body(chain[: blocks * BLOCK_HASH_BYTES], message.tokens + 1, 1, LAST_PRIORITY)
        head = Prefill(name, pull_attempt(1), source.incarnation, cached_only=True)
        if self._to_worker(source, Work(head, body)):
            self._moving[name] = Moving(message.errand, source, message.target, body)
        else:
            self._say(message.errand, "failed")

    def on_worker(self, message: object, worker: Placed) -> bool:
        """Whether it is about an errand."""
        match message:
            case Tokens():
                name, _ = split_engine_request_id(message.engine_id)
            case PrefillDone() | CallFailed():
                name = message.request
            case _:
                return False
        if not name.startswith(self._name("")):
            return False
        moving = self._moving.get(name)
        if isinstance(message, PrefillDone):
            self._held(name, moving, message, worker)
        elif moving is not None and isinstance(message, CallFailed):
            self._over(name, moving, "failed")
        elif moving is not None and isinstance(message, Tokens) and moving.target == worker:
            if message.first is not None:
                moving.moved_tokens = message.first.moved_tokens
            if message.ended:
                self._over(name, moving, "done")
        return True

    def on_worker_gone(self, lost: Placed) -> None:
        """A worker, or the connection to it, is lost."""
        for name, moving in list(self._moving.items()):
            if lost in (moving.source, moving.target):
                self._over(name, moving, "failed")

    def _held(self, name: str, moving: Moving | None, done: PrefillDone, worker: Placed) -> None:
        """The source holds what it has cached: the target reads it."""
        blocks = min(done.cached_tokens, done.prompt_tokens - 1) // self.block_size
        if moving is not None and moving.source == worker and blocks:
            moving.source = None
            chain = moving.body.chain[: blocks * BLOCK_HASH_BYTES]
            tokens = blocks * self.block_size + 1
            body = msgspec.structs.replace(moving.body, chain=chain, prompt_tokens=tokens)
            head = Decode(name, 1, moving.target.incarnation, done.handle)
            if self._to_worker(moving.target, Work(head, body)):
                return
        self._to_worker(worker, Discard(name, done.attempt, worker.incarnation, done.handle))
        if moving is not None:
            self._over(name, moving, "failed")

    def _abort(self, name: str, moving: Moving) -> None:
        worker, attempt = moving.target, 1
        if moving.source is not None:
            worker, attempt = moving.source, pull_attempt(1)
        self._to_worker(worker, Abort([(name, attempt)]))

    def _over(self, name: str, moving: Moving, outcome: ErrandOutcome) -> None:
        del self._moving[name]
        self._say(moving.errand, outcome, moving.moved_tokens)

    def _say(self, errand: int, outcome: ErrandOutcome, moved: int = 0) -> None:
        self._to_core(ErrandDone(self._api, errand, outcome, moved_tokens=moved))

    def _name(self, errand: int | str) -> str:
        return f"errand-{self._api}-{errand}"

"""Leases: handles that a decode worker has used, so that none is used twice.

The other books about leases are kept where what they count is known: how long a handle may
be sent on by ``settings.dispatch_margin_s`` and the API process, what is held and not read
yet by the core (a prefill worker's reservations until the first token), renewals by
``renewal``, and the blocks themselves by the holder's engine.

Nothing here reads a clock or sends anything; every time is an argument in seconds on the
caller's own monotonic clock.
"""

from __future__ import annotations

from collections import OrderedDict


class Spent:
    """Handles a decode worker has used: the last ``entries`` of the last ``keep_s`` seconds.

    ``keep_s`` should be longer than any lease: after that, the holder's engine has freed
    the blocks, and its connector declines the read.
    """

    def __init__(self, entries: int = 65536, keep_s: float = 3600.0) -> None:
        self._entries = entries
        self._keep_s = keep_s
        self._used_at_s: OrderedDict[tuple[str, str], float] = OrderedDict()

    def use(self, engine: str, request: str, now_s: float) -> bool:
        """Mark the handle of ``request`` on ``engine`` as used; False if it was already."""
        self._forget(now_s)
        key = (engine, request)
        if key in self._used_at_s:
            return False
        self._used_at_s[key] = now_s
        if len(self._used_at_s) > self._entries:
            self._used_at_s.popitem(last=False)
        return True

    def __len__(self) -> int:
        return len(self._used_at_s)

    def _forget(self, now_s: float) -> None:
        while self._used_at_s:
            key, used_at_s = next(iter(self._used_at_s.items()))
            if now_s - used_at_s < self._keep_s:
                return
            del self._used_at_s[key]

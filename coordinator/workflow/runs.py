"""One live run: its calls, and which of them set a new one off.

Clients say which run a call belongs to, at best also which agent called; which *call* it was
is worked out here. A call follows, in this order:

1. the call of the same agent whose prompt it extends, if nothing has followed that yet;
2. if something has (it set others off): the last of those to end, when none is running, which
   is a join; the extended call itself while others run, which is one more of a fan-out;
3. a call that has ended and that nothing has followed, of the agent named as parent if there
   is one; if no call is running, all that nothing has followed are followed by it (a join);
4. the call that was followed last: it is one more of a fan-out;
5. the beginning of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from coordinator.workflow.automaton import ORDER, Path
from coordinator.workflow.prediction import RunKey
from coordinator.workflow.profile import START, Profile
from coordinator.workflow.sharing import Sketch

NOBODY = -1
EXTENDED_MOST = 16
"""Ended calls of a run that are asked whether a prompt extends theirs, the last ones first."""


class LiveCall:
    """A call that runs, or has ended and may still be followed.

    ``path``: agents up to it, the latest last. ``before``: how many calls its agent had made in
    the run. ``children``: how many calls it set off, by
    agent. ``bound_tokens``: what its answer was thought not to exceed. ``unit``: its row in the
    arrays of what is alive, ``NOBODY`` once something has followed it.
    """

    __slots__ = (
        "agent",
        "before",
        "bound_tokens",
        "children",
        "ended_s",
        "new_tokens",
        "output_tokens",
        "path",
        "prompt_tokens",
        "sketch",
        "started_s",
        "unit",
    )

    def __init__(self, agent: int, path: Path, now_s: float) -> None:
        self.agent = agent
        self.path = path
        self.started_s = now_s
        self.ended_s = -1.0
        self.prompt_tokens = 0
        self.new_tokens = 0
        self.output_tokens = 0
        self.before = 0
        self.bound_tokens = 0.0
        self.children: dict[int, int] | None = None
        self.sketch: Sketch | None = None
        self.unit = NOBODY

    def extended_by(self, prompt: memoryview) -> bool:
        """Whether a prompt begins with all full blocks of this call's."""
        sketch = self.sketch
        return sketch is not None and 0 < sketch.blocks == sketch.shared_blocks(prompt)


class LiveRun:
    """The calls of one run that matter for what comes next."""

    __slots__ = (
        "calls",
        "deadline_s",
        "ended",
        "final",
        "first",
        "key",
        "last_s",
        "latest",
        "profile",
        "root",
        "running",
        "visits",
    )

    def __init__(self, key: RunKey, profile: Profile, now_s: float) -> None:
        self.key = key
        self.profile = profile
        self.root = LiveCall(START, (START,), now_s)
        self.root.ended_s = now_s
        self.running: dict[str, LiveCall] = {}
        self.ended: dict[str, LiveCall] = {}
        """Those that ended, the last one last; followed ones only as far as there is room."""
        self.latest: dict[int, LiveCall] = {}
        """The last call to start, by agent."""
        self.first: LiveCall | None = None
        self.calls = 0
        """How many it has made."""
        self.visits: dict[int, int] = {}
        self.final = False
        self.last_s = now_s
        self.deadline_s = 0.0

    def open_ends(self) -> Iterator[LiveCall]:
        """Calls that have ended and that nothing has followed, the last one first."""
        for call in reversed(self.ended.values()):
            if call.children is None:
                yield call

    def followed_by(
        self, agent: int, prompt: memoryview, parent: int, prompt_tokens: int
    ) -> list[LiveCall]:
        """The calls that a new call of ``agent`` follows, the one that set it off first.

        ``parent``: the agent named as its parent, ``NOBODY`` if there is none.
        """
        ends = list(self.open_ends())
        setter = self._fanning_out(agent, parent, ends)
        own = self.latest.get(agent)
        if own is not None and (own.ended_s < 0 or not own.extended_by(prompt)):
            own = self._extended(agent, prompt)
        if own is not None and setter is not None:
            # Siblings may differ in less than a block. What has no room for the earlier one's
            # answer does not go on from it.
            own = own if own.prompt_tokens + own.output_tokens <= prompt_tokens else None
        if own is not None:
            if own.children is None or self.running:
                return [own]
            return ends or [own]
        if setter is not None:
            return [setter]
        if ends:
            return self._one_or_all(ends, parent)
        if parent != NOBODY:
            named = self.latest.get(parent)
            if named is not None and named.agent != agent and named.ended_s >= 0:
                return [named]
        return [next((call for call in reversed(self.ended.values())), self.root)]

    def _fanning_out(self, agent: int, parent: int, ends: list[LiveCall]) -> LiveCall | None:
        """The call named as the parent, if it has set off such a call already and whatever has
        ended since then as well: a late one of several at once follows none of the others."""
        if parent in (NOBODY, agent):
            return None
        named = self.latest.get(parent)
        if named is None or named.children is None or agent not in named.children:
            return None
        return named if all(call.agent in named.children for call in ends) else None

    def _one_or_all(self, ends: list[LiveCall], parent: int) -> list[LiveCall]:
        setter = next((call for call in ends if call.agent == parent), ends[0])
        if self.running:
            return [setter]
        return [setter, *(call for call in ends if call is not setter)]

    def _extended(self, agent: int, prompt: memoryview) -> LiveCall | None:
        for call in islice(reversed(self.ended.values()), EXTENDED_MOST):
            if call.agent == agent and call.extended_by(prompt):
                return call
        return None

    def add(self, call_id: str, call: LiveCall) -> None:
        """A call has started."""
        self.running[call_id] = call
        self.latest[call.agent] = call
        self.calls += 1
        self.visits[call.agent] = self.visits.get(call.agent, 0) + 1
        if self.first is None:
            self.first = call

    def end(self, call_id: str, now_s: float) -> LiveCall:
        """A running call has ended."""
        call = self.running.pop(call_id)
        call.ended_s = now_s
        self.ended[call_id] = call
        return call

    def shed(self, most: int) -> list[LiveCall]:
        """If there are more calls than ``most``, forget ended ones until half as many are left.

        Followed ones go first. Returns those that nothing had followed.
        """
        excess = len(self.ended) + len(self.running) - most // 2
        if excess <= most // 2:
            return []
        in_order = sorted(self.ended.items(), key=lambda item: item[1].children is None)
        gone = in_order[:excess]
        for call_id, _ in gone:
            del self.ended[call_id]
        return [call for _, call in gone if call.children is None]


def path_after(call: LiveCall, agent: int) -> Path:
    """The path of a call of ``agent`` that follows ``call``."""
    return (*call.path, agent)[-ORDER:]

"""Why calls went where they went, for people who ask.

Of the last plans only what they were made of is kept, by reference; what it comes to is reckoned
when somebody asks, and put into words.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from coordinator.ordering import Entry
from coordinator.policy.joint import Option, options
from coordinator.policy.order import Effort, Rank
from coordinator.policy.placement import Choice
from coordinator.protocol import CallStatus
from coordinator.state import Call, CallKey

SUFFIX_MARKS = "-_"
"""What an API process puts between a response's id and what makes a request's of it."""
PLANS_MOST = 32
"""Of one call, that are kept."""


class Turn(msgspec.Struct, frozen=True, gc=False):
    """How long a call waited for its plan, and by what it was ordered.

    ``waited_for``: ``nothing``, ``room`` on workers, ``others`` that went first, ``runs`` that had
    begun, or the ``prefix`` that another call brought to the worker. ``behind``: calls that waited
    then. ``priority``, then ``due_s`` after it came, decide; ``due_s`` grows with what its run has
    left: ``own_s`` of this call, ``after_s`` of what follows, ``beside_s`` of what else is under
    way. ``known``: its workflow says what follows.
    ``tenant_s``: what its tenant had been served.
    """

    waited_s: float
    waited_for: str
    behind: int
    priority: int
    due_s: float
    own_s: float
    after_s: float
    beside_s: float
    known: bool
    tenant_s: float


class Planned(msgspec.Struct, frozen=True, gc=False):
    """One plan. ``ways``: the chosen one first, then the alternatives, the cheapest first; empty
    where the policy compares no times. ``loaded_tokens``: from the host of whoever computes the
    prompt."""

    attempt: int
    at_s: float
    decode: str
    prefill: str
    reason: str
    expected_tokens: float
    cached_tokens: int
    computed_tokens: int
    turn: Turn | None
    ways: list[Option]
    pull: str = ""
    pulled_tokens: int = 0
    loaded_tokens: int = 0


class Explained(msgspec.Struct, frozen=True, gc=False):
    """A call. ``words``: the same for people. ``happened``: what became of it."""

    request: str
    phase: str
    prompt_tokens: int
    plans: list[Planned]
    happened: CallStatus | None
    words: list[str]


class _Turn(msgspec.Struct, frozen=True, gc=False):
    effort: Effort
    rank: Rank
    submitted_s: float
    waited_s: float
    waited_for: str
    behind: int
    tenant_s: float


class _Plan(msgspec.Struct, frozen=True):
    attempt: int
    at_s: float
    choice: Choice
    expected_tokens: float
    turn: _Turn | None


class _Kept(msgspec.Struct):
    """A call that has had a plan."""

    tenant: str
    prompt_tokens: int
    plans: list[_Plan]
    happened: CallStatus | None = None


class Explanations:
    """The last calls that were planned, ``most`` of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[CallKey, _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def planned(
        self, call: Call, choice: Choice, entry: Entry | None, behind: int, now_s: float
    ) -> None:
        """A call has a plan. ``behind``: how many others wait."""
        if not self._most:
            return
        key = call.key
        kept = self._kept.get(key)
        if kept is None:
            tenant = call.submit.context.tenant
            kept = self._kept[key] = _Kept(tenant, call.submit.prompt_tokens, [])
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        turn = None
        if entry is not None:
            turn = _Turn(
                entry.effort,
                entry.rank,
                call.submitted_s,
                entry.waited_s,
                entry.waited_for,
                behind,
                entry.served_s,
            )
        since_s = now_s - call.submitted_s
        kept.plans.append(_Plan(call.attempt, since_s, choice, call.expected_tokens, turn))
        if len(kept.plans) > PLANS_MOST:
            # The first one stays: it is the one that was chosen among all workers.
            del kept.plans[1]

    def ended(self, call: Call, row: CallStatus) -> None:
        """A call is over."""
        kept = self._kept.get(call.key)
        if kept is not None:
            kept.happened = row

    def of(self, request: str, tenant: str, block_size: int) -> Explained | None:
        """What is known of a tenant's call, by its own id or its response's; the latest one."""
        for key in reversed(self._kept):
            kept = self._kept[key]
            if kept.tenant == tenant and _is_called(key[1], request):
                return _explained(key[1], kept, block_size)
        return None


def _is_called(request: str, name: str) -> bool:
    """Whether a request is meant: a client knows the beginning of its id."""
    if request == name:
        return True
    # A sample of several has its number in front.
    number, mark, rest = request.partition("_")
    if mark and number.isdigit() and _is_called(rest, name):
        return True
    # Of a name without a mark every call of a kind would be one.
    of_response = any(each in name for each in SUFFIX_MARKS)
    return of_response and request.startswith(name) and request[len(name)] in SUFFIX_MARKS


def _explained(request: str, kept: _Kept, block_size: int) -> Explained:
    plans = [_planned(plan, block_size) for plan in kept.plans]
    happened = kept.happened
    phase = happened.phase if happened is not None else "under way"
    words = [line for plan in plans for line in _words_of(plan)]
    if happened is not None:
        words += _words_after(plans[-1], happened)
    return Explained(request, phase, kept.prompt_tokens, plans, happened, words)


def _planned(plan: _Plan, block_size: int) -> Planned:
    choice = plan.choice
    found = options(choice.seen) if choice.seen is not None else []
    # The cheapest of all may be one that would break what was promised of the time between tokens.
    chosen = (choice.decode, choice.prefill, choice.pull)
    found.sort(key=lambda each: (each.decode, each.prefill, each.pull) != chosen)
    return Planned(
        attempt=plan.attempt,
        at_s=plan.at_s,
        decode=choice.decode,
        prefill=choice.prefill,
        reason=choice.reason,
        expected_tokens=plan.expected_tokens,
        cached_tokens=choice.cached_blocks * block_size,
        computed_tokens=choice.uncached_tokens,
        turn=_turn(plan.turn) if plan.turn is not None else None,
        ways=found,
        pull=choice.pull,
        pulled_tokens=choice.pulled_blocks * block_size,
        loaded_tokens=choice.loaded_blocks * block_size,
    )


def _turn(turn: _Turn) -> Turn:
    effort, (_, priority, key_s, _) = turn.effort, turn.rank
    return Turn(
        waited_s=turn.waited_s,
        waited_for=turn.waited_for,
        behind=turn.behind,
        priority=priority,
        due_s=key_s - turn.submitted_s,
        own_s=effort.own_s,
        after_s=effort.after_s,
        beside_s=effort.beside_s,
        known=effort.known,
        tenant_s=turn.tenant_s,
    )


# --- in words ---------------------------------------------------------------------------------

WAITED_FOR = {
    "room": "for room on the workers",
    "others": "while other calls went first",
    "runs": "while runs that had begun needed the KV memory",
    "prefix": "for the beginning of its prompt, which another call brought to the worker",
}


def _words_of(plan: Planned) -> list[str]:
    lines = []
    if plan.turn is not None:
        lines.append(_words_of_turn(plan.attempt, plan.turn))
    where = f"decoded on {plan.decode}"
    if plan.prefill:
        where += f", its prompt computed on {plan.prefill}"
    if plan.pull:
        where += f", {plan.pulled_tokens} tokens of it pulled from {plan.pull}"
    if plan.loaded_tokens:
        where += f", {plan.loaded_tokens} tokens of it loaded from its host"
    if not plan.ways:
        return [*lines, f"{where}: {plan.reason}"]
    chosen, *others = plan.ways
    lines.append(f"{where}, because that costs {chosen.total_s:.3f} s in all: {_parts(chosen)}")
    for way in others:
        name = f"{way.decode}, prompt on {way.prefill}" if way.prefill else way.decode
        name += f", pulled from {way.pull}" if way.pull else ""
        more_s = way.total_s - chosen.total_s
        # One that would break what was promised of the time between tokens may be cheaper.
        compared = f"{abs(more_s):.3f} s {'more' if more_s >= 0.0 else 'less'}"
        lines.append(f"  alternative {name}: {compared}: {_parts(way)}")
    return lines


def _words_of_turn(attempt: int, turn: Turn) -> str:
    again = f"attempt {attempt}: " if attempt > 1 else ""
    left_s = turn.own_s + turn.after_s + turn.beside_s
    known = "by its workflow" if turn.known else "as runs had lately"
    order = f"its run had {left_s:.3f} s of a worker's time left, {known}"
    if turn.priority:
        order += f", priority {turn.priority}"
    if turn.waited_for not in WAITED_FOR:
        return f"{again}planned at once; {order}"
    why = WAITED_FOR[turn.waited_for]
    return f"{again}waited {turn.waited_s:.3f} s {why}, {turn.behind} others behind it; {order}"


def _parts(way: Option) -> str:
    first = f"first token after {way.first_token_s:.3f}"
    if way.waiting_s >= 0.001:
        first += f" ({way.waiting_s:.3f} behind other prompts)"
    if way.prefill or way.pull:
        first += f" ({way.moving_s:.3f} to move KV)"
    loaded = f"{way.loaded_tokens} loaded, " if way.loaded_tokens else ""
    return (
        f"{first} with {way.cached_tokens} tokens cached, {loaded}decoding {way.decode_s:.3f}, "
        f"others {way.others_s:.3f}, later calls {way.later_s:.3f}, "
        f"forgotten {way.forgotten_s:.3f}"
    )


def _words_after(plan: Planned, happened: CallStatus) -> list[str]:
    if happened.phase != "finished":
        return [f"it ended {happened.phase}: {happened.reason}"]
    found = max(happened.local_cached_tokens, happened.prefill_cached_tokens)
    first = f"first token after {happened.ttft_s:.3f} s"
    if plan.ways:
        first += f" (estimated {plan.at_s + plan.ways[0].first_token_s:.3f})"
    return [
        f"what happened: {first}, {happened.output_tokens} tokens "
        f"(expected {plan.expected_tokens:.0f}) in {happened.elapsed_s:.3f} s, "
        f"{found} tokens found in a cache "
        f"(expected {happened.prompt_tokens - plan.computed_tokens}), "
        f"{happened.moved_tokens} moved"
    ]

"""What goes into a simulated engine and what comes out of it."""

from __future__ import annotations

import msgspec


class EngineRequest(msgspec.Struct, frozen=True, gc=False):
    """A request for a simulated engine; ``id`` is ``engine_request_id(request, attempt)``.

    ``chain``: hashes (8 bytes each) of all full blocks that prompt and output will fill in this
    engine, the prompt's first. ``output_tokens``: what it will generate (at least 1); the engine
    must not use it to decide anything. ``hold``: keep the prompt's KV under a lease when it is
    done (a prefill for somebody else). ``pull_tokens``: prompt tokens, from the first on, that
    can be read from another engine; what the own cache lacks of them is.
    """

    id: str
    chain: bytes
    prompt_tokens: int
    output_tokens: int
    hold: bool = False
    pull_tokens: int = 0
    priority: int = 0
    cached_only: bool = False
    """Of the prompt only what the own cache has is held, and one token more is computed."""
    cached: bool = True
    """May read and fill the prefix cache (a probe may not)."""


class Pull(msgspec.Struct, frozen=True, gc=False):
    """The engine wants ``tokens`` of KV for ``id`` from where its handle says; it waits for
    ``Engine.pulled``."""

    id: str
    at_s: float
    tokens: int


class HostLoad(msgspec.Struct, frozen=True, gc=False):
    """KV for ``id`` comes from the host's memory, and is there at ``ready_s``; the engine waits
    for ``Engine.pulled`` then."""

    id: str
    at_s: float
    ready_s: float


class FirstToken(msgspec.Struct, frozen=True, gc=False):
    """``id`` has its first token. Tokens of its prompt, as vLLM's ``PrefillStats``: found in the
    own cache or on the host, pulled; ``computed_tokens`` includes what preemptions made it compute
    again."""

    id: str
    at_s: float
    local_cached_tokens: int
    moved_tokens: int
    computed_tokens: int


class Ended(msgspec.Struct, frozen=True, gc=False):
    """``id`` has its last token. ``held``: its blocks are kept until ``Engine.release`` or
    the end of the lease, ``expires_s``. ``recomputed_tokens``: of prompt and output, computed
    again after the first token, because it was preempted."""

    id: str
    at_s: float
    held: bool = False
    expires_s: float = 0.0
    recomputed_tokens: int = 0


Output = Pull | HostLoad | FirstToken | Ended

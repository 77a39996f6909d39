"""What of an engine can change while it runs, and how it is told: a request that asks for nothing.

vLLM has no call for it. But its scheduler reads ``long_prefill_token_threshold``, how many tokens
of one prompt it computes in a step beside other requests, from the configuration that the
connector's scheduler half has, too. So the new value comes as a parameter of a tiny request, as
handles come, and that request's answer says that the engine has it.
"""

from __future__ import annotations

from typing import Any

CHUNK = "pythia_chunk_tokens"
"""In a request's ``kv_transfer_params``; never a client's, whose parameters are not passed on."""


def chunk_params(chunk_tokens: int) -> dict[str, Any]:
    """The ``kv_transfer_params`` of a request that sets the longest chunk; 0: the engine's own."""
    return {"do_remote_decode": False, "do_remote_prefill": False, CHUNK: chunk_tokens}


class Chunks:
    """The longest chunk of an engine. ``scheduler``: vLLM's configuration of its scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._own_tokens = scheduler.long_prefill_token_threshold

    def take(self, params: dict[str, Any]) -> None:
        """Take the parameter out, and do what it says. Without chunked prefill nothing can be."""
        chunk_tokens = params.pop(CHUNK, None)
        if not isinstance(chunk_tokens, int) or chunk_tokens < 0:
            return
        if self._scheduler.enable_chunked_prefill:
            self._scheduler.long_prefill_token_threshold = chunk_tokens or self._own_tokens

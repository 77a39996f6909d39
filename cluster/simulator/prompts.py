"""Prompts of token ids for a workload that knows only the ids of its blocks.

Equal block ids give equal tokens and different ids different ones, so prompts share exactly
the prefixes that the workload says. What a call generated is part of the prompt of the call
that extends it (``Call.continued``); a real engine's tokens are its own, so they are put into
those blocks when the call has ended. Whatever a prompt has shown of a block stays as it was.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import shake_128

import msgspec

from cluster.workload.form import Call, Run
from cluster.workload.spans import Spans, merged, total

_WIDE = "I"
_WIDE_BYTES = array(_WIDE).itemsize


class _Block(msgspec.Struct):
    """Tokens of a block; the first ``fixed`` of them have been sent or generated."""

    tokens: array[int]
    fixed: int = 0


class Prompts:
    """Prompts of the calls of one workload, from token ids ``first_token`` to ``last_token``.

    ``salt``: with another one all prompts are different, as if no cache had seen them. Keeps
    every block that was asked for: as much as the workload's distinct prompts.
    """

    def __init__(
        self, block_tokens: int, first_token: int, last_token: int, salt: str = ""
    ) -> None:
        assert block_tokens > 0
        assert 0 <= first_token < last_token
        self._block_tokens = block_tokens
        self._first_token = first_token
        self._salt = salt
        self._range = last_token - first_token + 1
        self._blocks: dict[tuple[str, int], _Block] = {}
        self.unknown_outputs = 0
        """Generated tokens that came too late: the prompt that contains them had been sent."""

    def prompt(self, run: Run, call: Call) -> list[int]:
        """The call's prompt. Its last tokens, in no full block, are those of the call that
        extends this one, and like nothing else where there is none."""
        size = self._block_tokens
        tokens: list[int] = []
        for block in self._known(run, call):
            wanted = min(size, call.prompt_tokens - len(tokens))
            if wanted <= 0:
                break
            tokens += block.tokens[:wanted]
            block.fixed = max(block.fixed, wanted)
        missing = call.prompt_tokens - len(tokens)
        return tokens + self._drawn(f"{run.id}#{call.index}", missing).tolist()

    def generated(self, run: Run, call: Call, tokens: Sequence[int]) -> None:
        """A call has ended with ``tokens``: prompts that extend it will contain them."""
        at = call.prompt_tokens
        known = total(merged(call.blocks + call.continued)) * self._block_tokens
        given = tokens[: max(0, known - at)]
        blocks = self._known(run, call)
        for place, token in enumerate(given, start=at):
            number, offset = divmod(place, self._block_tokens)
            block = blocks[number]
            if offset < block.fixed:
                self.unknown_outputs += block.tokens[offset] != token
                continue
            block.tokens[offset] = token
            block.fixed = offset + 1

    def _known(self, run: Run, call: Call) -> list[_Block]:
        """The prompt's blocks and those that follow in the call that extends it."""
        spans: Spans = merged(call.blocks + call.continued)
        return [
            self._block(run.scope, number)
            for first, count in spans
            for number in range(first, first + count)
        ]

    def _block(self, scope: str, number: int) -> _Block:
        block = self._blocks.get((scope, number))
        if block is None:
            tokens = self._drawn(f"{scope}/{number}", self._block_tokens)
            block = self._blocks[scope, number] = _Block(tokens)
        return block

    def _drawn(self, seed: str, count: int) -> array[int]:
        """``count`` tokens that depend on ``seed`` alone; more of them begin with the same."""
        numbers = array(
            _WIDE, shake_128(f"{self._salt}/{seed}".encode()).digest(count * _WIDE_BYTES)
        )
        return array(_WIDE, (self._first_token + number % self._range for number in numbers))

"""The sequences of an engine that generate, each one token per step.

As they all go in step, nothing is kept per sequence and step: where a sequence is follows from
the number of steps so far, and which steps need how many new blocks from where each was when it
joined. So many steps cost no more than one.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush

from cluster.simulator.sequence import Sequence


class Decodes:
    """Sequences in the order in which they were admitted. ``steps``: how many there were."""

    def __init__(self, block_size: int) -> None:
        self.steps = 0
        self._block_size = block_size
        self._sequences: dict[str, Sequence] = {}
        # How many sequences need a block in steps whose number is i modulo the block size.
        self._needs = [0] * block_size
        # Their tokens of KV all together are this plus steps times their number.
        self._base_tokens = 0
        self._ends: list[tuple[int, int, Sequence]] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def __contains__(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.id) is sequence

    @property
    def context_tokens(self) -> int:
        """KV of all sequences before the next step."""
        return self._base_tokens + self.steps * len(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """A sequence whose prefill is over; the latest admitted one of all."""
        self._sequences[sequence.id] = sequence
        sequence.origin = self.steps - sequence.generated
        self._count(sequence, 1)

    def remove(self, sequence: Sequence) -> None:
        """Out of step: its own numbers are right from now on."""
        del self._sequences[sequence.id]
        self._count(sequence, -1)
        sequence.generated = self.generated(sequence)
        sequence.computed_tokens = sequence.known_tokens - 1
        holding = sequence.holding
        holding.plain = -(-sequence.computed_tokens // self._block_size) - holding.cached

    def delay(self, sequence: Sequence) -> None:
        """It had no token in the latest step."""
        self._count(sequence, -1)
        sequence.origin += 1
        self._count(sequence, 1)

    def generated(self, sequence: Sequence) -> int:
        """Tokens that it has."""
        return self.steps - sequence.origin

    def computed_tokens(self, sequence: Sequence) -> int:
        """Tokens whose KV is there: all but the latest one, which is the next step's input."""
        return sequence.prompt_tokens + self.steps - sequence.origin - 1

    def blocks_needed(self, first: int, count: int) -> int:
        """New blocks for ``count`` steps from the ``first`` one on; 0 is the next."""
        size = self._block_size
        start = self.steps + first
        if count == 1:
            return self._needs[start % size]
        whole, rest = divmod(count, size)
        blocks = whole * len(self._sequences)
        return blocks + sum(self._needs[(start + i) % size] for i in range(rest))

    def steps_within(self, blocks: int, most: int) -> int:
        """For how many steps after the next one ``blocks`` blocks are enough; at most ``most``."""
        if self.blocks_needed(1, most) <= blocks:
            return most
        size, total = self._block_size, len(self._sequences)
        steps = blocks // total * size
        blocks -= blocks // total * total
        while True:
            blocks -= self._needs[(self.steps + 1 + steps) % size]
            if blocks < 0:
                return steps
            steps += 1

    def steps_to_end(self) -> int:
        """After how many steps the first of them has all its tokens; they are not none."""
        ends = self._ends
        while True:
            if self._is_current(ends[0]):
                return ends[0][0] - self.steps
            heappop(ends)

    def ended(self) -> list[Sequence]:
        """Those with all their tokens, in order."""
        ended: list[Sequence] = []
        while self._ends and self._ends[0][0] <= self.steps:
            entry = heappop(self._ends)
            if self._is_current(entry):
                ended.append(entry[2])
        return ended

    def _is_current(self, entry: tuple[int, int, Sequence]) -> bool:
        """Whether the sequence has not left or been delayed since this was noted."""
        end, place, sequence = entry
        return sequence in self and sequence.place == place and self._end(sequence) == end

    def _end(self, sequence: Sequence) -> int:
        return sequence.origin + sequence.output_tokens

    def _count(self, sequence: Sequence, sign: int) -> None:
        start = sequence.prompt_tokens - sequence.origin - 1
        self._base_tokens += sign * start
        self._needs[-start % self._block_size] += sign
        if sign > 0:
            heappush(self._ends, (self._end(sequence), sequence.place, sequence))

"""A call's prompt as the chain of block hashes that the cluster would see.

As in ``coordinator.blocks`` a hash is ``BLOCK_HASH_BYTES`` long and stands for its block and
all before it, for any block size of the engine: what of two prompts is the same, in whole
engine blocks, has the same hashes, and nothing else has. Tokens are not known here, so the
hashes are made from ids and are not those an API process makes from text.

Blocks with consecutive ids get their hashes from one extendable hash of what comes before
them, so a prompt costs one slice per span, not one hash per block.
"""

from __future__ import annotations

from hashlib import blake2b, shake_128
from math import gcd

from cluster.workload.form import Call, Run
from cluster.workload.spans import Spans, divided, merged
from coordinator.protocol import BLOCK_HASH_BYTES

_ID_BYTES = 16
_Streams = dict[tuple[bytes, int], bytes]


class Chains:
    """Chains of the calls of one workload, for one block size of the engine.

    Keeps what a run's next prompts will need again until the run is forgotten.
    """

    def __init__(self, block_tokens: int, engine_block_tokens: int) -> None:
        assert block_tokens > 0
        assert engine_block_tokens > 0
        self._engine_block_tokens = engine_block_tokens
        unit = gcd(block_tokens, engine_block_tokens)
        self._units_per_block = block_tokens // unit
        self._units_per_engine_block = engine_block_tokens // unit
        self._streams: dict[str, _Streams] = {}

    def prompt(self, run: Run, call: Call) -> bytes:
        """The hashes of the prompt's full engine blocks; its last, partial block has none.

        What of the prompt is in no full block of the workload is the same as in the prompt of
        the call that extends this one, and like nothing else where there is none.
        """
        return self._chain(run, call, call.prompt_tokens // self._engine_block_tokens)

    def computed(self, run: Run, call: Call) -> bytes:
        """The hashes of all blocks an engine has in full when the call has ended.

        Begins with ``prompt``. The last token's KV is not computed, as it is never an input.
        """
        tokens = call.prompt_tokens + max(0, call.output_tokens - 1)
        return self._chain(run, call, tokens // self._engine_block_tokens)

    def forget(self, run_id: str) -> None:
        """Drop what is kept for a run; chains made again later are the same."""
        self._streams.pop(run_id, None)

    def _chain(self, run: Run, call: Call, blocks: int) -> bytes:
        streams = self._streams.setdefault(run.id, {})
        units = divided(merged(call.blocks + call.continued), self._units_per_block)
        known, parent = self._known(streams, _root(run.scope), units)
        wanted = blocks * BLOCK_HASH_BYTES
        if len(known) >= wanted:
            return known[:wanted]
        own = shake_128(parent + f"{run.id}#{call.index}".encode())
        return known + own.digest(wanted - len(known))

    def _known(self, streams: _Streams, parent: bytes, units: Spans) -> tuple[bytes, bytes]:
        """The hashes of all engine blocks that these units fill, and the last of them."""
        size = self._units_per_engine_block
        hashes: list[bytes] = []
        pieces: list[tuple[int, int]] = []
        missing = 0
        for first, count in units:
            if pieces:
                taken = min(missing, count)
                pieces.append((first, taken))
                missing, first, count = missing - taken, first + taken, count - taken
                if missing:
                    continue
                parent = _hash_of(parent, pieces)
                hashes.append(parent)
                pieces = []
            whole, rest = divmod(count, size)
            if whole:
                hashes.append(_stream(streams, parent, first, whole))
                parent = hashes[-1][-BLOCK_HASH_BYTES:]
            if rest:
                pieces, missing = [(first + count - rest, rest)], size - rest
        return b"".join(hashes), parent


def _root(scope: str) -> bytes:
    return blake2b(scope.encode(), digest_size=BLOCK_HASH_BYTES).digest()


def _hash_of(parent: bytes, pieces: list[tuple[int, int]]) -> bytes:
    """The hash of a block that consists of pieces of several spans."""
    return blake2b(repr(pieces).encode(), digest_size=BLOCK_HASH_BYTES, key=parent).digest()


def _stream(streams: _Streams, parent: bytes, first: int, blocks: int) -> bytes:
    """The hashes of ``blocks`` blocks from id ``first`` on, after the block ``parent``."""
    wanted = blocks * BLOCK_HASH_BYTES
    stream = streams.get((parent, first), b"")
    if len(stream) < wanted:
        # Twice as long as before: growing by a little per call must not cost all per call.
        seed = parent + first.to_bytes(_ID_BYTES, "little", signed=True)
        stream = shake_128(seed).digest(max(wanted, 2 * len(stream)))
        streams[parent, first] = stream
    return stream[:wanted]

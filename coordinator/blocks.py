"""The prompt as a chain of block hashes: the project's own name for a KV prefix.

Equal chains mean equal tokens under the same salt, whatever engine computed them.
Tokens never leave the process that hashed them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from coordinator.protocol import BLOCK_HASH_BYTES


def salt_of(cache_salt: str = "", adapter: str = "", images: str = "") -> str:
    """What separates the blocks of one prompt from those of equal tokens: the tenant's salt, the
    LoRA adapter, and the images that stand behind placeholder tokens."""
    return "\0".join((cache_salt, adapter, images))


def hash_blocks(tokens: Sequence[int], block_size: int, salt: str = "") -> bytes:
    """Hashes of the full blocks of ``tokens``, each over its own tokens and all before.

    Returns ``BLOCK_HASH_BYTES`` per full block of ``block_size`` tokens, concatenated.
    ``salt`` separates tenants and adapters: different salts never share a hash.
    """
    return hash_after(root_hash(salt), tokens, block_size)


def root_hash(salt: str = "") -> bytes:
    """What stands before the first block of every prompt with this salt."""
    return blake2b(salt.encode(), digest_size=BLOCK_HASH_BYTES).digest()


def hash_after(parent: bytes, tokens: Sequence[int], block_size: int) -> bytes:
    """As ``hash_blocks``, of tokens that follow the block (or root) whose hash is ``parent``."""
    assert block_size > 0, block_size
    data = memoryview(array("I", tokens)).cast("B")
    block_bytes = block_size * array("I").itemsize
    hashes = bytearray()
    for start in range(0, len(data) - block_bytes + 1, block_bytes):
        parent = blake2b(
            data[start : start + block_bytes], digest_size=BLOCK_HASH_BYTES, key=parent
        ).digest()
        hashes += parent
    return bytes(hashes)

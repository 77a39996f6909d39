"""Whose a call is: tenants are told apart by the salt of their KV, which nobody else may see."""

from __future__ import annotations

from hashlib import blake2b

TENANT_BYTES = 8


def tenant_of(cache_salt: str) -> str:
    """What stands for a salt in places that other people can see; empty for none."""
    if not cache_salt:
        return ""
    return blake2b(cache_salt.encode(errors="replace"), digest_size=TENANT_BYTES).hexdigest()

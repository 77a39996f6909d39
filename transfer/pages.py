"""Huge pages for KV that lives in main memory.

Reading another process's memory costs the kernel a look-up per page of the destination:
with pages of 4 KiB that is about a third of the whole transfer. Where the kernel does not
offer it, or has no huge page to spare, everything stays as it was.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

PAGE_BYTES = 2 * 1024 * 1024
_MADV_COLLAPSE = 25


def use_huge_pages(spans: Iterable[tuple[int, int]]) -> int:
    """Move memory, given as (address, bytes), to huge pages; how many bytes were moved."""
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    moved_bytes = 0
    for address, size_bytes in set(spans):
        start = -(-address // PAGE_BYTES) * PAGE_BYTES
        inside_bytes = (address + size_bytes - start) // PAGE_BYTES * PAGE_BYTES
        if inside_bytes > 0 and advise(start, inside_bytes, _MADV_COLLAPSE) == 0:
            moved_bytes += inside_bytes
    return moved_bytes

"""Keep freed memory in the process.

glibc gives large blocks back to the kernel at every free, and fresh memory, which the kernel must clear page by page,
costs as much as decoding. Where the C library is not glibc nothing happens.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

# Numbers of glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_KEPT, _GROWTH = 2**31 - 2**20, 64 * 2**20


@cache
def keep_freed_memory() -> bool:
    """Let malloc reuse blocks of any size, from one heap; False where this C library has no such switch."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version")):
        return False  # musl
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _GROWTH))
    return all(library.mallopt(number, value) == 1 for number, value in settings)

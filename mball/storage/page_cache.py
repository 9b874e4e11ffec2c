"""Which parts of files are in memory already."""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
from collections.abc import Callable
from typing import Any

# Of all machines; the C library has no function for it yet. Linux 6.5.
_CACHESTAT = 451
_RANGE = struct.Struct("QQ")
_COUNTS = struct.Struct("5Q")  # pages that are cached, dirty, under writeback, evicted, recently evicted


def is_cached(descriptor: int, offset_bytes: int, size_bytes: int) -> bool:
    """Returns whether the page cache has all of this part of an open file; False where the kernel does not tell."""
    part = ctypes.create_string_buffer(_RANGE.pack(offset_bytes, size_bytes))
    counts = ctypes.create_string_buffer(_COUNTS.size)
    if _syscall()(ctypes.c_long(_CACHESTAT), ctypes.c_uint(descriptor), part, counts, ctypes.c_uint(0)):
        return False
    return int(_COUNTS.unpack(counts)[0]) * mmap.PAGESIZE >= size_bytes


@functools.cache
def _syscall() -> Callable[..., Any]:
    return ctypes.CDLL(None).syscall

"""Whether a stretch of a file is in the page cache already: about, of a long one, or exactly, of one request."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Callable
from mmap import PAGESIZE
from typing import Any

from mball.storage.mounts import IN_MEMORY, file_system_of

_NUM_SAMPLES = 256
# What is missing is read in the background as soon as it is asked for, so few are asked for in vain.
_NUM_MISSES = 8
# A system call, of the same number on all machines, that the C library has no function for yet. Linux 6.5.
_CACHESTAT = 451
_RANGE = struct.Struct("QQ")
_COUNTS = struct.Struct("5Q")  # pages that are cached, dirty, under writeback, evicted, recently evicted


def is_cached(descriptor: int, first: int, end: int) -> bool:
    """Returns whether all but a few percent of bytes `[first, end)` can be read without waiting for a disk.

    Asks for 256 bytes spread over them, which takes 0.5 ms. Not `mincore`: of a file that somebody else owns it tells
    nothing. False where the file system cannot tell, or the file cannot be read: whoever reads it learns why.
    """
    byte = bytearray(1)
    num_samples, num_misses = min(_NUM_SAMPLES, -(-(end - first) // PAGESIZE)), 0
    for number in range(num_samples):
        try:
            os.preadv(descriptor, [byte], first + (end - first) * number // num_samples, os.RWF_NOWAIT)
        except BlockingIOError:
            num_misses += 1
            if num_misses > _NUM_MISSES:
                return False
        except OSError:
            return file_system_of(f"/proc/self/fd/{descriptor}").kind in IN_MEMORY
    return True


def is_all_cached(descriptor: int, offset_bytes: int, size_bytes: int) -> bool:
    """Returns whether the page cache has every page of this stretch, by one call (3 µs); reads nothing ahead.

    False where the kernel does not tell: before Linux 6.5, and of files that somebody else owns.
    """
    stretch = ctypes.create_string_buffer(_RANGE.pack(offset_bytes, size_bytes))
    counts = ctypes.create_string_buffer(_COUNTS.size)
    if _syscall()(ctypes.c_long(_CACHESTAT), ctypes.c_uint(descriptor), stretch, counts, ctypes.c_uint(0)):
        return False
    return int(_COUNTS.unpack(counts)[0]) * PAGESIZE >= size_bytes


@functools.cache
def _syscall() -> Callable[..., Any]:
    return ctypes.CDLL(None).syscall

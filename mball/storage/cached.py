"""Whether a stretch of a file is in the page cache already."""

from __future__ import annotations

import os
from mmap import PAGESIZE

from mball.storage.mounts import file_system_of

_NUM_SAMPLES = 256
# What is missing is read in the background as soon as it is asked for, so few are asked for in vain.
_NUM_MISSES = 8
# They have no page cache to read past: what is in them is in memory.
_IN_MEMORY = ("tmpfs", "ramfs")


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
            return file_system_of(f"/proc/self/fd/{descriptor}").kind in _IN_MEMORY
    return True

"""What it takes to measure a disk: a file that was never read, and memory that does not slow it down."""

from __future__ import annotations

import mmap
import os

import numpy

from mball.units import MIB

_HUGE_PAGE_BYTES = 2 * MIB
# Linux 5.14; the mmap module has no name for it yet.
_MADV_POPULATE_WRITE = 23
_BLOCK_BYTES = 8 * MIB


def fill(descriptor: int, size_bytes: int) -> None:
    """Writes `size_bytes` to the file, to the disk. Raises OSError as `pwrite` does."""
    # Random, so that no layer compresses it or stores a hole; one block repeated is random enough.
    block = numpy.random.default_rng(0).bytes(min(size_bytes, _BLOCK_BYTES))
    done = 0
    while done < size_bytes:
        done += os.pwrite(descriptor, block[: size_bytes - done], done)
    os.fsync(descriptor)


def huge_page_memory(size_bytes: int) -> memoryview:
    """Returns pre-faulted zeros, aligned to 2 MiB, on huge pages where the system gives them.

    Fragmented small pages would slow the disk down, and page faults would count as reading.
    """
    mapped_bytes = size_bytes + _HUGE_PAGE_BYTES
    mapping = mmap.mmap(-1, mapped_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
        mapping.madvise(_MADV_POPULATE_WRITE)
    except OSError:
        # An older kernel: writing faults the pages in just as well.
        numpy.frombuffer(mapping, dtype=numpy.uint8)[:: mmap.PAGESIZE] = 0
    address = int(numpy.frombuffer(mapping, dtype=numpy.uint8).__array_interface__["data"][0])
    lead = -address % _HUGE_PAGE_BYTES
    return memoryview(mapping)[lead : lead + size_bytes]

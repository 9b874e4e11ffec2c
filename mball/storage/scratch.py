"""Memory that does not slow a disk down, and a file that was never read."""

from __future__ import annotations

import contextlib
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


def huge_page_memory(size_bytes: int, *, populate: bool = True) -> memoryview:
    """Returns zeros, aligned to 2 MiB, on huge pages where the system gives them: small ones would slow the disk down.

    Args:
        populate: whether page faults come now; else a page takes memory once it is touched.
    """
    mapping = mmap.mmap(-1, size_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    address = int(numpy.frombuffer(mapping, dtype=numpy.uint8).__array_interface__["data"][0])
    lead = -address % _HUGE_PAGE_BYTES
    if populate:
        try:
            mapping.madvise(_MADV_POPULATE_WRITE)
        except OSError:
            # An older kernel: writing faults the pages in just as well.
            numpy.frombuffer(mapping, dtype=numpy.uint8)[:: mmap.PAGESIZE] = 0
    return memoryview(mapping)[lead : lead + size_bytes]


def give_back(memory: memoryview) -> None:
    """Gives back what `huge_page_memory` took; it is zeros again, and takes memory again once it is touched."""
    assert isinstance(memory.obj, mmap.mmap)
    memory.obj.madvise(mmap.MADV_DONTNEED)

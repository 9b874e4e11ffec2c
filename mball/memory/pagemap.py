"""Which pages of a private file mapping were written: what the kernel's page map says.

A page that was written is anonymous: present (or swapped out) and no longer a page of the file. No hook,
version counter or page fault handler is involved, so it does not matter who wrote it. (On a DAX file
system clean pages count as written too.)
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from enum import Enum

import numpy as np

from mball.errors import DeviceError
from mball.memory.libc import PAGE_BYTES

_PATH = "/proc/self/pagemap"
_ENTRY_BYTES = 8
_READ_PAGES = 1 << 17  # 1 MiB of entries, 512 MiB of pages

# ioctl PAGEMAP_SCAN, Linux 6.7: struct pm_scan_arg is 12 unsigned 64-bit numbers, struct page_region 3.
_SCAN_FORMAT = struct.Struct("12Q")
_SCAN = 3 << 30 | _SCAN_FORMAT.size << 16 | ord("f") << 8 | 16
_NUM_REGIONS = 1024
_IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4

Range = tuple[int, int]


class PageState(Enum):
    """What a page of a private file mapping can be, when it is in memory at all."""

    WRITTEN = "written"
    CLEAN = "clean"


def find_pages(spans: Sequence[Range], state: PageState) -> list[list[Range]]:
    """Returns for each `(address, size_bytes)` the ranges `[first, end)` of addresses in that state.

    Addresses and sizes are multiples of the page. Ranges are sorted, apart from each other, and inside the span.
    The page map is opened anew each time: a descriptor that a fork inherited would show the parent.

    Raises DeviceError when the kernel does not let this process read its page map.
    """
    try:
        fd = os.open(_PATH, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceError(
            f"cannot open {_PATH}, which shows the writes to {len(spans)} mapped weights: {error.strerror} "
            f"(errno {error.errno}); mount /proc, or tell mball of writes with mball.touch"
        ) from error
    try:
        try:
            return _scan(fd, spans, state)
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
        return [_read(fd, address, size, state) for address, size in spans]
    except OSError as error:
        raise DeviceError(
            f"cannot read {_PATH}, which shows the writes to {len(spans)} mapped weights: {error.strerror} "
            f"(errno {error.errno}); tell mball of writes with mball.touch"
        ) from error
    finally:
        os.close(fd)


def _scan(fd: int, spans: Sequence[Range], state: PageState) -> list[list[Range]]:
    """Asks the kernel for the ranges themselves: it skips page tables that do not exist."""
    regions = np.zeros((_NUM_REGIONS, 3), dtype=np.uint64)
    if state is PageState.WRITTEN:
        inverted, mask, any_of = _IS_FILE, _IS_FILE, _IS_PRESENT | _IS_SWAPPED
    else:
        inverted, mask, any_of = 0, _IS_FILE | _IS_PRESENT, 0
    found = []
    for address, size in spans:
        ranges: list[Range] = []
        start, end = address, address + size
        # The scan stops when the list is full. Where it stopped is not taken from `walk_end`: after more than 512
        # ranges Linux 6.18 leaves an old place there, and ranges would come twice. So go on after the last range.
        while start < end:
            argument = bytearray(
                _SCAN_FORMAT.pack(
                    _SCAN_FORMAT.size, 0, start, end, 0, regions.ctypes.data, _NUM_REGIONS, 0,
                    inverted, mask, any_of, _IS_FILE,
                )
            )  # fmt: skip
            count = fcntl.ioctl(fd, _SCAN, argument)
            if count == 0:
                break
            for first, last, _ in regions[:count].tolist():
                _append(ranges, first, last)
            start = ranges[-1][1]
        found.append(ranges)
    return found


def _read(fd: int, address: int, size: int, state: PageState) -> list[Range]:
    """Reads an entry of 8 bytes for each page: for kernels without the scan."""
    ranges: list[Range] = []
    first_page, end_page = address // PAGE_BYTES, (address + size) // PAGE_BYTES
    for page in range(first_page, end_page, _READ_PAGES):
        num_pages = min(_READ_PAGES, end_page - page)
        data = os.pread(fd, num_pages * _ENTRY_BYTES, page * _ENTRY_BYTES)
        if len(data) != num_pages * _ENTRY_BYTES:
            raise OSError(errno.EIO, f"{len(data)} bytes instead of {num_pages * _ENTRY_BYTES}")
        flags = np.frombuffer(data, dtype=np.uint64) >> np.uint64(61)
        is_file, is_swapped, is_present = flags & 1 != 0, flags & 2 != 0, flags & 4 != 0
        wanted = (is_present | is_swapped) & ~is_file if state is PageState.WRITTEN else is_present & is_file
        edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False))
        for first, end in edges.reshape(-1, 2).tolist():
            _append(ranges, (page + first) * PAGE_BYTES, (page + end) * PAGE_BYTES)
    return ranges


def _append(ranges: list[Range], first: int, end: int) -> None:
    if ranges and ranges[-1][1] == first:
        ranges[-1] = (ranges[-1][0], end)
    else:
        ranges.append((first, end))

"""A weight's home in a file: a private mapping that can be read, written, and asked what was written."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from functools import partial

import torch

from mball.errors import DeviceError
from mball.memory import libc
from mball.memory.pagemap import PageState, Range, find_pages
from mball.memory.region import Region
from mball.units import format_bytes, round_up

_FLAGS = libc.MAP_PRIVATE | libc.MAP_NORESERVE


class PrivateMapping:
    """`size_bytes` of a file from `offset_bytes`, mapped copy-on-write: reads cost page cache, writes stay here.

    The file is never changed through the mapping; a page that is written becomes memory of this process.
    Byte ranges are relative to the mapping and multiples of the page; the last page may reach past `size_bytes`,
    and past the end of the file, where it reads as zero. Tensors keep the mapping: it is unmapped when this object
    and the last of them are gone.

    A file that is replaced by rename stays readable here (the mapping holds the old one). A file that is
    written shows its new content in pages that were not written here, and one that is **truncated kills the
    process with SIGBUS** when a page past its new end is read: no error can be raised for that, so
    check size and time of the file before reading it at length.

    Methods that drop or replace pages look first and act then: no other thread may write meanwhile.
    """

    def __init__(self, fd: int, offset_bytes: int, size_bytes: int) -> None:
        """Maps without reading; `fd` may be read-only and may be closed afterwards.

        No swap space or memory is set aside, so a mapping may be larger than memory.

        Raises:
            DeviceError: the offset is no multiple of the page, the range is empty or ends past the file's
                last page, or the kernel refuses.
        """
        address = _map(None, round_up(size_bytes, libc.PAGE_BYTES), _FLAGS, fd, offset_bytes, size_bytes)
        self._size_bytes = size_bytes
        self._mapped_bytes = round_up(size_bytes, libc.PAGE_BYTES)
        self._region = Region(
            address, size_bytes, partial(libc.unmap, address, self._mapped_bytes), what="mapping of a file"
        )

    @property
    def address(self) -> int:
        """The address of the first byte; it never changes."""
        return self._region.address

    @property
    def size_bytes(self) -> int:
        """The mapped size, as asked for."""
        return self._size_bytes

    def tensor(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """Returns a writable contiguous tensor over the bytes from `offset` (any alignment).

        Each call makes a tensor with a storage of its own. Raises DeviceError out of range.
        """
        return self._region.tensor(offset, dtype, shape)

    def written(self) -> list[Range]:
        """Returns the ranges of pages that were written since they were mapped, replaced or dropped.

        Raises DeviceError when the page map cannot be read.
        """
        return scan_written([self])[0]

    def touched_bytes(self) -> int:
        """Returns the bytes of file pages that reading through this mapping holds in this process.

        The kernel maps pages around the one that is read, when they are in its cache. Raises as `written`.
        """
        return sum(end - first for first, end in self._clean())

    def drop_clean(self, first: int = 0, end: int | None = None) -> int:
        """Gives pages of the range that were read and not written back to the page cache; returns their bytes.

        Raises as `written`.
        """
        dropped = 0
        for begin, stop in self._clean(first, end):
            libc.advise(self.address + begin, stop - begin, libc.DONTNEED)
            dropped += stop - begin
        return dropped

    def read_sparsely(self, first: int, end: int) -> None:
        """Says that a few pages of the range will be read, here and there: nothing around them is read with them.

        Ends with `read_as_usual`, or where bytes are replaced.
        """
        self._check_pages(first, end)
        libc.advise(self.address + first, end - first, libc.RANDOM)

    def read_as_usual(self, first: int, end: int) -> None:
        """Says that the range may be read in order again: the kernel reads ahead."""
        self._check_pages(first, end)
        libc.advise(self.address + first, end - first, libc.NORMAL)

    def prefetch(self, ranges: Sequence[Range]) -> None:
        """Has the kernel read these ranges of whole pages into its cache, all at one time. Does not wait for them.

        Reading them then does not wait for one page after another.
        """
        for first, end in ranges:
            self._check_pages(first, end)
            libc.advise(self.address + first, end - first, libc.WILLNEED)

    def populate(self, first: int, end: int) -> None:
        """Blocks until the range of whole pages is in memory and mapped; does nothing where the kernel cannot.

        Raises DeviceError when the file cannot be read there, be it that it was truncated.
        """
        self._check_pages(first, end)
        try:
            libc.advise(self.address + first, end - first, libc.POPULATE_READ)
        except OSError as error:
            if error.errno != errno.EINVAL:  # before Linux 5.14 pages come as they are touched
                raise DeviceError(
                    f"bytes [{first}, {end}) of a mapping of {self._mapped_bytes} bytes cannot be read: "
                    f"{error.strerror} (errno {error.errno}); if the file was truncated, copy or download it again"
                ) from error

    def drop_written(self, first: int, end: int) -> None:
        """Forgets what was written in the range: it reads from the file again.

        The caller has saved the content to the same place of the file, or does not want it.
        """
        self._check_pages(first, end)
        libc.advise(self.address + first, end - first, libc.DONTNEED)

    def replace(self, first: int, end: int, fd: int, file_offset: int) -> None:
        """Puts another file's bytes from `file_offset` behind the range; tensors read those from now on.

        The pages written here are gone afterwards: save them to that file before. The file must
        hold the whole range; `file_offset` is a multiple of the page. Each call costs up to two more of the
        process's mappings (vm.max_map_count, 65530 by default), so replace long ranges.

        Raises:
            DeviceError: as the constructor, and nothing has changed; but if the kernel itself refuses, the range may be
                unmapped, and the message says so.
        """
        self._check_pages(first, end)
        if first == end:
            return
        _map(self.address + first, end - first, _FLAGS | libc.MAP_FIXED, fd, file_offset, end - first)

    def close(self) -> None:
        """Gives up this object's hold on the mapping; tensors keep theirs. Idempotent."""
        self._region.close()

    def span(self) -> Range:
        """Returns address and bytes, whole pages. Raises DeviceError when closed."""
        self._check_open()
        return self.address, self._mapped_bytes

    def _clean(self, first: int = 0, end: int | None = None) -> list[Range]:
        address, mapped_bytes = self.span()
        end = mapped_bytes if end is None else end
        self._check_pages(first, end)
        (found,) = find_pages([(address + first, end - first)], PageState.CLEAN)
        return [(first - self.address, end - self.address) for first, end in found]

    def _check_open(self) -> None:
        if self._region.closed:
            raise DeviceError(f"the mapping of {format_bytes(self._size_bytes)} is closed; map the file again")

    def _check_pages(self, first: int, end: int) -> None:
        self._check_open()
        aligned = first % libc.PAGE_BYTES == 0 and end % libc.PAGE_BYTES == 0
        if not (aligned and 0 <= first <= end <= self._mapped_bytes):
            raise DeviceError(
                f"bytes [{first}, {end}) are no whole pages of {libc.PAGE_BYTES} bytes within a mapping of "
                f"{self._mapped_bytes} bytes; round the range to pages"
            )


def scan_written(mappings: Sequence[PrivateMapping]) -> list[list[Range]]:
    """Returns `written()` of each mapping, opening the page map once. Raises as `PrivateMapping.written`."""
    spans = [mapping.span() for mapping in mappings]
    found = find_pages(spans, PageState.WRITTEN)
    return [
        [(first - address, end - address) for first, end in ranges]
        for (address, _), ranges in zip(spans, found, strict=True)
    ]


def _map(address: int | None, mapped_bytes: int, flags: int, fd: int, offset_bytes: int, size_bytes: int) -> int:
    if offset_bytes % libc.PAGE_BYTES or offset_bytes < 0 or size_bytes <= 0:
        raise DeviceError(
            f"cannot map {size_bytes} bytes at offset {offset_bytes} of a file: the size must be more than zero and "
            f"the offset a multiple of {libc.PAGE_BYTES} bytes; round the offset down and slice"
        )
    try:
        file_bytes = os.fstat(fd).st_size
        if offset_bytes + size_bytes > round_up(file_bytes, libc.PAGE_BYTES):
            raise DeviceError(
                f"cannot map bytes [{offset_bytes}, {offset_bytes + size_bytes}) of a file of {file_bytes} bytes; "
                "it is truncated: copy or download it again"
            )
        return libc.map_memory(address, mapped_bytes, flags, fd, offset_bytes)
    except OSError as error:
        lost = "" if address is None else "; the range may be unmapped now, so drop its tensors"
        raise DeviceError(
            f"cannot map {format_bytes(size_bytes)} ({size_bytes} bytes) at offset {offset_bytes} of a file: "
            f"{error.strerror} (errno {error.errno}){lost}; raise vm.max_map_count or `ulimit -v` "
            "if one of them is the limit"
        ) from error

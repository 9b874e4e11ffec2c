"""Writes cut into requests to the operating system, and how one is made."""

from __future__ import annotations

import errno
import itertools
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy

from mball.storage.checksum import checksum
from mball.storage.extents import BLOCK_BYTES, SwapExtent
from mball.storage.pending import PendingChunks
from mball.units import MIB, PAGE_BYTES

CHUNK_BYTES = 4 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """Put `source`, C-contiguous bytes, at `offset_bytes` of the file. It stays as it is until the write is over.

    Writes are fastest where offset, size and the source's address are multiples of 4096, and in long runs.
    """

    offset_bytes: int
    source: memoryview


class WriteChunk:
    """Neighbours in the file, within one extent, that are written by one request, from `offset` on."""

    __slots__ = ("asked_s", "extent", "handle", "offset", "size", "views")

    def __init__(self, extent: SwapExtent, offset: int, view: memoryview) -> None:
        self.extent = extent
        self.offset = offset
        self.size = len(view)
        self.views = [view]
        self.asked_s = 0.0
        self.handle: PendingChunks

    @property
    def end(self) -> int:
        return self.offset + self.size

    @property
    def filled(self) -> range:
        """The blocks of the extent that it writes whole."""
        return self.extent.filled(self.offset, self.end)

    def placed(self) -> Iterator[tuple[int, memoryview]]:
        """Yields its views, each with where in the file it goes."""
        position = self.offset
        for view in self.views:
            yield position, view
            position += len(view)

    def copy(self, first: int, end: int, destination: memoryview) -> None:
        """Copies what it writes of bytes `[first, end)` of the file to `destination`, which begins at `first`."""
        for position, view in self.placed():
            begin, stop = max(position, first), min(position + len(view), end)
            if begin < stop:
                # numpy copies without the interpreter's lock.
                numpy.copyto(
                    numpy.frombuffer(destination, numpy.uint8, stop - begin, begin - first),
                    numpy.frombuffer(view, numpy.uint8, stop - begin, begin - position),
                )

    def release(self) -> None:
        for view in self.views:
            view.release()


def cut(extent: SwapExtent, writes: Iterable[Write]) -> Iterator[WriteChunk]:
    """Cuts writes to an extent at multiples of the chunk, and puts together what lies side by side in the file."""
    last: WriteChunk | None = None
    for write in writes:
        done, size = 0, len(write.source)
        while done < size:
            offset = write.offset_bytes + done
            upto = min(size, (offset // CHUNK_BYTES + 1) * CHUNK_BYTES - write.offset_bytes)
            view = write.source[done:upto]
            if last is not None and last.end == offset and offset % CHUNK_BYTES:
                last.views.append(view)
                last.size += len(view)
            else:
                if last is not None:
                    yield last
                last = WriteChunk(extent, offset, view)
            done = upto
    if last is not None:
        yield last


class Written(NamedTuple):
    """How a chunk was written, and the sums of the blocks that it fills; None where nobody wants them."""

    direct_bytes: int
    num_requests: int
    sums: array[int] | None


class Target:
    """Where chunks go: the descriptors of one file, which stay the owner's, and whether blocks get checksums."""

    __slots__ = ("_with_sums", "buffered", "direct", "label")

    def __init__(self, label: str, buffered: int, direct: int | None, *, with_sums: bool) -> None:
        self.label = label
        self.buffered = buffered
        self.direct = direct
        self._with_sums = with_sums

    def write(self, chunk: WriteChunk, bounce: memoryview) -> Written:
        """Writes all of a chunk. Raises OSError."""
        may_pass = chunk.offset % PAGE_BYTES == chunk.size % PAGE_BYTES == 0
        placed = list(chunk.placed())
        if any(first % BLOCK_BYTES for first, _ in placed[1:]) or (
            may_pass and self.direct is not None and any(_address(view) % PAGE_BYTES for _, view in placed)
        ):
            placed = [(chunk.offset, bounce[: chunk.size])]
            chunk.copy(chunk.offset, chunk.end, bounce)
        done = direct_bytes = num_requests = 0
        while done < chunk.size:
            fd = self.direct if may_pass and done % PAGE_BYTES == 0 else None
            num_requests += 1
            rest = _after([view for _, view in placed], done)
            try:
                got = os.pwritev(self.buffered if fd is None else fd, rest, chunk.offset + done)
            except OSError as error:
                if fd is None or error.errno != errno.EINVAL:
                    raise
                self.direct = None  # this file system does not take it after all
                continue
            finally:
                for view in rest:
                    view.release()
            if not got:
                raise OSError(errno.EIO, "the file system wrote nothing")
            direct_bytes += 0 if fd is None else got
            done += got
        # Here, where other threads write meanwhile. Not before it: a disk of a virtual machine takes bytes more slowly
        # that a core has just read. No block is in two views.
        sums = array("Q", _sums(chunk.extent, placed)) if self._with_sums else None
        return Written(direct_bytes, num_requests, sums)


def _sums(extent: SwapExtent, placed: Iterable[tuple[int, memoryview]]) -> Iterator[int]:
    for position, view in placed:
        filled = extent.filled(position, position + len(view))
        for first, end in itertools.pairwise(extent.cuts(filled)):
            yield checksum(view[first - position : end - position])


def _after(views: Iterable[memoryview], done: int) -> list[memoryview]:
    rest = []
    for view in views:
        if done < len(view):
            rest.append(view[done:])
        done = max(done - len(view), 0)
    return rest


def _address(view: memoryview) -> int:
    return int(numpy.frombuffer(view, dtype=numpy.uint8).__array_interface__["data"][0])

"""Reads cut into requests to the operating system, and what readers of several threads share."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy

from mball.errors import DeviceError, StorageError
from mball.storage.alignment import DIRECT_ALIGNMENT_BYTES
from mball.storage.files import DirectIO, FileTable, OpenFile
from mball.storage.reader import Read, ReadStatistics
from mball.units import MIB, format_bytes, round_down, round_up

DEFAULT_NUM_THREADS = 8
DEFAULT_CHUNK_BYTES = 2 * MIB
CLOSED = "the reader was closed"


@dataclass(slots=True, kw_only=True)
class Chunk:
    """One request: fill `view`, which lies at `address`, from `offset_bytes` on; at least `required_bytes` of it.

    It goes past the page cache where `alignment_bytes` is not None, and goes on so at multiples of that; but through it
    where that has all of it and `may_be_cached` says so.
    """

    file: OpenFile
    offset_bytes: int
    view: memoryview
    address: int
    required_bytes: int
    alignment_bytes: int | None
    may_be_cached: bool

    def failure_message(self, cause: BaseException) -> str:
        """Returns what to tell people who wait for it."""
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
        return (
            f"reading {self.required_bytes} B at offset {self.offset_bytes} B of {self.file.label} failed: {reason}. "
            "Check the disk and the file; the next pass reads anew"
        )


class ChunkedReader:
    """The files that a `Reader` reads, how it cuts reads, and what it says of itself."""

    def __init__(self, files: FileTable, *, num_threads: int, chunk_bytes: int) -> None:
        assert num_threads > 0
        assert chunk_bytes > 0
        assert chunk_bytes % DIRECT_ALIGNMENT_BYTES == 0
        self._files = files
        self._num_threads = num_threads
        self._chunk_bytes = chunk_bytes

    @property
    def window_bytes(self) -> int:
        """The bytes that are read at one time when many are asked for."""
        return self._num_threads * self._chunk_bytes

    @property
    def statistics(self) -> ReadStatistics:
        """See `Reader`."""
        raise NotImplementedError

    @property
    def path(self) -> str:
        """See `Reader`."""
        statistics = self.statistics
        reasons = ", ".join(self._files.buffered_reasons)
        if not self._files.any_direct and reasons:
            return f"buffered ({reasons})"
        odd_bytes = statistics.size_bytes - statistics.direct_bytes
        parts = ["O_DIRECT"]
        if odd_bytes:
            parts.append(f"{format_bytes(odd_bytes)} buffered ({reasons or self._others})")
        return ", ".join(parts)

    @property
    def _others(self) -> str:
        return "cached, or not aligned" if self._files.mode is DirectIO.UNCACHED else "not aligned"

    def _cut(self, reads: Sequence[Read]) -> list[Chunk]:
        return [chunk for read in reads for chunk in _chunks(self._files, read, self._chunk_bytes)]


def file_ended(offset_bytes: int) -> OSError:
    """Returns the cause where a file is shorter than it was."""
    return OSError(errno.EIO, f"the file ends at {offset_bytes} B, so it was truncated while in use")


def named(reads: Sequence[Read]) -> str:
    """Returns which file is read, or the first of them, for people."""
    return reads[0].file if reads else "nothing"


def reader_is_closed() -> StorageError:
    """Returns what a reader that was closed raises."""
    return StorageError("the reader is closed; make another")


def refuse_fork(pid: int | None) -> None:
    """Raises DeviceError in a forked child of process `pid`, where the threads of a reader were started."""
    if pid not in (None, os.getpid()):
        raise DeviceError(
            f"the reader belongs to process {pid}, and this is its forked child {os.getpid()}, which has no reading "
            "threads. Wrap the model in the child, or start the child with 'spawn'"
        )


def _chunks(files: FileTable, read: Read, chunk_bytes: int) -> Iterator[Chunk]:
    """Cuts `read` into a ragged head, aligned chunks, and a ragged tail."""
    file = files[read.file]
    view = read.destination
    if view.readonly or not view.c_contiguous or view.itemsize != 1:
        raise StorageError(f"read of {read.file}: the destination must be writable, contiguous bytes")
    begin, end = read.offset_bytes, read.offset_bytes + read.size_bytes
    if begin < 0 or read.size_bytes < 0 or read.size_bytes > view.nbytes:
        raise StorageError(
            f"read of {read.size_bytes} B at offset {begin} B of {read.file} does not fit its destination of "
            f"{view.nbytes} B"
        )
    if not read.size_bytes:
        return
    file_bytes = file.size_bytes()
    if begin >= file_bytes:
        raise StorageError(f"read at offset {begin} B of {read.file} begins past its end, {file_bytes} B")
    view = view.cast("B")
    address = int(numpy.frombuffer(view, dtype=numpy.uint8).__array_interface__["data"][0])
    alignment = files.alignment(read.file)
    if alignment is not None:
        aligned_begin, aligned_end = round_up(begin, alignment.offset_bytes), round_down(end, alignment.offset_bytes)
    if alignment is None or aligned_begin >= aligned_end or (address - begin) % alignment.address_bytes:
        cuts = [begin, *range(round_down(begin, chunk_bytes) + chunk_bytes, end, chunk_bytes), end]
        spans = [(first, last, False) for first, last in itertools.pairwise(cuts)]
    else:
        step = round_up(chunk_bytes, alignment.offset_bytes)
        spans = [(begin, aligned_begin, False)]
        spans += [(first, min(first + step, aligned_end), True) for first in range(aligned_begin, aligned_end, step)]
        spans.append((aligned_end, end, False))
    for first, last, direct in spans:
        required_bytes = min(last, file_bytes) - first
        if first < last and required_bytes > 0:
            yield Chunk(
                file=file,
                offset_bytes=first,
                view=view[first - begin : last - begin],
                address=address + first - begin,
                required_bytes=required_bytes,
                alignment_bytes=alignment.offset_bytes if direct and alignment is not None else None,
                may_be_cached=files.mode is DirectIO.UNCACHED,
            )

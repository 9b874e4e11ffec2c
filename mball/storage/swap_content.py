"""What a swap file holds: its bytes, what still waits to be written to it, and the checksums of both together."""

from __future__ import annotations

import os
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mball.config import SwapCheck
from mball.errors import StorageError
from mball.storage.checksum import NAME, checksum
from mball.storage.extents import BLOCK_BYTES, BlockState, ExtentMap, SwapExtent
from mball.storage.reader import Read
from mball.storage.write_queue import Write, WriteQueue

# Parts of blocks, each with where in the block it begins.
Parts = dict[tuple[SwapExtent, int], list[tuple[int, memoryview]]]


class BlockSum(NamedTuple):
    """What the checksum of a block was when a read began; `on_disk` says whether nothing of it was queued."""

    extent: SwapExtent
    block: int
    value: int
    on_disk: bool


class Run(NamedTuple):
    """The sums of blocks that are about to be written, from `first` on."""

    extent: SwapExtent
    first: int
    values: array[int]
    failed: tuple[int, int] | None = None  # where in the file of a single block something is left of a failed write


class SwapContent:
    """The content of a file's extents, as last handed over to be written; the queue's lock guards it.

    Args:
        extents: of the file.
        queue: writes it.
        mode: when what is read is checked.
    """

    def __init__(self, extents: ExtentMap, queue: WriteQueue, mode: SwapCheck) -> None:
        self._extents = extents
        self._queue = queue
        self._mode = mode
        self.read_bytes = self.num_reads = self.hit_bytes = self.checked_bytes = 0

    def begin(self, read: Read) -> tuple[list[Read], list[BlockSum]]:
        """Brings what still waits to be written from memory; returns what is left to read, and what to check then."""
        first, end = read.offset_bytes, read.offset_bytes + read.size_bytes
        left: list[Read] = []
        destination = read.destination.cast("B")
        with self._queue.lock:
            found = list(self._from_queue(first, end, destination))
            sums = list(self._sums(first, end, queued=bool(found)))
            position = first
            for chunk_first, chunk_end in found:
                left.append(_part(read, position, chunk_first))
                position = chunk_end
                self.hit_bytes += chunk_end - chunk_first
            left.append(_part(read, position, end))
            self.read_bytes += read.size_bytes
            self.num_reads += 1
        return [part for part in left if part.size_bytes], sums

    def check(self, read: Read, sums: Sequence[BlockSum]) -> None:
        """Holds what a read brought against the sums of when it began. What was written since is not looked at.

        Raises:
            StorageError: something else was written; it names file, offset and both sums.
        """
        end = read.offset_bytes + read.size_bytes
        for extent, block, value, on_disk in sums:
            block_first, block_end = extent.bounds(block)
            first, stop = max(block_first, read.offset_bytes), min(block_end, end)
            got = read.destination[first - read.offset_bytes : stop - read.offset_bytes]
            if (first, stop) == (block_first, block_end):
                found = checksum(got)
            else:
                with self._queue.lock:
                    content = self._bytes(block_first, block_end)
                content[first - block_first : stop - block_first] = got
                found = checksum(content)
            with self._queue.lock:
                if extent.sums[block] != value or self._extents.find(extent.start) is not extent:
                    continue  # written anew since the read began, or freed
                if extent.states[block] == BlockState.FAILED:
                    raise StorageError(
                        f"{block_end - block_first} B at offset {block_first} B of {self._queue.target.label} cannot "
                        "be read: writing them failed. Write them again"
                    )
                if found != value:
                    raise self._damage(block_first, block_end, found, value)
                self.checked_bytes += block_end - block_first
                if on_disk:
                    extent.states[block] = BlockState.READ_BACK

    def verify(self, first: int, end: int) -> None:
        """Reads the blocks of `[first, end)` and holds them against their sums, for who reads them by a mapping.

        Raises:
            StorageError: as `check`.
        """
        with self._queue.lock:
            extents = list(self._extents.overlapping(first, end))
        for extent in extents:
            for block in extent.blocks(max(first, extent.start), min(end, extent.end)):
                block_first, block_end = extent.bounds(block)
                with self._queue.lock:
                    known = extent.states[block] != BlockState.UNKNOWN and self._mode is not SwapCheck.OFF
                    value, content = extent.sums[block], self._bytes(block_first, block_end) if known else None
                if content is not None and checksum(content) != value:
                    raise self._damage(block_first, block_end, checksum(content), value)

    def sums_of(self, writes: Sequence[Write]) -> tuple[list[Run], Parts]:
        """Returns the sums of blocks that one write fills, and the parts of other blocks. Needs no lock."""
        runs: list[Run] = []
        parts: Parts = defaultdict(list)
        if self._mode is SwapCheck.OFF:
            return runs, parts
        for write in writes:
            first, end = write.offset_bytes, write.offset_bytes + len(write.source)
            extent = self._extents.find(first)
            if extent is None or first == end:
                continue
            values = array("Q")
            run = Run(extent, -(-(first - extent.start) // BLOCK_BYTES), values)
            for block in extent.blocks(first, end):
                block_first, block_end = extent.bounds(block)
                begin, stop = max(block_first, first), min(block_end, end)
                view = write.source[begin - first : stop - first]
                if stop - begin == block_end - block_first:
                    values.append(checksum(view))
                else:
                    parts[extent, block].append((begin - block_first, view))
            runs.append(run)
        return runs, parts

    def sum_with(self, extent: SwapExtent, block: int, parts: Sequence[tuple[int, memoryview]]) -> Run:
        """Returns the sum of a block after these parts of it are written.

        Raises:
            StorageError: the rest of it is damaged: a new sum would vouch for that.
        """
        first, end = extent.bounds(block)
        if sum(len(view) for _, view in parts) < end - first:
            content = self._bytes(first, end)
            if extent.states[block] in (BlockState.WRITTEN, BlockState.READ_BACK):
                found = checksum(content)
                if found != extent.sums[block]:
                    raise self._damage(first, end, found, extent.sums[block])
        else:
            content = bytearray(end - first)
        failed = extent.failed.get(block)
        if failed is not None and _covers(parts, failed[0] - first, failed[1] - first):
            failed = None
        for offset, view in parts:
            content[offset : offset + len(view)] = view
        return Run(extent, block, array("Q", [checksum(content)]), failed)

    def forget(self, runs: Sequence[Run]) -> None:
        """Says that these blocks cannot be read until `set` says more."""
        for extent, first, values, _ in runs:
            extent.states[first : first + len(values)] = bytes([BlockState.FAILED]) * len(values)
            extent.failed |= {block: extent.bounds(block) for block in range(first, first + len(values))}

    def set(self, runs: Sequence[Run]) -> None:
        """Says what the sums of blocks are from now on."""
        for extent, first, values, failed in runs:
            extent.sums[first : first + len(values)] = values
            if failed is not None:
                extent.failed[first] = failed
                continue
            extent.states[first : first + len(values)] = bytes([BlockState.WRITTEN]) * len(values)
            for block in range(first, first + len(values)):
                extent.failed.pop(block, None)

    def _sums(self, first: int, end: int, *, queued: bool) -> Iterator[BlockSum]:
        """Yields the sums that a read is to be held against."""
        if self._mode is SwapCheck.OFF:
            return
        trusted = {BlockState.UNKNOWN}
        if self._mode is SwapCheck.FIRST:
            trusted.add(BlockState.READ_BACK)
        for extent in self._extents.overlapping(first, end):
            for block in extent.blocks(max(first, extent.start), min(end, extent.end)):
                if extent.states[block] not in trusted:
                    on_disk = not (queued and self._queue.overlapping(*extent.bounds(block)))
                    yield BlockSum(extent, block, extent.sums[block], on_disk)

    def _bytes(self, first: int, end: int) -> bytearray:
        """Returns bytes of the file as they are or will be; the lock is held."""
        if self._queue.stopping:  # its descriptor may be another file's by now
            raise StorageError(f"{self._queue.target.label} is closed")
        content = bytearray(end - first)
        done = 0
        with memoryview(content) as view:
            while done < len(content):
                try:
                    got = os.preadv(self._queue.target.buffered, [view[done:]], first + done)
                except OSError as error:
                    raise StorageError(
                        f"reading {end - first} B at offset {first} B of {self._queue.target.label} failed: "
                        f"{error.strerror}. Check the disk"
                    ) from error
                if not got:
                    break
                done += got
            for _ in self._from_queue(first, end, view):
                pass
        return content

    def _from_queue(self, first: int, end: int, destination: memoryview) -> Iterator[tuple[int, int]]:
        """Copies what waits to be written to `[first, end)`, and yields where that is, in order; the lock is held."""
        for chunk in sorted(self._queue.overlapping(first, end), key=lambda chunk: chunk.offset):
            position = chunk.offset
            for view in chunk.views:
                begin, stop = max(position, first), min(position + len(view), end)
                if begin < stop:
                    destination[begin - first : stop - first] = view[begin - position : stop - position]
                position += len(view)
            yield max(chunk.offset, first), min(chunk.end, end)

    def _damage(self, first: int, end: int, found: int, value: int) -> StorageError:
        return StorageError(
            f"{end - first} B at offset {first} B of {self._queue.target.label} are not what was written there: their "
            f"{NAME} is {found:#x}, and it was {value:#x}. They are not used. Check the disk (dmesg, smartctl), "
            "choose another swap_dir, and load the model anew"
        )


def _part(read: Read, first: int, end: int) -> Read:
    begin = first - read.offset_bytes
    return Read(
        file=read.file,
        offset_bytes=first,
        size_bytes=end - first,
        destination=read.destination[begin : begin + end - first],
    )


def _covers(parts: Sequence[tuple[int, memoryview]], first: int, end: int) -> bool:
    """Returns whether these parts, each with its offset, have all of `[first, end)`."""
    for offset, view in sorted(parts, key=lambda part: part[0]):
        if offset <= first:
            first = max(first, offset + len(view))
    return first >= end

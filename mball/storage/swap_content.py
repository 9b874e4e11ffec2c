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
from mball.storage.extents import BLOCK_BYTES, BlockState, ExtentMap, Span, SwapExtent, without
from mball.storage.pending import PendingChunks
from mball.storage.reader import Read
from mball.storage.write_queue import WriteQueue
from mball.storage.writes import WriteChunk


class BlockSum(NamedTuple):
    """What the checksum of a block was when a read began; `on_disk` says whether nothing of it was queued."""

    extent: SwapExtent
    block: int
    value: int | None  # None: it could not be read
    on_disk: bool


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
            position = first
            for chunk_first, chunk_end in self._from_queue(first, end, destination):
                left.append(_part(read, position, chunk_first))
                position = chunk_end
                self.hit_bytes += chunk_end - chunk_first
            left.append(_part(read, position, end))
            left = [part for part in left if part.size_bytes]
            sums = list(self._sums(left))
            self.read_bytes += read.size_bytes
            self.num_reads += 1
        return left, sums

    def check(self, read: Read, sums: Sequence[BlockSum]) -> None:
        """Holds what a read brought against the sums of when it began. What was written since is not looked at.

        Raises:
            StorageError: something else was written; it names file, offset and both sums.
        """
        end = read.offset_bytes + read.size_bytes
        for extent, block, value, on_disk in sums:
            block_first, block_end = extent.bounds(block)
            if value is None:
                raise self._refusal(block_first, block_end)
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
                is_gone = self._extents.find(extent.start) is not extent
                if is_gone or extent.sums[block] != value or extent.states[block] == BlockState.QUEUED:
                    continue  # freed, or written anew since the read began
                if extent.states[block] == BlockState.FAILED:
                    raise self._refusal(block_first, block_end)
                if found != value:
                    raise self._damage(block_first, block_end, found, value)
                self.checked_bytes += block_end - block_first
                if on_disk:
                    extent.states[block] = BlockState.READ_BACK

    def verify(self, first: int, end: int, *, again: bool) -> None:
        """Reads the blocks of `[first, end)` and holds them against their sums, for who reads them by a mapping.

        Args:
            first, end: bytes of the file.
            again: whether also those that were right before, in whatever mode.

        Raises:
            StorageError: as `check`.
        """
        with self._queue.lock:
            self._queue.settle(first, end)  # a mapping knows nothing of what is in memory
            extents = list(self._extents.overlapping(first, end))
        for extent in extents:
            for block in extent.blocks(max(first, extent.start), min(end, extent.end)):
                block_first, block_end = extent.bounds(block)
                with self._queue.lock:
                    if extent.states[block] == BlockState.FAILED:
                        raise self._refusal(block_first, block_end)
                    if self._mode is SwapCheck.OFF or extent.states[block] in self._trusted(again=again):
                        continue
                    value, content = extent.sums[block], self._bytes(block_first, block_end)
                if (found := checksum(content)) != value:
                    raise self._damage(block_first, block_end, found, value)
                with self._queue.lock:
                    self.checked_bytes += block_end - block_first
                    if extent.states[block] == BlockState.WRITTEN and extent.sums[block] == value:
                        extent.states[block] = BlockState.READ_BACK

    def hand_over(self, chunks: Sequence[WriteChunk]) -> PendingChunks:
        """Has chunks written; the lock is held, and nothing that waits is where they go.

        Blocks that a chunk fills are summed by who writes it, since only then their bytes are looked at anyway. Of the
        others the sum is made now, of these parts and what they are to be among.

        Raises:
            StorageError: the rest of such a block is damaged, and a new sum would vouch for it; or no thread can be
                started. Nothing is written.
        """
        self._queue.start()
        parts: dict[tuple[SwapExtent, int], list[WriteChunk]] = defaultdict(list)
        for chunk in chunks:
            touched, filled = chunk.extent.blocks(chunk.offset, chunk.end), chunk.filled
            for block in {touched[0], touched[-1]}.difference(filled):
                parts[chunk.extent, block].append(chunk)
        known = [(extent, block, *self._sum_with(extent, block, some)) for (extent, block), some in parts.items()]
        # An interrupt from here on leaves blocks of which nobody knows what they hold.
        for chunk in chunks:
            chunk.extent.mark(chunk.extent.blocks(chunk.offset, chunk.end), BlockState.FAILED)
        handle = self._queue.put(chunks)
        for chunk in chunks:
            chunk.extent.mark(chunk.filled, BlockState.QUEUED)
        for extent, block, sums, left in known:
            if left:
                extent.failed[block] = left
            else:
                extent.written(range(block, block + 1), sums)
        return handle

    def _sum_with(
        self, extent: SwapExtent, block: int, chunks: Sequence[WriteChunk]
    ) -> tuple[array[int] | None, list[Span]]:
        """Returns the sum of a block after these chunks are written, and what failed writes still leave in it."""
        first, end = extent.bounds(block)
        spans = [(chunk.offset, chunk.end) for chunk in chunks]
        left = without(extent.left(block), spans)
        if self._mode is SwapCheck.OFF or left:
            return None, left
        if not without([(first, end)], spans):
            content = bytearray(end - first)
        else:
            content = self._bytes(first, end)
            if extent.states[block] in (BlockState.WRITTEN, BlockState.READ_BACK):
                found = checksum(content)
                if found != extent.sums[block]:
                    raise self._damage(first, end, found, extent.sums[block])
        with memoryview(content) as view:
            for chunk in chunks:
                chunk.copy(first, end, view)
        return array("Q", [checksum(content)]), []

    def _trusted(self, *, again: bool) -> tuple[BlockState, ...]:
        """Returns the states of blocks that are not held against their sums; `again` if not for having been right."""
        if again or self._mode is SwapCheck.ALWAYS:
            return BlockState.UNKNOWN, BlockState.QUEUED
        return BlockState.UNKNOWN, BlockState.QUEUED, BlockState.READ_BACK

    def _sums(self, left: Sequence[Read]) -> Iterator[BlockSum]:
        """Yields what to hold against its sum of what comes from the file."""
        if not left:
            return
        trusted = self._trusted(again=False)
        # Also what is beside the read, in blocks that it has part of.
        queued = self._queue.overlapping(
            left[0].offset_bytes - BLOCK_BYTES, left[-1].offset_bytes + left[-1].size_bytes + BLOCK_BYTES
        )
        last = None  # a block may be in two parts of the read
        for part in left:
            first, end = part.offset_bytes, part.offset_bytes + part.size_bytes
            for extent in self._extents.overlapping(first, end):
                for block in extent.blocks(max(first, extent.start), min(end, extent.end)):
                    state = extent.states[block]
                    if state in trusted or (extent, block) == last:
                        continue
                    last = extent, block
                    begin, stop = extent.bounds(block)
                    on_disk = not any(chunk.offset < stop and begin < chunk.end for chunk in queued)
                    yield BlockSum(extent, block, None if state == BlockState.FAILED else extent.sums[block], on_disk)

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
            chunk.copy(first, end, destination)
            yield max(chunk.offset, first), min(chunk.end, end)

    def _refusal(self, first: int, end: int) -> StorageError:
        return StorageError(
            f"{end - first} B at offset {first} B of {self._queue.target.label} cannot be read: writing them failed. "
            "Write them again"
        )

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

"""Which bytes of the swap file are whose, and what their content should be. Knows no file: all of it is bookkeeping."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from enum import IntEnum

from mball.units import PAGE_BYTES, round_up

# What has one checksum: long enough that hashing is fast, short enough that a read of some pages drags little along.
BLOCK_BYTES = 16 * PAGE_BYTES

# Bytes `[first, end)` of the file.
Span = tuple[int, int]


class BlockState(IntEnum):
    """What is known of a block."""

    UNKNOWN = 0  # nothing was written there, or nobody wants sums
    WRITTEN = 1  # nobody has read it back yet
    READ_BACK = 2  # it was read, and it was right
    FAILED = 3  # a write failed: it may be old, new, or part of each
    QUEUED = 4  # all of it waits to be written, and is summed then


class SwapExtent:
    """Whole pages `[start, end)` of the swap file that were allocated together, with a checksum for each block.

    Blocks end at multiples of `BLOCK_BYTES` of the file, as requests do; the first and the last one may be shorter.
    """

    __slots__ = ("end", "failed", "start", "states", "sums")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        num_blocks = len(self.blocks(start, end))
        self.sums = array("Q", bytes(8 * num_blocks))
        self.states = bytearray(num_blocks)
        # Of blocks that failed, which bytes of the file have to be written anew before they can be read; all of those
        # that are not here.
        self.failed: dict[int, list[Span]] = {}

    def blocks(self, first: int, end: int) -> range:
        """Returns the blocks that bytes `[first, end)` of the file touch."""
        number = self.start // BLOCK_BYTES
        return range(first // BLOCK_BYTES - number, -(-end // BLOCK_BYTES) - number)

    def filled(self, first: int, end: int) -> range:
        """Returns the blocks that bytes `[first, end)` of the file have all of."""
        touched = self.blocks(first, end)
        return range(
            touched.start + (self.bounds(touched.start)[0] < first),
            touched.stop - (self.bounds(touched.stop - 1)[1] > end),
        )

    def bounds(self, block: int) -> tuple[int, int]:
        """Returns where in the file a block is."""
        first = (self.start // BLOCK_BYTES + block) * BLOCK_BYTES
        return max(first, self.start), min(first + BLOCK_BYTES, self.end)

    def cuts(self, blocks: range) -> list[int]:
        """Returns where in the file these blocks begin, and where the last one ends; nothing if there are none."""
        if not blocks:
            return []
        first, end = self.bounds(blocks[0])[0], self.bounds(blocks[-1])[1]
        return [first, *range(first - first % BLOCK_BYTES + BLOCK_BYTES, end, BLOCK_BYTES), end]

    def mark(self, blocks: range, state: BlockState) -> None:
        """Says what is known of all of these blocks."""
        self.states[blocks.start : blocks.stop] = bytes([state]) * len(blocks)
        if self.failed:
            for block in blocks:
                self.failed.pop(block, None)

    def written(self, blocks: range, sums: array[int] | None) -> None:
        """Notes that these blocks were written, with these sums; None where nobody wants them."""
        if sums is not None:
            self.sums[blocks.start : blocks.stop] = sums
        self.mark(blocks, BlockState.UNKNOWN if sums is None else BlockState.WRITTEN)

    def fail(self, first: int, end: int) -> None:
        """Notes that a write of bytes `[first, end)` of the file failed."""
        for block in self.blocks(first, end):
            begin, stop = self.bounds(block)
            self.failed[block] = [*self.left(block), (max(begin, first), min(stop, end))]
            self.states[block] = BlockState.FAILED

    def left(self, block: int) -> list[Span]:
        """Returns which bytes of the file failed writes left in a block; none where it did not fail."""
        if self.states[block] != BlockState.FAILED:
            return []
        return self.failed.get(block, [self.bounds(block)])


class ExtentMap:
    """Extents of one file, and the holes between them.

    An extent goes into the smallest hole that holds it (best fit), holes that touch are one, and only where no hole
    holds it the file grows. Offsets and sizes are multiples of the page. Not locked.

    Statements are in such an order that an interrupt between any two may lose a hole, but gives no byte away twice.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._extents: dict[int, SwapExtent] = {}
        self._hole_ends: dict[int, int] = {}
        self._hole_starts: dict[int, int] = {}  # by end
        self._by_size: list[tuple[int, int]] = []
        self._end = 0
        self._used_bytes = 0

    @property
    def end(self) -> int:
        """The bytes of the file."""
        return self._end

    @property
    def used_bytes(self) -> int:
        """The bytes of all extents."""
        return self._used_bytes

    def __iter__(self) -> Iterator[SwapExtent]:
        return (self._extents[start] for start in self._starts)

    def holes(self) -> Iterator[tuple[int, int]]:
        """Yields what lies between extents."""
        yield from self._hole_ends.items()

    def end_with(self, size: int) -> int:
        """Returns what `end` would be after `allocate(size)`."""
        if self._fits(size) is not None:
            return self._end
        return self._hole_starts.get(self._end, self._end) + size

    def allocate(self, size: int) -> SwapExtent:
        """Returns a new extent of `size` > 0 bytes; `end` may be larger afterwards."""
        number = self._fits(size)
        # A hole at the end of the file is the beginning of what grows there.
        hole = self._hole_starts.get(self._end, self._end) if number is None else self._by_size[number][1]
        hole_end = self._hole_ends.get(hole, hole)
        if hole_end > hole:
            self._drop_hole(hole)
        extent = SwapExtent(hole, hole + size)
        if extent.end < hole_end:
            self._add_hole(extent.end, hole_end)
        self._end = max(self._end, extent.end)
        self._extents[extent.start] = extent
        insort(self._starts, extent.start)
        self._used_bytes += size
        return extent

    def free(self, extent: SwapExtent) -> None:
        """Makes an extent a hole."""
        del self._starts[bisect_left(self._starts, extent.start)]
        del self._extents[extent.start]
        self._used_bytes -= extent.end - extent.start
        first, end = extent.start, extent.end
        if (before := self._hole_starts.get(first)) is not None:
            self._drop_hole(before)
            first = before
        if (after := self._hole_ends.get(end)) is not None:
            self._drop_hole(end)
            end = after
        self._add_hole(first, end)

    def trim(self) -> int:
        """Forgets the hole at the end, if there is one; returns `end`."""
        last = self._hole_starts.get(self._end)
        if last is not None:
            self._drop_hole(last)
            self._end = last
        return self._end

    def find(self, offset: int) -> SwapExtent | None:
        """Returns the extent that byte `offset` of the file belongs to."""
        number = bisect_right(self._starts, offset) - 1
        if number < 0:
            return None
        extent = self._extents[self._starts[number]]
        return extent if offset < extent.end else None

    def overlapping(self, first: int, end: int) -> Iterator[SwapExtent]:
        """Yields the extents that bytes `[first, end)` touch, in order."""
        number = max(bisect_right(self._starts, first) - 1, 0)
        for start in self._starts[number : bisect_left(self._starts, end)]:
            if self._extents[start].end > first:
                yield self._extents[start]

    def _fits(self, size: int) -> int | None:
        number = bisect_left(self._by_size, (size, 0))
        return number if number < len(self._by_size) else None

    def _add_hole(self, first: int, end: int) -> None:
        self._hole_ends[first] = end
        self._hole_starts[end] = first
        insort(self._by_size, (end - first, first))

    def _drop_hole(self, first: int) -> None:
        hole = (self._hole_ends[first] - first, first)
        number = bisect_left(self._by_size, hole)
        if self._by_size[number : number + 1] == [hole]:
            del self._by_size[number]
        del self._hole_starts[self._hole_ends.pop(first)]


def without(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """Returns what is in some of `spans` and in none of `others`."""
    left = list(spans)
    for first, end in others:
        parts = [part for begin, stop in left for part in ((begin, min(stop, first)), (max(begin, end), stop))]
        left = [(begin, stop) for begin, stop in parts if begin < stop]
    return left


def whole_pages(size: int) -> int:
    """Returns `size` bytes, rounded up to pages."""
    return round_up(size, PAGE_BYTES)

"""Which stretches of files have their bytes in pinned memory, where copies take them from."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from mball.memory.pinned import PinnedSlab


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedRange:
    """Bytes `[offset_bytes, offset_bytes + size_bytes)` of `file`, at `slab_offset_bytes` of a slab."""

    file: str
    offset_bytes: int
    size_bytes: int
    slab: PinnedSlab
    slab_offset_bytes: int

    @property
    def end_bytes(self) -> int:
        """Where in the file they end."""
        return self.offset_bytes + self.size_bytes


class PinnedHomes:
    """The homes in host memory, by the stretch of a file that plans know them by. Not thread-safe.

    Stretches may overlap, but none is a part of another: so the ends come in the order of the beginnings.
    """

    def __init__(self) -> None:
        self._ranges: dict[str, list[PinnedRange]] = {}  # by file, in order

    def put(self, home: PinnedRange) -> None:
        """Says that these bytes are in a slab from now on; not all of them were, and no part of them is there."""
        assert self.find(home.file, home.offset_bytes, home.size_bytes) is None, home
        assert not self.parts_of(home), home
        ranges = self._ranges.setdefault(home.file, [])
        ranges.insert(bisect_right(ranges, home.offset_bytes, key=lambda other: other.offset_bytes), home)

    def parts_of(self, home: PinnedRange) -> list[PinnedRange]:
        """Returns what is a part of these bytes: to be removed before they are put."""
        ranges = self._ranges.get(home.file, [])
        first, end = home.offset_bytes, home.end_bytes
        return [other for other in ranges if first <= other.offset_bytes and other.end_bytes <= end]

    def remove(self, home: PinnedRange) -> None:
        """Says that they are not any more: they are read from the file again. Idempotent."""
        ranges = self._ranges.get(home.file, [])
        if home in ranges:
            ranges.remove(home)

    def all(self) -> list[PinnedRange]:
        """Returns all that there is."""
        return [home for ranges in self._ranges.values() for home in ranges]

    def find(self, file: str, offset_bytes: int, size_bytes: int) -> tuple[PinnedSlab, int] | None:
        """Returns the slab that has all of these bytes, and where in it; None if there is none."""
        ranges = self._ranges.get(file, [])
        place = bisect_right(ranges, offset_bytes, key=lambda other: other.offset_bytes)
        for home in ranges[max(place - 1, 0) : place]:
            if offset_bytes + size_bytes <= home.end_bytes:
                return home.slab, home.slab_offset_bytes + offset_bytes - home.offset_bytes
        return None

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


class PinnedHomes:
    """The homes in host memory, by the stretch of a file that plans know them by. Not thread-safe."""

    def __init__(self) -> None:
        self._ranges: dict[str, list[PinnedRange]] = {}  # by file, in order

    def put(self, home: PinnedRange) -> None:
        """Says that these bytes are in a slab from now on; nothing of them was before."""
        ranges = self._ranges.setdefault(home.file, [])
        place = bisect_right(ranges, home.offset_bytes, key=lambda other: other.offset_bytes)
        before, after = ranges[max(place - 1, 0) : place], ranges[place : place + 1]
        assert all(other.offset_bytes + other.size_bytes <= home.offset_bytes for other in before), home
        assert all(home.offset_bytes + home.size_bytes <= other.offset_bytes for other in after), home
        ranges.insert(place, home)

    def remove(self, home: PinnedRange) -> None:
        """Says that they are not any more: they are read from the file again."""
        self._ranges[home.file].remove(home)

    def find(self, file: str, offset_bytes: int, size_bytes: int) -> tuple[PinnedSlab, int] | None:
        """Returns the slab that has all of these bytes, and where in it; None if there is none."""
        ranges = self._ranges.get(file, [])
        place = bisect_right(ranges, offset_bytes, key=lambda other: other.offset_bytes)
        for home in ranges[max(place - 1, 0) : place]:
            if offset_bytes + size_bytes <= home.offset_bytes + home.size_bytes:
                return home.slab, home.slab_offset_bytes + offset_bytes - home.offset_bytes
        return None

    def is_pinned(self, address: int, size_bytes: int) -> bool:
        """Returns whether a GPU may read `[address, address + size_bytes)`: a home has it that is pinned by now."""
        return any(
            (offset := address - home.slab.address - home.slab_offset_bytes) >= 0
            and offset + size_bytes <= home.size_bytes
            and home.slab_offset_bytes + offset + size_bytes <= home.slab.pinned_bytes
            for ranges in self._ranges.values()
            for home in ranges
        )

"""Extents of an arena on offer to segments: memory of weights for compute that finds none.

[Note: one owner] An extent that is on offer is the arena's, and may be the segments' at any moment, on any thread. So
who uses one withdraws it first, and only a withdrawal says for certain whose it is. The books are written before each
call and struck when all that follows from it is done: after an interrupt `withdraw` does the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mball.memory.allocator.records import Offer
from mball.memory.allocator.segment_allocator import SegmentAllocator
from mball.memory.arena import Arena
from mball.memory.cuda_events import StreamEvent
from mball.memory.cuda_virtual import CudaMemory, Piece
from mball.memory.device import Event, Extent
from mball.memory.page_pool import Page


@dataclass(slots=True, kw_only=True)
class _Donor:
    """An extent on offer. The event is kept for as long as the library looks at it."""

    piece: Piece
    after: Event
    offer: Offer = field(default_factory=Offer)


class CudaDonors:
    """What segments may take of one arena. One thread at a time; whoever takes is on any."""

    def __init__(self, segments: SegmentAllocator, memory: CudaMemory, arena: Arena) -> None:
        self._segments = segments
        self._memory = memory
        self._arena = arena
        self._pieces: dict[Extent, Piece] = {}
        self._donors: dict[Extent, _Donor] = {}
        self._generation = segments.generation
        self._taken_bytes = 0
        self._taken_before_bytes = 0  # before what is on offer was

    @property
    def taken_bytes(self) -> int:
        return self._taken_bytes

    @property
    def has_lost(self) -> bool:
        return bool(self._donors) and self._segments.generation != self._generation

    def extents(self) -> Sequence[Extent]:
        found = self._memory.extents(self._arena.reservation)
        self._pieces = {Extent(piece.offset, piece.offset + piece.size_bytes): piece for piece in found}
        return list(self._pieces)

    def is_offered(self, extent: Extent) -> bool:
        return extent in self._donors

    def offer(self, extents: Iterable[Extent], after: Event) -> None:
        event = after.handle if isinstance(after, StreamEvent) else None
        if event is None and not after.done():
            return
        if not self._donors:
            self._generation, self._taken_before_bytes = self._segments.generation, self._taken_bytes
        for extent in extents:
            piece = self._pieces[extent]
            donor = self._donors[extent] = _Donor(piece=piece, after=after)
            page = Page(piece.handle, piece.size_bytes)
            self._segments.offer(self._arena.address + piece.offset, page, event or 0, note=donor.offer)

    def withdraw(self, first: int = 0, end: int | None = None) -> None:
        if not self._donors:
            return
        chosen = {
            extent: donor
            for extent, donor in self._donors.items()
            if (end is None or extent.first < end) and first < extent.end
        }
        if self.has_lost or self._end(chosen.values()):
            chosen = dict(self._donors)
            self._end(chosen.values())
        taken = [donor.piece for donor in chosen.values() if donor.offer.is_taken]
        if taken:
            self._memory.lose(self._arena.reservation, taken)
            self._arena.lose(min(piece.offset for piece in taken))
            self._taken_bytes = self._taken_before_bytes + sum(piece.size_bytes for piece in taken)
        # At once: what is done again is done for all of them.
        self._donors = {extent: donor for extent, donor in self._donors.items() if extent not in chosen}

    def _end(self, donors: Iterable[_Donor]) -> bool:
        """Ends these offers, or those that an interrupt left; returns whether one was taken."""
        found = list(donors)
        for donor in found:
            if donor.offer.is_open:
                self._segments.withdraw(donor.offer.number, note=donor.offer)
        return any(donor.offer.is_taken for donor in found)

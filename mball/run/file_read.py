"""What the engine asks a device to copy: a stretch of a file, to a place in the arena."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from mball.run.homes import Piece
from mball.storage import Read


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRead:
    """An `ArenaRead` for devices that read with a `Reader`: bytes `[offset, offset + size)` of a file."""

    file: str
    offset_bytes: int
    size_bytes: int
    arena_offset_bytes: int

    @classmethod
    def of(cls, piece: Piece, offset_bytes: int) -> Self:
        """Returns what brings a piece of an extent that begins at `offset_bytes` of the arena."""
        return cls(
            file=piece.file,
            offset_bytes=piece.offset_bytes,
            size_bytes=piece.size_bytes,
            arena_offset_bytes=offset_bytes + piece.shift_bytes,
        )

    def into(self, destination: memoryview, first: int = 0) -> Read:
        return Read(
            file=self.file,
            offset_bytes=self.offset_bytes + first,
            size_bytes=destination.nbytes,
            destination=destination,
        )

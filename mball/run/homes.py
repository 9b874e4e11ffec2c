"""Homes: where the authoritative bytes of every weight are, and how writes to them are noticed.

[Note: homes on the CPU device]
A home is a private mapping of a file: the checkpoint, or the swap file. The Parameter's data is that mapping,
so reading it gives the right values at any time, and it costs no memory until somebody does. A write through it,
by whatever means, makes the kernel copy the page, and that is how it is noticed: at the start of a pass the mapped
pages that are anonymous are the ones that were written. They are saved to the swap file and the mapping
is pointed there, so a written home stops holding memory, and the streamed bytes come from the new place.
"""

from __future__ import annotations

import ctypes
import logging
from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from mball.errors import CheckpointError
from mball.memory.mapping import PrivateMapping
from mball.schema import Extent, Tensor, Treatment
from mball.storage import SwapFile, Write
from mball.torch_private.tensors import storage_key
from mball.units import PAGE_BYTES, round_down, round_up

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Home:
    """One weight's home.

    Attributes:
        tensor: shares memory with the home; its dtype, shape and strides are the weight's.
        span_bytes: bytes from the first element to the end of the last.
    """

    name: str
    tensor: torch.Tensor
    file: str
    offset_bytes: int
    span_bytes: int

    def schema(self) -> Tensor:
        """Returns the home as the trace describes it: it is mapped, so its rows can be read where it lies."""
        weight = Tensor.weight(
            self.name,
            dtype=str(self.tensor.dtype).removeprefix("torch."),
            shape=tuple(self.tensor.shape),
            size_bytes=self.span_bytes,
            file=self.file,
            offset_bytes=self.offset_bytes,
        )
        return replace(weight, may=(*weight.may, Treatment.GATHER))


def refuse_misaligned(homes: Sequence[Home], place: torch.device) -> None:
    """Refuses weights that a GPU cannot read, because slots keep where in a page they begin.

    Raises:
        CheckpointError: one begins within an element.
    """
    for home in homes:
        if place.type != "cpu" and home.offset_bytes % home.tensor.element_size():
            raise CheckpointError(
                f"weight {home.name!r} begins at byte {home.offset_bytes} of {home.file}, which is no multiple of its "
                f"{home.tensor.element_size()} bytes an element, so a GPU cannot read it in place: load the model and "
                "wrap it without weights="
            )


@dataclass(slots=True, kw_only=True)
class _Moved:
    """Pages `[first, end)` of a home file whose current bytes are in the swap file at `swap_offset`."""

    first: int
    end: int
    swap_offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of an extent: `[offset, offset + size)` of `file`, to `shift_bytes` after the extent's start."""

    file: str
    offset_bytes: int
    size_bytes: int
    shift_bytes: int


class HomeFile:
    """A mapped file that holds homes.

    Args:
        name: the file's name in plans and in the table of open files.
        mapping: private mapping that begins at file offset `mapped_from` (a multiple of the page).
        swap: takes the pages that are written; may be the very file that is mapped.
        is_swap: whether the mapped file is that swap file.
    """

    def __init__(self, name: str, mapping: PrivateMapping, mapped_from: int, swap: SwapFile, *, is_swap: bool) -> None:
        self.name = name
        self.mapping = mapping
        self.mapped_from = mapped_from
        self.swap = swap
        self.is_swap = is_swap
        self._moved: list[_Moved] = []

    def settle(self) -> list[tuple[int, int]]:
        """Saves written pages to the swap file; returns them as file ranges `[first, end)`.

        When saving fails the pages stay as they are, written and found again by the next call.

        Raises:
            StorageError: the swap file cannot take them.
        """
        # A list, since settling changes what the pieces are made from.
        pieces = [
            piece
            for first, end in self.mapping.written()
            for piece in self._pieces(first + self.mapped_from, end + self.mapped_from)
        ]
        if pieces:
            self._settle(pieces)
        return [(first, end) for first, end, _ in pieces]

    def unwritten(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Yields the parts of `[first, end)` of the file whose pages nobody has written to since they were settled."""
        for begin, stop in self.mapping.written():
            begin, stop = begin + self.mapped_from, stop + self.mapped_from
            if first < begin:
                yield first, min(begin, end)
            first = max(first, stop)
            if first >= end:
                return
        yield first, end

    def _settle(self, pieces: Sequence[tuple[int, int, int | None]]) -> None:
        new_bytes = sum(end - first for first, end, offset in pieces if offset is None)
        start = self.swap.allocate(new_bytes)
        try:
            placed, offset = [], start
            for first, end, swap_offset in pieces:
                placed.append((first, end, offset if swap_offset is None else swap_offset))
                offset += end - first if swap_offset is None else 0
            self.swap.write_all([Write(offset_bytes=place, source=self._content(f, e)) for f, e, place in placed])
            # In this order an interrupt loses nothing: until the mapping is replaced the pages count as written.
            for (first, end, known), (_, _, place) in zip(pieces, placed, strict=True):
                if known is None:
                    insort(self._moved, _Moved(first=first, end=end, swap_offset=place), key=lambda moved: moved.first)
        except BaseException:
            if new_bytes and not any(start <= moved.swap_offset < start + new_bytes for moved in self._moved):
                self.swap.free(start)
            raise
        for (first, end, _), (_, _, place) in zip(pieces, placed, strict=True):
            if self.is_swap:  # the very place that is mapped
                self.mapping.drop_written(first - self.mapped_from, end - self.mapped_from)
            else:
                self.mapping.replace(first - self.mapped_from, end - self.mapped_from, self.swap.fd, place)

    def _content(self, first: int, end: int) -> memoryview:
        address = self.mapping.address + first - self.mapped_from
        return memoryview((ctypes.c_char * (end - first)).from_address(address)).cast("B")

    def _pieces(self, first: int, end: int) -> Iterator[tuple[int, int, int | None]]:
        """Yields `[first, end)` split by where its current bytes are: a swap offset, or None for this file."""
        if self.is_swap:
            yield first, end, first
            return
        for number in range(bisect_right(self._moved, first, key=lambda moved: moved.end), len(self._moved)):
            moved = self._moved[number]
            if moved.first >= end:
                break
            if first < moved.first:
                yield first, moved.first, None
            upto = min(end, moved.end)
            begin = max(first, moved.first)
            yield begin, upto, moved.swap_offset + begin - moved.first
            first = upto
        if first < end:
            yield first, end, None

    def resolve(self, extent: Extent) -> list[Piece]:
        """Returns the reads that bring the extent's current bytes; both of its ends are aligned."""
        if not self._moved:
            return [Piece(extent.file, extent.offset_bytes, extent.size_bytes, 0)]
        pieces = []
        for first, end, swap_offset in self._pieces(extent.offset_bytes, extent.offset_bytes + extent.size_bytes):
            shift = first - extent.offset_bytes
            file, offset = (extent.file, first) if swap_offset is None else (self.swap.name, swap_offset)
            pieces.append(Piece(file, offset, end - first, shift))
        return pieces

    def verify(self, first: int, end: int, *, again: bool = True) -> None:
        """Holds what the swap file has of pages `[first, end)` of the file against its checksums.

        Args:
            first, end: bytes of the file, multiples of the page, of which nothing was written to since it was settled.
            again: whether also what was right when it was read before; see `SwapFile.verify`.

        Raises:
            StorageError: something else was written there.
        """
        if self.is_swap or self._moved:
            extent = Extent(file=self.name, offset_bytes=first, size_bytes=end - first, slot_offset_bytes=0)
            for piece in self.resolve(extent):
                if piece.file == self.swap.name:
                    self.swap.verify(piece.offset_bytes, piece.size_bytes, again=again)


class Homes:
    """All homes of one engine, in the order of its weights."""

    def __init__(self, homes: Sequence[Home], files: Sequence[HomeFile], swap: SwapFile) -> None:
        self.homes: list[Home] = []
        self.files: list[HomeFile] = []
        self.swap = swap
        # Whether the user's Parameters require grad: kernels are chosen by it, with autograd off too.
        self.requires_grad: list[bool] = []
        self.weight_of_storage: dict[int, int] = {}
        self._closed = False
        self._spans: list[list[tuple[int, int, int]]] = []
        self._file_of: dict[str, HomeFile] = {}
        self._file_of_weight: list[HomeFile] = []
        self.add(homes, files)

    def __len__(self) -> int:
        return len(self.homes)

    def add(self, homes: Sequence[Home], files: Sequence[HomeFile]) -> None:
        """Adds homes after those that are there, and the mapped files that hold them.

        Parts of one file may be mapped one after another, each a HomeFile, if it is the swap file.
        """
        start = len(self.homes)
        self.homes += homes
        self.requires_grad += [False] * len(homes)
        for index, home in enumerate(homes, start):
            self.weight_of_storage[storage_key(home.tensor)] = index
        given = {file.name: file for file in files}
        self._file_of_weight += [given[home.file] for home in homes]
        for file in files:
            self.files.append(file)
            self._file_of.setdefault(file.name, file)
            held = [(index, home) for index, home in enumerate(homes, start) if home.file == file.name]
            self._spans.append(
                sorted((home.offset_bytes, home.offset_bytes + home.span_bytes, index) for index, home in held)
            )

    def has(self, tensor: torch.Tensor) -> bool:
        """Returns whether a plain tensor is a home, or a view of one; none is once they are closed."""
        return not self._closed and storage_key(tensor) in self.weight_of_storage

    def schema(self) -> tuple[Tensor, ...]:
        """Returns all homes as the trace describes them."""
        return tuple(home.schema() for home in self.homes)

    def collect_writes(self) -> set[int]:
        """Saves what was written since the last call; returns the weights whose pages were written.

        Also gives back pages that somebody read through a home: they are the file's and need not stay.

        Raises:
            StorageError: the swap file cannot take the written pages; nothing is lost, the next call tries again.
        """
        written: set[int] = set()
        for file, spans in zip(self.files, self._spans, strict=True):
            for first, end in file.settle():
                written.update(i for low, high, i in spans if low < end and first < high)
            file.mapping.drop_clean()
        if written:
            logger.info("%d written weights were saved to the swap file", len(written))
        return written

    def touched_bytes(self) -> int:
        """Returns the bytes of homes that somebody read in place since the last `collect_writes`."""
        return sum(file.mapping.touched_bytes() for file in self.files)

    def look_up(self, weight: int) -> torch.Tensor:
        """Returns the home of a weight of which rows will be read in place; then call `give_back`."""
        file, first, end = self._pages_of(weight)
        file.mapping.read_sparsely(first, end)
        return self.homes[weight].tensor

    def prefetch_rows(self, weight: int, indices: torch.Tensor) -> int:
        """Has these rows of a home read at once, before somebody waits for one after another; returns their bytes.

        What the swap file has of their pages is held against its checksums, as `SwapCheck` says: mostly the first time.

        Args:
            weight: whose rows lie one after another.
            indices: the numbers of the rows, in any order and shape, negative ones from the end. What is out of range
                is left out: whoever looks it up will say so.

        Raises:
            StorageError: something else was written there.
        """
        file, home = self._file_of_weight[weight], self.homes[weight]
        num_rows = home.tensor.shape[0]
        # Not by numpy: what it imports when it is first called would be taken for workspace of the step.
        rows = sorted({row % num_rows for row in indices.reshape(-1).tolist() if -num_rows <= row < num_rows})
        row_bytes = home.span_bytes // num_rows
        ranges: list[tuple[int, int]] = []
        for row in rows:
            begin = home.offset_bytes - file.mapped_from + row * row_bytes
            first, end = round_down(begin, PAGE_BYTES), round_up(begin + row_bytes, PAGE_BYTES)
            if ranges and first <= ranges[-1][1]:
                ranges[-1] = ranges[-1][0], end
            else:
                ranges.append((first, end))
        file.mapping.prefetch(ranges)
        for first, end in ranges:
            file.verify(first + file.mapped_from, end + file.mapped_from, again=False)
        return sum(end - first for first, end in ranges)

    def give_back(self, weight: int) -> int:
        """Gives back the pages of a home that were read in place; returns their bytes."""
        file, first, end = self._pages_of(weight)
        file.mapping.read_as_usual(first, end)
        return file.mapping.drop_clean(first, end)

    def _pages_of(self, weight: int) -> tuple[HomeFile, int, int]:
        """Returns the file of a home, and the pages of the mapping that hold it."""
        home = self.homes[weight]
        file = self._file_of_weight[weight]
        begin = home.offset_bytes - file.mapped_from
        return file, round_down(begin, PAGE_BYTES), round_up(begin + home.span_bytes, PAGE_BYTES)

    def reads(self, extents: Sequence[Extent]) -> Iterator[tuple[Extent, Piece]]:
        """Yields each extent with the pieces that bring its current bytes."""
        for extent in extents:
            for piece in self._file_of[extent.file].resolve(extent):
                yield extent, piece

    def pieces(self, weight: int) -> list[Piece]:
        """Returns where the current bytes of a weight are, in order."""
        home = self.homes[weight]
        extent = Extent(file=home.file, offset_bytes=home.offset_bytes, size_bytes=home.span_bytes, slot_offset_bytes=0)
        return self._file_of[home.file].resolve(extent)

    def verify(self, weight: int) -> None:
        """Holds what the swap file has of a home against its checksums, for who reads it in place.

        Not what was written to since: those pages are memory, also where they could not be saved.

        Raises:
            StorageError: something else was written there.
        """
        home = self.homes[weight]
        file = self._file_of[home.file]
        for first, end in file.unwritten(home.offset_bytes, home.offset_bytes + home.span_bytes):
            file.verify(first, end)

    def close(self) -> None:
        """Closes the swap file. Homes that somebody still holds stay readable. Idempotent."""
        self._closed = True
        self.swap.close()

"""Memory that a stretch of a file is read into, or mapped to, and tensors on it."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import torch

from mball.errors import DeviceError, StorageError
from mball.memory import HostMemory, PrivateMapping
from mball.memory.libc import PAGE_BYTES
from mball.memory.region import Region
from mball.memory.virtual import Reservation
from mball.storage import DirectIO, Read, TensorEntry
from mball.units import MIB, round_down, round_up

# Faulting in a piece takes a few milliseconds, in which the disk has the pieces before it to read.
PIECE_BYTES = 32 * MIB
# Below that pages are not worth a call.
_WORTH_BYTES = 64 << 10
# About what the kernel reads around a page that is touched: a gap of so much comes anyway.
_NEAR_BYTES = 64 << 10

_logger = logging.getLogger(__name__)


class TensorMemory(Protocol):
    """What tensors of a file lie on."""

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """Returns the tensor of an entry of that file, with a storage of its own."""

    def close(self) -> None:
        """Gives up this object's hold on the memory; tensors keep theirs. Idempotent."""


class OwnMemory:
    """Anonymous memory for bytes `[first, end)` of a file, of huge pages where the kernel has them.

    Each tensor on it gives its pages back when it is dropped, but for the two ends that it shares with its neighbours;
    those go with the last tensor.

    Raises:
        DeviceError: there is not so much memory.
    """

    def __init__(self, file: str, first: int, end: int) -> None:
        self._file = file
        # Direct reads need offset and address to agree: what is read too much stays in front of the first tensor.
        self._first = round_down(first, PAGE_BYTES)
        self.size_bytes = round_up(end - self._first, PAGE_BYTES)
        self._memory = HostMemory()
        self._reservation = self._memory.reserve(self.size_bytes)
        self._region = Region(
            self._reservation.address, self.size_bytes, partial(self._memory.release, self._reservation), what="memory"
        )
        self._memory.back(self._reservation, 0, self.size_bytes)

    def reads(self, mode: DirectIO, piece_bytes: int = PIECE_BYTES) -> Iterator[Read]:
        """Yields what fills the memory, in the order of the file.

        For direct reads the pages of a piece are there when it is yielded: faults that a request to the disk takes cost
        it half of the speed. Copies from the page cache fault pages in as they come to them, in the cache still.

        Raises DeviceError when memory runs out.
        """
        for begin in range(0, self.size_bytes, piece_bytes):
            size_bytes = min(piece_bytes, self.size_bytes - begin)
            if mode is not DirectIO.OFF:
                self._memory.populate(self._reservation, begin, begin + size_bytes)
            yield Read(
                file=self._file,
                offset_bytes=self._first + begin,
                size_bytes=size_bytes,
                destination=self._region.view(begin, size_bytes),
            )

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        dtype = getattr(torch, entry.dtype)
        if not entry.size_bytes:
            return torch.empty(entry.shape, dtype=dtype, device="cpu")
        begin = entry.offset_bytes - self._first
        end = begin + entry.size_bytes
        view = self._region.view(begin, entry.size_bytes)
        whole_first, whole_end = round_up(begin, PAGE_BYTES), round_down(end, PAGE_BYTES)
        if whole_end - whole_first >= _WORTH_BYTES:
            # The region goes last, or its pages would be given back after they are somebody else's.
            all_of_it = self._region.view(0, self.size_bytes)
            give_back = weakref.finalize(
                view, _give_back, self._memory, self._reservation, whole_first, whole_end, all_of_it
            )
            give_back.atexit = False
        with torch.inference_mode(False):
            return _aligned(torch.frombuffer(view, dtype=torch.uint8), begin, dtype).view(entry.shape)

    def close(self) -> None:
        self._region.close()


class MappedMemory:
    """The file itself: bytes `[first, end)` of it, mapped privately; see `PrivateMapping`.

    Raises:
        DeviceError: the file is shorter, or the kernel refuses.
        StorageError: of methods: pages that they touch cannot be read. Touched without asking they end the process.
    """

    def __init__(self, file: str, descriptor: int, first: int, end: int) -> None:
        self._file = file
        self._first = round_down(first, PAGE_BYTES)
        self._mapping = PrivateMapping(descriptor, self._first, end - self._first)

    def fill(self, piece_bytes: int = PIECE_BYTES) -> Iterator[int]:
        """Maps the pages that are in the page cache, and reads others; yields the bytes of a piece as it is there."""
        for begin in range(0, self._mapping.size_bytes, piece_bytes):
            end = min(begin + piece_bytes, self._mapping.size_bytes)
            self._populate(begin, end)
            yield end - begin

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        dtype = getattr(torch, entry.dtype)
        begin = entry.offset_bytes - self._first
        if begin % dtype.itemsize == 0:
            return self._mapping.tensor(begin, dtype, entry.shape)
        self._populate(begin, begin + entry.size_bytes)
        flat = self._mapping.tensor(begin, torch.uint8, (entry.size_bytes,))
        with torch.inference_mode(False):
            return _aligned(flat, begin, dtype).view(entry.shape)

    def part(self, entry: TensorEntry, index: Any) -> torch.Tensor:
        """Returns a copy of `tensor(entry)[index]`: kept, it holds neither the mapping nor the rest of the tensor.

        Reads the pages that it touches; of positions or a mask those of the rows that the first of them selects.
        """
        begin, whole = entry.offset_bytes - self._first, self.tensor(entry)
        for part in _touched(whole, index) if begin % whole.element_size() == 0 else ():
            for first, end in _stretches(part):
                self._populate(begin + first, begin + end)
        return whole[index].clone()

    def close(self) -> None:
        self._mapping.close()

    def _populate(self, begin: int, end: int) -> None:
        try:
            self._mapping.populate(round_down(begin, PAGE_BYTES), round_up(end, PAGE_BYTES))
        except DeviceError as error:
            first = self._first + begin
            raise StorageError(
                f"{end - begin} B at offset {first} of {self._file}, which is mapped, cannot be read: {error}"
            ) from error


def _touched(whole: torch.Tensor, index: Any) -> Iterator[torch.Tensor]:
    """Yields views of all that `whole[index]` reads, and reads nothing. Raises as torch for indices that do not fit."""
    places = index if isinstance(index, tuple) else (index,)
    first = places[0] if places else ...
    if all(place is None or place is Ellipsis or type(place) in (int, slice) for place in places):
        yield whole[index]
    elif first is None or first is Ellipsis or type(first) in (int, slice):
        yield whole[first]
    elif isinstance(first, list | tuple) and not all(isinstance(row, int) for row in first):
        # torch may take a list for a tuple of indices.
        yield whole
    else:
        try:
            rows = torch.arange(len(whole), device="cpu")[first].unique().tolist()
        except (IndexError, TypeError, RuntimeError):
            # A mask of more dimensions, or no index at all: torch says that of the tensor itself.
            yield whole
        else:
            for row in rows:
                yield whole[row]


def _stretches(part: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Yields the bytes `[first, end)` of its storage that a tensor lies on; what is near together as one."""
    if not part.numel():
        return
    length = item_bytes = part.element_size()
    steps: list[range] = []
    for stride, size in sorted(zip(part.stride(), part.shape, strict=True)):
        step_bytes = stride * item_bytes
        if not steps and step_bytes - length <= _NEAR_BYTES:
            length += (size - 1) * step_bytes
        elif size > 1:
            steps.append(range(0, size * step_bytes, step_bytes))
    start = int(part.storage_offset()) * item_bytes
    for offsets in itertools.product(*reversed(steps)):
        first = start + sum(offsets)
        yield first, first + length


def _aligned(flat: torch.Tensor, offset: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns bytes that lie at `offset` of a page as elements, a copy where their address does not suit the type."""
    return (flat.clone() if offset % dtype.itemsize else flat).view(dtype)


def _give_back(memory: HostMemory, reservation: Reservation, first: int, end: int, all_of_it: memoryview) -> None:
    try:
        memory.trim(reservation, first, end)
    except DeviceError as error:
        # Locked memory, say: it goes with the rest.
        _logger.debug("%s", error)
    finally:
        all_of_it.release()

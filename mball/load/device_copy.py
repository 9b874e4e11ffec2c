"""Tensors of a file to another device, through a few buffers of host memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mball.load.source import Advance, Settings
from mball.memory.libc import PAGE_BYTES
from mball.storage import Read, Reader, ReadHandle, TensorEntry
from mball.units import MIB, round_down, round_up

_BUFFER_BYTES = 16 * MIB


class _Buffer:
    """A page-aligned buffer, pinned for a GPU, and the event of the last copy out of it."""

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        # Pinned memory begins at a page, and PyTorch rounds it up to a power of two.
        spare_bytes = 0 if pinned else PAGE_BYTES
        whole = torch.empty(size_bytes + spare_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        lead = min(-whole.data_ptr() % PAGE_BYTES, spare_bytes)
        self.bytes = whole[lead : lead + size_bytes]
        self._copied = torch.cuda.Event() if pinned else None

    def view(self, size_bytes: int) -> memoryview:
        """Returns the first bytes, to be read into."""
        return memoryview(self.bytes[:size_bytes].numpy().data)

    def wait(self) -> None:
        """Blocks until it may be written again."""
        if self._copied is not None:
            self._copied.synchronize()

    def mark(self, device: torch.device) -> None:
        """Notes that copies out of it were begun."""
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flight:
    handle: ReadHandle
    buffer: _Buffer
    offset_bytes: int


def load_to_device(
    entries: Sequence[TensorEntry], reader: Reader, settings: Settings, advance: Advance
) -> dict[str, torch.Tensor]:
    """Returns the tensors of `entries`, which are of one file, in its order, and have bytes; each in memory of its own.

    Raises:
        StorageError: a read failed. Whatever is raised, no read is under way any more.
    """
    device = settings.device
    targets = [torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device=device) for entry in entries]
    flats = deque(
        (entry.offset_bytes, target.reshape(-1).view(torch.uint8))
        for entry, target in zip(entries, targets, strict=True)
    )
    chunks = list(_chunks(entries))
    num_buffers = min(len(chunks), max(2, settings.in_flight_bytes // _BUFFER_BYTES))
    free = deque(_Buffer(chunks[0][1], device) for _ in range(num_buffers))
    flights: deque[_Flight] = deque()

    def land() -> None:
        flight = flights.popleft()
        flight.handle.wait()
        _scatter(flight, flats)
        flight.buffer.mark(device)
        free.append(flight.buffer)
        advance(flight.handle.size_bytes)

    try:
        for offset_bytes, size_bytes in chunks:
            if not free:
                land()
            buffer = free.popleft()
            buffer.wait()
            destination = buffer.view(size_bytes)
            read = Read(file=entries[0].file, offset_bytes=offset_bytes, size_bytes=size_bytes, destination=destination)
            flights.append(_Flight(handle=reader.submit([read]), buffer=buffer, offset_bytes=offset_bytes))
        while flights:
            land()
        for buffer in free:
            buffer.wait()
    finally:
        reader.drain()
    return {entry.name: target for entry, target in zip(entries, targets, strict=True)}


def _chunks(entries: Sequence[TensorEntry]) -> Iterator[tuple[int, int]]:
    """Yields offset and size of whole pages that hold all entries; the first is the largest."""
    first = round_down(entries[0].offset_bytes, PAGE_BYTES)
    end = round_up(entries[-1].offset_bytes + entries[-1].size_bytes, PAGE_BYTES)
    for offset_bytes in range(first, end, _BUFFER_BYTES):
        yield offset_bytes, min(_BUFFER_BYTES, end - offset_bytes)


def _scatter(flight: _Flight, flats: deque[tuple[int, torch.Tensor]]) -> None:
    """Copies what a buffer holds of each tensor, and drops from `flats` those that are whole."""
    begin, end = flight.offset_bytes, flight.offset_bytes + len(flight.buffer.bytes)
    while flats:
        offset_bytes, flat = flats[0]
        first, last = max(begin, offset_bytes), min(end, offset_bytes + len(flat))
        if first < last:
            source = flight.buffer.bytes[first - begin : last - begin]
            flat[first - offset_bytes : last - offset_bytes].copy_(source, non_blocking=True)
        if offset_bytes + len(flat) > end:
            return
        flats.popleft()

"""Buffers that bytes pass through on their way to a GPU, used in turn."""

from __future__ import annotations

import abc
from dataclasses import dataclass

from mball.memory.cuda_events import EventPool
from mball.memory.device import ArenaRead, Event
from mball.memory.libc import PAGE_BYTES


@dataclass(slots=True, eq=False)
class RingBuffer:
    """A part of the ring; `event` is over when its last copy is, None where that is known."""

    offset: int
    address: int
    event: int | None = None


class Ring(abc.ABC):
    """Some buffers of equal size. Used by one thread, inside `with driver.current()`.

    Bytes lie in a buffer as they do in a page of their file, which reads past the page cache want.
    """

    def __init__(self, pool: EventPool, buffers: list[RingBuffer]) -> None:
        self._pool = pool
        self.buffers = buffers
        self._next = 0

    def turn(self) -> RingBuffer:
        """Returns the buffer that was used longest ago."""
        return self.buffers[self._next]

    def take_turn(self) -> None:
        """Says that the buffer of `turn` is used now."""
        self._next = (self._next + 1) % len(self.buffers)

    @abc.abstractmethod
    def read(self, buffer: RingBuffer, read: ArenaRead, first: int, size: int) -> Event:
        """Starts reading `size` bytes from byte `first` of a read on into a free buffer; returns when they are there.

        Does not block. Raises MballError; nothing is begun then.
        """

    @abc.abstractmethod
    def _copy(self, address: int, source: int, size: int, stream: int) -> None:
        """Has a stream copy out of a buffer. Raises DriverError."""

    def copy_out(self, buffer: RingBuffer, shift: int, address: int, size: int, stream: int) -> None:
        """Has a stream copy the bytes of a free buffer to the GPU.

        Raises DriverError. The stream may then have the copy, which counts for nothing, so the buffer stays free.
        """
        assert buffer.event is None, "a copy still reads it"
        self._copy(address, buffer.address + shift, size, stream)
        buffer.event = self._pool.record(stream)

    def is_free(self, buffer: RingBuffer) -> bool:
        """Returns whether no copy reads a buffer. Raises DriverError."""
        if buffer.event is not None and self._pool.streams.is_done(buffer.event):
            self._pool.give(buffer.event)
            buffer.event = None
        return buffer.event is None

    def free(self, buffer: RingBuffer) -> None:
        """Blocks until no copy reads a buffer. Raises DriverError."""
        if buffer.event is not None:
            self._pool.streams.synchronize(buffer.event)
            self._pool.give(buffer.event)
            buffer.event = None

    @abc.abstractmethod
    def close(self) -> None:
        """Gives the buffers back; nothing reads them any more. Idempotent. Raises DeviceError."""


def shift_bytes(read: ArenaRead, first: int) -> int:
    """Returns how far behind a page boundary of its file byte `first` of a read lies."""
    return (read.offset_bytes + first) % PAGE_BYTES

"""The buffers that bytes pass through between disk and GPU."""

from __future__ import annotations

from dataclasses import dataclass

from mball.memory.cuda_events import EventPool
from mball.memory.libc import PAGE_BYTES
from mball.memory.pinned import PinnedSlab
from mball.units import round_up


@dataclass(slots=True, eq=False)
class RingBuffer:
    """A part of the ring, and the copy that last read it: `event` says when it has, None if it never was recorded."""

    offset: int
    address: int
    in_use: bool = False  # a copy out of it was asked for, and nobody has seen its end
    event: int | None = None


class PinnedRing:
    """`num_buffers` buffers of `buffer_bytes`, pinned. Used by one thread, inside `with driver.current()`."""

    def __init__(self, pool: EventPool, *, num_buffers: int, buffer_bytes: int, node: int | None) -> None:
        """Pins at once, some ten milliseconds. Raises DeviceError when there is not so much host memory."""
        assert buffer_bytes % PAGE_BYTES == 0
        self._pool = pool
        # A page more each, so that bytes can lie in a page as they do in their file, which O_DIRECT wants.
        stride = buffer_bytes + PAGE_BYTES
        size = num_buffers * stride
        self._slab = PinnedSlab(pool.streams, size, node=node, chunk_bytes=round_up(size, PAGE_BYTES))
        self._slab.pin()
        self.buffers = [RingBuffer(n * stride, self._slab.address + n * stride) for n in range(num_buffers)]

    def view(self, buffer: RingBuffer, shift: int, size: int) -> memoryview:
        """Returns where `size` bytes are read to that lie `shift` bytes behind a page boundary of their file."""
        return self._slab.view(buffer.offset + shift, size)

    def copy_out(self, buffer: RingBuffer, shift: int, address: int, size: int, stream: int) -> None:
        """Has a stream copy the bytes of a buffer to the GPU. Raises DriverError."""
        buffer.in_use = True
        if buffer.event is not None:
            self._pool.give(buffer.event)
            buffer.event = None
        self._pool.streams.copy_in(address, buffer.address + shift, size, stream)
        buffer.event = self._pool.record(stream)

    def is_free(self, buffer: RingBuffer) -> bool:
        """Returns whether nothing reads a buffer. Raises DriverError."""
        if buffer.in_use and buffer.event is not None and self._pool.streams.is_done(buffer.event):
            buffer.in_use = False
        return not buffer.in_use

    def free(self, buffer: RingBuffer, stream: int) -> None:
        """Blocks until nothing reads a buffer. Raises DriverError."""
        if buffer.in_use and buffer.event is not None:
            self._pool.streams.synchronize(buffer.event)
        elif buffer.in_use:
            self._pool.streams.drain(stream)
        buffer.in_use = False

    def close(self) -> None:
        """Unpins; nothing reads the buffers any more. Idempotent. Raises DeviceError."""
        self._slab.close()

"""The buffers that bytes pass through between disk and GPU."""

from __future__ import annotations

from dataclasses import dataclass

from mball.memory.cuda_events import EventPool
from mball.memory.libc import PAGE_BYTES
from mball.memory.pinned import PinnedSlab
from mball.units import round_up


@dataclass(slots=True, eq=False)
class RingBuffer:
    """A part of the ring; `event` is over when its last copy is, None where that is known."""

    offset: int
    address: int
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
        """Has a stream copy the bytes of a free buffer to the GPU.

        Raises DriverError. The stream may then have the copy, which counts for nothing, so the buffer stays free.
        """
        assert buffer.event is None, "a copy still reads it"
        self._pool.streams.copy_in(address, buffer.address + shift, size, stream)
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

    def close(self) -> None:
        """Unpins; nothing reads the buffers any more. Idempotent. Raises DeviceError."""
        self._slab.close()

"""The way from disk to a GPU through the host: buffers that are pinned, so that the GPU copies out of them itself."""

from __future__ import annotations

from mball.memory.cuda_events import EventPool
from mball.memory.device import ArenaRead, CopySource, Event
from mball.memory.libc import PAGE_BYTES
from mball.memory.pinned import PinnedSlab
from mball.memory.ring import Ring, RingBuffer, shift_bytes
from mball.units import round_up


class PinnedRing(Ring):
    """`num_buffers` buffers of `buffer_bytes`, pinned, that `source` reads into."""

    def __init__(
        self, pool: EventPool, source: CopySource, *, num_buffers: int, buffer_bytes: int, node: int | None
    ) -> None:
        """Pins at once, some ten milliseconds. Raises DeviceError when there is not so much host memory."""
        assert buffer_bytes % PAGE_BYTES == 0
        self._source = source
        # A page more each, so that bytes can lie in a page as they do in their file.
        stride = buffer_bytes + PAGE_BYTES
        size = num_buffers * stride
        self._slab = PinnedSlab(pool.streams, size, node=node, chunk_bytes=round_up(size, PAGE_BYTES))
        self._slab.pin()
        super().__init__(pool, [RingBuffer(n * stride, self._slab.address + n * stride) for n in range(num_buffers)])

    def read(self, buffer: RingBuffer, read: ArenaRead, first: int, size: int) -> Event:
        view = self._slab.view(buffer.offset + shift_bytes(read, first), size)
        return self._source.submit([read.into(view, first)])

    def _copy(self, address: int, source: int, size: int, stream: int) -> None:
        self._pool.streams.copy_in(address, source, size, stream)

    def close(self) -> None:
        """Unpins. Idempotent. Raises DeviceError."""
        self._slab.close()
